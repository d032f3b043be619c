"""ZeRO-2 and 3 in a world of two: what is on a rank at which time, and cases where two ranks must agree to the bit."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from dist import gpu_backend, gpu_of, spawn
from parity import MODEL, WORKLOAD, make_config, make_trainer
from test_graphs import GPU_MODEL

from smartmoe.config import GateConfig, LayerConfig, OnlineConfig, ParallelPlan
from smartmoe.parallel import data, zero_passes
from smartmoe.parallel import zero as zero_rows
from smartmoe.parallel.zero_passes import PassShardedBuffers
from smartmoe.planner.parameters import Parameters
from smartmoe.planner.sharding import kept_bytes

SMALL = dataclasses.replace(MODEL, num_layers=2)
BOTH = ParallelPlan(dp=2, ep=1)  # each expert on both ranks
HALF = dataclasses.replace(WORKLOAD, dtype="float16", initial_loss_scale=2.0**20)
STAGES = (0, 1, 2, 3)


def trainer_of(zero, plan=BOTH, micro_batches=1, workload=WORKLOAD, **changes):
    config = {"model": SMALL, "gate": GateConfig(kind="naive"), **changes}
    return make_trainer(make_config(plan, micro_batches, workload=dataclasses.replace(workload, zero=zero), **config))


def train(trainer, iterations=2):
    found = [trainer.run_iteration() for _ in range(iterations)]
    return [result.lm_loss for result in found], [result.optimizer.skipped for result in found]


def run_all(world_rank):
    trainers = [trainer_of(zero) for zero in STAGES]
    return {
        "one micro-batch": [train(trainer)[0] for trainer in trainers],
        "kept": [kept(trainer.optimizer.buffers) for trainer in trainers],
        "late": too_late(trainers[2]),
        "without gradients": [train(trainer_of(zero, gate=GateConfig(kind="zero")))[0] for zero in (0, 3)],
        "overflow": [train(trainer_of(zero, workload=HALF), 3) for zero in (0, 3)],
        "at once": at_once(),
        "left": left_whole(trainers[3]),
    }


def at_once():
    """Where attention begins, forward and backward, of an iteration: of how many blocks the weights are whole, and of how many
    parts of the model they are on their way; of how many they are whole when it has ended, and after a pass without backward;
    and what such passes give before and behind another iteration."""
    trainer = trainer_of(3, dataclasses.replace(BOTH, recompute=True), micro_batches=2)
    blocks, counts = list(trainer.chunks[0].blocks.values()), []

    def num_here(*_):
        num_whole = sum(block.attention.qkv.weight.untyped_storage().nbytes() > 0 for block in blocks)
        counts.append((num_whole, sum(bool(unit.coming) for unit in trainer.optimizer.buffers._units)))

    for block in blocks:
        block.attention.register_forward_pre_hook(num_here)
        block.attention.register_full_backward_hook(num_here)
    trainer.run_iteration()
    in_passes, counts[:] = list(counts), []
    num_here()
    losses = [_loss_of(trainer)]
    trainer.run_iteration()
    losses.append(_loss_of(trainer))
    num_here()
    return in_passes, [counts[0], counts[-1]], losses


@torch.no_grad()
def _loss_of(trainer):
    tokens, token_id, targets = trainer.batch(0)
    return trainer.chunks[0](tokens, token_id_BT=token_id, target_BT=targets)[0].item()


def left_whole(trainer):
    """Whether parts of the model are whole behind a pass with gradients and no backward pass, and when passes are recorded."""
    tokens, token_id, targets = trainer.batch(0)
    trainer.chunks[0](tokens, token_id_BT=token_id, target_BT=targets)
    found, units = [], [unit for unit in trainer.optimizer.buffers._units if unit.away]
    trainer.graphs.reason = ""
    for step in (lambda: None, trainer.graphs.prepare):
        step()
        found.append(any(unit.is_here for unit in units))
    return found


def too_late(trainer):
    """What is said of a gradient that comes when its unit's have been collected."""
    weight = trainer.chunks[0].head.weight
    weight.grad = torch.ones_like(weight)
    try:
        trainer.optimizer.buffers.complete()
    except RuntimeError as error:
        return str(error)


def kept(buffers):
    """Bytes of weights and of gradient sums between iterations, and the numbers of parameters in a rank's model."""
    weights = sum(ref.param.untyped_storage().nbytes() for ref in buffers.refs)
    sums = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (s.grad for s in buffers.shares)}
    numel = {kind: sum(ref.param.numel() for ref in buffers.refs if ref.kind == kind) for kind in ("dense", "expert")}
    return weights, sum(sums.values()), numel["dense"], numel["expert"]


@pytest.fixture(scope="module")
def runs():
    return spawn(run_all, 2)


def test_two_ranks_agree_to_the_bit(runs):
    losses = runs[0]["one micro-batch"]
    assert all(found == losses[0] for found in losses)
    for name in ("without gradients", "overflow"):
        without, sharded = runs[0][name]
        assert without == sharded, name
    skipped = runs[0]["overflow"][0][1]
    assert any(skipped) and not all(skipped)


def test_weights_are_whole_where_they_are_used_and_no_longer(runs):
    for in_passes, between, (before, after) in (result["at once"] for result in runs):
        assert len(in_passes) == 2 * 2 * 3  # micro-batches, layers; forward, again, backward
        assert {num_whole for num_whole, _ in in_passes} == {1} and between == [(0, 0)] * 2
        # the second block, the head; again and backward the first block, then nothing, as embeddings' gradients need no weights
        assert [num_coming for _, num_coming in in_passes] == [1, 1, 1, 1, 0, 0] * 2
        assert before != after  # of weights as they are now


def test_what_an_evaluation_leaves_whole_is_not_recorded(runs):
    assert [run["left"] for run in runs] == [[True, False]] * 2


def test_a_gradient_behind_its_block_is_an_error(runs):
    assert "head.weight: a gradient came after the backward pass of its block" in runs[0]["late"]
    assert "workload.zero = 1" in runs[0]["late"]


def test_a_rank_keeps_what_the_planner_says(runs):
    norm = 4 * 2 * SMALL.hidden_size  # the last one is used without being called: its weights stay
    for zero in STAGES:
        weights, sums, dense, expert = runs[0]["kept"][zero]
        told = kept_bytes(Parameters(dense=dense, expert=expert), BOTH, 4, zero)
        assert (weights - norm * (zero == 3), sums) == told, zero
        whole = 4 * (dense + expert)
        assert told == (0 if zero == 3 else whole, whole / 2 if zero >= 2 else whole)


def test_whoever_is_alone_keeps_all():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    chunk = torch.nn.Module()
    chunk.blocks = torch.nn.ModuleDict()
    chunk.weight = weight
    buffers = PassShardedBuffers([("weight", weight)], {"dense": None}, [chunk], away=["dense"])
    buffers.adopt([weight.detach()])
    weight.sum().backward()
    buffers.reduce()
    (share,) = buffers.shares
    assert (share.num, share.idx) == (1, 0) and torch.equal(share.grad, torch.ones(3, 4)) and weight.numel() == 12


class Exchanges:
    """Stands in for those between two ranks that have the same, of which this is the first: what they bring is there when
    it has been waited for. most: that were under way at once."""

    def __init__(self):
        self.under_way, self.most = [], 0

    def start(self, finish):
        work = SimpleNamespace(wait=lambda: (finish(), self.under_way.remove(work)))
        self.under_way.append(work)
        self.most = max(self.most, len(self.under_way))
        return work

    def reduce_scatter(self, part, whole, group, async_op):
        return self.start(lambda: part.copy_(2 * whole[: part.numel()]))

    def all_gather(self, whole, part, group, async_op):
        return self.start(lambda: whole.copy_(part.repeat(2)))


def test_what_travels_is_waited_for_and_what_comes_twice_is_added(monkeypatch):
    exchanges, group = Exchanges(), SimpleNamespace(size=lambda: 2)
    for module in (data, zero_rows):
        monkeypatch.setattr(module, "group_rank", lambda group: 0)
    for module in (zero_rows, zero_passes):
        monkeypatch.setattr(module, "group_size", lambda group: 2)
    for name in ("reduce_scatter", "all_gather"):
        monkeypatch.setattr(zero_rows, name, getattr(exchanges, name))
    block, chunk = torch.nn.Module(), torch.nn.Module()
    a, b, c = (torch.nn.Parameter(torch.zeros(4)) for _ in range(3))
    block.a, block.b, block.c = a, b, c
    chunk.blocks = torch.nn.ModuleDict({"0": block})
    named = list(chunk.named_parameters())
    buffers = PassShardedBuffers(named, {"dense": group}, [chunk], away=["dense"], bucket_bytes=8)  # a bucket for each
    buffers.adopt([torch.tensor([value, 9.0]) for value in (1.0, 2.0, 3.0)])
    buffers.bring(buffers._units[0])
    assert [param.tolist() for param in (a, b, c)] == [[value, 9.0] * 2 for value in (1.0, 2.0, 3.0)]
    exchanges.most = 0
    for products in ((1.0, 2.0), (4.0,)):  # of two passes; those of the first use the weight twice
        for place, value in enumerate(products):
            total, is_first = buffers.take(0)
            assert is_first == (place == 0)
            total.fill_(value) if is_first else total.add_(value)
        a.grad, c.grad = torch.full((4,), 10.0), torch.ones(4)  # and what autograd has
        buffers.collect(buffers._units[0])
        buffers.add_all()
    assert [share.grad.tolist() for share in buffers.shares] == [[2 * 27.0] * 2, [0.0] * 2, [4.0] * 2]
    assert not exchanges.under_way and exchanges.most == zero_passes.MAX_UNDER_WAY
    assert not any(param.grad_sink.may_end_late for param in (a, b, c))  # nor may gradients still be on their way then


# --------------------------------------------------------------------------------------------------------------- GPUs


RECORDED = ((BOTH, 3, False), (ParallelPlan(dp=2, ep=2), 3, True))  # plan, micro-batches, exact copies


def recorded_on_gpus(world_rank):
    """By plan and stage: losses and norms of passes that run as they are and of recorded ones, and what was said of those."""
    device, found = gpu_of(world_rank), {}
    layer = LayerConfig(dispatcher="direct", row_factor=2.0)
    for (plan, num_passes, has_copies), zero in itertools.product(RECORDED, (2, 3)):
        online = OnlineConfig(replicate="exact", replica_slots=2) if has_copies else OnlineConfig()
        plan, curves, said = dataclasses.replace(plan, recompute=zero == 3), [], []
        for cuda_graph in ("never", "auto"):
            work = dataclasses.replace(WORKLOAD, dtype="bfloat16", iterations=100, cuda_graph=cuda_graph, zero=zero)
            gate = GateConfig(kind="naive")
            config = make_config(plan, num_passes, layer=layer, gate=gate, model=GPU_MODEL, workload=work, online=online)
            trainer = make_trainer(config, str(device))
            trainer.graphs.tell = said.append
            # the one way of attention whose backward pass is deterministic
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                results = [trainer.run_iteration() for _ in range(6)]
            curves.append([(result.lm_loss, result.optimizer.grad_norm) for result in results])
            trainer.close()
        found[plan.describe(), zero] = *curves, said
    return found


@pytest.mark.gpu
def test_recorded_passes_gather_and_reduce_as_those_that_run():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    for found in spawn(recorded_on_gpus, 2, backend=gpu_backend(2)):
        for case, (plain, recorded, said) in found.items():
            assert recorded == plain, case
            assert any("captured in" in words for words in said), (case, said)
