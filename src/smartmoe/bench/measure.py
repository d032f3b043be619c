"""What the benchmarks share: the world, timing with events, memory, and failures that stay one row.

Ranks exchange results and failures through the key-value store of the process group, never by a collective: a rank
whose case failed can say so to ranks that wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.train import own_device

MIN_ITERATIONS = 5
FIRST_LEAD, LAST_LEAD = 1 << 20, 1 << 26  # cycles that a GPU idles: from half a millisecond to about 35
PATIENCE_S = 60.0  # how long a rank waits for the others' word about a case before it takes them for stuck


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often to measure: `iterations`, or fewer (5 at least) where they would take more than `seconds`."""

    warmup: int = 5
    iterations: int = 30
    seconds: float = 2.0


class World:
    """This process among the ranks. `group` is None for one rank."""

    def __init__(self, device: torch.device):
        self.device = device
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.ep_rank = dist.get_rank() if dist.is_initialized() else 0
        self.group = dist.group.WORLD if self.num_ranks > 1 else None
        self._num_words = 0
        self._store = None
        if self.group is not None:
            self._store = dist.PrefixStore("bench", dist.distributed_c10d._get_default_store())

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_) -> None:
        """Leave the world, with all ranks."""
        if self.group is not None:
            self.share("leaving")
            dist.destroy_process_group()

    def share(self, word) -> list:
        """Give every rank's JSON-ready `word` to all, by rank. Raises LeftAloneError when one does not come."""
        if self._store is None:
            return [word]
        self._num_words += 1
        keys = [f"{self._num_words}/{rank}" for rank in range(self.num_ranks)]
        self._store.set(keys[self.ep_rank], json.dumps(word))
        try:
            self._store.wait(keys, timedelta(seconds=PATIENCE_S))
        except RuntimeError as error:
            raise LeftAloneError(f"another rank is stuck ({type(error).__name__})") from None
        return [json.loads(self._store.get(key)) for key in keys]

    def largest(self, value: float) -> float:
        """The largest value of all ranks, by a collective."""
        if self.group is None:
            return value
        worst = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()

    def align(self) -> None:
        """Let the ranks' next device work start together. On a GPU the host does not wait."""
        if self.device.type == "cuda" and self.group is not None:
            dist.all_reduce(torch.zeros(1, device=self.device))
        elif self.group is not None:
            dist.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class LeftAloneError(RuntimeError):
    """The ranks no longer agree on where they are; nothing further can be measured in these processes."""


def start_world(device: str) -> World:
    """Join the world that torchrun started, or be alone. `device` "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; take --device cpu")
    where = own_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://"))
        # processes that torchrun started anew find the store as the ones before them left it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, device_id = ("nccl", where) if where.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    world = World(where)
    if world.group is not None:  # NCCL makes its connections, and takes their memory, at the first exchange
        scratch = torch.zeros(world.num_ranks << 18, device=where)
        dist.all_to_all_single(torch.empty_like(scratch), scratch)
        world.align()
    return world


def run_in_world(args: argparse.Namespace, run: Callable) -> int:
    """Call run(args, world) in the world of `args.device`. Returns the exit code: 2 when there is no such world."""
    try:
        world = start_world(args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with world:
        run(args, world)
    return 0


@contextlib.contextmanager
def describe_failure(run_dir: Path):
    """What fails inside is described in RUN_DIR/error.json and ends this process at once: other ranks may wait in a
    collective for it."""
    world_rank = int(os.environ.get("RANK", "0"))
    try:
        yield
    except Exception as error:
        record.write_error(run_dir, world_rank, error, isinstance(error, (torch.OutOfMemoryError, MemoryError)))
        print(f"rank {world_rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


# -------------------------------------------------------------------------------------------------------------- timing


def time_steps(
    world: World, step: Callable, timing: Timing, reset: Callable = lambda: None, lead_cycles: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of this rank, [iterations, parts]: parts are what `step(mark)` divides by its calls of mark().

    On a GPU the times lie between device events; before each step the ranks are aligned on the device, not through
    the host, so that a host that is ahead stays ahead, as in training: launches that it could make early cost
    nothing. `lead_cycles`: cycles that the GPU idles before each step (see `lead_for`). `reset` runs after each step,
    untimed. Second result, [iterations] bool: whether the step began before the host had launched all of it. Collective.
    """
    for _ in range(max(timing.warmup - 1, 0)):
        _one_step(world, step, reset, lead_cycles)
    world.synchronize()
    start = time.perf_counter()
    _one_step(world, step, reset, lead_cycles)
    world.synchronize()
    took_s = world.largest(time.perf_counter() - start)
    num = int(np.clip(timing.seconds / max(took_s, 1e-9), min(MIN_ITERATIONS, timing.iterations), timing.iterations))
    steps = [_one_step(world, step, reset, lead_cycles) for _ in range(num)]
    world.synchronize()
    times = [[between(a, b) for a, b in zip(marks[:-1], marks[1:], strict=True)] for marks, _ in steps]
    return np.array(times), np.array([is_late for _, is_late in steps])


def lead_for(world: World, step: Callable, reset: Callable = lambda: None) -> int:
    """Cycles that a GPU must idle before each step so that the host has launched all of it when it begins: then no time
    of the host is in it. 0 where no idling is enough, because the step itself waits for the host, and on a CPU.

    `step` must have run before. Collective.
    """
    cycles = FIRST_LEAD if world.device.type == "cuda" else LAST_LEAD + 1
    while cycles <= LAST_LEAD:
        is_late = False
        for _ in range(3):
            world.synchronize()
            is_late |= _one_step(world, step, reset, cycles)[1]
        if not world.largest(float(is_late)):
            return 2 * cycles
        cycles *= 2
    return 0


def _one_step(world, step, reset, lead_cycles) -> tuple[list, bool]:
    if lead_cycles and world.device.type == "cuda":
        torch.cuda._sleep(lead_cycles)
    world.align()
    times = [now(world)]
    step(lambda: times.append(now(world)))
    times.append(now(world))
    is_late = world.device.type == "cuda" and times[0].query()
    reset()
    return times, is_late


def capture(call: Callable):
    """`call`, which must have run before, in a CUDA graph: the graph, and where its replays leave the result."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph, result


def now(world):
    """The time at this place of the device's stream, or of the host's clock on a CPU; between() takes two."""
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Milliseconds; on a GPU the device must have come past `end`."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def slowest(times_W: list) -> np.ndarray:
    """[iterations, parts + 1] of the slowest rank in each iteration and part; the last column is the whole step."""
    parts_WIP = np.array(times_W)
    return np.concatenate([parts_WIP, parts_WIP.sum(2, keepdims=True)], axis=2).max(0)


def spread(values) -> dict:
    """Median and 10th and 90th percentile, in the unit of `values`."""
    p10, median, p90 = np.percentile(np.asarray(values, dtype=float), (10, 50, 90)).tolist()
    return {"median": round(median, 5), "p10": round(p10, 5), "p90": round(p90, 5)}


class MemoryMeter:
    """Device memory that is taken from now on, in bytes. Zeros on a CPU."""

    def __init__(self, world: World):
        self.is_cuda = world.device.type == "cuda"
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.outside = self._outside()
        self.start_peak()

    def start_peak(self) -> None:
        """Count the peak from here and above what is allocated now (weights and inputs); what is taken beside torch's
        allocator still counts from the beginning, because it is taken at the first use."""
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()

    @staticmethod
    def _outside() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def read(self) -> dict:
        """The peak of torch's allocator, and what was taken beside it (symmetric memory, NCCL, code)."""
        if not self.is_cuda:
            return {"peak_bytes": 0, "outside_bytes": 0}
        peak = torch.cuda.max_memory_allocated() - self.base
        return {"peak_bytes": peak, "outside_bytes": max(0, self._outside() - self.outside)}


# ------------------------------------------------------------------------------------------------------------ failures


def attempt(world: World, case: Callable[[], dict]) -> tuple[str, str, list[dict]]:
    """Run one case on all ranks: (status "ok" | "oom" | "skipped" | "failed", reason, every rank's result).

    A ValueError means that the case does not exist here: "skipped". Raises LeftAloneError when some ranks failed and others
    cannot come back from it, or a GPU no longer answers. Collective.
    """
    word = {"status": "ok", "reason": "", "result": None}
    try:
        word["result"] = case()
        world.synchronize()
    except torch.OutOfMemoryError as error:
        word |= {"status": "oom", "reason": _one_line(error)}
    except ValueError as error:
        word |= {"status": "skipped", "reason": _one_line(error)}
    except LeftAloneError:
        raise
    except Exception as error:  # whatever a peer raises is its row's reason, and the others go on
        word |= {"status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}
    if word["status"] != "ok" and not _device_answers(world):
        raise LeftAloneError(f"rank {world.ep_rank}: {word['reason'] or word['status']}")
    try:
        words = world.share(word)
    except LeftAloneError as error:
        raise LeftAloneError(f"rank {world.ep_rank}: {word['reason'] or error}") from None
    gc.collect()
    bad = [(rank, w) for rank, w in enumerate(words) if w["status"] != "ok"]
    if bad:
        rank, first = bad[0]
        return first["status"], f"rank {rank}: {first['reason']}", []
    return "ok", "", [w["result"] for w in words]


def _device_answers(world: World) -> bool:
    if world.device.type != "cuda":
        return True
    try:
        event = torch.cuda.Event()
        event.record()
        deadline = time.monotonic() + 10
        while not event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        torch.cuda.empty_cache()
        return True
    except RuntimeError:
        return False


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300]
