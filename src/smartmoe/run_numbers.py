"""What a run directory says of its run, in numbers, whether it is done, stopped or at work; `smartmoe report` puts it in words.

Layer 6: reads run.json, metrics.jsonl and events.jsonl (formats: logs/README.md), writes nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shlex
import time
from collections import Counter
from pathlib import Path

import numpy as np

from smartmoe import record
from smartmoe.config import ModelConfig, OnlineConfig, ParallelPlan, from_dict

MAX_ENDS = 10  # iterations at the start, and at the end, that one number speaks of: a single one is noise


def read(run_dir: str | Path) -> dict:
    """The numbers of a run (its folder or its run.json), JSON-ready; None is what is not known or was not recorded.

    step_ms: of the iterations behind workload.warmup_iterations, as the figures have it; tokens_per_s and tflops_per_rank
    (model FLOPs, models.flops_per_sample) at its median, of runs that train. loss_first: of the first iteration; loss_last:
    mean of the last `ends`; load_first, load_last: medians of the first and the last `ends`. at_work: whether `smartmoe
    train` holds the folder now; silent_s: since the last iteration was written. go_on: how to, of a run that is not done.
    Raises ValueError where there is no run, and says which are below.
    """
    path = Path(run_dir)
    path = path.parent if path.name == "run.json" else path
    if not (path / "run.json").exists():
        raise ValueError(_no_run(path))
    run, notes = record.read_run(path), []
    facts = _facts(run)
    plan, model, online = (
        _parsed(run, key, cls, notes) for key, cls in (("plan", ParallelPlan), ("model", ModelConfig), ("online", OnlineConfig))
    )
    lines = _lines(path / "metrics.jsonl", notes)
    steps = {int(line["iteration"]): line for line in lines if (_number(line, "step_ms") or 0) > 0}
    if len(steps) < len(lines):
        notes.append(f"metrics.jsonl: {len(lines) - len(steps)} of {len(lines)} repeat an iteration or have no time, left out")
    numbers = {
        "path": str(path),
        **{key: run.get(key) for key in ("run_id", "system", "source", "status", "message", "started", "ended")},
        "entry": facts.get("entry"),
        "model": model and dataclasses.asdict(model),
        "batch": [_whole(run, f"{kind}_batch_size") for kind in ("global", "micro")],
        "capacity": _setting(run, "gate", "capacity"),
        "plan": plan and plan.describe(),
        "ranks": facts.get("num_ranks") or (plan and plan.world_size),
        "device": facts.get("device"),
        "dtype": _setting(run, "workload", "dtype"),
        "iterations": max(steps, default=0),
        "planned": _whole(run, "iterations"),
        "last_checkpoint": last_checkpoint(path),
        "go_on": "" if run["status"] in ("ok", "skipped") else how_to_go_on(path, run),
        "at_work": _is_held(path) if run["status"] == "running" else False,
        "silent_s": round(time.time() - (path / "metrics.jsonl").stat().st_mtime, 1) if lines else None,
        **_of_steps(run, dict(sorted(steps.items())), plan, model, notes),
        "online": _of_events(_lines(path / "events.jsonl", notes), online),
    }
    return numbers | {"notes": notes}


def last_checkpoint(run_dir: Path) -> int | None:
    """The iteration of the newest complete checkpoint; whether it is damaged is for who reads it to find out."""
    names = sorted(path.parent.name for path in run_dir.glob("checkpoints/iter_*/meta.json"))
    return int(names[-1].removeprefix("iter_")) if names else None


def how_to_go_on(run_dir: Path, run: dict) -> str:
    """How to go on with the run of `run_dir`, whose run.json says `run`; "" where that is for another program to say."""
    facts = _facts(run)
    run_set = next((folder for folder in run_dir.absolute().parents if (folder / "asked.json").is_file()), None)
    if run_set:
        return f"its run-set goes on with: {shlex.join(['./RUNME-b.sh', '--resume', str(run_set)])}"
    if facts.get("entry") != "train":
        return "this system writes no checkpoints: start it with another --out" if "command" in facts else ""
    found = last_checkpoint(run_dir)
    if found is None:
        return "it has no checkpoint (workload.checkpoint_interval): with --resume it begins anew"
    unsaid = ["smartmoe", "train", "CONFIG.toml", "--ranks", facts.get("num_ranks", "N")]  # by versions before this one
    words = [*(facts.get("command") or unsaid), "--out", run_dir, "--resume"]
    return f"from checkpoint iter_{found:07d} it goes on with: {shlex.join(map(str, words))}"


def _of_steps(run: dict, steps: dict[int, dict], plan, model, notes: list[str]) -> dict:
    """What the lines of metrics.jsonl, by iteration, say of time, losses, load and memory."""
    load, peak = (
        [value for line in steps.values() if (value := _number(line, key)) is not None]
        for key in ("load_max_over_mean", "peak_memory_bytes")
    )
    if plan and plan.ep > 1 and set(load) == {1.0}:
        load = []  # Megatron-LM's own layer does not count: its host says 1
    updates = {at: line for at, line in steps.items() if "lm_loss" in line and line.get("skipped") is not True}
    losses = [_number(line, "lm_loss") for line in updates.values()]
    if None in losses:
        first = list(updates)[losses.index(None)]
        notes.append(f"{losses.count(None)} losses are no finite numbers, the first is that of iteration {first}")
    ends = min(MAX_ENDS, -(-len(steps) // 2))
    last = losses[-ends:]
    warmup = _whole(run, "warmup_iterations") or 0
    counted = [line["step_ms"] for at, line in steps.items() if at > warmup]
    p10, median, p90 = (round(float(ms), 4) for ms in np.percentile(counted, (10, 50, 90))) if counted else (None,) * 3
    samples, speed = _whole(run, "global_batch_size"), {"tokens_per_s": None, "tflops_per_rank": None}
    trains = any("lm_loss" in line for line in steps.values())
    if trains and counted and samples and model:
        speed["tokens_per_s"] = round(samples * model.seq_len / median * 1e3, 1)
        flops = _flops_per_sample(model)
        if flops and plan:
            speed["tflops_per_rank"] = float(f"{samples * flops / plan.world_size / median / 1e9:.4g}")
    return {
        "warmup": warmup,
        "counted": len(counted),
        "step_ms": {"median": median, "p10": p10, "p90": p90},
        **speed,
        "trains": trains,
        "loss_first": losses[0] if losses else None,
        "loss_last": float(np.mean(last)) if last and None not in last else None,
        "load_first": round(float(np.median(load[:ends])), 4) if load else None,
        "load_last": round(float(np.median(load[-ends:])), 4) if load else None,
        "ends": ends,
        "peak_memory_bytes": int(max(peak)) if peak else None,
        "skipped": sum(line.get("skipped") is True for line in steps.values()),
    }


def _of_events(events: list[dict], online: OnlineConfig | None) -> dict:
    """What was asked of placement, and what its decisions came to."""
    copies = {event.get("layer"): _number(event, "num_copies") or 0 for event in events}
    return {
        **{key: online and getattr(online, key) for key in ("policy", "replicate", "replica_slots")},
        "decisions": len(events),
        "layers": len(copies),
        "kinds": dict(Counter(str(event.get("kind")) for event in events).most_common()),
        "experts_moved": int(sum(_number(event, "num_moved") or 0 for event in events)),
        "move_ms": round(sum(_number(event, "cost_ms") or 0.0 for event in events), 3),
        "copies": int(sum(copies.values())),
        "last": events[-1] if events else None,
        "last_change": next((event for event in reversed(events) if event.get("kind") != "keep"), None),
    }


# -------------------------------------------------------------------------------------------------------------- reading


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: no such folder; smartmoe train --out DIR makes one"
    below = [found.parent for depth in range(1, 6) for found in sorted(path.glob("*/" * depth + "run.json"))]
    hint = f"{len(below)} are below it, for instance {below[0]}" if below else "smartmoe train --out DIR makes one"
    return f"{path}: no run, it has no run.json; {hint}"


def _lines(path: Path, notes: list[str]) -> list[dict]:
    """The lines of a .jsonl file that have an iteration; that there are others goes to `notes`. No file: none."""
    if not path.exists():
        return []
    raw = path.read_text(encoding="utf-8", errors="replace").splitlines()
    good = [line for line in map(_json, raw) if isinstance(line, dict) and (_number(line, "iteration") or 0) >= 1]
    if len(good) < len(raw):
        notes.append(f"{path.name}: {len(raw) - len(good)} of {len(raw)} lines cannot be read, left out (a run at work, or one "
                     "that was killed, leaves half a last line)")  # fmt: skip
    return good


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(line: dict, key: str) -> float | None:
    value = line.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None


def _facts(run: dict) -> dict:
    return run["provenance"] if isinstance(run.get("provenance"), dict) else {}


def _setting(run: dict, *keys: str):
    """A value of the config, or None."""
    value = run["config"]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _whole(run: dict, key: str) -> int | None:
    """A number of the workload, or None: other programs write run.json, too."""
    value = _setting(run, "workload", key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parsed(run: dict, key: str, cls: type, notes: list[str]):
    """A table of the config, or None where it is absent or of another version."""
    try:
        return from_dict(cls, _setting(run, key), f"run.json: config.{key}")
    except ValueError as error:
        notes.append(str(error))
        return None


def _flops_per_sample(model: ModelConfig) -> float | None:
    try:
        from smartmoe.models import flops_per_sample  # and torch with it, which all else here does without
    except ImportError:
        return None
    return flops_per_sample(model)


def _is_held(run_dir: Path) -> bool | None:
    """Whether a process is at work in the folder, by the lock of `smartmoe train`; None where nobody can tell."""
    try:
        with (run_dir / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None
