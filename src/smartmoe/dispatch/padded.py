"""GShard's exchange: buffers of a fixed capacity for every slot, all parts of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from smartmoe.ops.all_to_all import exchange_rows, group_size
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import RoutingPlan, count_slots, make_padded_plan


@dataclass(frozen=True)
class Handle:
    """What combine needs to undo a dispatch. count_L: [L] int64, buffer rows of each local slot (all equal)."""

    plan: RoutingPlan
    capacity: int
    count_L: torch.Tensor


class PaddedDispatcher:
    """Exchange of [slots, capacity] buffers; experts compute on the padding too, as in the original.

    The capacity is the gate's own bound on the copies from one rank for one expert (`routing.max_copies`): no counts
    are exchanged and the host never waits. Without such a bound it is the largest count of any rank and slot: one
    all-reduce and one host synchronisation. Sources: GShard (Lepikhin et al., 2020), DeepSpeed-MoE (Rajbhandari et
    al., ICML'22).
    Collective over the group: two all-to-alls of equal parts.
    """

    def __init__(self, ep_group, slots_per_rank: int):
        self.group, self.slots_per_rank = ep_group, slots_per_rank
        self.num_ranks = group_size(ep_group)

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result."""
        rows_RD, handle = self.dispatch(x_TD, slot_TK, routing.max_copies)
        return self.combine(experts(rows_RD, handle.count_L), handle, routing.weight_TK)

    def dispatch(self, x_TD, slot_TK, capacity: int | None = None) -> tuple[torch.Tensor, Handle]:
        """Send one buffer of `capacity` rows for each slot; None = find the smallest that drops nothing.

        x_TD: [T, D]; slot_TK: [T, K] int64, -1 = dropped. Returns [L * W * capacity, D] sorted by (local slot, source
        rank) and the handle for `combine`. Collective.
        """
        num_slots = self.num_ranks * self.slots_per_rank
        if capacity is None:
            capacity = self._largest_count(count_slots(slot_TK, num_slots))
        plan = make_padded_plan(slot_TK, num_slots, capacity)
        splits = [self.slots_per_rank * capacity] * self.num_ranks
        rows = exchange_rows(permute(x_TD, plan), splits, splits, self.group)
        rows = rows.view(self.num_ranks, self.slots_per_rank, capacity, -1).transpose(0, 1).reshape(-1, x_TD.shape[1])
        count_L = torch.full((self.slots_per_rank,), self.num_ranks * capacity, device=slot_TK.device)
        return rows, Handle(plan, capacity, count_L)

    def combine(self, rows_RD, handle: Handle, weight_TK: torch.Tensor) -> torch.Tensor:
        """Bring the buffers back and sum the copies with weights [T, K] float32: returns [T, D]. Collective."""
        width = rows_RD.shape[1]
        rows = (
            rows_RD.view(self.slots_per_rank, self.num_ranks, handle.capacity, width).transpose(0, 1).reshape(-1, width)
        )
        splits = [self.slots_per_rank * handle.capacity] * self.num_ranks
        return combine(exchange_rows(rows, splits, splits, self.group), weight_TK, handle.plan)

    def _largest_count(self, count_S):
        # one row at least, so that no tensor of the exchange is empty
        largest = count_S.max().clamp(min=1)
        if self.num_ranks > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)
