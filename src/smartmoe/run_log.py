"""What a run writes while it trains: metrics, layer times, loads, placement events, trace, and the lines that people follow.

Layer 6. All ranks gather, world rank 0 writes. What the files are: smartmoe.record and logs/README.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from smartmoe import record
from smartmoe.config import RunConfig
from smartmoe.load_map import load_line
from smartmoe.models import flops_per_sample
from smartmoe.online import is_due
from smartmoe.swin_sizes import block_sizes, has_experts
from smartmoe.timing import LayerTimer
from smartmoe.trace import ExpertTrace
from smartmoe.trainer import IterationResult, Trainer


class RunLog:
    """Follows the iterations of `trainer` into the files of `run_dir`; as a context it leaves them whole, however the run ends.

    resumed: whether files of earlier iterations are there to go on with. `follow` is collective.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, resumed: bool = False):
        self._trainer, self._config, first = trainer, trainer.config, trainer.iteration
        is_writer = trainer.mesh.world_rank == 0
        self._writer = record.RunWriter(run_dir, keep_through=first if resumed else None) if is_writer else None
        self._timer = LayerTimer(trainer.layers, trainer.mesh.device) if self._config.record_spans else None
        if self._timer:
            trainer.graphs.join(self._timer)
        self._trace_file = run_dir / "trace.npz"
        records_trace = is_writer and self._config.record_trace
        self._trace_parts = _earlier_trace(self._trace_file, first) if records_trace else []
        self._progress = Progress(self._config, first)
        self._in_force: dict[int, tuple] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error) -> None:
        if self._writer:
            _save_trace(self._trace_file, self._trace_parts, self._config)
            self._writer.close()

    def tell(self, text: str) -> None:
        """Print and log a line for the user."""
        if self._writer:
            self._writer.log(text)
            print(text, flush=True)

    def opening(self) -> None:
        """Print what is about to run."""
        if self._writer:
            print(self._progress.opening(self._config), flush=True)

    def begin(self) -> None:
        """Before an iteration."""
        self._in_force = {idx: (layer.placement, layer.replicas) for idx, layer in self._trainer.layers.items()}

    def follow(self, result: IterationResult) -> None:
        """Behind an iteration, with what came of it. Collective over the world."""
        config, trainer = self._config, self._trainer
        spans = _gather_spans(self._timer, trainer) if self._timer else []
        loads = _gather_loads(self._in_force, trainer) if config.record_spans else []
        events = _gather_events(result.events, trainer)
        counts = _gather_counts(trainer) if config.record_trace else None
        if counts is not None:
            self._trace_parts.append((result.iteration, counts))
        if self._writer:
            write_iteration(self._writer, config, result, self._progress, spans, loads, events)

    def saved(self, path: Path) -> None:
        """A checkpoint has been written: the trace is as far now."""
        if self._writer:
            _save_trace(self._trace_file, self._trace_parts, self._config)
            self._writer.log(f"checkpoint {path.name} written")


class Progress:
    """The line a person follows: step, loss, tokens/s, load of the fullest rank over the mean, time left."""

    def __init__(self, config: RunConfig, first_iteration: int):
        self._total, self._first = config.workload.iterations, first_iteration
        self._start = time.monotonic()

    def opening(self, config: RunConfig) -> str:
        """What is about to run, and why its first iteration is slow on a GPU."""
        plan, work = config.plan, config.workload
        text = (
            f"{config.system}: {plan.describe()}, {work.dtype}, {config.num_micro_batches} x {work.micro_batch_size} samples "
            f"a rank and iteration, iterations {self._first + 1} to {self._total}"
        )
        if config.cluster.device == "cuda":
            text += "; the first compiles kernels and opens connections, which may take a minute"
        return text

    def line(self, metric: dict) -> str:
        done = metric["iteration"]
        left_s = (time.monotonic() - self._start) / (done - self._first) * (self._total - done)
        loss = "skipped" if metric["skipped"] else f"loss {metric['lm_loss']:.4f}"
        return (
            f"[{done}/{self._total}] {loss}  {metric['step_ms']:.0f} ms  {metric['tokens_per_s']:,.0f} tokens/s  "
            f"{metric['tflops_per_rank']:,.3g} TFLOP/s a rank  max/mean load {metric['load_max_over_mean']:.2f}  "
            f"{left_s:.0f} s left"
        )


def write_iteration(
    writer: record.RunWriter,
    config: RunConfig,
    result: IterationResult,
    progress: Progress,
    spans: Sequence[dict] = (),
    loads: Sequence[dict] = (),
    events: Sequence[dict] = (),
) -> None:
    """Write one iteration into the run's files, and print its line."""
    work = config.workload
    tokens = work.global_batch_size * config.model.seq_len
    flops = work.global_batch_size * flops_per_sample(config.model) / config.plan.world_size
    metric = {
        "iteration": result.iteration,
        "step_ms": round(result.step_ms, 3),
        "lm_loss": result.lm_loss,
        "balance_loss": result.balance_loss,
        "grad_norm": result.optimizer.grad_norm,
        "loss_scale": result.optimizer.loss_scale,
        "learning_rate": result.optimizer.lr,
        "tokens_per_s": round(tokens / result.step_ms * 1e3, 1),
        "tflops_per_rank": float(f"{flops / result.step_ms / 1e9:.4g}"),
        "load_max_over_mean": round(result.load_max_over_mean, 4),
        "replica_bytes": result.replica_bytes,
        "skipped": result.optimizer.skipped,
        "consumed_samples": result.iteration * work.global_batch_size,
    }
    if result.peak_memory_bytes:
        metric["peak_memory_bytes"] = result.peak_memory_bytes
    writer.metric(metric)
    for span in spans:
        writer.span({"iteration": result.iteration, **span})
    for load in loads:
        writer.load({"iteration": result.iteration, **load})
    for event in events:
        writer.event(event)
    writer.log(record.iteration_line(metric, num_iterations=work.iterations, global_batch_size=work.global_batch_size))
    print(progress.line(metric), flush=True)


def _gather_objects(mine, trainer: Trainer) -> list:
    if trainer.mesh.world_group is None:
        return [mine]
    parts = [None] * trainer.config.plan.world_size if trainer.mesh.world_rank == 0 else None
    dist.gather_object(mine, parts, dst=0)
    return parts or []


def _gather_spans(timer: LayerTimer, trainer: Trainer) -> list[dict]:
    """Layer times of all ranks, on world rank 0. Collective over the world."""
    rank = trainer.mesh.world_rank
    mine = [
        {"rank": rank, "layer": idx, **{part: round(ms, 3) for part, ms in times.items()}}
        for idx, times in sorted(timer.take().items())
    ]
    return [span for part in _gather_objects(mine, trainer) for span in part]


def _gather_loads(in_force: dict[int, tuple], trainer: Trainer) -> list[dict]:
    """Load of experts and ranks in all MoE layers, on world rank 0. in_force: (placement, replicas) that the iteration ran
    with, by layer. Collective over the world."""
    count_RLME = trainer.online.gather_counts()
    mine = [
        load_line(idx, count_RLME[:, place], *in_force[idx], getattr(layer.replication, "copy_cost", None))
        for place, (idx, layer) in enumerate(trainer.layers.items())
        if trainer.mesh.stage_rank == 0
    ]
    return [line for part in _gather_objects(mine, trainer) for line in part]


def _gather_events(events: list[dict], trainer: Trainer) -> list[dict]:
    """Placement events of all pipeline stages, on world rank 0. Collective over the world on the iterations in which
    placement is considered, free on all others."""
    if not is_due(trainer.config.online, trainer.iteration):
        return []
    mine = events if trainer.mesh.stage_rank == 0 else []
    return [event for part in _gather_objects(mine, trainer) for event in part]


def _gather_counts(trainer: Trainer) -> np.ndarray | None:
    """Expert counts [stage ranks, MoE layers, micro-batches, experts] of the iteration, on world rank 0; pipeline stages
    are joined along the layers. Collective over the world."""
    counts = trainer.online.gather_counts()
    mine = (list(trainer.layers), counts) if trainer.mesh.stage_rank == 0 else None
    parts = [part for part in _gather_objects(mine, trainer) if part is not None]
    by_layer = {layer: counts[:, place] for layers, counts in parts for place, layer in enumerate(layers)}
    return np.stack([by_layer[layer] for layer in sorted(by_layer)], axis=1) if by_layer else None


def _earlier_trace(path: Path, last_iteration: int) -> list[tuple[int, np.ndarray]]:
    """What a run that is now resumed after `last_iteration` has recorded up to there."""
    if last_iteration == 0 or not path.exists():
        return []
    trace = ExpertTrace.load(path)
    recorded = zip(trace.iteration.tolist(), trace.counts, strict=True)
    return [(iteration, counts) for iteration, counts in recorded if iteration <= last_iteration]


def _save_trace(path: Path, parts: list[tuple[int, np.ndarray]], config: RunConfig) -> None:
    if not parts:
        return
    if len({counts.shape for _, counts in parts}) > 1:  # resumed under another plan: the ranks are others now
        parts = [(iteration, counts) for iteration, counts in parts if counts.shape == parts[-1][1].shape]
    model = config.model
    first = block_sizes(model, next(layer for layer in range(model.num_layers) if has_experts(model, layer)))
    meta = {
        "model": config.model.name,
        "num_experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "gate": config.gate.kind,
        "capacity": config.gate.capacity,
        "plan": config.plan.describe(),
        "tokens_per_micro_batch_and_rank": config.workload.micro_batch_size * first.seq_len // config.plan.tp,
    }
    ExpertTrace(
        counts=np.stack([counts for _, counts in parts]).astype(np.int32),
        iteration=np.array([iteration for iteration, _ in parts], np.int64),
        meta=meta,
    ).save(path)
