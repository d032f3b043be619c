import csv
from pathlib import Path

import numpy as np
import pytest

from smartmoe.planner.published_estimator import KNEE, expert_ms, layer_ms
from smartmoe.trace import ExpertTrace

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / ".." / "shared" / "published" / "trace" / "moe_trace_it0001_2491.npz"
LAYER_6 = TRACE.with_name("fig13_layer6_rank0_mb0.npz")  # that of figure 13, which goes on to iteration 2991
PANELS = {"8-4": (8, 4, 1), "8-8": (8, 8, 1), "16-8": (16, 8, 2)}  # GPUs, micro-batch, nodes


def _public_counts():
    """{(iteration, layer): [32] token copies of rank 0's first micro-batch, two samples}."""
    trace, more = ExpertTrace.load(TRACE), np.load(LAYER_6)
    found = {(it, 6): counts for it, counts in zip(more["iteration"].tolist(), more["counts"], strict=True)}
    for row, iteration in enumerate(trace.iteration.tolist()):
        for layer, counts in enumerate(trace.counts[row, 0, :, 0]):
            assert layer != 6 or (found[iteration, 6] == counts).all(), "both files say the same"
            found[iteration, layer] = counts
    return found


@pytest.mark.skipif(not TRACE.exists(), reason="the published trace (../shared) is not here")
def test_every_published_estimate_with_public_counts_is_rebuilt():
    """24 of 49 iterations have public counts in all 24 layers, 5 more in one. An estimate is a maximum over devices, so three
    panels' for a layer do not give back its 32 counts."""
    counts_of, num_points = _public_counts(), 0
    with open(ROOT / "logs" / "published" / "fig11.csv") as file:
        points = [
            (p["panel"], (int(p["iteration"]), int(p["layer"])), float(p["predicted_ms"])) for p in csv.DictReader(file)
        ]
    for panel, (num_devices, micro_batch, num_nodes) in PANELS.items():
        mine = [(place, ms) for name, place, ms in points if name == panel]
        num_points += len(mine)
        mine = [(counts_of[place], ms) for place, ms in mine if place in counts_of]
        assert len(mine) == 24 * 24 + 5
        copies = np.array([counts for counts, _ in mine]) * (micro_batch / 2) * num_devices  # as the paper scaled them
        error = np.abs(layer_ms(copies, num_devices, num_nodes) - [ms for _, ms in mine])
        assert error.max() <= 1e-6, f"{panel}: the constants are exact to the digits published"
    assert num_points == 3 * 49 * 24


def test_the_form():
    assert expert_ms(np.array([0.0, 1e-9])).tolist() == [0.0, pytest.approx(0.7)]
    assert expert_ms(np.array([KNEE])) == pytest.approx(2.407441, abs=1e-6)
    steep, flat = np.diff(expert_ms(np.array([4096.0, 5096.0, 100_096.0, 101_096.0])))[[0, 2]]
    assert steep == pytest.approx(flat), "one line from 4096 copies on, however many"
    copies = np.zeros((2, 8))
    copies[:, 0] = 5000
    assert layer_ms(copies, 4).shape == (2,) and (layer_ms(copies, 4) == expert_ms(np.array(5000.0))).all()
    assert (layer_ms(copies, 4, 2) > layer_ms(copies, 4) + 5.6).all()
