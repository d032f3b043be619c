import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmoe import policy
from smartmoe.placement import EMPTY, Placement, Replicas, num_moves
from smartmoe.policy import Costs, LayerState, Rules, blend, decide, predict_ms, review

COSTS = Costs(compute_ms_per_copy=1e-3, exchange_ms_per_copy=1e-4, replica_ms_per_copy=0.05, move_ms_per_expert=0.5)
identity = Placement.identity


def start(placement, num_replica_slots=0):
    return LayerState(placement, Replicas.none(placement, num_replica_slots))


def counts(*rows):
    """One layer [1, W, E] from the counts of each source."""
    return np.array([rows], float)


def alone(count_YSE, state, costs=COSTS, rules=None, iteration=1000):
    (decision,) = decide(count_YSE, [state], costs, rules or Rules(num_replica_slots=0), iteration)
    return decision


def test_each_kind_is_taken_where_it_is_best():
    hot = counts([3000, 10, 10, 10], [3000, 10, 10, 10])
    two_hot = counts([1000, 1000, 10, 10], [1000, 1000, 10, 10])
    even = counts([500, 500, 500, 500], [510, 490, 500, 500])
    rules = Rules(num_replica_slots=1)
    assert alone(hot, start(identity(4, 2), 1), rules=rules).kind == "replicate"
    moved = alone(two_hot, start(identity(4, 2)))
    assert moved.kind == "migrate" and moved.placement.rank_of_expert().tolist() == [1, 0, 0, 1]
    assert moved.after_ms < moved.before_ms and moved.cost_ms == 0.5 and "experts move" in moved.reason
    kept = alone(even, start(identity(4, 2), 1), rules=rules)
    assert kept.kind == "keep" and "to gain" in kept.reason and kept.placement == identity(4, 2)
    # Five equal experts on one rank: a copy leaves 4 : 1, moves 3 : 2, moves and a copy 2.5 : 2.5.
    both = alone(counts(*[[1000] * 5 + [0] * 5] * 2), start(identity(10, 2), 1), rules=rules)
    assert both.kind == "both" and both.replicas.num_copies == 1
    assert abs(both.replicas.host_load(np.array([[1000] * 5 + [0] * 5] * 2)) - 5000).max() < 10


def test_moves_are_not_searched_where_replicas_leave_nothing_to_gain(monkeypatch):
    hot, rules = counts([3000, 10, 10, 10], [3000, 10, 10, 10]), Rules(num_replica_slots=1, min_gain=0.05)
    assert alone(hot, start(identity(4, 2), 1), rules=rules).kind == "replicate"
    monkeypatch.setattr(policy, "_migrations", None)
    assert alone(hot, start(identity(4, 2), 1), rules=rules).kind == "replicate"


def test_costs_decide():
    two_hot = counts([1000, 1000, 10, 10], [1000, 1000, 10, 10])
    dear = Costs(compute_ms_per_copy=1e-3, move_ms_per_expert=1000)
    kept = alone(two_hot, start(identity(4, 2)), dear)
    assert kept.kind == "keep" and "than moving costs" in kept.reason
    assert alone(two_hot, start(identity(4, 2)), dear, Rules(horizon=10_000)).kind == "migrate"
    assert alone(two_hot, start(identity(4, 2)), rules=Rules(min_gain=0.6)).kind == "keep"
    # One expert is hotter than a rank should be: half could be gained by splitting it, a twelfth by moving the other one.
    lumpy = counts([1000, 100, 10, 10], [1000, 100, 10, 10])
    assert alone(lumpy, start(identity(4, 2)), rules=Rules(min_gain=0.05)).kind == "migrate"
    kept = alone(lumpy, start(identity(4, 2)), rules=Rules(min_gain=0.2))
    assert kept.kind == "keep" and kept.reason.endswith("min_gain is 20.0%")
    assert alone(two_hot, start(identity(4, 2)), rules=Rules(may_migrate=False)).reason == "nothing better was found"
    free = Costs(compute_ms_per_copy=0.0)
    assert alone(two_hot, start(identity(4, 2)), free).kind == "keep"


def test_what_does_not_fit_is_refused_with_the_reason():
    two_hot = counts([1000, 1000, 10, 10], [1000, 1000, 10, 10])
    small = Rules(state_bytes_per_expert=100_000_000, free_bytes=150_000_000)
    kept = alone(two_hot, start(identity(4, 2)), rules=small)
    assert kept.kind == "keep" and "migrate refused: its buffers need 200 MB on a rank, 150 MB are free" in kept.reason
    room = Rules(state_bytes_per_expert=100_000_000, free_bytes=200_000_000)
    assert alone(two_hot, start(identity(4, 2)), rules=room).kind == "migrate"
    # Replicas need no more memory than their slots, which are there: they are taken where a migration is refused.
    mixed = Rules(num_replica_slots=1, state_bytes_per_expert=10**9, free_bytes=0)
    assert alone(two_hot, start(identity(4, 2), 1), rules=mixed).kind == "replicate"


def run_rotation(horizon):
    """(iteration, ranks of the experts) of each migration while the pair of hot experts rotates among three."""
    pairs = [counts(*[[0 if expert == cold else 1000 for expert in range(3)]] * 2) for cold in range(3)]
    state, moves = start(Placement(2, (0, 1, 2, EMPTY))), []
    for step in range(60):
        iteration = 1000 + 10 * step
        made = alone(pairs[(2 - step) % 3], state, rules=Rules(horizon=horizon), iteration=iteration)
        if made.kind != "keep":
            state = state.moved_to(made, iteration, horizon)
            moves.append((iteration, made.placement.rank_of_expert().tolist()))
    return moves, state, pairs


def test_nothing_flips_back_within_a_horizon():
    moves, state, pairs = run_rotation(100)
    since = {(expert, rank): -1000 for expert in range(3) for rank in range(2)}
    at = [0, 0, 1]
    for iteration, ranks in moves:
        for expert in range(3):
            if ranks[expert] != at[expert]:
                assert iteration - since[expert, ranks[expert]] >= 100
                since[expert, at[expert]] = iteration
        at = ranks
    assert 1 < len(moves) < len(run_rotation(2)[0]) / 2
    assert any("left rank" in alone(pair, state, rules=Rules(horizon=10**6), iteration=1600).reason for pair in pairs)


def test_a_rolled_back_placement_is_left_alone_for_a_horizon():
    two_hot = counts([1000, 1000, 10, 10], [1000, 1000, 10, 10])
    before, rules = start(identity(4, 2)), Rules(horizon=50)
    made = alone(two_hot, before, rules=rules, iteration=100)
    state = before.moved_to(made, 100, rules.horizon).rolled_back(before, 110)
    assert (state.placement, state.replicas, state.left) == (before.placement, before.replicas, ())
    kept = alone(two_hot, state, rules=rules, iteration=120)
    assert kept.kind == "keep" and "rolled back after iteration 110" in kept.reason
    assert alone(two_hot, state, rules=rules, iteration=160).kind == "migrate"
    # Replicas alone that were rolled back refuse no placement.
    assert before.rolled_back(before, 1).refused == ()


def test_exact_replicas_are_counted_on_and_left_alone():
    two_hot = counts([1000, 1000, 10, 10], [1000, 1000, 10, 10])
    state = start(identity(4, 2), 1)
    cheap = Costs(compute_ms_per_copy=1e-3, move_ms_per_expert=0.5)
    kept = alone(two_hot, state, cheap, Rules(replicate="exact", num_replica_slots=1))
    assert kept.kind == "keep" and kept.before_ms < 2.1  # 2000 of 4040 copies on each rank, by a copy of one expert
    moved = alone(two_hot, state, COSTS, Rules(replicate="exact", num_replica_slots=1))
    assert moved.kind == "migrate" and moved.replicas.num_copies == 0  # saves a weight send in every iteration


def test_prediction_by_hand():
    placement = identity(4, 2)
    count_SE = np.array([[100, 0, 50, 0], [0, 0, 0, 10]])
    none = Replicas.none(placement, 1)
    costs = Costs(compute_ms_per_copy=1, exchange_ms_per_copy=100, replica_ms_per_copy=10_000)
    assert predict_ms(count_SE, placement, none, costs) == 100 + 50 * 100  # rank 0 computes 100 and sends 50
    share_EW = np.array([[1, 0], [1, 0], [0.5, 0.5], [0, 1]])
    halved = Replicas((2, EMPTY), np.broadcast_to(share_EW, (2, 4, 2)))
    assert predict_ms(count_SE, placement, halved, costs) == 125 + 25 * 100 + 10_000
    nodes = Costs(compute_ms_per_copy=0, exchange_ms_per_copy=1, node_exchange_ms_per_copy=10)
    apart = identity(4, 4)
    count_SE = np.diag([0, 0, 0, 0]) + np.array([[0, 5, 0, 7], [0] * 4, [0] * 4, [0] * 4])
    assert predict_ms(count_SE, apart, Replicas.none(apart, 0), nodes, (0, 0, 1, 1)) == 12 + 70


@st.composite
def cases(draw):
    num_ranks, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    per_rank = -(-num_experts // num_ranks)
    slots = [*range(num_experts), *[EMPTY] * (num_ranks * per_rank - num_experts)]
    placement = Placement(num_ranks, tuple(draw(st.permutations(slots))))
    number = st.one_of(st.just(0), st.integers(0, 3000))
    row = st.lists(number, min_size=num_experts, max_size=num_experts)
    count_YSE = np.array(draw(st.lists(st.lists(row, min_size=num_ranks, max_size=num_ranks), min_size=1, max_size=3)))
    rules = Rules(
        may_migrate=draw(st.booleans()),
        replicate=draw(st.sampled_from(policy.MODES)),
        num_replica_slots=draw(st.integers(0, 2)),
        horizon=draw(st.sampled_from([1, 50])),
        min_gain=draw(st.sampled_from([0.0, 0.1])),
    )
    cost = st.sampled_from([0.0, 1e-3, 0.05, 1.0])
    return count_YSE, placement, rules, Costs(**{name: draw(cost) for name in vars(COSTS)})


@settings(max_examples=150, deadline=None)
@given(cases())
def test_decisions_keep_their_promises(case):
    count_YSE, placement, rules, costs = case
    states = [start(placement, rules.num_replica_slots)] * len(count_YSE)
    decisions = decide(count_YSE, states, costs, rules, 1000)
    assert decisions == decide(count_YSE, states, costs, rules, 1000)
    for count_SE, state, made in zip(count_YSE, states, decisions, strict=True):
        made.replicas.check(made.placement)
        assert made.reason and made.replicas.num_replica_slots == rules.num_replica_slots
        moved, copied = made.placement != state.placement, made.replicas.num_copies > 0
        assert made.kind == {(0, 0): "keep", (0, 1): "replicate", (1, 0): "migrate", (1, 1): "both"}[moved, copied]
        assert not moved or rules.may_migrate
        assert not copied or rules.replicate == "history"
        if made.kind == "keep":
            assert made.after_ms == made.before_ms and made.cost_ms == 0
        else:
            assert made.after_ms < made.before_ms * (1 - rules.min_gain)
            assert (made.before_ms - made.after_ms) * rules.horizon > made.cost_ms
            again = state.moved_to(made, 1000, rules.horizon)
            assert again.placement == made.placement and len(again.left) == num_moves(placement, made.placement)
            # With the same counts there is nothing more to do that would undo it.
            (second,) = decide(count_SE[None], [again], costs, rules, 1001)
            assert second.placement == made.placement or second.placement != state.placement


def test_history():
    assert [policy.is_due(i, 10) for i in (1, 2, 4, 200, 202, 210)] == [False, True, True, True, False, True]
    assert policy.is_due(3, 1) and policy.is_due(3, 4)
    first, second = np.array([[4.0, 0]]), np.array([[0, 8]])
    assert (blend(None, first, 1000) == first).all() and blend(None, second, 1).dtype == np.float64
    assert np.allclose(blend(first, second, 100, num_iterations=10), second)  # only the newest while loads change fast
    assert np.allclose(blend(first, second, 1000, num_iterations=16), [[2, 4]])  # half-life 16
    assert policy.half_life(0) > 0 and policy.half_life(10**6) == 30
    assert (first == [[4, 0]]).all()


def test_review():
    calm, slow, fast = [10.0, 10.1, 9.9, 10.0], [11.0, 11.1, 10.9, 11.0], [9.0, 9.1, 8.9, 9.0]
    assert review(9.0, calm, slow).kind == "rollback" and "slower" in review(9.0, calm, slow).reason
    assert review(9.0, calm, fast).kind == "keep" and "as predicted" in review(9.0, calm, fast).reason
    assert "less than predicted" in review(8.0, calm, fast).reason
    assert review(11.0, calm, slow).kind == "keep"  # the load itself got worse, as the prediction knows
    assert review(9.0, [8, 12, 9, 11, 10, 7, 13], [9, 12, 11, 14, 8]).kind == "keep"  # noise
    assert review(9.0, [10.0], [10.05]).kind == "keep"
    with pytest.raises(ValueError, match="at least one"):
        review(9.0, [], [1.0])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="compute_ms_per_copy = nan"):
        Costs(compute_ms_per_copy=float("nan"))
    with pytest.raises(ValueError, match="move_ms_per_expert = -1"):
        Costs(compute_ms_per_copy=1, move_ms_per_expert=-1)
    for bad in ({"horizon": 0}, {"min_gain": 1.0}, {"num_replica_slots": -1}, {"replicate": "always"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Rules(**bad)
    with pytest.raises(ValueError, match="2 layers for 1 states"):
        decide(np.zeros((2, 2, 4)), [start(identity(4, 2))], COSTS, Rules(), 1)
    with pytest.raises(ValueError, match="0 slots per rank, the rules have 1"):
        decide(np.zeros((1, 2, 4)), [start(identity(4, 2))], COSTS, Rules(num_replica_slots=1), 1)
