"""The two entries that hold predictions against measurements, on two ranks; their numbers are the machine's."""

import json

import numpy as np
import pytest

from plotting.files import Folder
from plotting.runset import to_dataset
from smartmoe.bench import layer_accuracy, measure, plan_accuracy
from smartmoe.bench.plan_accuracy import Row
from smartmoe.trace import ExpertTrace
from tests.dist import spawn

MODELS = "[small]\nnum_layers = 2\nseq_len = 16\nhidden_size = 32\nffn_size = 32\nnum_experts = 4\nvocab_size = 300\n"
CLUSTER = 'device = "cpu"\nranks_per_node = 2\nmemory_gbytes = 64.0\n[rates]\nhost_us = 1.0\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "models.toml").write_text(MODELS)
    (tmp_path / "clusters" / "two.toml").write_text(CLUSTER)
    return tmp_path


def _run(_world_rank, argv, trace_argv):
    world = measure.start_world("cpu")
    rows = plan_accuracy.run(plan_accuracy.parse_args(argv), world)
    points = layer_accuracy.run(layer_accuracy.parse_args(trace_argv), world)
    return [vars(row) for row in rows], points


def test_both_entries_measure_and_predict(folder):
    counts = np.random.default_rng(0).multinomial(64, [0.6, 0.2, 0.1, 0.1], size=(5, 2, 2, 1)).astype(np.int32)
    ExpertTrace(counts, np.arange(5) + 1, {"top_k": 2}).save(folder / "t.npz")
    common = ["--device", "cpu", "--model", "small", "--cluster", "two", "--configs", str(folder)]
    steps = [
        *common,
        "--batch",
        "8",
        "--choose",
        "3",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--out",
        str(folder / "steps.json"),
    ]
    layer = [*common, "--trace", str(folder / "t.npz"), "--micro-batch", "1", "--points", "6", "--repeat", "1"]
    results = spawn(_run, 2, steps, [*layer, "--out", str(folder / "set" / "run"), "--figure", "fig11"])
    rows, points = results[0]
    assert len(rows) == 3 and all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in rows)
    written = json.loads((folder / "steps.json").read_text())
    assert written["rows"] == rows and {"mape", "tau", "regret", "blind_mape"} <= set(written)
    assert len(points) == 6 and {p["layer"] for p in points} == {0, 1} and {p["iteration"] for p in points} == {1, 3, 5}
    panel = to_dataset(Folder(folder / "set", []), "set").figures["fig11"].panels[0]
    assert panel.source == "measured" and len(panel.predicted_ms) == 6 and len(panel.naive_ms) == 6


def test_statistics_by_hand():
    assert plan_accuracy.kendall_tau(np.array([1, 2, 3]), np.array([10, 20, 30])) == 1.0
    assert plan_accuracy.kendall_tau(np.array([1, 2, 3]), np.array([3, 2, 1])) == -1.0
    rows = [Row("a", 100, 99, 101, 110, 50, 2.0, 2.2), Row("b", 80, 79, 81, 120, 90, 1.0, 1.1)]
    found = plan_accuracy.statistics(rows)
    assert (
        found["mape"] == pytest.approx((0.1 + 0.5) / 2)
        and found["tau"] == -1
        and found["regret"] == pytest.approx(0.25)
    )
    assert found["blind_regret"] == pytest.approx(0.25) and found["memory_mape"] == pytest.approx(0.1)
    assert "memory: MAPE 10.0%" in plan_accuracy.format_rows(rows)
    points = [{"measured_ms": m, "predicted_ms": p, "naive_ms": 2.0} for m, p in ((1.0, 1.1), (2.0, 2.0), (3.0, 3.0))]
    found = layer_accuracy.statistics(points)
    assert found["r2"] == pytest.approx(1 - 0.01 / 2) and found["naive_r2"] == 0.0
    assert found["naive_mape"] == pytest.approx((1 + 0 + 1 / 3) / 3)
