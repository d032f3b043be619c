"""Runs one after another in one world: each as it would be alone, the first that fails ends the world."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from parity import make_config

from smartmoe import record, sequence
from smartmoe.config import GateConfig, ParallelPlan, to_dict

ROOT = Path(__file__).resolve().parents[1]


def test_no_rank_begins_a_run_before_the_last_one_is_written_down(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sequence, "do_run", lambda run_dir, *_: seen.append((run_dir / "finished.json").exists()) or 0)
    monkeypatch.setattr(sequence, "_print_into", lambda path: path.parent.mkdir())
    monkeypatch.setattr(sequence.dist, "barrier", lambda: seen.append((tmp_path / "a" / "finished.json").exists()))
    monkeypatch.setattr(sequence.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "0")
    assert sequence.main([str(tmp_path / "a")]) == 0 and seen == [False, True]


def test_a_run_has_ended_when_all_its_ranks_have(tmp_path, monkeypatch):
    record.create_run(tmp_path, "a", to_dict(make_config(ParallelPlan())), [], provenance={"entry": "train"})
    seen = []
    program = SimpleNamespace(main=lambda words, meshes: seen.append("trained") or 0)
    monkeypatch.setattr(sequence, "start_world", lambda config, alone: torch.device("cpu"))
    monkeypatch.setattr(sequence.importlib, "import_module", lambda name: program)
    monkeypatch.setattr(sequence.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(sequence.dist, "barrier", lambda: seen.append("all are here"))
    assert sequence.do_run(tmp_path, {}) == 0 and seen == ["trained", "all are here"]


def test_runs_follow_one_another_in_one_world(tmp_path):
    wide, pipeline = (make_config(plan) for plan in (ParallelPlan(dp=2, ep=2), ParallelPlan(pp=2)))
    recorded = dataclasses.replace(wide, record_trace=True)
    replayed = dataclasses.replace(wide, gate=GateConfig(kind="trace", trace="../first/trace.npz"))
    runs = {
        "first": (recorded, "train"), "pipeline": (pipeline, "train"), "again": (recorded, "train"),
        "replay": (replayed, "replay"), "too-large": (make_config(ParallelPlan(dp=4, ep=4)), "train"),
        "after": (wide, "train"),
    }  # fmt: skip
    for name, (config, entry) in runs.items():
        table = to_dict(config)
        table["workload"].update(iterations=3, warmup_iterations=0)
        record.create_run(tmp_path / name, name, table, [], provenance={"entry": entry})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smartmoe.sequence",
         *(str(tmp_path / name) for name in runs)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    problems = "".join(path.read_text() for path in tmp_path.glob("*/error.json") if path.parent.name != "too-large")
    assert done.returncode == 1 and not problems, problems + done.stderr
    losses = {}
    for name in runs:
        path = tmp_path / name / "metrics.jsonl"
        losses[name] = [json.loads(line).get("lm_loss") for line in path.read_text().splitlines()] if path.exists() else []
    assert losses["first"] == losses["again"] and len(set(losses["first"])) == 3, "what ran between leaves nothing behind"
    assert len(losses["pipeline"]) == len(losses["replay"]) == 3
    ended_well = [name for name in runs if (tmp_path / name / "finished.json").exists()]
    assert ended_well == ["first", "pipeline", "again", "replay"] and not losses["after"]
    error = json.loads((tmp_path / "too-large" / "error.json").read_text())
    assert "is of 4 ranks, this world has 2" in error["message"]
    assert "[3/3] loss" in (tmp_path / "again" / "console.log").read_text()
    assert "too-large" in (tmp_path / "too-large" / "console.log").read_text(), "each console has its own run"
