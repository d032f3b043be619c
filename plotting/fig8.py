"""Figure 8: end-to-end speed-up over FastMoE, groups of GPUs / expert capacity, one panel for each cluster."""

from matplotlib.figure import Figure

from plotting import bars
from plotting.model import BarFigure


def draw(data: BarFigure, source: str) -> Figure:
    return bars.draw(data, source)
