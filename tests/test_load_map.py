import numpy as np
import pytest

from smartmoe.load_map import fullest_over_mean, load_line, planned_load
from smartmoe.placement import Placement, Replicas

PLACEMENT = Placement.identity(4, 2)
NONE = Replicas.none(PLACEMENT, 1)


def test_a_line_counts_every_expert_group_apart():
    count_RME = np.arange(4 * 3 * 4).reshape(4, 3, 4)  # two groups of two ranks, three micro-batches
    line = load_line(7, count_RME, PLACEMENT, NONE)
    by_rank = [count_RME[group * 2 : group * 2 + 2][..., experts].sum() for group in (0, 1) for experts in ([0, 1], [2, 3])]
    assert line == {"layer": 7, "expert_load": count_RME.sum((0, 1)).tolist(), "rank_load": by_rank}


def test_copies_take_their_share():
    share_SEW = NONE.share_SEW.copy()
    share_SEW[:, 0] = [0.25, 0.75]
    replicas = Replicas((-1, 0), share_SEW)
    count_MSE = np.array([[[80, 0, 0, 10], [0, 20, 0, 10]]])
    assert planned_load(count_MSE, PLACEMENT, replicas).tolist() == [40, 80]
    assert planned_load(count_MSE, PLACEMENT, NONE).tolist() == [100, 20]


def test_exact_copies_follow_each_micro_batch():
    hot = np.array([[100, 0, 0, 0], [100, 0, 0, 0]])
    count_MSE = np.stack([hot, hot[:, ::-1]])
    assert planned_load(count_MSE, PLACEMENT, NONE).tolist() == [200, 200]  # even by accident
    one = planned_load(count_MSE[:1], PLACEMENT, NONE, copy_cost=0)
    assert one.sum() == 200 and fullest_over_mean(one) == pytest.approx(1.0, abs=0.01)
    assert planned_load(count_MSE[:1], PLACEMENT, NONE, copy_cost=300).tolist() == [200, 0]  # not worth it


def test_no_load_is_balanced():
    assert fullest_over_mean(np.zeros(3)) == 1.0 and fullest_over_mean(np.array([3.0, 1.0])) == 1.5
