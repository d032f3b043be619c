"""Figure 13: time of one MoE layer along a trace, static and adaptive, with a star where the placement changed."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting import heatmap, style
from plotting.model import CurvePanel, PanelFigure

CURVE_INCH = 1.75
LINE_LETTERS = 145  # of a legend's line in the width of a page
LONG, WINDOW = 400, 15  # iterations from which on single ones would hide one another; those of a running median
STAR = {"marker": "*", "markersize": 4.5, "markeredgecolor": "black", "markeredgewidth": 0.25}


def draw(data: PanelFigure, source: str) -> Figure:
    """For each panel the curves, iterations on x, milliseconds on y; below them, where known, the load behind them."""
    figure, tops, below = heatmap.stack(data, CURVE_INCH, style.WIDE_INCH, 0.55)
    for axes, panel in zip(tops, data.panels, strict=True):
        _draw_panel(axes, panel)
        if panel.maps:
            axes.set_xlim(heatmap.span(panel.maps))
    if below is not None:
        style.write_marks(below, data.marks)
    if any(map(_is_long, data.panels)):
        source += f"; of over {LONG} iterations the running median of {WINDOW}, single ones faint"
    style.add_notes(figure, [heatmap.note(data, source)], style.WIDE_INCH)
    return figure


def _draw_panel(axes: Axes, panel: CurvePanel) -> None:
    curves = [curve for curve in panel.curves if curve.drawn]
    top, is_long = _top(curves), _is_long(panel)
    handles, labels = [], []
    for curve in curves:
        tint = style.colour(curve.series)
        dashes = "--" if curve.source == "simulated" else "-"
        shown = np.minimum(curve.times_ms, top)
        if is_long:
            axes.plot(curve.iterations, shown, color=tint, linewidth=0.4, alpha=0.3)
            shown = _running_median(shown)
        axes.plot(curve.iterations, shown, color=tint, linestyle=dashes, linewidth=0.8, zorder=2.5)
        stars = [(i, min(_time_at(curve, i), top)) for i in curve.changes]
        size = {"markersize": 3.2, "markeredgewidth": 0.1} if is_long else {}
        axes.plot([i for i, _ in stars], [t for _, t in stars], linestyle="", color=tint, zorder=3, **(STAR | size))
        changes = f", {len(stars)} changes" if stars or curve.series.startswith("every") else ""
        simulated = ", simulated" if curve.source == "simulated" else ""
        handles.append(Line2D([], [], color=tint, linestyle=dashes, **(STAR if stars else {})))
        num_above = sum(time > top for time in curve.times_ms)
        above = f", {num_above} cut" if num_above else ""
        labels.append(f"{style.label(curve.series)} (mean {curve.mean_ms:.4g} ms{changes}{above}{simulated})")
    num_columns = min(len(labels), 2 if panel.maps else 3, max(1, LINE_LETTERS // max(map(len, labels))))
    num_lines = -(-len(labels) // num_columns)
    axes.set_ylim(0, top * (1.08 + 0.14 * num_lines))
    axes.set_xlabel("training iteration of the trace", labelpad=1)
    axes.set_ylabel("layer time (ms)")
    sources = "/".join(dict.fromkeys(curve.source for curve in curves))
    axes.set_title("  ".join(filter(None, (style.panel(panel.name), f"({sources})"))), pad=2)
    axes.margins(x=0.01)
    axes.legend(handles, labels, loc="upper center", ncols=num_columns, borderaxespad=0.1)
    style.light_grid(axes)


def _is_long(panel: CurvePanel) -> bool:
    return any(len(curve.iterations) > LONG for curve in panel.curves if curve.drawn)


def _running_median(times: np.ndarray) -> np.ndarray:
    """The median of each time and those beside it; the ends are repeated."""
    padded = np.pad(times, WINDOW // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1)


def _top(curves: list) -> float:
    """The highest time that is drawn, at which others are cut: the highest of all, unless a few would leave no room."""
    times = [time for curve in curves for time in curve.times_ms]
    usual = 1.5 * float(np.percentile(times, 98))
    return usual if max(times) > 2 * usual else max(times)


def _time_at(curve, iteration: int) -> float:
    """The time of the sample at an iteration, or of the nearest one."""
    nearest = min(range(len(curve.iterations)), key=lambda k: abs(curve.iterations[k] - iteration))
    return curve.times_ms[nearest]
