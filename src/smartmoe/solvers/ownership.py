"""Solvers of ownership: which rank owns which expert.

Layer 0: numpy only. Names as in `placement`: E logical experts, W ranks, L owned slots per
rank, N = W * L slots. Loads are token copies, of any unit, as long as they add up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from smartmoe.placement import EMPTY, Placement, check_load, num_moves, rank_load

# solve_least_move stops as soon as the fullest rank is this close (as a fraction) to what greedy reaches.
LEAST_MOVE_SLACK = 0.02
TIE_ORDERS = ("stable", "legacy")


def check_solvable(load_E, current: Placement) -> np.ndarray:
    """[E] float64, these loads; ValueError unless they and the placement are what the solvers of ownership take."""
    if current.num_slots - current.expert_of_slot.count(EMPTY) != current.num_experts:
        raise ValueError("placement: this solver places every expert once; the current placement holds replicas")
    return check_load(load_E, current)


def solve_greedy(load_E: Sequence[float] | np.ndarray, current: Placement, tie_order: str = "stable") -> Placement:
    """Longest-processing-time greedy: heaviest expert first, each onto the least-loaded rank with a free slot.

    On a tie with the expert's current rank that rank is preferred, otherwise the lowest one; inside a rank experts take
    slots as they arrive. Returns `current` unless the fullest rank's load falls strictly. (SmartMoE, ATC'23, section 6)

    Args:
        load_E: [E] load per logical expert, not negative.
        current: where the experts are now, without replicas.
        tie_order: how experts of equal load are ordered. "stable" = by number; "legacy" = as numpy <= 1.24 on a plain
            CPU left them, which the lists of placement changes that the paper's artifact published depend on.
    """
    load_E = check_solvable(load_E, current)
    if tie_order not in TIE_ORDERS:
        raise ValueError(f'placement: tie_order = "{tie_order}" is not one of {", ".join(TIE_ORDERS)}')
    legacy = tie_order == "legacy"
    order = _legacy_argsort(load_E.tolist())[::-1] if legacy else np.argsort(-load_E, kind="stable").tolist()
    new = _fill(order, load_E, current)
    return new if rank_load(load_E, new).max() < rank_load(load_E, current).max() else current


def _fill(order: Iterable[int], load_E: np.ndarray, current: Placement) -> Placement:
    """Put experts, in this order, each on the least-loaded rank that has a free slot."""
    slots_per_rank, load, home = current.slots_per_rank, load_E.tolist(), current.rank_of_expert().tolist()
    slots, used = [EMPTY] * current.num_slots, [0] * current.num_ranks
    total = [0.0] * current.num_ranks
    heap = [(0.0, ep_rank) for ep_rank in range(current.num_ranks)]
    for expert in order:
        # An entry is out of date when its rank has filled up or has got heavier since.
        while used[heap[0][1]] == slots_per_rank or heap[0][0] != total[heap[0][1]]:
            heapq.heappop(heap)
        least, ep_rank = heap[0]
        if total[home[expert]] == least and used[home[expert]] < slots_per_rank:
            ep_rank = home[expert]
        slots[ep_rank * slots_per_rank + used[ep_rank]] = expert
        used[ep_rank] += 1
        total[ep_rank] += load[expert]
        heapq.heappush(heap, (total[ep_rank], ep_rank))
    return Placement(current.num_ranks, tuple(slots))


def _legacy_argsort(values: list[float]) -> list[int]:
    """Ascending argsort with the tie order of numpy <= 1.24's default (unstable) sort.

    That sort is a quicksort with the median of first, middle and last as pivot, and insertion sort for runs of at most
    16. Its rescue from quadratic inputs (heapsort below depth 2 log2 n) is left out: no measured load came near it.
    """
    order = list(range(len(values)))

    def exchange_if_less(a: int, b: int) -> None:
        if values[order[a]] < values[order[b]]:
            order[a], order[b] = order[b], order[a]

    runs = [(0, len(order) - 1)]
    while runs:
        low, high = runs.pop()
        if high - low <= 15:
            order[low : high + 1] = sorted(order[low : high + 1], key=values.__getitem__)  # insertion sort is stable
            continue
        middle = low + (high - low) // 2
        exchange_if_less(middle, low)
        exchange_if_less(high, middle)
        exchange_if_less(middle, low)
        pivot, left, right = values[order[middle]], low, high - 1
        order[middle], order[right] = order[right], order[middle]
        while True:
            left += 1
            while values[order[left]] < pivot:
                left += 1
            right -= 1
            while pivot < values[order[right]]:
                right -= 1
            if left >= right:
                break
            order[left], order[right] = order[right], order[left]
        order[left], order[high - 1] = order[high - 1], order[left]
        runs += [(low, left - 1), (left + 1, high)]
    return order


def solve_least_move(load_E: Sequence[float] | np.ndarray, current: Placement) -> Placement:
    """Balance nearly as well as greedy while moving few experts; experts that stay on their rank keep their slot.

    From the current placement, the fullest rank gives an expert away, or exchanges one with a lighter one, as long as
    that helps and until its load is within LEAST_MOVE_SLACK of greedy's. Where that search gets stuck, greedy's groups
    are used, dealt to the ranks that already hold most of each. Two promises: the fullest rank's load is at most
    (1 + LEAST_MOVE_SLACK) times greedy's, and no more experts cross ranks than with greedy. Ties go to the lowest slot.

    Args:
        load_E: [E] load per logical expert, not negative.
        current: where the experts are now, without replicas. Returned as it is when already within the slack.
    """
    load_E = check_solvable(load_E, current)
    greedy = solve_greedy(load_E, current)
    limit = rank_load(load_E, greedy).max() * (1 + LEAST_MOVE_SLACK)
    if rank_load(load_E, current).max() <= limit:
        return current
    found = [_search(load_E, current, limit), _relabel(greedy, current), keep_slots(greedy.rank_of_expert(), current)]
    good = [placement for placement in found if rank_load(load_E, placement).max() <= limit]
    return min(good, key=lambda placement: num_moves(current, placement))


def _search(load_E: np.ndarray, current: Placement, limit: float) -> Placement:
    """Local search: the best move or exchange out of the fullest rank, repeated until within `limit` or stuck."""
    expert_N, rank_N = np.array(current.expert_of_slot), np.arange(current.num_slots) // current.slots_per_rank
    load_N, empty_N = np.append(load_E, 0.0)[expert_N], expert_N == EMPTY
    for _ in range(2 * current.num_experts):
        total_W = np.bincount(rank_N, weights=load_N, minlength=current.num_ranks)
        fullest = int(total_W.argmax())
        if total_W[fullest] <= limit:
            break
        own = np.flatnonzero(rank_N == fullest)
        gain_LN = load_N[own, None] - load_N[None, :]  # what the fullest rank loses to the other slot's rank
        worst_LN = np.maximum(total_W[fullest] - gain_LN, total_W[rank_N] + gain_LN)
        best = worst_LN.min()
        if best >= total_W[fullest]:
            break
        choices = np.argwhere(worst_LN == best)
        own_idx, slot = choices[np.argmax(empty_N[choices[:, 1]])]  # an empty slot saves the way back
        pair = [own[own_idx], slot]
        for array in (expert_N, load_N, empty_N):
            array[pair] = array[pair[::-1]]
    found = Placement(current.num_ranks, tuple(expert_N.tolist()))
    return keep_slots(found.rank_of_expert(), current)  # an expert may have left and come back to another slot


def _relabel(target: Placement, current: Placement) -> Placement:
    """The groups of `target`, each dealt to the rank that already holds most of it (largest overlap first)."""
    num_ranks, group_E = current.num_ranks, target.rank_of_expert()
    overlap = np.bincount(group_E * num_ranks + current.rank_of_expert(), minlength=num_ranks * num_ranks)
    rank_of_group, taken = np.full(num_ranks, -1), np.zeros(num_ranks, dtype=bool)
    for pair in np.argsort(-overlap, kind="stable"):
        group, ep_rank = divmod(int(pair), num_ranks)
        if rank_of_group[group] < 0 and not taken[ep_rank]:
            rank_of_group[group], taken[ep_rank] = ep_rank, True
    return keep_slots(rank_of_group[group_E], current)


def keep_slots(rank_of_expert_E: np.ndarray, current: Placement) -> Placement:
    """Placement with these ranks: an expert that stays keeps its slot, newcomers fill what is free, in order."""
    slots_per_rank, stays_E = current.slots_per_rank, rank_of_expert_E == current.rank_of_expert()
    slot_N = np.full(current.num_slots, EMPTY)
    slot_N[current.primary_slot_E[stays_E]] = stays_E.nonzero()[0]
    slots = slot_N.tolist()
    for expert in (~stays_E).nonzero()[0].tolist():
        start = int(rank_of_expert_E[expert]) * slots_per_rank
        slots[slots.index(EMPTY, start, start + slots_per_rank)] = expert
    return Placement(current.num_ranks, tuple(slots))
