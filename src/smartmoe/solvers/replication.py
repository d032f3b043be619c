"""Replication from history: which experts get copies on which ranks, for many layers at once.

Layer 0: numpy only. Axes: Y layers, S source ranks, E experts, W ranks, G replica slots per rank; X hosts of replicated
experts, all layers in one list (a host is one rank's share in one expert). Loads are token copies.

A plan serves iterations that it has not seen, so it does not stop at the fewest copies that would balance the counts given:
splitting a hot expert over more hosts also makes its next change count less on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas
from smartmoe.solvers.ownership import solve_least_move

HALVINGS = 24  # of the interval in which the load that a host may have is sought
BALANCE_STEPS = 16  # of shifting tokens between the hosts of an expert


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

    A layer whose cost does not fall gets no replicas: cost = token copies on the fullest rank + copy_cost * the most copies
    that one rank sends or receives. Ties go to the lowest index; the same input gives the same output.

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
    load_YE = count_YSE.sum(axis=1)
    num_hosts_YE = _num_hosts(load_YE, owner_YE, num_ranks, num_replica_slots, copy_cost)
    replica_YWG = _assign(load_YE, num_hosts_YE, owner_YE, num_ranks, num_replica_slots)
    hosts = _Hosts(replica_YWG, owner_YE, num_experts)
    bucket_X = hosts.whole_buckets(hosts.balanced(load_YE))
    worth_Y = _worth(load_YE, hosts, bucket_X, copy_cost)
    share_YEW = hosts.shares(bucket_X / BUCKETS)
    found = []
    for layer, placement in enumerate(placements):
        if not worth_Y[layer]:
            found.append(Replicas.none(placement, num_replica_slots))
            continue
        share_EW = share_YEW[layer]
        if local:
            node_W = np.zeros(num_ranks, np.int64) if node_of_rank_W is None else np.asarray(node_of_rank_W)
            share_SEW = _prefer_near(count_YSE[layer], share_EW, num_hosts_YE[layer] > 1, node_W)
        else:
            share_SEW = np.broadcast_to(share_EW, (num_ranks, *share_EW.shape))
        found.append(Replicas(tuple(replica_YWG[layer].ravel().tolist()), share_SEW))
    return found


def solve_joint(
    count_SE: np.ndarray,
    placement: Placement,
    num_replica_slots: int,
    *,
    copy_cost: float = 0.0,
    node_of_rank_W: Sequence[int] | None = None,
    local: bool = True,
) -> tuple[Placement, Replicas]:
    """Place owners knowing that replicas take the heat: few moves, then replicas on the new owners.

    Owners are placed by `solve_least_move` for what stays with them: each expert's load divided by its number of hosts.
    Arguments as in `solve_replicas`. Returns (placement, replicas); the placement given when moving does not make the
    fullest rank lighter than replicas alone.
    """
    options = {"copy_cost": copy_cost, "node_of_rank_W": node_of_rank_W, "local": local}
    stay = solve_replicas(count_SE, placement, num_replica_slots, **options)
    load_E = np.asarray(count_SE, np.float64).sum(axis=0)
    owner_YE = placement.rank_of_expert()[None]
    num_hosts_E = _num_hosts(load_E[None], owner_YE, placement.num_ranks, num_replica_slots, copy_cost)[0]
    moved = solve_least_move(load_E / num_hosts_E, placement)
    if moved == placement:
        return placement, stay
    replicas = solve_replicas(count_SE, moved, num_replica_slots, **options)
    lighter = replicas.host_load(count_SE).max() < stay.host_load(count_SE).max()
    return (moved, replicas) if lighter else (placement, stay)


def _checked(count_YSE, placements, num_replica_slots: int, copy_cost: float) -> np.ndarray:
    count_YSE = np.asarray(count_YSE, dtype=np.float64)
    sizes = {(placement.num_ranks, placement.num_experts) for placement in placements}
    if len(sizes) != 1 or count_YSE.shape != (len(placements), *next(iter(sizes))):
        raise ValueError(
            f"solve_replicas: counts have shape {count_YSE.shape} for {len(placements)} placements of (ranks, experts) "
            f"{sorted(sizes)}; expected [layers, ranks, experts] and one size"
        )
    if not np.isfinite(count_YSE).all() or (count_YSE < 0).any():
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
    limit_YE = np.full(load_YE.shape, float(num_ranks))
    if copy_cost > 0:
        worth_YE = np.floor((np.sqrt(1 + 4 * load_YE / copy_cost) - 1) / 2)  # the last n that pays
        limit_YE = np.minimum(limit_YE, worth_YE + 1)
    limit_YE[load_YE == 0] = 1

    def hosts_at(load_Y1: np.ndarray) -> np.ndarray:
        return np.clip(np.ceil(load_YE / load_Y1), 1, limit_YE)

    high_Y1 = np.maximum(load_YE.max(axis=1, keepdims=True), 1e-300)  # one host each
    low_Y1, spare = high_Y1 * 1e-6, num_ranks * num_replica_slots
    for _ in range(HALVINGS):
        middle_Y1 = (low_Y1 + high_Y1) / 2
        fits_Y1 = (hosts_at(middle_Y1) - 1).sum(axis=1, keepdims=True) <= spare
        high_Y1, low_Y1 = np.where(fits_Y1, middle_Y1, high_Y1), np.where(fits_Y1, low_Y1, middle_Y1)
    # Between the two bounds lie equal experts, of which the slots suffice for some: those of full ranks first.
    fewer_YE = hosts_at(high_Y1)
    more_YE = hosts_at(low_Y1) - fewer_YE
    rank_YW = np.zeros((len(load_YE), num_ranks))
    np.add.at(rank_YW, (np.arange(len(load_YE))[:, None], owner_YE), load_YE)
    order_YE = np.argsort(-np.take_along_axis(rank_YW, owner_YE, 1), axis=1, kind="stable")
    wanted_YE = np.take_along_axis(more_YE, order_YE, 1)
    left_Y1 = spare - (fewer_YE - 1).sum(axis=1, keepdims=True)
    given_YE = np.clip(left_Y1 - (np.cumsum(wanted_YE, axis=1) - wanted_YE), 0, wanted_YE)
    np.put_along_axis(more_YE, order_YE, given_YE, 1)
    return (fewer_YE + more_YE).astype(np.int64)


def _assign(load_YE, num_hosts_YE, owner_YE, num_ranks: int, num_replica_slots: int) -> np.ndarray:
    """[Y, W, G] int64: which expert each replica slot holds, -1 = none.

    Copies are dealt hottest first, in rounds of one per rank, to the ranks in order of what they have so far. A copy that
    falls on a rank that has its expert already is dealt again at the end, to the lightest rank that can take it.
    """
    num_layers, num_experts = load_YE.shape
    layers = np.arange(num_layers)
    part_YE = load_YE / num_hosts_YE
    rank_YW = np.zeros((num_layers, num_ranks))
    np.add.at(rank_YW, (layers[:, None], owner_YE), part_YE)
    hosted_YEW = np.zeros((num_layers, num_experts, num_ranks), bool)
    hosted_YEW[layers[:, None], np.arange(num_experts), owner_YE] = True
    replica_YWG = np.full((num_layers, num_ranks, num_replica_slots), EMPTY, np.int64)
    order_YE = np.argsort(-part_YE, axis=1, kind="stable")
    ends_YE = np.cumsum(np.take_along_axis(num_hosts_YE - 1, order_YE, 1), axis=1)
    again: list[tuple[np.ndarray, np.ndarray]] = []
    for g in range(num_replica_slots):
        # Copy number c of a layer belongs to the first expert, hottest first, whose copies end after c.
        copy_C = np.arange(g * num_ranks, (g + 1) * num_ranks)
        place_YC = (ends_YE[:, None, :] <= copy_C[:, None]).sum(axis=2)
        real_YC = place_YC < num_experts
        if not real_YC.any():
            break
        expert_YC = np.take_along_axis(order_YE, np.minimum(place_YC, num_experts - 1), 1)
        lightest_YW = np.argsort(rank_YW, axis=1, kind="stable")
        clash_YC = real_YC & hosted_YEW[layers[:, None], expert_YC, lightest_YW]
        layer, copy = np.nonzero(real_YC & ~clash_YC)
        expert, rank = expert_YC[layer, copy], lightest_YW[layer, copy]
        replica_YWG[layer, rank, g] = expert
        hosted_YEW[layer, expert, rank] = True
        rank_YW[layer, rank] += part_YE[layer, expert]
        if clash_YC.any():
            again.append((clash_YC, expert_YC))
    for clash_YC, expert_YC in again:
        for turn in range(int(clash_YC.sum(axis=1).max())):
            nth_YC = clash_YC & (np.cumsum(clash_YC, axis=1) == turn + 1)
            layer, copy = np.nonzero(nth_YC)
            expert = expert_YC[layer, copy]
            open_XG = replica_YWG[layer] == EMPTY
            free_XW = open_XG.any(axis=2) & ~hosted_YEW[layer, expert]
            rank = np.where(free_XW, rank_YW[layer], np.inf).argmin(axis=1)
            can = free_XW[np.arange(len(layer)), rank]
            layer, expert, rank, open_XG = layer[can], expert[can], rank[can], open_XG[can]
            slot = open_XG[np.arange(len(layer)), rank].argmax(axis=1)
            replica_YWG[layer, rank, slot] = expert
            hosted_YEW[layer, expert, rank] = True
            rank_YW[layer, rank] += part_YE[layer, expert]
    return replica_YWG


class _Hosts:
    """The hosts of all replicated experts of all layers, as flat lists sorted by (layer, expert, rank).

    rank_X and expert_X index the flattened [Y, W] and [Y, E].
    """

    def __init__(self, replica_YWG: np.ndarray, owner_YE: np.ndarray, num_experts: int):
        num_layers, num_ranks, _ = replica_YWG.shape
        self.num_layers, self.num_ranks, self.num_experts = num_layers, num_ranks, num_experts
        layer, rank, slot = np.nonzero(replica_YWG != EMPTY)
        self.copy_expert, self.copy_rank = (
            layer * num_experts + replica_YWG[layer, rank, slot],
            layer * num_ranks + rank,
        )
        self.owner = (np.arange(num_layers)[:, None] * num_ranks + owner_YE).ravel()
        replicated = np.unique(self.copy_expert)
        expert = np.concatenate([replicated, self.copy_expert])
        rank = np.concatenate([self.owner[replicated], self.copy_rank])
        order = np.lexsort((rank, expert))
        self.expert_X, self.rank_X = expert[order], rank[order]
        self.is_alone = np.ones(num_layers * num_experts, bool)
        self.is_alone[replicated] = False
        self.starts = np.searchsorted(self.expert_X, replicated)  # where each replicated expert's hosts begin
        self.group_X = np.repeat(np.arange(len(replicated)), np.diff(np.append(self.starts, len(self.expert_X))))

    def balanced(self, load_YE: np.ndarray) -> np.ndarray:
        """[X] float, each host's share of its expert: equal at first, then shifted from full to light ranks."""
        num_cells, base, load_X = self.num_layers * self.num_ranks, self._base(load_YE), load_YE.ravel()[self.expert_X]
        mean = np.maximum(np.repeat(load_YE.sum(axis=1) / self.num_ranks, self.num_ranks), 1e-300)
        pull, share_X = np.ones(num_cells), np.zeros(len(self.expert_X))
        for _ in range(BALANCE_STEPS):
            pull_X = pull[self.rank_X]
            share_X = pull_X / np.add.reduceat(pull_X, self.starts)[self.group_X]
            rank_load = base + np.bincount(self.rank_X, weights=share_X * load_X, minlength=num_cells)
            pull = np.clip(pull * np.clip(mean / np.maximum(rank_load, 1e-300), 0.25, 4.0), 1e-9, 1e9)
        return share_X

    def whole_buckets(self, share_X: np.ndarray) -> np.ndarray:
        """[X] int64 that sum to BUCKETS for each expert: the running sum of shares, rounded."""
        total_X = np.cumsum(share_X)
        before_X = np.append(0.0, total_X)[self.starts][self.group_X]
        edge_X = np.floor((total_X - before_X) * BUCKETS + 0.5).astype(np.int64)
        count_X = np.diff(edge_X, prepend=0)
        count_X[self.starts] = edge_X[self.starts]
        return count_X

    def shares(self, share_X: np.ndarray) -> np.ndarray:
        """[Y, E, W] float64, the whole table: experts without replicas on their owner."""
        share_YEW = np.zeros((self.num_layers, self.num_experts, self.num_ranks))
        flat = share_YEW.reshape(-1, self.num_ranks)
        alone = np.flatnonzero(self.is_alone)
        flat[alone, self.owner[alone] % self.num_ranks] = 1.0
        flat[self.expert_X, self.rank_X % self.num_ranks] = share_X
        return share_YEW

    def rank_load(self, load_YE: np.ndarray, share_X: np.ndarray) -> np.ndarray:
        """[Y, W] load of each rank."""
        load_X = share_X * load_YE.ravel()[self.expert_X]
        extra = np.bincount(self.rank_X, weights=load_X, minlength=self.num_layers * self.num_ranks)
        return (self._base(load_YE) + extra).reshape(self.num_layers, self.num_ranks)

    def _base(self, load_YE: np.ndarray) -> np.ndarray:
        """[Y * W] load of the experts that only their owners host."""
        load_N = load_YE.ravel()[self.is_alone]
        return np.bincount(self.owner[self.is_alone], weights=load_N, minlength=self.num_layers * self.num_ranks)


def _worth(load_YE: np.ndarray, hosts: _Hosts, bucket_X: np.ndarray, copy_cost: float) -> np.ndarray:
    """[Y] bool: whether replicas make the layer cheaper than none."""
    shape, num_cells = (hosts.num_layers, hosts.num_ranks), hosts.num_layers * hosts.num_ranks
    sent = np.bincount(hosts.owner[hosts.copy_expert], minlength=num_cells).reshape(shape)
    received = np.bincount(hosts.copy_rank, minlength=num_cells).reshape(shape)
    busiest_Y = np.maximum(sent, received).max(axis=1)
    before_Y = np.bincount(hosts.owner, weights=load_YE.ravel(), minlength=num_cells).reshape(shape).max(axis=1)
    after_Y = hosts.rank_load(load_YE, bucket_X / BUCKETS).max(axis=1)
    return after_Y + copy_cost * busiest_Y < before_Y


def _prefer_near(count_SE, share_EW, is_replicated_E, node_of_rank_W) -> np.ndarray:
    """[W, E, W] shares of each source in whole buckets, near hosts first, such that hosts keep their parts.

    Of an expert, quota[w] = share[w] * its tokens. First every host takes tokens of its own rank, as many as there are of
    both; then the rest of each node's tokens and quotas meet, in proportion; then the rest of all. A source without tokens
    of an expert splits them as all sources together.
    """
    num_ranks, num_experts = count_SE.shape
    experts = np.flatnonzero(is_replicated_E)
    token_SX = count_SE[:, experts]
    quota_XW = share_EW[experts] * token_SX.sum(axis=0)[:, None]
    node_NW = (np.unique(node_of_rank_W)[:, None] == node_of_rank_W).astype(float)
    flow_SXW = np.zeros((num_ranks, len(experts), num_ranks))
    for group_NW in (np.eye(num_ranks), node_NW, np.ones((1, num_ranks))):
        token_NX, quota_NX = group_NW @ token_SX, group_NW @ quota_XW.T
        met_NX = np.minimum(token_NX, quota_NX)
        # Every source of a group sends the same part of what it has left, every host there takes the same part of its room.
        sent_SX = token_SX * (group_NW.T @ np.divide(met_NX, token_NX, out=np.zeros_like(met_NX), where=token_NX > 0))
        part_NX = np.divide(1.0, quota_NX, out=np.zeros_like(met_NX), where=quota_NX > 0)
        taken_XW = quota_XW * (group_NW.T @ (met_NX * part_NX)).T
        room_SXW = np.einsum("ns,nx,nw->sxw", group_NW, part_NX, group_NW) * quota_XW
        flow_SXW += sent_SX[:, :, None] * room_SXW
        token_SX, quota_XW = np.maximum(token_SX - sent_SX, 0), np.maximum(quota_XW - taken_XW, 0)
    total_SX1 = flow_SXW.sum(axis=2, keepdims=True)
    some_SX1 = total_SX1 > 0
    wanted_SXW = np.where(some_SX1, flow_SXW / np.where(some_SX1, total_SX1, 1.0), share_EW[experts])
    edge_SXW = np.floor(np.cumsum(wanted_SXW, axis=2) * BUCKETS + 0.5)
    share_SEW = np.broadcast_to(share_EW, (num_ranks, num_experts, num_ranks)).copy()
    share_SEW[:, experts] = np.diff(edge_SXW, axis=2, prepend=0.0) / BUCKETS
    share_SEW.setflags(write=False)
    return share_SEW
