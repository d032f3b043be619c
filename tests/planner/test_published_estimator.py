import csv
from pathlib import Path

import numpy as np
import pytest

from smartmoe.planner.published_estimator import KNEE, expert_ms, layer_ms
from smartmoe.trace import ExpertTrace

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / ".." / "shared" / "published" / "trace" / "moe_trace_it0001_2491.npz"
PANELS = {"8-4": (8, 4, 1), "8-8": (8, 8, 1), "16-8": (16, 8, 2)}  # GPUs, micro-batch, nodes


@pytest.mark.skipif(not TRACE.exists(), reason="the published trace (../shared) is not here")
def test_every_published_estimate_with_public_counts_is_rebuilt():
    trace = ExpertTrace.load(TRACE)
    row_of = {iteration: row for row, iteration in enumerate(trace.iteration.tolist())}
    with open(ROOT / "logs" / "published" / "fig11.csv") as file:
        points = [
            (p["panel"], int(p["iteration"]), int(p["layer"]), float(p["predicted_ms"])) for p in csv.DictReader(file)
        ]
    for panel, (num_devices, micro_batch, num_nodes) in PANELS.items():
        mine = [(row_of[it], layer, ms) for name, it, layer, ms in points if name == panel and it in row_of]
        assert len(mine) == 576, "24 iterations of 24 layers; the counts of the 25 later ones are not public"
        # counts are of one rank and two samples: the paper scaled them to the panel
        copies = np.array([trace.counts[row, 0, layer, 0] for row, layer, _ in mine]) * (micro_batch / 2) * num_devices
        error = np.abs(layer_ms(copies, num_devices, num_nodes) - [ms for *_, ms in mine])
        assert error.max() <= 0.05, panel
        assert error.max() <= 1e-6, f"{panel}: the constants are exact to the digits published"


def test_the_form():
    assert expert_ms(np.array([0.0, 1e-9])).tolist() == [0.0, pytest.approx(0.7)]
    assert expert_ms(np.array([KNEE])) == pytest.approx(2.407441, abs=1e-6)
    steep, flat = np.diff(expert_ms(np.array([4096.0, 5096.0, 100_096.0, 101_096.0])))[[0, 2]]
    assert steep == pytest.approx(flat), "one line from 4096 copies on, however many"
    copies = np.zeros((2, 8))
    copies[:, 0] = 5000
    assert layer_ms(copies, 4).shape == (2,) and (layer_ms(copies, 4) == expert_ms(np.array(5000.0))).all()
    assert (layer_ms(copies, 4, 2) > layer_ms(copies, 4) + 5.6).all()
