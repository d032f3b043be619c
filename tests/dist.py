"""Run a function in a real torch.distributed world of processes on this machine (gloo on CPU, NCCL on GPUs)."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# On one GPU: collectives of small tensors over gloo, symmetric memory between processes of the same device.
SHARED_GPU = "cpu:gloo,cuda:gloo"
MAX_SHARING = 2
PRELOAD = ["numpy", "torch", "torch.distributed.pipelining", "torch.distributed.checkpoint", "torch.utils.checkpoint"]
PRELOAD_ON_GPUS = ["triton", "torch.distributed._symmetric_memory", "smartmoe.trainer", "smartmoe.bench.layer"]


def spawn(fn, world_size: int, *args, backend: str = "gloo", timeout_s: float = 300.0, fresh: bool = False):
    """Call `fn(world_rank, *args)` in `world_size` processes and return their results by rank.

    `fn` must be importable (a module-level function); its result is carried through `torch.save`. The first failing
    rank's traceback is raised here as AssertionError. fresh: processes that have imported nothing before, and this one's
    environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Ranks are forked from a clean server that has imported torch once, and asked nothing of CUDA: a world on CPUs starts
        # in half a second.
        context = mp.get_context("spawn" if fresh else "forkserver")
        multiprocessing.set_forkserver_preload(PRELOAD + (PRELOAD_ON_GPUS if torch.cuda.is_available() else []))
        procs = [
            context.Process(target=_entry, args=(fn, rank, world_size, backend, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for proc in procs:
            proc.start()
        for proc in procs:
            proc.join(timeout_s)
        hung = [rank for rank, proc in enumerate(procs) if proc.is_alive()]
        for proc in procs:
            if proc.is_alive():
                proc.kill()
                proc.join()
        errors = sorted(Path(folder).glob("error*"), key=lambda path: path.stat().st_mtime)
        assert not errors, errors[0].read_text()
        assert not hung, f"ranks {hung} did not finish within {timeout_s} s"
        codes = [proc.exitcode for proc in procs]
        assert not any(codes), f"exit codes by rank: {codes}"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world_size)]


def gpu_backend(num_ranks: int, may_share: bool = False) -> str:
    """The backend for `spawn` with `num_ranks` ranks on GPUs; skips the test where there are too few.

    may_share: for code that needs of NCCL nothing but small all-reduces. Where there is one GPU, MAX_SHARING ranks then
    share it, with a warning: the results count, times do not, as ranks that wait for each other wait for time slices.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus >= num_ranks:
        return "nccl"
    if not (may_share and num_gpus == 1 and num_ranks <= MAX_SHARING):
        pytest.skip(f"needs {num_ranks} CUDA devices")
    warnings.warn(f"{num_ranks} ranks share one GPU", stacklevel=2)
    return SHARED_GPU


def gpu_of(rank: int) -> torch.device:
    """The GPU of a rank in the worlds of `spawn`."""
    return torch.device("cuda", rank % torch.cuda.device_count())


def start_training(run_dir: Path, world_size: int, cache: Path, *args: str) -> subprocess.Popen:
    """Start the training entry under torchrun, as a user would; its output is in `communicate()[0]`."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return subprocess.Popen(
        [*command, "-m", "smartmoe.train", str(run_dir), "--cache", str(cache), *args],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
    )


def worker_pids(process: subprocess.Popen) -> list[int]:
    """The ranks that a torchrun started here has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _entry(fn, rank, world_size, backend, folder, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if backend == SHARED_GPU:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if backend != "gloo":
        torch.cuda.set_device(gpu_of(rank))
    try:
        # meeting in a file, ranks cannot take a port that another test run has just found free
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = fn(rank, *args)
        torch.save(result, Path(folder, f"result{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        raise
