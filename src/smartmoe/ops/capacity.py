"""The order in which token copies compete for seats, and the pruning of copies that find none.

Copies are admitted in the order (k, token id) over all ranks of the group, as one process would that held all the
tokens.
Ranks exchange counts, never tokens: each holds whole runs of consecutive token ids ("segments": its part of each
sample), so the counts of every segment tell a rank how many copies stand before its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from smartmoe.ops.all_to_all import gather_all, group_rank, group_size


@dataclass(frozen=True)
class CopyOrder:
    """Where this rank's copies stand among all copies of the group. G segments of the group, in the order of token
    ids.

    place_TK: [T, K] int64, how many copies of the same expert and the same k come before.
    count_KGE: [K, G, E] int64, copies of each expert in each segment.
    segment_T: [T] int64, the segment of each of this rank's tokens.
    token_order_T: [T] int64, this rank's tokens in the order of their ids.
    """

    place_TK: torch.Tensor
    count_KGE: torch.Tensor
    segment_T: torch.Tensor
    token_order_T: torch.Tensor

    @property
    def total_KE(self) -> torch.Tensor:
        """[K, E] int64, copies of each expert over the whole group."""
        return self.count_KGE.sum(1)


def capacity_limit(capacity: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Most copies that one expert takes of `num_tokens` tokens: ceil(capacity * tokens * k / experts)."""
    return math.ceil(capacity * num_tokens * top_k / num_experts)


def order_copies(
    expert_idx_TK, token_id_T, num_experts: int, num_segments: int | None, seq_len: int, group
) -> CopyOrder:
    """Find the place of every copy.

    expert_idx_TK: [T, K] int64, no dropped ones; token_id_T: [T] int64; num_segments: runs of token ids on this rank
    (equal on all ranks and of equal length), None = find out, which reads one number on the host. group: None = this
    rank alone, which may have none.
    Collective over the group: one all-gather of (K * E + 1) * segments numbers. Raises ValueError for no segments where
    there is a group.
    """
    num_tokens, top_k = expert_idx_TK.shape
    if num_segments == 0 and group_size(group) > 1:
        raise ValueError(
            "the copies of all ranks compete for seats, which needs equally many samples on every rank, and this rank has "
            'none: give it some, or take gate.scope = "local"'
        )
    order_T = torch.argsort(token_id_T)
    local_segment_T = torch.empty_like(order_T)
    local_segment_T[order_T], num_segments = _segments(token_id_T[order_T], num_segments, seq_len)
    flat = (torch.arange(top_k, device=order_T.device) * num_segments + local_segment_T.unsqueeze(1)) * num_experts
    flat = flat + expert_idx_TK
    local = torch.zeros(top_k * num_segments * num_experts, dtype=torch.int64, device=order_T.device)
    local.scatter_add_(0, flat.reshape(-1), torch.ones_like(flat.reshape(-1)))
    local_KSE = local.view(top_k, num_segments, num_experts)
    first_id_S = torch.full((num_segments,), torch.iinfo(torch.int64).max, device=order_T.device)
    first_id_S.scatter_reduce_(0, local_segment_T, token_id_T, "amin")
    count_KGE, segment_S = _gather_segments(local_KSE, first_id_S, group)
    before_KGE = count_KGE.cumsum(1) - count_KGE
    segment_T = segment_S[local_segment_T]
    k_K = torch.arange(top_k, device=order_T.device)
    place_TK = before_KGE[k_K, segment_T.unsqueeze(1), expert_idx_TK] + _place_in_run(flat, order_T)
    return CopyOrder(place_TK, count_KGE, segment_T, order_T)


def _segments(sorted_id_T, num_segments, seq_len):
    """The index of each token's segment, tokens in the order of ids, and how many segments there are."""
    num_tokens = sorted_id_T.shape[0]
    if num_segments is None:
        jump = (sorted_id_T.diff() != 1) | (sorted_id_T[1:] % seq_len == 0)
        segment_T = torch.cat([jump.new_zeros(min(num_tokens, 1)), jump]).cumsum(0)
        return segment_T, int(segment_T[-1]) + 1 if num_tokens else 1
    num_segments = max(num_segments, 1)  # of no tokens
    assert num_tokens % num_segments == 0, "segments of a rank have equal lengths"
    return torch.arange(num_tokens, device=sorted_id_T.device) // max(num_tokens // num_segments, 1), num_segments


def _place_in_run(key_TK, order_T):
    """How many copies with the same key (k, segment, expert) come before, in the order of token ids."""
    key_N = key_TK[order_T].reshape(-1)
    sorted_key_N, by_key_N = torch.sort(key_N, stable=True)
    start_N = torch.searchsorted(sorted_key_N, sorted_key_N)
    place_N = torch.empty_like(by_key_N)
    place_N[by_key_N] = torch.arange(key_N.shape[0], device=key_N.device) - start_N
    place_TK = torch.empty_like(key_TK)
    place_TK[order_T] = place_N.view(key_TK.shape)
    return place_TK


def _gather_segments(local_KSE, first_id_S, group):
    """Counts of all segments of the group by token id, [K, G, E], and the global index of each local segment, [S]."""
    top_k, num_segments, num_experts = local_KSE.shape
    packed = torch.cat([local_KSE.transpose(0, 1).reshape(num_segments, -1), first_id_S.unsqueeze(1)], 1)
    every, mine = gather_all(packed, group), group_rank(group) * num_segments
    order_G = torch.argsort(every[:, -1])
    index_G = torch.empty_like(order_G)
    index_G[order_G] = torch.arange(order_G.shape[0], device=order_G.device)
    count_KGE = every[order_G, :-1].view(-1, top_k, num_experts).transpose(0, 1)
    return count_KGE, index_G[mine : mine + num_segments]


def admitted(order: CopyOrder, expert_idx_TK: torch.Tensor, limit: int) -> torch.Tensor:
    """Which copies find a seat when every expert has `limit`: [T, K] bool. All copies of k come before those of k +
    1."""
    total_KE = order.total_KE
    earlier_KE = total_KE.cumsum(0) - total_KE
    k_K = torch.arange(expert_idx_TK.shape[1], device=expert_idx_TK.device)
    return order.place_TK + earlier_KE[k_K, expert_idx_TK] < limit


def rebalance(order: CopyOrder, expert_idx_TK: torch.Tensor, limit: int) -> torch.Tensor:
    """Move every copy that finds its expert full to a free seat: [T, K] int64 experts, none above `limit` copies.

    For k = 0, 1, ... the copies of k take the seats of their experts in order; the rest fill the free seats that
    remain, experts ascending, in the same order. limit * E must be at least the number of copies. Source: the SWIPE
    gate of FastMoE, with experts in the place of its workers.
    """
    free_E = torch.full_like(order.count_KGE[0, 0], limit)
    columns = []
    for k in range(expert_idx_TK.shape[1]):
        count_GE = order.count_KGE[k]
        expert_T = expert_idx_TK[:, k]
        before_GE = count_GE.cumsum(0) - count_GE
        overflow_G = (count_GE - torch.minimum((free_E - before_GE).clamp(min=0), count_GE)).sum(1)
        seated_T = order.place_TK[:, k] < free_E[expert_T]
        left_E = free_E - torch.minimum(free_E, count_GE.sum(0))
        queue_T = _queue(~seated_T, order, overflow_G)
        seat_end_E = left_E.cumsum(0)
        other_T = torch.searchsorted(seat_end_E, queue_T, right=True).clamp(max=free_E.shape[0] - 1)
        columns.append(torch.where(seated_T, expert_T, other_T))
        taken_E = (overflow_G.sum() - (seat_end_E - left_E)).clamp(min=0)
        free_E = left_E - torch.minimum(left_E, taken_E)
    return torch.stack(columns, 1)


def _queue(waiting_T, order: CopyOrder, overflow_G):
    """The place of each waiting copy among all waiting copies of the group."""
    waiting = waiting_T[order.token_order_T].long()
    segment = order.segment_T[order.token_order_T]
    before = waiting.cumsum(0) - waiting
    local_G = torch.zeros_like(overflow_G).scatter_add_(0, segment, waiting)
    inside = before - (local_G.cumsum(0) - local_G)[segment]
    queue_T = torch.empty_like(waiting)
    queue_T[order.token_order_T] = (overflow_G.cumsum(0) - overflow_G)[segment] + inside
    return queue_T
