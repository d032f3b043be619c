"""Replication from history: which experts get copies on which ranks, for many layers at once.

Layer 0: numpy only. Axes: Y layers, S source ranks, E experts, W ranks, G replica slots per rank; X hosts of replicated
experts, all layers in one list (a host is one rank's share in one expert). Loads are token copies.

A plan serves iterations that it has not seen, so it does not stop at the fewest copies that would balance the counts given:
splitting a hot expert over more hosts also makes its next change count less on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartmoe.placement import BUCKETS, EMPTY, Placement, Replicas, for_all_sources, most_copies
from smartmoe.solvers.exact_step import solve_exact_step
from smartmoe.solvers.ownership import solve_least_move

TINY = 1e-100  # stands for the load of a layer that has none
LADDER = 1000.0 ** (np.arange(257) / 256)  # the loads that a host may have, as parts of the mean of a slot
STRIDES = (np.arange(0, 257, 16), np.arange(17))  # the rungs that are tried, then those after the last that suits
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
    num_ranks = placements[0].num_ranks
    if num_ranks == 1 or num_replica_slots == 0:
        return [Replicas.none(placement, num_replica_slots) for placement in placements]
    owner_YE = np.array([placement.rank_of_expert() for placement in placements])
    owner_YE += np.arange(0, len(placements) * num_ranks, num_ranks)[:, None]  # in the flattened [Y, W]
    load_YE = count_YSE.sum(axis=1).astype(np.float64)
    num_hosts_YE = _num_hosts(load_YE, owner_YE, num_ranks, num_replica_slots, copy_cost)
    replica_YC, hosted_YEW = _assign(load_YE, num_hosts_YE, owner_YE, num_ranks, num_replica_slots)
    mean_Y = load_YE.sum(axis=1) / num_ranks
    hosts = _Hosts(hosted_YEW, load_YE, mean_Y)
    share_X = hosts.balanced()
    cost_Y, before_Y = hosts.rank_load(share_X).max(axis=1), _rank_sums(owner_YE, load_YE, num_ranks).max(axis=1)
    share_YEW = hosts.shares(share_X if local else hosts.whole_buckets(share_X) / BUCKETS)
    share_YSEW = for_all_sources(share_YEW)
    groups = _groups(node_of_rank_W, num_ranks)
    found = []
    for layer, placement in enumerate(placements):
        count_SE, before, mean = count_YSE[layer], before_Y[layer], mean_Y[layer]
        slots, share_SEW = replica_YC[layer], share_YSEW[layer]
        copies_cost = copy_cost * most_copies(slots, placement.rank_of_expert(), num_ranks) if copy_cost else 0.0
        cost = cost_Y[layer] + copies_cost
        if cost > min(before, mean * (1 + SLACK)):
            scale = SCALE / max(mean * num_ranks, TINY)
            whole_SE = np.rint(count_SE * scale).astype(np.int64)
            other = solve_exact_step(whole_SE, placement, num_replica_slots, round(copy_cost * scale))
            other_copies_cost = copy_cost * most_copies(other.expert_of_replica, placement.rank_of_expert(), num_ranks)
            other_cost = other.host_load(count_SE).max() + other_copies_cost
            if other_cost * (1 + SLACK) < cost or other_cost < before <= cost:
                slots, share_SEW = other.expert_of_replica, other.share_SEW
                copies_cost = other_copies_cost
        if local:
            share_SEW = _prefer_near(count_SE, share_SEW, groups)
        replicas = Replicas(slots, share_SEW)
        # shares are whole buckets now
        load_W = replicas.host_load(count_SE) if local else np.einsum("e,ew->w", load_YE[layer], share_SEW[0])
        cost = load_W.max() + copies_cost
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
    if not (count_YSE.min() >= 0 and (count_YSE.dtype.kind in "iu" or count_YSE.max() < np.inf)):
        raise ValueError("solve_replicas: counts must be finite and not negative")
    if num_replica_slots < 0 or not copy_cost >= 0:
        raise ValueError(
            f"solve_replicas: num_replica_slots = {num_replica_slots} and copy_cost = {copy_cost} must be at least 0"
        )
    return count_YSE


def _rank_sums(owner_YE, load_YE, num_ranks: int) -> np.ndarray:
    """[Y, W] float64: the loads of each rank's experts added up; owner_YE indexes the flattened [Y, W]."""
    return np.bincount(owner_YE.ravel(), load_YE.ravel(), len(owner_YE) * num_ranks).reshape(-1, num_ranks)


def _num_hosts(load_YE, owner_YE, num_ranks: int, num_replica_slots: int, copy_cost: float) -> np.ndarray:
    """[Y, E] int64, in 1 .. W: how many hosts each expert should have; the slots suffice for them.

    The load that a host may have is that of the last rung of LADDER at which they do, sought for all layers together. Going
    from n to n + 1 hosts takes load / (n * (n + 1)) from each, which must be copy_cost at least. owner_YE as in `_rank_sums`.
    """
    num_layers, num_experts = load_YE.shape
    limit: float | np.ndarray = float(num_ranks)
    if copy_cost > 0:
        last_YE = np.floor((np.sqrt(1 + 4 * load_YE / copy_cost) - 1) / 2)  # the last n that pays
        limit = np.minimum(limit, last_YE + 1)[:, None]
    # n - 1 < load / (load of a host), so that at the mean load of a slot, the first rung, the slots suffice.
    spare = num_ranks * num_replica_slots
    mean_Y1 = np.maximum(load_YE.sum(axis=1, keepdims=True) / spare, TINY)
    load_Y1E = np.maximum(load_YE, TINY * TINY)[:, None]  # none needs one host, too
    layer_Y, first_Y1 = np.arange(num_layers), np.zeros((num_layers, 1), np.int64)
    for rung_R in STRIDES:
        may_have_YR = mean_Y1 / LADDER[first_Y1 + rung_R]
        hosts_YRE = np.minimum(np.ceil(load_Y1E / may_have_YR[:, :, None]), limit)
        fits_YR = hosts_YRE.sum(axis=2) <= spare + num_experts
        last_Y = fits_YR[:, 1:-1].sum(axis=1)
        first_Y1 = rung_R[last_Y][:, None]
    # Between it and the next rung lie nearly equal experts, of which the slots suffice for some: those of full ranks first.
    fewer_YE, most_YE, layer_Y1 = hosts_YRE[layer_Y, last_Y], hosts_YRE[layer_Y, last_Y + 1], layer_Y[:, None]
    rank_load_YE = _rank_sums(owner_YE, load_YE, num_ranks).ravel()[owner_YE]
    order_YE = (-rank_load_YE).argsort(axis=1, kind="stable")
    wanted_YE = (most_YE - fewer_YE)[layer_Y1, order_YE]
    left_YE = spare + num_experts - fewer_YE.sum(axis=1, keepdims=True) - (wanted_YE.cumsum(axis=1) - wanted_YE)
    fewer_YE[layer_Y1, order_YE] += np.maximum(np.minimum(left_YE, wanted_YE), 0)
    return fewer_YE.astype(np.int64)


def _assign(load_YE, num_hosts_YE, owner_YE, num_ranks: int, num_replica_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """([Y, W * G] int64, which expert each replica slot holds, -1 = none; [Y, E, W] bool, who hosts what, owners too).

    Copies are dealt hottest first, in rounds of one per rank, to the ranks in order of what they have so far. A copy that
    falls on a rank that has its expert already is dealt again at the end, to the lightest rank that can take it.
    """
    num_layers, num_experts = load_YE.shape
    layer_Y1, num_slots = np.arange(num_layers)[:, None], num_ranks * num_replica_slots
    part_YE = load_YE / num_hosts_YE
    rank_YW = _rank_sums(owner_YE, part_YE, num_ranks)
    hosted_YEW = np.zeros((num_layers, num_experts, num_ranks), bool)
    replica_YC = np.full((num_layers, num_slots), EMPTY)
    part, load, hosted, replica = (each.reshape(-1) for each in (part_YE, rank_YW, hosted_YEW, replica_YC))
    hosted[np.arange(0, len(hosted), num_ranks) + (owner_YE % num_ranks).ravel()] = True

    # The copies of each layer in a row, hottest experts first; the rest of its slots take none.
    order_YE = (-part_YE).argsort(axis=1, kind="stable")
    num_copies_YE = num_hosts_YE[layer_Y1, order_YE] - 1
    is_copy_YC = np.arange(num_slots) < num_copies_YE.sum(axis=1, keepdims=True)
    expert_YC = np.zeros((num_layers, num_slots), np.int64)
    expert_YC[is_copy_YC] = order_YE.repeat(num_copies_YE.ravel())
    cell_YC, again_YC = layer_Y1 * num_experts + expert_YC, np.zeros(is_copy_YC.shape, bool)
    for g in range(num_replica_slots):
        turn = slice(g * num_ranks, (g + 1) * num_ranks)
        lightest_YW = rank_YW.argsort(axis=1, kind="stable")
        host_YW, cell_YW = layer_Y1 * num_ranks + lightest_YW, cell_YC[:, turn]
        spot_YW, is_copy_YW = cell_YW * num_ranks + lightest_YW, is_copy_YC[:, turn]
        is_hosted_YW = hosted[spot_YW]
        again_YC[:, turn] = is_copy_YW & is_hosted_YW
        is_new_YW = is_copy_YW & ~is_hosted_YW
        hosted[spot_YW] = is_hosted_YW | is_new_YW
        replica[host_YW * num_replica_slots + g] = np.where(is_new_YW, expert_YC[:, turn], EMPTY)
        load[host_YW] += part[cell_YW] * is_new_YW
    again = cell_YC.ravel()[again_YC.ravel()]
    _deal_again(again, part[again], rank_YW, hosted_YEW, replica_YC.reshape(-1, num_replica_slots))
    return replica_YC, hosted_YEW


def _deal_again(copy_A, part_A, rank_YW, hosted_YEW, replica_ZG) -> None:
    """Put copies, by index of the flattened [Y, E] and load, on ranks that can take them; a turn is one copy of each layer."""
    _, num_experts, num_ranks = hosted_YEW.shape
    load, replica, hosted_ZW = rank_YW.reshape(-1), replica_ZG.reshape(-1), hosted_YEW.reshape(-1, num_ranks)
    layer_A = copy_A // num_experts
    nth_A = np.arange(len(copy_A)) - layer_A.searchsorted(layer_A)
    slot = (replica == EMPTY).nonzero()[0]
    num_open = np.bincount(slot // replica_ZG.shape[1], minlength=len(load))
    end = num_open.cumsum()
    load[num_open == 0] = np.inf
    for nth in range(nth_A.max(initial=-1) + 1):
        now = (nth_A == nth).nonzero()[0]
        layer, copy = layer_A[now], copy_A[now]
        load_XW = rank_YW[layer]
        load_XW[hosted_ZW[copy]] = np.inf
        rank = load_XW.argmin(axis=1)
        can = (load_XW[np.arange(len(now)), rank] < np.inf).nonzero()[0]
        layer, copy, rank = layer[can], copy[can], rank[can]
        host = layer * num_ranks + rank
        left = num_open[host]
        replica[slot[end[host] - left]] = copy - layer * num_experts
        hosted_ZW[copy, rank] = True
        load[host] += part_A[now[can]]
        num_open[host] = left - 1
        load[host[left == 1]] = np.inf


class _Hosts:
    """The hosts of all replicated experts of all layers, as flat lists sorted by (layer, expert, rank).

    rank_X and spot_X index the flattened [Y, W] and [Y, E, W].
    """

    def __init__(self, hosted_YEW: np.ndarray, load_YE: np.ndarray, mean_Y: np.ndarray):
        num_layers, num_experts, num_ranks = hosted_YEW.shape
        self.shape, self.num_cells = hosted_YEW.shape, num_layers * num_ranks
        spot = hosted_YEW.reshape(-1).nonzero()[0]
        expert = spot // num_ranks
        rank = spot - (expert - expert // num_experts) * num_ranks
        num_hosts = np.bincount(expert)
        is_copied = num_hosts > 1
        is_shared = is_copied[expert]
        load = load_YE.ravel()[expert]
        self.spot_X, self.rank_X, self.load_X = spot[is_shared], rank[is_shared], load[is_shared]
        alone = ~is_shared
        self.alone = spot[alone]
        self.base = np.bincount(rank[alone], load[alone], self.num_cells)  # of what only its owner hosts
        self.mean = np.maximum(mean_Y, TINY).repeat(num_ranks)
        sizes = num_hosts[is_copied]
        self.starts = sizes.cumsum() - sizes  # where each replicated expert's hosts begin
        self.group_X = np.arange(len(sizes)).repeat(sizes)

    def balanced(self) -> np.ndarray:
        """[X] float, each host's share of its expert: equal at first, then shifted from full to light ranks."""
        # A twentieth of the mean keeps a rank without load from pulling without bound.
        base, mean = self.base + self.mean / 20, self.mean * 1.05
        pull, share_X = np.ones(self.num_cells), np.zeros(len(self.rank_X))
        for _ in range(BALANCE_STEPS):
            pull_X = pull[self.rank_X]
            share_X = pull_X / np.add.reduceat(pull_X, self.starts)[self.group_X]
            lack = mean / (base + np.bincount(self.rank_X, share_X * self.load_X, self.num_cells))
            pull *= lack * np.sqrt(lack)  # the power 1.5 gets there in fewer steps than 1, and 2 overshoots
        return share_X

    def rank_load(self, share_X: np.ndarray) -> np.ndarray:
        """[Y, W] load of each rank."""
        num_layers, _, num_ranks = self.shape
        extra = np.bincount(self.rank_X, share_X * self.load_X, self.num_cells)
        return (self.base + extra).reshape(num_layers, num_ranks)

    def whole_buckets(self, share_X: np.ndarray) -> np.ndarray:
        """[X] int64 that sum to BUCKETS for each expert: rounded down, and one more for the largest fractions cut off."""
        exact_X = share_X * BUCKETS
        count_X = np.floor(exact_X).astype(np.int64)
        order = np.lexsort((count_X - exact_X, self.group_X))  # of one expert still together
        missing = BUCKETS - np.add.reduceat(count_X, self.starts)
        count_X[order] += np.arange(len(order)) - self.starts[self.group_X] < missing[self.group_X]
        return count_X

    def shares(self, share_X: np.ndarray) -> np.ndarray:
        """[Y, E, W] float64, the whole table: experts without replicas on their owner."""
        share_YEW = np.zeros(self.shape)
        flat = share_YEW.reshape(-1)
        flat[self.alone] = 1.0
        flat[self.spot_X] = share_X
        return share_YEW


def _groups(node_of_rank_W: Sequence[int] | None, num_ranks: int) -> list[np.ndarray]:
    """For `_prefer_near`, in which ranks meet: [N, W] float64, 1 where group n holds rank w; nodes first, then all ranks."""
    node_W = np.zeros(num_ranks) if node_of_rank_W is None else np.asarray(node_of_rank_W)
    nodes = [(np.unique(node_W)[:, None] == node_W).astype(np.float64)]
    return nodes if len(nodes[0]) == 1 else [*nodes, np.ones((1, num_ranks))]


def _prefer_near(count_SE, share_SEW, groups: list[np.ndarray]) -> np.ndarray:
    """[W, E, W] shares of each source in whole buckets, near hosts first, such that hosts keep their parts.

    Of an expert, quota[w] = share[w] * its tokens. First every host takes tokens of its own rank, as many as there are of
    both; then the rest of each node's tokens and quotas meet, in proportion; then the rest of all. A source without tokens
    of an expert splits them as all sources together.
    """
    num_ranks, share_EW = len(count_SE), share_SEW[0]
    experts, rank_W = ((share_EW > 0).sum(axis=1) > 1).nonzero()[0], np.arange(num_ranks)
    token_SX, share_XW = count_SE[:, experts].astype(np.float64), share_EW[experts]
    quota_WX = share_XW.T * token_SX.sum(axis=0)
    flow_SXW = np.zeros((num_ranks, len(experts), num_ranks))
    met_WX = np.minimum(token_SX, quota_WX)
    flow_SXW[rank_W, :, rank_W] = met_WX
    token_SX, quota_WX = token_SX - met_WX, quota_WX - met_WX
    for same_NW in groups:
        # Every source of a group sends the same part of what it has left, every host there takes the same part of its room.
        same_WN = same_NW.T
        tokens_SX, room_WX = same_WN @ (same_NW @ token_SX), same_WN @ (same_NW @ quota_WX)  # of the whole group
        met_WX = np.minimum(tokens_SX, room_WX)
        sent_SX = token_SX * (met_WX / np.maximum(tokens_SX, TINY))
        part_WX = quota_WX / np.maximum(room_WX, TINY)
        flow_SXW += sent_SX[:, :, None] * part_WX.T * (same_WN @ same_NW)[:, None, :]
        token_SX, quota_WX = np.maximum(token_SX - sent_SX, 0), np.maximum(quota_WX - part_WX * met_WX, 0)
    total_SX1 = flow_SXW.sum(axis=2, keepdims=True)
    wanted_SXW = np.where(total_SX1 > 0, flow_SXW / np.maximum(total_SX1, TINY), share_XW)
    # Each source rounds at another fraction, so that what rounding does to a host evens out over the sources.
    fraction_S = (rank_W + 0.5) / num_ranks
    bucket_SXW = np.floor(wanted_SXW.cumsum(axis=2) * BUCKETS + fraction_S[:, None, None])
    bucket_SXW[:, :, 1:] -= bucket_SXW[:, :, :-1]
    near_SEW = share_SEW.copy()
    near_SEW[:, experts] = bucket_SXW / BUCKETS
    near_SEW.setflags(write=False)
    return near_SEW
