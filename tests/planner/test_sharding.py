"""What the planner knows of ZeRO-2 and 3, against sums by hand."""

import pytest

from smartmoe.config import ParallelPlan
from smartmoe.planner.parameters import Parameters
from smartmoe.planner.sharding import kept_bytes, pass_bytes, pass_traffic, step_traffic

PLAN = ParallelPlan(dp=4, ep=2)  # dense parameters on four ranks, experts on two
ALL = Parameters(dense=800.0, router=80.0, expert=1000.0)
WEIGHTS, SUMS = 2 * 720 + 4 * 80 + 2 * 1000, 4 * 1800


@pytest.mark.parametrize(
    "zero,replicate,kept",
    [
        (0, "never", (WEIGHTS, SUMS)),
        (1, "never", (WEIGHTS, SUMS)),
        (2, "never", (WEIGHTS, 4 * (200 + 500))),
        (3, "never", (0, 4 * (200 + 500))),
        (2, "history", (WEIGHTS, 4 * (200 + 1000))),
        (3, "history", (2 * 1000, 4 * (200 + 1000))),
        (3, "exact", (2 * 1000, 4 * (200 + 500))),
    ],
)
def test_a_rank_keeps_its_part_of_what_it_shares(zero, replicate, kept):
    assert kept_bytes(ALL, PLAN, 2, zero, replicate) == kept
    alone = kept_bytes(ALL, ParallelPlan(), 2, zero, replicate)
    assert alone == (WEIGHTS, SUMS)


def test_traffic_of_a_step_and_of_a_pass():
    dense, expert = (800.0, 4, 1), (1000.0, 2, 2)

    def times(*widths):
        return [(width * numel, num, stride) for width, (numel, num, stride) in zip(widths, (dense, expert), strict=True)]

    assert step_traffic(ALL, PLAN, 2, 0) == times(8, 8) and pass_traffic(ALL, PLAN, 2, 0) == []
    assert step_traffic(ALL, PLAN, 2, 1) == times(6, 6) and pass_traffic(ALL, PLAN, 2, 1) == []
    assert step_traffic(ALL, PLAN, 2, 2) == times(2, 2) and pass_traffic(ALL, PLAN, 2, 2) == times(4, 4)
    assert step_traffic(ALL, PLAN, 2, 3) == [] and pass_traffic(ALL, PLAN, 2, 3) == times(8, 8)
    assert step_traffic(ALL, PLAN, 2, 3, "history") == times(8, 6)[1:]
    assert pass_traffic(ALL, PLAN, 2, 3, "history") == times(8, 8)[:1]
    assert pass_traffic(ALL, PLAN, 2, 3, "exact") == times(8, 4)


def test_passes_need_room_for_a_block():
    block = Parameters(dense=1e6, expert=2e6, largest=5e5, largest_expert=1e6)
    # gradients in 32 bits, as operations sum them; what travels; weights of two blocks
    assert pass_bytes(block, PLAN, 2, 2) == 4 * 3e6 + 4 * 3e6
    assert pass_bytes(block, PLAN, 2, 3) == 4 * 3e6 + 4 * 3e6 + 2 * 2 * 3e6
    assert pass_bytes(block, PLAN, 2, 1) == pass_bytes(block, ParallelPlan(), 2, 3) == 0
    large = Parameters(dense=1e9, largest=1e8)
    assert pass_bytes(large, PLAN, 2, 2) == 4 * 1e9 + 2 * 4 * 1e8
