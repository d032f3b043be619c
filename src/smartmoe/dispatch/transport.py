"""What the direct dispatcher needs of a transport, in plain torch over collectives: the reference, and the form for CPUs.

Shape letters are those of `smartmoe.ops`, and C the tokens that a rank may have at most, N = W * C the tokens of all
ranks: token n = (source rank, t). A transport moves each token once to every rank that hosts one of its copies and
brings one row back; `smartmoe.dispatch.symmetric` does the same with kernels that store into the peers' memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from smartmoe.ops.all_to_all import gather_all, group_rank, group_size
from smartmoe.ops.plan import make_plan


@dataclass(frozen=True)
class Told:
    """What the calls of one layer tell the host without its waiting. on_host: [2] int32, rows that a routing needed on the
    fullest rank and did not find, 0 = all found theirs; the most rows that any routing needed. most: [1] int32, that number
    on the device."""

    on_host: torch.Tensor
    most: torch.Tensor


@dataclass(frozen=True)
class LocalPlan:
    """How the copies that this rank hosts are laid out as at most R rows, by (local slot, source rank, t, k).

    row_NK: [N, K] int64, num_rows or more = no row here; copy_R: [R] int64 copy n * K + k in each row, meaningless from
    num_rows on; weight_NK: [N, K] float32; count_L: [L] int64 rows of each slot, at most R in all. num_rows: [1] int32
    rows used; num_needed: [1] int32 rows that the routing asks for, more than R = the rest has no row; negated where some
    weight is not a number, as such a routing says nothing about the next one. All on the device.
    """

    row_NK: torch.Tensor
    copy_R: torch.Tensor
    weight_NK: torch.Tensor
    count_L: torch.Tensor
    num_rows: torch.Tensor
    num_needed: torch.Tensor

    @property
    def row_bound(self) -> int:
        return self.copy_R.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.row_NK, self.copy_R, self.weight_NK, self.count_L, self.num_rows, self.num_needed


def make_local_plan(transport, local_NK: torch.Tensor, weight_NK: torch.Tensor, row_bound: int) -> LocalPlan:
    """Lay the copies that `announce` told of out as at most `row_bound` rows. No host synchronisation."""
    plan = make_plan(local_NK, transport.slots_per_rank, row_bound, early=transport.plans_early)
    sizes = transport.bound(plan.count_S, weight_NK, row_bound)
    return LocalPlan(plan.row_of_copy_TK, plan.copy_of_row_R, weight_NK, *sizes)


class CollectiveTransport:
    """The transport over all-gathers and all-to-alls of whole buffers, in plain torch on any device and backend.

    It moves what the kernels move and W times more; rows that the kernels would leave unwritten are NaN here, so that a
    reader of too much shows. Collective over the group in every call but `bound` and `wait`.
    Reads sizes on the host.
    """

    shared_bytes = 0  # no rank stores into another's memory
    is_open = plans_early = False  # every call is complete in itself

    def __init__(self, group, slots_per_rank: int, capacity: int):
        self.group, self.slots_per_rank, self.capacity = group, slots_per_rank, capacity
        self.num_ranks, self.ep_rank = group_size(group), group_rank(group)
        self._weight_grad = None

    def new_told(self) -> Told:
        """What `sum_back` is to tell the host of one layer: nothing yet."""
        return Told(torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))

    def announce(self, slot_TK, weight_TK) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell all ranks the slots [T, K] int64 (-1 = dropped) and weights [T, K] float32 of this one's copies. Returns
        local_NK [N, K] int64, the local slot of each copy, -1 = none here, and weight_NK [N, K] float32."""
        local_NK = gather_all(self._padded(slot_TK, -1), self.group) - self.ep_rank * self.slots_per_rank
        local_NK = torch.where((local_NK >= 0) & (local_NK < self.slots_per_rank), local_NK, -1)
        return local_NK, gather_all(self._padded(weight_TK, 0.0), self.group)

    def bound(self, wanted_L, weight_NK, row_bound: int):
        """Cut counts where their running sum passes row_bound: (count_L, num_rows [1] int32, num_needed [1] int32)."""
        end_L = wanted_L.cumsum(0)
        kept_L = end_L.clamp(max=row_bound)
        count_L = torch.diff(kept_L, prepend=kept_L.new_zeros(1))
        sign = torch.where(weight_NK.isnan().any(), -1, 1)
        return count_L, kept_L[-1:].to(torch.int32), (sign * end_L[-1:]).to(torch.int32)

    def bring(self, x_TD, slot_TK, plan: LocalPlan) -> torch.Tensor:
        """The rows of the plan: [R, D], tokens of x_TD [T, D] of all ranks; NaN beyond the rows in use."""
        tokens_ND = gather_all(self._padded(x_TD, torch.nan), self.group)
        return self._poison_tail(tokens_ND[plan.copy_R // plan.weight_NK.shape[1]], plan)

    def weigh(self, grad_TD, slot_TK, rows_RD, plan: LocalPlan, reuse: bool = False) -> torch.Tensor:
        """The gradient of `sum_back` with weights, of the shape of rows_RD; the weights' gradients go to their source.
        reuse: it may take the place of rows_RD."""
        grad_ND = gather_all(self._padded(grad_TD, torch.nan), self.group)
        copy_R = plan.copy_R[: rows_RD.shape[0]]
        grad_RD = grad_ND[copy_R // plan.weight_NK.shape[1]].float()
        dot_R = (rows_RD.float() * grad_RD).sum(1)
        has_row_NK = plan.row_NK < plan.num_rows
        picked_NK = plan.row_NK.masked_fill(~has_row_NK, 0)
        grad_NK = dot_R[picked_NK].masked_fill(~has_row_NK, 0) if dot_R.numel() else torch.zeros_like(plan.weight_NK)
        self._weight_grad = self._exchange(grad_NK).view(self.num_ranks, self.capacity, -1).sum(0)
        weight_R = plan.weight_NK.reshape(-1)[copy_R]
        return self._poison_tail((grad_RD * weight_R.unsqueeze(1)).to(rows_RD.dtype), plan)

    def sum_back(self, rows_RD, plan: LocalPlan, slot_TK, told: Told | None = None, grad_TK=None) -> torch.Tensor:
        """Sum each token's rows over k (with `told`, times its weights), bring one row back to its source and sum there over
        ranks.

        grad_TK: [T, K] float32, takes the gradients of weights that the last `weigh` of all ranks sent here. Returns
        [T, D]; with `told` NaN everywhere, on every rank, when some rank's routing did not fit its rows.
        """
        part_ND = torch.zeros(plan.row_NK.shape[0], rows_RD.shape[1], device=rows_RD.device)
        for k in range(plan.row_NK.shape[1]):
            row_N = plan.row_NK[:, k]
            has_row_N = row_N < plan.num_rows
            picked = rows_RD[row_N[has_row_N]].float()
            part_ND[has_row_N] += picked * plan.weight_NK[has_row_N, k : k + 1] if told else picked
        back = self._exchange(part_ND.to(rows_RD.dtype)).float().view(self.num_ranks, self.capacity, -1)
        y_TD = back[0, : slot_TK.shape[0]]
        for source in range(1, self.num_ranks):
            y_TD = y_TD + back[source, : slot_TK.shape[0]]
        if grad_TK is not None:
            grad_TK.copy_(self._weight_grad[: slot_TK.shape[0]])
        if told is not None:
            needed = int(plan.num_needed)
            fits, is_odd = abs(needed) <= plan.row_bound, needed < 0
            word = (0 if is_odd else needed) if fits else (-1 if is_odd else -needed)
            word_W = gather_all(torch.tensor([word], dtype=torch.int32), self.group)
            told.most[0] = told.on_host[1] = max(int(told.most[0]), int(word_W.abs().max()))
            lacking = int(word_W.min())
            if lacking < -1:
                told.on_host[0] = -lacking
            if lacking < 0:
                y_TD = torch.full_like(y_TD, torch.nan)
        return y_TD.to(rows_RD.dtype)

    def wait(self) -> None:
        """Return when all calls so far have told what they tell."""

    def _padded(self, tensor, value):
        out = tensor.new_full((self.capacity, tensor.shape[1]), value)
        out[: tensor.shape[0]] = tensor
        return out

    def _poison_tail(self, rows_RD, plan):
        tail_R = torch.arange(rows_RD.shape[0], device=rows_RD.device) >= plan.num_rows
        return rows_RD.masked_fill(tail_R.unsqueeze(1), torch.nan)

    def _exchange(self, parts_ND):
        """Part w of the rows goes to rank w; returns what the ranks sent here."""
        if self.num_ranks == 1:
            return parts_ND
        back = torch.empty_like(parts_ND)
        dist.all_to_all_single(back, parts_ND.contiguous(), group=self.group)
        return back
