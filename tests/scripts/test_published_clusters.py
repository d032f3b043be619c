import csv
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import published_clusters as clusters  # noqa: E402

from smartmoe.planner import inputs  # noqa: E402


def test_bars_that_took_no_part_in_the_fit_are_met_as_the_cluster_file_says():
    bars = clusters.read_bars(ROOT / "logs" / "published" / "bars.csv")
    assert len(bars) == 27 and sum(bar.is_training for bar in bars) == 13
    assert sum(len(bar.places) for bar in bars) == 16 + 8 + 12, "figure 8 inky and pinky, figure 10"
    cluster, rates, _ = inputs.read_cluster("inky", ROOT / "scripts")
    mine = [bar for bar in bars if bar.cluster == "inky"]
    ratio = {bar: clusters.ratio_of(bar, cluster, rates, clusters.EXPONENTS) for bar in mine}
    errors = {use: [abs(r - 1) for b, r in ratio.items() if b.is_training == use] for use in (True, False)}
    assert np.mean(errors[True]) < 0.04 and np.mean(errors[False]) < 0.12 and max(errors[False]) < 0.27
    pinky, rates, _ = inputs.read_cluster("pinky", ROOT / "scripts")
    large = [bar for bar in bars if bar.cluster == "pinky" and not bar.is_training]
    for with_input, worst, mean in ((True, 0.14, 0.08), (False, 0.61, 0.45)):
        errors = [abs(clusters.ratio_of(b, pinky, rates, clusters.EXPONENTS, with_input) - 1) for b in large]
        assert max(errors) < worst and np.mean(errors) < mean
    assert clusters.layer_ratios(bars, pinky, rates, clusters.EXPONENTS) == pytest.approx([0.94, 1.11], abs=0.01)


def test_what_is_said_of_the_input_of_large_runs_agrees_with_the_published_layer_times():
    with open(ROOT / "logs" / "published" / "fig12.csv") as file:
        rows = [{key: float(row[key]) for key in row if key.endswith("_s")} for row in csv.DictReader(file)]
    inside = [row for layer, row in enumerate(rows) if layer % 4]
    forward = np.mean([row["static_forward_s"] for row in inside]) * 5  # seconds of 200 iterations -> ms of one
    backward = np.mean([row["static_backward_s"] for row in rows]) * 5
    assert (forward, backward) == pytest.approx(clusters.LAYER_MS, rel=0.01)
    waits = (rows[0]["dynamic_forward_s"] - np.mean([row["dynamic_forward_s"] for row in inside])) * 5
    assert waits == pytest.approx(2652, rel=0.02) and waits < clusters.INPUT_MS["pinky"][64]


def test_the_fit_lowers_the_error_on_the_bars_it_is_given():
    bars = [b for b in clusters.read_bars(ROOT / "logs" / "published" / "bars.csv") if b.cluster == "pinky"]
    cluster, _, _ = inputs.read_cluster("pinky", ROOT / "scripts")
    error = []
    for num_steps in (0, 15):
        rates, found, _ = clusters.fit(bars, "pinky", cluster, clusters.EXPONENTS, num_steps)
        ratios = [clusters.ratio_of(b, found, rates, clusters.EXPONENTS) for b in bars if b.is_training]
        error.append(np.mean(np.log(ratios) ** 2))
    assert error[1] < 0.8 * error[0]
