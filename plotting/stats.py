"""Numbers derived from rows: percentiles, speed-ups, R2 and MAPE, and the order of groups and series."""

from __future__ import annotations

import math
import re

import numpy as np

from plotting.model import REFERENCES, Bar, BarFigure, ScatterPanel

SERIES_ORDER = (
    "fastmoe", "tutel", "padded", "deepspeed", "deepspeed_artifact", "megatron", "fastermoe", "alpa", "smartmoe_static",
    "smartmoe",
)  # fmt: skip


def by_group(bars: list[Bar]) -> dict[str, dict[str, dict[str, Bar]]]:
    """Panels by name, groups by (GPUs, capacity with +inf last), series in the order of the paper."""
    figure = bars[0].figure
    order = ("tutel", "fastmoe", *SERIES_ORDER[2:]) if figure == "fig9" else SERIES_ORDER
    rank = {series: i for i, series in enumerate(order)}
    ordered = sorted(bars, key=lambda b: (b.panel, group_key(b.group), rank.get(b.series, 99), b.series))
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    for bar in ordered:
        panels.setdefault(bar.panel, {}).setdefault(bar.group, {})[bar.series] = bar
    return panels


def group_key(group: str) -> tuple:
    """Sort key of a group such as "16/1.2" or "4/+inf"; other names follow in alphabetical order."""
    m = re.fullmatch(r"(\d{1,9})/(\+?inf|[0-9]{1,9}(?:\.[0-9]{1,9})?)", group)
    return (0, int(m[1]), math.inf if "inf" in m[2] else float(m[2]), "") if m else (1, 0, 0.0, group)


def finish_bars(figure: BarFigure) -> BarFigure:
    """Fill in the speed-ups over the reference of each group; without a reference they stay None."""
    reference_name = REFERENCES[figure.figure]
    for groups in figure.panels.values():
        for group in groups.values():
            reference = group.get(reference_name)
            if reference is None or reference.value is None:
                continue
            for bar in group.values():
                if bar.value is None:
                    continue
                bar.speedup = reference.value / bar.value
                if bar.low and bar.high:
                    bar.speedup_low, bar.speedup_high = reference.value / bar.high, reference.value / bar.low
    return figure


def scatter(panel: ScatterPanel) -> dict[str, float]:
    """R2 of the prediction as it stands, squared Pearson correlation, MAPE and the same for the naive estimate."""
    real, estimate = np.array(panel.measured_ms), np.array(panel.predicted_ms)
    naive = np.broadcast_to(np.array(panel.naive_ms or [math.nan]), real.shape)
    spread = float(((real - real.mean()) ** 2).sum())
    both_vary = spread > 0 and float(estimate.std()) > 0

    def r2(prediction) -> float:
        return 1 - float(((real - prediction) ** 2).sum()) / spread if spread > 0 else math.nan

    def mape(prediction) -> float:
        return float((np.abs(prediction - real) / real).mean() * 100)

    return {
        "num_points": len(real),
        "r2": r2(estimate),
        "pearson_r2": float(np.corrcoef(real, estimate)[0, 1] ** 2) if both_vary else math.nan,
        "mape_pct": mape(estimate),
        "max_ape_pct": float((np.abs(estimate - real) / real).max() * 100),
        "bias_ms": float((estimate - real).mean()),
        "naive_ms": float(naive.mean()),
        "naive_r2": r2(naive),
        "naive_mape_pct": mape(naive),
    }
