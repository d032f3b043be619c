"""Capacity, for gates. Letters: W workers, L experts of each, E = W * L, T tokens and K copies of each."""

from __future__ import annotations

import torch

from fmoe.functions import count_by_gate, group_of
from smartmoe.ops.all_to_all import exchange_counts
from smartmoe.ops.plan import make_plan


@torch.no_grad()
def limit_by_capacity(topk_idx: torch.Tensor, num_expert: int, world_size: int, capacity: int):
    """Let every expert take at most `capacity` copies of all workers, the first workers first.

    topk_idx: [T, K] int64, -1 = dropped. Returns (copies that each expert takes of this worker [E], copies that this worker's
    experts take of each worker [E], topk_idx with -1 for those that found no seat). Collective where world_size > 1.
    """
    _, _, gec_E = count_by_gate(topk_idx, num_expert, world_size, require_pos=False)
    gec_WL = gec_E.view(world_size, num_expert)
    taken_WL = torch.minimum(gec_WL, (capacity - (gec_WL.cumsum(0) - gec_WL)).clamp(min=0))
    limit_E = exchange_counts(taken_WL, group_of(world_size)).flatten()
    return limit_E, taken_WL.flatten(), prune_gate_by_capacity(topk_idx, limit_E, num_expert, world_size)


@torch.no_grad()
def prune_gate_by_capacity(topk_idx: torch.Tensor, capacity_E: torch.Tensor, num_expert: int, world_size: int):
    """Drop the copies of this worker beyond capacity_E [E] of each expert: topk_idx [T, K] with -1 for them. Copies are
    admitted in the order of tokens, then of k (in FastMoE in any order)."""
    plan = make_plan(topk_idx, num_expert * world_size, topk_idx.numel())
    start_E, expert_idx_TK = plan.count_S.cumsum(0) - plan.count_S, topk_idx.clamp(min=0)
    place_TK = plan.row_of_copy_TK - start_E[expert_idx_TK]
    return torch.where(place_TK < capacity_E[expert_idx_TK], topk_idx, -1)
