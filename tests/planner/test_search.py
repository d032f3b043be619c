import argparse
import dataclasses
import itertools
import json
import random
import re

import numpy as np
import pytest

from smartmoe import cli
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
)
from smartmoe.planner import commands, described, loads, pool, search
from smartmoe.planner.cost_model import CostModel, Estimate
from smartmoe.planner.primitives import KINDS, Point, Profile

MODEL = ModelConfig(
    name="m", num_layers=4, hidden_size=256, ffn_size=512, num_heads=4, seq_len=64, vocab_size=512, num_experts=8
)
CONFIG = RunConfig(
    model=MODEL, gate=GateConfig(kind="naive"), workload=Workload(global_batch_size=16, dtype="bfloat16")
)
CLUSTER = ClusterSpec(
    name="c", device="cuda", num_nodes=2, ranks_per_node=4, intra_node_gbytes_per_s=50.0, inter_node_gbytes_per_s=2.0,
    tflops=50.0, memory_gbytes=1.67,
)  # fmt: skip


def _cost(chosen=None, cluster=CLUSTER, config=CONFIG, placement="identity"):
    primitives = described.describe(cluster, described.Rates(), "bfloat16")
    return CostModel(config, cluster, primitives, chosen or loads.zipf(config.model, config.gate, 6), placement)


@pytest.mark.parametrize("placement", ["identity", "balanced"])
def test_the_search_equals_judging_every_plan(placement):
    cost = _cost(placement=placement)
    found = search.search(cost, 8, top=12)
    space = pool.build(cost, 8)
    times = sorted(cost.estimate(c.plan, c.micro_batch).mean_ms for c in space.fitting)
    assert [e.mean_ms for e in found.ranked] == pytest.approx(times[:12])
    assert found.num_judged < len(space.fitting), "the bound settles some"
    tail = search.search(cost, 8, top=5, score="p95")
    p95 = sorted(cost.estimate(c.plan, c.micro_batch).p95_ms for c in space.fitting)
    assert [e.p95_ms for e in tail.ranked] == pytest.approx(p95[:5]) and tail.num_judged < len(space.fitting)


def test_equal_plans_stand_in_the_order_of_the_pool_whatever_their_bounds_are():
    class Cost:
        lower_bound_ms = staticmethod(lambda plan, micro_batch, closely=False, p95=False: 1 / micro_batch)
        estimate = staticmethod(lambda plan, micro_batch, known: Estimate(plan, micro_batch, 1, np.ones(2), {}, known, 1))

    fitting = [pool.Candidate(ParallelPlan(dp=8), micro_batch) for micro_batch in (1, 2, 4)]
    for score in search.SCORES:
        ranked, num_judged = search._best(Cost, fitting, 2, score)
        assert [e.micro_batch for e in ranked] == [1, 2] and num_judged == 3


@pytest.mark.parametrize("num_samples", [6, 20, 21])
def test_a_bound_of_the_tail_holds_where_waiting_makes_products_faster(num_samples):
    """Of few samples; of many, one that is far above all others may lift the mean and not the percentile."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, hidden_size=1024, ffn_size=4096, seq_len=1024))
    spread = loads.zipf(config.model, CONFIG.gate, num_samples).share
    once = np.full_like(spread, 1 / MODEL.num_experts)
    once[0] = np.eye(MODEL.num_experts)[0] * 0.5 + 0.5 / MODEL.num_experts
    plans = ParallelPlan(dp=8, ep=8), ParallelPlan(pp=2, dp=4, ep=4), ParallelPlan(pp=2, vpp=2, dp=4, ep=2)
    for share, speedup in itertools.product((spread, once), (0.0, 0.5)):
        cost = _cost(loads.Loads(share, "test"), config=config)
        cost.primitives.facts["wait_speedup"] = speedup
        for plan in plans:
            bounds = [cost.lower_bound_ms(plan, 2, closely=closely, p95=True) for closely in (False, True)]
            found = cost.estimate(plan, 2)
            assert max(bounds) <= found.p95_ms < found.step_ms.max(), plan
            assert (min(bounds) > 0) == (not speedup or num_samples <= 20), plan


@pytest.mark.parametrize("zero, kind", [(0, "noisy"), (2, "naive")])
def test_plans_that_share_a_model_are_judged_as_each_would_be_alone(zero, kind):
    """To the bit, after a search and one that is blind to loads, which share what loads do not change."""
    gate, online = GateConfig(kind=kind), OnlineConfig(replicate="history", replica_slots=1)
    layer = LayerConfig(dispatcher="auto" if zero else "basic", experts="grouped" if zero else "loop")
    model = dataclasses.replace(MODEL, num_layers=6, moe_every=2)
    work = dataclasses.replace(CONFIG.workload, global_batch_size=32, zero=zero)
    config = dataclasses.replace(CONFIG, model=model, gate=gate, layer=layer, workload=work, online=online)
    cost = _cost(config=config, placement="balanced", chosen=loads.zipf(model, GateConfig(kind="naive"), 3))
    for shared in (cost, cost.data_insensitive()):
        space = pool.build(shared, 8)
        for c in sorted(space.fitting, key=lambda c: (c.micro_batch % 3, c.name))[::11]:
            alone = CostModel(config, cost.cluster, cost.primitives, shared.loads, "balanced")
            found, wanted = (each.estimate(c.plan, c.micro_batch) for each in (shared, alone))
            assert c.memory == wanted.memory and found.parts == wanted.parts, c.name
            assert (found.step_ms == wanted.step_ms).all(), c.name
            bounds = [each.lower_bound_ms(c.plan, c.micro_batch) for each in (shared, alone)]
            assert bounds[0] == bounds[1] <= found.mean_ms, c.name


def test_legal_is_what_the_trainers_check_accepts():
    cost, num_gpus = _cost(), 4
    cluster = pool.cluster_of(CLUSTER, num_gpus)
    legal = set()
    sizes = range(1, num_gpus + 1)
    for pp, dp, tp, ep, vpp in itertools.product(sizes, sizes, sizes, sizes, range(1, 5)):
        for micro_batch, recompute in itertools.product(range(1, 17), (False, True)):
            plan = ParallelPlan(pp=pp, dp=dp, tp=tp, ep=ep, vpp=vpp, recompute=recompute)
            try:
                check(pool.config_of(CONFIG, cluster, plan, micro_batch))
            except ValueError:
                continue
            legal.add((plan, micro_batch))
    space = pool.build(cost, num_gpus)
    found = [(c.plan, c.micro_batch) for c in [*space.fitting, *(p.candidate for p in space.pruned)]]
    assert len(found) == len(set(found)) and set(found) == legal


def test_no_plan_for_even_loads_is_no_reason_not_to_have_one():
    """A capacity may drop more of the loads, so that there is room under them only."""
    gate = GateConfig(kind="naive", capacity=0.5)
    config = dataclasses.replace(WIDE, gate=gate)
    cost = _cost(config=config)
    space, even = pool.build(cost, 8), cost.data_insensitive()
    keys = [(c.plan, c.micro_batch) for c in (*space.fitting, *(p.candidate for p in space.pruned))]
    least, least_even = (min(each.memory(*key).total for key in keys) for each in (cost, even))
    cost = _cost(config=config, cluster=dataclasses.replace(CLUSTER, memory_gbytes=(least + least_even) / 2 / 0.94e9))
    args = argparse.Namespace(gpus=8, score="mean", micro_batch=None)
    text = commands._insensitive(cost, search.search(cost, 8, top=1), args)
    assert re.match("without looking at the loads: no plan of 8 GPUs fits safely: .* may not fit", text)


WIDE = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, hidden_size=1024, ffn_size=4096, seq_len=1024))


def test_what_does_not_fit_is_left_out_with_its_reason():
    gbytes = 3.2
    cost = _cost(config=WIDE, cluster=dataclasses.replace(CLUSTER, memory_gbytes=gbytes))
    space, even = pool.build(cost, 8), _cost(loads.uniform(WIDE.model), config=WIDE)
    assert space.num_too_large == sum(p.is_too_large for p in space.pruned) and space.fitting
    found = set()
    for pruned in space.pruned:
        needs = [each.memory(pruned.candidate.plan, pruned.candidate.micro_batch).total / 1e9 for each in (cost, even)]
        found.add((pruned.is_too_large, needs[0] > 1.08 * gbytes))
        start, least, end = "may not fit", "", r"3\.01 of 3\.2 GB are safe"
        if pruned.is_too_large:
            start, least = "is too large", " at the least"
            end = r"3\.2 GB are there, and predictions are at most 8% too high"
        words = re.fullmatch(rf"{start}: stage \d+ needs ([\d.]+) GB{least}, \w+ [\d.]+ of them; {end}", pruned.reason)
        assert float(words[1]) == pytest.approx(min(needs) if pruned.is_too_large else needs[0], abs=0.006)
    assert found == {(True, True), (False, True), (False, False)}, "too large; so for its skew alone; near the edge"
    table = search.format_table(search.search(cost, 8, top=1))
    rest = len(space.pruned) - space.num_too_large
    assert f"{space.num_too_large} of them too large for the memory, {rest} that may not fit; loads: Zipf" in table
    least = min(c.memory.total for c in space.fitting) / 1e9
    for gbytes, reason in ((least / 2, "is too large"), (least, "may not fit")):
        with pytest.raises(ValueError, match=f"no plan of 8 GPUs fits safely: .* comes nearest, but it {reason}: stage"):
            search.search(_cost(config=WIDE, cluster=dataclasses.replace(CLUSTER, memory_gbytes=gbytes)), 8)


@pytest.mark.parametrize("seed", range(8))
def test_classes_and_choice_of_random_spaces_are_those_of_brute_force(seed):
    """Plans in every way to write them, each judged by models of its own: under loads; under even ones, launched."""
    draw = random.Random(seed)
    model = dataclasses.replace(
        MODEL, num_layers=draw.choice((2, 3, 4)), hidden_size=draw.choice((512, 1024)), ffn_size=draw.choice((1024, 4096)),
        seq_len=draw.choice((512, 1024)), moe_every=draw.choice((1, 2)), num_experts=draw.choice((4, 8)),
    )  # fmt: skip
    gate = GateConfig(kind="naive", capacity=draw.choice((None, None, 1.2)))
    layer = LayerConfig(dispatcher=draw.choice(("basic", "direct", "padded" if gate.capacity else "direct")))
    work = dataclasses.replace(CONFIG.workload, global_batch_size=8, zero=draw.choice((0, 0, 1)))
    config, num_gpus = dataclasses.replace(CONFIG, model=model, gate=gate, layer=layer, workload=work), draw.choice((2, 4))
    placement, score, chosen = draw.choice(("identity", "balanced")), draw.choice(search.SCORES), loads.zipf(model, gate, 3)
    cluster = dataclasses.replace(CLUSTER, num_nodes=1, ranks_per_node=num_gpus)

    def alone(some, cuda_graph="auto"):
        run = dataclasses.replace(config, workload=dataclasses.replace(config.workload, cuda_graph=cuda_graph))
        return _cost(some, cluster, run, placement)

    needs, sizes = {}, range(1, num_gpus + 1)
    for pp, dp, tp, ep, vpp in itertools.product(sizes, sizes, sizes, sizes, range(1, 5)):
        for micro_batch, recompute in itertools.product(range(1, 9), (False, True)):
            plan = ParallelPlan(pp=pp, dp=dp, tp=tp, ep=ep, vpp=vpp, recompute=recompute)
            if plan.world_size == num_gpus and pool.why_illegal(config, cluster, plan, micro_batch) is None:
                ways = alone(chosen), alone(loads.uniform(model), "never")
                needs[plan, micro_batch] = [each.memory(plan, micro_batch).total for each in ways]
    device = sorted(total for total, _ in needs.values())[draw.randrange(len(needs) // 4, len(needs))]
    cluster = dataclasses.replace(cluster, memory_gbytes=device / 1e9)
    wanted = {
        key: None if total <= 0.94 * device else "too large" if min(total, even) > 1.08 * device else "may not fit"
        for key, (total, even) in needs.items()
    }
    space = pool.build(alone(chosen), num_gpus)
    found = {(c.plan, c.micro_batch): None for c in space.fitting}
    for pruned in space.pruned:
        found[pruned.candidate.plan, pruned.candidate.micro_batch] = "too large" if pruned.is_too_large else "may not fit"
    assert found == wanted and len(found) == space.num_legal and len(set(wanted.values())) > 1
    if None not in wanted.values():
        with pytest.raises(ValueError, match="fits safely"):
            search.search(alone(chosen), num_gpus)
        return
    times = sorted(search.value_of(alone(chosen).estimate(*key), score) for key, why in wanted.items() if why is None)
    ranked = search.search(alone(chosen), num_gpus, top=4, score=score).ranked
    assert [search.value_of(e, score) for e in ranked] == times[:4]


def test_what_no_plan_divides_is_said():
    model = dataclasses.replace(MODEL, num_layers=2, num_heads=2, seq_len=62)
    workload = dataclasses.replace(CONFIG.workload, global_batch_size=15)
    config = dataclasses.replace(CONFIG, model=model, workload=workload)
    cost = _cost(config=config, cluster=dataclasses.replace(CLUSTER, ranks_per_node=7))
    with pytest.raises(ValueError, match="no plan of 7 GPUs is legal for model m: .*does not divide"):
        search.search(cost, 7)
    for num_gpus, message in ((0, "at least 1"), (9, "has 2 x 4 = 8 ranks"), (6, "fill no whole nodes")):
        with pytest.raises(ValueError, match=message):
            pool.cluster_of(CLUSTER, num_gpus)
    assert pool.cluster_of(CLUSTER, 3).ranks_per_node == 3 and pool.cluster_of(CLUSTER, 8) == CLUSTER


def test_names_of_plans_read_back():
    plan = ParallelPlan(pp=2, vpp=2, dp=4, tp=2, ep=8, recompute=True)
    assert pool.parse_name(pool.name_of(plan, 3)) == (plan, 3)
    assert pool.parse_name("mb1") == (ParallelPlan(), 1)
    for text in ("pp2", "xx2-mb1", "pp-mb1", "pp2-pp2-mb1", "mb0", ""):
        with pytest.raises(ValueError, match="plan"):
            pool.parse_name(text)


def test_explaining_adds_up_and_names_the_reason():
    cost = _cost()
    result = search.search(cost, 8, top=3)
    other = search.find(cost, result, "dp8-ep8-mb2", 8)
    text = search.explain(cost, result.ranked[0], other)
    assert "pp" in search.format_table(result) and " times as fast, mostly by its " in text.splitlines()[-1]
    rows = [line.split() for line in text.splitlines()[1:]]
    gaps = [float(row[-1]) for row in rows if row[-1][0] in "+-" and "sum" not in row[0]]
    total = next(float(row[-1]) for row in rows if row[0] == "sum")
    assert sum(gaps) == pytest.approx(total, abs=0.1 * len(gaps))
    assert search.find(cost, result, "2", 8) is result.ranked[1]
    for word, message in (("9", "rows 1 .. 3"), ("dp8-ep3-mb2", "not a legal plan: .*ep = 3")):
        with pytest.raises(ValueError, match=message):
            search.find(cost, result, word, 8)


FILES = {
    "models.toml": "[small]\nnum_layers = 4\nhidden_size = 64\nffn_size = 64\nnum_experts = 8\n",
    "clusters/two.toml": 'device = "cpu"\nranks_per_node = 2\nmemory_gbytes = 64.0\n[rates]\nkernel_us = 2.0\n',
    "clusters/bare.toml": 'device = "cpu"\nranks_per_node = 2\n',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts" / "clusters").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "scripts" / name).write_text(text)
    return tmp_path


def _plan(*more, model="small", cluster="two", gpus="2"):
    return cli.main(["plan", "--model", model, "--cluster", cluster, "--gpus", gpus, "--batch", "8", *more])


def test_the_command_writes_a_run_that_train_reads(folder, capsys):
    assert _plan("--out", "best.toml", "--explain", "1", "dp2-ep2-mb1", "--pruned", "3", "--samples", "4") == 0
    text = capsys.readouterr().out
    assert "bottleneck" in text and "without looking at the loads" in text and "is" in text
    config = cli.read_config(folder / "best.toml", None)
    best = next(line for line in text.splitlines() if line.startswith("  1 ")).split()[1]
    assert pool.name_of(config.plan, config.workload.micro_batch_size) == best
    assert config.model.name == "small" and config.cluster.num_ranks == 2
    assert config.system == ("smartmoe" if config.plan.ep > 1 else "smartmoe_static")
    assert cli.main(["plan", "--model", "best.toml", "--cluster", "two", "--gpus", "1", "--loads", "uniform"]) == 0


def test_names_of_the_repository_are_found_from_any_folder_and_a_trace_may_be_synthetic(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--cluster", "inky", "--gpus", "2", "--batch", "8", "--trace", "synthetic:one-hot,iterations=3")
    assert cli.main(["plan", "--model", "gpt-cpu", *options, "--samples", "1"]) == 0
    assert "cluster inky" in capsys.readouterr().out


def test_slow_links_make_pipelines_win_and_are_in_the_run(folder, capsys):
    rows = {}
    for rate in ("0", "0.002"):
        options = ("--slow-links", rate, "--out", f"{rate}.toml", "--samples", "2", "--loads", "uniform", "--top", "99")
        assert _plan(*options) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines() if line[:3].strip().isdigit()]
        rows[rate] = {words[1]: float(words[2]) for words in table if "mb" in words[1]}
    assert rows["0"]["dp2-ep2-mb1"] < rows["0"]["pp2-mb1"] and rows["0.002"]["dp2-ep2-mb1"] > rows["0.002"]["pp2-mb1"]
    slow = cli.read_config(folder / "0.002.toml", None)
    assert slow.cluster.slow_links_gbytes_per_s == 0.002 and "links slowed to 0.002 GB/s" in slow.cluster.name
    assert cli.read_config(folder / "0.toml", None).cluster.slow_links_gbytes_per_s == 0


def test_bad_input_is_named_before_anything_runs(folder, capsys):
    for settings, message in (
        (dict(model="smal"), 'did you mean "small"'),
        (dict(cluster="tow"), 'did you mean "two"'),
        (dict(cluster="bare"), "neither a profile nor [rates]"),
        (dict(gpus="3"), "1 x 2 = 2 ranks"),
    ):
        assert _plan(**settings) == 2
        assert message in capsys.readouterr().err
    assert _plan("--trace", "nowhere.npz") == 2 and "nowhere.npz" in capsys.readouterr().err
    assert _plan("--trace", "synthetic:zipf-strongg") == 2 and "--trace synthetic:zipf-strongg: " in capsys.readouterr().err
    for options, message in (
        (("--top", "0"), "--top 0: at least 1"),
        (("--micro-batch", "0"), "--micro-batch 0: at least 1"),
        (("--out", "nowhere/best.toml"), "nowhere/best.toml: cannot write this file"),
        (("--out", "scripts"), "scripts: cannot write this file: is a folder"),
        (("--batch", "-3"), "--batch -3: at least 1"),
        (("--configs", "nowhere", "--model", "run.toml"), "nowhere/clusters: none; --configs names another folder"),
        (("--explain", "1", "16"), "--explain 16: the table has rows 1 .. 15"),
        (("--explain", "1", "dp2"), '--explain dp2: plan "dp2": give its micro-batch'),
        (("--explain", "dp2-mb3", "1"), "--explain dp2-mb3: not a legal plan: workload.global_batch_size = 8"),
    ):
        assert _plan(*options) == 2
        found = capsys.readouterr()
        assert message in found.err and not found.out, "said before the search"
    assert _plan("--gate", "switch") == 2 and "top_k = 1" in capsys.readouterr().err
    (folder / "scripts/clusters/two.toml").write_text(FILES["clusters/two.toml"] + "colour = 1\n")
    assert _plan() == 2 and 'unknown key "colour"' in capsys.readouterr().err


def _measured(path, dtype, **facts):
    """A profile whose times are those of a described cluster."""
    primitives, points = described.describe(CLUSTER, described.Rates(), dtype), {}
    for name, kind in KINDS.items():
        for scale in (64, 256, 1024) if kind.sizes else (1,):
            sizes = {
                key: 0.0 if key == "inter_bytes" else float(scale * (1 + place)) for place, key in enumerate(kind.sizes)
            }
            times = [
                dict.fromkeys(("median", "p10", "p90"), float(ms(name, **sizes)))
                for ms in (primitives.ms, primitives.host_ms)
            ]
            points.setdefault(name, []).append(Point(sizes, *times))
    path.write_text(json.dumps(Profile(points, dtype, {"ranks": 2, **facts}).to_dict()))


def test_a_measured_profile_beside_the_cluster_is_taken(folder, capsys):
    _measured(folder / "scripts/clusters/bare.profile.json", "float32")
    assert _plan(cluster="bare") == 0 and "(measured)" in capsys.readouterr().out
    assert _plan("--dtype", "bfloat16", cluster="bare") == 2
    assert "was measured in float32, the plan is for bfloat16" in capsys.readouterr().err
    _measured(folder / "p.json", "float32", memory_gbytes=1e-3)
    assert _plan("--profile", "p.json") == 2 and "; 0.001 GB are there" in capsys.readouterr().err, "as found there"
    _measured(folder / "p.json", "float32", memory_gbytes=1e3)
    text = FILES["clusters/two.toml"].replace("memory_gbytes = 64.0", "memory_gbytes = 0.5")
    (folder / "scripts/clusters/two.toml").write_text(text)
    assert _plan("--profile", "p.json") == 2 and "; 0.5 GB are there" in capsys.readouterr().err, "as the cluster says"
    (folder / "p.json").write_text("{}")
    assert _plan("--profile", "p.json") == 2 and "smartmoe profile" in capsys.readouterr().err


def test_what_may_not_fit_is_said_wherever_it_is_named(folder, capsys):
    sizes = ("num_layers", "num_experts", "num_heads", "hidden_size", "ffn_size", "seq_len", "vocab_size")
    model = "\n".join(f"{size} = {getattr(WIDE.model, size)}" for size in sizes)
    (folder / "scripts/models.toml").write_text(f"[small]\n{model}\n")
    cluster = FILES["clusters/two.toml"].replace('"cpu"', '"cuda"').replace("ranks_per_node = 2", "ranks_per_node = 8")
    (folder / "scripts/clusters/two.toml").write_text(cluster.replace("64.0", "2.6"))
    may_not = r" may not fit: stage 0 needs 2\.\d+ GB, outside 1.50 of them; 2.44 of 2.6 GB are safe"
    too_large = r" is too large: stage 0 needs [3-9]\.\d+ GB at the least, .*; 2.6 GB are there, .*"
    large = "dp8-ep4-mb1"
    assert _plan("--gate", "naive", "--pruned", "999", "--explain", "1", large, gpus="8") == 0
    lines = capsys.readouterr().out.splitlines()
    reasons = [line for line in lines if line.startswith("left out: ")]
    near = next(line.split()[2] for line in reasons if re.fullmatch(r"left out: \S+" + may_not, line))
    assert any(re.fullmatch(f"left out: {large}{too_large}", line) for line in reasons)
    assert any(re.fullmatch(large + too_large, line) for line in lines), "explained"
    assert any(re.fullmatch(r"without looking at the loads: \S+, which under them" + may_not, line) for line in lines)
    for name, reason in ((near, may_not), (large, too_large)):
        common = ["--model", "small", "--cluster", "two", "--gpus", "8", "--batch", "8", "--iterations", "2"]
        assert cli.main(["simulate", *common, "--plan", name]) == 0
        assert re.fullmatch(name + reason, capsys.readouterr().out.splitlines()[-1])


def test_a_rate_of_links_that_cannot_be_is_said_before_ranks_start(capsys):
    assert cli.main(["profile", "--out", "x.json", "--slow-links", "-3"]) == 2
    assert "--slow-links -3: GB/s must be positive" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["profile", "--out", "x.json", "--slow-links", "fast"])
    assert "invalid float value: 'fast'" in capsys.readouterr().err
