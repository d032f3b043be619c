"""Copies of experts in a plan: tried where they are legal and fit, charged, told, and written for the trainer."""

import dataclasses

import numpy as np
import pytest

from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    ModelConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
    from_dict,
    replica_bytes,
)
from smartmoe.planner import commands, copies, described, inputs, loads, pool, search
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.layer_cost import exchange_ms

MODEL = ModelConfig(
    num_layers=4, hidden_size=1024, ffn_size=4096, num_heads=8, seq_len=1024, vocab_size=8192, num_experts=8
)  # fmt: skip
CLUSTER = ClusterSpec(
    name="two", device="cuda", ranks_per_node=4, intra_node_gbytes_per_s=100.0, tflops=100.0, memory_gbytes=32.0
)  # fmt: skip
PLAN = ParallelPlan(dp=4, ep=4)


def _cost(share_E, placement="balanced", memory_gbytes=32.0, num_micro=1):
    config = RunConfig(model=MODEL, workload=Workload(global_batch_size=64, micro_batch_size=4, dtype="bfloat16"))
    cluster = dataclasses.replace(CLUSTER, memory_gbytes=memory_gbytes)
    share = np.broadcast_to(np.asarray(share_E, float) / np.sum(share_E), (3, num_micro, 1, 4, 8))
    if num_micro > 1:  # another expert is hot in every micro-batch
        share = np.stack([np.roll(share[:, micro], 2 * micro, -1) for micro in range(num_micro)], 1)
    primitives = described.describe(cluster, described.Rates(), "bfloat16")
    return CostModel(config, cluster, primitives, loads.Loads(share, "test"), placement)


HOT = [9, 1, 1, 1, 1, 1, 1, 1]  # more than a rank's even share on one expert: no placement helps


def test_copies_pay_where_one_expert_is_hot_and_are_charged():
    cost = _cost(HOT)
    without = cost.estimate(PLAN, 4)
    found = copies.with_copies(cost, without)
    assert found.copies.startswith("history ") and found.mean_ms < 0.9 * without.mean_ms
    assert found.parts["experts"] < 0.7 * without.parts["experts"] and found.parts[copies.PART] > 0
    assert sum(found.parts.values()) == pytest.approx(found.mean_ms, rel=1e-6)
    assert found.memory.buffers > without.memory.buffers
    assert search.imbalance(cost, found) < 1.1 < 2.0 < search.imbalance(cost, without)
    # the same by hand: each hot expert's weights there once a step, its gradients back, in 4 layers
    numel = 2 * 1024 * 4096 + 4096 + 1024
    slots = int(found.copies.split()[1])
    model = copies.model_with_copies(cost, found)
    seen = model.rows(PLAN, 4)
    assert seen.sum(-1) == pytest.approx(np.full((3, 4), 4 * 4 * 1024 * 2), rel=1e-9), "no copy is lost"
    per_copy = float(cost.primitives.ms("all_to_all", ranks=4, intra_bytes=numel * 4, inter_bytes=0.0))
    assert 4 * per_copy <= found.parts[copies.PART] * 1.0001 and found.parts[copies.PART] <= 4 * 3 * slots * per_copy


@pytest.mark.parametrize("mode", ["history", "exact"])
def test_memory_of_copies_is_what_the_trainer_may_take(mode):
    """By hand, bf16, 2 slots, 4 layers: what stays, and what an exchange stages, beside which nothing else is alive."""
    cost = _cost(HOT)
    online = dataclasses.replace(cost.config.online, replicate=mode, replica_slots=2)
    config = dataclasses.replace(cost.config, plan=PLAN, online=online)
    without, found = (CostModel(c, cost.cluster, cost.primitives, cost.loads).memory(PLAN, 1) for c in (cost.config, config))
    numel = 2 * (2 * 1024 * 4096 + 4096 + 1024)
    assert found.buffers - without.buffers == pytest.approx(numel * 4 * (6 if mode == "history" else 2))
    if mode == "exact":
        assert found.transient - without.transient == pytest.approx(numel * 2 * (4 + 1))
    else:
        assert found.transient == pytest.approx(max(without.transient, 4 * numel * 12 - found.activations))
    most = replica_bytes(config)
    assert found.total - without.total <= most
    assert mode == "history" or found.total - without.total == pytest.approx(most)


def test_no_copies_where_they_are_useless_or_do_not_fit(monkeypatch):
    for share, plan in (([1] * 8, PLAN), (HOT, ParallelPlan(dp=4, ep=1))):  # even loads; every rank has all experts
        cost = _cost(share)
        estimate = cost.estimate(plan, 4)
        assert copies.with_copies(cost, estimate) is estimate
    cost = _cost(HOT)
    estimate = cost.estimate(PLAN, 4)
    monkeypatch.setattr(pool, "fits", lambda *args: False)
    assert copies.with_copies(cost, estimate) is estimate


def test_copies_of_each_micro_batch_where_micro_batches_differ():
    cost = _cost(HOT, num_micro=4)
    found = copies.with_copies(cost, cost.estimate(PLAN, 4))
    assert found.copies.startswith("exact ")
    assert all(e is None or e.mean_ms >= found.mean_ms for e in (
        copies._judge(cost, found, mode, slots) for mode in ("history", "exact") for slots in copies.SLOTS))  # fmt: skip


def test_a_search_ranks_with_copies_tells_them_and_writes_what_the_trainer_takes(tmp_path):
    cost = _cost(HOT)
    blind, seeing = (search.search(cost, 4, top=60, copies=tried) for tried in (False, True))
    assert all(not e.copies for e in blind.ranked) and any(e.copies for e in seeing.ranked)
    assert [e.mean_ms for e in seeing.ranked] == sorted(e.mean_ms for e in seeing.ranked)
    assert seeing.ranked[0].mean_ms <= blind.ranked[0].mean_ms
    with_them = next(e for e in seeing.ranked if e.copies)
    assert with_them.copies in search.format_table(seeing, 60)
    words = search.explain(cost, with_them, blind.ranked[0])
    assert f"copies {with_them.copies}" in words and copies.PART in words
    for placement, migrate in (("balanced", True), ("identity", False)):
        path = tmp_path / f"{placement}.toml"
        path.write_text(commands.run_of(cost, with_them, placement))
        run = check(from_dict(RunConfig, inputs.read_table(path), str(path)))
        mode, slots = with_them.copies.split()
        assert (run.online.replicate, run.online.replica_slots) == (mode, int(slots))
        assert (run.online.policy, run.online.migrate) == ("auto", migrate)


def test_copies_are_chosen_by_what_plans_are_ranked_by(monkeypatch):
    cost = _cost(HOT)
    without = cost.estimate(PLAN, 4)

    def judge(cost, estimate, mode, slots):  # with more slots the mean falls, the slowest samples rise
        step_ms = without.step_ms * {1: [0.8, 0.8, 0.8], 2: [0.5, 0.5, 1.1], 4: [0.3, 0.3, 1.3]}[slots]
        return dataclasses.replace(estimate, step_ms=step_ms, copies=f"{mode} {slots}")

    monkeypatch.setattr(copies, "_judge", judge)
    monkeypatch.setattr(search, "_best", lambda *args: ([without], 1))
    best = {score: search.search(cost, 4, top=1, score=score, copies=True).ranked[0] for score in search.SCORES}
    assert {score: found.copies for score, found in best.items()} == {"mean": "history 4", "p95": "history 1"}


def test_padded_buffers_are_of_one_size_and_get_no_copies():
    cost = _cost(HOT)
    config = dataclasses.replace(cost.config, layer=dataclasses.replace(cost.config.layer, dispatcher="padded"),
                                 gate=GateConfig(capacity=4.0))  # fmt: skip
    padded = CostModel(config, cost.cluster, cost.primitives, cost.loads)
    estimate = padded.estimate(PLAN, 4)
    assert copies.with_copies(padded, estimate) is estimate


def test_a_copy_costs_the_bytes_of_the_busiest_rank_out_or_in():
    # one expert has all tokens: its owner sends it to the three others, each of which takes one
    load = np.zeros((1, 1, 8))
    load[..., 0] = 1.0
    share, busiest = copies.replicate(load, [copies.Placement.identity(8, 4)], 1, 0.0)
    assert share[0, 0, 0] == pytest.approx(np.full(4, 0.25), abs=0.02) and busiest.tolist() == [[3]]


def test_copies_of_a_micro_batch_are_sent_twice_and_come_back_once():
    cost = _cost(HOT)
    config = pool.config_of(cost.config, cost.cluster, PLAN, 4)
    found = copies.CopyCosts.of(config, cost.cluster, cost.primitives, cost.loads, 4)
    numel = 2 * 1024 * 4096 + 4096 + 1024
    for exact, bytes_each in ((False, 2 + 2), (True, 2 + 2 + 2)):
        wanted = float(cost.primitives.ms("all_to_all", ranks=4, intra_bytes=numel * bytes_each, inter_bytes=0.0))
        assert found.copy_ms(np.array(1.0), exact) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dispatcher, slow, ranks_per_node, returns", [
    ("auto", 0.0, 4, 5), ("direct", 0.0, 8, 5), ("basic", 0.0, 4, 1), ("auto", 8.0, 4, 1), ("auto", 0.0, 2, 1),
])  # fmt: skip
def test_kernels_return_gradients_of_copies_in_every_pass_and_collectives_once(dispatcher, slow, ranks_per_node, returns):
    """The rule of replicas.build_replication: the direct dispatcher, in one node, over links that are not slowed down."""
    cost = _cost(HOT)
    cluster = dataclasses.replace(cost.cluster, slow_links_gbytes_per_s=slow, ranks_per_node=ranks_per_node, num_nodes=2)
    layer = dataclasses.replace(cost.config.layer, dispatcher=dispatcher)
    config = pool.config_of(dataclasses.replace(cost.config, layer=layer), cluster, PLAN, 4)
    found = copies.CopyCosts.of(config, cluster, cost.primitives, cost.loads, 5)
    size, near = 2 * (2 * 1024 * 4096 + 4096 + 1024), ranks_per_node >= 4

    def ms(num_bytes):
        return float(exchange_ms(cost.primitives, "all_to_all", 4, num_bytes * near, num_bytes * (not near)))

    assert found.copy_ms(np.array(1.0), False) == pytest.approx(ms(2 * size) + (returns - 1) * ms(size), rel=1e-9)
    assert found.copy_ms(np.array(1.0), True) == pytest.approx(ms(3 * size), rel=1e-9)


def test_plans_that_share_a_cost_model_are_judged_as_each_would_be_alone():
    share_SMTLE = np.random.default_rng(0).dirichlet(np.full(8, 0.4), (3, 2, 1, 4))
    one = dataclasses.replace(_cost(HOT).loads, share=share_SMTLE)

    def fresh():
        cost = _cost(HOT)
        return CostModel(cost.config, cost.cluster, cost.primitives, one, "balanced")

    shared, copied = fresh(), set()
    again = dataclasses.replace(PLAN, recompute=True)  # as many tokens in a micro-batch: the same copies
    for plan, micro_batch in ((PLAN, 16), (PLAN, 1), (ParallelPlan(dp=4, ep=2), 4), (again, 16)):
        for mode, slots in (("history", 1), ("history", 4), ("exact", 4)):
            made = [copies._model(cost, cost.estimate(plan, micro_batch), mode, slots) for cost in (shared, fresh())]
            assert np.array_equal(made[0][0]._host_share, made[1][0]._host_share)
            assert np.array_equal(made[0][1], made[1][1])
            found, wanted = (model.estimate(plan, micro_batch) for model, _ in made)
            assert np.array_equal(found.step_ms, wanted.step_ms) and found.memory == wanted.memory
            copied.add((made[0][0]._host_share > 0).sum())
    assert len(copied) > 4, "the cases differ"


@pytest.mark.parametrize("placement", ["identity", "balanced"])
def test_a_plan_that_is_slow_for_its_skew_alone_is_tried_with_copies_too(placement):
    """The best of all plans with copies, by brute force; without copies two others are faster than it."""
    cost = _cost(HOT, placement)
    fitting = pool.build(cost, 4, 16).fitting
    every = [cost.estimate(c.plan, c.micro_batch) for c in fitting]
    best = min((copies.with_copies(cost, estimate) for estimate in every), key=lambda estimate: estimate.mean_ms)
    plain = next(e.mean_ms for e in every if e.plan == best.plan)
    assert best.copies and sum(e.mean_ms < plain for e in every) >= 2
    for top in (1, 2, 6):  # of six, one is among both kinds
        result = search.search(cost, 4, top, fixed_micro_batch=16, copies=True)
        assert len({(e.plan, e.micro_batch) for e in result.ranked}) == len(result.ranked) == top
        assert search.words_of(result.ranked[0]) == search.words_of(best)
        assert result.ranked[0].mean_ms == best.mean_ms
