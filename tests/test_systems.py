import dataclasses

import pytest

from smartmoe import hosts, systems
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
)

BASE = {"model": ModelConfig(), "gate": GateConfig(), "workload": Workload(), "cluster": ClusterSpec(ranks_per_node=4)}
PLAN = ParallelPlan(pp=2, dp=2, ep=2)


@pytest.mark.parametrize("system", ["fastmoe", "fastermoe", "padded", "tutel", "deepspeed"])
def test_baselines_bring_their_own_plan(system):
    config = systems.build(system, **BASE)
    assert config.system == system and config.plan == ParallelPlan(dp=4, ep=4)
    with pytest.raises(ValueError, match="leave the plan out"):
        systems.build(system, plan=PLAN, **BASE)


def test_mechanisms_differ_as_described():
    built = {name: systems.build(name, **BASE) for name in ("fastmoe", "fastermoe", "padded", "tutel", "deepspeed")}
    assert built["fastmoe"].layer.dispatcher == "basic" and built["fastmoe"].gate.scope == "global"
    assert built["fastermoe"].layer.dispatcher == "overlapped" and built["fastermoe"].layer.shadowing
    assert built["padded"].layer.dispatcher == "padded" and built["padded"].gate.scope == "local"
    tutel = built["tutel"]
    assert (tutel.layer.dispatcher, tutel.layer.experts, tutel.gate.scope) == ("pipelined", "batched", "local")
    assert tutel.layer.overlap_degree == 0, "the number of pieces is searched"
    assert built["deepspeed"].workload.zero == 1 and built["padded"].workload.zero == 0


def test_only_other_packages_have_hosts_of_their_own():
    own = {name: system.host for name, system in systems.SYSTEMS.items() if system.host}
    assert own == {"deepspeed": "deepspeed", "deepspeed_artifact": "deepspeed", "megatron": "megatron"}
    assert hosts.host_of("deepspeed").module.endswith("deepspeed.pretrain_gpt")
    assert hosts.host_of("smartmoe") is hosts.host_of("my own name") is None
    assert set(system.host for system in systems.SYSTEMS.values()) - {""} == set(hosts.HOSTS)


def test_deepspeed_as_in_the_artifact_is_another_model():
    config = systems.build("deepspeed_artifact", **{**BASE, "gate": GateConfig(kind="gshard", capacity=1.2)})
    model = config.model
    assert (model.top_k, model.ffn_size, model.moe_every) == (1, 4 * model.hidden_size, 2)
    assert config.workload.micro_batch_size == 1 and config.workload.zero == 1
    assert config.gate.kind == "switch" and config.gate.capacity == 1.2
    assert hosts.check(config, "x") is config


def test_a_host_names_all_that_it_cannot_do():
    plan = ParallelPlan(pp=2, tp=2)
    online, work = OnlineConfig(policy="greedy"), Workload(dtype="float16", initial_loss_scale=1000.0, checkpoint_interval=5)
    parts = {"plan": plan, "online": online, "workload": work, "gate": GateConfig(kind="swipe"), "record_trace": True}
    config = RunConfig(system="deepspeed", layer=LayerConfig(dispatcher="direct"), **parts)
    with pytest.raises(ValueError) as error:
        hosts.check(config, "my.toml")
    words = ["my.toml", "plan.pp = 2", "plan.tp = 2", "swipe", "online", "[layer]", "power of two", "float16", "record_trace",
             "checkpoint_interval", "zero = 0 in float16"]  # fmt: skip
    assert not [word for word in words if word not in str(error.value)], str(error.value)
    for gate, model, word in (
        (GateConfig(kind="gshard"), ModelConfig(top_k=1), "top_k = 1"),
        (GateConfig(kind="naive"), ModelConfig(top_k=3), "top_k = 1 or 2"),
    ):
        with pytest.raises(ValueError, match=word):
            hosts.check(RunConfig(system="deepspeed", gate=gate, model=model), "x")
    recompute = RunConfig(system="deepspeed", plan=ParallelPlan(recompute=True), gate=GateConfig(kind="gshard"))
    with pytest.raises(ValueError, match="at random"):
        hosts.check(recompute, "x")
    for fine in (dataclasses.replace(recompute, gate=GateConfig()), dataclasses.replace(config, system="padded")):
        assert hosts.check(fine, "x") is fine


@pytest.mark.parametrize("system", ["alpa", "smartmoe_static", "smartmoe"])
def test_planned_systems_need_a_plan(system):
    with pytest.raises(ValueError, match="needs a plan"):
        systems.build(system, **BASE)
    assert systems.build(system, plan=PLAN, **BASE).plan == PLAN


def test_alpa_and_smartmoe_static_differ_in_the_plan_alone():
    alpa, ours = systems.build("alpa", plan=PLAN, **BASE), systems.build("smartmoe_static", plan=PLAN, **BASE)
    assert dataclasses.replace(alpa, system="smartmoe_static") == ours


def test_only_smartmoe_moves_experts():
    assert systems.build("smartmoe", plan=PLAN, **BASE).online == OnlineConfig(policy="greedy", interval=10)
    auto = OnlineConfig(policy="auto", replicate="history", replica_slots=1)
    assert systems.build("smartmoe", plan=PLAN, online=auto, **BASE).online == auto
    assert systems.build("smartmoe_static", plan=PLAN, **BASE).online.policy == "static"
    with pytest.raises(ValueError, match="smartmoe_static"):
        systems.build("smartmoe", plan=PLAN, online=OnlineConfig(policy="static"), **BASE)
    with pytest.raises(ValueError, match="no online placement"):
        systems.build("fastmoe", online=OnlineConfig(policy="greedy"), **BASE)


def test_unknown_and_misfitting_are_errors():
    with pytest.raises(ValueError, match="fastmoe, fastermoe"):
        systems.build("fastmoo", **BASE)
    with pytest.raises(ValueError, match="8 ranks, but cluster"):
        systems.build("alpa", plan=ParallelPlan(dp=8, ep=8), **BASE)
