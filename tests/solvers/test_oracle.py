import builtins

import numpy as np
import pytest
from hypothesis import given, settings

from smartmoe import solvers as sv
from smartmoe.placement import EMPTY, Placement, rank_load
from smartmoe.trace import ExpertTrace
from tests.solvers import test_exact_step, test_ownership
from tests.solvers.test_ownership import PUBLISHED, needs_published

pytest.importorskip("scipy")


def fullest(replicas, load_E):
    return replicas.host_load(np.array([load_E] + [[0] * len(load_E)] * (replicas.num_ranks - 1))).max()


@settings(max_examples=40, deadline=None)
@given(test_ownership.cases(max_experts=9))
def test_exact_is_a_lower_bound_of_the_solvers(case):
    load_E, current = case
    best = rank_load(load_E, sv.solve_exact(load_E, current)).max()
    assert best >= load_E.max() - 1e-9 and best >= load_E.sum() / current.num_ranks - 1e-9
    for solver in (sv.solve_greedy, sv.solve_least_move):
        assert rank_load(load_E, solver(load_E, current)).max() >= best - 1e-9


def test_exact_by_hand_and_without_scipy(monkeypatch):
    # Greedy gives 7 + 5 + 4 = 16 against the optimum 15 = 8 + 7 = 6 + 5 + 4.
    current = Placement(2, (0, 1, 2, EMPTY, 3, 4, EMPTY, EMPTY))
    assert rank_load([8, 7, 6, 5, 4], sv.solve_exact([8, 7, 6, 5, 4], current)).tolist() in ([15, 15],)
    assert rank_load([8, 7, 6, 5, 4], sv.solve_greedy([8, 7, 6, 5, 4], current)).max() > 15
    real = builtins.__import__

    def no_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(ValueError, match="needs scipy"):
        sv.solve_exact([8, 7, 6, 5, 4], current)
    with pytest.raises(ValueError, match="needs scipy"):
        sv.solve_exact_replicas([8, 7, 6, 5, 4], current, 1)


def test_exact_replicas_by_hand():
    # One slot a rank. 90 + 30 against 0: half of 120 moves, by the one copy there is room for.
    replicas = sv.solve_exact_replicas([90, 30, 0, 0], Placement.identity(4, 2), 1)
    assert replicas.experts_of_rank(1) == (0,) and np.isclose(fullest(replicas, [90, 30, 0, 0]), 60)
    # Four equal experts on one of two ranks: one copy takes one of them and no more.
    equal = [10, 10, 10, 10, 0, 0, 0, 0]
    assert np.isclose(fullest(sv.solve_exact_replicas(equal, Placement.identity(8, 2), 1), equal), 30)
    assert np.isclose(fullest(sv.solve_exact_replicas(equal, Placement.identity(8, 2), 2), equal), 20)
    assert sv.solve_exact_replicas([0, 0], Placement.identity(2, 2), 1).num_copies == 0


@settings(max_examples=30, deadline=None)
@given(test_exact_step.cases())
def test_exact_replicas_are_a_lower_bound_of_the_solvers(case):
    count_SE, placement, num_replica_slots = case
    exact = sv.solve_exact_replicas(count_SE.sum(axis=0), placement, num_replica_slots)
    exact.check(placement)
    best = exact.host_load(count_SE).max()
    for solver in (sv.solve_replicas, sv.solve_exact_step):
        assert solver(count_SE, placement, num_replica_slots).host_load(count_SE).max() >= best * (1 - 1e-5)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_slots", "mean_goal", "worst_goal"),
    [(8, 4, 1, 1.01, 1.05), (8, 4, 2, 1.005, 1.01), (6, 3, 1, 1.02, 1.11)],
)
def test_replicas_are_close_to_the_optimum(num_experts, num_ranks, num_slots, mean_goal, worst_goal):
    rng, placement, ratios = np.random.default_rng(5), Placement.identity(num_experts, num_ranks), []
    for _ in range(25):
        zipf_E = 1 / np.arange(1, num_experts + 1) ** rng.uniform(0.3, 1.6)
        weight_E = rng.permutation(zipf_E) if num_ranks == 4 else rng.random(num_experts)
        count_SE = np.tile(np.rint(weight_E / weight_E.sum() * 2000), (num_ranks, 1)).astype(int)
        best = sv.solve_exact_replicas(count_SE.sum(axis=0), placement, num_slots).host_load(count_SE).max()
        ratios.append(sv.solve_replicas(count_SE, placement, num_slots, local=False).host_load(count_SE).max() / best)
    assert np.mean(ratios) <= mean_goal and max(ratios) <= worst_goal, (np.mean(ratios), max(ratios))


@needs_published
@pytest.mark.parametrize(("num_ranks", "step_goal"), [(4, 1.01), (8, 1.02)])
def test_replicas_are_within_two_percent_on_the_published_trace(num_ranks, step_goal):
    """The mean rank is a lower bound of the optimum."""
    trace = ExpertTrace.load(PUBLISHED / "trace" / "moe_trace_it0001_2491.npz")
    placement, ratios = Placement.identity(32, num_ranks), []
    for count_RLME in trace.counts[::50]:
        count_RLE = count_RLME.sum(axis=2)
        count_LSE = count_RLE.reshape(num_ranks, -1, *count_RLE.shape[1:]).sum(axis=1).swapaxes(0, 1)
        found = sv.solve_replicas_layers(count_LSE, [placement] * len(count_LSE), 2)
        for count_SE, replicas in zip(count_LSE, found, strict=True):
            mean, step = count_SE.sum() / num_ranks, sv.solve_exact_step(count_SE, placement, 2)
            ratios.append([each.host_load(count_SE).max() / mean for each in (replicas, step)])
    of_replicas, of_step = np.mean(ratios, axis=0)
    assert of_replicas <= 1.01 and of_step <= step_goal
    assert np.quantile(ratios, 0.95, axis=0)[0] <= 1.02
