import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmoe import placement as pm
from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas

identity = Placement.identity


def test_identity_spreads_evenly_and_leaves_the_last_slot_empty():
    assert identity(8, 4).expert_of_slot == tuple(range(8))
    assert identity(5, 3).expert_of_slot == (0, 1, 2, 3, 4, EMPTY)
    assert identity(4, 3).expert_of_slot == (0, 1, 2, EMPTY, 3, EMPTY)
    assert identity(2, 3).expert_of_slot == (0, 1, EMPTY)
    assert identity(1, 1).expert_of_slot == (0,)
    with pytest.raises(ValueError, match="at least 1"):
        identity(0, 2)


def test_placement_with_replicas_names_a_primary():
    placement = Placement(2, (1, 0, EMPTY, 0, 1, 2))
    assert placement.primary_slot_E.tolist() == [1, 0, 5] and placement.primary_slot_E.dtype == np.int64
    assert placement.rank_of_expert().tolist() == [0, 0, 1]
    assert (placement.num_slots, placement.slots_per_rank, placement.num_experts) == (6, 3, 3)
    assert placement.experts_of_rank(1) == (0, 1, 2)
    moved = Placement(2, (1, 0, EMPTY, 0, 1, 2), (3, 0, 5))
    assert moved.rank_of_expert().tolist() == [1, 0, 1] and moved != placement
    assert pm.rank_load([4, 2, 1], placement).tolist() == [6, 1] and pm.rank_load([4, 2, 1], moved).tolist() == [2, 5]
    for each in (placement, moved, identity(5, 3)):
        assert Placement.from_dict(json.loads(json.dumps(each.to_dict()))) == each


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, (0,)), "num_ranks = 0"),
        ((2.0, (0, 1)), "num_ranks = 2.0"),
        ((2, (0, 1, 2)), "3 slots do not divide over 2 ranks"),
        ((2, ()), "0 slots"),
        ((2, (0, -2)), "slot 1 hosts expert -2"),
        ((2, (0, 7)), "slot 1 hosts expert 7"),
        ((2, (0, 3, 1, -1)), r"no slot hosts experts \[2\]"),
        ((1, (-1, -1)), "no slot hosts experts of any"),
        ((2, (0, 0, 1, -1)), "expert 0 sits twice on rank 0"),
        ((2, (0.5, 1)), "list of integers"),
        ((2, ("0", "1")), "list of integers"),
        ((2, (0, 1), (0,)), "names 1 experts"),
        ((2, (0, 1), (1, 0)), "primary slot 1 of expert 0"),
        ((2, (0, 1), (0, 2)), "primary slot 2 of expert 1"),
    ],
)
def test_bad_placements_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Placement(*args)


def test_bad_dicts_and_arguments_are_refused():
    good = identity(4, 2)
    for data in (3, {}, {**good.to_dict(), "extra": 1}):
        with pytest.raises(ValueError, match="expected the keys"):
            Placement.from_dict(data)
    with pytest.raises(ValueError, match="list of integers"):
        Placement.from_dict({**good.to_dict(), "expert_of_slot": [[0, 1], [2, 3]]})
    with pytest.raises(ValueError, match="shape"):
        pm.rank_load([1, 2], good)
    for bad in ([1, 2, 3, -1], [1, 2, 3, np.nan]):
        with pytest.raises(ValueError, match="finite and not negative"):
            pm.rank_load(bad, good)
    with pytest.raises(ValueError, match="num_slots changes from 4 to 6"):
        pm.num_moves(good, Placement(2, (0, 1, -1, 2, 3, -1)))
    with pytest.raises(ValueError, match="ep_rank 2"):
        good.experts_of_rank(2)


def test_num_moves_counts_copies_between_ranks_only():
    old = identity(6, 3)
    assert pm.num_moves(old, old) == 0
    assert pm.num_moves(old, Placement(3, (1, 0, 2, 3, 4, 5))) == 0
    assert pm.num_moves(old, Placement(3, (2, 0, 1, 3, 4, 5))) == 2
    spare = Placement(2, (0, 1, EMPTY, 2, 3, EMPTY))
    assert pm.num_moves(spare, Placement(2, (0, 1, 3, 2, 3, 0))) == 2  # two replicas
    assert pm.num_moves(Placement(2, (0, 1, 3, 2, 3, 0)), spare) == 0


def test_max_over_mean():
    assert pm.max_over_mean([3, 1, 0, 0], identity(4, 2)) == 2.0
    assert pm.max_over_mean([1, 1, 1, 1], identity(4, 2)) == 1.0
    assert pm.max_over_mean([0, 0, 0, 0], identity(4, 2)) == 1.0


# --------------------------------------------------------------------------------------------------------- replicas


def split(rows, num_ranks=2):
    """share_SEW from the shares of each expert, the same for all sources."""
    return np.broadcast_to(np.array(rows, float), (num_ranks, *np.shape(rows)))


def test_no_replicas_send_everything_to_the_owners():
    placement = Placement(2, (3, 0, EMPTY, 1, 2, EMPTY))
    none = Replicas.none(placement, 2)
    none.check(placement)
    assert none.expert_of_replica == (EMPTY,) * 4 and (none.num_replica_slots, none.num_copies) == (2, 0)
    assert none.slot_EW(placement).tolist() == [[1, -1], [-1, 5], [-1, 6], [0, -1]]
    for ep_rank in (0, 1):
        table_EB = none.bucket_slots(placement, ep_rank)
        assert table_EB.dtype == np.int64 and (table_EB == np.array([[1], [5], [6], [0]])).all()
    assert table_EB.shape == (4, BUCKETS)
    count_SE = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert none.host_load(count_SE).tolist() == pm.rank_load(count_SE.sum(0), placement).tolist()
    assert Replicas.none(placement, 0).expert_of_replica == ()
    assert Replicas.none(identity(3, 1), 1).bucket_slots(identity(3, 1), 0)[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 0"):
        Replicas.none(placement, -1)


def test_shares_become_buckets_by_largest_remainder():
    placement = identity(3, 3)
    # Expert 0 of rank 0 has replicas on ranks 1 and 2; 256 / 3 = 85.33: the lowest rank gets the bucket left over.
    share_EW = np.array([[1 / 3, 1 / 3, 1 / 3], [0, 0.999, 0.001], [0, 0, 1]])
    replicas = Replicas((EMPTY, EMPTY, EMPTY, 0, 1, 0), split(share_EW, 3))
    replicas.check(placement)
    assert replicas.slot_EW(placement).tolist() == [[0, 5, 8], [-1, 3, 7], [-1, -1, 6]]
    table_EB = replicas.bucket_slots(placement, 2)
    assert table_EB[0].tolist() == [0] * 86 + [5] * 85 + [8] * 85
    assert table_EB[1].tolist() == [3] * 256 and table_EB[2].tolist() == [6] * 256
    assert np.allclose(replicas.host_load([[3, 0, 0], [0, 1000, 0], [0, 0, 7]]), [1, 1000, 9])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
def test_bucket_counts_are_within_one_of_the_shares(rows):
    share = np.array(rows) / np.array(rows).sum(axis=1, keepdims=True)
    count = pm.bucket_counts(share)
    assert (count.sum(axis=1) == BUCKETS).all() and (abs(count - share * BUCKETS) < 1 + 1e-9).all()
    assert (count[share == 0] == 0).all()
    whole = count / BUCKETS
    assert (pm.bucket_counts(whole) == count).all()


def test_each_source_may_split_its_own_way():
    placement = identity(2, 2)
    share_SEW = np.array([[[1, 0], [0, 1]], [[0.25, 0.75], [0, 1]]], float)
    replicas = Replicas((EMPTY, 0), share_SEW)
    assert replicas.host_load([[8, 1], [8, 2]]).tolist() == [10, 9]
    assert (replicas.bucket_slots(placement, 0)[0] == 0).all()
    assert replicas.bucket_slots(placement, 1)[0].tolist() == [0] * 64 + [3] * 192
    share_SEW[0, 0] = 7  # the caller's array is its own
    assert replicas.share_SEW[0, 0].tolist() == [1, 0] and not replicas.share_SEW.flags.writeable


def test_most_copies():
    owner_E = np.array([0, 0, 1, 2])
    assert pm.most_copies((EMPTY, EMPTY, 0, 1, 0, EMPTY), owner_E, 3) == 3  # rank 0 sends three
    assert pm.most_copies((2, 3, EMPTY, EMPTY, EMPTY, EMPTY), owner_E, 3) == 2  # rank 0 receives two
    assert pm.most_copies((), owner_E, 3) == pm.most_copies((EMPTY,) * 3, owner_E, 3) == 0


def test_replicas_survive_json():
    share_SEW = np.array([[[1, 0], [0, 1]], [[0.1, 0.9], [0, 1]]])
    for each in (Replicas((EMPTY, 0), share_SEW), Replicas.none(identity(5, 3), 2), Replicas.none(identity(2, 1), 0)):
        back = Replicas.from_dict(json.loads(json.dumps(each.to_dict())))
        assert back == each and back.share_SEW.strides[0] == each.share_SEW.strides[0]
    assert Replicas((EMPTY, 0), share_SEW) != Replicas((0, EMPTY), np.array([[[0, 1], [0, 1]]] * 2, float))


@pytest.mark.parametrize(
    ("slots", "rows", "message"),
    [
        ((0, 0, 0), [[1, 0]], "3 replica slots do not divide"),
        ((0, 0, 1, 1), [[1, 0], [0, 1]], "sits twice"),
        ((2, EMPTY), [[1, 0], [0, 1]], "-1 .. 1"),
        ((-2, EMPTY), [[1, 0], [0, 1]], "-1 .. 1"),
        ((EMPTY, EMPTY), [[0.5, 0.5], [0, 1]], "expert 0 has shares on 2 ranks"),
        ((EMPTY, 0), [[0.5, 0.4], [0, 1]], "sum to 1"),
        ((EMPTY, 0), [[1.5, -0.5], [0, 1]], "sum to 1"),
        ((EMPTY, 0), [[np.nan, 1], [0, 1]], "sum to 1"),
        ((EMPTY, 0), [[1, 0, 0]], "expected .ranks, experts, ranks"),
        ((0.5, 0), [[1, 0]], "list of integers"),
    ],
)
def test_bad_replicas_are_refused(slots, rows, message):
    with pytest.raises(ValueError, match=message):
        Replicas(slots, split(rows))


def test_replicas_that_do_not_fit_the_placement_are_refused():
    placement, rows = identity(2, 2), [[0.5, 0.5], [0, 1]]
    Replicas((EMPTY, 0), split(rows)).check(placement)
    with pytest.raises(ValueError, match="rank 0 owns expert 0"):
        Replicas((0, EMPTY), split([[1, 0], [0, 1]])).check(placement)
    with pytest.raises(ValueError, match="expert 0 go to rank 0, which does not host it"):
        Replicas((EMPTY, EMPTY), split([[1, 0], [0, 1]])).bucket_slots(Placement(2, (1, EMPTY, 0, EMPTY)), 0)
    with pytest.raises(ValueError, match="2 experts on 2 ranks, the placement has 4 on 2"):
        Replicas((EMPTY, 0), split(rows)).check(identity(4, 2))
    with pytest.raises(ValueError, match="float64"):
        Replicas((EMPTY, 0), rows)
    with pytest.raises(ValueError, match="counts have shape"):
        Replicas((EMPTY, 0), split(rows)).host_load([1, 2])
    with pytest.raises(ValueError, match="ep_rank 2"):
        Replicas((EMPTY, 0), split(rows)).experts_of_rank(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "expected the keys"),
        ({"num_ranks": True}, "num_ranks"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"hosts": [[0, 1]]}, "one entry per expert"),
        ({"hosts": [[0, 2], [1]]}, r"hosts \[0, 2\] of expert 0"),
        ({"hosts": [["0"], [1]]}, "list of integers"),
        ({"shares": [[["a"]], [[1.0]]]}, "rows of numbers"),
        ({"shares": [[[1.0]], [[1.0]]]}, "have shape"),
        ({"shares": [[[0.5, 0.5]] * 3, [[1.0]]]}, "have shape"),
        ({"shares": [[[0.5, 0.6]], [[1.0]]]}, "sum to 1"),
    ],
)
def test_bad_replica_dicts_are_refused(change, message):
    good = Replicas((EMPTY, 0), split([[0.5, 0.5], [0, 1]])).to_dict()
    with pytest.raises(ValueError, match=message):
        Replicas.from_dict({**good, **change})
