"""Gradients of copies that travel during the backward pass: the same bits as after it, and no more memory."""

import dataclasses

import pytest
from dist import spawn
from parity import MODEL, make_trainer
from test_parity import REPLICATION, replica_config

from smartmoe import replicas
from smartmoe.config import OnlineConfig, ParallelPlan, check

ITERATIONS = 6
PLANS = [  # accumulation, micro-batches in flight with recomputation, experts that several ranks have and whose state is cut
    (ParallelPlan(dp=4, ep=4), 0),
    (ParallelPlan(pp=2, vpp=2, tp=2, ep=2, recompute=True), 0),
    (ParallelPlan(dp=4, ep=2), 1),
]


def losses_of(plan, zero, early, room=None):
    """(loss, bytes sent, norm) of each iteration, and how many layers' gradients left early in it. room: experts that a
    rank may get back at once, for each of its replica slots; None = as many as there is memory for."""
    config = replica_config(plan, "history")
    config = dataclasses.replace(
        config,
        online=dataclasses.replace(config.online, return_early=early),
        workload=dataclasses.replace(config.workload, zero=zero),
    )
    trainer, results, started = make_trainer(check(config)), [], []
    if early:
        assert trainer._early._limit == max(2 * len(trainer.layers), plan.ep)
        trainer._early._limit = room or trainer._early._limit
    start, swaps = replicas.start_return, []
    replicas.start_return = lambda *args: swaps.append(1) or start(*args)
    for iteration in range(ITERATIONS):
        REPLICATION["history"](trainer, iteration)
        result = trainer.run_iteration()
        results.append((result.lm_loss, result.replica_bytes, result.optimizer.grad_norm))
        started.append(len(swaps))
        swaps.clear()
    replicas.start_return = start
    return results, started


def run_all(world_rank):
    cases = [(False, None), (True, None), (True, "little")]
    return [[losses_of(plan, zero, early, room and plan.ep // 2) for early, room in cases] for plan, zero in PLANS]


def test_not_a_bit_differs_and_layers_return_early_as_memory_allows():
    for (plan, _), (at_the_end, early, narrow) in zip(PLANS, spawn(run_all, 4)[0], strict=True):
        assert at_the_end[0] == early[0] == narrow[0], plan.describe()
        num_layers = MODEL.num_layers // plan.pp
        assert at_the_end[1] == [0] * ITERATIONS and early[1] == [0] + [num_layers] * (ITERATIONS - 1), plan.describe()
        assert 0 < sum(narrow[1]) < sum(early[1]), plan.describe()


def test_only_copies_that_stay_for_a_step_return_early():
    config = replica_config(ParallelPlan(dp=2, ep=2), "exact")
    for online in (OnlineConfig(return_early=True), dataclasses.replace(config.online, return_early=True)):
        with pytest.raises(ValueError, match='return_early is for online.replicate = "history"'):
            check(dataclasses.replace(config, online=online))
