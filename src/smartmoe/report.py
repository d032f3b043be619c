"""`smartmoe report`: what runs did, or where they are, in plain text: a page of one run, a table of several.

Layer 6: the numbers are those of `run_numbers.read`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime

# what has to be alike before one of several runs is called the fastest: key of its numbers, and what it is called
ALIKE = {
    "model": "model", "batch": "batch", "capacity": "capacity", "dtype": "dtype", "device": "device",
    "ranks": "number of ranks", "source": "source (measured or simulated)",
    "trains": "what a step is (training, or a part of it)",
}  # fmt: skip


def text(runs: Sequence[dict]) -> str:
    """What a person reads of the numbers of one run or several."""
    return _page(runs[0]) if len(runs) == 1 else _table(runs)


def _page(run: dict) -> str:
    rate, peak = run["tflops_per_rank"], run["peak_memory_bytes"]
    rows = [
        ("run", f"{_system(run)}, {run['plan'] or 'plan not said'}, {_count(run['ranks'], 'rank')} on "
                f"{run['device'] or 'a device not said'}, {run['dtype'] or 'dtype not said'}"),
        ("model", _model(run)),
        *(("" if number else "status", words) for number, words in enumerate(_status(run))),
    ]  # fmt: skip
    if run["counted"]:
        rows.append(("step", f"{_step(run)} ms, median (p10 - p90) of {_count(run['counted'], 'iteration')} after "
                             f"{run['warmup']} of warm-up"))  # fmt: skip
    elif run["iterations"]:
        rows.append(("step", f"nothing yet: the first {_count(run['warmup'], 'iteration')} are warm-up"))
    if run["tokens_per_s"]:
        rows.append(("speed", f"{run['tokens_per_s']:,.0f} tokens/s" + (f", {rate:,.3g} TFLOP/s a rank" if rate else "")))
    if run["trains"]:
        rows.append(("loss", f"{_ends(run, 'loss', 4)} (first iteration -> mean of the last {run['ends']})"))
    if run["load_first"]:
        copies = ", before exact copies" if run["online"]["replicate"] == "exact" else ""
        rows.append(("load", f"{_ends(run, 'load', 2)} fullest rank over the mean{copies} (median of the first -> last "
                             f"{run['ends']})"))  # fmt: skip
    if peak:
        rows.append(("memory", f"{peak / 1e9:.1f} GB at most, on the fullest rank"))
    if run["skipped"]:
        rows.append(("skipped", f"{_count(run['skipped'], 'update')}, after an overflow"))
    rows += [("online" if number == 0 else "", words) for number, words in enumerate(_online(run["online"]))]
    rows += [("note", note) for note in run["notes"]]
    return "\n".join([run["path"], *(f"  {name:8s}{words}" for name, words in rows)])


def _table(runs: Sequence[dict]) -> str:
    timed = [run for run in runs if run["counted"]]
    why_not = _why_not_compared(timed)
    fastest = min(timed, key=lambda run: run["step_ms"]["median"]) if len(timed) > 1 and not why_not else None
    folders = [os.path.abspath(run["path"]) for run in runs]
    top = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    names = [os.path.relpath(folder, top) for folder in folders]
    table = {
        "run": [("* " if run is fastest else "  ") + name for run, name in zip(runs, names, strict=True)],
        "system": [_system(run) for run in runs],
        "plan": [run["plan"] or "?" for run in runs],
        "ranks": [str(run["ranks"] or "?") for run in runs],
        "status": [_word(run) for run in runs],
        "iterations": [_progress(run) for run in runs],
        "step ms (p10 - p90)": [_step(run) if run["counted"] else "-" for run in runs],
        "tokens/s": [f"{run['tokens_per_s']:,.0f}" if run["tokens_per_s"] else "-" for run in runs],
        "TFLOP/s a rank": [f"{run['tflops_per_rank']:,.3g}" if run["tflops_per_rank"] else "-" for run in runs],
        "load": [_ends(run, "load", 2) if run["load_first"] else "-" for run in runs],
        "loss": [_ends(run, "loss", 3) if run["trains"] else "-" for run in runs],
        "peak GB": [f"{run['peak_memory_bytes'] / 1e9:.1f}" if run["peak_memory_bytes"] else "-" for run in runs],
    }
    same = {name: cells[0] for name, cells in table.items() if name != "run" and len(set(cells)) == 1}
    columns = [[name, *cells] for name, cells in table.items() if name not in same]
    widths = [max(map(len, cells)) for cells in columns]
    lines = [f"runs in {top}", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True))]
    if said := [f"{name} {cell}" for name, cell in same.items() if cell != "-"]:
        lines.append("the same in all: " + ", ".join(said))
    if fastest:
        lines.append(f"* the fastest, by the median of its steps after warm-up; all on {fastest['device']}")
    elif why_not:
        lines.append(f"Their speeds cannot be compared, so none is marked: {why_not}.")
    for run, name in zip(runs, names, strict=True):
        status = [] if run["status"] == "ok" else ["; ".join(_status(run))]
        lines += [f"{name}: {words}" for words in [*status, *run["notes"]]]
    return "\n".join(lines)


def _why_not_compared(timed: Sequence[dict]) -> str:
    """Why the step times of several runs say nothing of which is faster, "" where they do."""
    odd = [name for key, name in ALIKE.items() if len({json.dumps(run[key]) for run in timed}) > 1]
    if odd or len(timed) < 2:
        return f"they differ in {', '.join(odd)}" if odd else ""
    said = {key: timed[0][key] for key in ALIKE if key != "capacity"}  # None is a capacity, too
    unsaid = [ALIKE[key] for key, value in said.items() if None in (value if isinstance(value, list) else [value])]
    return f"none says its {', '.join(unsaid)}" if unsaid else ""


def _system(run: dict) -> str:
    """The system, and what was done with it where that was not to train."""
    kind = "simulated" if run["source"] == "simulated" else run["entry"] if run["iterations"] and not run["trains"] else None
    return f"{run['system']} ({kind})" if kind else run["system"]


def _model(run: dict) -> str:
    model, (samples, _) = run["model"], run["batch"]
    if model is None:
        return "not said"
    capacity = "no capacity" if run["capacity"] is None else f"capacity {run['capacity']}"
    return (
        f"{model['name']}: {model['num_layers']} layers of width {model['hidden_size']}, {model['num_experts']} experts, "
        f"top-{model['top_k']}, {capacity}; {_count(samples, 'sample')} of {model['seq_len']} tokens an iteration"
    )


def _word(run: dict) -> str:
    """The status as far as it holds: a run that was killed with its launcher could not say so."""
    return "killed?" if run["status"] == "running" and run["at_work"] is False else run["status"]


def _progress(run: dict) -> str:
    done, planned = run["iterations"], run["planned"]
    return f"{done} of {planned}" if planned is not None and done <= planned else str(done)


def _status(run: dict) -> list[str]:
    """Lines: how far the run is, why it ended, and what goes on with it."""
    words, word, took = f"{_word(run)}, {_progress(run)} iterations", _word(run), _seconds(run["started"], run["ended"])
    words += f" in {_duration(took)}" if took else ""
    words += "" if run["last_checkpoint"] is None else f", newest checkpoint {run['last_checkpoint']}"
    if run["status"] == "running" and run["silent_s"] is not None:
        words += f", the last {_duration(run['silent_s'])} ago"
    left = (run["planned"] or 0) - run["iterations"]
    if word == "running" and run["counted"] and left > 0:
        words += f", {_duration(left * run['step_ms']['median'] / 1e3)} left at this pace"
    lost = "no process of this machine holds its folder: if it ran here, it was killed" if word == "killed?" else ""
    return [line for line in (words, run["message"], lost, "" if word == "running" else run["go_on"]) if line]


def _online(online: dict) -> list[str]:
    """Lines about placement: what was asked for, what was decided, the last decision."""
    if online["policy"] is None:
        return []
    asked = online["policy"]
    if online["replicate"] != "never":
        asked += f', copies "{online["replicate"]}" in {_count(online["replica_slots"], "slot")} a rank'
    if not online["decisions"]:
        return [asked + (": experts keep their owners" if online["policy"] == "static" else ": no decision yet")]
    kinds = ", ".join(f"{number} {kind}" for kind, number in online["kinds"].items())
    moved = "no expert moved"
    if online["experts_moved"]:
        moved = f"{_count(online['experts_moved'], 'expert')} moved, which took {online['move_ms']:,.1f} ms"
    if online["replicate"] == "history":
        moved += f"; {online['copies']} copies in force"
    lines = [
        f"{asked}: {_count(online['decisions'], 'decision')} about {_count(online['layers'], 'layer')}: {kinds}",
        moved,
        f"last: {_event(online['last'])}",
    ]
    is_older = online["last_change"] not in (None, online["last"])
    return [*lines, f"last change: {_event(online['last_change'])}"] if is_older else lines


def _event(event: dict) -> str:
    layer = "" if event.get("layer") is None else f", layer {event['layer']}"
    reason = f": {event['reason']}" if event.get("reason") else ""
    return f"{event.get('kind')} (iteration {event['iteration']}{layer}){reason}"


def _step(run: dict) -> str:
    times = (run["step_ms"][key] for key in ("median", "p10", "p90"))
    return "{} ({} - {})".format(*(f"{ms:,.{1 if ms >= 10 else 2}f}" for ms in times))


def _ends(run: dict, key: str, digits: int) -> str:
    """The number at the start and at the end of the run."""
    ends = (run[f"{key}_first"], run[f"{key}_last"])
    return " -> ".join("no number" if value is None else f"{value:.{digits}f}" for value in ends)


def _seconds(start: object, end: object) -> float | None:
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(number: int | None, noun: str) -> str:
    return f"{'?' if number is None else number} {noun}{'' if number == 1 else 's'}"
