"""What the published rows hide, as findings; and the rows as figures.

Each finding follows from facts in the rows (digest, gate, flags, counts), so raw logs and tables give the same list.
"""

from __future__ import annotations

from plotting import stats
from plotting.model import (
    Bar,
    BarFigure,
    Curve,
    CurvePanel,
    Dataset,
    Finding,
    PanelFigure,
)
from plotting.published import BarRow, Published
from plotting.stats import by_group, finish_bars

SOURCE = "published"
WAITS = {
    "fig8": "logs of fig8 (GPT runs of fastmoe, deepspeed, fastermoe, smartmoe)",
    "fig9": "logs of fig9 (Swin-MoE runs of tutel, fastmoe, smartmoe)",
    "fig10": "logs of fig10/alpa and the fig8 logs of the same model",
    "fig11": "perf_model_*nodes_mbs*.log of fig11",
    "fig12": "two profiler directories of fig12, dynamicOFF and dynamicON",
    "fig13": "freq* and changed_freq* of fig13",
}


def to_dataset(rows: Published, findings: list[Finding], name: str, title: str) -> Dataset:
    """Figures and findings of published rows."""
    data = Dataset(name, title, SOURCE, findings=findings)
    shown = _figure_rows(rows.bars)
    bars = {figure: [_bar(row, figure) for row in members] for figure, members in shown.items()}
    findings += _findings(rows, shown, bars)
    for figure, members in bars.items():
        if members:
            data.figures[figure] = finish_bars(BarFigure(figure, by_group(members)))
    if rows.scatter:
        for panel in rows.scatter:
            panel.stats = stats.scatter(panel)
        data.figures["fig11"] = PanelFigure("fig11", rows.scatter)
    if rows.layers:
        data.figures["fig12"] = PanelFigure("fig12", [rows.layers])
    if rows.replays:
        data.figures["fig13"] = PanelFigure("fig13", [CurvePanel("", _curves(rows))])
    data.waits = {figure: text for figure, text in WAITS.items() if figure not in data.figures}
    return data


def _figure_rows(bars: list[BarRow]) -> dict[str, list[BarRow]]:
    """Rows by the figure that shows them; figure 10 adds figure 8's FastMoE and SmartMoE of Alpa's model."""
    shown = {figure: [r for r in bars if r.figure == figure] for figure in ("fig8", "fig9")}
    alpa = [r for r in bars if r.figure == "fig10"]
    wanted = {(r.model, r.group) for r in alpa}
    others = [r for r in shown["fig8"] if r.series in ("fastmoe", "smartmoe") and (r.model, r.group) in wanted]
    shown["fig10"] = [*alpa, *others] if alpa else []
    return shown


def _bar(row: BarRow, figure: str) -> Bar:
    # The paper's label for a log without its end; the log itself says nothing of memory unless `out_of_memory` is set.
    quoted = "OOM" if row.status == "incomplete" and row.series == "deepspeed" else ""
    status = "oom" if row.status == "incomplete" and row.out_of_memory else row.status
    panel = row.panel if figure == "fig8" else ""
    detail = f"{row.model} {row.plan}, micro-batch {row.micro_batch}".replace("  ", " ")
    if status != "ok":
        detail += f"; {row.num_iterations} of {row.num_declared or '?'} iterations"
    return Bar(
        figure,
        panel,
        row.group,
        row.series,
        row.plotted_s,
        "s",
        status,
        "quoted" if quoted else SOURCE,
        row.file,
        num_samples=row.num_iterations,
        quoted=quoted,
        detail=detail,
    )


def _curves(rows: Published) -> list[Curve]:
    """The paper's static curve (from the file with the longest interval) and one curve for each interval.

    Means leave the first sample out, as the paper did; samples and stars stand at their true iterations, which the
    paper's plot shifted by one sample.
    """
    curves = []
    for replay in rows.replays:
        iterations = [1 + 10 * i for i in range(len(replay.static_ms))]
        reference = replay is rows.replays[-1]
        for series, times, changes in (
            ("static" if reference else f"static_{replay.interval}", replay.static_ms, []),
            (f"every_{replay.interval}", replay.dynamic_ms, replay.changes),
        ):
            mean = sum(times[1:]) / len(times[1:])
            drawn = reference or not series.startswith("static")
            curves.append(Curve(series, iterations, times, changes, SOURCE, replay.file, mean, drawn))
    return sorted(
        curves,
        key=lambda c: (not c.series.startswith("static"), -int(c.series.rpartition("_")[2]) if "_" in c.series else 0),
    )


# ------------------------------------------------------------------------------------------------------------- findings


def _findings(rows: Published, shown: dict[str, list[BarRow]], bars: dict[str, list[Bar]]) -> list[Finding]:
    found: list[Finding] = []

    def mark(code: str, message: str, members: list[BarRow], min_shown: int = 1) -> None:
        files = {r.file for r in members}
        figures = tuple(f for f in shown if sum(r.file in files for r in shown[f]) >= min_shown)
        found.append(Finding(code, message, sorted(files), figures))
        for figure in figures:
            for bar in bars[figure]:
                if bar.file in files:
                    bar.notes.append(code)

    for row in rows.bars:
        _judge_row(row, mark)
    _identical(rows.bars, mark)
    _summaries(rows, shown, mark)
    if rows.layers:
        message = (
            "figure 12 shows the backward pass on one rank of each stage only; forward, where migration is paid, is in "
            "the table"
        )
        found.append(Finding("backward-only", message, rows.layers.files, ("fig12",)))
    if rows.replays:
        message = (
            "figure 13 takes the placement from the same iteration's own counts and never counts the cost of moving "
            "experts; samples and stars are drawn at their true iterations (the paper's plot is one sample off)"
        )
        found.append(Finding("replay-method", message, [r.file for r in rows.replays], ("fig13",)))
    return found


def _judge_row(row: BarRow, mark) -> None:
    if row.gate_run and row.gate_run != row.gate_named:
        mark(
            "gate-mismatch",
            f"{row.figure} {row.group} {row.series}: named {row.gate_named}, but the log ran the {row.gate_run} gate",
            [row],
        )
    if row.status == "incomplete":
        cause = (
            "and an out-of-memory message" if row.out_of_memory else "and no out-of-memory message: shown as incomplete"
        )
        quoted = '; "OOM" is the paper\'s label' if row.series == "deepspeed" else ""
        count = f"{row.num_iterations} of {row.num_declared or '?'} iterations"
        mark(
            "incomplete",
            f"{row.figure} {row.panel} {row.group} {row.series}: the log holds {count} {cause}{quoted}",
            [row],
        )
    if row.status == "unreadable":
        mark(
            "unreadable",
            f"{row.figure} {row.panel} {row.group} {row.series}: nothing could be read from the log",
            [row],
        )
    if row.gpus_named is not None and row.gpus_named != row.gpus:
        mark(
            "name-gpus",
            f"{row.group} {row.series}: the file name says {row.gpus_named} GPUs, the run had {row.gpus}",
            [row],
        )


def _identical(bars: list[BarRow], mark) -> None:
    by_digest: dict[str, list[BarRow]] = {}
    for row in bars:
        if row.sha256:
            by_digest.setdefault(row.sha256, []).append(row)
    for same in by_digest.values():
        systems = sorted({r.series for r in same})
        if len(systems) > 1:
            where = " ".join(filter(None, (same[0].panel, same[0].group)))
            mark(
                "identical-logs",
                f"{where}: byte-identical logs under {' and '.join(systems)}: one run, shown as two",
                same,
                min_shown=2,
            )


def _summaries(rows: Published, shown: dict[str, list[BarRow]], mark) -> None:
    """Findings that hold for many bars at once: one line a figure."""
    static = [r for r in rows.bars if r.series == "smartmoe" and r.dynamic is False]
    for figure in ("fig8", "fig9"):
        if members := [r for r in static if r.figure == figure]:
            groups = ", ".join(f"{r.panel} {r.group}".strip() for r in members)
            mark(
                "dynamic-off",
                f"{figure}: SmartMoE ran with dynamic placement off in {groups}: these bars show the plan alone",
                members,
            )
    timed = [r for r in rows.bars if r.figure in ("fig8", "fig10") and r.status == "ok"]
    if timed:
        low, high = min(r.first_s for r in timed), max(r.first_s for r in timed)
        message = f"totals include the first iteration ({low:.1f} to {high:.1f} s, warm-up) and are single runs"
        mark("first-iteration", message, timed)
    if skipped := [r for r in rows.bars if r.num_skipped]:
        total = sum(r.num_skipped for r in skipped)
        mark(
            "skipped-iterations",
            f"{total} iterations skipped their update after an fp16 overflow; their time is in the totals",
            skipped,
        )
    for figure in ("fig8", "fig9"):
        by_bar: dict[tuple, list[BarRow]] = {}
        for row in shown[figure]:
            by_bar.setdefault((row.panel, row.gpus), []).append(row)
        for (panel, gpus), members in by_bar.items():
            _compare(figure, f"{panel} {gpus} GPUs".strip(), members, mark)


def _compare(figure: str, place: str, members: list[BarRow], mark) -> None:
    sizes = {}
    for row in members:
        sizes.setdefault(row.micro_batch, set()).add(row.series)
    if len(sizes) > 1:
        parts = "; ".join(f"{size}: {', '.join(sorted(names))}" for size, names in sorted(sizes.items()))
        mark("micro-batch", f"{figure} {place}: systems ran with different micro-batches ({parts})", members)
    models = {(r.top_k, r.moe_every or 1) for r in members if r.top_k}
    odd = [r for r in members if r.top_k and (r.top_k, r.moe_every or 1) != (2, 1)]
    if len(models) > 1 and odd:
        kind = odd[0]
        message = f"{figure} {place}: {kind.series} trained another model "
        message += f"(top-{kind.top_k}, MoE in every {kind.moe_every}. layer; the others top-2 in every layer)"
        mark("other-model", message, odd)
