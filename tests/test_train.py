"""The training entry: the run directory it writes, how it stops, and how it fails."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from dist import spawn, start_training, worker_pids
from parity import CACHE, MODEL, make_config, make_trainer

from smartmoe import checkpoint, record, train
from smartmoe.config import GateConfig, LayerConfig, OnlineConfig, ParallelPlan, to_dict
from smartmoe.models import flops_per_sample
from smartmoe.optimizer import StepResult
from smartmoe.run_log import Progress, write_iteration
from smartmoe.trace import ExpertTrace
from smartmoe.trainer import IterationResult


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
    loads = lines(tmp_path, "loads")
    assert [(line["iteration"], line["layer"]) for line in loads] == [(i, layer) for i in range(1, 6) for layer in range(4)]
    counts_LE = trace.counts.sum((1, 3))
    for line in loads:
        assert line["expert_load"] == counts_LE[line["iteration"] - 1, line["layer"]].tolist()
        assert sum(line["rank_load"]) == sum(line["expert_load"])
    over_mean = [max(line["rank_load"]) / np.mean(line["rank_load"]) for line in loads]
    moved = [e for e in events if e["kind"] == "migrate"]
    for event in moved:  # the loads of that iteration are those before the move
        place = [(line["iteration"], line["layer"]) for line in loads].index((event["iteration"], event["layer"]))
        assert over_mean[place] == pytest.approx(event["max_over_mean_before"])
    assert moved
    log = (tmp_path / "train.log").read_text()
    assert log.count("elapsed time per iteration (ms)") == 5 and "tokens/s" in output and "left" in output
    assert all(line["tflops_per_rank"] > 0 for line in metrics) and "TFLOP/s a rank" in output
    assert "pp2 dp2 tp1 ep2" in output and "iterations 1 to 5" in output


def test_what_an_iteration_gave_is_what_is_written(tmp_path):
    """Every field under its own name; the rates from the time of the step."""
    config = make_config(ParallelPlan(dp=2, ep=2))
    result = IterationResult(3, 12.5, 1.5, 0.25, StepResult(0.75, True, 8.0, 1e-3), 1.25, 64, [], False, 4096)
    writer = record.RunWriter(tmp_path)
    write_iteration(writer, config, result, Progress(config, 0), spans=[{"layer": 1}], events=[{"kind": "keep"}])
    writer.close()
    (metric,) = lines(tmp_path, "metrics")
    batch = config.workload.global_batch_size
    tflops = batch * flops_per_sample(config.model) / 2 / 12.5e-3 / 1e12
    assert metric.pop("tflops_per_rank") == pytest.approx(tflops, rel=1e-3)
    assert metric == {
        "iteration": 3, "step_ms": 12.5, "lm_loss": 1.5, "balance_loss": 0.25, "grad_norm": 0.75, "skipped": True,
        "loss_scale": 8.0, "learning_rate": 1e-3, "load_max_over_mean": 1.25, "replica_bytes": 64, "peak_memory_bytes": 4096,
        "tokens_per_s": pytest.approx(batch * config.model.seq_len / 12.5e-3, abs=0.06), "consumed_samples": 3 * batch,
    }  # fmt: skip
    assert lines(tmp_path, "spans") == [{"iteration": 3, "layer": 1}] and lines(tmp_path, "events") == [{"kind": "keep"}]


def test_a_run_lets_go_of_its_graphs(tmp_path, monkeypatch):
    """Process groups, which end behind it, wait for graphs that hold their collectives."""
    closed = []
    monkeypatch.setattr(train.Trainer, "close", lambda trainer: closed.append(trainer.iteration))
    write_run(tmp_path, make_config(), iterations=1, warmup_iterations=0)
    assert train.main([str(tmp_path), "--cache", str(CACHE)]) == 0
    assert closed == [1]


def test_the_time_of_a_step_has_all_that_the_device_does(monkeypatch):
    monkeypatch.setattr("smartmoe.trainer.wait_for", lambda device: time.sleep(0.5))
    for policy in ("static", "auto"):  # the second reads nothing of the iteration itself
        trainer = make_trainer(make_config(online=OnlineConfig(policy=policy), gate=GateConfig(kind="naive")))
        assert trainer.run_iteration().step_ms >= 500, policy


def _run_out_of_rows(world_rank):
    """Two iterations of a run that has room for anything, and of one whose room is taken away before the second: losses,
    loads, masters and how often the second had to make its passes."""
    results = []
    for row_factor in (2.0, 1.0):
        layer = LayerConfig(dispatcher="direct", row_factor=row_factor)
        config = make_config(ParallelPlan(dp=2, ep=2), 2, model=MODEL, layer=layer, gate=GateConfig(kind="naive"))
        trainer = make_trainer(config)
        first = trainer.run_iteration()
        dispatchers = [each.dispatcher for each in trainer.layers.values()]
        if row_factor == 1.0:
            for dispatcher in dispatchers:
                dispatcher.num_careful = 1
                dispatcher.told.on_host.zero_(), dispatcher.told.most.zero_()
                dispatcher._most_needed = dispatcher._num_rows = 0
        num_runs, run = [], trainer.runner.run
        trainer.runner.run = lambda *batch, run=run, num_runs=num_runs: num_runs.append(1) or run(*batch)
        second = trainer.run_iteration()
        counts = trainer.online._recorder.sums(torch.device("cpu")).tolist()
        facts = [first.lm_loss, second.lm_loss, second.optimizer, second.load_max_over_mean, trainer.iteration, counts]
        results.append((facts, [master.clone() for master in trainer.optimizer.masters], len(num_runs)))
    return results


def test_an_iteration_whose_rows_do_not_fit_is_repeated_with_the_room_it_needs():
    for (roomy, wanted, once), (narrow, masters, runs) in spawn(_run_out_of_rows, 2):
        assert once == 1 and 1 < runs <= 1 + MODEL.num_layers and not roomy[2].skipped
        assert narrow == roomy and all(torch.equal(a, b) for a, b in zip(masters, wanted, strict=True))


@pytest.mark.parametrize("number,interval", [(signal.SIGTERM, 50_000), (signal.SIGUSR1, 0)])
def test_a_request_to_stop_saves_a_checkpoint(tmp_path, number, interval):
    write_run(tmp_path, make_config(), iterations=100_000, checkpoint_interval=interval)
    process = start_training(tmp_path, 1, CACHE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(worker_pids(process)[-1], number)
    process.communicate(timeout=120)
    assert process.returncode != 0
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert checkpoint.read_meta(saved)["iteration"] == lines(tmp_path, "metrics")[-1]["iteration"]
    assert not (tmp_path / "error.json").exists()


def write_bad_run(run_dir, change):
    table = to_dict(make_config())
    for section, keys in change.items():
        table[section].update(keys)
    record.create_run(run_dir, "run", table, [])


def assert_explained(run_dir, words, output):
    error = json.loads((run_dir / "error.json").read_text())
    assert words in error["message"] and words in output and error["oom"] is False


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model": {"num_expert": 4}}, "did you mean"),
        ({"workload": {"data": ["absent.txt"], "global_batch_size": 16, "micro_batch_size": 4}}, "absent.txt"),
    ],
)
def test_a_run_that_cannot_start_says_why_in_error_json(tmp_path, change, words, monkeypatch, capsys):
    write_bad_run(tmp_path, change)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        train.main([str(tmp_path), "--cache", str(CACHE)])
    assert ended.value.code == 1
    assert_explained(tmp_path, words, capsys.readouterr().err)


def test_a_run_with_too_few_ranks_says_how_many_it_needs(tmp_path):
    write_bad_run(tmp_path, {"plan": {"dp": 4}, "cluster": {"ranks_per_node": 4}, "workload": {"micro_batch_size": 1}})
    process = start_training(tmp_path, 1, CACHE)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert_explained(tmp_path, "needs 4 ranks", output)


def test_running_out_of_memory_says_what_would_need_less():
    config = make_config(ParallelPlan(dp=2, ep=1))
    advice = train.memory_advice(config)
    for way in ("micro_batch_size (2)", "recompute = true", "zero (0)", "plan.ep (1)", "plan.pp", "smartmoe plan", "dp2"):
        assert way in advice
    lean = make_config(ParallelPlan(recompute=True))
    assert "recompute = true" not in train.memory_advice(lean) and "zero" not in train.memory_advice(lean)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory with plan pp1 dp2.*tried to allocate 3 TB") as found:
        with train._explained_memory(config, torch.device("cpu")):
            raise torch.OutOfMemoryError("tried to allocate 3 TB")
    assert train._out_of_memory(found.value)
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory with plan pp1 dp2.*tried to allocate 4 TB$"):
        with train._explained_memory(config, torch.device("cpu")):
            try:
                raise torch.OutOfMemoryError("tried to allocate 4 TB")
            except RuntimeError as error:  # as torch.distributed.pipelining does
                raise RuntimeError("[Stage 0] failed to run forward") from error
    with pytest.raises(RuntimeError, match="^something else$"), train._explained_memory(config, torch.device("cpu")):
        raise RuntimeError("something else")
