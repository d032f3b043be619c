import numpy as np
import pytest
from torch.distributed.pipelining import schedules

from smartmoe import gpt
from smartmoe.config import ModelConfig
from smartmoe.parallel import pipeline
from smartmoe.planner import memory
from smartmoe.planner.schedule import makespan, most_in_flight, num_in_flight, order_of_rank
from smartmoe.planner.timeline import Work

SHAPES = [(2, 1, 2), (2, 1, 7), (4, 1, 9), (2, 2, 4), (3, 2, 9), (4, 3, 12)]


def _one_by_one(pp, vpp, n, forward, backward, hop):
    """Play it: a rank does its next work when its input is there and its host, which does not wait for that, launched it."""
    orders = [order_of_rank(stage, pp, vpp, n) for stage in range(pp)]
    done, free, launched, last = {}, [0.0] * pp, [0.0] * pp, pp * vpp - 1
    while any(orders):
        for rank in range(pp):
            if not orders[rank]:
                continue
            is_backward, chunk, micro = orders[rank][0]
            if not is_backward:
                source, travel = (False, chunk - 1, micro), hop[chunk - 1]
            elif chunk < last:
                source, travel = (True, chunk + 1, micro), hop[chunk]
            else:
                source, travel = (False, chunk, micro), 0.0
            is_root = not is_backward and chunk == 0
            if is_root or source in done:
                arrived = 0.0 if is_root else done[source] + travel
                took, launches = (backward if is_backward else forward)[:, micro, chunk]
                began, launched[rank] = max(free[rank], arrived, launched[rank]), launched[rank] + launches
                done[orders[rank].pop(0)] = free[rank] = max(began + took, launched[rank])
    return max(done.values())


def _alone(device_ms):
    """Work whose launches cost nothing."""
    return Work.piece(device_ms)


@pytest.mark.parametrize("pp, vpp, n", SHAPES)
def test_the_makespan_is_that_of_playing_the_schedule(pp, vpp, n):
    rng = np.random.default_rng(pp * 100 + vpp * 10 + n)
    forward, backward = rng.random((2, 3, 2, n, pp * vpp)) + 0.1
    hop = rng.random(pp * vpp - 1) * 0.3
    for launches in (0.0, 0.5, 1.0, 2.0):
        both = forward * [[[1.0]], [[launches]]], backward * [[[1.0]], [[launches]]]
        found = makespan(pp, vpp, n, *(Work.piece(x[:, 0], x[:, 1]) for x in both), hop)
        assert found == pytest.approx([_one_by_one(pp, vpp, n, f, b, hop) for f, b in zip(*both, strict=True)])


@pytest.mark.parametrize("pp, vpp", [(2, 1), (4, 1), (8, 1), (2, 2), (4, 4)])
def test_equal_stages_idle_as_the_textbook_says(pp, vpp):
    n, forward, backward = 4 * pp, np.full((1, 1, pp * vpp), 1.0), np.full((1, 1, pp * vpp), 2.0)
    found = makespan(pp, vpp, n, _alone(forward), _alone(backward), np.zeros(pp * vpp - 1))
    assert found == pytest.approx(3 * (n * vpp + pp - 1))


@pytest.mark.parametrize("pp, vpp, n", [(2, 1, 61), (4, 1, 50), (4, 2, 64), (3, 2, 60)])
def test_long_schedules_are_continued_from_their_period(pp, vpp, n):
    rng = np.random.default_rng(n)
    forward, backward = rng.random((2, 4, 1, pp * vpp)) + 0.1
    hop = rng.random(pp * vpp - 1) * 0.05
    exact = makespan(pp, vpp, n, *(_alone(np.repeat(x, n, 1)) for x in (forward, backward)), hop)
    assert makespan(pp, vpp, n, _alone(forward), _alone(backward), hop) == pytest.approx(exact, rel=2e-3)


def test_one_stage_is_a_plain_loop():
    forward, backward = _alone([[[1.0], [3.0]]]), _alone([[[2.0], [5.0]]])
    assert makespan(1, 1, 3, forward, backward, np.zeros(0)) == pytest.approx([3 + 8 + 3])
    first = [work.map(lambda x: x[:, :1]) for work in (forward, backward)]
    assert makespan(1, 1, 3, *first, np.zeros(0)) == pytest.approx([9])


@pytest.mark.parametrize("pp, vpp, n", [s for s in SHAPES if s[1] > 1])
def test_interleaved_order_is_torchs(pp, vpp, n):
    if not hasattr(schedules, "_get_1f1b_rank_ops") or not hasattr(schedules, "_get_warmup_ops"):
        pytest.skip("this torch keeps the order of its interleaved schedule elsewhere")
    per_round = n // max(1, n // pp)
    for rank in range(pp):
        warmup = schedules._get_warmup_ops(rank, vpp, per_round, pp, n, 2)
        rest = vpp * n - warmup

        def forward(step, rank=rank):
            return (step // per_round) % vpp * pp + rank

        def backward(step, rank=rank, warmup=warmup):
            return (vpp - 1 - (step - warmup) // per_round % vpp) * pp + rank

        ops = schedules._get_1f1b_rank_ops(vpp, pp, warmup, rest, warmup, rank, forward, backward)
        theirs = [(op.computation_type.name != "FORWARD", op.stage_index, op.microbatch_index) for op in ops if op]
        assert order_of_rank(rank, pp, vpp, n) == theirs


def test_what_is_in_flight_and_who_has_which_layers():
    assert [num_in_flight(s, 4, 1, 8) for s in range(4)] == [(4,), (3,), (2,), (1,)]
    assert num_in_flight(0, 4, 1, 2) == (2,)
    assert sum(num_in_flight(0, 2, 2, 4)) == 5
    for pp, vpp, n in (*SHAPES, (2, 3, 16), (4, 2, 32)):
        for stage in range(pp):
            held, most = np.zeros(vpp, int), np.zeros(vpp, int)
            for is_backward, chunk, _ in order_of_rank(stage, pp, vpp, n):
                held[chunk // pp] += -1 if is_backward else 1
                most = np.maximum(most, held)
            assert most_in_flight(stage, pp, vpp, n) == tuple(most), (pp, vpp, n, stage)
    for layers, chunks in ((7, 3), (8, 4), (5, 5)):
        assert memory.chunk_layers(layers, chunks) == pipeline.chunk_layers(layers, chunks)
    model = ModelConfig(moe_every=2)
    assert [memory.has_experts(model, k) for k in range(6)] == [gpt.has_experts(model, k) for k in range(6)]
