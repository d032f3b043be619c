"""Gradients reduced while backward passes run: the same sums, every rank the same buckets in the same order."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from dist import spawn
from parity import GATES, WORKLOAD, make_config, make_trainer

from smartmoe.config import GateConfig, OnlineConfig, ParallelPlan
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.parallel import data, early
from smartmoe.parallel.data import ParamRef

PLANS = [
    ParallelPlan(dp=4, ep=2),
    ParallelPlan(dp=2, tp=2, ep=1, recompute=True),
    ParallelPlan(pp=2, vpp=2, dp=2, ep=1),
]


def _train(plan, reduce_early, **changes):
    """Losses and norms of three iterations, and in each iteration how many buckets were started before the passes ended."""
    workload = dataclasses.replace(WORKLOAD, reduce_early=reduce_early)
    trainer = make_trainer(make_config(plan, workload=workload, **changes))
    started, run = [], trainer.runner.run
    reduction = trainer.optimizer.buffers.early

    def counted(*batch):
        losses = run(*batch)
        if reduction is not None:
            started.append((reduction.num_started, len(reduction._buckets)))
        return losses

    trainer.runner.run = counted
    results = [trainer.run_iteration() for _ in range(3)]
    return [number for result in results for number in (result.lm_loss, result.optimizer.grad_norm)], started


def _run(world_rank):
    early.EarlyReduction.__init__.__defaults__ = (20_000,)  # bytes of a bucket: several for the small model
    found = []
    for plan in PLANS:
        found.append((_train(plan, False, gate=GATES["capacity"]), _train(plan, True, gate=GATES["capacity"])))
    history = OnlineConfig(replicate="history", replica_slots=1)
    copies = [_train(PLANS[0], how, gate=GATES["dropless"], online=history) for how in (False, True)]
    idle_router = _train(PLANS[0], True, gate=GateConfig(kind="zero")), _train(PLANS[0], False, gate=GateConfig(kind="zero"))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [case[1][1] for case in found])
    return found, copies, idle_router, everyone


def test_early_sums_are_the_sums():
    found, copies, idle_router, everyone = spawn(_run, 4)[0]
    for plan, ((late, none), (soon, started)) in zip(PLANS, found, strict=True):
        assert not none and soon == pytest.approx(late, rel=1e-6), plan.describe()
        for num, total in started:
            assert num >= total - 1 > 1, f"{plan.describe()}: {num} of {total} buckets were started by the passes"
    assert copies[0][0] == pytest.approx(copies[1][0], rel=1e-6)
    (soon, started), (late, _) = idle_router
    assert soon == pytest.approx(late, rel=1e-6)
    assert all(num < total for num, total in started), "a router without gradients holds its bucket back to the end"
    for plan, ranks in zip(PLANS, zip(*everyone, strict=True), strict=True):
        assert len({str(started) for started in ranks}) <= plan.pp, "ranks of one stage start alike"


class Recorder:
    """Stands in for torch.distributed: notes which part of the buffer is reduced when."""

    def __init__(self):
        self.seen, self.num_waits = [], 0

    def all_reduce(self, tensor, group, async_op):
        self.seen.append((group, tensor.numel(), tensor[0].item()))
        return self

    def wait(self):
        self.num_waits += 1


def test_a_bucket_waits_for_the_last_write_of_its_parameters_and_for_those_before(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(early, "dist", recorder)
    flat = torch.zeros(12)
    refs = [ParamRef(f"p{i}", "dense", None, flat[3 * i : 3 * i + 3], flat[3 * i : 3 * i + 3]) for i in range(4)]
    reduction = early.EarlyReduction(refs, {"dense": flat}, range(4), {"dense": "g"}, num_passes=2, bucket_bytes=24)
    for _ in range(2):
        recorder.seen.clear()
        flat.copy_(torch.arange(12))
        for idx in (3, 2, 1, 0, 1, 0, 3, 2):  # the last pass finishes the first layers before the last ones
            assert not recorder.seen
            reduction.note(idx)
        reduction.note(3)  # whoever comes next tells that parameter 2 has been written
        assert recorder.seen == [("g", 6, 6.0), ("g", 6, 0.0)]
        reduction.finish()
        assert len(recorder.seen) == 2
        reduction.reset()


def test_of_several_passes_the_last_reduces_and_is_not_over_before_it_is_done(monkeypatch):
    """As a graph holds it: reductions that outlive their pass would be the next one's, or of no capture at all."""
    recorder = Recorder()
    monkeypatch.setattr(early, "dist", recorder)
    flat = torch.zeros(12)
    refs = [ParamRef(f"p{i}", "dense", None, flat[3 * i : 3 * i + 3], flat[3 * i : 3 * i + 3]) for i in range(4)]
    reduction = early.EarlyReduction(refs, {"dense": flat}, range(4), {"dense": "g"}, num_passes=3, bucket_bytes=24)
    reduction.waits_for_finish = True
    reduction.reset(1)
    for idx in (3, 2, 1, 0):
        reduction.note(idx)
    assert not recorder.seen
    with reduction.within():
        for idx in (3, 2, 1, 0):
            reduction.note(idx)
        assert (len(recorder.seen), recorder.num_waits) == (1, 0)
    assert (len(recorder.seen), recorder.num_waits) == (2, 2) and reduction.waits_for_finish
    reduction.finish()
    assert (len(recorder.seen), recorder.num_waits) == (2, 2)


def test_a_weight_that_a_pass_uses_twice_counts_once(monkeypatch):
    """Also where products have added both gradients to its buffer, and autograd brings none."""
    recorder = Recorder()
    monkeypatch.setattr(early, "dist", recorder)
    monkeypatch.setattr(data, "group_rank", lambda group: 0)
    shapes = {"w1": (2, 8, 16), "b1": (2, 16), "w2": (2, 16, 8), "b2": (2, 8)}
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for param in params.values():
        param.parallel = "expert"
    buffers = data.GradientBuffers(list(params.items()), {"expert": "g"})
    monkeypatch.setattr(early.EarlyReduction.__init__, "__defaults__", (16,))  # a bucket for each parameter
    buffers.reduce_early(num_passes=2, kinds=["expert"])
    for _ in range(2):
        recorder.seen.clear()
        for num_started in (0, 3):  # nobody comes after the last one and tells that it has been written
            rows_RD, count_L = torch.randn(5, 8), torch.tensor([2, 3])
            uses = [expert_ffn(rows_RD, count_L, *params.values(), "gelu", "grouped") for _ in range(2)]
            sum(uses).sum().backward()
            assert len(recorder.seen) == num_started
        buffers.complete()
        buffers.early.finish()
        assert len(recorder.seen) == 4
        buffers.zero()


def test_what_a_failed_capture_has_started_is_not_waited_for(monkeypatch):
    recorder = Recorder()
    recorder.wait = lambda: pytest.fail("what was captured never runs")
    monkeypatch.setattr(early, "dist", recorder)
    flat = torch.zeros(6)
    refs = [ParamRef(f"p{i}", "dense", None, flat[3 * i : 3 * i + 3], flat[3 * i : 3 * i + 3]) for i in range(2)]
    reduction = early.EarlyReduction(refs, {"dense": flat}, range(2), {"dense": "g"}, num_passes=1, bucket_bytes=12)
    with pytest.raises(RuntimeError, match="not permitted"), reduction.within():
        reduction.note(1), reduction.note(0)
        assert len(recorder.seen) == 1
        raise RuntimeError("operation not permitted when stream is capturing")
    del recorder.wait
    num_waits = []
    monkeypatch.setattr(Recorder, "wait", lambda self: num_waits.append(1))
    reduction.reset()
    reduction.finish()
    assert len(num_waits) == 2, "the reductions of the pass that runs as it is"
