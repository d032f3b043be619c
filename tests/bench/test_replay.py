import dataclasses
import json

import pytest
import torch

from smartmoe import config, record, trace
from smartmoe.bench import replay
from smartmoe.mesh import build_mesh
from tests.dist import spawn

MODEL = config.ModelConfig(hidden_size=16, ffn_size=16, seq_len=32, num_experts=8)
WORK = config.Workload(global_batch_size=8, micro_batch_size=1, iterations=12, warmup_iterations=1)


def make_run(run_dir, policy="greedy", interval=5, iterations=12, stride=1, num_experts=8, plan=None, online=None, **gate):
    run_dir.mkdir(parents=True)
    recorded = trace.synthetic(
        "zipf-strong", num_iterations=iterations, num_ranks=2, num_layers=3, num_micro_batches=2, num_experts=num_experts,
        num_copies=64, seed=1, exponent=1.2,
    )  # fmt: skip
    iteration = 1 + stride * torch.arange(iterations).numpy()
    dataclasses.replace(recorded, iteration=iteration).save(run_dir.parent / "trace.npz")
    run = config.RunConfig(
        model=MODEL, workload=WORK, gate=config.GateConfig(**{"kind": "trace", "trace": "../trace.npz", **gate}),
        online=online or config.OnlineConfig(policy=policy, interval=interval),
        plan=plan or config.ParallelPlan(dp=2, ep=2), cluster=config.ClusterSpec(ranks_per_node=2),
    )  # fmt: skip
    record.create_run(run_dir, "x", config.to_dict(run), [])
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _replay(_world_rank, folders):
    for folder in folders:
        run, recorded = replay.open_trace(config.from_dict(config.RunConfig, record.read_run(folder)["config"]), folder)
        replay.replay(run, recorded, 1, build_mesh(run.plan, torch.device("cpu")), folder)


def test_replay_moves_experts_by_earlier_iterations_only(tmp_path):
    greedy, static, strided = (tmp_path / name / "run" for name in ("greedy", "static", "strided"))
    make_run(greedy)
    make_run(static, policy="static")
    make_run(strided, interval=50, stride=10)
    copied, named = tmp_path / "copied" / "run", tmp_path / "named" / "run"
    history = {"policy": "auto", "migrate": False, "replicate": "history", "replica_slots": 1}
    make_run(copied, online=config.OnlineConfig(interval=5, **history))
    make_run(named, policy="static", trace="synthetic:one-hot,iterations=3,ranks=2")
    spawn(_replay, 2, [greedy, static, strided, copied, named])

    metrics = lines(greedy / "metrics.jsonl")
    assert [line["iteration"] for line in metrics] == list(range(1, 13)) and all(
        line["step_ms"] > 0 for line in metrics
    )
    events = lines(greedy / "events.jsonl")
    moved = [event["iteration"] for event in events if event["kind"] == "migrate"]
    assert [event["iteration"] for event in events] == [5, 10] and moved[0] == 5
    assert events[0]["num_moved"] > 0 and events[0]["cost_ms"] > 0

    # the fifth iteration itself still ran with the old placement
    loads, before = ([line["load_max_over_mean"] for line in lines(d / "metrics.jsonl")] for d in (greedy, static))
    assert loads[:5] == before[:5] and loads[5] < before[5]
    assert not lines(static / "events.jsonl")
    _check_loads(tmp_path, greedy, static, copied)
    assert [line["iteration"] for line in lines(named / "loads.jsonl")] == [1, 2, 3]  # of four layers, the second

    # iterations of a trace that steps by 10: every 50 of them = every fifth step
    assert [line["iteration"] for line in lines(strided / "metrics.jsonl")][:3] == [1, 11, 21]
    assert [event["iteration"] for event in lines(strided / "events.jsonl")] == [41, 91]


def _check_loads(tmp_path, greedy, static, copied):
    recorded = trace.ExpertTrace.load(tmp_path / "greedy" / "trace.npz").expert_load()[:, 1]
    for folder in (greedy, static, copied):
        loads, metrics = lines(folder / "loads.jsonl"), lines(folder / "metrics.jsonl")
        assert [line["expert_load"] for line in loads] == recorded.tolist() and {line["layer"] for line in loads} == {1}
        for line, metric in zip(loads, metrics, strict=True):
            assert sum(line["rank_load"]) == pytest.approx(sum(line["expert_load"]), abs=0.1)
            over_mean = 2 * max(line["rank_load"]) / sum(line["rank_load"])
            assert metric["load_max_over_mean"] == pytest.approx(over_mean, abs=1e-3)
    events = lines(copied / "events.jsonl")
    changed = [event["iteration"] for event in events if event["kind"] == "replicate"]
    assert changed and max(event["num_copies"] for event in events) > 0
    rank_loads = [[line["rank_load"] for line in lines(folder / "loads.jsonl")] for folder in (copied, static)]
    assert rank_loads[0][: changed[0]] == rank_loads[1][: changed[0]] and rank_loads[0][changed[0]] != rank_loads[1][changed[0]]


def test_what_does_not_fit_is_an_error_in_one_line(tmp_path):
    for name, message, kwargs in (
        ("experts", "4 experts, but model.num_experts = 8", {"num_experts": 4}),
        ("interval", "no multiple of 10", {"stride": 10, "interval": 15}),
        ("stages", "plan.pp = 1", {"plan": config.ParallelPlan(pp=2)}),
    ):
        run = make_run(tmp_path / name / "run", **kwargs)
        with pytest.raises(ValueError, match=message):
            replay.open_trace(run, tmp_path / name / "run")
    run = make_run(tmp_path / "absent" / "run")
    (tmp_path / "absent" / "trace.npz").unlink()
    with pytest.raises(ValueError, match="trace.npz"):
        replay.open_trace(run, tmp_path / "absent" / "run")


def test_interval_of_a_static_replay_does_not_matter(tmp_path):
    run = make_run(tmp_path / "run", policy="static", stride=10, interval=3)
    assert replay.open_trace(run, tmp_path / "run")[0].online.policy == "static"
