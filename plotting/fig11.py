"""Figure 11: predicted against measured time of an MoE layer, beside the estimate that ignores the routing."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting import style
from plotting.model import PanelFigure, ScatterPanel

POINT = "#0072B2"
NAIVE = "#D55E00"


def draw(data: PanelFigure, source: str) -> Figure:
    """One square panel for each cluster and micro-batch; marks of runs without data in a panel of their own."""
    num_panels = len(data.panels) + bool(data.marks)
    num_columns = min(num_panels, 3)
    num_rows = -(-num_panels // num_columns)
    width = style.COLUMN_INCH if num_columns == 1 else style.WIDE_INCH * num_columns / 3
    figure = style.new_figure(width, 0.55 + 2.25 * num_rows)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, panel in zip(grid, data.panels, strict=False):
        _draw_panel(axes, panel, width / num_columns)
    if data.marks:
        style.write_marks(grid[len(data.panels)], data.marks)
    for axes in grid[num_panels:]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=3, color=POINT),
        Line2D([], [], linestyle="--", color=NAIVE),
        Line2D([], [], linestyle="-", linewidth=0.6, color="black"),
    ]
    if data.panels:
        style.add_legend(figure, handles, ["predicted from the routing", "estimate without the routing", "exact"])
    style.add_notes(figure, [source], width)
    return figure


def _draw_panel(axes: Axes, panel: ScatterPanel, inches: float) -> None:
    real, estimate = panel.measured_ms, panel.predicted_ms
    low = min(min(real), min(estimate), *(panel.naive_ms or real)) * 0.93
    high = max(max(real), max(estimate), *(panel.naive_ms or real)) * 1.04
    axes.plot([low, high], [low, high], color="black", linewidth=0.6, zorder=3)
    axes.scatter(real, estimate, s=4, color=POINT, alpha=0.3, linewidths=0, zorder=2)
    if len(set(panel.naive_ms)) == 1:
        axes.axhline(panel.naive_ms[0], color=NAIVE, linestyle="--", zorder=2.5)
    elif panel.naive_ms:
        axes.scatter(real, panel.naive_ms, s=4, color=NAIVE, marker="x", alpha=0.5, linewidths=0.5, zorder=2.5)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal", adjustable="box")
    source = "predictions simulated" if panel.source == "simulated" else panel.source
    axes.set_title(style.in_width([style.panel(panel.name, "micro-batch"), f"({source})"], inches), pad=3)
    axes.set_xlabel("measured (ms)", labelpad=1)
    axes.set_ylabel("predicted (ms)", labelpad=1)
    stats = panel.stats
    lines = [f"R² {stats['r2']:.2f}  MAPE {stats['mape_pct']:.1f} %", f"n = {stats['num_points']}"]
    if panel.naive_ms:
        lines.insert(1, f"without routing: MAPE {stats['naive_mape_pct']:.1f} %")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.text(0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=6, zorder=4, bbox=box)
