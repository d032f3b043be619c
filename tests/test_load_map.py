import json

import numpy as np
import pytest

from smartmoe.load_map import fullest_over_mean, load_line, load_over_time, planned_load
from smartmoe.placement import Placement, Replicas
from smartmoe.trace import ExpertTrace

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


def test_load_over_time_knows_no_future():
    counts = np.zeros((40, 1, 1, 1, 4), np.int32)
    counts[:20, ..., :] = [8, 8, 1, 1]  # both heavy experts on the first of two ranks
    counts[20:, ..., :] = [8, 1, 8, 1]
    trace = ExpertTrace(counts, np.arange(1, 41))
    data = load_over_time(trace, None, 2, 10, 1)
    in_order, moved, copied, exact = (np.array(each["rank_load"]).max(1) for each in data["maps"])
    assert in_order[:20].tolist() == [16] * 20 and moved[:10].tolist() == [16] * 10
    assert moved[10:20].tolist() == [9] * 10 and data["maps"][1]["changes"]["migrate"][0] == 11
    worse = moved[20:30].tolist()
    assert worse == [worse[0]] * 10 and moved[30:].tolist() == [9] * 10
    # in the first 200 iterations copies are decided five times as often, from history alone
    assert copied[:2].tolist() == [16, 16] and copied[2] < 10 and data["maps"][2]["changes"]["replicate"][0] == 3
    assert exact.max() < 10 and data["maps"][3]["changes"] == {}
    assert [each["source"] for each in data["maps"]] == ["recorded"] + 3 * ["simulated"] and json.dumps(data)
    strided = load_over_time(ExpertTrace(counts, 1 + 10 * np.arange(40)), 0, 2, 100, 1)
    assert strided["maps"][1]["changes"]["migrate"][0] == 101
    assert load_over_time(trace, 0, 1, 10, 0)["maps"][3]["rank_load"] == [[18]] * 40
    for bad in ((1, 2, 10, 1), (0, 5, 10, 1), (0, 0, 10, 1), (0, 2, 0, 1), (0, 2, 10, -1)):
        with pytest.raises(ValueError, match="layers 0 .. 0"):
            load_over_time(trace, *bad)
