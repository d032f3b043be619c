"""The rows that the loader hands to the figures: bars, scatter panels, layers, curves, and what was found in the logs.

Every number carries its source kind: "measured" (a run of this project), "simulated" (the planner's simulator),
"published" (the paper's artifact) or "quoted" (a label of the paper that its logs do not show).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

FIGURES = ("fig8", "fig9", "fig10", "fig11", "fig12", "fig13")

TITLES = {
    "fig8": "Figure 8. End-to-end speed-up over FastMoE",
    "fig9": "Figure 9. End-to-end speed-up over Tutel, Swin-MoE",
    "fig10": "Figure 10. Speed-up of the parallel plan alone over FastMoE",
    "fig11": "Figure 11. Predicted against measured time of an MoE layer",
    "fig12": "Figure 12. Speed-up of each MoE layer by online placement",
    "fig13": "Figure 13. Layer time along a trace",
}

# Drawn where a run-set has it, waited for by nobody.
EXTRAS = {"losses": "Loss of the same training under several systems"}

# The series a group is compared with: a speed-up is time of the reference / time of the series.
REFERENCES = {"fig8": "fastmoe", "fig9": "tutel", "fig10": "fastmoe"}

STATUSES = ("pending", "running", "ok", "oom", "timeout", "failed", "skipped")


@dataclass
class Finding:
    """Something a reader of the figures should know: a code, a sentence, and where (`file` or `file:line`)."""

    code: str
    message: str
    where: list[str] = field(default_factory=list)
    figures: tuple[str, ...] = ()


@dataclass
class Bar:
    """One bar of figures 8-10. `value` is a time in `unit` (None: see `status`), `low` and `high` its p10 and p90."""

    figure: str
    panel: str
    group: str
    series: str
    value: float | None
    unit: str
    status: str
    source: str
    file: str
    low: float | None = None
    high: float | None = None
    num_samples: int = 0
    quoted: str = ""  # a label of the paper that replaces the value, e.g. "OOM"
    detail: str = ""
    notes: list[str] = field(default_factory=list)  # codes of the findings that concern this bar
    num_runs: int = 1  # repeats that the value is the median of
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


@dataclass
class BarFigure:
    """Figures 8-10: panels -> groups -> series -> bar, in drawing order."""

    figure: str
    panels: dict[str, dict[str, dict[str, Bar]]]

    def bars(self) -> list[Bar]:
        return [bar for groups in self.panels.values() for group in groups.values() for bar in group.values()]


@dataclass
class ScatterPanel:
    """One panel of figure 11: predicted and measured layer times in ms, and the estimate that ignores the routing."""

    name: str
    predicted_ms: list[float]
    measured_ms: list[float]
    naive_ms: list[float]  # one value for the whole panel (published) or one for each point
    source: str
    files: list[str]
    stats: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerRow:
    """One layer of figure 12: forward and backward times of both placements, in `unit`.

    Published rows are seconds over the whole run on one rank of each stage; measured rows are means in ms over
    iterations and ranks.
    """

    layer: int
    static_forward: float
    static_backward: float
    dynamic_forward: float
    dynamic_backward: float
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def backward_speedup(self) -> float:
        return self.static_backward / self.dynamic_backward

    @property
    def forward_speedup(self) -> float:
        return self.static_forward / self.dynamic_forward

    @property
    def total_speedup(self) -> float:
        return (self.static_forward + self.static_backward) / (self.dynamic_forward + self.dynamic_backward)


@dataclass
class LoadMap:
    """Token copies of one layer over time under one series, and when its placement changed."""

    series: str
    layer: int
    iterations: list[int]
    expert_load: np.ndarray  # [iterations, experts]
    rank_load: np.ndarray  # [iterations, ranks that compute them]
    changes: dict[str, list[int]]  # kind of change -> iterations
    source: str
    file: str

    def max_over_mean(self) -> np.ndarray:
        """[iterations] load of the fullest rank over the mean; 1 where there is no load."""
        mean = self.rank_load.mean(axis=1)
        return np.where(mean > 0, self.rank_load.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)


@dataclass
class LayerPanel:
    """One panel of figure 12; `headline` says which speed-up the wide bars show: "backward" or "total". step_speedup: of whole
    iterations, with all that placement costs; None where it is not known."""

    name: str
    rows: list[LayerRow]
    headline: str
    unit: str
    source: str
    files: list[str]
    maps: list[LoadMap] = field(default_factory=list)
    step_speedup: float | None = None


@dataclass
class Curve:
    """One series of figure 13: time by trace iteration, and the iterations at which the placement changed."""

    series: str
    iterations: list[int]
    times_ms: list[float]
    changes: list[int]
    source: str
    file: str
    mean_ms: float = 0.0  # over the samples that count (warm-up left out)
    drawn: bool = True


@dataclass
class CurvePanel:
    name: str
    curves: list[Curve]
    maps: list[LoadMap] = field(default_factory=list)


@dataclass
class LossCurve:
    """The cross-entropy of each iteration of a run."""

    series: str
    iterations: list[int]
    losses: list[float]
    source: str
    file: str

    def apart(self, reference: LossCurve) -> tuple[list[int], list[float]]:
        """Common iterations, and this loss over the reference's there, less one."""
        other = dict(zip(reference.iterations, reference.losses, strict=True))
        common = [(i, loss / other[i] - 1) for i, loss in zip(self.iterations, self.losses, strict=True) if other.get(i)]
        return [i for i, _ in common], [ratio for _, ratio in common]


@dataclass
class LossPanel:
    """Curves of one training; the first is what the others are compared with."""

    name: str
    curves: list[LossCurve]


@dataclass
class StatusMark:
    """A run of figures 11-13 or of the losses that gave no data: drawn as a line of text, never left out."""

    panel: str
    series: str
    status: str
    detail: str
    file: str
    source: str


@dataclass
class PanelFigure:
    """Figures 11-13 and the losses: panels of one kind, and the runs that gave no data."""

    figure: str
    panels: list
    marks: list[StatusMark] = field(default_factory=list)


@dataclass
class Dataset:
    """Everything drawn from one place: `name` is "" (figN.pdf) or a suffix (figN.<name>.pdf). `sources`: what the numbers of a
    figure come from, where that is less than `title` says."""

    name: str
    title: str
    kind: str  # "published" or "measured"
    figures: dict[str, BarFigure | PanelFigure] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)  # figure -> what it waits for
    sources: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
