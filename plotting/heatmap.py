"""Heat maps of load over time: experts, and the ranks that compute them, with the changes of placement marked."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D

from plotting import style
from plotting.model import LoadMap, PanelFigure

EXPERT_MAP, RANK_MAP = "cividis", "RdYlBu_r"
EXPERT_INCH, STRIP_INCH = 1.35, 0.7
# kind of change: marker, colour, label
CHANGES = {
    "migrate": ("v", "black", "experts moved"),
    "replicate": ("o", "#009E73", "copies changed"),
    "both": ("D", "#CC79A7", "moved and copied"),
    "rollback": ("X", "#D55E00", "taken back"),
}
MAX_MARKERS = 60  # more are drawn as a rug


def stack(data: PanelFigure, panel_inch: float, width: float, head_inch: float):
    """A figure with the panels below one another, each `panel_inch` high and followed by its maps.

    Returns (figure, the axes of each panel, axes for the marks or None); the maps are drawn.
    """
    inches = [inch for panel in data.panels for inch in (panel_inch, *heights(panel.maps))]
    inches += [panel_inch] if data.marks or not inches else []
    figure = style.new_figure(width, head_inch + sum(inches))
    tops, row = [], 0
    # Colour bars have a column of their own: taking their room from the axes beside them would spread those apart.
    with_bars = any(panel.maps for panel in data.panels)
    grid = figure.add_gridspec(len(inches), 1 + with_bars, height_ratios=inches, width_ratios=[60, 1][: 1 + with_bars])
    for panel in data.panels:
        tops.append(figure.add_subplot(grid[row, 0]))
        row += 1
        if panel.maps:
            draw_maps(figure, grid, row, panel.maps)
            row += len(panel.maps) + 1
    return figure, tops, figure.add_subplot(grid[row, 0]) if data.marks else None


def note(data: PanelFigure, source: str) -> str:
    """`source` with what the heat maps show, where there are any."""
    shows = "; heat maps: token copies in each iteration, as the placement in force spreads them over the ranks"
    return source + shows if any(panel.maps for panel in data.panels) else source


def heights(maps: list[LoadMap]) -> list[float]:
    """Of the rows that `draw_maps` fills: the experts, then one strip for each map; with their titles and labels."""
    return [EXPERT_INCH, *[STRIP_INCH] * (len(maps) - 1), STRIP_INCH + 0.15] if maps else []


def draw_maps(figure: Figure, grid: GridSpec, row: int, maps: list[LoadMap]) -> None:
    """Experts of the first map (the routing that all share) on top, then the ranks of each, on one scale of colours.

    They fill the rows of `grid` from `row` on, colour bars in its second column.
    """
    first = maps[0]
    top = figure.add_subplot(grid[row, 0])
    image = draw_experts(top, first.iterations, first.expert_load)
    title(top, f"load of each expert, layer {first.layer} ({style.label(first.series)}, {first.source})")
    colour_bar(figure, image, figure.add_subplot(grid[row, 1]), "load / mean expert")
    norm = rank_norm(max(float(load_map.max_over_mean().max()) for load_map in maps))
    for number, load_map in enumerate(maps, 1):
        strip = figure.add_subplot(grid[row + number, 0], sharex=top)
        draw_ranks(strip, load_map, norm)
        mean = float(load_map.max_over_mean().mean())
        title(strip, f"load of each rank, {style.label(load_map.series)} ({load_map.source}): fullest / mean {mean:.2f}")
        strip.tick_params(labelbottom=number == len(maps))
    strip.set_xlabel("iteration", labelpad=1)
    top.tick_params(labelbottom=False)
    bar_axes = figure.add_subplot(grid[row + 1 : row + 1 + len(maps), 1])
    colour_bar(figure, ScalarMappable(norm, RANK_MAP), bar_axes, "load / mean rank")
    kinds = [kind for kind in CHANGES if any(load_map.changes.get(kind) for load_map in maps)]
    if kinds:
        handles = [Line2D([], [], linestyle="", marker=CHANGES[k][0], color=CHANGES[k][1], markersize=3.5) for k in kinds]
        top.legend(handles, [CHANGES[k][2] for k in kinds], loc="lower right", bbox_to_anchor=(1, 0.98),
                   ncols=len(kinds), borderaxespad=0).set_in_layout(False)  # fmt: skip


def title(axes: Axes, text: str) -> None:
    """Small, at the left, clear of the markers."""
    axes.set_title(text, loc="left", pad=4, fontsize=style.LABEL_SIZE + 0.5)


def draw_experts(axes: Axes, iterations: list[int], load_IE: np.ndarray):
    """Experts down, iterations along; colour: load over the mean expert, on a logarithmic scale."""
    over_mean = _over_mean(load_IE)
    norm = LogNorm(0.1, max(10.0, float(over_mean.max())), clip=True)
    image = axes.pcolormesh(edges(iterations), np.arange(load_IE.shape[1] + 1) - 0.5, over_mean.T, cmap=EXPERT_MAP,
                            norm=norm, rasterized=True)  # fmt: skip
    label_rows(axes, "expert", load_IE.shape[1])
    return image


def draw_ranks(axes: Axes, load_map: LoadMap, norm: Normalize) -> None:
    """Ranks down, iterations along; markers above where the placement changed."""
    num_ranks = load_map.rank_load.shape[1]
    axes.pcolormesh(edges(load_map.iterations), np.arange(num_ranks + 1) - 0.5, _over_mean(load_map.rank_load).T,
                    cmap=RANK_MAP, norm=norm, rasterized=True)  # fmt: skip
    label_rows(axes, "rank", num_ranks, 4)
    for kind in [kind for kind in CHANGES if load_map.changes.get(kind)]:
        (marker, colour, _), at = CHANGES[kind], load_map.changes[kind]
        axes.vlines(at, -0.5, num_ranks - 0.5, color=colour, linewidth=0.25 if len(at) > MAX_MARKERS else 0.5, alpha=0.7)
        if len(at) <= MAX_MARKERS:
            axes.plot(at, [-0.5] * len(at), linestyle="", marker=marker, color=colour, markersize=3, clip_on=False)


def rank_norm(highest: float) -> Normalize:
    """Blue below the mean rank, red above, the same in all strips."""
    return TwoSlopeNorm(1.0, 0.0, max(highest, 1.05))


def label_rows(axes: Axes, name: str, num: int, num_labels: int = 8) -> None:
    """Rows are numbered from the top."""
    axes.set_ylim(num - 0.5, -0.5)
    axes.set_yticks(range(0, num, -(-num // num_labels)))
    axes.set_ylabel(name)
    axes.tick_params(length=1.5, pad=1)


def colour_bar(figure: Figure, image, axes: Axes, text: str) -> None:
    """On axes of its own; logarithmic ticks as plain numbers."""
    bar = figure.colorbar(image, cax=axes)
    bar.set_label(text, fontsize=style.LABEL_SIZE)
    if isinstance(image.norm, LogNorm):
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100) if image.norm.vmin <= tick <= image.norm.vmax]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    axes.tick_params(labelsize=style.LABEL_SIZE, length=1.5)


def _over_mean(load: np.ndarray) -> np.ndarray:
    mean = load.mean(axis=1, keepdims=True)
    return np.where(mean > 0, load / np.where(mean > 0, mean, 1), 1.0)


def span(maps: list[LoadMap]) -> tuple[float, float]:
    """The iterations that maps span, half a column at both ends included."""
    borders = edges(maps[0].iterations)
    return float(borders[0]), float(borders[-1])


def edges(iterations: list[int]) -> np.ndarray:
    """Borders between columns, halfway between the iterations."""
    at = np.array(iterations, float)
    gaps = np.diff(at) if len(at) > 1 else np.ones(1)
    return np.concatenate([[at[0] - gaps[0] / 2], at[:-1] + gaps / 2 if len(at) > 1 else [], [at[-1] + gaps[-1] / 2]])
