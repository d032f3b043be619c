"""Two clocks, of the host that launches and of the device that works, through a stretch of a training step.

A piece of work moves the clocks (device d, host h): the host launches it and goes on, the device begins when it is free and
something was launched, and ends neither before the host has launched all nor before its own work is done:

    h' = h + launches,    d' = max(max(d, h) + work, h').

Where the host waits for a number of the device, h' = max(d, h) + wait. Both are linear in the algebra of maximum and plus,
so any stretch of work is four numbers, and stretches are joined like matrices. Where launches cost nothing (CPUs, which are
host and device at once; captured graphs) the host's clock stays behind and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NEVER = -np.inf


@dataclass(frozen=True)
class Work:
    """d' = max(d + device, h + launched), h' = max(d + waited, h + host), each [...] in ms or NEVER; all broadcast."""

    device: np.ndarray
    launched: np.ndarray
    waited: np.ndarray
    host: np.ndarray

    @classmethod
    def piece(cls, device_ms, host_ms=0.0) -> Work:
        """Work that the host launches in host_ms and the device does in device_ms."""
        device, host = np.broadcast_arrays(np.asarray(device_ms, float), np.asarray(host_ms, float))
        return cls(device, np.maximum(device, host), np.full(device.shape, NEVER), host)

    @classmethod
    def wait(cls, ms: float) -> Work:
        """The host waits until the device is done, which takes `ms` to reach it."""
        return cls(np.zeros(()), np.full((), NEVER), np.asarray(ms, float), np.asarray(ms, float))

    @classmethod
    def nothing(cls) -> Work:
        never = np.full((), NEVER)
        return cls(np.zeros(()), never, never, np.zeros(()))

    def then(self, after: Work) -> Work:
        """This, and `after` behind it."""
        return Work(
            np.maximum(self.device + after.device, self.waited + after.launched),
            np.maximum(self.launched + after.device, self.host + after.launched),
            np.maximum(self.device + after.waited, self.waited + after.host),
            np.maximum(self.launched + after.waited, self.host + after.host),
        )

    def times(self, num: int) -> Work:
        """This, `num` times in a row."""
        found, power = Work.nothing(), self
        while num:
            if num & 1:
                found = found.then(power)
            power, num = power.then(power), num >> 1
        return found

    def at(self, place: int, num: int) -> Work:
        """[num]: this at `place`, nothing elsewhere."""
        found = Work.nothing().map(lambda ms: np.full(num, ms))
        for mine, ms in zip(vars(found).values(), vars(self).values(), strict=True):
            mine[place] = ms
        return found

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Work:
        return Work(*map(function, (self.device, self.launched, self.waited, self.host)))

    @property
    def total(self) -> np.ndarray:
        """[...] ms from the moment at which both begin until both are done."""
        return np.maximum(np.maximum(self.device, self.launched), np.maximum(self.waited, self.host))

    @property
    def each(self) -> np.ndarray:
        """[...] ms that each takes where it is repeated without end. Ways that change clocks and come back take no longer:
        a clock that hands over to the other has waited for it, and might have gone on itself."""
        return np.maximum(self.device, self.host)


def join(pieces: list[Work]) -> Work:
    """One after the other."""
    found = Work.nothing()
    for piece in pieces:
        found = found.then(piece)
    return found


def fold(blocks: Work, parts: list[list[int]]) -> Work:
    """Stretches of blocks: blocks [..., L], parts: for each stretch its blocks in order. Returns [..., len(parts)]."""
    longest = max(len(part) for part in parts)
    width = 1 << (longest - 1).bit_length()
    last = blocks.device.shape[-1]
    place = np.full((len(parts), width), last)
    for row, part in zip(place, parts, strict=True):
        row[: len(part)] = part
    idle = Work.nothing()
    shape = np.broadcast_shapes(*(x.shape for x in vars(blocks).values()))
    padded = [np.concatenate([np.broadcast_to(x, shape), np.full((*shape[:-1], 1), z)], -1)[..., place]
              for x, z in zip(vars(blocks).values(), vars(idle).values(), strict=True)]  # fmt: skip
    found = Work(*padded)
    while found.device.shape[-1] > 1:
        found = found.map(lambda x: x[..., ::2]).then(found.map(lambda x: x[..., 1::2]))
    return found.map(lambda x: x[..., 0])
