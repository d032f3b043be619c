"""Heat maps of a routing trace: `python -m plotting.trace OUT.png`, with a JSON object on standard input.

The object has `title` and `note`; `iterations` [I]; `max_over_mean` [layers][I], the busiest expert over the mean one;
and `maps`, a list of objects with `series`, `layer`, `source`, `expert_load` [I][experts], `rank_load` [I][ranks], `changes`
(kind -> iterations), the first of which shows its experts. `smartmoe trace show` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from plotting import heatmap, style
from plotting.model import LoadMap

LAYER_INCH = 0.09  # of height, for each layer
LAYERS_MIN, LAYERS_MAX = 0.6, 2.2


def draw(data: dict) -> Figure:
    """Layers over time on top, then experts and ranks of one layer."""
    keys = ("series", "layer", "expert_load", "rank_load", "changes", "source")
    maps = [
        LoadMap(iterations=data["iterations"], file="", **{
            key: np.array(entry[key], float) if key.endswith("_load") else entry[key] for key in keys
        })
        for entry in data["maps"]
    ]  # fmt: skip
    over_mean_LI = np.array(data["max_over_mean"], float)
    layers_inch = min(max(LAYER_INCH * len(over_mean_LI), LAYERS_MIN), LAYERS_MAX) + 0.3
    heights = [layers_inch, *heatmap.heights(maps)]
    figure = style.new_figure(style.WIDE_INCH, 0.7 + sum(heights))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[60, 1])
    axes = figure.add_subplot(grid[0, 0])
    edges = heatmap.edges(data["iterations"])
    image = axes.pcolormesh(edges, np.arange(len(over_mean_LI) + 1) - 0.5, over_mean_LI, rasterized=True,
                            cmap=heatmap.EXPERT_MAP, norm=LogNorm(1, max(10.0, float(over_mean_LI.max()))))  # fmt: skip
    heatmap.label_rows(axes, "layer", len(over_mean_LI))
    axes.set_xlabel("iteration", labelpad=1)
    heatmap.title(axes, "busiest expert of each layer")
    heatmap.colour_bar(figure, image, figure.add_subplot(grid[0, 1]), "load / mean")
    heatmap.draw_maps(figure, grid, 1, maps)
    figure.suptitle(style.shown(data["title"], 100), fontsize=8)
    style.add_notes(figure, [data["note"]], style.WIDE_INCH)
    return figure


def main(argv: list[str] | None = None) -> int:
    (out,) = sys.argv[1:] if argv is None else argv
    try:
        draw(json.load(sys.stdin)).savefig(Path(out), dpi=style.PNG_DPI)
    except OSError as error:
        print(f"plotting.trace: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
