"""Do runs one after another: start each in processes of its own, watch it, and write down how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from grid import ENTRIES, Run

from smartmoe import hosts, record
from smartmoe.config import ClusterSpec, RunConfig, from_dict, to_dict

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 40.0  # torchrun itself waits 30 s for its workers before it kills them
POLL_S = 0.2
OUTPUTS = (
    "error.json",
    "metrics.jsonl",
    "spans.jsonl",
    "events.jsonl",
    "loads.jsonl",
    "train.log",
    "console.log",
    "job.log",
    "trace.npz",
    "profile.json",
    "predictions.jsonl",
    "accuracy.json",
    "checkpoints",
)
_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec should load nothing


class Interrupted(Exception):
    """The user asked to stop (Ctrl-C or SIGTERM)."""


def run_environment(device: str) -> dict:
    """The environment of the processes of a run on `device`, "cpu" or "cuda"."""
    python_path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        own["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU where there is one
    return {**os.environ, **own}


def device_name(cluster: ClusterSpec) -> str:
    """What the ranks of this machine compute on."""
    if cluster.device == "cpu":
        return record.cpu_name()
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return "CUDA GPU"


def torchrun_command(run: Run, run_dir: Path, resume: bool) -> list[str]:
    """The command that does `run`: torchrun with one process per rank of its plan."""
    ranks = str(run.config.plan.world_size)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [*command, "-m", ENTRIES[run.entry], str(run_dir), *(["--resume"] if resume else [])]


@dataclass
class Launcher:
    """Where runs go and how they are started."""

    root: Path  # the run-set
    provenance: dict
    env: dict
    cwd: Path
    command: Callable[[Run, Path, bool], list[str]] = torchrun_command
    say: Callable[[str], None] = print
    estimate_scale: list[float] = field(default_factory=list)  # actual / estimated seconds of the runs done

    def needs_running(self, run: Run) -> bool:
        """Whether `run` is absent, unfinished, failed, or done with another config. A "running" one was left by a
        killed launcher: the lock on the run-set says that no other launcher is at work."""
        old = self.existing(run)
        return old is None or old["status"] != "ok"

    def keep(self, run: Run) -> None:
        """Let a run that is done already serve the bars asked for now, too."""
        old, bars = record.read_run(self.root / run.folder), self._bars(run)
        if old["bars"] != bars:
            record.write_json(self.root / run.folder / "run.json", {**old, "bars": bars})

    def _bars(self, run: Run) -> list[dict]:
        """The bars asked for now, and those of other figures that the run was declared for before."""
        old, now = self.existing(run), {bar["figure"] for bar in run.bars}
        return [bar for bar in (old["bars"] if old else []) if bar["figure"] not in now] + run.bars

    def declare(self, run: Run) -> None:
        """Write run.json as pending, and set aside what an earlier attempt left, unless that can be resumed."""
        run_dir = self.root / run.folder
        names = ("error.json",) if self.can_resume(run) else OUTPUTS
        left = [run_dir / name for name in names if (run_dir / name).exists()]
        if left:
            aside = run_dir / f"attempt{len(list(run_dir.glob('attempt*'))) + 1}"
            aside.mkdir()
            for path in left:
                path.rename(aside / path.name)
        facts = {**self.provenance, "num_ranks": run.config.plan.world_size, "entry": run.entry, "repeat": run.repeat}
        if host := hosts.HOSTS.get(run.entry):
            facts[host.package] = record.version_of(host.package)
        record.create_run(run_dir, run.run_id, to_dict(run.config), self._bars(run), provenance=facts)

    def set_aside(self, run: Run, reason: str) -> None:
        """Declare a run that cannot be done here as skipped, unless it was done before."""
        if self.needs_running(run):
            self.declare(run)
            record.set_status(self.root / run.folder, "skipped", reason)
        else:
            self.keep(run)

    def do(self, run: Run, label: str, left_s: float) -> str:
        """Do one run and return its status. Raises Interrupted after stopping it when the user asks to stop."""
        run_dir = self.root / run.folder
        if run.needs and record.read_run(self.root / run.needs.folder)["status"] != "ok":
            message = f"needs the trace of {run.needs.folder}, which did not end well"
            record.set_status(run_dir, "skipped", message)
            self.say(f"{label} skipped: {message}")
            return "skipped"
        resume = self.can_resume(run)
        record.set_status(run_dir, "running")
        start = time.monotonic()
        try:
            status, message = self._watch(run, run_dir, resume, label, left_s)
        except Interrupted:
            record.set_status(run_dir, "failed", "interrupted")
            raise
        record.set_status(run_dir, status, message)
        seconds = time.monotonic() - start
        if status == "ok":
            self.estimate_scale.append(seconds / run.estimate_s)
        self.say(
            f"{label} {status} after {seconds:.0f} s{summary(run_dir, run) if status == 'ok' else ': ' + message}"
        )
        return status

    def scale(self) -> float:
        """How much longer than estimated the runs so far took (1 before the first ends)."""
        return sum(self.estimate_scale) / len(self.estimate_scale) if self.estimate_scale else 1.0

    def can_resume(self, run: Run) -> bool:
        """Whether an earlier attempt at this very run left a complete checkpoint."""
        saved = (self.root / run.folder).glob("checkpoints/iter_*/meta.json")
        return run.entry == "train" and next(saved, None) is not None and self.existing(run) is not None

    def existing(self, run: Run) -> dict | None:
        """What run.json says when it describes this very run, else None."""
        try:
            old = record.read_run(self.root / run.folder)
            same = from_dict(RunConfig, old["config"]) == run.config
            facts = old.get("provenance", {})
            return old if same and (facts.get("entry"), facts.get("repeat", 1)) == (run.entry, run.repeat) else None
        except ValueError:
            return None

    def _watch(self, run: Run, run_dir: Path, resume: bool, label: str, left_s: float) -> tuple[str, str]:
        start, shown = time.monotonic(), 0.0
        with (run_dir / "console.log").open("ab") as console:
            child = subprocess.Popen(
                self.command(run, run_dir, resume), stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                cwd=self.cwd, env=self.env, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            while child.poll() is None:
                elapsed = time.monotonic() - start
                if elapsed > run.timeout_s:
                    stop(child)
                    return "timeout", f"did not end within {run.timeout_s:.0f} s ({stopped_at(run_dir)})"
                if elapsed - shown > 1:
                    shown = elapsed
                    self._progress(run, run_dir, label, elapsed, left_s)
                time.sleep(POLL_S)
        except BaseException:
            stop(child)
            raise
        finally:
            _clear_line()
        return record.outcome(run_dir, child.returncode)

    def _progress(self, run: Run, run_dir: Path, label: str, elapsed: float, left_s: float) -> None:
        if not sys.stdout.isatty():
            return
        last = last_metric(run_dir)
        done, total = int(last.get("iteration", 0)), run.config.workload.iterations
        here = run.estimate_s * self.scale()
        if done:
            here = max(here, elapsed * total / done)
        minutes = (max(0.0, here - elapsed) + left_s * self.scale()) / 60
        load = f"  max/mean load {last['load_max_over_mean']:.2f}" if last.get("load_max_over_mean") else ""
        step = f"  {last['step_ms']:.0f} ms" if last.get("step_ms") else ""
        loss = f"  loss {last['lm_loss']:.3f}" if last.get("lm_loss") else ""
        print(f"\r\033[K{label} {done}/{total}{step}{loss}{load}  {minutes:.1f} min left", end="", flush=True)


def last_metric(run_dir: Path) -> dict:
    """The newest line of metrics.jsonl, empty when there is none."""
    for line in reversed(record.tail(run_dir / "metrics.jsonl").splitlines()):
        with contextlib.suppress(ValueError):
            metric = json.loads(line)
            if isinstance(metric, dict):
                return metric
    return {}


def stopped_at(run_dir: Path) -> str:
    """Words for how far a run came."""
    iteration = last_metric(run_dir).get("iteration")
    return f"iteration {iteration} was the last" if iteration else "no iteration was done"


def summary(run_dir: Path, run: Run) -> str:
    """Words for how fast a run was."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        times = [json.loads(line)["step_ms"] for line in lines][run.config.workload.warmup_iterations :]
        return f", median {sorted(times)[len(times) // 2]:.1f} ms a step"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ", but its metrics.jsonl is missing or malformed"


def _clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


# --------------------------------------------------------------------------------------------------------- processes


def end_with_parent() -> None:
    """In the child before exec: ask Linux for a SIGTERM when the launcher dies, even by kill -9."""
    with contextlib.suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGTERM)


def stop(child: subprocess.Popen) -> None:
    """End `child` and the processes it started: SIGTERM, and SIGKILL to what is left after GRACE_S."""
    family = descendants(child.pid)  # torchrun's workers have sessions of their own: a signal to its group misses them
    if child.poll() is None:
        child.terminate()
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and (child.poll() is None or any(_alive(*one) for one in family)):
        time.sleep(0.05)
    if child.poll() is None:
        child.kill()
    for pid, started in family:
        if _alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    child.wait()


def descendants(pid: int) -> list[tuple[int, str]]:
    """The processes below `pid` as (pid, start time); the start time tells one from a later one of the same pid."""
    below: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        facts = _stat(path)
        if facts:
            below.setdefault(int(facts[1]), []).append((int(path.parent.name), facts[19]))
    found, unvisited = [], [pid]
    while unvisited:
        children = below.get(unvisited.pop(), [])
        found += children
        unvisited += [child for child, _ in children]
    return found


def _alive(pid: int, started: str) -> bool:
    facts = _stat(Path(f"/proc/{pid}/stat"))
    return bool(facts) and facts[19] == started and facts[0] != "Z"


def _stat(path: Path) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (state) on; the second, the name, may hold anything."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return None
