import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas, num_moves, rank_load
from smartmoe.solvers import replication, solve_joint, solve_replicas, solve_replicas_layers
from tests.solvers.test_exact_step import cases

identity = Placement.identity


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.0, 1.0, 100.0]), st.booleans())
def test_promises(case, copy_cost, local):
    count_SE, placement, num_replica_slots = case
    node_W = np.arange(placement.num_ranks) // 2
    options = {"copy_cost": copy_cost, "local": local, "node_of_rank_W": node_W}
    replicas = solve_replicas(count_SE, placement, num_replica_slots, **options)
    replicas.check(placement)
    assert replicas.num_replica_slots == num_replica_slots
    assert (replicas.share_SEW * BUCKETS % 1 == 0).all()
    load_W, load_E = replicas.host_load(count_SE), count_SE.sum(axis=0)
    before = rank_load(load_E, placement).max()
    expert_WG = np.array(replicas.expert_of_replica, int).reshape(placement.num_ranks, -1)
    sent = np.bincount(placement.rank_of_expert()[expert_WG[expert_WG >= 0]], minlength=1).max(initial=0)
    busiest = max(sent, (expert_WG >= 0).sum(axis=1).max(initial=0))
    assert load_W.max() + copy_cost * busiest <= before + 1e-6
    assert np.isclose(load_W.sum(), load_E.sum())
    if placement.num_ranks == 1 or num_replica_slots == 0 or not count_SE.any():
        assert replicas == Replicas.none(placement, num_replica_slots)
    other = solve_replicas(count_SE, placement, num_replica_slots, **options | {"local": not local})
    if replicas.num_copies and other.num_copies:
        assert replicas.expert_of_replica == other.expert_of_replica
        # Near hosts change who computes what by rounding to buckets only, less than one each.
        assert (abs(other.host_load(count_SE) - load_W) <= 2 * count_SE.sum() / BUCKETS + 1e-6).all()
    assert replicas == solve_replicas(count_SE, placement, num_replica_slots, **options)


@settings(max_examples=50, deadline=None)
@given(st.lists(cases(), min_size=2, max_size=2), st.booleans())
def test_layers_are_solved_alone(pair, local):
    (count_SE, placement, num_replica_slots), _ = pair
    other_SE, other = count_SE[:, ::-1] * 3 + 1, Placement(placement.num_ranks, placement.expert_of_slot[::-1])
    found = solve_replicas_layers(np.stack([count_SE, other_SE]), [placement, other], num_replica_slots, local=local)
    assert found[0] == solve_replicas(count_SE, placement, num_replica_slots, local=local)
    assert found[1] == solve_replicas(other_SE, other, num_replica_slots, local=local)


def test_one_hot_expert_is_split_over_all_ranks():
    count_SE = np.zeros((8, 16), int)
    count_SE[:, 5] = 8000
    for local in (False, True):
        replicas = solve_replicas(count_SE, identity(16, 8), 1, local=local)
        assert replicas.num_copies == 7 and replicas.host_load(count_SE).tolist() == [8000] * 8
    assert (replicas.share_SEW[np.arange(8), 5, np.arange(8)] == 1).all()  # every token stays where it is
    # Half of all tokens: the other experts fill their ranks, and the hot one takes what is left of each.
    count_SE[:] = 1000
    count_SE[:, 5] = 15_000
    load_W = solve_replicas(count_SE, identity(16, 8), 1).host_load(count_SE)
    assert load_W.max() < 1.01 * load_W.mean()


def test_tokens_prefer_their_rank_then_their_node():
    # Expert 0 on ranks 0 and 2, half each, its tokens on ranks 1 and 3: each pair of ranks is a node.
    count_SE = np.zeros((4, 4), int)
    count_SE[[1, 3], 0] = 1000
    count_SE[:, 1] = 250
    count_SE[:, 3] = 250
    replicas = solve_replicas(count_SE, identity(4, 4), 1, node_of_rank_W=(0, 0, 1, 1))
    assert 2 in np.flatnonzero(replicas.share_SEW[3, 0]) and replicas.share_SEW[1, 0, 2] == 0
    assert replicas.share_SEW[3, 0, 0] == 0
    apart = solve_replicas(count_SE, identity(4, 4), 1)
    assert apart.share_SEW[3, 0, 0] > 0
    assert np.allclose(apart.host_load(count_SE), replicas.host_load(count_SE), atol=20)


def test_balanced_loads_get_no_copies_when_copies_cost():
    count_SE = np.random.default_rng(0).multinomial(8192, [1 / 32] * 32, size=4)
    assert solve_replicas(count_SE, identity(32, 4), 2, copy_cost=500).num_copies == 0
    before = count_SE.sum(axis=0).reshape(4, 8).sum(axis=1).max()
    for copy_cost in range(0, 400, 10):
        replicas = solve_replicas(count_SE, identity(32, 4), 2, copy_cost=copy_cost)
        busiest = max(sum(e >= 0 for e in replicas.experts_of_rank(ep_rank)) for ep_rank in range(4))
        assert replicas.host_load(count_SE).max() + copy_cost * busiest <= before
    count_SE[:, 3] += 8192
    few = solve_replicas(count_SE, identity(32, 4), 2, copy_cost=600)
    many = solve_replicas(count_SE, identity(32, 4), 2)
    assert 0 < few.num_copies < many.num_copies
    load_W = few.host_load(count_SE)
    assert load_W.max() < 1.02 * load_W.mean()


def test_sources_round_so_that_it_evens_out():
    # A bucket of the hot expert, on all 32 ranks, is 5 % of what a rank should compute.
    rng = np.random.default_rng(0)
    weight_E = np.append(0.4, 0.6 * rng.dirichlet(np.ones(31)))
    count_SE = rng.multinomial(16384, weight_E, size=32)
    load_W = solve_replicas(count_SE, identity(32, 32), 2).host_load(count_SE)
    assert load_W.max() < 1.005 * load_W.mean()


def test_all_slots_are_used_where_experts_are_equal():
    owner_YE = identity(8, 4).rank_of_expert() + [[0], [4]]  # of both layers' ranks in one list
    num_hosts_YE = replication._num_hosts(np.full((2, 8), 7.0), owner_YE, 4, 1, 0.0)
    assert (num_hosts_YE.sum(axis=1) == 12).all() and num_hosts_YE.max() == 2


def test_equal_experts_of_the_fullest_rank_get_the_slots():
    count_SE = np.zeros((2, 8), int)
    count_SE[:, 4:] = 500
    replicas = solve_replicas(count_SE, identity(8, 2), 1)
    assert replicas.expert_of_replica == (4, EMPTY) and replicas.host_load(count_SE).tolist() == [1000, 3000]


def test_joint_moves_what_replicas_cannot_take():
    count_SE, current = np.array([[1000] * 5] * 2), Placement(2, (0, 1, 2, 3, 4, *[EMPTY] * 5))
    placement, replicas = solve_joint(count_SE, current, 1)
    assert num_moves(current, placement) == 2 and replicas.num_copies == 1
    assert np.allclose(replicas.host_load(count_SE), 5000, atol=10)
    # One hot expert: replicas are enough, nobody moves.
    count_SE = np.full((4, 8), 100)
    count_SE[:, 0] = 5000
    assert solve_joint(count_SE, identity(8, 4), 1)[0] == identity(8, 4)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_joint_is_never_worse_than_replicas_alone(case):
    count_SE, current, num_replica_slots = case
    placement, replicas = solve_joint(count_SE, current, num_replica_slots, local=False)
    replicas.check(placement)
    alone = solve_replicas(count_SE, current, num_replica_slots, local=False)
    assert solve_joint(count_SE, current, num_replica_slots, local=False, stay=alone) == (placement, replicas)
    assert replicas.host_load(count_SE).max() <= alone.host_load(count_SE).max() + 1e-6


@pytest.mark.parametrize(
    ("count_YSE", "options"),
    [
        (np.zeros((1, 2, 3)), {}),
        (np.zeros((2, 2, 4)), {}),
        (np.full((1, 2, 4), -1.0), {}),
        (np.full((1, 2, 4), np.nan), {}),
        (np.zeros((1, 2, 4)), {"num_replica_slots": -1}),
        (np.zeros((1, 2, 4)), {"copy_cost": -1}),
    ],
)
def test_bad_arguments_are_refused(count_YSE, options):
    with pytest.raises(ValueError, match="solve_replicas"):
        solve_replicas_layers(count_YSE, [identity(4, 2)], **{"num_replica_slots": 1, **options})
