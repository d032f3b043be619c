"""Replication for one micro-batch from its own counts: integers only, few steps, the same on a CPU and in a GPU kernel.

Names as in `placement`: E experts, W ranks, S sources, G replica slots per rank. Loads are in units of 1 / BUCKETS token
copy, so that one bucket of an expert weighs as many units as the expert has copies, and nothing is ever rounded.
"""

from __future__ import annotations

import numpy as np

from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas, for_all_sources

PASSES = 2
NEAR = 256  # a rank within 1 / NEAR of the target is good enough


def solve_exact_step(
    count_SE: np.ndarray, placement: Placement, num_replica_slots: int, copy_cost: int = 0
) -> Replicas:
    """Copies of hot experts that bring the fullest rank close to the mean, few of them, all sources splitting alike.

    A pass has a target T and starts from the owners: bucket[e, owner of e] = BUCKETS, all other buckets 0; used[w] = 0
    replica slots; rank w weighs R[w] = sum over e of load[e] * bucket[e, w], where load[e] = sum over s of count[s, e].
    No rank and no expert is closed. One step (each ends by closing something or by filling a slot, so a pass has at most
    G * W + E + W steps):

    1. a = the heaviest rank that is not closed. None left, or R[a] <= T + T // NEAR: the pass ends.
    2. e = the expert owned by a, not closed, with the most load[e] * bucket[e, a]. None, or that is 0: close a.
    3. w = the lightest rank with used[w] < G that does not host e (it is not a, and bucket[e, w] = 0). None: close e.
    4. b = min(bucket[e, a], (min(R[a] - T, T - R[w]) + load[e] // 2) // load[e]), the buckets that fit, rounded to the
       nearest. If b <= 0 or b * load[e] < copy_cost * BUCKETS: close e.
    5. Otherwise copy: expert_of_replica[w * G + used[w]] = e; used[w] += 1; move b buckets of e from a to w, and
       b * load[e] of weight from R[a] to R[w].

    Ties go to the lowest index everywhere. T - R[w] in 4 may be negative: b is at most 0 then, whichever way the division
    rounds.

    The first pass has T = ceil(sum of R / W). If its fullest rank M ends above T + T // NEAR, a second pass has
    T + (M - T) // 2 as its target, which leaves slots to ranks that the first pass could not help; the pass with the
    smaller fullest rank counts, the first one when equal. No step makes the fullest rank heavier, so the result is never
    worse than no replicas.

    Args:
        count_SE: [W, E] integers, token copies of expert e on source rank s, the same array on every rank.
        placement: who owns which expert.
        num_replica_slots: G, at least 0.
        copy_cost: token copies that are computed in the time that one copy of an expert costs: fewer are not moved.
    Returns: Replicas whose shares are buckets / BUCKETS, the same for every source.
    """
    count_SE = np.asarray(count_SE)
    if count_SE.shape != (placement.num_ranks, placement.num_experts) or count_SE.dtype.kind not in "iu":
        expected = (placement.num_ranks, placement.num_experts)
        raise ValueError(
            f"solve_exact_step: counts are {count_SE.dtype} {count_SE.shape}, expected integers {expected}"
        )
    if (count_SE < 0).any() or num_replica_slots < 0 or copy_cost < 0:
        raise ValueError("solve_exact_step: counts, num_replica_slots and copy_cost must be at least 0")
    num_ranks, load_E = placement.num_ranks, count_SE.sum(axis=0, dtype=np.int64)
    owner_E = placement.rank_of_expert()
    target = -(-int(load_E.sum()) * BUCKETS // num_ranks)
    best, fullest = _pass(load_E, owner_E, num_ranks, num_replica_slots, target, copy_cost)
    for _ in range(1, PASSES):
        if fullest <= target + target // NEAR:
            break
        target += (fullest - target) // 2
        other, other_fullest = _pass(load_E, owner_E, num_ranks, num_replica_slots, target, copy_cost)
        if other_fullest < fullest:
            best, fullest = other, other_fullest
    expert_of_replica_WG, bucket_EW = best
    return Replicas(expert_of_replica_WG.ravel(), for_all_sources(bucket_EW / BUCKETS))


def _pass(load_E, owner_E, num_ranks, num_replica_slots, target, copy_cost):
    """((expert_of_replica_WG, bucket_EW), load of the fullest rank) of one pass of solve_exact_step."""
    num_experts, never, enough = len(load_E), np.iinfo(np.int64).max, target + target // NEAR
    bucket_EW, hosted_EW = np.zeros((num_experts, num_ranks), np.int64), np.zeros((num_experts, num_ranks), bool)
    bucket_EW[np.arange(num_experts), owner_E] = BUCKETS
    hosted_EW[np.arange(num_experts), owner_E] = True
    replica_WG = np.full((num_ranks, num_replica_slots), EMPTY, np.int64)
    kept_E = load_E * BUCKETS  # units still on the owner; -1 when the expert is closed
    heavy_W = np.zeros(num_ranks, np.int64)  # what each rank weighs, -1 when it is closed
    np.add.at(heavy_W, owner_E, kept_E)
    # The same, `never` where there is no free slot.
    light_W = heavy_W.copy() if num_replica_slots else np.full(num_ranks, never)
    # Where single numbers are read and written, lists take a third of an array's time.
    load, weight, used, own = load_E.tolist(), heavy_W.tolist(), [0] * num_ranks, {}
    for _ in range(num_ranks * num_replica_slots + num_experts + num_ranks):
        source = int(heavy_W.argmax())
        if heavy_W[source] <= enough:
            break
        if source not in own:
            own[source] = (owner_E == source).nonzero()[0]
        expert = int(own[source][kept_E[own[source]].argmax()]) if own[source].size else EMPTY
        if expert == EMPTY or kept_E[expert] <= 0:
            heavy_W[source] = -1
            continue
        host = int(np.where(hosted_EW[expert], never, light_W).argmin())
        num_buckets = 0
        if used[host] < num_replica_slots and not hosted_EW[expert, host]:
            room = min(weight[source] - target, target - weight[host])
            num_buckets = min(int(bucket_EW[expert, source]), (room + load[expert] // 2) // load[expert])
        if num_buckets <= 0 or num_buckets * load[expert] < copy_cost * BUCKETS:
            kept_E[expert] = -1
            continue
        moved = num_buckets * load[expert]
        replica_WG[host, used[host]] = expert
        used[host] += 1
        hosted_EW[expert, host] = True
        bucket_EW[expert, source] -= num_buckets
        bucket_EW[expert, host] = num_buckets
        kept_E[expert] -= moved
        weight[source] -= moved
        weight[host] += moved
        heavy_W[source], heavy_W[host] = weight[source], weight[host]  # a rank with room is not a closed one
        light_W[host] = weight[host] if used[host] < num_replica_slots else never
        if used[source] < num_replica_slots:
            light_W[source] = weight[source]
    return (replica_WG, bucket_EW), max(weight)
