"""Every legal plan, system and migration gives the losses of one process (fp32, real text)."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dist import spawn
from parity import (
    GATES,
    MODEL,
    WORKLOAD,
    Curve,
    compare,
    legal_plans,
    make_config,
    make_trainer,
    num_micro_batches,
    run_curve,
)

from smartmoe import systems
from smartmoe.config import ClusterSpec, GateConfig, LayerConfig, OnlineConfig, ParallelPlan
from smartmoe.placement import Placement, Replicas


@pytest.fixture(scope="module")
def references():
    """(gate, micro-batches) -> curve of one process."""
    return {
        (name, num): run_curve(make_config(micro_batches=num, gate=gate))
        for name, gate in GATES.items()
        for num in (2, 4)
    }


# What recomputation may do wrong shows in the first gradients, as the same plan is run without it for all ten iterations.
RECOMPUTED_ITERATIONS = 4
# Where no pipeline cuts the model, two layers show what four do in half the time.
SHALLOW = dataclasses.replace(MODEL, num_layers=2)


@pytest.fixture(scope="module")
def shallow_references():
    """gate -> curve of one process."""
    return {name: run_curve(make_config(model=SHALLOW, gate=gate)) for name, gate in GATES.items()}


def _run_plans(world_rank, cases):
    num = {True: RECOMPUTED_ITERATIONS, False: WORKLOAD.iterations}
    return [
        run_curve(
            make_config(plan, gate=GATES[gate], model=MODEL if plan.pp > 1 else SHALLOW),
            num_iterations=num[plan.recompute],
        )
        for plan, gate in cases
    ]


def _plans_of(world_size, gate):
    """Every plan. Of four ranks, where a step is dear, every plan without a capacity, every third of them recomputed; with a
    capacity every fifth."""
    plans = legal_plans(world_size)
    if world_size < 4:
        return plans
    if gate == "capacity":
        return plans[::5]
    return [plan for plan in plans if not plan.recompute] + [plan for plan in plans if plan.recompute][::3]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_plan_follows_one_process(references, shallow_references, world_size, gate):
    cases = [(plan, gate) for plan in _plans_of(world_size, gate)]
    curves = spawn(_run_plans, world_size, cases, timeout_s=900)[0]
    assert {len(curve.loss) for curve in curves} == {RECOMPUTED_ITERATIONS, WORKLOAD.iterations}
    reports = []
    for curve, (plan, _) in zip(curves, cases, strict=True):
        reference = references[gate, num_micro_batches(plan)] if plan.pp > 1 else shallow_references[gate]
        assert curve.routing[0].keys() == reference.routing[0].keys()
        reports.append(compare(curve, reference, plan.describe()))
    flips = [report for report in reports if report]
    print("\n".join(flips))
    assert len(flips) <= len(cases) // 4, "near-ties are rare:\n" + "\n".join(flips)


MIXED_MODEL = dataclasses.replace(MODEL, moe_every=2)
MIXED_PLANS = [ParallelPlan(pp=4), ParallelPlan(pp=2, dp=2, ep=2), ParallelPlan(dp=2, tp=2, ep=4)]


def _run_mixed(world_rank):
    return [run_curve(make_config(plan, micro_batches=4, model=MIXED_MODEL)) for plan in MIXED_PLANS]


def test_dense_blocks_between_and_stages_without_experts():
    reference = run_curve(make_config(micro_batches=4, model=MIXED_MODEL))
    for curve, plan in zip(spawn(_run_mixed, 4)[0], MIXED_PLANS, strict=True):
        assert not compare(curve, reference, plan.describe())


# ------------------------------------------------------------------------------------------------ online placement


def _shuffle_at(target_iteration):
    """Move every layer's experts to a random placement before `target_iteration`, state and all."""

    def interfere(trainer, iteration):
        if iteration == target_iteration:
            rng = np.random.default_rng(0)
            targets = []
            for layer in trainer.layers.values():
                order = rng.permutation(layer.placement.expert_of_slot)
                targets.append((layer, Placement(layer.placement.num_ranks, tuple(order.tolist()))))
            trainer.online.move(targets)

    return interfere


def _run_with_and_without_migration(world_rank, plans):
    results = []
    for plan in plans:
        config = make_config(plan, gate=GATES["capacity"])
        results.append([run_curve(config, before, num_iterations=8).loss for before in (None, _shuffle_at(5))])
    return results


MIGRATION_PLANS = [
    ParallelPlan(dp=4, ep=4),
    ParallelPlan(dp=4, ep=2),
    ParallelPlan(dp=2, tp=2, ep=4, recompute=True),
    ParallelPlan(pp=2, vpp=2, dp=2, ep=2),
]


def test_a_migration_changes_no_bit():
    for (still, moved), plan in zip(
        spawn(_run_with_and_without_migration, 4, MIGRATION_PLANS)[0], MIGRATION_PLANS, strict=True
    ):
        assert still == moved, plan.describe()


def test_a_migration_that_forgets_the_moments_is_seen():
    def shuffle_masters_only(trainer, iteration):
        if iteration == 5:
            state_of = trainer.online._state_of
            trainer.online._state_of = lambda layer: state_of(layer)[::3]  # of master, exp_avg, exp_avg_sq
            _shuffle_at(5)(trainer, iteration)

    config = make_config()
    assert run_curve(config, before_iteration=shuffle_masters_only).loss != run_curve(config).loss


# --------------------------------------------------------------------------------------------------- replication


def random_replicas(placement: Placement, num_replicas: int, rng, num_owners: int) -> Replicas:
    """Up to `num_replicas` experts of other ranks on every rank, all from the first `num_owners`, and random shares for
    their hosts, by source."""
    hosts_EW = np.eye(placement.num_ranks)[placement.rank_of_expert()]
    slots = []
    for ep_rank in range(placement.num_ranks):
        owner_E = placement.rank_of_expert()
        foreign = np.flatnonzero((owner_E != ep_rank) & (owner_E < num_owners))
        chosen = rng.permutation([*foreign, *[-1] * num_replicas])[:num_replicas].tolist()
        hosts_EW[[e for e in chosen if e >= 0], ep_rank] = 1
        slots += chosen
    share_SEW = rng.random((placement.num_ranks, *hosts_EW.shape)) * hosts_EW
    return Replicas(tuple(slots), share_SEW / share_SEW.sum(2, keepdims=True))


def _replicate_otherwise(trainer, iteration):
    """Other replicas every three iterations: first all from one owner, from 4 on with other owners, none from 7 to 9."""
    if iteration == 4:
        _shuffle_at(4)(trainer, iteration)
    if iteration % 3 == 1:
        rng = np.random.default_rng(iteration)
        for layer in trainer.layers.values():
            num_replicas = layer.experts.num_replicas
            none = Replicas.none(layer.placement, num_replicas)
            num_owners = 1 if iteration == 1 else layer.placement.num_ranks
            found = random_replicas(layer.placement, num_replicas, rng, num_owners)
            layer.set_replicas(none if iteration == 7 else found)


REPLICATION = {"history": _replicate_otherwise, "exact": None, "never": None}
# Accumulation, expert-dp, tensor parallelism, recomputation, and pipelines with several micro-batches in flight.
REPLICA_CASES = [
    (ParallelPlan(dp=4, ep=4), "history", "capacity"),
    (ParallelPlan(dp=4, ep=2), "exact", "capacity"),
    (ParallelPlan(dp=2, tp=2, ep=2), "history", "dropless"),
    (ParallelPlan(pp=2, dp=2, ep=2), "exact", "capacity"),
    (ParallelPlan(pp=2, vpp=2, tp=2, ep=2, recompute=True), "history", "capacity"),
    (ParallelPlan(dp=4, ep=4, recompute=True), "exact", "dropless"),
]


def replica_config(plan, mode, gate="capacity"):
    online = OnlineConfig(replicate=mode, replica_slots=2 if mode != "never" else 0)
    links = ClusterSpec(name="test", ranks_per_node=plan.world_size, intra_node_gbytes_per_s=1e6)  # a copy costs nothing
    return make_config(plan, gate=GATES[gate], online=online, cluster=links)


def _run_replicated(world_rank, cases):
    return [run_curve(replica_config(*case), before_iteration=REPLICATION[case[1]]) for case in cases]


def test_replication_follows_one_process(references):
    curves = spawn(_run_replicated, 4, REPLICA_CASES, timeout_s=600)[0]
    reports = []
    for curve, (plan, mode, gate) in zip(curves, REPLICA_CASES, strict=True):
        reports.append(compare(curve, references[gate, num_micro_batches(plan)], f"{plan.describe()} {mode}"))
    assert sum(map(bool, reports)) <= 1, "near-ties are rare:\n" + "\n".join(reports)


def _resume_replicated(world_rank, folder):
    """Losses of an uninterrupted run with replicas, of one that begins like it, and of runs that resume in its middle."""
    plan, losses = ParallelPlan(dp=2, ep=2), {}
    for mode, run in (("history", "again"), ("history", "whole"), ("exact", "again"), ("exact", "whole")):
        trainer = make_trainer(replica_config(plan, mode))
        losses[mode, run] = []
        for iteration in range(6 if run == "whole" else 3):
            if mode == "history":
                _replicate_otherwise(trainer, iteration)
            result = trainer.run_iteration()
            losses[mode, run].append(result.lm_loss)
            assert (result.replica_bytes > 0) == (mode == "exact" or iteration > 0), "replicas are set from 1 on"
            if iteration == 2 and run == "whole":
                path = trainer.save(folder / mode)
        for other in (mode, "never") if run == "whole" else ():
            resumed = make_trainer(replica_config(plan, other))
            resumed.resume(path)
            assert not any(layer.replicas.num_copies for layer in resumed.layers.values())
            losses[mode, other] = [resumed.run_iteration().lm_loss for _ in range(3)]
    half = dataclasses.replace(WORKLOAD, dtype="bfloat16", iterations=4)
    for mode in REPLICATION:
        config = dataclasses.replace(replica_config(plan, mode), workload=half)
        losses["half", mode] = run_curve(config, before_iteration=REPLICATION[mode]).loss
    return losses


def test_replication_repeats_itself_bit_for_bit_and_a_checkpoint_knows_only_owners(tmp_path):
    losses = spawn(_resume_replicated, 2, tmp_path)[0]
    for mode in ("history", "exact"):
        assert losses[mode, "again"] == losses[mode, "whole"][:3]
        for other in (mode, "never"):
            np.testing.assert_allclose(losses[mode, other], losses[mode, "whole"][3:], rtol=1e-5)
        np.testing.assert_allclose(losses["half", mode], losses["half", "never"], rtol=2e-3)
        keys = dcp.FileSystemReader(tmp_path / mode / "iter_0000003").read_metadata().state_dict_metadata
        experts = sorted(int(key.rsplit(".", 1)[1]) for key in keys if key.startswith("master.blocks.0.moe.experts.w1"))
        assert experts == list(range(MODEL.num_experts))


# -------------------------------------------------------------------------------------------------------- systems

SYSTEM_PLANS = {
    "fastmoe": None,
    "fastermoe": None,
    "padded": None,
    "tutel": None,
    "alpa": ParallelPlan(pp=2, dp=2, ep=2),
    "smartmoe_static": ParallelPlan(dp=4, ep=2),
    "smartmoe": ParallelPlan(pp=2, dp=2, ep=2),
}


def _run_systems(world_rank, gate):
    curves = {}
    for name, plan in SYSTEM_PLANS.items():
        base = make_config(plan or ParallelPlan(dp=4, ep=4), gate=gate)
        config = systems.build(
            name,
            model=base.model,
            gate=gate,
            workload=base.workload,
            cluster=base.cluster,
            plan=plan,
            online=OnlineConfig(policy="greedy", interval=3) if name == "smartmoe" else None,
        )
        curves[name] = run_curve(config, num_iterations=7)  # two moves
    return curves


def test_every_system_follows_fastmoe():
    # Dropless: DeepSpeed limits capacity per rank, so with a limit it rightly drops other tokens than the rest.
    curves = spawn(_run_systems, 4, GateConfig(kind="naive"), timeout_s=600)[0]
    for name, curve in curves.items():
        assert not compare(curve, curves["fastmoe"], name)


def test_the_systems_with_global_capacity_follow_fastmoe():
    curves = spawn(_run_systems, 4, GATES["capacity"], timeout_s=600)[0]
    for name in set(curves) - {"padded", "tutel"}:
        assert not compare(curves[name], curves["fastmoe"], name)


# ------------------------------------------------------------------------------------------- the comparison itself


def test_the_comparison_sees_one_percent_in_one_weight(references):
    def spoil(trainer, iteration):
        if iteration == 2:
            trainer.optimizer.buffers.refs[0].local.mul_(1.01)

    config = make_config(gate=GATES["dropless"])
    with pytest.raises(AssertionError):
        compare(run_curve(config, before_iteration=spoil), references["dropless", 2], "spoiled")


def test_a_flipped_near_tie_is_reported_and_another_flip_fails():
    logits = np.array([[1.0, 1.0 + 1e-7]], np.float32)
    reference = Curve([5.0, 4.0], [{0: np.array([[0]])}] * 2, [{0: logits}] * 2)
    flipped = Curve([5.0, 4.1], [{0: np.array([[0]])}, {0: np.array([[1]])}], [{0: logits}, {0: logits + 1e-7}])
    assert "iteration 1 layer 0" in compare(flipped, reference, "near")
    wrong = dataclasses.replace(flipped, logits=[{0: logits}, {0: logits + 1e-3}])
    with pytest.raises(AssertionError, match="iteration 1 layer 0"):
        compare(wrong, reference, "far")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_stays_near_fp32(references, dtype):
    curve = run_curve(make_config(gate=GATES["dropless"], workload=dataclasses.replace(WORKLOAD, dtype=dtype)))
    np.testing.assert_allclose(curve.loss, references["dropless", 2].loss, rtol=2e-2)
    assert curve.loss[-1] < curve.loss[0] - 0.2


# ------------------------------------------------------------------------------------------------------------ GPUs

GPU_LOSS_TOLERANCE = 1e-4


def _run_plans_on_gpus(world_rank, cases):
    torch.backends.cuda.matmul.allow_tf32 = False
    return [run_curve(make_config(plan, gate=GATES[gate]), device=f"cuda:{world_rank}") for plan, gate in cases]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_every_plan_on_two_gpus_follows_one_process_on_a_cpu(references):
    cases = [(plan, gate) for plan in legal_plans(2) for gate in GATES]
    curves = spawn(_run_plans_on_gpus, 2, cases, backend="nccl", timeout_s=500)[0]
    for curve, (plan, gate) in zip(curves, cases, strict=True):
        print(compare(curve, references[gate, 2], f"{plan.describe()} {gate}", GPU_LOSS_TOLERANCE, GPU_LOSS_TOLERANCE))


def _replicate_on_gpus(world_rank, cases):
    torch.backends.cuda.matmul.allow_tf32 = False
    plan, curves = ParallelPlan(dp=2, ep=2), []
    for mode, dispatcher in cases:
        config = dataclasses.replace(replica_config(plan, mode), layer=LayerConfig(dispatcher=dispatcher))
        curves.append(run_curve(config, before_iteration=REPLICATION[mode], device=f"cuda:{world_rank}"))
    return curves


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_replication_on_two_gpus_follows_one_process_and_repeats_itself(references):
    cases = [(mode, dispatcher) for mode in ("history", "exact") for dispatcher in ("basic", "direct")]
    curves = spawn(_replicate_on_gpus, 2, [*cases, *cases], backend="nccl", timeout_s=500)[0]
    for idx, (curve, case) in enumerate(zip(curves, cases, strict=False)):
        print(compare(curve, references["capacity", 2], str(case), GPU_LOSS_TOLERANCE, GPU_LOSS_TOLERANCE))
        assert curve.loss == curves[idx + len(cases)].loss, case


def _migrate_on_gpus(world_rank, config):
    device = f"cuda:{world_rank}"
    return run_curve(config, device=device).loss, run_curve(config, before_iteration=_shuffle_at(5), device=device).loss


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_migration_on_two_gpus_keeps_the_losses(dtype):
    config = make_config(ParallelPlan(dp=2, ep=2), workload=dataclasses.replace(WORKLOAD, dtype=dtype))
    still, moved = spawn(_migrate_on_gpus, 2, config, backend="nccl")[0]
    np.testing.assert_allclose(moved, still, rtol=GPU_LOSS_TOLERANCE if dtype == "float32" else 1e-2)
