import dataclasses

import numpy as np
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
)
from smartmoe.planner import described, layer_cost, loads
from smartmoe.planner.cost_model import CostModel, least_at_its_clock
from smartmoe.planner.layer_cost import LayerSetting, busiest_bytes, group_bytes, layer_times
from smartmoe.planner.parameters import Parameters
from smartmoe.planner.primitives import Curve, Primitives
from smartmoe.trace import ExpertTrace

MODEL = ModelConfig(
    name="m", num_layers=8, hidden_size=512, ffn_size=1024, num_heads=8, seq_len=512, vocab_size=4096, num_experts=16
)
WORK = Workload(global_batch_size=64, micro_batch_size=2, dtype="bfloat16")
CONFIG = RunConfig(model=MODEL, gate=GateConfig(kind="naive"), workload=WORK)
NODES = ClusterSpec(
    name="two", device="cuda", num_nodes=2, ranks_per_node=4, intra_node_gbytes_per_s=150.0,
    inter_node_gbytes_per_s=3.0, tflops=120.0, memory_gbytes=32.0,
)  # fmt: skip
PRIMITIVES = described.describe(NODES, described.Rates(), "bfloat16")


def _cost(chosen=None, config=CONFIG, placement="identity"):
    chosen = chosen or loads.zipf(config.model, config.gate)
    return CostModel(config, NODES, PRIMITIVES, chosen, placement)


def _setting(**changes):
    base = dict(
        model=MODEL,
        gate=GateConfig(),
        layer=LayerConfig(),
        tokens=1024,
        ep=4,
        stage_size=4,
        ranks_per_node=2,
        dtype_bytes=2,
    )
    return LayerSetting(**{**base, **changes})


PLANS = [
    ParallelPlan(dp=8, ep=8), ParallelPlan(dp=8, ep=4), ParallelPlan(pp=2, dp=4, ep=4), ParallelPlan(pp=4, dp=2, ep=1),
    ParallelPlan(pp=2, vpp=2, dp=4, ep=2), ParallelPlan(dp=4, tp=2, ep=8), ParallelPlan(pp=2, dp=4, ep=4, recompute=True),
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.describe().replace(" ", "-"))
def test_parts_add_up_and_the_bound_is_below(plan):
    cost = _cost()
    found = cost.estimate(plan, 2)
    assert sum(found.parts.values()) == pytest.approx(found.mean_ms, rel=1e-6)
    assert min(found.parts.values()) >= 0 and found.p95_ms >= found.mean_ms
    assert cost.lower_bound_ms(plan, 2) <= found.mean_ms * (1 + 1e-9)
    assert found.tokens_per_s == pytest.approx(64 * 512 / found.mean_ms * 1e3)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.describe().replace(" ", "-"))
@pytest.mark.parametrize("dispatcher", ["basic", "direct"])
def test_a_chip_that_waits_in_its_step_has_a_faster_clock_for_products(plan, dispatcher):
    """By hand: products are faster by the speedup times the share of the step in which nothing is computed; of exchanges, those
    that a kernel's stores make are no waiting."""
    config = dataclasses.replace(CONFIG, layer=LayerConfig(dispatcher=dispatcher))
    knows = Primitives(PRIMITIVES._device, PRIMITIVES._host, "test", {**PRIMITIVES.facts, "wait_speedup": 0.5})
    never, waits = (CostModel(config, NODES, p, loads.zipf(MODEL, CONFIG.gate)) for p in (PRIMITIVES, knows))
    before, found = never.estimate(plan, 2), waits.estimate(plan, 2)
    products = {"attention", "experts", "embedding and loss", "recomputation"} & set(before.parts)
    computes = products | {"gate", "permute", "accumulate", "optimizer"} | ({"exchange"} if dispatcher == "direct" else set())
    waited = sum(ms for name, ms in before.parts.items() if name not in computes) / before.mean_ms
    for name, ms in before.parts.items():
        assert found.parts[name] == pytest.approx(ms * np.exp(-0.5 * waited) if name in products else ms), name
    assert 0.0 < waited < 1.0 and sum(found.parts.values()) == pytest.approx(found.mean_ms, rel=1e-6)
    assert np.ptp(before.step_ms - found.step_ms) == pytest.approx(0.0, abs=1e-9)
    assert waits.lower_bound_ms(plan, 2) <= found.mean_ms * (1 + 1e-9)


def test_what_recomputation_sends_again_is_an_exchange():
    cost = _cost()
    plan = ParallelPlan(dp=4, tp=2, ep=8)
    once, twice = (cost.estimate(dataclasses.replace(plan, recompute=again), 2) for again in (False, True))
    forward = cost.layer_times(plan, 2).forward
    again = float(np.mean((forward["exchange"] + forward["counts"]).sum(-1))) * once.num_micro_batches
    assert twice.parts["exchange"] - once.parts["exchange"] == pytest.approx(again)
    assert twice.parts["gather and scatter"] == pytest.approx(1.5 * once.parts["gather and scatter"])
    assert twice.parts["attention"] == pytest.approx(once.parts["attention"]) and once.parts["gather and scatter"] > 0


def test_skew_costs_and_placement_takes_some_of_it_back():
    plan = ParallelPlan(dp=8, ep=8)
    level, skewed, balanced = (
        cost.estimate(plan, 2).mean_ms for cost in (_cost(loads.uniform(MODEL)), _cost(), _cost(placement="balanced"))
    )
    assert level < balanced < skewed
    capped = dataclasses.replace(CONFIG, gate=GateConfig(kind="naive", capacity=1.2))
    assert _cost(config=capped).estimate(plan, 2).parts["experts"] < _cost().estimate(plan, 2).parts["experts"]
    alone = ParallelPlan(pp=4, dp=2, ep=1)
    assert _cost(placement="balanced").estimate(alone, 2).mean_ms == pytest.approx(_cost().estimate(alone, 2).mean_ms)


def test_the_slow_network_regime_turns_the_ranking():
    """Wide expert parallelism over slow links loses to pipelining; uniform loads do not see how badly."""
    wide, deep = ParallelPlan(dp=8, ep=8), ParallelPlan(pp=2, dp=4, ep=4)
    ratio = {}
    for name, chosen in (("uniform", loads.uniform(MODEL)), ("skewed", None)):
        ratio[name] = _cost(chosen).estimate(wide, 2).mean_ms / _cost(chosen).estimate(deep, 2).mean_ms
    assert 1.0 < ratio["uniform"] < ratio["skewed"]


def test_exchange_bytes_by_hand():
    travel = np.array([[5.0, 1, 2, 0], [0, 7, 0, 3], [4, 0, 9, 0], [1, 1, 1, 1]])
    intra, inter = busiest_bytes(travel, _setting())
    row = MODEL.hidden_size * 2
    # nodes {0, 1} and {2, 3}: near sends 1 0 0 1, near receipts 0 1 1 0; 5 rows leave the first node, 6 the second
    assert intra == 1 * row and inter == 6 / 2 * row
    alike = np.array([[2.0, 4.0, 6.0, 8.0]])
    for ranks_per_node in (1, 2, 3, 4):
        setting = _setting(ranks_per_node=ranks_per_node)
        assert busiest_bytes(np.repeat(alike, 4, 0), setting) == busiest_bytes(alike, setting)
    assert busiest_bytes(alike, _setting(ranks_per_node=4)) == (3 * 8 * row, 0)
    assert busiest_bytes(alike, _setting(ranks_per_node=1)) == (0, 3 * 8 * row)
    assert group_bytes(100.0, 4, 1, 8) == (75.0, 0.0) and group_bytes(100.0, 4, 8, 8) == (0.0, 75.0)
    assert group_bytes(100.0, 16, 1, 8) == (93.75, 93.75 / 8)


def test_where_experts_live_decides_who_is_slowest():
    copies = np.zeros((1, 16))
    copies[0, :2] = 4096.0
    in_order = layer_times(PRIMITIVES, _setting(ranks_per_node=4), copies)
    apart = np.array([0, 4, 5, 6, 1, 2, 3, 7, *range(8, 16)])
    spread = layer_times(PRIMITIVES, _setting(ranks_per_node=4), copies, apart)
    assert spread.forward["experts"] < 0.7 * in_order.forward["experts"]
    assert spread.forward["exchange"] < in_order.forward["exchange"]


def test_mechanisms_differ_as_they_should():
    rng = np.random.default_rng(0)
    copies = rng.multinomial(2048, rng.dirichlet(np.ones(16)), size=4).astype(float)

    def took(**layer):
        found = layer_times(PRIMITIVES, _setting(layer=LayerConfig(**layer), ranks_per_node=4), copies)
        return float(found.forward_ms() + found.backward_ms())

    basic, overlapped, padded, pipelined, direct, loop = (
        took(**layer)
        for layer in (
            {}, dict(dispatcher="overlapped"), dict(dispatcher="padded"), dict(dispatcher="pipelined"),
            dict(dispatcher="direct"), dict(experts="loop"),
        )
    )  # fmt: skip
    assert overlapped < basic < padded and direct < basic < loop and pipelined < padded
    assert took(dispatcher="pipelined", overlap_degree=1) == pytest.approx(padded)
    assert not _setting(layer=LayerConfig(dispatcher="direct")).has_sync and _setting().has_sync
    local = GateConfig(capacity=1.2, scope="local")
    assert not _setting(layer=LayerConfig(dispatcher="padded"), gate=local).has_sync
    empty = layer_times(PRIMITIVES, _setting(), np.zeros((1, 16)))
    assert np.isfinite(empty.forward_ms()) and empty.forward_ms() > 0


def test_sources_that_are_alike_may_be_told_once():
    copies = np.random.default_rng(1).integers(0, 500, (1, 16)).astype(float)
    for dispatcher in ("basic", "padded", "direct"):
        setting = _setting(layer=LayerConfig(dispatcher=dispatcher))
        once, each = (layer_times(PRIMITIVES, setting, c) for c in (copies, np.repeat(copies, 4, 0)))
        assert once.forward_ms() == pytest.approx(each.forward_ms()), dispatcher
        assert once.backward_ms() == pytest.approx(each.backward_ms()), dispatcher
    owner = np.kron(np.eye(4), np.ones((4, 1)))  # [E, W], experts in order
    hosted = layer_times(PRIMITIVES, _setting(), copies, host_share=owner)
    assert hosted.forward_ms() == pytest.approx(layer_times(PRIMITIVES, _setting(), copies).forward_ms())


def test_gradients_are_reduced_over_those_who_share_them():
    cost, found = _cost(), {}
    for ep in (8, 4, 1):
        plan = ParallelPlan(dp=8, ep=ep)
        held = cost.parameters(plan)[0]
        groups = [(8, 1, held.dense), (plan.expert_dp, ep, held.expert)]
        want = 0.0
        for ranks, stride, count in groups:
            if ranks > 1:
                near, far = group_bytes(8 * count, ranks, stride, 4)
                want += float(layer_cost.exchange_ms(PRIMITIVES, "all_reduce", ranks, near, far))
        found[ep] = cost.estimate(plan, 2).parts["gradient reduction"]
        assert found[ep] == pytest.approx(want)
    assert found[8] < found[4] < found[1]


def test_zero_sends_weights_instead_of_gradients_back_and_updates_a_part():
    sharing = dataclasses.replace(CONFIG, workload=dataclasses.replace(WORK, zero=1))
    plan = ParallelPlan(dp=8, ep=2)
    without, with_it = (_cost(config=config).estimate(plan, 2).parts for config in (CONFIG, sharing))
    # 4 + 2 bytes instead of 8; an eighth of the dense numbers and a quarter of the experts' to update, in as many launches
    assert with_it["gradient reduction"] == pytest.approx(6 / 8 * without["gradient reduction"], rel=0.02)
    part = _cost().parameters(plan)[0].shared_out(plan)
    assert part.dense == _cost().parameters(plan)[0].dense / 8 and part.tensors == _cost().parameters(plan)[0].tensors
    launches_ms = float(PRIMITIVES.ms("optimizer_launches", tensors=part.tensors))
    assert with_it["optimizer"] == pytest.approx(launches_ms) and launches_ms < 0.75 * without["optimizer"]
    alone = [_cost(config=config).estimate(ParallelPlan(pp=8), 2).parts for config in (CONFIG, sharing)]
    assert alone[0] == alone[1]


def test_a_gate_that_talks_costs_a_reduction_over_its_stage():
    """Whatever expert group its ranks are in; a local or a silent one keeps its numbers."""
    ms, num_bytes = [], 2 * 8.0 * MODEL.num_experts * MODEL.top_k
    for plan in (ParallelPlan(dp=8, ep=2), ParallelPlan(pp=2, dp=4, ep=2)):
        gates = GateConfig(kind="noisy"), GateConfig(kind="noisy", scope="local"), GateConfig(kind="naive")
        talks, *silent = (_cost(config=dataclasses.replace(CONFIG, gate=gate)).layer_times(plan, 2) for gate in gates)
        assert np.allclose(silent[0].forward["gate"], silent[1].forward["gate"])
        ms.append(talks.forward["gate"] - silent[0].forward["gate"])
        spread = group_bytes(num_bytes, plan.stage_size, 1, NODES.ranks_per_node)
        wanted = PRIMITIVES.ms("all_reduce", ranks=plan.stage_size, intra_bytes=spread[0], inter_bytes=spread[1])
        latency = PRIMITIVES.facts.get("inter_latency_ms", 0.0) * (spread[1] > 0)
        assert ms[-1] == pytest.approx(float(wanted) + latency) and ms[-1].min() > 0
    assert (ms[0] > ms[1]).all(), "two nodes talk longer than one"


def test_overlap_by_hand():
    # two steps of 2 ms each way and 3 ms of work: arrivals at 2, 4; work ends at 5, 8; returns end at 7, 10
    assert layer_cost._overlapped(np.array(4.0), np.array(6.0), 2) == 10.0
    assert layer_cost._overlapped(np.array(4.0), np.array(6.0), 1) == 14.0


def test_loads_come_from_a_trace_of_this_model_only():
    counts = np.random.default_rng(0).multinomial(1000, np.ones(16) / 16, size=(6, 4, 4, 2)).astype(np.int32)
    trace = ExpertTrace(counts, np.arange(6) + 1, {"top_k": 2, "tokens_per_micro_batch_and_rank": 600})
    found = loads.from_trace(trace, MODEL, num_samples=3)
    assert found.share.shape == (3, 2, 4, 8, 16)
    assert found.share.sum(-1) == pytest.approx(1000 / 1200), "what a gate dropped is missing"
    assert (found.share[0, 0, 0, 0] == found.share[0, 0, 0, 1]).all(), "two layers of 8 share one of 4"
    estimate = _cost(found).estimate(ParallelPlan(pp=2, dp=4, ep=2), 2)
    assert estimate.mean_ms == pytest.approx(
        _cost(found.mean_over_micro_batches()).estimate(estimate.plan, 2).mean_ms, rel=0.1
    )
    for change in (dict(num_experts=8), dict(top_k=1)):
        with pytest.raises(ValueError, match="trace is of another model"):
            loads.from_trace(trace, dataclasses.replace(MODEL, **change))


def test_priors_are_distributions_that_tokens_can_have():
    for kind in loads.ZIPF_OF_GATE:
        share = loads.zipf(MODEL, GateConfig(kind=kind)).share
        assert share.sum(-1) == pytest.approx(1.0) and share.max() <= 1 / MODEL.top_k + 1e-12, kind
    limited = loads.zipf(MODEL, GateConfig(kind="naive", capacity=2.0)).share
    assert limited.max() == pytest.approx(2.0 / 16) and (limited.sum(-1) < 1).all()


def test_a_captured_pass_has_no_launches():
    """As graphs.why_not says: direct, experts in groups, which they are in bfloat16."""

    def find(plan, host_us=100.0, **changes):
        config = dataclasses.replace(CONFIG, layer=LayerConfig(dispatcher="direct"), **changes)
        slow_host = described.describe(NODES, described.Rates(host_us=host_us), "bfloat16")
        cost = CostModel(config, NODES, slow_host, loads.uniform(MODEL))
        found = cost.estimate(plan, 2)
        assert cost.lower_bound_ms(plan, 2) <= found.mean_ms * (1 + 1e-9)
        return found

    flat = ParallelPlan(dp=8, ep=8)
    captured, plain = (find(flat, workload=dataclasses.replace(WORK, cuda_graph=way)) for way in ("auto", "never"))
    waits = "launches and waits"
    assert captured.parts[waits] == pytest.approx(0, abs=1e-9) and plain.parts[waits] > captured.mean_ms
    device_ms = [{name: ms for name, ms in each.parts.items() if name != waits} for each in (captured, plain)]
    assert device_ms[0] == device_ms[1]
    piped, never = ParallelPlan(pp=2, dp=4, ep=4), dataclasses.replace(WORK, cuda_graph="never")
    captured, plain = find(piped), find(piped, workload=never)
    assert captured.parts[waits] == pytest.approx(0, abs=1e-9) and plain.mean_ms > 2 * captured.mean_ms
    # of a pass remain the graph's own launch, copies and messages
    least = captured.num_micro_batches * (6 + 5) * 100.0
    assert least < find(piped, host_us=1e5).parts[waits] < 2 * least
    early = OnlineConfig(replicate="history", replica_slots=1, return_early=True)
    assert find(flat, online=early).parts[waits] > 0
    half = dataclasses.replace(WORK, dtype="float16")  # products one by one, by the host's leave
    assert find(flat, workload=half).parts[waits] > 0


def test_a_slower_chip_counts_where_it_is_known_which_rank_has_it():
    """Only where one expert group is all there is: of several groups each has other chips."""
    cluster, plan = dataclasses.replace(NODES, num_nodes=1), ParallelPlan(dp=4, ep=4)
    config = dataclasses.replace(CONFIG, layer=LayerConfig(dispatcher="direct"))
    took = {}
    for name, pace, where in (("alike", [1.0] * 4, cluster), ("other", [0.5, 0.5, 0.5, 1.0], cluster),
                              ("fast", [0.5] * 4, cluster), ("groups", [0.5] * 4, NODES)):  # fmt: skip
        known = described.describe(NODES, described.Rates(), "bfloat16")
        known.facts["rank_pace"] = pace
        cost = CostModel(config, where, known, loads.uniform(MODEL))
        took[name] = float(cost.layer_times(plan, 2).forward["experts"].mean())
    assert took["other"] == took["alike"] == took["groups"] == pytest.approx(2 * took["fast"])


def test_a_chip_that_waits_for_others_in_other_layers_is_faster():
    cluster, plan = dataclasses.replace(NODES, num_nodes=1), ParallelPlan(dp=4, ep=4)
    config = dataclasses.replace(CONFIG, layer=LayerConfig(dispatcher="direct"))
    num_layers, num_experts = loads.uniform(MODEL).share.shape[-2:]
    took = {}
    for hot in ((0, 0), (0, 3), (0, None)):  # the rank that has all rows in each of two samples, None = even
        for speedup in (0.0, 0.5):
            share = np.zeros((2, 1, 1, num_layers, num_experts))
            for sample, rank in enumerate(hot):
                if rank is None:
                    share[sample] = 1 / num_experts
                else:
                    share[sample, ..., rank * num_experts // 4] = 1.0
            known = described.describe(NODES, described.Rates(kernel_us=0.0), "bfloat16")
            known.facts |= {"rank_pace": [1.0] * 4, "wait_speedup": speedup}
            cost = CostModel(config, cluster, known, loads.Loads(share, "by hand"))
            took[hot, speedup] = cost.layer_times(plan, 2).forward["experts"].mean((1, 2))
    for hot in ((0, 0), (0, None)):  # who never waits has no power left
        assert took[hot, 0.5] == pytest.approx(took[hot, 0.0])
    # idle ranks read no weights: they wait for all but that
    assert took[(0, 3), 0.5] == pytest.approx(np.exp(-0.25) * took[(0, 3), 0.0], rel=0.03)


def test_tensor_parallelism_puts_a_sequence_in_order_before_and_behind_attention():
    took = {}
    for ms in (1.0, 3.0):
        known = described.describe(NODES, described.Rates(host_us=0.0), "bfloat16")
        known._device["by_sample"] = Curve(np.array([ms, 0.0]))
        cost = CostModel(CONFIG, NODES, known, loads.uniform(MODEL))
        for plan in (ParallelPlan(dp=4, tp=2), ParallelPlan(dp=8)):
            took[ms, plan.tp] = [float(way.device) for way in cost._attention(plan, 2)]
    assert took[3.0, 2] == pytest.approx([ms + 2 * 2.0 for ms in took[1.0, 2]]) and took[3.0, 1] == took[1.0, 1]


def test_no_step_is_shorter_than_the_least_that_waiting_leaves_of_it():
    products = np.random.default_rng(0).uniform(0, 1, 100_000)
    for speedup in (0.0, 0.05, 0.2, 0.5, 2.0):
        real = 1 - (products * (1 - np.exp(-speedup * (1 - products)))).max()
        assert real - 1e-3 * speedup <= least_at_its_clock(speedup) <= real


def test_an_update_takes_as_long_as_its_work_or_its_launches():
    cost = _cost()
    work_ms = float(PRIMITIVES.ms("optimizer", numel=1e9))
    assert cost._update_ms(Parameters(dense=1e9, tensors=4)) == work_ms
    many = cost._update_ms(Parameters(dense=1e3, tensors=10_000))
    assert many == float(PRIMITIVES.ms("optimizer_launches", tensors=10_000)) and many > work_ms


def test_products_add_the_gradients_of_experts_up():
    plan = ParallelPlan(dp=8, ep=2)
    grouped, loop = (
        _cost(config=dataclasses.replace(CONFIG, layer=LayerConfig(experts=way))) for way in ("grouped", "loop")
    )
    held = grouped.parameters(plan)[0]
    assert held.without_experts().total == held.dense and held.without_experts().tensors == held.tensors - 8 * 4
    without, with_them = (each.estimate(plan, 2).parts["accumulate"] for each in (grouped, loop))
    assert without < 0.4 * with_them
    assert grouped.memory(plan, 2).transient < loop.memory(plan, 2).transient  # no such gradient is made
