"""Do runs on this machine: several in one world of processes where they may share it, worlds side by side on disjoint GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from grid import SHARING, Machine, Run
from runner import Interrupted, Launcher, end_with_parent, last_metric, stop, stopped_at, summary

from smartmoe import record

POLL_S = 0.2
NEXT_START_S = 2.0  # estimate of what a run that is not the first of its world takes before its first iteration
LEAVE_S = 60.0  # how long processes may take to leave after their last run


@dataclass
class World:
    """Runs of one size that one set of processes does one after another; `runs[0]` is in progress once it is started."""

    runs: list[Run]
    num_ranks: int
    child: subprocess.Popen | None = None
    gpus: list[str] = field(default_factory=list)
    log: Path | None = None  # what torchrun itself says, where runs share the world
    since: float = 0.0  # when runs[0] began
    is_first: bool = True  # whether runs[0] is the first of its processes

    @property
    def estimate_s(self) -> float:
        steps_s = sum(run.step_s * run.config.workload.iterations for run in self.runs)
        return (self.runs[0].start_s + NEXT_START_S * (len(self.runs) - 1) + steps_s) if self.runs else 0.0


def into_worlds(runs: list[Run], runs_per_world: int) -> list[World]:
    """`runs` by world, in their order: those of one size whose programs may share a process, largest worlds first where
    worlds are shared at all (small ones fill gaps)."""
    worlds: list[World] = []
    open_worlds: dict[tuple, World] = {}
    for run in runs:
        program = SHARING.get(run.entry)
        kind = (program, run.config.plan.world_size)
        world = open_worlds.get(kind) if program else None
        if world is None or len(world.runs) >= runs_per_world:
            world = World([], run.config.plan.world_size)
            worlds.append(world)
            open_worlds[kind] = world
        world.runs.append(run)
    return worlds if runs_per_world == 1 else sorted(worlds, key=lambda world: -world.num_ranks)


class Worlds:
    """The worlds of a run-set on this machine. gpus: the ids that a world's processes may see, none on a CPU, where one world
    follows the other."""

    def __init__(self, launcher: Launcher, runs: list[Run], machine: Machine, gpus: list[str], num_cores: int):
        self.launcher, self.machine, self.gpus, self.num_cores = launcher, machine, gpus, num_cores
        self.waiting = into_worlds(runs, machine.runs_per_world)
        self.active: list[World] = []
        self.num_runs, self.num_ended, self.num_started = len(runs), 0, 0
        self.bad: list[Run] = []
        self._shown = time.monotonic()
        self._spent_s = self._estimated_s = 0.0  # by the worlds that have ended

    def describe(self) -> str:
        """How many worlds there are, how they share the machine, and how long that may take."""
        if not self.gpus:
            minutes = sum(world.estimate_s for world in self.waiting) / 60
            return f"{self.num_runs} runs, about {max(minutes, 1):.0f} minutes"
        at_once = min(len(self.gpus), max(1, self.num_cores // self.machine.cores_per_rank))
        minutes = sum(world.estimate_s * world.num_ranks for world in self.waiting) / at_once / 60
        return (
            f"{self.num_runs} runs in {len(self.waiting)} worlds, side by side on {len(self.gpus)} GPUs as long as each rank "
            f"has {self.machine.cores_per_rank} of the {self.num_cores} cores, about {minutes:.0f} minutes"
        )

    def do_all(self) -> list[Run]:
        """Do all runs, whatever happens to any one of them; returns those that did not end well. Raises Interrupted after
        stopping all when the user asks to stop."""
        try:
            while self.waiting or self.active:
                self._start_what_fits()
                for world in list(self.active):
                    self._look(world)
                self._progress()
                if self.active:
                    time.sleep(POLL_S)
        except BaseException as error:
            self._stop_all("interrupted" if isinstance(error, Interrupted) else f"the launcher failed: {error!r}")
            raise
        finally:
            _clear_line()
        return self.bad

    # -------------------------------------------------------------------------------------------------- starting

    def _start_what_fits(self) -> None:
        for world in list(self.waiting):
            if not self._has_room(world):
                continue
            left = self._whose_traces_are_there(world)
            if left is None:
                continue
            self.waiting.remove(world)
            if left:
                world.runs = left
                self._start(world)

    def _has_room(self, world: World) -> bool:
        """Whether the world can start now; one that needs more than the machine has starts alone, and says so itself."""
        if not self.active:
            return True
        used = sum(other.num_ranks for other in self.active)
        cores = (used + world.num_ranks) * self.machine.cores_per_rank
        return used + world.num_ranks <= len(self.gpus) and cores <= self.num_cores

    def _whose_traces_are_there(self, world: World) -> list[Run] | None:
        """The runs of `world` that can be done, the others marked as skipped; None while a trace is still to be recorded."""
        here = {run.key for run in world.runs}
        elsewhere = {run.key for other in (*self.waiting, *self.active) if other is not world for run in other.runs}
        if any(run.needs and run.needs.key in elsewhere - here for run in world.runs):
            return None
        lacking = []
        for run in world.runs:
            if run.needs and run.needs.key not in here:
                if record.read_run(self.launcher.root / run.needs.folder)["status"] != "ok":
                    lacking.append(run)
        for run in lacking:
            self._end(run, "skipped", f"needs the trace of {run.needs.folder}, which did not end well", "")
        return [run for run in world.runs if run not in lacking]

    def _start(self, world: World) -> None:
        free = [gpu for gpu in self.gpus if not any(gpu in other.gpus for other in self.active)]
        world.gpus, world.is_first = free[: world.num_ranks], True
        run_dirs = [self.launcher.root / run.folder for run in world.runs]
        resume = any(self.launcher.can_resume(run) for run in world.runs)
        env = self.launcher.env
        if self.gpus:
            env = {**env, "CUDA_VISIBLE_DEVICES": ",".join(world.gpus)}
        self.num_started += 1
        world.log = self.launcher.root.parent / f"world{self.num_started}.log" if len(world.runs) > 1 else None
        self.active.append(world)  # before there are processes: an interruption from now on ends them
        # a log that a killed launcher left here would tell of other ranks
        with world.log.open("wb") if world.log else (run_dirs[0] / "console.log").open("ab") as console:
            world.child = subprocess.Popen(
                self.launcher.command(world.runs, run_dirs, resume), stdin=subprocess.DEVNULL, stdout=console,
                stderr=subprocess.STDOUT, cwd=self.launcher.cwd, env=env, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        record.set_status(run_dirs[0], "running")
        world.since = time.monotonic()

    # -------------------------------------------------------------------------------------------------- watching

    def _look(self, world: World) -> None:
        """Take up what became of the run in progress, and of its world."""
        code = world.child.poll()  # before the files: a world that has ended has written them all
        while world.runs and self._has_finished(world.runs[0]):
            self._next(world, "ok", "")
        elapsed, limit_s = time.monotonic() - world.since, world.runs[0].timeout_s if world.runs else LEAVE_S
        if code is None and elapsed <= limit_s:
            return
        if code is None:
            stop(world.child)
        if world.runs:
            run_dir = self.launcher.root / world.runs[0].folder
            if code is None:
                status, message = "timeout", f"did not end within {limit_s:.0f} s ({stopped_at(run_dir)})"
            else:
                status, message = self._outcome(world, run_dir, code)
            self._next(world, status, message)
        self._leave(world)

    def _outcome(self, world: World, run_dir: Path, code: int) -> tuple[str, str]:
        """How the run in progress ended, with the processes of its world."""
        if world.log and code:  # torchrun says there which rank was killed
            with (run_dir / "console.log").open("a", encoding="utf-8") as console:
                console.write(record.tail(world.log))
        if world.log and not code:
            return "failed", "its world ended without an error before the run did; see console.log"
        return record.outcome(run_dir, code)

    def _has_finished(self, run: Run) -> bool:
        mark = self.launcher.root / run.folder / "finished.json"
        if not mark.exists():
            return False
        mark.unlink()
        return True

    def _next(self, world: World, status: str, message: str) -> None:
        """The run in progress has ended; the next one of its world, if any, is in progress."""
        run, seconds = world.runs.pop(0), time.monotonic() - world.since
        where = f" on GPU {','.join(world.gpus)}" if world.gpus else ""
        if status == "ok":
            start_s = run.start_s if world.is_first else NEXT_START_S
            self._spent_s += seconds
            self._estimated_s += start_s + run.step_s * run.config.workload.iterations
        self._end(run, status, message, f" after {seconds:.0f} s{where}")
        world.is_first, world.since = False, time.monotonic()
        if world.runs and status == "ok":
            record.set_status(self.launcher.root / world.runs[0].folder, "running")

    def _end(self, run: Run, status: str, message: str, where: str) -> None:
        run_dir = self.launcher.root / run.folder
        record.set_status(run_dir, status, message)
        self.num_ended += 1
        self.bad += [run] if status != "ok" else []
        _clear_line()
        words = summary(run_dir, run) if status == "ok" else f": {message}"
        self.launcher.say(f"[{self.num_ended}/{self.num_runs}] {run.folder} {status}{where}{words}")
        sys.stdout.flush()

    def _leave(self, world: World) -> None:
        """The processes of `world` are gone: what they did not come to waits for others."""
        self.active.remove(world)
        if world.log:
            world.log.unlink(missing_ok=True)
        if world.runs:
            for run in world.runs:
                record.set_status(self.launcher.root / run.folder, "pending")
            self.waiting.insert(0, World(world.runs, world.num_ranks))

    def _stop_all(self, message: str) -> None:
        stop(*(world.child for world in self.active if world.child))
        for world in self.active:
            if world.runs:
                record.set_status(self.launcher.root / world.runs[0].folder, "failed", message)
            if world.log:
                world.log.unlink(missing_ok=True)

    def _progress(self) -> None:
        """A line for people, once a second: each run in progress, and the time left."""
        if not sys.stdout.isatty() or time.monotonic() - self._shown < 1:
            return
        self._shown = time.monotonic()
        words = [self._words(world) for world in self.active if world.runs]
        scale = self._spent_s / self._estimated_s if self._estimated_s else 1.0
        left_s = sum(
            world.estimate_s * (world.num_ranks / len(self.gpus) if self.gpus else 1)
            for world in (*self.active, *self.waiting)
            if world.runs
        )
        label = f"[{self.num_ended + 1}/{self.num_runs}]"
        print(f"\r\033[K{label} {'; '.join(words)}  {left_s * scale / 60:.1f} min left", end="", flush=True)

    def _words(self, world: World) -> str:
        run = world.runs[0]
        last = last_metric(self.launcher.root / run.folder)
        load = f"  max/mean load {last['load_max_over_mean']:.2f}" if last.get("load_max_over_mean") else ""
        step = f"  {last['step_ms']:.0f} ms" if last.get("step_ms") else ""
        loss = f"  loss {last['lm_loss']:.3f}" if last.get("lm_loss") else ""
        return f"{run.folder} {last.get('iteration', 0)}/{run.config.workload.iterations}{step}{loss}{load}"


def gpu_ids(num_gpus: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name: what it names now, else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:num_gpus] if named else [str(gpu) for gpu in range(num_gpus)]


def _clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
