"""Losses of one training under several systems, and how far they are from those of the first."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plotting import style
from plotting.model import LossPanel, PanelFigure

LOSS_INCH, APART_INCH, HEAD_INCH = 1.9, 0.85, 0.55
DASHES = ("-", "--", "-.", ":")  # curves that lie on each other are told apart by them


def draw(data: PanelFigure, source: str) -> Figure:
    """For each panel its losses over iterations; below, where there are several, each over the first one's."""
    inches = [inch for panel in data.panels for inch in _heights(panel)] + [LOSS_INCH / 2] * bool(data.marks)
    figure = style.new_figure(style.WIDE_INCH, HEAD_INCH + sum(inches))
    rows = figure.subplots(len(inches), height_ratios=inches, squeeze=False)[:, 0].tolist()
    for panel in data.panels:
        mine, rows = rows[: len(_heights(panel))], rows[len(_heights(panel)) :]
        _draw_losses(mine[0], panel)
        if len(mine) > 1:
            _draw_apart(mine[1], panel)
        for axes in mine:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mine[-1].set_xlabel("iteration", labelpad=1)
    if data.marks:
        style.write_marks(rows[0], data.marks)
    style.add_notes(figure, [source], style.WIDE_INCH)
    return figure


def _heights(panel: LossPanel) -> list[float]:
    return [LOSS_INCH, APART_INCH] if len(panel.curves) > 1 else [LOSS_INCH]


def _draw_losses(axes: Axes, panel: LossPanel) -> None:
    for number, curve in enumerate(panel.curves):
        last = float(np.mean(curve.losses[-10:]))
        text = f"{style.label(curve.series)} (last ten: {last:.4f})"
        axes.plot(curve.iterations, curve.losses, label=text, **_look(number, curve.series))
    axes.set_ylabel("loss")
    if panel.name:
        axes.set_title(style.shown(panel.name, 80), pad=2)
    axes.legend(loc="upper right")
    axes.margins(x=0.01)
    style.light_grid(axes)


def _draw_apart(axes: Axes, panel: LossPanel) -> None:
    reference = panel.curves[0]
    for number, curve in enumerate(panel.curves):
        iterations, apart = curve.apart(reference)
        axes.plot(iterations, np.multiply(apart, 100), **_look(number, curve.series))
    axes.set_ylabel(f"% over {style.label(reference.series)}")
    axes.margins(x=0.01)
    style.light_grid(axes)


def _look(number: int, series: str) -> dict:
    return {"color": style.colour(series), "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.0}
