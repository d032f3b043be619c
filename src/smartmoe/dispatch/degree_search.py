"""Which degree of pipelining is fastest at which capacity: tried while training runs, remembered by capacity.

Source: Tutel (Hwang et al., MLSys 2023), its dictionary from windows of capacities to the best degree and all-to-all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

DEGREES = (1, 2, 4, 8)
WINDOW = 128  # rows; capacities of one window have their choice in common
NUM_TRIALS = 2  # of each choice, of which the faster one counts: the first may build what later ones find


@dataclass(frozen=True)
class Choice:
    """Pieces that a buffer is cut into, and whether they travel in two steps, inside nodes and between them."""

    degree: int
    in_two_steps: bool = False


class DegreeSearch:
    """The fastest of `choices` for every window of capacities, from times that its user tells. Ranks that ask with equal
    capacities and tell equal times get equal answers."""

    def __init__(self, choices: tuple[Choice, ...], window: int = WINDOW, num_trials: int = NUM_TRIALS):
        self.choices, self.window, self.num_trials = choices, window, num_trials
        self._times_ms: dict[int, dict[Choice, list[float]]] = {}

    def choose(self, capacity: int) -> tuple[Choice, bool]:
        """The choice for the next pass at `capacity` rows of an expert, and whether it is still a trial, whose time is
        wanted. Trials go through the choices in turn, those that were fast at the nearest known capacity first."""
        if len(self.choices) == 1:
            return self.choices[0], False
        known = self._times_ms.get(capacity // self.window, {})
        for turn in range(self.num_trials):
            for choice in self._in_order(capacity):
                if len(known.get(choice, ())) <= turn:
                    return choice, True
        return min(self.choices, key=lambda choice: min(known[choice])), False

    def tell(self, capacity: int, choice: Choice, ms: float) -> None:
        """What a pass at `capacity` with `choice` took, on the slowest rank."""
        self._times_ms.setdefault(capacity // self.window, {}).setdefault(choice, []).append(ms)

    def known(self) -> dict[int, Choice]:
        """The choices that are settled: first capacity of a window -> the fastest."""
        windows = {window: self.choose(window * self.window) for window in sorted(self._times_ms)}
        return {window * self.window: choice for window, (choice, is_trial) in windows.items() if not is_trial}

    def _in_order(self, capacity: int) -> list[Choice]:
        others = [window for window, known in self._times_ms.items() if len(known) == len(self.choices)]
        if not others:
            return list(self.choices)
        nearest = min(others, key=lambda window: (abs(window - capacity // self.window), window))
        return sorted(self.choices, key=lambda choice: min(self._times_ms[nearest][choice]))


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
