"""Configurations: every bad input is one clear error before anything starts."""

import dataclasses
import json

import pytest

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
    from_dict,
    load,
    replica_bytes,
    to_dict,
)

GOOD = RunConfig(plan=ParallelPlan(pp=2, dp=2, ep=2))


def test_a_good_configuration_passes_and_survives_json():
    assert check(GOOD) is GOOD
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(GOOD)))) == GOOD


BAD_SIZES = [
    ("model", ModelConfig(hidden_size=66), "hidden_size = 66 is not a multiple of model.num_heads"),
    ("model", ModelConfig(hidden_size=60, num_heads=4, ffn_size=126), "multiple of 16 bytes"),
    ("model", ModelConfig(top_k=9), "top_k = 9 is more than"),
    ("model", ModelConfig(num_layers=0), "num_layers = 0 must be at least 1"),
    ("model", ModelConfig(vocab_size=256), "at least 257"),
    ("gate", GateConfig(kind="switch"), "set model.top_k = 1"),
    ("gate", GateConfig(kind="nave"), "not one of naive"),
    ("gate", GateConfig(capacity=0.0), "must be positive"),
    ("gate", GateConfig(kind="trace"), "needs gate.trace"),
    ("layer", LayerConfig(shadowing=True), "overlapped"),
    ("online", OnlineConfig(interval=0), "interval = 0"),
    ("online", OnlineConfig(replicate="often", replica_slots=1), "not one of never"),
    ("online", OnlineConfig(replica_slots=-1), "at least 0"),
    ("online", OnlineConfig(replica_slots=2), 'replica_slots = 2 needs online.replicate'),
    ("online", OnlineConfig(policy="auto", replicate="history"), "replica_slots = 0 must be in 1 .. 4"),
    ("online", OnlineConfig(policy="greedy", replicate="history", replica_slots=1), "decided by online.policy"),
    ("online", OnlineConfig(replicate="exact", replica_slots=5), "replica_slots = 5 must be in 1 .. 4"),
    ("plan", ParallelPlan(dp=3), "= 3 ranks, but cluster cpu has"),
    ("plan", ParallelPlan(pp=2, dp=2, ep=4), "ep = 4 does not divide the dp * tp = 2"),
    ("plan", ParallelPlan(dp=4, ep=3), "ep = 3 does not divide"),
    ("plan", ParallelPlan(dp=4, vpp=2), "needs plan.pp > 1"),
    ("plan", ParallelPlan(pp=4, vpp=2), "less than plan.pp * plan.vpp"),
    ("plan", ParallelPlan(dp=0), "dp = 0 must be at least 1"),
    ("workload", Workload(global_batch_size=4), "needs as many micro-batches, but there are 1"),
    ("workload", Workload(global_batch_size=6), "not a multiple of micro_batch_size * dp = 4"),
    ("workload", Workload(warmup_iterations=20), "below iterations"),
    ("workload", Workload(clip_grad=-1.0), "clip_grad"),
    ("workload", Workload(dtype="float64"), "not one of float32"),
]


def test_replication_needs_other_ranks_room_and_no_shadows():
    online = OnlineConfig(policy="auto", replicate="history", replica_slots=2)
    check(dataclasses.replace(GOOD, online=online))
    alone = dataclasses.replace(GOOD, plan=ParallelPlan(dp=4), online=online)
    shadows = dataclasses.replace(GOOD, layer=LayerConfig(dispatcher="overlapped", shadowing=True), online=online)
    # per stage 2 layers x 2 slots of 64 x 128 x 2 + 128 + 64 numbers: weights and gradients, and 4 + 2 staged slots
    needed = 2 * (64 * 128 * 2 + 128 + 64) * (2 * 8 + 4 * (4 + 2))
    assert replica_bytes(dataclasses.replace(GOOD, online=online)) == needed
    full = dataclasses.replace(GOOD, online=online, cluster=ClusterSpec(memory_gbytes=(needed - 1) / 1e9))
    for config, words in ((alone, "plan.ep = 1"), (shadows, "take one of them"), (full, "take fewer")):
        with pytest.raises(ValueError, match=words):
            check(config)


@pytest.mark.parametrize("section,value,words", BAD_SIZES, ids=[words for _, _, words in BAD_SIZES])
def test_a_size_that_does_not_fit_is_named(section, value, words):
    with pytest.raises(ValueError) as error:
        check(dataclasses.replace(GOOD, **{section: value}))
    assert words in str(error.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="hidden_size.*clip_grad"):
        check(dataclasses.replace(GOOD, model=ModelConfig(hidden_size=66), workload=Workload(clip_grad=-1.0)))


def test_experts_that_no_rank_count_divides():
    config = RunConfig(model=ModelConfig(num_experts=6), plan=ParallelPlan(dp=4, ep=4))
    with pytest.raises(ValueError, match="ep = 4 does not divide model.num_experts = 6"):
        check(config)


def test_seven_ranks_do_not_fit_a_plan_of_four():
    with pytest.raises(ValueError, match="7 ranks"):
        check(RunConfig(plan=ParallelPlan(dp=7), cluster=ClusterSpec(ranks_per_node=4)))


BAD_TABLES = [
    ({"modle": {}}, 'unknown key "modle"; did you mean "model"?'),
    ({"model": {"num_expert": 4}}, 'model: unknown key "num_expert"; did you mean "num_experts"?'),
    ({"model": {"num_experts": "4"}}, "model: num_experts: expected int, got '4'"),
    ({"model": {"num_experts": True}}, "expected int, got True"),
    ({"plan": {"recompute": 1}}, "expected bool, got 1"),
    ({"model": 3}, "expected a table of ModelConfig keys"),
    ({"workload": {"data": "text"}}, "expected a list of strings"),
    ({"gate": {"capacity": "inf"}}, "expected float or NoneType"),
]


@pytest.mark.parametrize("table,words", BAD_TABLES, ids=[words for _, words in BAD_TABLES])
def test_a_wrong_key_or_type_is_named(table, words):
    with pytest.raises(ValueError) as error:
        from_dict(RunConfig, table, "run.toml")
    assert words in str(error.value) and str(error.value).startswith("run.toml")


@pytest.mark.parametrize("name,text", [("a.toml", "model = {"), ("a.json", "{"), ("a.toml", "\x00")])
def test_a_malformed_file_is_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=name):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.toml"):
        load(tmp_path / "absent.toml")


def test_toml_takes_whole_numbers_for_floats(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[gate]\ncapacity = 2\n[workload]\ndata = ['a.txt']\n")
    config = load(path)
    assert config.gate.capacity == 2.0 and config.workload.data == ("a.txt",)
