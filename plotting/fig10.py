"""Figure 10: speed-up over FastMoE by the parallel plan alone, Alpa's plan against SmartMoE's."""

from matplotlib.figure import Figure

from plotting import bars
from plotting.model import BarFigure


def draw(data: BarFigure, source: str) -> Figure:
    return bars.draw(data, source)
