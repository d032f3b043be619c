"""Work that keeps a GPU as busy as a training step does, to be put before what is timed.

A GPU whose power is limited lowers its clock within some ten milliseconds of hard work, by a quarter on an H200: what is
timed behind an idle GPU is faster than it ever is inside a step. Behind this work it runs at the clock that it has there,
and the host gets ahead meanwhile, as it does in training. Products alone would bring the clock below that of a step, where
other work lies between them (1.15 GHz instead of 1.4 on an H200): so this work takes longer than what is timed.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from smartmoe.bench.measure import World, between, now

WARM_MS = 40.0  # until the clock is that of hard work
_TIMES_OF_STEP = 2.0  # this work's time over that of the step behind it, which then has a third of the power's say
_WIDTH = 4096
_PASSES = 4  # over memory for each product: products take two thirds of the time, as in a step
_TURN_MS = 2.0  # of work, and of waiting, where it is seen how much faster a chip is that waits
_TURNS = 150  # in all about a second, of which the latter halves count: the limit of power takes tenths of a second
_WAIT_CYCLES = int(_TURN_MS * 1.9e6)


def lead_ms(launch_ms: float, took_ms: float) -> float:
    """How long to keep a GPU busy before each step that the host launches in `launch_ms` and that takes `took_ms`: until all
    of it is launched, and so long that this work sets the clock."""
    return max(1.5 * launch_ms + 0.05, min(_TIMES_OF_STEP * took_ms, WARM_MS))


class BusyWork:
    """Products of random matrices and passes over memory, in `dtype`; nothing on a CPU. Not collective."""

    def __init__(self, world: World, dtype: torch.dtype):
        self.unit_ms = 0.0
        if world.device.type != "cuda":
            return
        self._tensors = [torch.randn(_WIDTH, _WIDTH, device=world.device, dtype=dtype) for _ in range(4)]
        for _ in range(2):  # the first: kernels are chosen
            start = now(world)
            for _ in range(10):
                self._unit()
            end = now(world)
            torch.cuda.synchronize()
            self.unit_ms = between(start, end) / 10

    def _unit(self) -> None:
        a, b, product, total = self._tensors
        torch.mm(a, b, out=product)
        for _ in range(_PASSES):
            torch.add(product, a, out=total)

    def launch(self, ms: float) -> None:
        """Keep the device busy for at least `ms`, on the current stream; the host does not wait."""
        if self.unit_ms:
            for _ in range(int(ms / self.unit_ms) + 1):
                self._unit()

    def wait_speedup(self) -> float:
        """By how much, as a logarithm, this work would be faster on a GPU that waits all of the time than on one that never
        does: from turns of work alone, and with waits between them, which leave some of the power for a faster clock. At
        least 0; 0 on a CPU. Waits for the device."""
        if not self.unit_ms:
            return 0.0
        return speedup_of_waiting(*(self._turns(cycles) for cycles in (0, _WAIT_CYCLES)))

    def _turns(self, wait_cycles: int) -> np.ndarray:
        """[turns, 2] ms of the work and of the wait behind it, of the latter half of the turns."""
        marks = [self._mark()]
        for _ in range(_TURNS):
            self.launch(_TURN_MS)
            marks.append(self._mark())
            if wait_cycles:
                torch.cuda._sleep(wait_cycles)  # one thread turns in circles, as one that waits for a message does
            marks.append(self._mark())
        torch.cuda.synchronize()
        took = np.array([first.elapsed_time(then) for first, then in zip(marks[:-1], marks[1:], strict=True)])
        return took.reshape(_TURNS, 2)[_TURNS // 2 :]

    @staticmethod
    def _mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def speedup_of_waiting(alone_T2: np.ndarray, waiting_T2: np.ndarray) -> float:
    """As BusyWork.wait_speedup, of [turns, 2] ms of work and of waits behind it, without waits and with them."""
    work, wait = np.median(waiting_T2, axis=0)
    return max(math.log(np.median(alone_T2[:, 0]) / work) / (wait / (work + wait)), 0.0)
