"""Reading run directories of this project: run.json, metrics.jsonl, spans.jsonl, events.jsonl, predictions.jsonl.

Only the contents of run.json say what a run is; directory names are never trusted. Formats: logs/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from plotting.files import Folder, clean, number, positive, whole
from plotting.model import EXTRAS, FIGURES, STATUSES

SOURCES = ("measured", "simulated")
CHANGE_KINDS = ("migrate", "replicate", "both", "rollback")


@dataclass(frozen=True)
class Slot:
    """The place of a run in a figure."""

    figure: str
    panel: str
    group: str
    series: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.figure, self.panel, self.group, self.series)))


@dataclass
class Run:
    """A run directory: what run.json says, and readers for its other files."""

    path: Path
    where: str  # run.json as shown to readers
    run_id: str
    status: str
    message: str
    source: str
    system: str
    slots: list[Slot]
    config: dict
    provenance: dict
    stamp: str
    folder: Folder = field(repr=False)

    def setting(self, *keys: str):
        """A value inside the config, or None."""
        value = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def repeat(self) -> int:
        """Which of several runs of one thing with different seeds this is, from 1."""
        return whole(self.provenance.get("repeat")) or 1

    @property
    def warmup(self) -> int:
        """Leading iterations that medians leave out."""
        return max(whole(self.setting("workload", "warmup_iterations")) or 0, 0)

    @property
    def figures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.figure for slot in self.slots))

    def file(self, name: str) -> Path:
        return self.path / name


def find_run_files(folder: Folder) -> list[Path]:
    return [path for path in folder.files() if path.name == "run.json"]


def read_runs(folder: Folder) -> list[Run]:
    """Every run below the folder whose run.json is well formed; the others are findings."""
    runs = (read_run(folder, path) for path in find_run_files(folder))
    return [run for run in runs if run is not None]


def read_run(folder: Folder, path: Path) -> Run | None:
    data, where = folder.read_json(path), folder.name(path)
    if data is None:
        folder.report("lost-run", "this run is in no figure: its run.json cannot be read", where)
        return None
    if data.get("schema") != 1:
        folder.report(
            "malformed",
            f"run.json has schema {clean(data.get('schema'), 40)!r}, expected 1; the run is left out",
            where,
        )
        return None
    status, source, message = data.get("status"), data.get("source"), clean(data.get("message") or "", 300)
    if status not in STATUSES:
        folder.report("malformed", f"unknown status {clean(status, 40)!r}; the run counts as failed", where)
        status, message = "failed", f"unknown status {clean(status, 40)!r}"
    if source not in SOURCES:
        folder.report(
            "malformed",
            f"source {clean(source, 40)!r} is neither measured nor simulated; the run counts as failed",
            where,
        )
        status, message, source = "failed", "run.json does not say whether this was measured or simulated", "measured"
    system = clean(data.get("system") or "?", 60)
    slots = _slots(folder, data.get("bars"), where)
    config, provenance = (data.get(k) if isinstance(data.get(k), dict) else {} for k in ("config", "provenance"))
    if system == "deepspeed" and provenance.get("entry") == "train":  # what it was called before the package itself could run
        system = "padded"
        slots = [replace(slot, series="padded") if slot.series == "deepspeed" else slot for slot in slots]
    if not config:
        folder.report("malformed", "run.json has no config: warm-up and settings are unknown", where)
    stamp = next(
        (t for t in (data.get("ended"), data.get("started"), provenance.get("created")) if isinstance(t, str)), ""
    )
    run_id = clean(data.get("run_id") or path.parent.name, 100)
    return Run(path.parent, where, run_id, status, message, source, system, slots, config, provenance, stamp, folder)


def _slots(folder: Folder, bars: object, where: str) -> list[Slot]:
    slots = []
    for entry in bars if isinstance(bars, list) else []:
        texts = (
            [entry.get(k, "") for k in ("figure", "panel", "group", "series")] if isinstance(entry, dict) else [None]
        )
        if all(isinstance(t, str) for t in texts) and texts[0] in (*FIGURES, *EXTRAS) and texts[3]:
            slots.append(Slot(*(clean(t, 60) for t in texts)))
        else:
            folder.report(
                "malformed", f"a bar that names no known figure and series: {clean(entry, 120)}; it is left out", where
            )
    if not slots:
        folder.report("no-bars", "this run names no bar: it is in no figure", where)
    return slots


@dataclass
class Metrics:
    """Step times in ms and losses by iteration, in order, and what else metrics.jsonl tells."""

    times_ms: dict[int, float]
    num_skipped: int
    final_loss: float | None
    losses: dict[int, float]  # by iteration, finite ones of steps that were not skipped
    sha256: str
    where: str


def read_metrics(run: Run, numbered: bool = True) -> Metrics | None:
    """metrics.jsonl of a run; lines without a usable iteration and time become findings, gaps too when `numbered`.

    `numbered` says that iterations count 1, 2, 3 ...; figure 13's replays step through a trace instead.
    """
    path, folder = run.file("metrics.jsonl"), run.folder
    where = folder.name(path)
    if not path.exists():
        folder.report(
            "missing-file", f"the run is {run.status}, but it has no metrics.jsonl", where, figures=run.figures
        )
        return None
    log = folder.read(path, run.figures)
    times: dict[int, float] = {}
    losses: dict[int, float | None] = {}
    num_skipped = 0
    for line_number, row in folder.parse_json_lines(log) if log else []:
        place = f"{where}:{line_number}"
        iteration, step_ms = whole(row.get("iteration")), positive(row.get("step_ms"))
        if iteration is None or iteration < 1:
            folder.report(
                "malformed", "a line without an iteration from 1 on; it is left out", place, figures=run.figures
            )
            continue
        if step_ms is None:
            seen = clean(row.get("step_ms"), 30)
            message = f"iteration {iteration}: step_ms {seen} is not a positive number; it is left out"
            folder.report("bad-time", message, place, figures=run.figures)
            continue
        if iteration in times:
            folder.report(
                "repeated-iteration",
                f"iteration {iteration} is there twice; the later one counts",
                place,
                figures=run.figures,
            )
        elif numbered and times and iteration > max(times) + 1:
            folder.report(
                "gap",
                f"iterations {max(times) + 1} to {iteration - 1} are missing before this line",
                place,
                figures=run.figures,
            )
        times[iteration] = step_ms
        num_skipped += row.get("skipped") is True
        if "lm_loss" in row and row.get("skipped") is not True:
            losses[iteration] = number(row["lm_loss"])
            if losses[iteration] is None:
                folder.report(
                    "bad-loss", f"iteration {iteration}: the loss is not a finite number", place, figures=run.figures
                )
    if not times:
        folder.report("no-data", "not one usable line", where, figures=run.figures)
        return None
    last = [losses[i] for i in sorted(losses)[-10:]]
    final = sum(last) / len(last) if last and None not in last else None
    finite = {i: losses[i] for i in sorted(losses) if losses[i] is not None}
    return Metrics({i: times[i] for i in sorted(times)}, num_skipped, final, finite, log.sha256, where)


@dataclass
class Spans:
    """Forward and backward ms of the MoE layers: layer -> iteration -> [(forward, backward) of each rank]."""

    layers: dict[int, dict[int, list[tuple[float, float]]]]
    where: str


def read_spans(run: Run) -> Spans | None:
    """spans.jsonl without the warm-up iterations."""
    path, folder = run.file("spans.jsonl"), run.folder
    where = folder.name(path)
    if not path.exists():
        folder.report("missing-file", "the run has no spans.jsonl (spans were not recorded)", where, figures=("fig12",))
        return None
    seen: dict[tuple[int, int, int], tuple[float, float]] = {}
    for line_number, row in folder.read_json_lines(path):
        key = tuple(whole(row.get(k)) for k in ("layer", "iteration", "rank"))
        times = tuple(number(row.get(k)) for k in ("forward_ms", "backward_ms"))
        if None in key or None in times or min(times) < 0 or sum(times) <= 0:
            folder.report(
                "bad-time",
                "a span without layer, iteration, rank and times; it is left out",
                f"{where}:{line_number}",
                figures=("fig12",),
            )
        elif key[1] > run.warmup:
            seen[key] = times
    layers: dict[int, dict[int, list[tuple[float, float]]]] = {}
    for (layer, iteration, _), times in sorted(seen.items()):
        layers.setdefault(layer, {}).setdefault(iteration, []).append(times)
    if not layers:
        folder.report("no-data", "no usable span after the warm-up", where, figures=("fig12",))
    return Spans(layers, where) if layers else None


def read_events(run: Run) -> list[tuple[int, str, int | None]]:
    """(iteration, kind, layer or None) of the events that changed a placement, from events.jsonl (absent: none)."""
    path, folder = run.file("events.jsonl"), run.folder
    found = []
    for line_number, row in folder.read_json_lines(path) if path.exists() and path.stat().st_size else []:
        iteration = whole(row.get("iteration"))
        if iteration is None or not isinstance(row.get("kind"), str):
            folder.report(
                "malformed",
                "an event without an iteration and a kind; it is left out",
                f"{folder.name(path)}:{line_number}",
                figures=run.figures,
            )
        elif row["kind"] in CHANGE_KINDS:
            found.append((iteration, row["kind"], whole(row.get("layer"))))
    return found


def read_move_costs(run: Run) -> dict[tuple[int, int], float]:
    """(layer, iteration) -> ms that moving experts took after that iteration, from events.jsonl (absent: none moved)."""
    path, costs = run.file("events.jsonl"), {}
    for _, row in run.folder.read_json_lines(path) if path.exists() and path.stat().st_size else []:
        key, cost_ms = (whole(row.get("layer")), whole(row.get("iteration"))), positive(row.get("cost_ms"))
        if None not in key and cost_ms is not None:
            costs[key] = costs.get(key, 0.0) + cost_ms
    return costs


@dataclass
class Predictions:
    """Points of figure 11, ms."""

    predicted: list[float]
    measured: list[float]
    naive: list[float]
    where: str


def read_predictions(run: Run) -> Predictions | None:
    """predictions.jsonl: one layer in one iteration of the trace is one point."""
    path, folder = run.file("predictions.jsonl"), run.folder
    where = folder.name(path)
    if not path.exists():
        folder.report(
            "missing-file",
            "the run has no predictions.jsonl (predicted and measured times of its layers)",
            where,
            figures=("fig11",),
        )
        return None
    points = []
    for line_number, row in folder.read_json_lines(path):
        point = tuple(positive(row.get(k)) for k in ("predicted_ms", "measured_ms", "naive_ms"))
        if None in point[:2] or ("naive_ms" in row and point[2] is None):
            folder.report(
                "bad-time",
                "a point without positive times; it is left out",
                f"{where}:{line_number}",
                figures=("fig11",),
            )
        else:
            points.append(point)
    if not points:
        folder.report("no-data", "not one usable point", where, figures=("fig11",))
        return None
    naive = [p[2] for p in points] if all(p[2] is not None for p in points) else []
    return Predictions([p[0] for p in points], [p[1] for p in points], naive, where)
