"""Gradient reduction that starts while the last backward passes of an iteration still run.

Gradients are cut into buckets in the order in which backward passes finish them, last layers first. A bucket is reduced
when each of its parameters has got all its gradients of the iteration and the bucket before it was started: so all ranks
start the same reductions in the same order, under pipelining and interleaving as well, where nobody says which pass is the
last. What is not complete by then (a parameter without a gradient in some pass) is reduced at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 << 20


@dataclass
class _Bucket:
    """Neighbours in a flat buffer. missing: gradients that its parameters still get in this iteration, all together."""

    group: dist.ProcessGroup
    grad: torch.Tensor
    first: int  # where in the model its first parameter stands
    ref_idxs: list[int] = field(default_factory=list)
    missing: int = 0


class EarlyReduction:
    """Sums gradients over their groups by buckets, early where it can.

    refs, flats: the parameters and the flat buffers by kind, see GradientBuffers. order: where in the model each of refs
    stands. groups: of the kinds to reduce here. num_passes: gradients that each parameter gets in an iteration. num_started:
    buckets whose reduction was started in this iteration.
    """

    def __init__(self, refs, flats, order: Sequence[int], groups, num_passes: int, bucket_bytes: int = BUCKET_BYTES):
        self._num_passes, self._bucket_of, self._works = num_passes, {}, []
        self.waits_for_finish = False  # where backward passes do not come by here: nothing starts before `finish`
        buckets = [
            bucket
            for kind, group in groups.items()
            for bucket in _cut(refs, flats[kind], order, kind, group, bucket_bytes)
        ]
        self._buckets = sorted(buckets, key=lambda bucket: -bucket.first)
        for bucket in self._buckets:
            self._bucket_of |= dict.fromkeys(bucket.ref_idxs, bucket)
        self.reset()

    def reset(self, num_passes: int | None = None) -> None:
        """Begin an iteration, of which only the last `num_passes` come by here, None = all."""
        self.num_started, self._writing = 0, None
        for bucket in self._buckets:
            bucket.missing = (self._num_passes if num_passes is None else num_passes) * len(bucket.ref_idxs)

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """A backward pass that comes by here, although others do not: what is started inside is done at its end, for what
        follows on the stream."""
        self.waits_for_finish = False
        try:
            yield
            self._settle()
            self._start_complete()
            self._wait()
        finally:
            self.waits_for_finish = True
            self._works.clear()  # of a capture that failed: nothing was launched, and to wait would be an error

    def note(self, ref_idx: int) -> None:
        """A gradient of a parameter is about to be launched. Those noted before have been: it may start reductions."""
        if self.waits_for_finish:
            return
        self._settle()
        self._writing = self._bucket_of.get(ref_idx)
        self._start_complete()

    def finish(self) -> None:
        """Start what is left and wait for all. Collective over the groups; on a GPU the host does not wait."""
        self._settle()
        while self.num_started < len(self._buckets):
            self._start_next()
        self._wait()

    def _settle(self) -> None:
        if self._writing is not None:
            self._writing.missing -= 1
            self._writing = None

    def _start_complete(self) -> None:
        while self.num_started < len(self._buckets) and not self._buckets[self.num_started].missing:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self.num_started]
        self._works.append(dist.all_reduce(bucket.grad, group=bucket.group, async_op=True))
        self.num_started += 1

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()


def _cut(refs, flat: torch.Tensor, order: Sequence[int], kind: str, group, bucket_bytes: int) -> list[_Bucket]:
    """The buckets of one kind: neighbouring parameters, as many as fit, from the end of the model on."""
    members = [idx for idx, ref in enumerate(refs) if ref.kind == kind]
    buckets, end = [], flat.numel()
    for idx in reversed(members):
        start = end - refs[idx].grad.numel()
        last = buckets[-1] if buckets else None
        if last is None or 4 * (last.grad.numel() + end - start) > bucket_bytes:
            buckets.append(_Bucket(group, flat[start:end], order[idx], [idx]))
        else:
            last.grad = flat[start : start + last.grad.numel() + end - start]
            last.first = order[idx]
            last.ref_idxs.append(idx)
        end = start
    return buckets
