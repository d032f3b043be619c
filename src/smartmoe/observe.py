"""Watching MoE layers: token copies per expert, and what all ranks of a stage saw, without making anything wait.

Layer 4. Axes: L MoE layers of this pipeline stage, M micro-batches, E experts, W ranks of the expert group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.ops.all_to_all import group_size
from smartmoe.ops.plan import count_slots


class LoadRecorder:
    """An observer of MoE layers: token copies per layer, micro-batch and logical expert on this rank.

    A forward pass that is recomputed in a backward pass counts once; dropped copies (-1) do not count. Recording only
    enqueues work on the device, one kernel where the extension is built.

    Args:
        layer_indices: layer_idx of the layers watched, in the order of the counts.
        num_experts: E.
    """

    def __init__(self, layer_indices: Sequence[int], num_experts: int):
        self._place = {layer_idx: place for place, layer_idx in enumerate(layer_indices)}
        self._num_experts = num_experts
        # places of layers, and for each [1 + E] int64: the first token's id, counts
        self._seen: list[tuple[list[int], torch.Tensor]] = []
        self._last: list[tuple[list[int], torch.Tensor]] = []
        self._aside: list[tuple[list[int], torch.Tensor]] = []
        self._where: tuple[list[int], torch.Tensor] | None = None

    def __call__(self, layer_idx: int, routing, token_id_BT: torch.Tensor) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if token_id_BT.numel() and not in_backward:
            count_E = count_slots(routing.expert_idx_TK.detach(), self._num_experts)
            row = torch.cat([token_id_BT.flatten()[:1], count_E])
            self._seen.append(([self._place[layer_idx]], row.unsqueeze(0)))

    def begin(self, repeats: bool) -> None:
        """As graphs.Watcher: what comes until `end` is captured, not run."""
        self._aside, self._seen = self._seen, []

    def end(self) -> list[tuple[list[int], torch.Tensor]]:
        """As graphs.Watcher."""
        captured, self._seen = self._seen, self._aside
        return captured

    def replayed(self, captured: list[tuple[list[int], torch.Tensor]]) -> None:
        """As graphs.Watcher: the passes captured have run once, and run again later: what they counted is copied."""
        if captured:
            places = [place for some, _ in captured for place in some]
            self._seen.append((places, torch.cat([rows for _, rows in captured])))

    def turn(self) -> None:
        """End an iteration: from now on `counts` and `sums` are of what was seen since the last turn."""
        self._last, self._seen = self._seen, []

    def counts(self) -> np.ndarray:
        """[L, M, E] int64 of the iteration; micro-batches in the order of their tokens. Waits for the device.

        A layer's pass is known by the id of its first token, so that one that ran twice counts once. Layers may count their
        tokens differently, but all have the same passes.
        """
        if not self._last:
            return np.zeros((len(self._place), 0, self._num_experts), np.int64)
        places, rows = self._all()
        rows, place_N = rows.cpu().numpy(), np.array(places)
        micro_batch = np.empty_like(place_N)
        for place in set(places):
            micro_batch[place_N == place] = np.unique(rows[place_N == place, 0], return_inverse=True)[1]
        counts_LME = np.zeros((len(self._place), micro_batch.max() + 1, self._num_experts), np.int64)
        counts_LME[place_N, micro_batch] = rows[:, 1:]
        return counts_LME

    def sums(self, device: torch.device) -> torch.Tensor:
        """[L, E] int64 of the iteration, all micro-batches together, on `device`. Does not wait for it."""
        sums_LE = torch.zeros(len(self._place), self._num_experts, dtype=torch.int64, device=device)
        if not self._last:
            return sums_LE
        places, rows = self._all()
        if self._where is None or self._where[0] != places:  # the same in every iteration of a schedule
            self._where = places, torch.tensor(places, device=device)
        return sums_LE.index_add_(0, self._where[1], rows[:, 1:])

    def _all(self) -> tuple[list[int], torch.Tensor]:
        return [place for some, _ in self._last for place in some], torch.cat([rows for _, rows in self._last])


class StageView:
    """Sums and maxima over the ranks of a stage, on their way while training goes on.

    On a GPU all of it runs beside the training stream: the reduction, and the copy to the host. Building it starts it,
    collective over the group; `read` returns (sums, maxima) as numpy arrays and waits only if they are not there yet.

    Args:
        counts: integers of any shape, on the device; not to be changed afterwards.
        values: [V] floats of the host.
        stream: to work on, None on a CPU.
    """

    def __init__(self, counts: torch.Tensor, values: Sequence[float], group, stream):
        self._counts = counts
        self._waits: list[Callable] = []
        self._values = torch.tensor(values, dtype=torch.float64)
        if stream is None:
            if group_size(group) > 1:
                self._waits = [
                    dist.all_reduce(self._counts, group=group, async_op=True).wait,
                    dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=group, async_op=True).wait,
                ]
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._on_device = self._counts, self._values.pin_memory().to(counts.device, non_blocking=True)
            if group_size(group) > 1:
                # waiting makes this stream follow the reduction, not the host
                dist.all_reduce(self._on_device[0], group=group, async_op=True).wait()
                dist.all_reduce(self._on_device[1], op=dist.ReduceOp.MAX, group=group, async_op=True).wait()
            on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in self._on_device]
            for here, there in zip(on_host, self._on_device, strict=True):
                here.copy_(there, non_blocking=True)
            self._counts, self._values = on_host
            self._waits = [stream.record_event().synchronize]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums, as the counts were shaped, and maxima [V]."""
        for wait in self._waits:
            wait()
        return self._counts.numpy(), self._values.numpy()
