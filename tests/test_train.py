"""The training entry: the run directory it writes, how it stops, and how it fails."""

import json
import os
import signal
import time

import numpy as np
import pytest
from dist import start_training, worker_pids
from parity import CACHE, make_config

from smartmoe import checkpoint, record
from smartmoe.config import GateConfig, OnlineConfig, ParallelPlan, to_dict
from smartmoe.trace import ExpertTrace


def lines(run_dir, name):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def write_run(run_dir, config, **workload):
    table = to_dict(config)
    table["workload"].update(workload)
    record.create_run(run_dir, "run", table, [])


def test_a_run_directory_has_everything(tmp_path):
    config = make_config(
        ParallelPlan(pp=2, dp=2, ep=2),
        gate=GateConfig(kind="naive"),
        online=OnlineConfig(policy="greedy", interval=2),
        record_trace=True,
        record_spans=True,
    )
    write_run(tmp_path, config, iterations=5)
    process = start_training(tmp_path, 4, CACHE)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    metrics = lines(tmp_path, "metrics")
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4, 5]
    assert all(line["load_max_over_mean"] >= 1 and line["step_ms"] > 0 for line in metrics)
    spans = lines(tmp_path, "spans")
    assert {(s["iteration"], s["layer"]) for s in spans} == {(i, layer) for i in range(1, 6) for layer in range(4)}
    assert {s["rank"] for s in spans} == {0, 1, 2, 3}
    events = lines(tmp_path, "events")
    assert {(e["iteration"], e["layer"]) for e in events} == {(i, layer) for i in (2, 4) for layer in range(4)}
    trace = ExpertTrace.load(tmp_path / "trace.npz")
    assert trace.counts.shape == (5, 2, 4, 2, 8)
    tokens = config.workload.global_batch_size * config.model.seq_len
    np.testing.assert_array_equal(trace.counts.sum((1, 3, 4)), tokens * config.model.top_k)
    log = (tmp_path / "train.log").read_text()
    assert log.count("elapsed time per iteration (ms)") == 5 and "tokens/s" in output and "left" in output


def test_a_request_to_stop_saves_a_checkpoint(tmp_path):
    write_run(tmp_path, make_config(), iterations=100_000, checkpoint_interval=50_000)
    process = start_training(tmp_path, 1, CACHE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(worker_pids(process)[-1], signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert checkpoint.read_meta(saved)["iteration"] == lines(tmp_path, "metrics")[-1]["iteration"]
    assert not (tmp_path / "error.json").exists()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model": {"num_expert": 4}}, "did you mean"),
        ({"plan": {"dp": 4}, "cluster": {"ranks_per_node": 4}, "workload": {"micro_batch_size": 1}}, "needs 4 ranks"),
        ({"workload": {"data": ["absent.txt"], "global_batch_size": 16, "micro_batch_size": 4}}, "absent.txt"),
    ],
)
def test_a_run_that_cannot_start_says_why_in_error_json(tmp_path, change, words):
    table = to_dict(make_config())
    for section, keys in change.items():
        table[section].update(keys)
    record.create_run(tmp_path, "run", table, [])
    process = start_training(tmp_path, 1, CACHE)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    error = json.loads((tmp_path / "error.json").read_text())
    assert words in error["message"] and words in output and error["oom"] is False
