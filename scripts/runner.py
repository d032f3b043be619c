"""What a run leaves behind, how its processes are started and ended: for runs on this machine and as jobs."""

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
from dataclasses import dataclass
from pathlib import Path

from grid import ENTRIES, Run

from smartmoe import hosts, record
from smartmoe.config import ClusterSpec, RunConfig, from_dict, to_dict

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 40.0  # torchrun itself waits 30 s for its workers before it kills them
OUTPUTS = (
    "error.json",
    "finished.json",
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


def torchrun_command(runs: list[Run], run_dirs: list[Path], resume: bool) -> list[str]:
    """The command that does `runs`, all of one size: torchrun with one process per rank of their plans."""
    module = ENTRIES[runs[0].entry] if len(runs) == 1 else "smartmoe.sequence"
    ranks = str(runs[0].config.plan.world_size)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", module]
    return [*command, *map(str, run_dirs), *(["--resume"] if resume else [])]


@dataclass
class Launcher:
    """Where runs go and how they are started."""

    root: Path  # the run-set
    provenance: dict
    env: dict
    cwd: Path
    command: Callable[[list[Run], list[Path], bool], list[str]] = torchrun_command
    say: Callable[[str], None] = print

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
        names = ("error.json", "finished.json") if self.can_resume(run) else OUTPUTS
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


# --------------------------------------------------------------------------------------------------------- processes


def end_with_parent() -> None:
    """In the child before exec: ask Linux for a SIGTERM when the launcher dies, even by kill -9."""
    with contextlib.suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGTERM)


def stop(*children: subprocess.Popen) -> None:
    """End `children` and the processes they started: SIGTERM, and SIGKILL to what is left after GRACE_S."""
    # torchrun's workers have sessions of their own: a signal to its group misses them
    family = [one for child in children for one in descendants(child.pid)]
    for child in children:
        if child.poll() is None:
            child.terminate()
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and (
        any(child.poll() is None for child in children) or any(_alive(*one) for one in family)
    ):
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
    for pid, started in family:
        if _alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for child in children:
        child.wait()
    end = time.monotonic() + GRACE_S  # one that lets go of a GPU takes a while to be gone, and the next run wants that GPU
    while time.monotonic() < end and any(_alive(*one) for one in family):
        time.sleep(0.01)


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
