"""The two entries that hold predictions against measurements, on two ranks; their numbers are the machine's."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plotting.files import Folder
from plotting.runset import to_dataset
from smartmoe import config, record
from smartmoe.bench import layer_accuracy, measure, plan_accuracy, profile_layer
from smartmoe.bench.plan_accuracy import Row
from smartmoe.planner.primitives import Profile, expert_sizes
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


LAYER_RUN = config.RunConfig(
    model=config.ModelConfig(num_layers=2, seq_len=16, hidden_size=32, ffn_size=32, num_experts=4, vocab_size=300),
    gate=config.GateConfig(kind="trace", trace="../t.npz"), plan=config.ParallelPlan(dp=2, ep=2),
    workload=config.Workload(global_batch_size=4, micro_batch_size=1, iterations=3, warmup_iterations=0),
    cluster=config.ClusterSpec(ranks_per_node=2),
)  # fmt: skip


def layer_run(folder, run=LAYER_RUN):
    """A run directory for layer_accuracy beside the trace that it names: iterations 1, 11 .. 41, only the last is other."""
    counts = np.tile(np.array([[10, 2, 2, 2], [2, 4, 6, 4]], np.int32)[None, None, :, None], (5, 2, 1, 1, 1))
    counts[4] = [8, 8, 0, 0]
    ExpertTrace(counts, 1 + 10 * np.arange(5), {"top_k": 2}).save(folder / "t.npz")
    bar = {"figure": "fig11", "panel": "two", "group": "", "series": "layer"}
    record.create_run(folder / "run", "run", config.to_dict(run), [bar])
    record.set_status(folder / "run", "ok")
    return folder / "run"


def _run(_world_rank, argv, run_dir):
    world = measure.start_world("cpu")
    rows = plan_accuracy.run(plan_accuracy.parse_args(argv), world)
    own = layer_accuracy.run(run_dir, world, repeat=1)
    again = layer_accuracy.run(run_dir, world, repeat=1, profile=run_dir / "profile.json")
    return [vars(row) for row in rows], own, again


def test_both_entries_measure_and_predict(folder):
    run_dir = layer_run(folder)
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
        "--runs",
        str(folder / "runs" / "fig10"),
    ]
    (rows, own, points), (_, *others) = spawn(_run, 2, steps, run_dir)
    assert len(rows) == 3 and all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in rows)
    written = json.loads((folder / "steps.json").read_text())
    assert written["rows"] == rows and {"mape", "tau", "regret", "blind_mape"} <= set(written)
    assert all(len(row["steps_ms"]) == len(row["losses"]) == 3 and row["num_measured"] == 2 for row in rows)
    assert np.ptp([row["losses"] for row in rows], axis=0).max() < 1e-3  # every plan trains the same model
    bars = to_dataset(Folder(folder / "runs", []), "set").figures["fig10"]
    fields = {bar.series: bar for bar in bars.bars()}
    assert set(fields) == {"fastmoe", "alpa", "smartmoe_static"} and {bar.group for bar in fields.values()} == {"2/+inf"}
    fastest = min(rows, key=lambda row: row["predicted_ms"])
    assert fields["smartmoe_static"].value == pytest.approx(fastest["measured_ms"]), fields["smartmoe_static"].unit
    again = ["--out", str(folder / "again.json"), "--measured", str(folder / "steps.json")]
    assert plan_accuracy.main([*common, "--batch", "8", *again]) == 0
    assert json.loads((folder / "again.json").read_text())["rows"] == rows
    assert others == [[], []]  # rank 0 alone writes
    assert [(p["iteration"], p["layer"]) for p in points] == [(i, layer) for i in (1, 21, 41) for layer in (0, 1)]
    assert all(p["measured_ms"] > 0 for p in points)
    # the same profile, the same predictions, whatever was measured: no point has a part in them
    assert [p["predicted_ms"] for p in own] == [p["predicted_ms"] for p in points]
    assert [p["measured_ms"] for p in own] != [p["measured_ms"] for p in points]
    assert len({p["naive_ms"] for p in points}) == 1
    at = {(p["iteration"], p["layer"]): p["predicted_ms"] for p in points}
    assert at[1, 0] == at[21, 0] != at[41, 0] == at[41, 1] != at[21, 1] == at[1, 1] != at[1, 0]
    profile = Profile.load(run_dir / "profile.json")
    assert {p.sizes["rows"] for p in profile.points["experts_forward"]} >= {32, 64}  # even, and all on one rank
    assert json.loads((run_dir / "accuracy.json").read_text()) == layer_accuracy.statistics(points)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["trace_iteration"]) for line in lines] == [(1, 1), (2, 21), (3, 41)]
    panel = to_dataset(Folder(folder, []), "set").figures["fig11"].panels[0]
    assert panel.source == "measured" and len(panel.naive_ms) == 6
    assert panel.predicted_ms == [p["predicted_ms"] for p in points]


ALONE = {"plan": config.ParallelPlan(), "cluster": config.ClusterSpec(ranks_per_node=1)}
REFUSED = {
    "plan": ({}, "experts in place over all ranks: plan pp1 dp2 .* on 1 ranks"),
    "policy": ({**ALONE, "online": config.OnlineConfig(policy="greedy", interval=10)}, 'policy = "greedy"'),
    "gate": ({"gate": config.GateConfig(kind="naive")}, 'gate.kind = "trace"'),
    "profile": (ALONE, "measured in bfloat16, the run is in float32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_runs_that_do_not_fit_are_refused_before_anything_is_measured(tmp_path, kind):
    change, message = REFUSED[kind]
    run_dir = layer_run(tmp_path, dataclasses.replace(LAYER_RUN, **change))
    record.write_json(tmp_path / "other.json", Profile({}, "bfloat16", {}).to_dict())
    with pytest.raises(ValueError, match=message):
        layer_accuracy.run(run_dir, measure.World(torch.device("cpu")), profile=tmp_path / "other.json")
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_failure_is_described_and_ends_the_process(tmp_path, monkeypatch, capsys):
    run_dir = layer_run(tmp_path, dataclasses.replace(LAYER_RUN, gate=config.GateConfig()))
    ends = []
    monkeypatch.setattr(measure.os, "_exit", ends.append)
    assert layer_accuracy.main([str(run_dir)]) == 0  # reached because the end above returns
    error = json.loads((run_dir / "error.json").read_text())
    assert ends == [1] and error["type"] == "ValueError" and not error["oom"]
    assert record.outcome(run_dir, 1)[0] == "failed" and "Traceback" in capsys.readouterr().err


def test_sizes_of_the_layer_profile_follow_from_the_number_of_ranks():
    shares = profile_layer.hot_shares(4)
    assert shares[0] == (1.0, False) and shares[-2] == (4.0, False) and shares[-1][1]
    assert profile_layer.hot_shares(1) == [(1.0, False)]
    for share, _ in shares:  # every copy is computed somewhere, up to rounding
        rows = [profile_layer._rows_of_slots(100, 4, share, (a, 1.0), 4, rank) for a in (0.0, 1.2) for rank in range(4)]
        assert all(380 <= sum(r.sum() for r in part) <= 404 for part in (rows[:4], rows[4:]))
        assert rows[0].sum() == max(r.sum() for r in rows)
    assert (profile_layer._rows_of_slots(4096, 4, 1.0, (0.0, 1.0), 4, 0) % 128).any()  # as routing does, not in whole tiles
    assert (profile_layer._rows_of_slots(100, 4, 1.0, (1.2, 0.5), 1, 0) == 100).all()
    rows = np.array([profile_layer._rows_of_slots(32768, 2, 1.3, law, 16, 0) for law in profile_layer.EXPERT_LAWS])
    sizes = expert_sizes(rows, 1536, 6144, 132)
    few, hot = sizes["active"] <= 8, sizes["deep_rows"] > 1.1 * sizes["rows"]
    assert [(few & hot).any(), (few & ~hot).any(), (hot & ~few).any(), (~hot & ~few).any()] == [True] * 4


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
    points = [
        {"measured_ms": m, "predicted_ms": p, "naive_ms": 2.0, "repeats_ms": [m - 0.1, m + 0.1]}
        for m, p in ((1.0, 1.1), (2.0, 2.0), (3.0, 3.0))
    ]
    found = layer_accuracy.statistics(points)
    assert found["scatter"] == pytest.approx(0.1 / 2) and found["ceiling_r2"] == pytest.approx(1 - 0.01 / (2 / 3))
    assert found["r2"] == pytest.approx(1 - 0.01 / 2) and found["naive_r2"] == 0.0
    assert found["naive_mape"] == pytest.approx((1 + 0 + 1 / 3) / 3)


@pytest.mark.parametrize(
    "memory_gbytes, plan, message", ((1e-6, "dp2-ep2-mb2", "out of memory"), (64.0, "tp2-mb8", "not a multiple"))
)
def test_a_figure_without_fastmoe_is_refused_before_anything_is_measured(folder, memory_gbytes, plan, message):
    (folder / "clusters" / "two.toml").write_text(CLUSTER.replace("64.0", str(memory_gbytes)))
    args = ["--device", "cpu", "--model", "small", "--cluster", "two", "--configs", str(folder), "--batch", "8"]
    args += ["--plans", plan, "--runs", str(folder / "fig10")]
    world = SimpleNamespace(num_ranks=2, ep_rank=0)  # which can measure nothing
    with pytest.raises(ValueError, match=f"--runs: FastMoE can have none of .*{plan[-1]}.*: .*{message}"):
        plan_accuracy.run(plan_accuracy.parse_args(args), world)


def test_a_plan_that_cannot_be_is_refused_before_anything_is_measured(folder):
    args = ["--device", "cpu", "--model", "small", "--cluster", "two", "--configs", str(folder), "--batch", "8"]
    args = plan_accuracy.parse_args([*args, "--plans", "dp2-mb1", "dp2-mb3"])
    with pytest.raises(ValueError, match="--plans dp2-mb3: not a legal plan: .* not a multiple"):
        plan_accuracy.run(args, SimpleNamespace(num_ranks=2, ep_rank=0))


def test_every_micro_batch_of_every_plan_has_its_own_loads():
    model = config.ModelConfig(num_layers=3, seq_len=2, num_experts=4, hidden_size=16)
    run = config.RunConfig(model=model, workload=config.Workload(global_batch_size=8))
    world = measure.World(torch.device("cpu"))
    seen = plan_accuracy.SampleCounts(run, [0, 1, 2], world)
    # samples 9 and 8 of the second global batch, two tokens each; the last copy was dropped
    routing = SimpleNamespace(expert_idx_TK=torch.tensor([[0, 1], [0, 3], [2, 1], [2, -1]]))
    seen(1, routing, torch.tensor([[18, 19], [16, 17]]))
    counts_BLE = seen.take()
    assert counts_BLE[1, 1].tolist() == [2, 1, 0, 1] and counts_BLE[0, 1].tolist() == [0, 1, 2, 0]
    assert counts_BLE.sum() == 7 and not seen.take().any()
    counts_IBLE = np.random.default_rng(0).integers(0, 9, (2, 12, 3, 4))
    plan, micro_batch = config.ParallelPlan(dp=2, tp=2), 3
    share = plan_accuracy.loads_of(counts_IBLE, run, plan, micro_batch).share
    assert share.shape == (2, 2, 4, 3, 4)
    for micro, dp_rank, tp_rank in np.ndindex(2, 2, 2):
        first = (micro * plan.dp + dp_rank) * micro_batch  # as Trainer.batch deals samples out
        want = counts_IBLE[:, first : first + 3].sum(1) / (micro_batch * 2 * model.top_k)
        assert share[:, micro, dp_rank * 2 + tp_rank] == pytest.approx(want)
