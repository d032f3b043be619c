"""FastMoE's exchange: counts first, then exactly the rows that exist, by all-to-all-v."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smartmoe.ops.all_to_all import exchange_counts, exchange_rows, group_size
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import RoutingPlan, count_slots, make_plan
from smartmoe.ops.regroup import RowOrder, order_by_slot, reorder, restore


@dataclass(frozen=True)
class Handle:
    """What combine needs to undo a dispatch. count_L: [L] int64, rows of each local slot."""

    plan: RoutingPlan
    order: RowOrder
    send_splits: list[int]
    recv_splits: list[int]
    count_L: torch.Tensor


class BasicDispatcher:
    """Dropless exchange with exact sizes. Source: FastMoE (He et al., 2021), global scatter and gather.

    Collective over the group: one all-to-all of counts and two of rows; one host synchronisation, for the sizes.
    """

    def __init__(self, ep_group, slots_per_rank: int):
        self.group, self.slots_per_rank = ep_group, slots_per_rank
        self.num_ranks = group_size(ep_group)

    def __call__(self, x_TD, routing, slot_TK, experts):
        """Carry tokens to experts and back.

        x_TD: [T, D]; routing: gates.Routing; slot_TK: [T, K] int64, -1 = dropped; experts: called as experts(rows_RD,
        count_L). Returns [T, D], zero for a token whose copies are all dropped.
        """
        rows_RD, handle = self.dispatch(x_TD, slot_TK)
        return self.combine(experts(rows_RD, handle.count_L), handle, routing.weight_TK)

    def dispatch(self, x_TD: torch.Tensor, slot_TK: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Send token copies to the ranks of their slots.

        x_TD: [T, D]; slot_TK: [T, K] int64, -1 = dropped. Returns the received rows [R, D], sorted by local slot,
        inside a slot by (source rank, token, k), and the handle for `combine`. Collective; one host synchronisation.
        """
        num_slots = self.num_ranks * self.slots_per_rank
        sent_WL = count_slots(slot_TK, num_slots).view(self.num_ranks, self.slots_per_rank)
        received_WL = exchange_counts(sent_WL, self.group)
        send_splits, recv_splits = torch.stack([sent_WL.sum(1), received_WL.sum(1)]).tolist()
        plan = make_plan(slot_TK, num_slots, sum(send_splits))
        order = order_by_slot(received_WL, sum(recv_splits))
        rows_RD = exchange_rows(permute(x_TD, plan), send_splits, recv_splits, self.group)
        return reorder(rows_RD, order), Handle(plan, order, send_splits, recv_splits, received_WL.sum(0))

    def combine(self, rows_RD: torch.Tensor, handle: Handle, weight_TK: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows back and sum them with weights [T, K] float32: returns [T, D]. Collective."""
        rows_RD = exchange_rows(restore(rows_RD, handle.order), handle.recv_splits, handle.send_splits, self.group)
        return combine(rows_RD, weight_TK, handle.plan)
