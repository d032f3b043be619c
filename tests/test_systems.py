import dataclasses

import pytest

from smartmoe import systems
from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, OnlineConfig, ParallelPlan, Workload

BASE = {"model": ModelConfig(), "gate": GateConfig(), "workload": Workload(), "cluster": ClusterSpec(ranks_per_node=4)}
PLAN = ParallelPlan(pp=2, dp=2, ep=2)


@pytest.mark.parametrize("system", ["fastmoe", "fastermoe", "deepspeed"])
def test_baselines_bring_their_own_plan(system):
    config = systems.build(system, **BASE)
    assert config.system == system and config.plan == ParallelPlan(dp=4, ep=4)
    with pytest.raises(ValueError, match="leave the plan out"):
        systems.build(system, plan=PLAN, **BASE)


def test_mechanisms_differ_as_described():
    built = {name: systems.build(name, **BASE) for name in ("fastmoe", "fastermoe", "deepspeed")}
    assert built["fastmoe"].layer.dispatcher == "basic" and built["fastmoe"].gate.scope == "global"
    assert built["fastermoe"].layer.dispatcher == "overlapped" and built["fastermoe"].layer.shadowing
    assert built["deepspeed"].layer.dispatcher == "padded" and built["deepspeed"].gate.scope == "local"


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


def test_unknown_unavailable_and_misfitting_are_errors():
    with pytest.raises(ValueError, match="fastmoe, fastermoe"):
        systems.build("fastmoo", **BASE)
    with pytest.raises(ValueError, match="not available yet"):
        systems.build("tutel", **BASE)
    with pytest.raises(ValueError, match="8 ranks, but cluster"):
        systems.build("alpa", plan=ParallelPlan(dp=8, ep=8), **BASE)
