"""The grouped bars that figures 8, 9 and 10 share: speed-ups, error bars, status marks, footnotes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from plotting import style
from plotting.model import REFERENCES, Bar, BarFigure
from plotting.stats import group_key

MAX_BARS_A_ROW = 60


def draw(data: BarFigure, source: str) -> Figure:
    """Panels side by side (one below the other when there are very many bars), groups on x, speed-up on y."""
    bars = data.bars()
    stacked = len(bars) > MAX_BARS_A_ROW
    num_bars = max(sum(map(len, groups.values())) for groups in data.panels.values()) if stacked else len(bars)
    width = style.COLUMN_INCH if num_bars <= 18 else style.WIDE_INCH
    num_rows = len(data.panels) if stacked else 1
    figure = style.new_figure(width, 0.75 + 1.45 * num_rows)
    if stacked:
        grid = figure.subplots(num_rows, 1, squeeze=False)
    else:
        ratios = [sum(map(len, groups.values())) for groups in data.panels.values()]
        grid = figure.subplots(1, len(data.panels), squeeze=False, width_ratios=ratios)
    series = list(dict.fromkeys(bar.series for bar in bars))
    reference = REFERENCES[data.figure]
    unit = "GPUs" if any(bar.source == "published" for bar in bars) else "ranks"
    group_label = f"{unit} / capacity factor"
    for axes, (name, groups) in zip(grid.flat, data.panels.items(), strict=True):
        _draw_panel(axes, groups, series)
        axes.set_title(style.shown(name), pad=2)
        axes.set_xlabel(group_label if any(group_key(g)[0] == 0 for g in groups) else "", labelpad=1)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"speed-up over {style.label(reference)}")
    handles, labels = [style.series_patch(s) for s in series], [style.label(s) for s in series]
    if any(bar.source == "simulated" for bar in bars):
        handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", linewidth=0.4))
        labels.append("simulated")
    style.add_legend(figure, handles, labels)
    style.add_notes(figure, [source, *_footnotes(data)], width)
    return figure


def _draw_panel(axes: Axes, groups: dict[str, dict[str, Bar]], series: list[str]) -> None:
    tallest = (
        max((b.speedup_high or b.speedup or 0 for group in groups.values() for b in group.values()), default=0) or 1.0
    )
    longest = max((len(_symbols(b)) for group in groups.values() for b in group.values()), default=0)
    axes.set_ylim(0, tallest * (1.3 + 0.07 * longest))  # room for the label of the tallest bar
    present = [s for s in series if any(s in group for group in groups.values())]
    step = 0.84 / len(present)
    for x, group in enumerate(groups.values()):
        members = [s for s in present if s in group]
        left = x - step * (len(members) - 1) / 2
        for i, name in enumerate(members):
            _draw_bar(axes, left + i * step, step * 0.94, group[name], tallest)
    axes.axhline(1, color="black", linewidth=0.5, linestyle=(0, (4, 3)), zorder=0.9)
    axes.set_xticks(range(len(groups)), [style.shown(g, 16) for g in groups])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.tick_params(axis="x", length=0, pad=2)
    style.light_grid(axes)


def _draw_bar(axes: Axes, x: float, width: float, bar: Bar, tallest: float) -> None:
    symbols = _symbols(bar)
    text = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": style.LABEL_SIZE, "bbox": style.TEXT_BOX}
    gap = 0.025 * tallest
    if bar.speedup is None:
        mark = _mark(bar) + symbols
        axes.text(x, gap, mark, color=style.GREY if bar.value else style.MARK_COLOUR, **text)
        return
    hatch = "////" if bar.source == "simulated" else None
    axes.bar(x, bar.speedup, width, color=style.colour(bar.series), edgecolor="black", linewidth=0.4, hatch=hatch)
    top = bar.speedup
    if bar.speedup_low and bar.speedup_high:
        errors = [[max(bar.speedup - bar.speedup_low, 0)], [max(bar.speedup_high - bar.speedup, 0)]]
        axes.errorbar(
            x, bar.speedup, yerr=errors, fmt="none", ecolor="black", elinewidth=0.5, capsize=1.1, capthick=0.5
        )
        top = max(top, bar.speedup_high)
    axes.text(x, top + gap, f"{bar.speedup:.2f}{symbols}", **text)


def _symbols(bar: Bar) -> str:
    return "".join(style.SYMBOLS[code][0] for code in style.SYMBOLS if code in bar.notes)


def _mark(bar: Bar) -> str:
    """What stands in place of a bar: the absolute time when only the reference is lacking, else the status."""
    if bar.value is not None:
        return f"{bar.value:.4g} {bar.unit}"
    if bar.quoted:
        return f"“{bar.quoted}”{style.QUOTED[0]} {bar.status}"
    return style.STATUS_TEXT.get(bar.status, bar.status)


def _footnotes(data: BarFigure) -> list[str]:
    bars = data.bars()
    notes = [f"{symbol} {text}" for code, (symbol, text) in style.SYMBOLS.items() if any(code in b.notes for b in bars)]
    if any(bar.quoted for bar in bars):
        notes.append(" ".join(style.QUOTED))
    reference = style.label(REFERENCES[data.figure])
    if any(bar.value is not None and bar.speedup is None for bar in bars):
        notes.append(f"grey times: {reference}, the reference of that group, gave no time")
    return ["; ".join(notes)] if notes else []
