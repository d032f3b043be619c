import dataclasses

import numpy as np
import pytest

from plotting.files import Folder
from plotting.runset import to_dataset
from smartmoe import cli, record
from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, ParallelPlan, RunConfig, Workload
from smartmoe.placement import Placement, rank_load
from smartmoe.planner import described
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.loads import Loads
from smartmoe.planner.simulate import Policy, simulate
from smartmoe.solvers import solve_greedy
from smartmoe.trace import ExpertTrace

MODEL = ModelConfig(
    name="m", num_layers=4, hidden_size=512, ffn_size=2048, num_heads=8, seq_len=512, vocab_size=512, num_experts=16
)
CLUSTER = ClusterSpec(
    name="c",
    device="cuda",
    num_nodes=1,
    ranks_per_node=8,
    intra_node_gbytes_per_s=200.0,
    tflops=100.0,
    memory_gbytes=64.0,
)
PRIMITIVES = described.describe(CLUSTER, described.Rates(), "bfloat16")
CONFIG = RunConfig(
    model=MODEL, gate=GateConfig(kind="naive"), workload=Workload(global_batch_size=64, micro_batch_size=4, dtype="bfloat16"),
    plan=ParallelPlan(dp=8, ep=8), cluster=CLUSTER,
)  # fmt: skip


def _share(num_iterations=30, num_micro=2, seed=0, drift=0):
    """[I, M, 1, L, E]: a hot expert in each layer that moves on every `drift` iterations."""
    rng = np.random.default_rng(seed)
    weight = np.arange(1, 17) ** -1.3
    share = np.zeros((num_iterations, num_micro, 1, 4, 16))
    for row in range(num_iterations):
        for layer in range(4):
            base = np.roll(np.random.default_rng(layer).permutation(weight), row // drift if drift else 0)
            for micro in range(num_micro):
                share[row, micro, 0, layer] = rng.dirichlet(2000 * base / base.sum())
    return share


def _run(policy, share=None, config=CONFIG):
    return simulate(config, config.cluster, PRIMITIVES, Loads(_share() if share is None else share, "test"), policy)


STATIC = Policy()
GREEDY = Policy(kind="greedy", interval=10)
HISTORY = Policy(kind="replicate_history", interval=10, replica_slots=2)
EXACT = Policy(kind="replicate_exact", replica_slots=2)


def test_without_a_policy_it_is_the_cost_model():
    share = _share(5)
    found = _run(STATIC, share)
    cost = CostModel(CONFIG, CLUSTER, PRIMITIVES, Loads(share, "test"))
    assert found.step_ms == pytest.approx(cost.estimate(CONFIG.plan, 4).step_ms)
    assert found.overhead_ms.sum() == 0 and not found.events
    times = cost.layer_times(CONFIG.plan, 4)
    both = (times.forward_ms() + times.backward_ms()).sum(1)  # two micro-batches, each seen once
    assert found.layer_forward_ms + found.layer_backward_ms == pytest.approx(both)


def test_a_placement_serves_the_iterations_after_it_was_decided():
    share = _share(25)
    found = _run(GREEDY, share)
    assert (
        sorted({event["iteration"] for event in found.events})
        == [10, 20][: len({e["iteration"] for e in found.events})]
    )
    start = Placement.identity(16, 8)
    load = share[:, :, 0].sum(1)
    moved = [solve_greedy(load[9, layer], start) for layer in range(4)]
    want = np.mean([rank_load(load[10, k], p).max() / rank_load(load[10, k], p).mean() for k, p in enumerate(moved)])
    assert found.max_over_mean[10] == pytest.approx(want, rel=0.02)
    assert found.max_over_mean[9] > found.max_over_mean[10]
    assert (np.flatnonzero(found.overhead_ms) + 1).tolist() == sorted({e["iteration"] for e in found.events})
    extra = found.step_ms[9] - _run(STATIC, share).step_ms[9]
    assert extra == pytest.approx(found.overhead_ms[9]) and extra > 0, "iteration 10 runs as before, then pays the move"
    assert found.step_ms[11:].mean() < _run(STATIC, share).step_ms[11:].mean()


def test_replication_levels_more_than_moving_and_exact_more_than_history():
    share = _share(30, drift=3)
    balance = [_run(policy, share).max_over_mean[11:].mean() for policy in (STATIC, GREEDY, HISTORY, EXACT)]
    assert balance[3] < balance[2] < balance[0] and balance[3] < 1.2
    steady = [_run(policy).max_over_mean[11:].mean() for policy in (GREEDY, HISTORY)]
    assert steady[1] < steady[0]
    assert _run(EXACT, share).overhead_ms.min() > 0, "copies of every micro-batch are charged"
    slow = dataclasses.replace(CLUSTER, intra_node_gbytes_per_s=0.01)
    config = dataclasses.replace(CONFIG, cluster=slow)
    primitives = described.describe(slow, described.Rates(), "bfloat16")
    refused = simulate(config, slow, primitives, Loads(share, "test"), EXACT)
    assert not refused.overhead_ms.any(), "over slow links no copy is worth its time"


def test_pieces_do_not_change_the_result(monkeypatch):
    share = _share(11)
    for policy in (GREEDY, EXACT):
        whole = _run(policy, share)
        with monkeypatch.context() as patch:
            patch.setattr("smartmoe.planner.simulate._CHUNK_BYTES", 1.0)
            parts = _run(policy, share)
        assert parts.step_ms == pytest.approx(whole.step_ms) and parts.layer_forward_ms.shape == (11, 4)


@pytest.mark.parametrize("pp, vpp, dp, ep", [(2, 1, 4, 4), (2, 2, 4, 2), (4, 1, 2, 1)])
def test_pipelines_run(pp, vpp, dp, ep):
    config = dataclasses.replace(CONFIG, plan=ParallelPlan(pp=pp, vpp=vpp, dp=dp, ep=ep))
    for policy in (STATIC, GREEDY, HISTORY):
        found = _run(policy, config=config)
        assert np.isfinite(found.step_ms).all() and found.step_ms.shape == (30,)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="not legal: .*ep = 3"):
        _run(STATIC, config=dataclasses.replace(CONFIG, plan=ParallelPlan(dp=8, ep=3)))
    for settings, message in (
        (dict(kind="gredy"), "not one of"), (dict(interval=0), "at least 1"),
        (dict(kind="greedy", replica_slots=1), "slots to replication only"), (dict(kind="replicate_exact"), "slots"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Policy(**settings)


def test_the_command_writes_a_run_that_figures_draw_as_simulated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts/clusters").mkdir(parents=True)
    (tmp_path / "scripts/models.toml").write_text("[small]\nnum_layers = 2\nseq_len = 32\nnum_experts = 8\n")
    (tmp_path / "scripts/clusters/big.toml").write_text(
        'device = "cuda"\nnum_nodes = 512\nranks_per_node = 8\nmemory_gbytes = 64.0\n[rates]\n'
    )
    counts = np.full((6, 1, 2, 1, 8), 8, np.int32)
    ExpertTrace(counts, np.arange(6) + 1, {"top_k": 2}).save(tmp_path / "t.npz")
    common = ["simulate", "--model", "small", "--cluster", "big", "--trace", "t.npz"]
    for series, plan in (("fastmoe", "dp8-ep8-mb1"), ("smartmoe_static", "pp2-dp4-ep4-mb1")):
        run = [*common, "--gpus", "8", "--plan", plan, "--batch", "32", "--out", f"set/{series}"]
        assert cli.main([*run, "--bar", f"fig10,c,8/+inf,{series}"]) == 0
    assert "6 iterations simulated" in capsys.readouterr().out
    assert record.read_run("set/fastmoe")["source"] == "simulated"
    assert len((tmp_path / "set/fastmoe/spans.jsonl").read_text().splitlines()) == 12
    figure = to_dataset(Folder(tmp_path / "set", []), "set").figures["fig10"]
    bars = {bar.series: bar for bar in figure.bars()}
    assert bars["fastmoe"].source == "simulated" and bars["smartmoe_static"].speedup
    assert (
        cli.main([*common, "--gpus", "4096", "--plan", "dp4096-ep8-mb1", "--batch", "4096", "--policy", "greedy"]) == 0
    )
    for more, message in (
        (["--gpus", "8", "--plan", "dp8-ep8"], "give its micro-batch"),
        (["--gpus", "8", "--plan", "dp4-ep4-mb1"], "not legal"),
        (["--gpus", "8", "--plan", "dp8-ep8-mb1", "--iterations", "9"], "the trace has 6"),
        (["--gpus", "8", "--plan", "dp8-ep8-mb1", "--iterations", "0"], "--iterations 0: the trace has 6"),
        (["--gpus", "8", "--plan", "dp8-ep8-mb1", "--out", "set/fastmoe"], "holds a run already"),
        (["--gpus", "8", "--plan", "dp8-ep8-mb1", "--out", "set/fastmoe/run.json"], "or is a file"),
        (["--gpus", "8", "--plan", "dp8-ep8-mb1", "--bar", "fig10"], "FIGURE,PANEL,GROUP,SERIES"),
    ):
        assert cli.main([*common, *more]) == 2
        assert message in capsys.readouterr().err
