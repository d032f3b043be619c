"""The run directory: run.json (facts and status), metrics, spans and events as JSON lines, and the training log.

Layer 0: imports nothing of the project and never imports torch. run.json is replaced as a whole (temporary file, then
rename), so a reader never sees half of it; every JSON line is flushed, so a killed run loses at most its last line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

SCHEMA = 1
STATUSES = ("pending", "running", "ok", "oom", "timeout", "failed", "skipped")
ENDED = ("ok", "oom", "timeout", "failed", "skipped")
SOURCES = ("measured", "simulated")
LINE_FILES = ("metrics", "spans", "events", "loads")
_BAR_KEYS = {"figure", "panel", "group", "series"}


def utc_now() -> str:
    """The time now as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def safe_run_id(*parts: object) -> str:
    """Join `parts` into a name that is safe as one path component: letters, digits and `._+=-`, at most 100 characters.

    When characters had to be replaced or cut, eight digits of a hash of the original keep different inputs apart.
    """
    text = "-".join(str(part) for part in parts)
    name = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text).lstrip(".-")
    if name != text or len(name) > 100 or not name:
        name = f"{name[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip(".-")
    return name


def check_out(path: Path) -> Path:
    """`path`, if a file can be written there; else ValueError, before work is done for it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is a folder" if path.is_dir() else f"{folder} is no folder that can be written to"
        raise ValueError(f"{path}: cannot write this file: {reason}; name another file, or make its folder first")
    return path


# ------------------------------------------------------------------------------------------------------------ run.json


def create_run(
    run_dir: str | Path,
    run_id: str,
    config: dict,
    bars: list[dict],
    *,
    source: str = "measured",
    provenance: dict | None = None,
) -> dict:
    """Make `run_dir` with a run.json of status "pending" and return its contents.

    `config` is the complete RunConfig as a dict; `bars` names the places in figures that the run serves. Raises
    ValueError when a name, the source or a bar does not fit the format.
    """
    if run_id != safe_run_id(run_id):
        raise ValueError(f"run id {run_id!r}: only letters, digits and ._+=- are allowed; use record.safe_run_id")
    if source not in SOURCES:
        raise ValueError(f"run {run_id}: source {source!r} is not one of {', '.join(SOURCES)}")
    for bar in bars:
        if set(bar) != _BAR_KEYS:
            raise ValueError(f"run {run_id}: a bar has exactly the keys {sorted(_BAR_KEYS)}, not {sorted(bar)}")
    run = {
        "schema": SCHEMA,
        "run_id": run_id,
        "status": "pending",
        "message": "",
        "source": source,
        "system": config["system"],
        "bars": bars,
        "config": config,
        "provenance": {"created": utc_now(), **(provenance or {})},
        "started": None,
        "ended": None,
    }
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(run_dir, "run.json"), run)
    return run


def read_run(run_dir: str | Path) -> dict:
    """Read `run_dir`/run.json. Raises ValueError naming the file when it is missing, malformed or of another schema."""
    path = Path(run_dir, "run.json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read this file: {error}") from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f'{path}: not a run of schema {SCHEMA} (no "schema": {SCHEMA} in it)')
    missing = [key for key in ("run_id", "status", "system", "bars", "config") if key not in run]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    if run["status"] not in STATUSES:
        raise ValueError(f"{path}: status {run['status']!r} is not one of {', '.join(STATUSES)}")
    return run


def set_status(run_dir: str | Path, status: str, message: str = "") -> dict:
    """Change the status of a run, stamp `started` or `ended`, and return the new contents of run.json."""
    if status not in STATUSES:
        raise ValueError(f"{run_dir}: status {status!r} is not one of {', '.join(STATUSES)}")
    run = read_run(run_dir)
    run.update(status=status, message=message)
    if status == "running":
        run.update(started=utc_now(), ended=None)
    elif status in ENDED:
        run["ended"] = utc_now()
    else:
        run.update(started=None, ended=None)
    write_json(Path(run_dir, "run.json"), run)
    return run


def write_error(run_dir: str | Path, world_rank: int, error: Exception, is_oom: bool) -> None:
    """Describe the first failure of a run in error.json; later ones are consequences of it and change nothing."""
    path = Path(run_dir, "error.json")
    if path.parent.is_dir() and not path.exists():
        write_json(path, {"type": type(error).__name__, "message": str(error), "rank": world_rank, "oom": is_oom})


def outcome(run_dir: str | Path, code: int) -> tuple[str, str]:
    """The status and message of a run from the exit code of its processes (negative: a signal) and its error.json.

    "oom" only when the exception itself was one of memory: no message and no missing line is taken for it.
    """
    if code == 0:
        return "ok", ""
    error = _read_error(Path(run_dir, "error.json"))
    if error is not None:
        where = f"rank {error['rank']}: " if isinstance(error.get("rank"), int) else ""
        text = " ".join(str(error.get("message", "")).split())[:500]
        return ("oom" if error.get("oom") is True else "failed"), f"{where}{error.get('type', 'error')}: {text}"
    if code < 0:
        return "failed", f"killed by signal {-code} ({_signal_name(-code)})"
    # torchrun survives a killed rank and tells of it in its last lines, the first failure last.
    text = tail(Path(run_dir, "console.log"))
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+) ", text)]
    if codes and codes[-1] < 0:
        return "failed", f"a rank was killed by signal {-codes[-1]} ({_signal_name(-codes[-1])}); see console.log"
    last = next((line.strip() for line in reversed(text.splitlines()) if re.search(r"\w(Error|Exception)\b", line)), "")
    return "failed", f"exit code {code}; see console.log" + (f": {last[:300]}" if last else "")


def _read_error(path: Path) -> dict | None:
    try:
        error = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return error if isinstance(error, dict) else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def tail(path: Path, size: int = 16384) -> str:
    """The last `size` bytes of a text file; nothing when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def write_json(path: str | Path, data: object) -> None:
    """Write `data` as strict JSON so that readers see the old file or the new one, never a part."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(strict(data), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def strict(data):
    """`data` with every NaN and infinity replaced by None: JSON has no such numbers."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [strict(value) for value in data]
    return data


# ---------------------------------------------------------------------------------------------------------- JSON lines


class RunWriter:
    """Writes the lines of one run; one process (world rank 0) has one.

    `keep_through` None starts the run's files anew; a number keeps what earlier attempts wrote up to and including that
    iteration and drops the rest, which the resumed run writes again.
    """

    def __init__(self, run_dir: str | Path, keep_through: int | None = None):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in LINE_FILES:
            self._trim(self.run_dir / f"{name}.jsonl", keep_through)
        if keep_through is None:
            (self.run_dir / "train.log").unlink(missing_ok=True)

    @staticmethod
    def _trim(path: Path, keep_through: int | None) -> None:
        if not path.exists():
            return
        if keep_through is None:
            path.unlink()
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _iteration_of(line) <= keep_through]
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        scratch.replace(path)

    def metric(self, line: dict) -> None:
        """Append one iteration's numbers to metrics.jsonl."""
        self._line("metrics", line)

    def span(self, line: dict) -> None:
        """Append one layer's time to spans.jsonl."""
        self._line("spans", line)

    def event(self, line: dict) -> None:
        """Append one decision about expert placement to events.jsonl."""
        self._line("events", line)

    def load(self, line: dict) -> None:
        """Append one layer's load of experts and ranks to loads.jsonl."""
        self._line("loads", line)

    def log(self, text: str) -> None:
        """Append `text` to train.log."""
        self._write("train.log", text)

    def close(self) -> None:
        """Close the files; a later line opens them again."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _line(self, name: str, line: dict) -> None:
        self._write(f"{name}.jsonl", json.dumps(strict(line), allow_nan=False))

    def _write(self, name: str, text: str) -> None:
        if name not in self._files:
            self._files[name] = (self.run_dir / name).open("a", encoding="utf-8")
        self._files[name].write(text + "\n")
        self._files[name].flush()


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a kill: written again


def iteration_line(metric: dict, *, num_iterations: int, global_batch_size: int) -> str:
    """One iteration in the form of Megatron-LM's log, from a metrics line; skipped ones lack loss and grad norm."""
    fields = [
        f" iteration {metric['iteration']:8d}/{num_iterations:8d}",
        f"consumed samples: {metric['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {metric['step_ms']:.1f}",
        f"learning rate: {metric['learning_rate']:.3E}",
        f"global batch size: {global_batch_size:5d}",
    ]
    skipped = bool(metric.get("skipped"))
    if not skipped:
        fields.append(f"lm loss: {metric['lm_loss']:.6E}")
        if metric.get("balance_loss"):
            fields.append(f"balance loss: {metric['balance_loss']:.6E}")
    fields.append(f"loss scale: {metric['loss_scale']:.1f}")
    if not skipped:
        fields.append(f"grad norm: {metric['grad_norm']:.3f}")
    not_a_number = not skipped and not math.isfinite(metric["lm_loss"])
    fields += [f"number of skipped iterations: {skipped:3d}", f"number of nan iterations: {not_a_number:3d}"]
    return " | ".join(fields) + " |"


# ---------------------------------------------------------------------------------------------------------- provenance


def provenance(**facts: object) -> dict:
    """What a run's numbers depend on beside its config: versions, commit, device, cores; `facts` are added and win."""
    return {
        "created": utc_now(),
        "git": _git_commit(),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "numpy": version_of("numpy"),
        "smartmoe": version_of("smartmoe"),
        "device": cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **facts,
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(package: str) -> str:
    """The installed version of a package, "absent" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git_commit() -> str:
    """The commit of the source tree ("+changes" when tracked files differ), or "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
