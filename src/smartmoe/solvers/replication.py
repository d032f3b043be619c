"""Replication from history: which experts get copies on which ranks, for many layers at once.

Layer 0: numpy only. Axes: Y layers, S source ranks, E experts, W ranks, G replica slots per rank; X hosts of replicated
experts, all layers in one list (a host is one rank's share in one expert). Loads are token copies.

A plan serves iterations that it has not seen, so it does not stop at the fewest copies that would balance the counts given:
splitting a hot expert over more hosts also makes its next change count less on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas, most_copies
from smartmoe.solvers.exact_step import solve_exact_step
from smartmoe.solvers.ownership import solve_least_move

TINY = 1e-100  # stands for the load of a layer that has none
HALVINGS = 8  # of the interval, its ends a factor 1000 apart, in which the load that a host may have is sought
SLACK = 0.05  # how far above the mean the fullest rank may be before the other solver is asked too
SCALE = 1 << 24  # token copies to which counts are scaled for it
BALANCE_STEPS = 12  # of shifting tokens between the hosts of an expert


def solve_replicas(
    count_SE: np.ndarray,
    placement: Placement,
    num_replica_slots: int,
    *,
    copy_cost: float = 0.0,
    node_of_rank_W: Sequence[int] | None = None,
    local: bool = True,
) -> Replicas:
    """`solve_replicas_layers` for one layer: counts [W, E], one Placement, one Replicas."""
    found = solve_replicas_layers(
        np.asarray(count_SE)[None],
        [placement],
        num_replica_slots,
        copy_cost=copy_cost,
        node_of_rank_W=node_of_rank_W,
        local=local,
    )
    return found[0]


def solve_replicas_layers(
    count_YSE: np.ndarray,
    placements: Sequence[Placement],
    num_replica_slots: int,
    *,
    copy_cost: float = 0.0,
    node_of_rank_W: Sequence[int] | None = None,
    local: bool = True,
) -> list[Replicas]:
    """Choose copies of experts for every layer and split their tokens, to make the fullest rank light.

    1. How many hosts: the hottest experts get hosts until no expert brings more than some load to a host; that load is the
       least for which the slots suffice. An expert goes from n to n + 1 hosts only if each of its hosts gets rid of at
       least `copy_cost` by it.
    2. Which ranks: in G rounds every rank takes one copy at most, lighter ranks more heavily loaded copies.
    3. How much each host computes: from equal parts, shifted step by step from full to light ranks.
    4. Which tokens (`local`): of an expert's tokens, those on a host's own rank stay as far as the host's part reaches, then
       those of its node; what is left goes where there is room, from all sources alike. The parts of 3 do not change.

    Where that leaves the fullest rank more than SLACK above the mean or is not worth its copies, `solve_exact_step` is asked
    too, and preferred where it is cheaper by more than SLACK. A layer whose cost does not fall gets no replicas:
    cost = token copies on the fullest rank + copy_cost * the most copies that one rank sends or receives. Ties go to the
    lowest index; the same input gives the same output.

    Args:
        count_YSE: [Y, W, E] token copies (any unit, not negative) of each expert on each source rank.
        placements: Y, who owns which expert; the same ranks and experts in all.
        num_replica_slots: G, at least 0: the memory that replicas may take.
        copy_cost: token copies that are computed in the time that one copy of an expert costs in a step.
        node_of_rank_W: [W] node of each rank; left out, all ranks are on one node.
        local: let sources prefer near hosts; else all sources split alike, which takes less time and memory.
    Returns: Y Replicas, whose shares are whole buckets.
    """
    count_YSE = _checked(count_YSE, placements, num_replica_slots, copy_cost)
    num_ranks, num_experts = placements[0].num_ranks, placements[0].num_experts
    if num_ranks == 1 or num_replica_slots == 0:
        return [Replicas.none(placement, num_replica_slots) for placement in placements]
    owner_YE = np.stack([placement.rank_of_expert() for placement in placements])
    load_YE = count_YSE.sum(axis=1).astype(np.float64)
    num_hosts_YE = _num_hosts(load_YE, owner_YE, num_ranks, num_replica_slots, copy_cost)
    replica_YWG = _assign(load_YE, num_hosts_YE, owner_YE, num_ranks, num_replica_slots)
    hosts = _Hosts(replica_YWG, owner_YE, num_experts)
    share_X = hosts.balanced(load_YE)
    fullest_Y = hosts.rank_load(load_YE, share_X).max(axis=1)
    share_YEW = hosts.shares(share_X if local else hosts.whole_buckets(share_X) / BUCKETS)
    node_W = np.zeros(num_ranks, np.int64) if node_of_rank_W is None else np.asarray(node_of_rank_W)
    found = []
    for layer, placement in enumerate(placements):
        count_SE, share_EW = count_YSE[layer], share_YEW[layer]
        slots = tuple(replica_YWG[layer].ravel().tolist())
        copies_cost = copy_cost * most_copies(slots, owner_YE[layer], num_ranks) if copy_cost else 0.0
        cost = fullest_Y[layer] + copies_cost
        before, mean = np.bincount(owner_YE[layer], load_YE[layer]).max(), load_YE[layer].sum() / num_ranks
        if cost > min(before, mean * (1 + SLACK)):
            scale = SCALE / max(mean * num_ranks, TINY)
            whole_SE = np.rint(count_SE * scale).astype(np.int64)
            other = solve_exact_step(whole_SE, placement, num_replica_slots, round(copy_cost * scale))
            other_copies_cost = copy_cost * most_copies(other.expert_of_replica, owner_YE[layer], num_ranks)
            other_cost = other.host_load(count_SE).max() + other_copies_cost
            if other_cost * (1 + SLACK) < cost or other_cost < before <= cost:
                slots, share_EW = other.expert_of_replica, other.share_SEW[0]
                copies_cost = other_copies_cost
        if local:
            share_SEW = _prefer_near(count_SE, share_EW, (share_EW > 0).sum(axis=1) > 1, node_W)
        else:
            share_SEW = np.broadcast_to(share_EW, (num_ranks, *share_EW.shape))
        replicas = Replicas(slots, share_SEW)
        cost = replicas.host_load(count_SE).max() + copies_cost  # shares are whole buckets now
        found.append(replicas if cost < before else Replicas.none(placement, num_replica_slots))
    return found


def solve_joint(
    count_SE: np.ndarray,
    placement: Placement,
    num_replica_slots: int,
    *,
    copy_cost: float = 0.0,
    node_of_rank_W: Sequence[int] | None = None,
    local: bool = True,
    stay: Replicas | None = None,
) -> tuple[Placement, Replicas]:
    """Place owners knowing that replicas take the heat: few moves, then replicas on the new owners.

    Owners are placed by `solve_least_move` for what stays with them: each expert's load divided by its number of hosts.
    Arguments as in `solve_replicas`; `stay` is what that returns for them, where it is known already. Returns (placement,
    replicas); the placement given when moving does not make the fullest rank lighter than replicas alone.
    """
    options = {"copy_cost": copy_cost, "node_of_rank_W": node_of_rank_W, "local": local}
    if stay is None:
        stay = solve_replicas(count_SE, placement, num_replica_slots, **options)
    load_E = np.asarray(count_SE, np.float64).sum(axis=0)
    if placement.num_ranks > 1 and num_replica_slots > 0:
        owner_YE = placement.rank_of_expert()[None]
        load_E = load_E / _num_hosts(load_E[None], owner_YE, placement.num_ranks, num_replica_slots, copy_cost)[0]
    moved = solve_least_move(load_E, placement)
    if moved == placement:
        return placement, stay
    replicas = solve_replicas(count_SE, moved, num_replica_slots, **options)
    lighter = replicas.host_load(count_SE).max() < stay.host_load(count_SE).max()
    return (moved, replicas) if lighter else (placement, stay)


def _checked(count_YSE, placements, num_replica_slots: int, copy_cost: float) -> np.ndarray:
    count_YSE = np.asarray(count_YSE)
    sizes = {(placement.num_ranks, placement.num_experts) for placement in placements}
    if len(sizes) != 1 or count_YSE.shape != (len(placements), *next(iter(sizes))):
        raise ValueError(
            f"solve_replicas: counts have shape {count_YSE.shape} for {len(placements)} placements of (ranks, experts) "
            f"{sorted(sizes)}; expected [layers, ranks, experts] and one size"
        )
    if not (count_YSE.min() >= 0 and count_YSE.max() < np.inf):
        raise ValueError("solve_replicas: counts must be finite and not negative")
    if num_replica_slots < 0 or not copy_cost >= 0:
        raise ValueError(
            f"solve_replicas: num_replica_slots = {num_replica_slots} and copy_cost = {copy_cost} must be at least 0"
        )
    return count_YSE


def _num_hosts(load_YE, owner_YE, num_ranks: int, num_replica_slots: int, copy_cost: float) -> np.ndarray:
    """[Y, E] int64, in 1 .. W: how many hosts each expert should have; the slots suffice for them.

    The load that a host may have is bisected for all layers together. Going from n to n + 1 hosts takes
    load / (n * (n + 1)) from each, which must not be less than copy_cost.
    """
    limit_YE = np.where(load_YE > 0, float(num_ranks), 1.0)
    if copy_cost > 0:
        last_YE = np.floor((np.sqrt(1 + 4 * load_YE / copy_cost) - 1) / 2)  # the last n that pays
        limit_YE = np.minimum(limit_YE, last_YE + 1)

    def hosts_at(load_Y1: np.ndarray) -> np.ndarray:
        return np.maximum(np.minimum(np.ceil(load_YE / load_Y1), limit_YE), 1.0)

    # n - 1 < load / (load of a host), so that at the mean load of a slot the slots suffice.
    spare = num_ranks * num_replica_slots
    high_Y1 = np.maximum(load_YE.sum(axis=1, keepdims=True) / spare, TINY)
    low_Y1 = high_Y1 / 1000
    for _ in range(HALVINGS):
        middle_Y1 = np.sqrt(low_Y1 * high_Y1)
        fits_Y1 = hosts_at(middle_Y1).sum(axis=1, keepdims=True) <= spare + load_YE.shape[1]
        high_Y1, low_Y1 = np.where(fits_Y1, middle_Y1, high_Y1), np.where(fits_Y1, low_Y1, middle_Y1)
    # Between the two bounds lie nearly equal experts, of which the slots suffice for some: those of full ranks first.
    fewer_YE = hosts_at(high_Y1)
    more_YE = hosts_at(low_Y1) - fewer_YE
    layer_Y1 = np.arange(len(load_YE))[:, None]
    rank_YW = np.zeros((len(load_YE), num_ranks))
    np.add.at(rank_YW, (layer_Y1, owner_YE), load_YE)
    order_YE = np.argsort(-rank_YW[layer_Y1, owner_YE], axis=1, kind="stable")
    wanted_YE = more_YE[layer_Y1, order_YE]
    left_Y1 = spare - (fewer_YE - 1).sum(axis=1, keepdims=True)
    more_YE[layer_Y1, order_YE] = np.maximum(
        np.minimum(left_Y1 - (np.cumsum(wanted_YE, axis=1) - wanted_YE), wanted_YE), 0
    )
    return (fewer_YE + more_YE).astype(np.int64)


def _assign(load_YE, num_hosts_YE, owner_YE, num_ranks: int, num_replica_slots: int) -> np.ndarray:
    """[Y, W, G] int64: which expert each replica slot holds, -1 = none.

    Copies are dealt hottest first, in rounds of one per rank, to the ranks in order of what they have so far. A copy that
    falls on a rank that has its expert already is dealt again at the end, to the lightest rank that can take it.
    """
    num_layers, num_experts = load_YE.shape
    layer_Y1 = np.arange(num_layers)[:, None]
    part_YE = load_YE / num_hosts_YE
    rank_YW = np.zeros((num_layers, num_ranks))
    np.add.at(rank_YW, (layer_Y1, owner_YE), part_YE)
    hosted_YEW = np.zeros((num_layers, num_experts, num_ranks), bool)
    hosted_YEW[layer_Y1, np.arange(num_experts), owner_YE] = True
    replica_YWG = np.full((num_layers, num_ranks, num_replica_slots), EMPTY, np.int64)

    def put(layer, expert, rank, slot) -> None:
        replica_YWG[layer, rank, slot] = expert
        hosted_YEW[layer, expert, rank] = True
        rank_YW[layer, rank] += part_YE[layer, expert]

    # The copies of each layer in a row, hottest experts first, then -1 up to the number of slots.
    order_YE = np.argsort(-part_YE, axis=1, kind="stable")
    num_copies_YE = num_hosts_YE[layer_Y1, order_YE] - 1
    expert_YC = np.full((num_layers, num_ranks * num_replica_slots), EMPTY)
    expert_YC[np.arange(expert_YC.shape[1]) < num_copies_YE.sum(axis=1)[:, None]] = np.repeat(
        order_YE, num_copies_YE.ravel()
    )
    again_YC = np.zeros(expert_YC.shape, bool)
    for g in range(num_replica_slots):
        turn = slice(g * num_ranks, (g + 1) * num_ranks)
        lightest_YW = np.argsort(rank_YW, axis=1, kind="stable")
        again_YC[:, turn] = (expert_YC[:, turn] != EMPTY) & hosted_YEW[layer_Y1, expert_YC[:, turn], lightest_YW]
        layer, copy = np.nonzero((expert_YC[:, turn] != EMPTY) & ~again_YC[:, turn])
        put(layer, expert_YC[:, turn][layer, copy], lightest_YW[layer, copy], g)
    nth_YC = np.cumsum(again_YC, axis=1) * again_YC
    for turn in range(1, int(nth_YC.max(initial=0)) + 1):
        layer, copy = np.nonzero(nth_YC == turn)
        expert = expert_YC[layer, copy]
        open_XG = replica_YWG[layer] == EMPTY
        free_XW = open_XG.any(axis=2) & ~hosted_YEW[layer, expert]
        rank = np.where(free_XW, rank_YW[layer], np.inf).argmin(axis=1)
        can = np.flatnonzero(free_XW[np.arange(len(layer)), rank])
        put(layer[can], expert[can], rank[can], open_XG[can, rank[can]].argmax(axis=1))
    return replica_YWG


class _Hosts:
    """The hosts of all replicated experts of all layers, as flat lists sorted by (layer, expert, rank).

    rank_X and expert_X index the flattened [Y, W] and [Y, E].
    """

    def __init__(self, replica_YWG: np.ndarray, owner_YE: np.ndarray, num_experts: int):
        num_layers, num_ranks, _ = replica_YWG.shape
        self.num_layers, self.num_ranks, self.num_experts = num_layers, num_ranks, num_experts
        layer, rank, slot = np.nonzero(replica_YWG != EMPTY)
        copied = layer * num_experts + replica_YWG[layer, rank, slot]
        self.owner = (np.arange(num_layers)[:, None] * num_ranks + owner_YE).ravel()
        replicated = np.unique(copied)
        expert = np.concatenate([replicated, copied])
        rank = np.concatenate([self.owner[replicated], layer * num_ranks + rank])
        order = np.lexsort((rank, expert))
        self.expert_X, self.rank_X = expert[order], rank[order]
        self.is_alone = np.ones(num_layers * num_experts, bool)
        self.is_alone[replicated] = False
        self.starts = np.searchsorted(self.expert_X, replicated)  # where each replicated expert's hosts begin
        self.group_X = np.repeat(np.arange(len(replicated)), np.diff(np.append(self.starts, len(self.expert_X))))

    def balanced(self, load_YE: np.ndarray) -> np.ndarray:
        """[X] float, each host's share of its expert: equal at first, then shifted from full to light ranks."""
        num_cells, base, load_X = self.num_layers * self.num_ranks, self._base(load_YE), load_YE.ravel()[self.expert_X]
        mean = np.maximum(np.repeat(load_YE.sum(axis=1) / self.num_ranks, self.num_ranks), TINY)
        # A twentieth of the mean keeps a rank without load from pulling without bound.
        base, mean = base + mean / 20, mean * 1.05
        pull, share_X = np.ones(num_cells), np.zeros(len(self.expert_X))
        for _ in range(BALANCE_STEPS):
            pull_X = pull[self.rank_X]
            share_X = pull_X / np.add.reduceat(pull_X, self.starts)[self.group_X]
            lack = mean / (base + np.bincount(self.rank_X, weights=share_X * load_X, minlength=num_cells))
            pull *= lack * np.sqrt(lack)  # the power 1.5 gets there in fewer steps than 1, and 2 overshoots
        return share_X

    def rank_load(self, load_YE: np.ndarray, share_X: np.ndarray) -> np.ndarray:
        """[Y, W] load of each rank."""
        load_X = share_X * load_YE.ravel()[self.expert_X]
        extra = np.bincount(self.rank_X, weights=load_X, minlength=self.num_layers * self.num_ranks)
        return (self._base(load_YE) + extra).reshape(self.num_layers, self.num_ranks)

    def _base(self, load_YE: np.ndarray) -> np.ndarray:
        """[Y * W] load of the experts that only their owners host."""
        load_N = load_YE.ravel()[self.is_alone]
        return np.bincount(self.owner[self.is_alone], weights=load_N, minlength=self.num_layers * self.num_ranks)

    def whole_buckets(self, share_X: np.ndarray) -> np.ndarray:
        """[X] int64 that sum to BUCKETS for each expert: rounded down, and one more for the largest fractions cut off."""
        count_X = np.floor(share_X * BUCKETS).astype(np.int64)
        order = np.lexsort((count_X - share_X * BUCKETS, self.group_X))  # of one expert still together
        missing = BUCKETS - np.add.reduceat(count_X, self.starts) if len(self.starts) else self.starts
        count_X[order] += np.arange(len(order)) - self.starts[self.group_X] < missing[self.group_X]
        return count_X

    def shares(self, share_X: np.ndarray) -> np.ndarray:
        """[Y, E, W] float64, the whole table: experts without replicas on their owner."""
        share_YEW = np.zeros((self.num_layers, self.num_experts, self.num_ranks))
        flat = share_YEW.reshape(-1, self.num_ranks)
        alone = np.flatnonzero(self.is_alone)
        flat[alone, self.owner[alone] % self.num_ranks] = 1.0
        flat[self.expert_X, self.rank_X % self.num_ranks] = share_X
        return share_YEW


def _prefer_near(count_SE, share_EW, is_replicated_E, node_of_rank_W) -> np.ndarray:
    """[W, E, W] shares of each source in whole buckets, near hosts first, such that hosts keep their parts.

    Of an expert, quota[w] = share[w] * its tokens. First every host takes tokens of its own rank, as many as there are of
    both; then the rest of each node's tokens and quotas meet, in proportion; then the rest of all. A source without tokens
    of an expert splits them as all sources together.
    """
    num_ranks, num_experts = count_SE.shape
    experts, rank_W = np.flatnonzero(is_replicated_E), np.arange(num_ranks)
    token_SX = count_SE[:, experts].astype(np.float64)
    quota_WX = share_EW[experts].T * token_SX.sum(axis=0)
    flow_SXW = np.zeros((num_ranks, len(experts), num_ranks))
    met_WX = np.minimum(token_SX, quota_WX)
    flow_SXW[rank_W, :, rank_W] = met_WX
    token_SX, quota_WX = token_SX - met_WX, quota_WX - met_WX
    for group_W in (node_of_rank_W, np.zeros_like(rank_W)):
        # Every source of a group sends the same part of what it has left, every host there takes the same part of its room.
        same_NW = (np.unique(group_W)[:, None] == group_W).astype(np.float64)
        tokens_SX, room_WX = same_NW.T @ (same_NW @ token_SX), same_NW.T @ (same_NW @ quota_WX)  # of the whole group
        met_WX = np.minimum(tokens_SX, room_WX)
        sent_SX = token_SX * np.divide(met_WX, tokens_SX, out=np.zeros_like(met_WX), where=tokens_SX > 0)
        part_WX = np.divide(quota_WX, room_WX, out=np.zeros_like(met_WX), where=room_WX > 0)
        flow_SXW += sent_SX[:, :, None] * part_WX.T * (group_W[:, None] == group_W)[:, None, :]
        token_SX, quota_WX = np.maximum(token_SX - sent_SX, 0), np.maximum(quota_WX - part_WX * met_WX, 0)
        if len(same_NW) == 1:
            break
    total_SX1 = flow_SXW.sum(axis=2, keepdims=True)
    some_SX1 = total_SX1 > 0
    wanted_SXW = np.where(some_SX1, flow_SXW / np.where(some_SX1, total_SX1, 1.0), share_EW[experts])
    # Each source rounds at another fraction, so that what rounding does to a host evens out over the sources.
    fraction_S = (np.arange(num_ranks) + 0.5) / num_ranks
    edge_SXW = np.floor(np.cumsum(wanted_SXW, axis=2) * BUCKETS + fraction_S[:, None, None])
    share_SEW = np.broadcast_to(share_EW, (num_ranks, num_experts, num_ranks)).copy()
    share_SEW[:, experts] = np.diff(edge_SXW, axis=2, prepend=0.0) / BUCKETS
    share_SEW.setflags(write=False)
    return share_SEW
