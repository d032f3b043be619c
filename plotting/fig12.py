"""Figure 12: speed-up of each MoE layer by online placement, over the static placement."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from plotting import heatmap, style
from plotting.model import LayerPanel, PanelFigure

BAR = "#D55E00"
BAR_INCH = 1.45
NAMES = {"backward": "backward", "total": "forward + backward"}


def draw(data: PanelFigure, source: str) -> Figure:
    """For each panel bars for the headline speed-up, diamonds for the other one; below them, where known, the load of
    one layer over time."""
    wide = any(panel.maps or len(panel.rows) > 24 for panel in data.panels)
    width = style.WIDE_INCH if wide else style.COLUMN_INCH
    figure, tops, below = heatmap.stack(data, BAR_INCH, width, 0.65)
    for axes, panel in zip(tops, data.panels, strict=True):
        _draw_panel(axes, panel)
    if below is not None:
        style.write_marks(below, data.marks)
    if data.panels:
        headline = data.panels[0].headline
        other = "total" if headline == "backward" else "backward"
        hatch = "////" if all(p.source == "simulated" for p in data.panels) else None
        bar = Patch(facecolor=BAR, edgecolor="black", linewidth=0.4, hatch=hatch)
        diamond = Line2D(
            [], [], linestyle="", marker="D", markersize=3, color="black", markerfacecolor="white", markeredgewidth=0.6
        )
        style.add_legend(figure, [bar, diamond], [NAMES[headline], NAMES[other]])
    style.add_notes(figure, [heatmap.note(data, source)], width)
    return figure


def _draw_panel(axes: Axes, panel: LayerPanel) -> None:
    xs = range(len(panel.rows))
    main = [r.backward_speedup if panel.headline == "backward" else r.total_speedup for r in panel.rows]
    beside = [r.total_speedup if panel.headline == "backward" else r.backward_speedup for r in panel.rows]
    highs = [max(v, r.speedup_high or 0) for v, r in zip(main, panel.rows, strict=True)]
    hatch = "////" if panel.source == "simulated" else None
    axes.bar(xs, main, 0.8, color=BAR, edgecolor="black", linewidth=0.4, hatch=hatch)
    shift = 0.22 if any(r.speedup_high for r in panel.rows) else 0.0  # beside the error bars
    axes.plot(
        [x + shift for x in xs],
        beside,
        linestyle="",
        marker="D",
        markersize=2.6,
        color="black",
        markerfacecolor="white",
        markeredgewidth=0.6,
    )
    for x, (value, high, row) in enumerate(zip(main, highs, panel.rows, strict=True)):
        if row.speedup_low and row.speedup_high:
            errors = [[max(value - row.speedup_low, 0)], [max(row.speedup_high - value, 0)]]
            axes.errorbar(x, value, yerr=errors, fmt="none", ecolor="black", elinewidth=0.5, capsize=1.1, capthick=0.5)
        axes.text(
            x,
            max(high, beside[x]) + 0.03,
            f"{value:.2f}",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=style.LABEL_SIZE,
        )
    mean = sum(main) / len(main)
    axes.axhline(1, color="black", linewidth=0.5, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(*highs, *beside, 1) * 1.28)
    axes.set_xticks(xs, [str(r.layer) for r in panel.rows])
    axes.set_xlim(-0.6, len(panel.rows) - 0.4)
    axes.tick_params(axis="x", length=0, pad=2)
    axes.set_xlabel("layer", labelpad=1)
    axes.set_ylabel("speed-up over static")
    whole = f", whole iterations {panel.step_speedup:.3f}" if panel.step_speedup else ""
    facts = f"mean {mean:.3f}{whole}  ({panel.source})"
    axes.set_title(style.in_width([style.panel(panel.name), facts], axes.figure.get_figwidth()), pad=3)
    style.light_grid(axes)
