"""The passes of a micro-batch as CUDA graphs, so that the host launches one thing instead of thousands.

Layer 5. Forward and backward of a micro-batch are captured once, after a few iterations that ran as they are, and replayed
for every micro-batch from then on: one graph for the first micro-batch of an iteration, whose gradients overwrite those of
the iteration before, one for all others, whose gradients are added, and with workload.reduce_early one for the last, in which
gradients are reduced beside what is still to be computed. In a pipeline, where passes of several micro-batches interleave,
forward and backward are graphs of their own, and there are, beside the first one's, as many pairs as micro-batches can be
in flight in a chunk: what a forward pass leaves for its backward pass keeps its place, beside that of the others. Stages
exchange activations between the graphs. What changes from one micro-batch or iteration to the next lies in memory that
keeps its place: tokens, the scale of the loss, routing tables, weights, gradients, and what the device itself decides.
Where the host takes part in a pass nothing is captured, and `why_not` says why.

A replay runs nothing of Python. Whoever follows the passes from the host is a Watcher; hooks of modules and tensors run at
the capture and not again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from smartmoe.config import RunConfig
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.dispatch.symmetric_replicas import SymmetricReplication
from smartmoe.ops.extension import path_for
from smartmoe.ops.graph_nodes import replace_memsets
from smartmoe.parallel.data import GradientBuffers
from smartmoe.parallel.pipeline_passes import Pass, Source
from smartmoe.replicas import CollectiveHistory, ExactReplication, HistoryReplication

WARM_UP = 2  # iterations that run as they are: kernels are compiled, libraries choose theirs, ranks connect
_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who follows the passes of layers from the host, for instance to count or to time."""

    def begin(self, repeats: bool) -> None:
        """What comes until `end` is captured and does not run. repeats: it is the pass of a micro-batch behind the first, of
        which the same has been captured."""

    def end(self) -> Any:
        """What was seen since `begin`; it is given to `replayed`."""

    def replayed(self, captured: Any) -> None:
        """What was captured has been launched once more."""


class Tape(Protocol):
    """Records calls and plays them again. num_bytes: device memory that recordings keep for themselves."""

    num_bytes: int

    def record(self, call: Callable[[], None], room: Hashable = None) -> Callable[[], None]:
        """Call `call`, which launches nothing now, and return what launches it. What fails in it is raised, and then
        nothing of it is left. room: recordings in one room share memory: tensors that are alive now stay as they are when
        the recording is played, other tensors that recordings of this room made do not; those of other rooms do."""

    def clear(self) -> None:
        """Let go of all recordings and their memory."""


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream for captures: one for all, as cuBLAS keeps memory for each stream that it has worked on."""
    return torch.cuda.Stream(device)


class CudaTape:
    """A Tape of CUDA graphs, replayed one after the other. Each room is a pool of memory."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, _stream_of(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pools: dict[Hashable, Any] = {}
        self.num_bytes = 0

    def record(self, call: Callable[[], None], room: Hashable = None) -> Callable[[], None]:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()  # what passes have needed so far is what the graph needs
        before, graph = torch.cuda.memory_reserved(self._device), torch.cuda.CUDAGraph(keep_graph=True)
        pool = self._pools.get(room) or self._pools.setdefault(room, torch.cuda.graph_pool_handle())
        with torch.cuda.stream(self._stream):
            # other threads, such as the one in which NCCL looks after its collectives, may go on
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says once more that the capture has failed
                    graph.capture_end()
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index or 0, pool)
                raise
            graph.capture_end()
        replace_memsets(graph, self._device)
        graph.instantiate()
        self._graphs.append(graph)
        self.num_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph.replay

    def clear(self) -> None:
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs, self._pools, self.num_bytes = [], {}, 0
        torch.cuda.empty_cache()


@dataclass
class _Play:
    """A recorded pass: what launches each of its parts, and what each watcher saw of it. fills: the gradients, by ref, that
    it overwrites; num_reduced: buckets that it reduces (parallel.early). num_launched: parts that have been, 0 = all or none.
    """

    work: Pass
    watchers: Sequence[Watcher]
    buffers: GradientBuffers
    replays: list[Callable[[], None]] = field(default_factory=list)
    seen: list[list] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    num_reduced: int = 0
    num_launched: int = 0

    def launch(self, part_idx: int) -> None:
        """Run a part; they come in turn."""
        assert part_idx == self.num_launched, "more micro-batches in flight than there are recordings for"
        self.num_launched = (part_idx + 1) % len(self.replays)
        self.replays[part_idx]()
        if self.num_launched == 0:
            for ref_idx in self.fills:
                self.buffers.fill(ref_idx)
            if self.num_reduced:
                self.buffers.early.num_started += self.num_reduced
        for watcher, seen in zip(self.watchers, self.seen[part_idx], strict=True):
            watcher.replayed(seen)


def why_not(config: RunConfig, layers: Iterable, device: torch.device) -> str:
    """Why no pass of this run can be captured, "" where it can. layers: the MoELayers of this rank."""
    if config.workload.cuda_graph == "never":
        return 'workload.cuda_graph = "never"'
    if device.type != "cuda":
        return "it runs on a CPU"
    if config.plan.pp > 1 and config.workload.zero > 1:
        return f"plan.pp = {config.plan.pp} with workload.zero = {config.workload.zero}: recorded only where there is one stage"
    if config.online.return_early:
        return "online.return_early: the host starts exchanges inside backward passes"
    for layer in layers:
        reason = _layer_reason(layer)
        if reason:
            return f"layer {layer.layer_idx}: {reason}"
    return ""


def _layer_reason(layer) -> str:
    if not isinstance(layer.dispatcher, DirectDispatcher):
        return f"the host takes part in the exchange of {type(layer.dispatcher).__name__}, only of direct it does not"
    if isinstance(layer.replication, ExactReplication):
        return "copies of experts are decided by the host for each micro-batch"
    if layer.experts.impl == "loop" or path_for(layer.experts.w1_LDF).gemm == "loop":
        return "the products of experts, one by one, read on the host how many tokens each has"
    return ""


class PassGraphs:
    """Plays the passes of a run's micro-batches from recordings, once there are some.

    reason: why nothing is recorded, "" = it is, or will be. All ranks of a pipeline stage record in the same iteration or
    none does; stages need not do alike.

    Args:
        sources: where the passes of each chunk of this rank come from.
        buffers: where gradients go.
        layers: the MoELayers of this rank.
        watchers: all that follow the layers' passes; more may `join`.
        num_passes: micro-batches of an iteration.
        reason: see `why_not`.
        tape: what records, None = nothing will.
        group: all ranks of the stage, None = one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        buffers: GradientBuffers,
        layers: Sequence,
        watchers: Sequence[Watcher],
        *,
        num_passes: int,
        reason: str,
        tape: Tape | None,
        group: dist.ProcessGroup | None,
    ):
        self.reason = reason
        self.tell: Callable[[str], None] = _log.info
        self._sources, self._buffers, self._layers, self._watchers = sources, buffers, list(layers), list(watchers)
        self._num_passes, self._tape, self._group = num_passes, tape, group
        self._device = buffers.refs[0].param.device
        self._peak = 0
        self._num_plain = 0  # iterations that ran as they are, since the start or since a recording was dropped
        self._plays: dict[tuple[int, int], _Play] = {}
        self._recorded_places: list[int] = []
        self._num_rows: list[int] = []

    @property
    def is_recorded(self) -> bool:
        return bool(self._plays)

    @property
    def num_bytes(self) -> int:
        """Device memory that recordings keep for themselves."""
        return self._tape.num_bytes if self._tape is not None else 0

    def join(self, watcher: Watcher) -> None:
        """From now on this one follows the passes, too."""
        self.drop()
        self._watchers.append(watcher)

    def prepare(self, *sample: torch.Tensor) -> None:
        """To be called before the first pass of an iteration: records when it is time. sample: inputs of a micro-batch.
        Collective over the stage where it records."""
        if self.reason:
            return
        for replication in self._history():
            replication.wait_weights()  # no pass that is replayed does
        self._buffers.let_go()  # else a recording would count on what an evaluation has left, at another place on each rank
        if self._plays and self._is_stale():
            self.drop(num_plain=WARM_UP)  # kernels are there
        if self._plays:
            return
        if self._num_plain < WARM_UP or not all(dispatcher.is_settled for dispatcher in self._dispatchers()):
            self._num_plain += 1
            return
        self._record(sample)

    def pick(self, chunk: int, place: int) -> _Play | None:
        """The recording for micro-batch `place` of the iteration on this rank's chunk; None = there is none."""
        if not self._plays:
            return None
        return self._plays[chunk, self._kind(chunk, place)]

    def _kind(self, chunk: int, place: int) -> int:
        """Which recording is that of micro-batch `place`: the first one's, that of the last one where it reduces gradients,
        or one of those that take turns in between."""
        if place and place == self._num_passes - 1 and self._buffers.early is not None:
            return -1
        return (place - 1) % self._sources[chunk].num_slots + 1 if place else 0

    def peak_bytes(self) -> int:
        """The most that tensors, and graphs on top of them, have taken of the GPU since its peak was last reset; 0 on a
        CPU."""
        if self._device.type != "cuda":
            return 0
        peak = max(torch.cuda.max_memory_allocated(self._device) + self.num_bytes, self._peak)
        self._peak = 0
        return peak

    def is_outgrown(self) -> bool:
        """Whether routings come close to the room that passes were recorded with. Not collective; does not wait."""
        pairs = zip(self._dispatchers(), self._num_rows, strict=False)
        return bool(self._plays) and any([dispatcher.outgrows(num_rows) for dispatcher, num_rows in pairs])

    def drop(self, num_plain: int = WARM_UP - 1) -> None:
        """Let go of the recordings, if any; after WARM_UP - num_plain iterations passes are recorded anew."""
        if self._plays:
            self._forget()
            self._num_plain = num_plain

    def _forget(self) -> None:
        self._plays = {}
        for replication in self._history():
            replication.adds_always = False
        for replication in self._on_device():
            replication.forget_weights()  # what was captured may never have run
        self._tape.clear()
        self._buffers.reduce_late(False)

    def _dispatchers(self) -> list[DirectDispatcher]:
        return [layer.dispatcher for layer in self._layers]

    def _history(self) -> list[CollectiveHistory]:
        return [layer.replication for layer in self._layers if isinstance(layer.replication, CollectiveHistory)]

    def _on_device(self) -> list[SymmetricReplication]:
        return [layer.replication for layer in self._layers if isinstance(layer.replication, SymmetricReplication)]

    def _places(self) -> list[int]:
        return [ref.param.data_ptr() for ref in self._buffers.refs]

    def _is_stale(self) -> bool:
        """Whether something that a recording holds as it was then has changed, beside the room of dispatchers."""
        adds = all(replication.adds_always or not replication.has_copies for replication in self._history())
        return not adds or self._recorded_places != self._places()

    def _strangers(self) -> str:
        for layer in self._layers:
            strange = [observer for observer in layer.observers if observer not in self._watchers]
            if strange:
                return f"layer {layer.layer_idx} has an observer that a replay would not call: {strange[0]!r}"
        return ""

    def _record(self, sample: Sequence[torch.Tensor]) -> None:
        start, failed = time.perf_counter(), self._strangers()
        before = self.peak_bytes()
        if not failed:
            self._recorded_places = self._places()
            for replication in self._history():  # so that copies that come later need no other recording
                replication.adds_always = any(each.has_copies for each in self._history())
            self._buffers.reduce_late(True)
            transports = {id(each.transport): each.transport for each in self._dispatchers()}.values()
            are_open = [transport.is_open for transport in transports]
            try:
                for chunk in reversed(range(len(self._sources))):  # as backward passes come, and their reductions
                    for place in range(self._num_passes):
                        if (chunk, self._kind(chunk, place)) not in self._plays:
                            self._plays[chunk, self._kind(chunk, place)] = self._record_pass(chunk, place, sample)
                self._buffers.reduce_late(True)  # from now on as if nothing had been started
            except Exception as error:
                _log.warning("the capture of a micro-batch failed here", exc_info=True)
                failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                for transport, is_open in zip(transports, are_open, strict=True):
                    transport.is_open = is_open  # what was captured is not sent
        self._num_rows = [dispatcher.num_rows for dispatcher in self._dispatchers()]
        if self._device.type == "cuda":  # the graphs' memory counts by itself from now on
            self._peak = max(before, torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._any_rank(bool(failed)):
            self._forget()
            self._buffers.zero()  # as at the beginning of the iteration
            for ref in self._buffers.refs:
                ref.param.grad = None
            self.reason = failed or "another rank could not"
            self.tell(f"CUDA graph: micro-batches run without, {self.reason}")
        else:
            took, gbytes = time.perf_counter() - start, self.num_bytes / 1e9
            self.tell(f"CUDA graph: the passes of a micro-batch were captured in {took:.1f} s and keep {gbytes:.2f} GB")

    def _record_pass(self, chunk: int, place: int, sample: Sequence[torch.Tensor]) -> _Play:
        source, early = self._sources[chunk], self._buffers.early
        play, filled = _Play(source.make(*sample), self._watchers, self._buffers), set(self._buffers.filled())
        num_started = early.num_started if early is not None else 0
        for part in play.work.parts:
            call = functools.partial(self._whole, part, early is not None and place == self._num_passes - 1)
            for watcher in self._watchers:
                watcher.begin(repeats=place > 0)
            try:
                play.replays.append(self._tape.record(call, (chunk, place % source.num_slots)))
            finally:
                play.seen.append([watcher.end() for watcher in self._watchers])
            if source.num_slots > 1:
                for replication in self._on_device():
                    if not isinstance(replication, HistoryReplication):
                        replication.forget_weights()  # of other micro-batches, by the time of the backward pass
        play.fills = [ref_idx for ref_idx in self._buffers.filled() if ref_idx not in filled]
        play.num_reduced = early.num_started - num_started if early is not None else 0
        return play

    def _whole(self, part: Callable[[], None], reduces: bool) -> None:
        with self._buffers.early.within() if reduces else contextlib.nullcontext():
            part()
            self._buffers.flush()

    def _any_rank(self, mine: bool) -> bool:
        if self._group is None:
            return mine
        flag = torch.tensor(int(mine), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
