"""Train the run described by RUN_DIR/run.json:  torchrun --nproc-per-node N -m smartmoe.train RUN_DIR [--resume]

Writes metrics.jsonl, events.jsonl, spans.jsonl, trace.npz and train.log into RUN_DIR, and checkpoints under
RUN_DIR/checkpoints. The launcher owns run.json's status; an exception is described in RUN_DIR/error.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import checkpoint, record
from smartmoe.config import ParallelPlan, RunConfig, check, from_dict
from smartmoe.data import TokenDataset
from smartmoe.images import ImageDataset
from smartmoe.load_map import load_line
from smartmoe.mesh import Mesh, shared_mesh
from smartmoe.models import flops_per_sample
from smartmoe.online import is_due
from smartmoe.samples import load_data
from smartmoe.slow_links import slow_links
from smartmoe.swin_sizes import block_sizes, has_experts
from smartmoe.timing import LayerTimer
from smartmoe.trace import ExpertTrace
from smartmoe.trainer import IterationResult, Trainer

INTERRUPTED = 143  # 128 + SIGTERM: what a shell reports of a job that was asked to end
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main(argv: list[str] | None = None, meshes: dict[ParallelPlan, Mesh] | None = None) -> int:
    """meshes: the process groups of earlier runs of this process; the world is there already then, and stays."""
    parser = argparse.ArgumentParser(prog="python -m smartmoe.train", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="directory with run.json, whose config is trained")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in RUN_DIR, if any")
    parser.add_argument(
        "--cache", type=Path, default=None, help="where tokenised text is kept (default: .cache/smartmoe)"
    )
    args = parser.parse_args(argv)
    world_rank = int(os.environ.get("RANK", "0"))
    try:
        return _run(args, meshes)
    except Exception as error:
        fail(args.run_dir, world_rank, error)


def fail(run_dir: Path, world_rank: int, error: Exception) -> NoReturn:
    """Describe `error`, which is being handled, for the launcher and for people, and end this process."""
    record.write_error(run_dir, world_rank, error, _is_out_of_memory(error))
    print(f"rank {world_rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
    # Other ranks may wait in a collective for this one: leave at once, so that the launcher ends them.
    os._exit(1)


def _run(args: argparse.Namespace, meshes: dict[ParallelPlan, Mesh] | None) -> int:
    run = record.read_run(args.run_dir)
    config = check(from_dict(RunConfig, run["config"], f"{args.run_dir}/run.json: config"), str(args.run_dir))
    device = start_world(config)
    extra = {} if args.cache is None else {"cache_dir": args.cache}
    data = load_data(config, **extra)
    with _explained_memory(config, device):
        mesh = shared_mesh(meshes, config.plan, device)
        code = _train_on(args, config, mesh, data)
    if meshes is None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


def _train_on(args: argparse.Namespace, config: RunConfig, mesh: Mesh, data: TokenDataset | ImageDataset) -> int:
    trainer = Trainer(config, mesh, data)
    notes: list[str] = [data.describe()] if isinstance(data, ImageDataset) else []
    found = checkpoint.newest_good(args.run_dir / "checkpoints", notes.append) if args.resume else None
    if found is not None:
        trainer.resume(found)
        notes.append(f"resumed from checkpoint {found.name}")
    with slow_links(config.cluster.slow_links_gbytes_per_s):
        interrupted = train(trainer, args.run_dir, resumed=found is not None, notes=notes)
    trainer.close()
    return INTERRUPTED if interrupted else 0


def start_world(config: RunConfig, alone: bool = False) -> torch.device:
    """Join the world that torchrun started, unless this process has, and return this rank's device. Raises ValueError when GPUs
    or ranks lack. alone: a world of one rank is one, too."""
    if config.cluster.device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"cluster.device is cuda, but local rank {local_rank} finds {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if (config.plan.world_size > 1 or alone) and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"plan {config.plan.describe()} needs {config.plan.world_size} ranks: start it with torchrun"
            )
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return device


def train(trainer: Trainer, run_dir: Path, resumed: bool = False, notes: Sequence[str] = ()) -> bool:
    """Run the remaining iterations, writing the run's files from world rank 0. Returns whether it was asked to stop.

    SIGTERM, or SIGUSR1 (how Slurm says that time is nearly up), lets the iteration in progress finish, saves a checkpoint
    and stops. A checkpoint that cannot be written is said and does not end the run. notes: for the user, printed and
    logged first. Collective.
    """
    config = trainer.config
    is_writer = trainer.mesh.world_rank == 0
    writer = record.RunWriter(run_dir, keep_through=trainer.iteration if resumed else None) if is_writer else None
    timer = LayerTimer(trainer.layers, trainer.mesh.device) if config.record_spans else None
    if timer:
        trainer.graphs.join(timer)
    stop: list[int] = []
    asks = (signal.SIGTERM, signal.SIGUSR1)
    previous = [signal.signal(number, lambda signum, frame: stop.append(signum)) for number in asks]
    checkpoints, interval = run_dir / "checkpoints", config.workload.checkpoint_interval
    trace_parts = _earlier_trace(run_dir / "trace.npz", trainer.iteration) if is_writer and config.record_trace else []
    progress = Progress(config, trainer.iteration)

    def tell(text: str) -> None:
        if writer:
            writer.log(text)
            print(text, flush=True)

    for note in notes:
        tell(note)
    trainer.graphs.tell = tell
    if config.cluster.device == "cuda" and trainer.graphs.reason:
        tell(f"CUDA graph: micro-batches run without, {trainer.graphs.reason}")
    if is_writer:
        print(progress.opening(config), flush=True)
    try:
        while trainer.iteration < config.workload.iterations:
            in_force = {idx: (layer.placement, layer.replicas) for idx, layer in trainer.layers.items()}
            if config.cluster.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result = trainer.run_iteration(stop_requested=bool(stop))
            spans = _gather_spans(timer, trainer) if timer else []
            loads = _gather_loads(in_force, trainer) if config.record_spans else []
            events = _gather_events(result.events, trainer)
            counts = _gather_counts(trainer) if config.record_trace else None
            if counts is not None:
                trace_parts.append((result.iteration, counts))
            if writer:
                write_iteration(writer, config, result, progress, spans, loads, events)
            if result.stop_requested or (interval and result.iteration % interval == 0):
                try:
                    path = trainer.save(checkpoints)
                except OSError as error:
                    good = checkpoint.latest(checkpoints)
                    tell(f"{error}. Training goes on; the newest checkpoint is {good.name if good else 'none yet'}")
                else:
                    if writer:
                        _save_trace(run_dir / "trace.npz", trace_parts, config)
                        writer.log(f"checkpoint {path.name} written")
            if result.stop_requested:
                return True
    finally:
        for number, handler in zip(asks, previous, strict=True):
            signal.signal(number, handler)
        if writer:
            _save_trace(run_dir / "trace.npz", trace_parts, config)
            writer.close()
    return False


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


@contextlib.contextmanager
def _explained_memory(config: RunConfig, device: torch.device):
    """Say, when memory runs out inside, what was being run and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        used = ""
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            used = f" ({peak / 1e9:.1f} GB were taken, the GPU has {total / 1e9:.1f})"
        raise type(error)(f"out of memory{used} with {memory_advice(config)}. {error}") from error


def memory_advice(config: RunConfig) -> str:
    """The run in words, and what of it can be changed so that it takes less memory."""
    plan, work, online = config.plan, config.workload, config.online
    ways = []
    if work.micro_batch_size > 1:
        ways.append(f"lower workload.micro_batch_size ({work.micro_batch_size})")
    if not plan.recompute:
        ways.append("set plan.recompute = true")
    if not work.zero and plan.stage_size > 1:
        ways.append("set workload.zero = 1")
    if plan.expert_dp > 1:
        ways.append(f"raise plan.ep ({plan.ep})")
    if online.replica_slots:
        ways.append(f"lower online.replica_slots ({online.replica_slots})")
    if config.model.swin is None:
        ways.append("spread the layers over more ranks (plan.pp)")
    return (
        f"plan {plan.describe()} and micro-batches of {work.micro_batch_size} x {config.model.seq_len} tokens; to need less: "
        f"{', '.join(ways)}; `smartmoe plan` lists what fits"
    )


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
