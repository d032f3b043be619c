"""How long a pipeline takes: the schedules of the trainer as a graph of forwards, backwards and messages, and its longest path.

The order of work and of messages on each pipeline rank is that of torch.distributed.pipelining's Schedule1F1B and
ScheduleInterleaved1F1B, which the trainer uses. A message passes when both its ends are there: its sender has made it, and its
receiver has done what it launched before it asked. With one chunk a rank that is all of its work before: what it sends and
what it gets go in one exchange, beside which it computes nothing. With several it asks early, but over NCCL a rank's messages,
in both directions, then pass one after another: torch 2.11 has one queue for them, and later ones have one for each pair of
ranks (which will run is not known here). Two chunks on four to eight ranks take 12 % to 26 % longer for it with 4 pp
micro-batches, 39 % to 80 % with pp, even where messages take no time; on two ranks nothing. This follows from torch's order
of messages and was measured on two ranks only. Axes: C model chunks (pp * vpp), n micro-batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from smartmoe.planner.timeline import Work, join

_SETTLED_ROUNDS = 4  # after so many rounds of pp micro-batches a schedule of equal micro-batches repeats itself
Item = tuple[bool, int, int]  # (is backward, chunk, micro-batch): a pass of a chunk, or the message that it sends


@dataclass(frozen=True)
class Schedule:
    """Passes and messages of all ranks, each sorted so that a level depends on earlier levels only, and passes of a level on
    its messages. "None" of N passes, or of M messages, is N or M.

    chunk, micro, is_backward: [N] of passes. before: [N] the pass before it on the same rank. comes: [N] the message that
    brings its input. edge: [M] a message is between chunks edge and edge + 1. ends: [2, M] the passes that its sender and its
    receiver have launched before it. queue: [2, M] the messages before it in the queues of its sender and receiver. link:
    [M] the message before it from the same rank to the same rank. levels: of each level its messages and its passes.
    """

    chunk: np.ndarray
    micro: np.ndarray
    is_backward: np.ndarray
    before: np.ndarray
    comes: np.ndarray
    edge: np.ndarray
    ends: np.ndarray
    queue: np.ndarray
    link: np.ndarray
    levels: tuple[tuple[slice, slice], ...]


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
    orders = [order_of_rank(stage, pp, vpp, num_micro_batches) for stage in range(pp)]
    before = {item: last for order in orders for last, item in zip([None, *order[:-1]], order, strict=True)}
    posts, depths = play(orders, before)
    items, messages = (sorted(found, key=found.get) for found in depths)
    place, place_of_message = ({item: number for number, item in enumerate([*some, None])} for some in (items, messages))
    is_backward, chunk, micro = np.array(items).T
    rows = [posts[message] for message in messages]
    bounds = [np.searchsorted([found[item] for item in some], np.arange(max(depths[0].values()) + 2))
              for found, some in zip(depths, (items, messages), strict=True)]  # fmt: skip
    passes, sent = ([slice(a, b) for a, b in zip(some[:-1], some[1:], strict=True)] for some in bounds)
    return Schedule(
        chunk, micro, is_backward.astype(bool),
        before=np.array([place[before[item]] for item in items]),
        comes=np.array([place_of_message[message_for(item, pp * vpp)] for item in items]),
        edge=np.array([chunk - is_backward for is_backward, chunk, _ in messages]),
        ends=np.array([[place[message] for message in messages], [place[row.tail] for row in rows]]),
        queue=np.array([[place_of_message[row.queue[end]] for row in rows] for end in (0, 1)]),
        link=np.array([place_of_message[row.link] for row in rows]),
        levels=tuple(zip(sent, passes, strict=True)),
    )  # fmt: skip


def message_for(item: Item, num_chunks: int) -> Item | None:
    """The message that brings the input of a pass, called as the pass that sends it; None = it is at home."""
    is_backward, chunk, micro = item
    sender = chunk + 1 if is_backward else chunk - 1
    return (is_backward, sender, micro) if 0 <= sender < num_chunks else None


@dataclass(frozen=True)
class Post:
    """What a message waits for beside its sender's pass: `tail`, the receiver's last pass before it asks; the messages before
    it in the queues of its sender and of its receiver; the one before it over the same link."""

    tail: Item | None
    queue: tuple[Item | None, Item | None]
    link: Item | None


def play(orders: list[list[Item]], before: dict[Item, Item | None]) -> tuple[dict[Item, Post], tuple[dict, dict]]:
    """(all messages, in the order in which they are asked for; the longest number of passes before each pass, and before each
    message, which a pass and what brings its input may share).

    Ranks take turns, a pass each. With one chunk a rank, a message is asked for when its receiver needs it; with several,
    when its sender has its turn, by both: so torch sees to it that no queue waits for another in a circle. Up to three chunks;
    with more torch has other turns between, for weights that nobody gathers here.
    """
    pp, num_chunks = len(orders), 1 + max(item[1] for order in orders for item in order)
    has_queues, last_micro = num_chunks > pp, max(item[2] for item in orders[0])
    posts: dict[Item, Post] = {}
    depth, depth_of_message = {None: -1}, {None: -1}
    place, idle, queue, link = [0] * pp, [0] * pp, [None] * pp, {}

    def post(item: Item, sender: int, receiver: int, tail: Item | None) -> None:
        ends = (queue[sender], queue[receiver]) if has_queues else (None, None)
        posts[item] = Post(tail, ends, link.get((sender, receiver)))
        queue[sender] = queue[receiver] = link[sender, receiver] = item
        earlier = [depth_of_message[message] for message in (*ends, posts[item].link)]
        depth_of_message[item] = 1 + max(depth[item], depth[tail], *earlier)

    while any(at < len(order) for at, order in zip(place, orders, strict=True)):
        is_stuck = True
        for rank, order in enumerate(orders):
            if idle[rank] or place[rank] == len(order):
                is_stuck, idle[rank] = is_stuck and not idle[rank], max(idle[rank] - 1, 0)
                continue
            item = order[place[rank]]
            needed = message_for(item, num_chunks)
            if needed is not None and needed not in (posts if has_queues else depth):
                continue
            if needed is not None and not has_queues:
                post(needed, needed[1] % pp, rank, before[item])
            depth[item] = max(1 + depth[before[item]], depth_of_message[needed])
            place[rank], is_stuck = place[rank] + 1, False
            is_backward, chunk, micro = item
            receiving = chunk - 1 if is_backward else chunk + 1
            if has_queues and 0 <= receiving < num_chunks:
                peer = receiving % pp
                post(item, rank, peer, orders[peer][place[peer] - 1] if place[peer] else None)
            idle[rank] = 2 * (is_backward and micro == last_micro)  # a chunk is done: torch's for its gradients and weights
        assert not is_stuck, "a pipeline schedule that waits for itself"
    del depth[None], depth_of_message[None]
    return posts, (depth, depth_of_message)


def makespan(
    pp: int, vpp: int, num_micro_batches: int, forward: Work, backward: Work, hop: np.ndarray,
    held: bool = False, queued: bool = True,
) -> np.ndarray:  # fmt: skip
    """Time from the first forward to the end of the last backward, [S].

    forward, backward: [S, 1 or n, C] of each chunk; with 1 all micro-batches take the same time, and long schedules are
    continued from their period. hop: [C - 1] ms from chunk c to c + 1, and back, the same between the same ranks. held:
    messages pass at once, and are held for so long where they arrive, one from a rank after another (smartmoe.slow_links).
    queued: messages of a rank with several chunks pass one after another, as over NCCL. Every rank has its host, which waits
    for nothing that other ranks do unless its own device does.
    """
    n = num_micro_batches
    num_micro = forward.device.shape[1]
    if pp == 1:
        both = forward.then(backward).map(lambda x: x[..., 0])
        if num_micro == 1:
            return both.times(n).total[:, 0]
        return join([both.map(lambda x, m=m: x[:, m % num_micro]) for m in range(n)]).total
    played = num_played(pp, n, num_micro)
    longer = _longest(pp, vpp, played, forward, backward, hop, held, queued)
    if played == n:
        return longer
    first = played - pp
    short = _longest(pp, vpp, first, forward, backward, hop, held, queued)
    return short + (longer - short) * ((n - first) // pp)


def num_played(pp: int, num_micro_batches: int, num_micro: int) -> int:
    """How many micro-batches of a step are played, where the loads have num_micro of them: all, or so many that the rest of
    equal ones follows from their period."""
    settled = _SETTLED_ROUNDS * pp
    if pp == 1 or num_micro > 1 or num_micro_batches <= settled + 2 * pp:
        return num_micro_batches
    return settled + (num_micro_batches - settled) % pp + pp


def least_makespan(
    pp: int, vpp: int, num_micro_batches: int, device: np.ndarray, host: np.ndarray | None, hop: np.ndarray,
    way: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """A time [S] that `makespan` does not fall below. device, host: [2, S, M, C] of forward and backward passes, as there;
    host: None where it keeps nobody waiting. hop: as there. way: `one_way` through what is played, to come nearer.

    A stage has all micro-batches to do. Before its first pass the stages before it have theirs of one micro-batch, and behind
    its last pass they have theirs of another, with the messages between. Where a schedule is continued from its period, each
    further micro-batch takes as long as it takes the calmest stage at least: whose the period is is not known.
    """
    n, (_, num_samples, num_micro, _) = num_micro_batches, device.shape
    played = num_played(pp, n, num_micro)
    share_M = np.bincount(np.arange(played) % num_micro, minlength=num_micro) / played

    def of_stage(ms):
        return (share_M @ ms.sum(0)).reshape(num_samples, vpp, pp).sum(1)

    least_2SC = device.min(2)
    busy, passed = of_stage(device), np.zeros((num_samples, pp))
    passed[:, 1:] = (least_2SC.sum(0)[:, : pp - 1] + 2 * hop[: pp - 1]).cumsum(1)
    least = (passed + played * busy).max(1)
    if host is not None:
        least = np.maximum(least, played * of_stage(host).max(1))
    if way is not None:
        num_passes, messages = way
        least = np.maximum(least, (num_passes[:, None] * least_2SC).sum((0, 2)) + messages @ hop)
    return least + (n - played) * busy.min(1)


def _longest(pp, vpp, n, forward: Work, backward: Work, hop: np.ndarray, held: bool, queued: bool) -> np.ndarray:
    clocks, _ = _play_all(build(pp, vpp, n), forward, backward, hop, held, queued and vpp > 1)
    return clocks.max((0, 1))


def _play_all(schedule: Schedule, forward: Work, backward: Work, hop: np.ndarray, held: bool, queued: bool):
    """[N + 1, 2, S] when device and host are done with each pass, [M + 1, S] when each message has passed."""
    num_samples, num_micro, num_chunks = forward.device.shape
    which = (schedule.is_backward * num_micro + schedule.micro % num_micro) * num_chunks + schedule.chunk

    def of_passes(*clocks):  # [N, 2, S]: of each pass, what it adds for the device and for the host
        each = np.array([[getattr(way, clock) for clock in clocks] for way in (forward, backward)])
        return each.transpose(0, 3, 4, 1, 2).reshape(-1, 2, num_samples)[which]

    from_device, from_host = of_passes("device", "waited"), of_passes("launched", "host")
    clocks = np.zeros((len(schedule.chunk) + 1, 2, num_samples))  # of device and host after each pass
    passed = np.zeros((len(schedule.edge) + 1, num_samples))
    hop_M1 = hop[schedule.edge][:, None]
    passing = 0.0 * hop_M1 if held else hop_M1
    arrived = np.zeros_like(passed) if held else passed  # else those over a link pass in turn, and none overtakes another
    for sent, done in schedule.levels:
        at_sender, at_receiver = clocks.take(schedule.ends[:, sent], 0)[:, :, 0]
        begin = np.maximum(at_sender, at_receiver)
        if queued:
            at_sender, at_receiver = passed.take(schedule.queue[:, sent], 0)
            begin = np.maximum(begin, np.maximum(at_sender, at_receiver))
        np.add(begin, passing[sent], out=passed[sent])
        if held:
            arrived[sent] = np.maximum(passed[sent], arrived.take(schedule.link[sent], 0)) + hop_M1[sent]
        last = clocks.take(schedule.before[done], 0)
        free = np.maximum(last[:, 0], arrived.take(schedule.comes[done], 0))[:, None]
        np.maximum(free + from_device[done], last[:, 1:] + from_host[done], out=clocks[done])
    return clocks, passed


@functools.lru_cache(maxsize=1024)
def one_way(pp: int, vpp: int, num_micro_batches: int, queued: bool) -> tuple[np.ndarray, np.ndarray]:
    """A way through a schedule from its beginning to its end, and a long one: that which is longest where a backward pass takes
    twice a forward pass, and messages nothing. ([2, C] forward and backward passes of each chunk on it, [C - 1] messages
    between chunks c and c + 1.) Whatever passes take, those on it come one after another.
    """
    schedule, num_chunks = build(pp, vpp, num_micro_batches), pp * vpp
    works = (Work.piece(np.full((1, 1, num_chunks), ms)) for ms in (1.0, 2.0))
    clocks, passed = _play_all(schedule, *works, np.zeros(num_chunks - 1), False, queued and vpp > 1)
    done, passed = clocks[:, 0, 0].tolist(), passed[:, 0].tolist()
    num_passes, messages = np.zeros((2, num_chunks), int), np.zeros(num_chunks - 1, int)
    at = int(np.argmax(done))
    while at < len(schedule.chunk):
        num_passes[int(schedule.is_backward[at]), schedule.chunk[at]] += 1
        before, message = int(schedule.before[at]), int(schedule.comes[at])
        if message == len(schedule.edge) or passed[message] < done[before]:
            at = before
            continue
        messages[schedule.edge[message]] += 1
        while True:  # through the queues, to the pass that the first of them waits for
            at = max(schedule.ends[:, message].tolist(), key=done.__getitem__)
            if done[at] == passed[message]:
                break
            message = max(schedule.queue[:, message].tolist(), key=passed.__getitem__)
    return num_passes, messages


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
