"""Which experts are shadowed: FasterMoE's rule."""

import numpy as np
import pytest

from smartmoe.config import ClusterSpec, LayerConfig
from smartmoe.dispatch import build_dispatcher
from smartmoe.dispatch.shadow import ShadowCost, choose_shadows

COST = ShadowCost(bytes_per_s=1e9, flops_per_s=1e12)
ROW_BYTES, EXPERT_BYTES, ROW_FLOPS = 4096, 16 * 2**20, 8.0 * 2**22


def choose(count_S, num_ranks, cost=COST, expert_bytes=EXPERT_BYTES):
    return choose_shadows(np.array(count_S), num_ranks, ROW_BYTES, expert_bytes, ROW_FLOPS, cost)


def by_descending_load(count_S):
    """The published rule for one expert a rank: walk experts by load, stop when the next gains nothing."""
    second_per_row = 3 * ROW_FLOPS / COST.flops_per_s + 4 * ROW_BYTES / COST.bytes_per_s
    order = sorted(range(len(count_S)), key=lambda s: -count_S[s])
    chosen, best = [], second_per_row * count_S[order[0]]
    for here, following in zip(order, order[1:], strict=False):
        latency = second_per_row * count_S[following] + (len(chosen) + 1) * EXPERT_BYTES / COST.bytes_per_s
        if latency >= best:
            break
        best = latency
        chosen.append(here)
    return sorted(chosen)


def test_one_expert_a_rank_is_the_published_rule():
    generator = np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        count_S = generator.permutation(5000)[:8].tolist()
        chosen = choose(count_S, 8)
        assert chosen == by_descending_load(count_S)
        sizes.add(len(chosen))
    assert {0, 1, 2} <= sizes


def test_several_experts_a_rank_look_at_the_fullest_rank():
    assert choose([5000, 100, 2100, 2000, 50, 60], 3) == [0, 2, 3], "the hottest, then both of the next fullest rank"
    assert choose([5000, 100, 2100, 2000, 50, 60], 3, expert_bytes=2**28) == [], "transfers too dear"
    assert choose([3000, 3000, 3000, 3000], 2) == [], "freeing one of two equally full ranks gains nothing"


@pytest.mark.parametrize("count_S", [[0, 0, 0, 0], [7, 7, 7, 7], [10, 0, 0, 0]])
def test_nothing_to_gain_is_no_shadow(count_S):
    assert choose(count_S, 4) == []


def test_at_least_one_expert_stays_at_home():
    assert choose([9, 8, 7], 3, ShadowCost(1e30, 1.0)) == [0, 1]


def test_the_cost_reads_the_slowest_link():
    cluster = ClusterSpec(num_nodes=1, intra_node_gbytes_per_s=100, inter_node_gbytes_per_s=10, tflops=50)
    assert ShadowCost.of(cluster) == ShadowCost(100e9, 50e12)
    many = ClusterSpec(num_nodes=2, intra_node_gbytes_per_s=100, inter_node_gbytes_per_s=10, tflops=50)
    assert ShadowCost.of(many).bytes_per_s == 10e9


def test_unknown_dispatcher_and_shadowing_without_a_cluster_are_refused():
    with pytest.raises(ValueError, match="basic, overlapped, padded"):
        build_dispatcher(LayerConfig(dispatcher="other"), None, slots_per_rank=1)
    with pytest.raises(ValueError, match="ClusterSpec"):
        build_dispatcher(LayerConfig(dispatcher="overlapped", shadowing=True), None, slots_per_rank=1)
