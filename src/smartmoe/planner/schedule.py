"""How long a pipeline takes: the schedules of the trainer as a graph of forwards and backwards, and its longest path.

The order of work on each pipeline rank is that of torch.distributed.pipelining's Schedule1F1B and
ScheduleInterleaved1F1B, which the trainer uses. Axes: C model chunks (pp * vpp), n micro-batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from smartmoe.planner.timeline import Work, join

_SETTLED_ROUNDS = 4  # after so many rounds of pp micro-batches a schedule of equal micro-batches repeats itself


@dataclass(frozen=True)
class Schedule:
    """Work of all ranks, sorted so that a level depends on earlier levels only.

    chunk, micro, is_backward: [N]. before: [N] the work before it on the same rank, or N (none). source: [N] what sends it
    its input, or N. levels: slices of equal depth.
    """

    chunk: np.ndarray
    micro: np.ndarray
    is_backward: np.ndarray
    before: np.ndarray
    source: np.ndarray
    levels: tuple[slice, ...]


def order_of_rank(pp_stage: int, pp: int, vpp: int, num_micro_batches: int) -> list[tuple[bool, int, int]]:
    """(is backward, chunk, micro-batch) in the order in which a pipeline rank does them."""
    n = num_micro_batches
    if vpp == 1:
        warmup = min(n, pp - pp_stage)
        order = [(False, pp_stage, m) for m in range(warmup)]
        for m in range(n):
            order.append((True, pp_stage, m))
            if warmup + m < n:
                order.append((False, pp_stage, warmup + m))
        return order
    per_round = n // max(1, n // pp)
    total = n * vpp
    warmup = min((vpp - 1) * per_round + 2 * (pp - 1 - pp_stage), total)
    forwards = _turns(total, vpp, per_round, pp, pp_stage, reverse=False)
    backwards = _turns(total, vpp, per_round, pp, pp_stage, reverse=True)
    order = [(False, *forwards[step]) for step in range(warmup)]
    for step in range(total):
        if warmup + step < total:
            order.append((False, *forwards[warmup + step]))
        order.append((True, *backwards[step]))
    return order


def _turns(total, vpp, per_round, pp, pp_stage, reverse):
    """(chunk, micro-batch) step by step: `per_round` micro-batches through one chunk, then the next chunk."""
    done, turns = [0] * vpp, []
    for step in range(total):
        local = (step // per_round) % vpp
        local = vpp - 1 - local if reverse else local
        turns.append((local * pp + pp_stage, done[local]))
        done[local] += 1
    return turns


@functools.lru_cache(maxsize=256)
def build(pp: int, vpp: int, num_micro_batches: int) -> Schedule:
    """The schedule of all ranks."""
    num_chunks = pp * vpp
    orders = [order_of_rank(stage, pp, vpp, num_micro_batches) for stage in range(pp)]
    work = [item for order in orders for item in order]
    index = {item: place for place, item in enumerate(work)}
    none = len(work)
    before, place = np.full(none, none), 0
    for order in orders:
        before[place + 1 : place + len(order)] = np.arange(place, place + len(order) - 1)
        place += len(order)
    source = np.array([_source(item, index, num_chunks, none) for item in work])
    depth = _depths(before, source, [len(order) for order in orders])
    by_depth = np.argsort(depth, kind="stable")
    new_place = np.empty(none + 1, int)
    new_place[by_depth], new_place[none] = np.arange(none), none
    bounds = np.searchsorted(depth[by_depth], np.arange(depth.max() + 2))
    is_backward, chunk, micro = (np.array([item[k] for item in work])[by_depth] for k in range(3))
    levels = tuple(slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    return Schedule(chunk, micro, is_backward, new_place[before[by_depth]], new_place[source[by_depth]], levels)


def _source(item, index, num_chunks, none):
    is_backward, chunk, micro = item
    if not is_backward:
        return index[False, chunk - 1, micro] if chunk else none
    return index[True, chunk + 1, micro] if chunk < num_chunks - 1 else index[False, chunk, micro]


def _depths(before, source, lengths):
    """Longest number of steps before each work; ranks advance in turn as far as they can."""
    depth = np.full(len(before) + 1, -1)
    ends = np.cumsum(lengths)
    place = ends - lengths
    while (place < ends).any():
        moved = False
        for rank, end in enumerate(ends):
            while place[rank] < end:
                me = place[rank]
                needs = [depth[x] for x in (before[me], source[me]) if x < len(before)]
                if needs and min(needs) < 0:
                    break
                depth[me] = max(needs, default=-1) + 1
                place[rank] += 1
                moved = True
        assert moved, "a pipeline schedule that waits for itself"
    return depth[:-1]


def makespan(pp: int, vpp: int, num_micro_batches: int, forward: Work, backward: Work, hop: np.ndarray) -> np.ndarray:
    """Time from the first forward to the end of the last backward, [S].

    forward, backward: [S, 1 or n, C] of each chunk; with 1 all micro-batches take the same time, and long schedules are
    continued from their period. hop: [C - 1] ms from chunk c to c + 1, and back. Every rank has its host, which waits for
    nothing that other ranks do unless its own device does.
    """
    n = num_micro_batches
    num_micro = forward.device.shape[1]
    if pp == 1:
        both = forward.then(backward).map(lambda x: x[..., 0])
        if num_micro == 1:
            return both.times(n).total[:, 0]
        return join([both.map(lambda x, m=m: x[:, m % num_micro]) for m in range(n)]).total
    settled = _SETTLED_ROUNDS * pp
    if num_micro > 1 or n <= settled + 2 * pp:
        return _longest(build(pp, vpp, n), forward, backward, hop)
    first = settled + (n - settled) % pp
    short, longer = (_longest(build(pp, vpp, m), forward, backward, hop) for m in (first, first + pp))
    return short + (longer - short) * ((n - first) // pp)


def _longest(schedule: Schedule, forward: Work, backward: Work, hop):
    micro = schedule.micro % forward.device.shape[1]

    def of_work(there, back):
        return np.where(schedule.is_backward, back[:, micro, schedule.chunk], there[:, micro, schedule.chunk]).T

    work = Work(*map(of_work, vars(forward).values(), vars(backward).values()))
    last = forward.device.shape[2] - 1
    padded = np.concatenate([hop, [0.0]])
    # into chunk c: forward from c - 1 over hop[c - 1], backward from c + 1 over hop[c]; the last backward is at home
    travel = np.where(
        schedule.is_backward,
        np.where(schedule.chunk == last, 0.0, padded[schedule.chunk]),
        np.where(schedule.chunk == 0, 0.0, padded[schedule.chunk - 1]),
    )
    device, host = np.zeros((2, len(schedule.chunk) + 1, work.device.shape[1]))
    for level in schedule.levels:
        before = schedule.before[level]
        free, launched = np.maximum(device[before], device[schedule.source[level]] + travel[level, None]), host[before]
        device[level] = np.maximum(free + work.device[level], launched + work.launched[level])
        host[level] = np.maximum(free + work.waited[level], launched + work.host[level])
    return np.maximum(device, host).max(0)


@functools.lru_cache(maxsize=65536)
def num_in_flight(pp_stage: int, pp: int, vpp: int, num_micro_batches: int) -> tuple[int, ...]:
    """The most forwards whose backward is still to come, by local chunk, when their sum is largest on this rank."""
    if vpp == 1:
        return (min(num_micro_batches, pp - pp_stage),)
    # after the first round of backwards the number in flight only repeats itself: a few rounds tell it
    few = min(num_micro_batches, 3 * pp)
    if few < num_micro_batches:
        return num_in_flight(pp_stage, pp, vpp, few)
    held, best = [0] * vpp, [0] * vpp
    for is_backward, chunk, _ in order_of_rank(pp_stage, pp, vpp, num_micro_batches):
        held[chunk // pp] += -1 if is_backward else 1
        if sum(held) > sum(best):
            best = held.copy()
    return tuple(best)


@functools.lru_cache(maxsize=65536)
def most_in_flight(pp_stage: int, pp: int, vpp: int, num_micro_batches: int) -> tuple[int, ...]:
    """For each chunk of a pipeline rank, the most micro-batches whose forward pass is done and whose backward pass is not."""
    if vpp == 1:
        return num_in_flight(pp_stage, pp, vpp, num_micro_batches)
    if num_micro_batches > 3 * pp:  # as in num_in_flight
        return most_in_flight(pp_stage, pp, vpp, 3 * pp)
    held, most = [0] * vpp, [0] * vpp
    for is_backward, chunk, _ in order_of_rank(pp_stage, pp, vpp, num_micro_batches):
        turn = chunk // pp
        held[turn] += -1 if is_backward else 1
        most[turn] = max(most[turn], held[turn])
    return tuple(most)
