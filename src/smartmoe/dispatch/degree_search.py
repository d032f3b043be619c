"""Which parallelism and degree of pipelining is fastest at which capacity: tried while training runs, remembered by capacity.

Source: Tutel (Hwang et al., MLSys 2023), its dictionary from windows of capacities to what is best there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

DEGREES = (1, 2, 4, 8)
WINDOW = 128  # rows; capacities of one window have their choice in common
NUM_TRIALS = 2  # of each choice, of which the faster one counts: the first may build what later ones find


@dataclass(frozen=True)
class Choice:
    """Pieces that a buffer is cut into, and whether they travel in two steps, inside nodes and between them. weights_travel:
    no rows travel, but the weights of all experts."""

    degree: int
    in_two_steps: bool = False
    weights_travel: bool = False


class DegreeSearch:
    """The fastest of `choices` for every window of capacities, from times that its user tells. Ranks that ask with equal
    capacities and tell equal times get equal answers."""

    def __init__(self, choices: tuple[Choice, ...], window: int = WINDOW, num_trials: int = NUM_TRIALS):
        self.choices, self.window, self.num_trials = choices, window, num_trials
        self._times_ms: dict[int, dict[Choice, list[float]]] = {}

    def choose(self, capacity: int, without: tuple[Choice, ...] = ()) -> tuple[Choice, bool]:
        """The choice for the next pass at `capacity` rows of an expert, and whether it is still a trial, whose time is
        wanted. Trials go through the choices in turn, those that were fast at the nearest known capacity first. without:
        choices that are out of the question."""
        left = [choice for choice in self._in_order(capacity) if choice not in without]
        if len(left) == 1:
            return left[0], False
        known = self._times_ms.get(capacity // self.window, {})
        for turn in range(self.num_trials):
            for choice in left:
                if len(known.get(choice, ())) <= turn:
                    return choice, True
        return min(left, key=lambda choice: min(known[choice])), False

    def tell(self, capacity: int, choice: Choice, ms: float) -> None:
        """What a pass at `capacity` with `choice` took, on the slowest rank."""
        self._times_ms.setdefault(capacity // self.window, {}).setdefault(choice, []).append(ms)

    def known(self) -> dict[int, Choice]:
        """The fastest of what was tried: first capacity of a window -> choice."""
        windows = sorted(self._times_ms.items())
        return {window * self.window: min(times, key=lambda choice: min(times[choice])) for window, times in windows}

    def _in_order(self, capacity: int) -> list[Choice]:
        if not self._times_ms:
            return list(self.choices)
        nearest = min(self._times_ms, key=lambda window: (abs(window - capacity // self.window), window))
        known = self._times_ms[nearest]
        return sorted(self.choices, key=lambda choice: min(known.get(choice, [math.inf])))


class Trial:
    """The time of one pass and its backward pass, by events of the device, on a CPU by the clock."""

    def __init__(self, capacity: int, choice: Choice, is_cuda: bool):
        self.capacity, self.choice, self._is_cuda = capacity, choice, is_cuda
        self._marks: list = []

    def enter(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows`, with which the pass begins and its backward pass ends."""
        return _Mark.apply(rows, self)

    leave = enter  # with which the pass ends and its backward pass begins

    def mark(self) -> None:
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    @property
    def is_done(self) -> bool:
        """Whether forward and backward pass are launched."""
        return len(self._marks) == 4

    def ms(self) -> float:
        """Waits for the device where there is one."""
        first, second, third, last = self._marks
        if not self._is_cuda:
            return (second - first + last - third) * 1e3
        last.synchronize()
        return first.elapsed_time(second) + third.elapsed_time(last)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trial):
        ctx.trial = trial
        trial.mark()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.trial.mark()
        return grad, None
