"""A measured run-set as figures: runs to bars, panels and curves, with the findings that concern comparisons."""

from __future__ import annotations

import re

import numpy as np

from plotting import stats
from plotting.files import Folder, clean
from plotting.loads import read_loads
from plotting.model import (
    EXTRAS,
    FIGURES,
    REFERENCES,
    Bar,
    BarFigure,
    Curve,
    CurvePanel,
    Dataset,
    Finding,
    LayerPanel,
    LayerRow,
    LoadMap,
    LossCurve,
    LossPanel,
    PanelFigure,
    ScatterPanel,
    StatusMark,
)
from plotting.runs import (
    Metrics,
    Run,
    Slot,
    Spans,
    read_events,
    read_metrics,
    read_move_costs,
    read_predictions,
    read_runs,
    read_spans,
)
from plotting.stats import by_group, finish_bars

# figure 12: what stands beside the static run
LAYER_SERIES = {"dynamic": "experts moved", "history": "experts copied", "both": "moved and copied"}
LOSS_REFERENCES = ("megatron", "deepspeed", "fastmoe")  # what losses are compared with, the first that there is
WAITS = {
    "fig8": "end-to-end runs (fastmoe, deepspeed, fastermoe, smartmoe) whose run.json names a fig8 bar",
    "fig9": "Swin-MoE runs (tutel, fastmoe, smartmoe) whose run.json names a fig9 bar",
    "fig10": "runs of fastmoe, alpa and smartmoe_static whose run.json names a fig10 bar",
    "fig11": "a run (entry layer_accuracy) with predictions.jsonl whose run.json names fig11",
    "fig12": "runs static and dynamic with spans.jsonl whose run.json names fig12",
    "fig13": "trace replays static, every_100 and every_10 whose run.json names fig13",
}


def to_dataset(folder: Folder, name: str) -> Dataset:
    """Read every run below the folder and arrange what its run.json files ask for."""
    findings = folder.findings
    runs = read_runs(folder)
    chosen = _runs_per_slot(runs, folder)
    data = Dataset(name, _title(folder, runs), "measured", findings=findings)
    cache: dict[str, Metrics | None] = {}
    for figure in (*FIGURES, *EXTRAS):
        mine = {slot: repeats for slot, repeats in chosen.items() if slot.figure == figure}
        if not mine:
            continue
        if figure in REFERENCES:
            data.figures[figure] = _bar_figure(figure, mine, cache, findings)
        else:
            draw = {"fig11": _scatter_figure, "fig12": _layer_figure, "fig13": _curve_figure, "losses": _loss_figure}[figure]
            data.figures[figure] = draw({slot: repeats[0] for slot, repeats in mine.items()})
        data.sources[figure] = _title(folder, [run for repeats in mine.values() for run in repeats])
    data.waits = {figure: text for figure, text in WAITS.items() if not _has_values(data.figures.get(figure))}
    return data


def _has_values(figure: BarFigure | PanelFigure | None) -> bool:
    if isinstance(figure, BarFigure):
        return any(bar.value is not None for bar in figure.bars())
    return bool(figure and figure.panels)


def _title(folder: Folder, runs: list[Run]) -> str:
    devices = sorted({clean(run.provenance.get("device"), 60) for run in runs if run.provenance.get("device")})
    sources = "/".join(sorted({run.source for run in runs})) or "measured"
    return f"run-set {folder.label}, {sources}" + (f" on {', '.join(devices[:4])}" if devices else "")


def _runs_per_slot(runs: list[Run], folder: Folder) -> dict[Slot, list[Run]]:
    """The repeats of each place, one run each, in their order."""
    by_slot: dict[Slot, dict[int, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.repeat):
        for slot in dict.fromkeys(run.slots):
            by_slot.setdefault(slot, {}).setdefault(run.repeat, []).append(run)
    return {slot: [_latest(slot, runs, folder) for runs in repeats.values()] for slot, repeats in by_slot.items()}


def _latest(slot: Slot, candidates: list[Run], folder: Folder) -> Run:
    best = max(candidates, key=lambda r: (r.status == "ok", r.stamp, r.run_id))
    if len(candidates) > 1:
        rule = "the latest ok run" if best.status == "ok" else "the latest run"
        message = f"{len(candidates)} runs for one place ({slot}); drawn: {rule}, {best.run_id}"
        folder.report("two-runs", message, *[r.where for r in candidates], figures=(slot.figure,))
    return best


# ----------------------------------------------------------------------------------------------------- figures 8, 9, 10


def _bar_figure(figure: str, runs: dict[Slot, list[Run]], cache: dict, findings: list[Finding]) -> BarFigure:
    bars = {slot: _bar(slot, repeats, cache, findings) for slot, repeats in runs.items()}
    for slot, repeats in runs.items():
        for run in repeats:
            _check_slot(slot, run, bars[slot], findings)
    groups: dict[tuple, list[Slot]] = {}
    for slot in runs:
        groups.setdefault((slot.panel, slot.group), []).append(slot)
    for members in groups.values():
        _check_group(members, runs, bars, cache, findings)
    return finish_bars(BarFigure(figure, by_group(list(bars.values()))))


def _bar(slot: Slot, repeats: list[Run], cache: dict, findings: list[Finding]) -> Bar:
    """One run: the median of its steps, p10 and p90. Several: the median of their medians, and the fastest and slowest."""
    bars = [_run_bar(slot, run, cache) for run in repeats]
    good = [bar for bar in bars if bar.value is not None]
    if len(bars) == 1 or not good:
        return bars[0]
    if len(good) < len(bars):
        message = f"{slot}: {len(bars) - len(good)} of {len(bars)} repeats gave no time; the others are drawn"
        findings.append(Finding("lost-repeat", message, [b.file for b in bars if b.value is None], (slot.figure,)))
    values = [bar.value for bar in good]
    bar = min(good, key=lambda one: abs(one.value - float(np.median(values))))
    bar.low, bar.value, bar.high = min(values), float(np.median(values)), max(values)
    bar.num_samples, bar.num_runs = sum(one.num_samples for one in good), len(good)
    listed = ", ".join(f"{value:.4g}" for value in values)
    bar.detail = f"median of {len(good)} runs with medians of {listed} ms, of which one: {bar.detail}"
    return bar


def _run_bar(slot: Slot, run: Run, cache: dict) -> Bar:
    bar = Bar(
        slot.figure,
        slot.panel,
        slot.group,
        slot.series,
        None,
        "ms",
        run.status,
        run.source,
        run.where,
        detail=run.message,
    )
    if run.status != "ok":
        return bar
    if run.where not in cache:
        cache[run.where] = read_metrics(run)
        _check_length(run, cache[run.where])
    metrics = cache[run.where]
    counted = [t for i, t in metrics.times_ms.items() if i > run.warmup] if metrics else []
    if not counted:
        bar.status, bar.detail = "no data", "no usable step time after the warm-up"
        return bar
    bar.low, bar.value, bar.high = (float(v) for v in np.percentile(counted, (10, 50, 90)))
    bar.num_samples, bar.file = len(counted), metrics.where
    parts = [f"median of {len(counted)} steps after {run.warmup} of warm-up"]
    if metrics.final_loss is not None:
        parts.append(f"final loss {metrics.final_loss:.4g}")
    if metrics.num_skipped:
        parts.append(f"{metrics.num_skipped} steps skipped their update")
    bar.detail = "; ".join(parts)
    return bar


def _check_length(run: Run, metrics: Metrics | None) -> None:
    declared = run.setting("workload", "iterations")
    if metrics and isinstance(declared, int) and len(metrics.times_ms) < declared:
        message = f"status ok, but only {len(metrics.times_ms)} of {declared} iterations have a time"
        run.folder.report("short-run", message, metrics.where, figures=run.figures)
    if metrics and metrics.num_skipped:
        message = f"{metrics.num_skipped} iterations skipped their update after an overflow; their time counts"
        run.folder.report("skipped-iterations", message, metrics.where, figures=run.figures)


def _note(findings: list[Finding], code: str, message: str, runs: list[Run], bars: list[Bar], figure: str) -> None:
    findings.append(Finding(code, message, sorted({r.where for r in runs}), (figure,)))
    for bar in bars:
        bar.notes.append(code)


def _check_slot(slot: Slot, run: Run, bar: Bar, findings: list[Finding]) -> None:
    """The group's label against the config, and the system's name against its settings."""
    label = re.fullmatch(r"(\d{1,9})/(\+?inf|[0-9.]+)", slot.group)
    if label and isinstance(run.config.get("gate"), dict):
        capacity = run.setting("gate", "capacity")
        ran = (
            "+inf"
            if capacity is None
            else f"{capacity:g}"
            if isinstance(capacity, int | float)
            else clean(capacity, 20)
        )
        named = "+inf" if "inf" in label[2] else label[2]
        if ran != named and ran != named.removesuffix(".0"):
            _note(
                findings,
                "gate-mismatch",
                f"{slot}: labelled capacity {named}, but the config ran {ran}",
                [run],
                [bar],
                slot.figure,
            )
    ranks = run.provenance.get("num_ranks")
    if label and isinstance(ranks, int) and ranks != int(label[1]):
        _note(
            findings,
            "name-gpus",
            f"{slot}: labelled {label[1]} ranks, but the run had {ranks}",
            [run],
            [bar],
            slot.figure,
        )
    if slot.series == "smartmoe" and slot.figure != "fig10" and run.setting("online", "policy") == "static":
        _note(
            findings,
            "dynamic-off",
            f"{slot}: online placement was off: the bar shows the plan alone",
            [run],
            [bar],
            slot.figure,
        )


def _setting(run: Run | None, *path: str) -> object:
    return run.setting(*path) if run else None


def _batches(run: Run | None) -> str:
    return str([_setting(run, "workload", f"{kind}_batch_size") for kind in ("global", "micro")])


# code of the finding, what has to be alike in the bars of a group, how a run (None: one that says nothing) has it
_ALIKE = (
    ("mixed-devices", "devices", lambda run: clean(run.provenance.get("device") if run else None, 60)),
    ("other-model", "models", lambda run: clean(_setting(run, "model"), 2000)),
    ("other-batch", "batch sizes", _batches),
    ("mixed-sources", "sources (measured and simulated)", lambda run: run.source if run else None),
)


def _check_group(
    members: list[Slot], runs: dict[Slot, list[Run]], bars: dict[Slot, Bar], cache: dict, findings: list[Finding]
) -> None:
    """Comparisons inside a group must be between different runs of the same work on the same device."""
    figure = members[0].figure
    place = " ".join(filter(None, (figure, members[0].panel, members[0].group)))
    good = [s for s in members if bars[s].value is not None]
    digests: dict[str, list[tuple[Slot, Run]]] = {}
    for slot in good:
        for run in runs[slot]:
            if metrics := cache.get(run.where):
                digests.setdefault(metrics.sha256, []).append((slot, run))
    for same in digests.values():
        if len(same) > 1:
            names = " and ".join(sorted(slot.series for slot, _ in same))
            message = f"{place}: byte-identical step times under {names}: one run, shown as two"
            shown = [bars[slot] for slot in dict.fromkeys(slot for slot, _ in same)]
            _note(findings, "identical-logs", message, [run for _, run in same], shown, figure)
    reference = next((s for s in members if s.series == REFERENCES[figure]), None)
    for code, what, value_of in _ALIKE:
        values = {slot: {value_of(run) for run in runs[slot]} for slot in good}
        usual = values[reference] if reference in values else max(values.values(), key=[*values.values()].count, default=set())
        odd = [slot for slot in good if values[slot] != usual or len(values[slot]) > 1]
        if odd:
            than = REFERENCES[figure] if reference in values else "the others"
            message = f"{place}: {', '.join(slot.series for slot in odd)} ran with other {what} than {than}"
            silent = [slot.series for slot in odd if values[slot] == {value_of(None)}]
            message += f"; {', '.join(silent)} does not say with which" if silent else ""
            _note(findings, code, message, [run for s in odd for run in runs[s]], [bars[s] for s in odd], figure)
    if reference is None or bars[reference].value is None:
        why = "was not run" if reference is None else f"is {bars[reference].status}"
        message = (
            f"{place}: the reference {REFERENCES[figure]} {why}: no speed-up in this group, absolute times instead"
        )
        _note(findings, "no-reference", message, [run for s in members for run in runs[s]], [], figure)


# --------------------------------------------------------------------------------------------------- figures 11, 12, 13


def _panel_name(slot: Slot) -> str:
    return " ".join(filter(None, (slot.panel, slot.group)))


def _mark(slot: Slot, run: Run) -> StatusMark:
    status = "no data" if run.status == "ok" else run.status
    return StatusMark(_panel_name(slot), slot.series, status, run.message, run.where, run.source)


def _scatter_figure(runs: dict[Slot, Run]) -> PanelFigure:
    figure = PanelFigure("fig11", [])
    for slot, run in sorted(runs.items(), key=lambda item: stats.group_key(item[0].group)):
        points = read_predictions(run) if run.status == "ok" else None
        if points is None:
            figure.marks.append(_mark(slot, run))
            continue
        panel = ScatterPanel(
            _panel_name(slot), points.predicted, points.measured, points.naive, run.source, [points.where]
        )
        panel.stats = stats.scatter(panel)
        figure.panels.append(panel)
    return figure


def _layer_figure(runs: dict[Slot, Run]) -> PanelFigure:
    """One panel for each series beside "static", which it is compared with."""
    figure = PanelFigure("fig12", [])
    sides: dict[str, dict[str, Run]] = {}
    for slot, run in runs.items():
        sides.setdefault(_panel_name(slot), {})[slot.series] = run
        if run.status != "ok":
            figure.marks.append(_mark(slot, run))
    for name, by_series in sorted(sides.items()):
        spans = {series: read_spans(run) for series, run in by_series.items() if run.status == "ok"}
        figure.marks += [
            _mark(slot, run) for slot, run in runs.items() if _panel_name(slot) == name and slot.series in spans
            and spans[slot.series] is None
        ]  # fmt: skip
        maps = {series: read_loads(by_series[series], series, ("fig12",)) for series, found in spans.items() if found}
        others = sorted(series for series, found in spans.items() if found and series != "static")
        if not spans.get("static") or not others:
            run = next(iter(by_series.values()))
            lacking = "static" if not spans.get("static") else "dynamic"
            message = f"figure 12 {name}: needs both placements; no data of {lacking}"
            run.folder.report("incomplete", message, run.where, figures=("fig12",))
            continue
        num_before = len(figure.panels)
        for series in others:
            title = name if len(others) == 1 else f"{name}, {LAYER_SERIES.get(series, series)}"
            panel = _layer_panel(title, (by_series["static"], spans["static"]), (by_series[series], spans[series]))
            if panel.rows:
                figure.panels.append(panel)
        if len(figure.panels) > num_before:
            figure.panels[-1].maps = _busiest_layer([maps["static"], *(maps[series] for series in others)])
    return figure


def _layer_panel(name: str, static: tuple[Run, Spans], other: tuple[Run, Spans]) -> LayerPanel:
    (run, before), (other_run, after) = static, other
    if before.layers.keys() != after.layers.keys():
        message = f"figure 12 {name}: the runs hold different layers; common ones are drawn"
        run.folder.report("incomplete", message, before.where, after.where, figures=("fig12",))
    layers = sorted(before.layers.keys() & after.layers.keys())
    costs = read_move_costs(other_run)
    rows = [_layer_row(k, before.layers[k], _with_moves(after.layers[k], k, costs)) for k in layers]
    source = run.source if run.source == other_run.source else "simulated"
    steps = [_mean_step_ms(each) for each in (run, other_run)]
    step_speedup = steps[0] / steps[1] if None not in steps else None
    return LayerPanel(name, rows, "total", "ms", source, [before.where, after.where], step_speedup=step_speedup)


def _with_moves(by_iteration: dict, layer: int, costs: dict[tuple[int, int], float]) -> dict:
    """The times of a layer with what moving its experts took, in the forward pass of the iteration that it followed: there
    the paper's runs paid for it."""
    return {
        iteration: [(forward + costs.get((layer, iteration), 0.0), backward) for forward, backward in ranks]
        for iteration, ranks in by_iteration.items()
    }


def _mean_step_ms(run: Run) -> float | None:
    """Mean ms of an iteration after warm-up: the iterations that pay for migration count."""
    metrics = read_metrics(run)
    times = list(metrics.times_ms.values())[run.warmup :] if metrics else []
    return sum(times) / len(times) if times else None


def _busiest_layer(sides: list[list[LoadMap]]) -> list[LoadMap]:
    """The maps of the layer whose ranks were loaded most unevenly in the first run that has maps."""
    first = next((maps for maps in sides if maps), [])
    if not first:
        return []
    layer = max(first, key=lambda load_map: load_map.max_over_mean().mean()).layer
    return [load_map for maps in sides for load_map in maps if load_map.layer == layer]


def _layer_row(layer: int, static: dict, dynamic: dict) -> LayerRow:
    """Means over iterations and ranks: a mean, not a median, so that the iterations that pay for migration count."""
    means = [
        float(np.mean([t[way] for ranks in side.values() for t in ranks]))
        for side in (static, dynamic)
        for way in (0, 1)
    ]
    row = LayerRow(layer, *means)
    common = sorted(static.keys() & dynamic.keys())
    if len(common) >= 3:
        ratios = [np.mean([sum(t) for t in static[i]]) / np.mean([sum(t) for t in dynamic[i]]) for i in common]
        row.speedup_low, row.speedup_high = (float(v) for v in np.percentile(ratios, (10, 90)))
    return row


def _curve_figure(runs: dict[Slot, Run]) -> PanelFigure:
    figure = PanelFigure("fig13", [])
    panels: dict[str, CurvePanel] = {}
    for slot, run in sorted(
        runs.items(), key=lambda item: (item[0].panel, item[0].group, _curve_order(item[0].series))
    ):
        metrics = read_metrics(run, numbered=False) if run.status == "ok" else None
        if metrics is None:
            figure.marks.append(_mark(slot, run))
            continue
        iterations, times = list(metrics.times_ms), list(metrics.times_ms.values())
        counted = times[run.warmup :] or times
        changes = sorted({iteration for iteration, _, _ in read_events(run)})
        mean = sum(counted) / len(counted)
        panel = panels.setdefault(_panel_name(slot), CurvePanel(_panel_name(slot), []))
        panel.curves.append(Curve(slot.series, iterations, times, changes, run.source, metrics.where, mean))
        panel.maps += read_loads(run, slot.series, ("fig13",))[:1]  # a replay is about one layer
    figure.panels = list(panels.values())
    return figure


def _loss_figure(runs: dict[Slot, Run]) -> PanelFigure:
    """One panel for each training; the program whose own loss the others are compared with comes first."""
    figure = PanelFigure("losses", [])
    panels: dict[str, LossPanel] = {}
    places = {series: place for place, series in enumerate(LOSS_REFERENCES)}
    order = {slot: (_panel_name(slot), places.get(slot.series, len(places)), slot.series) for slot in runs}
    for slot, run in sorted(runs.items(), key=lambda item: order[item[0]]):
        metrics = read_metrics(run) if run.status == "ok" else None
        if metrics is None or not metrics.losses:
            figure.marks.append(_mark(slot, run))
            continue
        panel = panels.setdefault(_panel_name(slot), LossPanel(_panel_name(slot), []))
        curve = LossCurve(slot.series, list(metrics.losses), list(metrics.losses.values()), run.source, metrics.where)
        panel.curves.append(curve)
    figure.panels = list(panels.values())
    return figure


def _curve_order(series: str) -> tuple:
    m = re.fullmatch(r"every_(\d{1,9})", series)
    return (1, -int(m[1]), series) if m else (0 if series == "static" else 2, 0, series)
