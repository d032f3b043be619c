"""Figure 9: end-to-end speed-up over Tutel for Swin-MoE, groups of GPUs / expert capacity."""

from matplotlib.figure import Figure

from plotting import bars
from plotting.model import BarFigure


def draw(data: BarFigure, source: str) -> Figure:
    return bars.draw(data, source)
