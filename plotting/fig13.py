"""Figure 13: time of one MoE layer along a trace, static and adaptive, with a star where the placement changed."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting import heatmap, style
from plotting.model import CurvePanel, PanelFigure

CURVE_INCH = 1.75
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
    style.add_notes(figure, [source], style.WIDE_INCH)
    return figure


def _draw_panel(axes: Axes, panel: CurvePanel) -> None:
    curves = [curve for curve in panel.curves if curve.drawn]
    handles, labels = [], []
    for curve in curves:
        tint = style.colour(curve.series)
        dashes = "--" if curve.source == "simulated" else "-"
        axes.plot(curve.iterations, curve.times_ms, color=tint, linestyle=dashes, linewidth=0.8)
        stars = [(i, _time_at(curve, i)) for i in curve.changes]
        axes.plot([i for i, _ in stars], [t for _, t in stars], linestyle="", color=tint, zorder=3, **STAR)
        changes = f", {len(stars)} changes" if stars or curve.series.startswith("every") else ""
        simulated = ", simulated" if curve.source == "simulated" else ""
        handles.append(Line2D([], [], color=tint, linestyle=dashes, **(STAR if stars else {})))
        labels.append(f"{style.label(curve.series)} (mean {curve.mean_ms:.4g} ms{changes}{simulated})")
    num_columns = min(len(labels), 2 if panel.maps else 3)
    num_lines = -(-len(labels) // num_columns)
    axes.set_ylim(0, max(max(c.times_ms) for c in curves) * (1.08 + 0.14 * num_lines))
    axes.set_xlabel("training iteration of the trace", labelpad=1)
    axes.set_ylabel("layer time (ms)")
    if panel.name:
        axes.set_title(style.shown(panel.name), pad=2)
    axes.margins(x=0.01)
    axes.legend(handles, labels, loc="upper center", ncols=num_columns, borderaxespad=0.1)
    style.light_grid(axes)


def _time_at(curve, iteration: int) -> float:
    """The time of the sample at an iteration, or of the nearest one."""
    nearest = min(range(len(curve.iterations)), key=lambda k: abs(curve.iterations[k] - iteration))
    return curve.times_ms[nearest]
