"""FasterMoE's exchange: the all-to-all cut into steps over groups of ranks, experts computing while the next step
travels."""

from __future__ import annotations

import numpy as np
import torch

from smartmoe.dispatch.shadow import ShadowCost, choose_shadows, start_shadow, wait_shadow
from smartmoe.ops.all_to_all import gather_all, group_rank, group_size, start_exchange, wait_exchange
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import count_slots, make_plan
from smartmoe.ops.regroup import order_by_slot, reorder, restore


class OverlappedDispatcher:
    """Pipelined exchange, with expert shadowing when a cost is given. Source: FasterMoE (He et al., PPoPP'22).

    The ranks form `num_groups` runs of neighbours. In step s a rank sends to the run that lies s runs behind its own
    and receives from the one s runs before; all sends are launched first, then each step is computed as it arrives
    and its results launched back. Backward runs the same pipeline in reverse. Collective over the group, in the same
    order on all ranks also where they have no rows: one all-gather of counts, 2 * num_groups all-to-alls; one host
    synchronisation, for the counts.
    """

    def __init__(self, ep_group, slots_per_rank: int, num_groups: int = 2, shadow_cost: ShadowCost | None = None):
        self.group, self.slots_per_rank = ep_group, slots_per_rank
        self.num_ranks, self.ep_rank = group_size(ep_group), group_rank(ep_group)
        self.shadow_cost = shadow_cost
        self.num_groups = min(num_groups, self.num_ranks)
        self.run_of_rank = [w * self.num_groups // self.num_ranks for w in range(self.num_ranks)]

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result but for rounding: a weight's gradient is summed over the
        steps in an order that depends on the rank. `experts` needs weights() and compute() for
        shadowing.
        """
        count_WS = self._gather_counts(slot_TK)
        count_host_WS = count_WS.cpu().numpy()
        shadows = self._choose_shadows(count_host_WS, x_TD, experts)
        slot_TK, num_local = self._divert(slot_TK, count_host_WS, shadows)
        count_WS[:, shadows] = 0
        count_host_WS[:, shadows] = 0
        num_sent = int(count_host_WS[self.ep_rank].sum())
        plan = make_plan(slot_TK, count_WS.shape[1] + len(shadows), num_sent + sum(num_local))
        rows_RD = permute(x_TD, plan)
        parts = rows_RD.split([*self._run_sizes(count_host_WS), sum(num_local)])
        parts = self._pipeline(parts[:-1], parts[-1], count_WS, count_host_WS, shadows, num_local, experts)
        return combine(torch.cat(parts), routing.weight_TK, plan)

    def _gather_counts(self, slot_TK):
        count_S = count_slots(slot_TK, self.num_ranks * self.slots_per_rank)
        return gather_all(count_S, self.group).view(self.num_ranks, -1)

    def _choose_shadows(self, count_WS: np.ndarray, x_TD, experts) -> list[int]:
        if self.shadow_cost is None or self.num_ranks == 1:
            return []
        weights = [weight for weight in experts.weights() if weight is not None]
        matrices = sum(weight[0].numel() for weight in weights if weight.dim() == 3)
        return choose_shadows(
            count_WS.sum(0),
            self.num_ranks,
            row_bytes=x_TD.shape[1] * x_TD.element_size(),
            expert_bytes=sum(weight[0].numel() * weight.element_size() for weight in weights),
            row_flops=2.0 * matrices,
            cost=self.shadow_cost,
        )

    def _divert(self, slot_TK, count_WS, shadows):
        """Number shadowed slots behind all real ones, so that their rows come last; and this rank's rows for each."""
        if not shadows:
            return slot_TK, []
        num_slots = count_WS.shape[1]
        slot_of_slot = np.arange(num_slots + 1)
        slot_of_slot[shadows] = num_slots + np.arange(len(shadows))
        slot_of_slot[-1] = -1  # index -1, a dropped copy, reads the last entry
        table = torch.from_numpy(slot_of_slot).to(slot_TK.device)
        return table[slot_TK], [int(count_WS[self.ep_rank, slot]) for slot in shadows]

    def _run_sizes(self, count_WS):
        """Rows that this rank sends to each run of ranks."""
        per_rank = count_WS[self.ep_rank].reshape(self.num_ranks, -1).sum(1)
        return [int(sum(per_rank[w] for w in self._members(run))) for run in range(self.num_groups)]

    def _members(self, run: int) -> list[int]:
        return [w for w in range(self.num_ranks) if self.run_of_rank[w] == run]

    def _splits(self, count_WS, step: int) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each rank in one step, zero for ranks that are not part of it."""
        mine, per_rank_WW = self.run_of_rank[self.ep_rank], count_WS.reshape(self.num_ranks, self.num_ranks, -1).sum(2)
        to, source = (mine + step) % self.num_groups, (mine - step) % self.num_groups
        send = [int(per_rank_WW[self.ep_rank, w]) if self.run_of_rank[w] == to else 0 for w in range(self.num_ranks)]
        receive = [
            int(per_rank_WW[w, self.ep_rank]) if self.run_of_rank[w] == source else 0 for w in range(self.num_ranks)
        ]
        return send, receive

    def _pipeline(self, parts, shadow_rows, count_WS, count_host_WS, shadows, num_local, experts):
        """Send, compute, return all parts (one for each run of ranks) and compute the shadowed rows here.

        The order of the calls is the schedule, and its reverse is the schedule of backward.
        """
        mine, num_slots = self.run_of_rank[self.ep_rank], self.slots_per_rank
        splits = [self._splits(count_host_WS, step) for step in range(self.num_groups)]
        sends = [
            start_exchange(parts[(mine + step) % self.num_groups], *splits[step], self.group)
            for step in range(self.num_groups)
        ]
        weights = experts.weights() if shadows else None
        transfer = start_shadow(shadows, num_slots, weights, self.group) if shadows else None
        own_WL = count_WS[:, self.ep_rank * num_slots : (self.ep_rank + 1) * num_slots]
        returns = []
        for step, (send_splits, recv_splits) in enumerate(splits):
            source_WL = own_WL[self._members((mine - step) % self.num_groups)]
            order = order_by_slot(source_WL, sum(recv_splits))
            rows = reorder(wait_exchange(*sends[step]), order)
            out = restore(experts(rows, source_WL.sum(0)), order)
            returns.append(start_exchange(out, recv_splits, send_splits, self.group))
        shadow_out = []
        if shadows:
            count_Z = torch.tensor(num_local, device=count_WS.device)
            shadow_out = [experts.compute(shadow_rows, count_Z, wait_shadow(*transfer, weights))]
        done = [wait_exchange(*pending) for pending in returns]
        return [*(done[(run - mine) % self.num_groups] for run in range(self.num_groups)), *shadow_out]
