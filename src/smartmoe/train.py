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
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from smartmoe import checkpoint, record
from smartmoe.config import ParallelPlan, RunConfig, check, from_dict
from smartmoe.data import TokenDataset
from smartmoe.images import ImageDataset
from smartmoe.mesh import Mesh, shared_mesh
from smartmoe.run_log import RunLog
from smartmoe.samples import load_data
from smartmoe.slow_links import slow_links
from smartmoe.trainer import Trainer

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
    record.write_error(run_dir, world_rank, error, _out_of_memory(error) is not None)
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


def own_device(kind: str) -> torch.device:
    """This rank's device, "cuda" or "cpu", as the one that is used from now on. Raises ValueError when it has no GPU."""
    if kind != "cuda":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()} here")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start_world(config: RunConfig, alone: bool = False) -> torch.device:
    """Join the world that torchrun started, unless this process has, and return this rank's device. Raises ValueError when GPUs
    or ranks lack. alone: a world of one rank is one, too."""
    device = own_device(config.cluster.device)
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
    config, is_cuda = trainer.config, trainer.config.cluster.device == "cuda"
    checkpoints, interval = run_dir / "checkpoints", config.workload.checkpoint_interval
    with RunLog(trainer, run_dir, resumed) as log, _requests_to_stop() as requests:
        for note in notes:
            log.tell(note)
        trainer.graphs.tell = log.tell
        if is_cuda and trainer.graphs.reason:
            log.tell(f"CUDA graph: micro-batches run without, {trainer.graphs.reason}")
        log.opening()
        while trainer.iteration < config.workload.iterations:
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            log.begin()
            result = trainer.run_iteration(stop_requested=bool(requests))
            log.follow(result)
            if result.stop_requested or (interval and result.iteration % interval == 0):
                _save(trainer, checkpoints, log)
            if result.stop_requested:
                return True
    return False


@contextlib.contextmanager
def _requests_to_stop() -> Iterator[list[int]]:
    """The signals by which this process has been asked to stop, as they come."""
    requests: list[int] = []
    asks = (signal.SIGTERM, signal.SIGUSR1)
    previous = [signal.signal(number, lambda signum, frame: requests.append(signum)) for number in asks]
    try:
        yield requests
    finally:
        for number, handler in zip(asks, previous, strict=True):
            signal.signal(number, handler)


def _save(trainer: Trainer, checkpoints: Path, log: RunLog) -> None:
    try:
        path = trainer.save(checkpoints)
    except OSError as error:
        good = checkpoint.latest(checkpoints)
        log.tell(f"{error}. Training goes on; the newest checkpoint is {good.name if good else 'none yet'}")
    else:
        log.saved(path)


@contextlib.contextmanager
def _explained_memory(config: RunConfig, device: torch.device):
    """Say, when memory runs out inside, what was being run and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause = _out_of_memory(error)
        if cause is None:
            raise
        used = ""
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            used = f" ({peak / 1e9:.1f} GB were taken, the GPU has {total / 1e9:.1f})"
        raise type(cause)(f"out of memory{used} with {memory_advice(config)}. {cause}") from error


def memory_advice(config: RunConfig) -> str:
    """The run in words, and what of it can be changed so that it takes less memory."""
    plan, work, online = config.plan, config.workload, config.online
    ways = []
    if work.micro_batch_size > 1:
        ways.append(f"lower workload.micro_batch_size ({work.micro_batch_size})")
    if not plan.recompute:
        ways.append("set plan.recompute = true")
    if work.zero < 3 and plan.stage_size > 1:
        ways.append(f"raise workload.zero ({work.zero})")
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


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """What says that memory ran out: the error, or what caused it, since torch's pipelines wrap what a stage raises."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return error
        error = error.__cause__
    return None


if __name__ == "__main__":
    sys.exit(main())
