"""The published results of the paper as rows: read from the artifact's raw log tree, judged, and made into figures.

The same rows come from the small tables in logs/published (`tables.py`): both give the same figures and findings.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from plotting import rawlogs
from plotting.files import Folder, clean
from plotting.model import LayerPanel, LayerRow, ScatterPanel

FIGURE_PART = re.compile(r"^fig(8|9|10|11|12|13)$")
GPUS_PART = re.compile(r"^(\d{1,5})gpus$")
SYSTEM_PARTS = ("fastmoe", "fastermoe", "deepspeed", "tutel", "alpa", "smartmoe")
ESTIMATE_NAME = re.compile(r"^perf_model_(\d{1,3})nodes_mbs(\d{1,4})\.log$")
REPLAY_NAME = re.compile(r"^freq(\d{1,6})$")
CHANGES_NAME = re.compile(r"^changed_freq(\d{1,6})$")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
NOT_LOGS = {".sh", ".py", ".pdf", ".png", ".md", ".csv", ".toml", ".txt"}
GPUS_PER_NODE = 8  # of the published clusters; figure 11's file names count nodes


@dataclass
class BarRow:
    """One log behind a bar of figures 8-10, with the facts that let a reader judge it."""

    figure: str
    panel: str
    gpus: int
    capacity: str
    series: str
    seconds: float | None  # sum over the iterations, or the epoch (figure 9)
    status: str  # "ok", "incomplete" or "unreadable"
    num_iterations: int
    num_declared: int
    first_s: float | None
    median_s: float | None
    num_skipped: int
    gate_named: str
    gate_run: str
    gpus_named: int | None
    dynamic: bool | None
    micro_batch: int
    top_k: int | None
    moe_every: int | None
    out_of_memory: bool
    model: str
    plan: str
    sha256: str  # first 16 digits
    file: str

    @property
    def group(self) -> str:
        return f"{self.gpus}/{self.capacity}"

    @property
    def plotted_s(self) -> float | None:
        """The artifact's scripts passed six significant digits to its plots."""
        return None if self.seconds is None else float(f"{self.seconds:.6g}")


@dataclass
class ReplayRow:
    """One replay of figure 13: an update every `interval` iterations; sample i is trace iteration 1 + 10 i."""

    interval: int
    static_ms: list[float]
    dynamic_ms: list[float]
    changes: list[int]
    file: str


@dataclass
class Published:
    """All published rows of one place."""

    bars: list[BarRow] = field(default_factory=list)
    scatter: list[ScatterPanel] = field(default_factory=list)
    layers: LayerPanel | None = None
    replays: list[ReplayRow] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.bars or self.scatter or self.layers or self.replays)


def read_raw(folder: Folder) -> Published:
    """Read an artifact log tree (or a part of it); files that are not recognised become findings."""
    rows = Published()
    profiles: dict[Path, list[Path]] = {}
    changes: dict[int, list[int]] = {}
    for path in folder.files():
        figure = _last(_parts(folder, path), FIGURE_PART)
        if path.suffix in NOT_LOGS:
            continue
        if path.suffix == ".profiler":
            profiles.setdefault(path.parent, []).append(path)
        elif figure == "fig12" and path.suffix == ".log":
            continue  # figure 12 reads the profiler directories beside these logs
        elif m := ESTIMATE_NAME.match(path.name):
            _add_scatter(folder, path, int(m[1]) * GPUS_PER_NODE, int(m[2]), rows)
        elif m := REPLAY_NAME.match(path.name):
            _add_replay(folder, path, int(m[1]), rows)
        elif m := CHANGES_NAME.match(path.name):
            log = folder.read(path, ("fig13",))
            changes[int(m[1])] = rawlogs.parse_changes(log, folder) if log else []
        else:
            _add_bar(folder, path, figure, rows)
    for replay in rows.replays:
        if replay.interval not in changes:
            folder.report(
                "missing-file", f"no changed_freq{replay.interval}: no stars for it", replay.file, figures=("fig13",)
            )
        replay.changes = changes.get(replay.interval, [])
    rows.bars = _one_run_per_bar(rows.bars, folder)
    rows.scatter.sort(key=lambda p: [int(n) for n in p.name.split("-")])
    rows.replays.sort(key=lambda r: r.interval)
    rows.layers = _read_layers(folder, profiles)
    return rows


def _parts(folder: Folder, path: Path) -> list[str]:
    """Directory names that may say figure, cluster and system: below the root, and the root's own last four."""
    return [*folder.root.parts[-4:], *path.relative_to(folder.root).parts[:-1]]


def _last(parts: list[str], pattern: re.Pattern) -> str | None:
    return next((p for p in reversed(parts) if pattern.match(p)), None)


# ---------------------------------------------------------------------------------------------------- figures 8, 9, 10


def _add_bar(folder: Folder, path: Path, figure: str | None, rows: Published) -> None:
    parts = _parts(folder, path)
    series = next((p for p in reversed(parts) if p in SYSTEM_PARTS), None)
    facts = rawlogs.parse_name(path.name)
    gpus_part = _last(parts, GPUS_PART)
    if figure not in ("fig8", "fig9", "fig10") or series is None or facts is None:
        folder.report(
            "unrecognised",
            "not a log this loader knows (figure, system and name must be readable); it is left out",
            folder.name(path),
        )
        return
    panel = ""
    if gpus_part and parts.index(gpus_part) > 0 and figure == "fig8":
        before = parts[parts.index(gpus_part) - 1]
        panel = "" if FIGURE_PART.match(before) else before
    log = folder.read(path, (figure,))
    run = rawlogs.parse_training_log(log, folder, (figure,)) if log else rawlogs.TrainingLog()
    gpus = int(GPUS_PART.match(gpus_part)[1]) if gpus_part else run.num_gpus or facts.num_gpus or 0
    seconds, status = _total(run, log is not None, figure)
    times = [run.times_ms[i] / 1000 for i in sorted(run.times_ms)]
    rows.bars.append(
        BarRow(
            figure=figure,
            panel=panel,
            gpus=gpus,
            capacity=facts.capacity,
            series=series,
            seconds=seconds,
            status=status,
            num_iterations=len(times),
            num_declared=run.num_declared,
            first_s=times[0] if times else None,
            median_s=statistics.median(times) if times else None,
            num_skipped=run.num_skipped,
            gate_named=facts.gate,
            gate_run=run.gate or "",
            gpus_named=facts.num_gpus,
            dynamic=run.dynamic if run.dynamic is not None else facts.dynamic,
            micro_batch=facts.micro_batch,
            top_k=run.top_k,
            moe_every=run.moe_every,
            out_of_memory=run.out_of_memory,
            model=clean(facts.model, 60),
            plan=facts.plan,
            sha256=log.sha256[:16] if log else "",
            file=folder.name(path),
        )
    )


def _total(run: rawlogs.TrainingLog, readable: bool, figure: str) -> tuple[float | None, str]:
    """Seconds to plot and the status; a run without its end is incomplete, whatever the reason."""
    if not readable:
        return None, "unreadable"
    if figure == "fig9":
        return (run.epoch_s, "ok") if run.epoch_s else (None, "incomplete")
    if not run.is_complete:
        return None, "incomplete"
    total_ms = 0.0
    for time_ms in run.times_ms.values():
        total_ms += time_ms  # left to right, as awk adds: three totals are ties at the sixth digit
    return total_ms / 1000, "ok"


def _one_run_per_bar(bars: list[BarRow], folder: Folder) -> list[BarRow]:
    """Keep the latest complete log of each bar; say which others were there."""
    by_bar: dict[tuple, list[BarRow]] = {}
    for row in bars:
        by_bar.setdefault((row.figure, row.panel, row.gpus, row.capacity, row.series), []).append(row)
    kept = []
    for candidates in by_bar.values():
        best = max(candidates, key=lambda r: (r.status == "ok", (STAMP.findall(r.file) or [""])[-1], r.file))
        kept.append(best)
        if len(candidates) > 1:
            message = f"{len(candidates)} logs for one bar ({best.group}, {best.series}); drawn: {best.file}"
            folder.report("two-runs", message, *[r.file for r in candidates], figures=(best.figure,))
    return kept


# --------------------------------------------------------------------------------------------------- figures 11, 12, 13


def _add_scatter(folder: Folder, path: Path, gpus: int, micro_batch: int, rows: Published) -> None:
    log = folder.read(path, ("fig11",))
    points = rawlogs.parse_estimates(log, folder) if log else None
    if points:
        naive, real, estimate = points
        rows.scatter.append(
            ScatterPanel(f"{gpus}-{micro_batch}", estimate, real, [naive], "published", [folder.name(path)])
        )


def _add_replay(folder: Folder, path: Path, interval: int, rows: Published) -> None:
    log = folder.read(path, ("fig13",))
    series = rawlogs.parse_replay(log, folder) if log else None
    if series:
        rows.replays.append(ReplayRow(interval, *series, changes=[], file=folder.name(path)))


def _read_layers(folder: Folder, profiles: dict[Path, list[Path]]) -> LayerPanel | None:
    """Figure 12's rows from a static and a dynamic profiler directory: the first data-parallel rank of each stage."""
    sides: dict[bool, dict[int, rawlogs.Profile]] = {}
    files: list[str] = []
    for parent in sorted(profiles):
        facts = rawlogs.parse_name(parent.name)
        if facts is None or facts.dynamic is None:
            folder.report(
                "unrecognised",
                "a profiler directory whose name does not say dynamicON or dynamicOFF",
                folder.name(parent),
                figures=("fig12",),
            )
            continue
        if facts.dynamic in sides:
            folder.report(
                "two-runs",
                "another profiler directory for the same placement; the later name is drawn",
                folder.name(parent),
                figures=("fig12",),
            )
        stages = {p.stage: p for p in map(lambda f: _first_data_rank(folder, f), sorted(profiles[parent])) if p}
        sides[facts.dynamic] = stages
        files.append(folder.name(parent))
    if len(sides) < 2:
        return None
    rows = _layer_rows(sides[False], sides[True], folder, files)
    name = ""
    return LayerPanel(name, rows, "backward", "s", "published", files) if rows else None


def _first_data_rank(folder: Folder, path: Path) -> rawlogs.Profile | None:
    log = folder.read(path, ("fig12",))
    if log is None or not re.search(r'"dp_rank": 0\b', log.lines[0]):
        return None
    return rawlogs.parse_profile(log, folder)


def _layer_rows(static: dict, dynamic: dict, folder: Folder, files: list[str]) -> list[LayerRow]:
    rows = []
    for stage in sorted(static.keys() | dynamic.keys()):
        a, b = static.get(stage), dynamic.get(stage)
        if a is None or b is None or a.iterations != b.iterations or a.total_ms.keys() != b.total_ms.keys():
            message = (
                f"stage {stage}: the two profiles do not hold the same iterations and layers; its layers are left out"
            )
            folder.report("incomplete", message, *files, figures=("fig12",))
            continue
        for k in range(a.num_layers):
            sums = [p.total_ms.get((k, way), 0.0) / 1000 for p in (a, b) for way in ("fwd", "bwd")]
            if min(sums) > 0:
                rows.append(LayerRow(stage * a.num_layers + k, *sums))
            else:
                folder.report("bad-time", f"stage {stage}, layer {k}: no time recorded", *files, figures=("fig12",))
    return rows
