"""Plans that the planner calls legal start in the trainer; those that it calls illegal are refused with its words."""

import dataclasses
import gc
import math

import numpy as np
import pytest
import torch

from smartmoe.config import ClusterSpec, LayerConfig, ModelConfig, RunConfig, Workload, check
from smartmoe.data import TokenDataset
from smartmoe.mesh import build_mesh
from smartmoe.planner import described, loads, pool
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.memory import OUTSIDE_BYTES
from smartmoe.trainer import Trainer
from tests.dist import gpu_backend, spawn
from tests.parity import MODEL, make_config, make_trainer

NUM_RANKS, NUM_PLANS = 4, 3


def _space(memory_gbytes=4.0):
    config = make_config(micro_batches=4)
    config = dataclasses.replace(config, workload=dataclasses.replace(config.workload, iterations=10))
    cluster = ClusterSpec(ranks_per_node=NUM_RANKS, memory_gbytes=memory_gbytes)
    cost = CostModel(config, cluster, described.describe(cluster, described.Rates(), "float32"), loads.uniform(MODEL))
    return config, cluster, pool.build(cost, NUM_RANKS)


def _run(_world_rank, configs):
    losses = []
    for config in configs:
        losses.append(make_trainer(config).run_iteration().lm_loss)
    return losses


@pytest.mark.parametrize("memory_gbytes", [4.0, 1.0001e-9 * OUTSIDE_BYTES])
def test_legal_plans_start(memory_gbytes):
    """Also those that may not fit: the trainer refuses nothing for its predicted memory."""
    config, cluster, space = _space(memory_gbytes)
    legal = space.fitting if memory_gbytes == 4 else [p.candidate for p in space.pruned if not p.is_too_large]
    order = np.random.default_rng(7).permutation(len(legal))
    kinds = {(c.plan.pp, c.plan.vpp, c.plan.tp): c for c in (legal[place] for place in order)}
    configs = [pool.config_of(config, cluster, c.plan, c.micro_batch) for c in kinds.values()][:NUM_PLANS]
    assert len(configs) == NUM_PLANS, "a sample of many kinds"
    for losses in spawn(_run, NUM_RANKS, configs):
        assert all(math.isfinite(loss) for loss in losses) and losses == pytest.approx(
            [losses[0]] * len(losses), rel=1e-4
        )


def test_illegal_plans_are_refused_with_the_same_words():
    config, cluster, space = _space()
    reasons = {}
    for plan, micro_batch in pool.candidates(config, cluster, NUM_RANKS):
        reason = pool.why_illegal(config, cluster, plan, micro_batch)
        if reason is not None:
            reasons.setdefault(reason.split(" = ")[0], (plan, micro_batch, reason))
    assert len(reasons) >= 2
    for plan, micro_batch, reason in reasons.values():
        with pytest.raises(ValueError) as error:
            check(pool.config_of(config, cluster, plan, micro_batch))
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="needs 8 ranks"):
        build_mesh(dataclasses.replace(plan, pp=2, dp=4, tp=1), None)


LARGE = ModelConfig(
    num_layers=4, hidden_size=512, ffn_size=1024, num_heads=8, seq_len=512, vocab_size=8192, num_experts=16
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dispatcher", ["basic", "direct"])
def test_plans_that_fit_run_and_those_too_large_run_out_of_memory(dispatcher):
    """On one GPU that is as small as the cluster file says: torch's allocator gets what the planner leaves to it."""
    gpu_backend(1)
    torch.cuda.set_device(0)
    work = Workload(global_batch_size=64, micro_batch_size=1, dtype="bfloat16", iterations=10)
    config = RunConfig(model=LARGE, workload=work, layer=LayerConfig(dispatcher=dispatcher))
    cluster = ClusterSpec(device="cuda", ranks_per_node=1, memory_gbytes=4.5)
    config = dataclasses.replace(config, cluster=cluster)
    cost = CostModel(config, cluster, described.describe(cluster, described.Rates(), "bfloat16"), loads.uniform(LARGE))
    space = pool.build(cost, 1)
    room = cluster.memory_gbytes * 1e9 - OUTSIDE_BYTES
    too_large = [p.candidate for p in space.pruned if p.is_too_large]
    largest = sorted(space.fitting, key=lambda c: -c.memory.total)[:2]
    assert len(largest) == 2 and too_large, "a sample of both"
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    tokens = TokenDataset([("random", np.random.default_rng(0).integers(0, 8192, 200_000))], 8192)
    try:
        for candidate in (*largest, *too_large[:2]):
            _free()  # what ran out of memory, here or in an earlier test, still has some
            run = pool.config_of(config, cluster, candidate.plan, candidate.micro_batch)
            mesh = build_mesh(run.plan, torch.device("cuda", 0))
            if candidate in too_large:
                with pytest.raises(torch.OutOfMemoryError):
                    Trainer(run, mesh, tokens).run_iteration()
                continue
            losses, peak = _losses_and_peak(run, mesh, tokens)
            assert all(map(math.isfinite, losses))
            assert candidate.memory.allocated == pytest.approx(peak, rel=0.08), candidate.name
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        _free()


def _losses_and_peak(run, mesh, tokens):
    """Of two iterations, and the most bytes that tensors took; the trainer is gone when what they are is judged."""
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(run, mesh, tokens)
    return [trainer.run_iteration().lm_loss for _ in range(2)], torch.cuda.max_memory_allocated()


def _free():
    gc.collect()
    torch.cuda.empty_cache()
