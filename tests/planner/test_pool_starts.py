"""Plans that the planner calls legal start in the trainer; those that it calls illegal are refused with its words."""

import dataclasses
import math

import numpy as np
import pytest

from smartmoe.config import ClusterSpec, check
from smartmoe.mesh import build_mesh
from smartmoe.planner import described, loads, pool
from smartmoe.planner.cost_model import CostModel
from tests.dist import spawn
from tests.parity import MODEL, make_config, make_trainer

NUM_RANKS, NUM_PLANS = 4, 3


def _space():
    config = make_config(micro_batches=4)
    config = dataclasses.replace(config, workload=dataclasses.replace(config.workload, iterations=10))
    cluster = ClusterSpec(ranks_per_node=NUM_RANKS)
    cost = CostModel(config, cluster, described.describe(cluster, described.Rates(), "float32"), loads.uniform(MODEL))
    return config, cluster, pool.build(cost, NUM_RANKS)


def _run(_world_rank, configs):
    losses = []
    for config in configs:
        losses.append(make_trainer(config).run_iteration().lm_loss)
    return losses


def test_legal_plans_start():
    config, cluster, space = _space()
    order = np.random.default_rng(7).permutation(len(space.fitting))
    kinds = {(c.plan.pp, c.plan.vpp, c.plan.tp): c for c in (space.fitting[place] for place in order)}
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
