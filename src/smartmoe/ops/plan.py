"""Where each token copy goes: the stable order of copies by slot, its inverse, and counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingPlan:
    """The order in which token copies are laid out as rows.

    copy_of_row_R: [R] int64, the copy t * K + k that stands in a row; -1 in a row that only fills a buffer up.
    row_of_copy_TK: [T, K] int64, the inverse; R or more for a dropped copy.
    padded: whether any copy_of_row_R may be -1.
    """

    copy_of_row_R: torch.Tensor
    row_of_copy_TK: torch.Tensor
    padded: bool = False

    @property
    def num_rows(self) -> int:
        return self.copy_of_row_R.shape[0]

    @property
    def token_of_row_R(self) -> torch.Tensor:
        return self.copy_of_row_R.clamp(min=0) // max(self.row_of_copy_TK.shape[1], 1)


def slots_of(expert_idx_TK: torch.Tensor, slot_of_expert_E: torch.Tensor) -> torch.Tensor:
    """Map logical experts to slots; a dropped copy (-1) stays dropped. Both int64; returns [T, K] int64."""
    slot_TK = slot_of_expert_E[expert_idx_TK.clamp(min=0)]
    return torch.where(expert_idx_TK >= 0, slot_TK, -1)


def count_slots(slot_TK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Copies in each slot, dropped ones left out: [num_slots] int64. No host synchronisation (bincount would)."""
    flat = slot_TK.reshape(-1)
    count = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
    count.scatter_add_(0, torch.where(flat >= 0, flat, num_slots), torch.ones_like(flat))
    return count[:num_slots]


def make_plan(slot_TK: torch.Tensor, num_slots: int, num_rows: int) -> RoutingPlan:
    """Lay the kept copies out by slot, inside a slot in the order of tokens and then of k.

    slot_TK: [T, K] int64, -1 = dropped; num_rows: how many copies are kept (from the counts, known on the host by
    then).
    """
    flat = slot_TK.reshape(-1)
    order = torch.sort(torch.where(flat >= 0, flat, num_slots), stable=True).indices
    row_of_copy = torch.empty_like(order)
    row_of_copy[order] = torch.arange(order.shape[0], device=order.device)
    return RoutingPlan(order[:num_rows], row_of_copy.view(slot_TK.shape))


def make_padded_plan(slot_TK: torch.Tensor, num_slots: int, capacity: int) -> RoutingPlan:
    """Lay the copies out in buffers of `capacity` rows for each slot, without asking the host how full they are.

    Row s * capacity + c holds copy c of slot s. A copy beyond the capacity of its slot would be dropped.
    """
    count_S = count_slots(slot_TK, num_slots)
    dense = make_plan(slot_TK, num_slots, slot_TK.numel())
    start_S = count_S.cumsum(0) - count_S
    seat_C = torch.arange(capacity, device=slot_TK.device)
    filled_SC = seat_C < count_S.unsqueeze(1)
    if slot_TK.numel():
        source_SC = (start_S.unsqueeze(1) + seat_C).clamp(max=slot_TK.numel() - 1)
        copy_SC = torch.where(filled_SC, dense.copy_of_row_R[source_SC], -1)
    else:
        copy_SC = torch.full_like(filled_SC, -1, dtype=torch.int64)
    seat_TK = dense.row_of_copy_TK - start_S[slot_TK.clamp(min=0)]
    fits_TK = (slot_TK >= 0) & (seat_TK < capacity)
    row_TK = torch.where(fits_TK, slot_TK * capacity + seat_TK, num_slots * capacity)
    return RoutingPlan(copy_SC.reshape(-1), row_TK, padded=True)
