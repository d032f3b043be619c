"""Time spent in each MoE layer, forward and backward, without touching the layer.

On a GPU the times come from events, which cost no synchronisation until they are read.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn


class LayerTimer:
    """Measures forward and backward of `layers` (layer_idx -> module called as module(x, token_id)).

    Backward runs from the arrival of the output's gradient to the completion of the input's. A repetition of the forward
    during recomputation is part of the backward, where it really happens, and is not counted twice. Passes that CUDA graphs
    replay all count as long as the first of the iteration took, which alone is timed: the GPU stands still for some 10 us
    before each event of a graph.
    """

    def __init__(self, layers: dict[int, nn.Module], device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[int, str, object, object]] = []
        self._aside: list[tuple[int, str, object, object]] = []
        self._open: dict[tuple[int, str], object] = {}
        self._captured: dict[tuple[int, str], tuple[int, str, object, object]] = {}
        self._has_replays = self._repeats = False
        self._before = dict  # what gives the times of the iteration before
        for layer_idx, layer in layers.items():
            layer.register_forward_pre_hook(lambda module, args, idx=layer_idx: self._enter(idx, args[0]))
            layer.register_forward_hook(lambda module, args, out, idx=layer_idx: self._leave(idx, out[0]))

    def _now(self):
        if not self._is_cuda:
            return time.perf_counter()
        # in a graph an event that is read from outside is a node of its own
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def _begin(self, idx: int, part: str) -> None:
        self._open[idx, part] = 0.0 if self._repeats else self._now()

    def _end(self, idx: int, part: str) -> None:
        start = self._open.pop((idx, part), None)
        if start is not None:
            self._marks.append(self._captured[idx, part] if self._repeats else (idx, part, start, self._now()))

    def _enter(self, idx: int, x: torch.Tensor) -> None:
        if x.requires_grad:
            x.register_hook(lambda grad: self._end(idx, "backward"))
        if torch._C._current_graph_task_id() == -1:  # -1: not inside a backward pass, so no recomputation
            self._begin(idx, "forward")

    def _leave(self, idx: int, y: torch.Tensor) -> None:
        self._end(idx, "forward")
        if y.requires_grad:
            y.register_hook(lambda grad: self._begin(idx, "backward"))

    def begin(self, repeats: bool) -> None:
        """As graphs.Watcher: what comes until `end` is captured, not run."""
        self._aside, self._marks, self._repeats = self._marks, [], repeats

    def end(self) -> list[tuple[int, str, object, object]]:
        """As graphs.Watcher."""
        captured, self._marks, self._repeats = self._marks, self._aside, False
        self._captured |= {mark[:2]: mark for mark in captured}
        self._open.clear()
        return captured

    def replayed(self, captured: list[tuple[int, str, object, object]]) -> None:
        """As graphs.Watcher: the passes captured have run once more."""
        self._marks += captured
        self._has_replays = True

    def take(self) -> dict[int, dict[str, float]]:
        """layer_idx -> {"forward_ms", "backward_ms"} summed since the last call. Waits for the last of these passes."""
        return self._sums(self._cut())

    def turn(self) -> dict[int, dict[str, float]]:
        """End an iteration: the times, as from `take`, of the one that the turn before ended; {} at the first.

        Waits for nothing of the iteration that ends, so that a GPU that has been given all of it works on. Only passes
        replayed from a CUDA graph are waited for: the next replay records the same events again.
        """
        times = self._before()
        has_replays, self._before = self._has_replays, partial(self._sums, self._cut())
        if has_replays and self._is_cuda:
            known = self._before()
            self._before = lambda: known
        return times

    def forget(self) -> None:
        """The passes since the last `turn` or `take` do not count. Waits for nothing."""
        self._cut()

    def _cut(self) -> list[tuple[int, str, object, object]]:
        marks, self._marks, self._has_replays = self._marks, [], False
        return marks

    def _sums(self, marks: list[tuple[int, str, object, object]]) -> dict[int, dict[str, float]]:
        if self._is_cuda and marks:
            marks[-1][3].synchronize()
        sums: dict[int, dict[str, float]] = {}
        for idx, part, start, end in marks:
            elapsed_ms = start.elapsed_time(end) if self._is_cuda else (end - start) * 1e3
            layer = sums.setdefault(idx, {"forward_ms": 0.0, "backward_ms": 0.0})
            layer[f"{part}_ms"] += elapsed_ms
        return sums
