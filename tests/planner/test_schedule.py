import itertools

import numpy as np
import pytest
from torch.distributed.pipelining import schedules

from smartmoe import gpt
from smartmoe.config import ModelConfig
from smartmoe.parallel import pipeline
from smartmoe.planner import parameters
from smartmoe.planner.schedule import (
    least_makespan,
    makespan,
    message_for,
    most_in_flight,
    num_in_flight,
    num_played,
    one_way,
    order_of_rank,
)
from smartmoe.planner.timeline import Work

SHAPES = [(2, 1, 2), (2, 1, 7), (4, 1, 9), (2, 2, 4), (3, 2, 9), (4, 3, 12)]


def _programs(pp, vpp, n):
    """What each rank launches in order: passes (True, pass), and messages that it sends or asks for (False, message), a message
    being called as the pass that sends it. Of interleaved schedules it is what torch makes of their passes."""
    orders, last = [order_of_rank(stage, pp, vpp, n) for stage in range(pp)], pp * vpp - 1
    if vpp == 1:
        return [
            [step for item in order for step in ((False, message_for(item, pp)), (True, item), (False, item))
             if step[0] or step[1] is not None and not (step[1] == item and item[1] == (0 if item[0] else last))]
            for order in orders
        ]  # fmt: skip
    if not all(hasattr(schedules, name) for name in ("_add_unshard_reshard", "_add_reduce_grad", "_add_send_recv")):
        pytest.skip("this torch orders messages elsewhere")
    kinds = schedules._ComputationType
    passes = {
        rank: [schedules._Action(chunk, kinds.FULL_BACKWARD if back else kinds.FORWARD, m) for back, chunk, m in order]
        for rank, order in enumerate(orders)
    }
    passes = {r: schedules._add_reduce_grad(schedules._add_unshard_reshard(some), n) for r, some in passes.items()}
    theirs = schedules._add_send_recv(passes, stage_to_rank=lambda chunk: chunk % pp, num_stages=pp * vpp)
    sender = {"SEND_F": 0, "SEND_B": 0, "RECV_F": -1, "RECV_B": 1}
    programs = []
    for rank in range(pp):
        programs.append([])
        for step in theirs[rank]:
            name = step.computation_type.name
            if name in ("FORWARD", "FULL_BACKWARD"):
                programs[rank].append((True, (name != "FORWARD", step.stage_index, step.microbatch_index)))
            elif name in sender:
                message = name.endswith("B"), step.stage_index + sender[name], step.microbatch_index
                programs[rank].append((False, message))
    return programs


def _one_by_one(pp, vpp, n, forward, backward, hop, held=False, queued=True):
    """Play it: a message passes when both ends have come to it and, where ranks have several chunks and messages queue, it is
    the first of both their queues; a pass waits for its message, and for its host, which waits for nobody and launches it."""
    programs, num_chunks = _programs(pp, vpp, n), pp * vpp
    arrived, asked, free, launched, passed = {}, {}, [0.0] * pp, [0.0] * pp, [0.0] * pp
    queues, links, queued = [[] for _ in range(pp)], {}, queued and vpp > 1
    while any(programs):
        for rank, program in enumerate(programs):
            while program:
                is_pass, item = program[0]
                if not is_pass:
                    asked[rank, item] = free[rank]
                    queues[rank].append(item)
                elif message_for(item, num_chunks) in (None, *arrived):
                    took, launches = (backward if item[0] else forward)[:, item[2], item[1]]
                    began = max(free[rank], arrived.get(message_for(item, num_chunks), 0.0), launched[rank])
                    launched[rank] += launches
                    free[rank] = max(began + took, launched[rank])
                else:
                    break
                program.pop(0)
        for sender in range(pp):
            for message in list(queues[sender]):
                is_backward, chunk, _ = message
                receiver, ms = (chunk - 1 if is_backward else chunk + 1) % pp, hop[chunk - is_backward]
                both = sender == chunk % pp and message in queues[receiver]
                if not both or queued and not message == queues[sender][0] == queues[receiver][0]:
                    continue
                begin = max(asked[sender, message], asked[receiver, message])
                begin = max(begin, passed[sender], passed[receiver]) if queued else begin
                passed[sender] = passed[receiver] = begin + ms * (not held)
                arrived[message] = max(begin + ms * (not held), links.get((sender, receiver), 0.0)) + ms * held
                links[sender, receiver] = arrived[message]
                queues[sender].remove(message)
                queues[receiver].remove(message)
    return max(*free, *launched)


def _alone(device_ms):
    """Work whose launches cost nothing."""
    return Work.piece(device_ms)


@pytest.mark.parametrize("pp, vpp, n", SHAPES)
def test_the_makespan_is_that_of_playing_the_schedule(pp, vpp, n):
    rng = np.random.default_rng(pp * 100 + vpp * 10 + n)
    forward, backward = rng.random((2, 3, 2, n, pp * vpp)) + 0.1
    hop = rng.random(pp * vpp - 1) * 0.3
    for launches, *how in ((0.0, 0, 1), (0.5, 1, 1), (1.0, 0, 1), (2.0, 0, 1), (0.0, 1, 1), (0.5, 0, 0), (0.5, 1, 0)):
        both = forward * [[[1.0]], [[launches]]], backward * [[[1.0]], [[launches]]]
        hop = hop * 1.5  # at last messages take longer than passes
        found = makespan(pp, vpp, n, *(Work.piece(x[:, 0], x[:, 1]) for x in both), hop, *how)
        assert found == pytest.approx([_one_by_one(pp, vpp, n, f, b, hop, *how) for f, b in zip(*both, strict=True)])


def test_two_stages_meet_at_every_exchange():
    """What a stage sends goes with what it gets, when both have done their work: a message each way takes its time once, but
    for the first forward and the last backward, and nobody computes meanwhile."""
    (f0, f1), (b0, b1), hop, n = (1.0, 1.5), (2.0, 3.0), 0.25, 8
    found = makespan(2, 1, n, _alone([[[f0, f1]]]), _alone([[[b0, b1]]]), np.array([hop]))
    assert found == pytest.approx(f0 + n * (f1 + b1) + b0 + (n + 1) * hop)


@pytest.mark.parametrize("pp, vpp", [(2, 1), (4, 1), (8, 1), (2, 2), (4, 3), (4, 4)])
def test_equal_stages_idle_as_the_textbook_says(pp, vpp):
    n, forward, backward = 4 * pp, np.full((1, 1, pp * vpp), 1.0), np.full((1, 1, pp * vpp), 2.0)
    work = _alone(forward), _alone(backward), np.zeros(pp * vpp - 1)
    textbook = 3 * (n * vpp + pp - 1)
    assert makespan(pp, vpp, n, *work, queued=False) == pytest.approx(textbook)
    late = makespan(pp, vpp, n, *work)[0] / textbook  # one queue of messages is not in the textbook
    assert late == pytest.approx(1.0) if vpp == 1 or pp == 2 else 1.05 < late < 1.3


@pytest.mark.parametrize("pp, few, many", [(2, 0.0, 0.0), (4, 0.394, 0.124), (8, 0.797, 0.258)])
def test_one_queue_of_messages_costs_most_with_few_micro_batches(pp, few, many):
    work = *map(_alone, (np.full((1, 1, 2 * pp), ms) for ms in (1.0, 2.0))), np.zeros(2 * pp - 1)
    for n, wanted in ((pp, few), (4 * pp, many)):
        late = makespan(pp, 2, n, *work)[0] / makespan(pp, 2, n, *work, queued=False)[0] - 1
        assert late == pytest.approx(wanted, abs=1e-3), n


@pytest.mark.parametrize("pp, vpp, n", [(2, 1, 61), (4, 1, 50), (4, 2, 64), (3, 2, 60)])
def test_long_schedules_are_continued_from_their_period(pp, vpp, n):
    rng = np.random.default_rng(n)
    forward, backward = rng.random((2, 4, 1, pp * vpp)) + 0.1
    hop = rng.random(pp * vpp - 1) * 0.05
    exact = makespan(pp, vpp, n, *(_alone(np.repeat(x, n, 1)) for x in (forward, backward)), hop)
    assert makespan(pp, vpp, n, _alone(forward), _alone(backward), hop) == pytest.approx(exact, rel=2e-3)


def test_no_makespan_is_below_the_least():
    """What a search relies on, with stages of unequal times, with hosts that are behind or wait, slow messages, and long
    schedules: continued from a period that is another stage's than the busiest one's."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 5), (2, 1, 3), (4, 1, 9), (4, 1, 90), (4, 1, 41), (3, 2, 9), (2, 3, 30), (5, 1, 400)]
    for (pp, vpp, n), num_micro, host in itertools.product(shapes, (1, 3), (0.0, 3.0)):
        shape = 4, num_micro, pp * vpp
        ways = []
        for mean in (1.0, 2.0):
            half = [Work.piece(rng.uniform(0.1, mean, shape), rng.uniform(0, host + 1e-9, shape)) for _ in range(2)]
            ways.append(half[0].then(Work.wait(0.1)).then(half[1]) if host else half[0].then(half[1]))
        hop = rng.uniform(0, rng.choice([0.1, 3.0]), pp * vpp - 1)
        clocks = (np.stack([getattr(way, clock) for way in ways]) for clock in ("device", "host"))
        clocks = list(clocks)
        for held, queued in ((False, True), (False, False), (True, True)):
            found = makespan(pp, vpp, n, *ways, hop, held=held, queued=queued) * (1 + 1e-9)
            for way in (None, *([one_way(pp, vpp, num_played(pp, n, num_micro), queued)] if pp > 1 else [])):
                assert (found >= least_makespan(pp, vpp, n, *clocks, hop, way)).all(), (pp, vpp, n, num_micro)
    # where a schedule of two chunks is continued, its period may still be the calmer stage's
    uneven = np.array([[[[1.0, 1.0, 1.5, 1.05]]], [[[0.9, 1.0, 0.9, 1.05]]]])
    found = makespan(2, 2, 400, *(_alone(way) for way in uneven), np.zeros(3), queued=False)
    assert least_makespan(2, 2, 400, uneven, None, np.zeros(3)) <= found < 0.97 * 400 * uneven[..., ::2].sum()
    # nothing is lost where nobody waits: equal stages with messages that take no time
    level = np.ones((2, 1, 1, 4))
    exact = makespan(4, 1, 12, *(_alone(way) for way in level), np.zeros(3))
    assert least_makespan(4, 1, 12, level, None, np.zeros(3)) == pytest.approx(exact)


@pytest.mark.parametrize("pp, vpp, n", SHAPES)
@pytest.mark.parametrize("queued", [False, True])
def test_one_way_through_a_schedule_is_its_longest(pp, vpp, n, queued):
    """By what it is made of, which its schedule takes as long for; so the bound is close where passes are nearly so."""
    num_passes, messages = one_way(pp, vpp, n, queued)
    level = np.ones((2, 1, 1, pp * vpp)) * [[[[1.0]]], [[[2.0]]]]
    work = *(_alone(way) for way in level), np.zeros(pp * vpp - 1)
    exact = makespan(pp, vpp, n, *work, queued=queued)
    assert num_passes[0].sum() + 2 * num_passes[1].sum() == pytest.approx(exact) and messages.sum() >= 2 * (pp - 1)
    assert least_makespan(pp, vpp, n, level, None, work[2], (num_passes, messages)) == pytest.approx(exact)
    near, hop = level * np.random.default_rng(0).uniform(0.97, 1.03, level.shape), np.full(pp * vpp - 1, 0.02)
    exact = makespan(pp, vpp, n, *(_alone(way) for way in near), hop, queued=queued)
    assert 0.9 * exact <= least_makespan(pp, vpp, n, near, None, hop, (num_passes, messages)) <= exact * (1 + 1e-9)


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
        assert parameters.chunk_layers(layers, chunks) == pipeline.chunk_layers(layers, chunks)
    model = ModelConfig(moe_every=2)
    assert [parameters.has_experts(model, k) for k in range(6)] == [gpt.has_experts(model, k) for k in range(6)]
