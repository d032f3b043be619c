"""Fast links made slow, to stand in for a slow network: every exchange between ranks takes at least its bytes over a rate.

Layer 1. Inside `slow_links(rate)` the collectives of torch.distributed and the pipeline's messages have, beside the time that
they take anyway, that of their bytes at `rate`: what this rank sends to others or receives from them, whichever is more. An
exchange that overlaps with computation still does. Exchanges of one group, or from one peer, follow one another; those of
different groups do not wait for each other. Latency stays what it is. Stores into another rank's memory and reads from it
are no exchanges of torch.distributed: `config.check` refuses the direct dispatcher, and whoever else has a choice between
memory and exchanges asks `are_slowed`.

On a GPU the delay is a kernel on a stream beside the training stream, which follows the exchange and which whoever waits for
the exchange waits for: the host never waits. On a CPU the rank sleeps: a collective counts from its launch, a message of the
pipeline from the moment that its receiver has it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

_HOLD_STREAMS: dict[object, torch.cuda.Stream] = {}


@contextlib.contextmanager
def slow_links(gbytes_per_s: float) -> Iterator[None]:
    """Slow all exchanges of this process down to `gbytes_per_s` per rank and direction; 0 changes nothing.

    Not collective, but the delays differ where ranks differ. Inside itself it is an error.
    """
    if not gbytes_per_s:
        yield
        return
    assert not are_slowed(), "slow_links inside slow_links"
    changed = [(dist, name, _slowed(getattr(dist, name), moved, gbytes_per_s * 1e9)) for name, moved in _MOVED.items()
               if hasattr(dist, name)]  # fmt: skip
    for module, name in ((dist, "batch_isend_irecv"), (schedules, "_batch_p2p")):
        changed.append((module, name, _slowed_messages(getattr(module, name), gbytes_per_s * 1e9)))
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        for module, name, function in changed:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def are_slowed() -> bool:
    """Whether this process is inside `slow_links` now. Not collective."""
    return hasattr(dist.all_reduce, "slowed")


# ----------------------------------------------------------------------------------------------------- bytes of this rank


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_to_all_bytes(group, output, input, output_split_sizes=None, input_split_sizes=None) -> float:
    """What goes to others, or comes from them, whichever is more."""
    worst, size, me = 0.0, dist.get_world_size(group), dist.get_rank(group)
    for tensor, splits in ((output, output_split_sizes), (input, input_split_sizes)):
        own = splits[me] / max(sum(splits), 1) if splits else 1 / size
        worst = max(worst, _nbytes(tensor) * (1 - own))
    return worst


def _ring(times: int, place: int) -> Callable[..., float]:
    """Bytes of a ring in which the whole tensor, argument `place`, passes `times` times."""

    def moved(group, *tensors) -> float:
        size = dist.get_world_size(group)
        return times * _nbytes(tensors[place]) * (size - 1) / size

    return moved


# Collective -> bytes that it moves through this rank's link, of (group, its tensors and splits).
_MOVED: dict[str, Callable[..., float]] = {
    "all_to_all_single": _all_to_all_bytes,
    "all_reduce": _ring(2, 0),
    "broadcast": _ring(1, 0),
    "reduce": _ring(1, 0),
    "all_gather_into_tensor": _ring(1, 0),
    "all_gather_single": _ring(1, 0),
    "reduce_scatter_tensor": _ring(1, 1),
    "reduce_scatter_single": _ring(1, 1),
}
# How many of the positional arguments are tensors or splits; 2 for the others.
_NUM_TENSORS = {"all_to_all_single": 4, "all_reduce": 1, "broadcast": 1, "reduce": 1}


# ------------------------------------------------------------------------------------------------------------------ delays


def _slowed(collective, moved, rate: float):
    """`collective`, whose result is there only after its bytes would have passed the link."""
    num = _NUM_TENSORS.get(collective.__name__, 2)

    @functools.wraps(collective)
    def call(*args, group=None, async_op=False, **more):
        sizes = {key: more[key] for key in ("output_split_sizes", "input_split_sizes") if key in more}
        seconds = moved(group, *args[:num], **sizes) / rate
        launched = time.perf_counter()
        work = collective(*args, group=group, async_op=True, **more)
        if work is None or not seconds:  # this rank is not in the group, or alone in it
            return work if async_op or work is None else work.wait()
        is_cuda = args[0].is_cuda
        held = _HeldOnDevice([work], group, seconds, args) if is_cuda else _HeldOnHost([work], launched, group, seconds)
        return held if async_op else held.wait()

    call.slowed = True
    return call


def _slowed_messages(send_and_receive, rate: float):
    """A batch of messages, of which those received come late."""

    @functools.wraps(send_and_receive)
    def call(ops, *args, **more):
        works = send_and_receive(ops, *args, **more)
        if any(isinstance(work, _HeldOnDevice | _HeldOnHost) for work in works):
            return works  # one of the two functions called the other
        received = [op for op in ops if op.op is dist.irecv]
        seconds = sum(_nbytes(op.tensor) for op in received) / rate
        if not seconds:
            return works
        if ops[0].tensor.is_cuda:
            return [_HeldOnDevice(works, (ops[0].group, received[0].peer), seconds, [op.tensor for op in ops])]
        return [_HeldOnHost(works, None, None, seconds)]

    return call


class _HeldOnHost:
    """Works whose wait ends `seconds` after they could begin: when their link was free, or, launched None, when they ended."""

    _free_at: dict[object, float] = {}

    def __init__(self, works, launched: float | None, link, seconds: float):
        self._works, self._seconds, self._ready = works, seconds, None
        if launched is not None:
            self._ready = max(launched, self._free_at.get(link, 0.0)) + seconds
            self._free_at[link] = self._ready

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        ready = self._ready or time.perf_counter() + self._seconds
        while (left := ready - time.perf_counter()) > 0:
            time.sleep(left)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works) and time.perf_counter() >= (self._ready or 0.0)


class _HeldOnDevice:
    """Works whose wait makes the current stream wait until `seconds` after they ended; `tensors` live until then."""

    def __init__(self, works, link, seconds: float, tensors):
        self._tensors = tensors  # torch keeps them until its own wait, which comes early here
        if link not in _HOLD_STREAMS:
            _HOLD_STREAMS[link] = torch.cuda.Stream()
        stream = _HOLD_STREAMS[link]
        with torch.cuda.stream(stream):
            for work in works:
                work.wait()
            _hold_kernel()[(1,)](int(seconds * 1e9), num_warps=1)
        self._event = stream.record_event()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)
        self._tensors = None

    def is_completed(self) -> bool:
        return self._event.query()


@functools.cache
def _hold_kernel():
    """A kernel that does nothing for so many nanoseconds."""
    from smartmoe.slow_links_kernel import hold

    return hold
