"""ZeRO-1, 2 and 3: the same training as without, whatever is cut, moved, saved and read again."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import spawn
from parity import GATES, LOSS_TOLERANCE, MODEL, WORKLOAD, make_config, make_trainer
from test_faults import expert_checksums, merged
from test_parity import REPLICATION, replica_config

from smartmoe import checkpoint
from smartmoe.config import LayerConfig, OnlineConfig, ParallelPlan, check
from smartmoe.parallel.zero import ShardedBuffers, cut_rows
from smartmoe.placement import Placement
from smartmoe.planner.memory import optimizer_bytes
from smartmoe.planner.parameters import Parameters
from smartmoe.trainer import Trainer

SHALLOW = dataclasses.replace(MODEL, num_layers=2)  # where no pipeline cuts it, two layers show what four do
# Nothing divides: rows are dealt out unevenly, and of the 6 experts' router rows the last of 4 ranks gets none.
ODD_MODEL = dataclasses.replace(
    MODEL, num_layers=2, hidden_size=37, ffn_size=61, num_heads=1, vocab_size=331, num_experts=6
)
LOOP = LayerConfig(experts="loop")
ITERATIONS, NUM_RUN = 5, 3  # of a schedule; of a run that is compared


def config_of(plan, zero, **changes):
    work = dataclasses.replace(changes.pop("workload", WORKLOAD), zero=zero, iterations=ITERATIONS)
    return make_config(plan, workload=work, **{"gate": GATES["capacity"], **changes})


def odd(plan, zero, **changes):
    return config_of(plan, zero, model=ODD_MODEL, layer=LOOP, **changes)


def losses_of(config, before=None, device="cpu"):
    trainer, results = make_trainer(config, device), []
    for iteration in range(NUM_RUN):
        if before:
            before(trainer, iteration)
        result = trainer.run_iteration()
        results.append((result.lm_loss, result.optimizer.grad_norm))
    return np.array(results)


def shuffle(trainer, iteration):
    """Other owners for all experts before each iteration but the first."""
    if iteration:
        move(trainer, np.random.default_rng(iteration))


# Two ranks share every parameter at most: a sum of two commutes, and not a bit may differ.
PAIR = ParallelPlan(pp=2, vpp=2, dp=2, ep=1, recompute=True)
SPLIT = ParallelPlan(dp=4, ep=2)  # each expert on two of the four ranks
HALF = dataclasses.replace(WORKLOAD, dtype="bfloat16")
FEW = dataclasses.replace(MODEL, num_layers=2, moe_every=2)
CASES = {  # config, and the stages to compare with 0
    "pair": (config_of, PAIR, {}, (1, 3)),
    "slices": (config_of, ParallelPlan(dp=2, tp=2, ep=2), {"model": SHALLOW}, (3,)),
    "odd": (odd, SPLIT, {}, (1,)),
    "split": (config_of, SPLIT, {"model": SHALLOW}, (1, 2)),
    "bfloat16": (config_of, SPLIT, {"workload": HALF, "model": SHALLOW}, (3,)),
    # a stage without experts must agree with the other on the entries of the gradient norm
    "no experts": (config_of, dataclasses.replace(PAIR, vpp=1), {"model": FEW}, (3,)),
}
# (case, stage) of a run that moves experts -> stage of the one that it repeats: 2 and 3 add the same in the same order
MOVED = {("split", 1): 1, ("split", 3): 2, ("bfloat16", 3): 3, ("odd", 3): 1}


def with_replicas(mode, zero):
    config = replica_config(SPLIT, mode)
    return dataclasses.replace(config, workload=config_of(SPLIT, zero).workload, model=SHALLOW)


def run_all(world_rank, folder):
    """Losses and norms: "cases" by name and stage, "moved" as MOVED, "copied" by mode and stage; and others."""
    found = {
        name: {zero: losses_of(make(plan, zero, **more)) for zero in (0, *stages)}
        for name, (make, plan, more, stages) in CASES.items()
    }
    moved = {}
    for name, zero in MOVED:
        make, plan, more, _ = CASES[name]
        moved[name, zero] = losses_of(make(plan, zero, **more), shuffle)
    copied = {mode: losses_of(with_replicas(mode, 3), REPLICATION[mode]) for mode in ("history", "exact")}
    moves = [move_often(1, 20), move_often(3, 5)]
    others = {"moves": moves, "sizes": sizes(), "resumed": save_and_resume(Path(folder))}
    return {"cases": found, "moved": moved, "copied": copied, **others}


def test_losses_and_norms_are_those_without(runs):
    for name, by_stage in runs[0]["cases"].items():
        wanted, tolerance = by_stage[0], 1e-3 if name == "bfloat16" else LOSS_TOLERANCE
        for zero, found in by_stage.items():
            np.testing.assert_allclose(found, wanted, rtol=tolerance, err_msg=f"{name}, {zero}")
            if name == "pair" and zero == 1:
                np.testing.assert_array_equal(found[:, 0], wanted[:, 0])
    for mode, found in runs[0]["copied"].items():
        np.testing.assert_allclose(found, runs[0]["cases"]["split"][0], rtol=LOSS_TOLERANCE, err_msg=mode)


def test_losses_are_the_same_where_experts_move(runs):
    for (name, zero), still in MOVED.items():
        wanted, found = runs[0]["cases"][name][still], runs[0]["moved"][name, zero]
        if name == "odd":  # with odd sizes, products on a CPU depend on where the rows of a slot begin
            np.testing.assert_allclose(found, wanted, rtol=LOSS_TOLERANCE, err_msg=name)
        else:
            np.testing.assert_array_equal(found, wanted, f"{name}, {zero}")


# ----------------------------------------------------------------------------------------- experts with their state


def move_often(zero, num_moves):
    """Whether every expert's weights and state are what they were after some moves and an odd number of steps between them,
    on the ranks that have a part of it: (checksums before, checksums after), by (share, parameter, state, expert)."""
    trainer = make_trainer(odd(SPLIT, zero))
    trainer.run_iteration()
    before = of_all_shares(trainer)
    rng = np.random.default_rng(0)
    for _ in range(num_moves):
        move(trainer, rng)
    return before, of_all_shares(trainer)


def move(trainer, rng):
    layers = list(trainer.layers.values())
    orders = [rng.permutation(layer.placement.expert_of_slot).tolist() for layer in layers]
    pairs = zip(layers, orders, strict=True)
    trainer.online.move([(layer, Placement(layer.placement.num_ranks, tuple(order))) for layer, order in pairs])


def of_all_shares(trainer):
    parts = [None] * dist.get_world_size()
    for unit in getattr(trainer.optimizer.buffers, "_units", []):
        trainer.optimizer.buffers.bring(unit)
    mine = {(trainer.mesh.expert_dp_rank, *key): value for key, value in expert_checksums(trainer).items()}
    trainer.optimizer.buffers.zero()
    dist.all_gather_object(parts, mine)
    return merged(parts)


def test_many_moves_keep_every_part_of_every_expert(runs):
    for before, after in runs[0]["moves"]:
        assert before == after
        # 2 layers, 6 experts, 4 weights and biases, weight, master and 2 moments, on each of the 2 ranks that have the expert
        assert len(after) == 2 * 6 * 4 * 4 * 2
        weights, masters = ({key: crc for key, crc in after.items() if key[2] == kind} for kind in ("weight", "master"))
        for (
            share,
            *key,
        ), crc in weights.items():  # weights in passes are whole on both, masters are two different halves
            assert weights[1 - share, *key] == crc
        assert all(masters[1 - share, *key] != crc for (share, *key), crc in masters.items())


# ------------------------------------------------------------------------------------------------------------ memory


def sizes():
    """(numbers of masters and moments here, of parameters whose copies `num` ranks share, by num)."""
    optimizer = make_trainer(odd(SPLIT, 1)).optimizer
    kept = sum(t.numel() for idx in range(len(optimizer.masters)) for t in optimizer.state_tensors(idx).values())
    shared = {}
    for ref, share in zip(optimizer.buffers.refs, optimizer.buffers.shares, strict=True):
        shared[share.num] = shared.get(share.num, 0) + ref.local.numel()
    assert all(master.is_contiguous() for master in optimizer.masters)
    return kept, shared


def test_a_rank_keeps_its_part_of_the_optimizer_state(runs):
    kept = [result["sizes"][0] for result in runs]
    shared = runs[0]["sizes"][1]
    assert set(shared) == {4, 2}  # dense parameters on all ranks, experts on two
    assert sum(kept) == 3 * (shared[4] + 2 * shared[2])  # nothing is kept twice: 2 expert groups with as many experts
    assert max(kept) < 1.1 * sum(kept) / 4
    told = optimizer_bytes(Parameters(dense=shared[4], expert=shared[2]), SPLIT, 4, 1)
    assert sum(told) == 4 * sum(kept) / 4  # of the mean rank
    assert optimizer_bytes(Parameters(dense=6.0, router=2.0, expert=5.0), SPLIT, 2, 0) == (4 * 9, 8 * 11)
    assert optimizer_bytes(Parameters(dense=6.0, router=2.0, expert=4.0), SPLIT, 2, 1) == (4 * 3.5, 8 * 3.5)


# ------------------------------------------------------------------------------------------------------- checkpoints


RESUMES = [(PAIR, 0), (ParallelPlan(dp=2, tp=2, ep=2), 1), (SPLIT, 3)]


def save_and_resume(folder):
    """Losses after iteration 3: of a run with ZeRO-3 that goes on, of others that read its checkpoint, of one with ZeRO-1
    that reads the checkpoint of one of those, which was without."""
    first = make_trainer(config_of(SPLIT, 3))
    move(first, np.random.default_rng(1))
    for _ in range(3):
        first.run_iteration()
    path = first.save(folder / "one")
    losses = {"on": [first.run_iteration().lm_loss for _ in range(2)]}
    for idx, (plan, zero) in enumerate(RESUMES):
        trainer = make_trainer(config_of(plan, zero))
        trainer.resume(path)
        if idx == 0:
            again = trainer.save(folder / "two")
        losses[idx] = [trainer.run_iteration().lm_loss for _ in range(2)]
    trainer = make_trainer(config_of(SPLIT, 1))
    trainer.resume(again)
    losses["back"] = [trainer.run_iteration().lm_loss for _ in range(2)]
    odd_one = make_trainer(odd(ParallelPlan(dp=4, ep=1), 2))
    odd_one.run_iteration()
    odd_path = odd_one.save(folder / "odd")
    losses["odd on"] = [odd_one.run_iteration().lm_loss for _ in range(2)]
    trainer = make_trainer(odd(SPLIT, 3))
    trainer.resume(odd_path)
    losses["odd"] = [trainer.run_iteration().lm_loss for _ in range(2)]
    return losses


def test_a_checkpoint_is_read_by_any_plan_with_and_without(runs, saved):
    losses = runs[0]["resumed"]
    for name in (*range(len(RESUMES)), "back"):
        np.testing.assert_allclose(losses[name], losses["on"], rtol=LOSS_TOLERANCE, err_msg=str(name))
    assert losses[RESUMES.index((SPLIT, 3))] == losses["on"]
    np.testing.assert_allclose(losses["odd"], losses["odd on"], rtol=LOSS_TOLERANCE)
    alone = make_trainer(config_of(ParallelPlan(), 1))  # one process shares nothing
    alone.resume(checkpoint.latest(saved / "one"))
    np.testing.assert_allclose([alone.run_iteration().lm_loss for _ in range(2)], losses["on"], rtol=LOSS_TOLERANCE)
    checkpoint.export(checkpoint.latest(saved / "odd"), saved / "odd.pt")
    weights = torch.load(saved / "odd.pt", weights_only=True)["model"]
    assert weights["blocks.0.moe.experts.w1_LDF"].shape == (6, 37, 61)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def runs(saved):
    return spawn(run_all, 4, str(saved))


# ------------------------------------------------------------------------------------------------------ pure and small


def test_rows_are_dealt_out_as_torch_chunks_them():
    for num_rows in range(1, 20):
        for num_ranks in range(1, 9):
            sizes = [len(part) for part in torch.arange(num_rows).chunk(num_ranks)]
            assert cut_rows(num_rows, num_ranks) == sizes + [0] * (num_ranks - len(sizes))


def test_what_nobody_shares_stays_whole():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    (share,) = ShardedBuffers([("weight", weight)], {"dense": None}).shares
    assert (share.num, share.idx) == (1, 0) and share.value.data_ptr() == weight.data_ptr()


def test_a_move_is_weighed_by_what_travels_with_an_expert():
    experts = torch.nn.Module()
    experts.weight = torch.nn.Parameter(torch.zeros(2, 3, 4))  # of each of two experts 12 numbers
    layer = SimpleNamespace(layer_idx=0, experts=experts)

    def weighed(plan, zero, dtype, mode="never"):
        online = OnlineConfig(replicate=mode, replica_slots=int(mode != "never"))
        config = config_of(plan, zero, workload=dataclasses.replace(WORKLOAD, dtype=dtype), online=online)
        return Trainer._sizes(SimpleNamespace(config=config, dtype=getattr(torch, dtype)), layer).state_bytes / 12

    alone = ParallelPlan(dp=4, ep=4)
    assert [weighed(SPLIT, zero, "float32") for zero in range(4)] == [4 + 8, 4 + 6, 4 + 6, 6]
    assert [weighed(SPLIT, zero, "bfloat16") for zero in range(4)] == [2 + 12, 2 + 6, 2 + 6, 6]
    assert weighed(alone, 3, "float32") == 4 + 8 and weighed(alone, 3, "bfloat16") == 2 + 12
    assert weighed(SPLIT, 3, "bfloat16", "exact") == 2 + 6  # weights that have copies stay whole


def test_other_stages_are_refused():
    for zero in (4, -1):
        config = make_config()
        with pytest.raises(ValueError, match=f"workload.zero = {zero} must be 0, 1 "):
            check(dataclasses.replace(config, workload=dataclasses.replace(config.workload, zero=zero)))


# ------------------------------------------------------------------------------------------------------------- GPUs


def compare_on_gpus(world_rank):
    """By plan and precision, losses and norms without and with each stage of ZeRO, and with copies that return late and
    early."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device, found = f"cuda:{world_rank}", {}
    for plan in (ParallelPlan(dp=2, ep=1, recompute=True), ParallelPlan(dp=2, ep=2), ParallelPlan(tp=2, ep=1)):
        for work in (WORKLOAD, HALF):
            configs = [config_of(plan, zero, workload=work) for zero in (0, 1, 2, 3)]
            found[plan.describe(), work.dtype] = [losses_of(config, device=device) for config in configs]
    late = replica_config(ParallelPlan(dp=2, ep=2), "history")
    early = dataclasses.replace(late, online=dataclasses.replace(late.online, return_early=True))
    found["copies", "float32"] = [losses_of(config, REPLICATION["history"], device) for config in (late, early)]
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_losses_and_norms_on_two_gpus_are_those_without():
    for (name, dtype), (wanted, *others) in spawn(compare_on_gpus, 2, backend="nccl")[0].items():
        for found in others:
            np.testing.assert_allclose(found, wanted, rtol=1e-4 if dtype == "float32" else 2e-2, err_msg=f"{name} {dtype}")
