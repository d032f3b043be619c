"""Where each token copy goes: the stable order of copies by slot, its inverse, and counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smartmoe.ops.extension import kernels_for
from smartmoe.ops.hashing import buckets
from smartmoe.ops.library import register

# Four tables of so many int32 are 47 KB of shared memory. 48 KB, with the kernel's own 16 bytes, are refused at the launch.
MAX_KERNEL_SLOTS = 3008


@dataclass(frozen=True)
class RoutingPlan:
    """The order in which token copies are laid out as rows.

    copy_of_row_R: [R] int64, the copy t * K + k that stands in a row; -1 in a row without a copy.
    row_of_copy_TK: [T, K] int64, the inverse; R or more for a dropped copy.
    padded: the rows without a copy fill buffers up: they are zero and so are their gradients. Otherwise they all lie
    behind the others and nothing is said about their contents, which may be anything and are used by nobody.
    count_S: [S] int64, copies of each slot.
    """

    copy_of_row_R: torch.Tensor
    row_of_copy_TK: torch.Tensor
    padded: bool = False
    count_S: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.copy_of_row_R.shape[0]

    @property
    def token_of_row_R(self) -> torch.Tensor:
        """[R] int64, the token whose copy stands in a row, 0 in a row without a copy."""
        return self.copy_of_row_R.clamp(min=0) // max(self.row_of_copy_TK.shape[1], 1)


def slots_of(
    expert_idx_TK: torch.Tensor, table_EB: torch.Tensor, token_id_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Map logical experts to slots: copy (t, k) takes entry `buckets(token id, k)` of its expert's row.

    expert_idx_TK: [T, K] int64, -1 = dropped, and stays so. table_EB: [E, B] int64 slots, B a power of two; an expert with
    replicas has each host in the share of entries that the host is to get. token_id_T: [T] int64, not read when B is 1.
    Returns [T, K] int64. A function of its arguments alone, so that recomputation and every plan see the same.
    """
    return _slots_of(expert_idx_TK, table_EB, token_id_T)


def count_slots(slot_TK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Copies in each slot, dropped ones left out: [num_slots] int64. No host synchronisation (bincount would)."""
    return _count_slots(slot_TK, num_slots)


def ends_of(count_S: torch.Tensor) -> torch.Tensor:
    """Running sums [S] int32 of the counts [S] int64 of slots: the row behind the last one of each."""
    return _ends_of(count_S)


def make_plan(slot_TK: torch.Tensor, num_slots: int, num_rows: int, early: bool = False) -> RoutingPlan:
    """Lay the kept copies out by slot, inside a slot in the order of tokens and then of k.

    slot_TK: [T, K] int64, -1 = dropped; num_rows: how many copies are kept (from the counts, known on the host by
    then), or any other number R of rows to lay them out in: what does not fit is dropped, and rows that are left over
    lie behind the others. No host synchronisation. early: the kernels may begin while the one before them runs, and let a
    next one that asks for it begin while they run (compute capability 9.0); they wait before they read.
    """
    count_S, copy_of_row_R, row_of_copy_TK = _routing_plan(slot_TK, num_slots, 0, num_rows, early)
    return RoutingPlan(copy_of_row_R, row_of_copy_TK, count_S=count_S)


def make_padded_plan(slot_TK: torch.Tensor, num_slots: int, capacity: int) -> RoutingPlan:
    """Lay the copies out in buffers of `capacity` rows for each slot, without asking the host how full they are.

    Row s * capacity + c holds copy c of slot s. A copy beyond the capacity of its slot would be dropped.
    """
    count_S, copy_of_row_R, row_of_copy_TK = _routing_plan(slot_TK, num_slots, capacity, num_slots * capacity, False)
    return RoutingPlan(copy_of_row_R, row_of_copy_TK, padded=True, count_S=count_S)


def _run_slots(expert_idx_TK, table_EB, token_id_T):
    kernels = kernels_for(expert_idx_TK)
    if kernels:
        token_id_T = None if token_id_T is None else token_id_T.contiguous()
        return kernels.slots_of(expert_idx_TK.contiguous(), table_EB.contiguous(), token_id_T)
    return slots_reference(expert_idx_TK, table_EB, token_id_T)


def _run_count(slot_TK, num_slots):
    kernels = kernels_for(slot_TK) if num_slots <= MAX_KERNEL_SLOTS else None
    return kernels.count_slots(slot_TK.contiguous(), num_slots) if kernels else count_slots_reference(slot_TK, num_slots)


def _run_ends(count_S):
    kernels = kernels_for(count_S)
    return kernels.ends_of(count_S.contiguous()) if kernels else count_S.cumsum(0, dtype=torch.int32)


def _run_plan(slot_TK, num_slots, capacity, num_rows, early):
    kernels = kernels_for(slot_TK) if 0 < num_slots <= MAX_KERNEL_SLOTS else None
    if kernels:
        return kernels.plan_rows(slot_TK.contiguous(), num_slots, capacity, num_rows, early)
    return plan_reference(slot_TK, num_slots, capacity, num_rows)


def _fake_plan(slot_TK, num_slots, capacity, num_rows, early):
    return slot_TK.new_empty(num_slots), slot_TK.new_empty(num_rows), torch.empty_like(slot_TK)


_slots_of = register(
    "slots_of(Tensor expert_idx_TK, Tensor table_EB, Tensor? token_id_T) -> Tensor",
    _run_slots,
    lambda expert_idx_TK, table_EB, token_id_T: expert_idx_TK.new_empty(expert_idx_TK.shape),
)
_count_slots = register(
    "count_slots(Tensor slot_TK, int num_slots) -> Tensor",
    _run_count,
    lambda slot_TK, num_slots: slot_TK.new_empty(num_slots),
)
_ends_of = register(
    "ends_of(Tensor count_S) -> Tensor",
    _run_ends,
    lambda count_S: count_S.new_empty(count_S.shape, dtype=torch.int32),
)
_routing_plan = register(
    "routing_plan(Tensor slot_TK, int num_slots, int capacity, int num_rows, bool early) -> (Tensor, Tensor, Tensor)",
    _run_plan,
    _fake_plan,
)


def slots_reference(expert_idx_TK, table_EB, token_id_T=None) -> torch.Tensor:
    """`slots_of` in plain torch."""
    expert_TK, num_buckets = expert_idx_TK.clamp(min=0), table_EB.shape[1]
    if num_buckets == 1:
        slot_TK = table_EB[:, 0][expert_TK]
    else:
        bucket_TK = buckets(token_id_T, expert_idx_TK.shape[1], num_buckets)
        slot_TK = table_EB.reshape(-1)[expert_TK * num_buckets + bucket_TK]
    return torch.where(expert_idx_TK >= 0, slot_TK, -1)


def count_slots_reference(slot_TK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """`count_slots` in plain torch."""
    flat = slot_TK.reshape(-1)
    count = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
    count.scatter_add_(0, torch.where(flat >= 0, flat, num_slots), torch.ones_like(flat))
    return count[:num_slots].clone()


def plan_reference(slot_TK: torch.Tensor, num_slots: int, capacity: int, num_rows: int):
    """(count_S, copy_of_row_R, row_of_copy_TK) in plain torch. capacity 0: rows lie close; else buffers of that many
    rows for each slot."""
    flat, device = slot_TK.reshape(-1), slot_TK.device
    count_S = count_slots_reference(slot_TK, num_slots)
    order_N = torch.sort(torch.where(flat >= 0, flat, num_slots), stable=True).indices
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.shape[0], device=device)
    if capacity:
        start_S = count_S.cumsum(0) - count_S
        seat_N = place_N - start_S[flat.clamp(min=0)]
        row_N = torch.where((flat >= 0) & (seat_N < capacity), flat * capacity + seat_N, num_rows)
        seat_C = torch.arange(capacity, device=device)
        source_R, filled_R = (start_S.unsqueeze(1) + seat_C).reshape(-1), (seat_C < count_S.unsqueeze(1)).reshape(-1)
    else:
        row_N = torch.where(flat >= 0, place_N, num_rows)
        source_R = torch.arange(num_rows, device=device)
        filled_R = source_R < count_S.sum()
    if not flat.shape[0]:
        return count_S, torch.full_like(source_R, -1), row_N.view(slot_TK.shape)
    copy_R = torch.where(filled_R, order_N[source_R.clamp(max=flat.shape[0] - 1)], -1)
    return count_S, copy_R, row_N.view(slot_TK.shape)
