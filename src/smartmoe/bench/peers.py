"""The layer as one writes it in plain PyTorch, without anything of this library: what a fast layer has to beat.

Sort the copies by expert, all_to_all_single with the sizes known to the host, grouped_mm, and back again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class PlainTorch:
    """Called as a dispatcher is. Experts are spread in order; no copy may be dropped.

    Collective over the group: one all-to-all of counts and two of rows; one host synchronisation.
    """

    def __init__(self, group, num_experts: int):
        self.group, self.num_experts = group, num_experts
        self.num_ranks = 1 if group is None else group.size()

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result; `experts` gives weights and activation only."""
        w1_LDF, b1_LF, w2_LFD, b2_LD = experts.weights()
        top_k = routing.expert_idx_TK.shape[1]
        num_tokens, width = x_TD.shape
        expert_N, order_N = torch.sort(routing.expert_idx_TK.flatten(), stable=True)
        sent_WL = torch.bincount(expert_N, minlength=self.num_experts).view(self.num_ranks, -1)
        received_WL = self._exchange_counts(sent_WL)
        send_splits, recv_splits = sent_WL.sum(1).tolist(), received_WL.sum(1).tolist()

        copies = x_TD.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, width)
        rows = _exchange(_scatter(copies, torch.argsort(order_N)), send_splits, recv_splits, self.group)
        local_R = torch.arange(received_WL.shape[1], device=rows.device).repeat(self.num_ranks)
        local_R = local_R.repeat_interleave(received_WL.flatten(), output_size=rows.shape[0])
        by_expert_R = torch.argsort(local_R, stable=True)
        end_L = received_WL.sum(0).cumsum(0).to(torch.int32)
        slot_R = local_R[by_expert_R]
        hidden = F.grouped_mm(_scatter(rows, torch.argsort(by_expert_R)), w1_LDF, offs=end_L)
        hidden = _add_bias(hidden, b1_LF, slot_R, end_L)
        out = F.grouped_mm(_activate(hidden, experts.activation), w2_LFD, offs=end_L)
        out = _add_bias(out, b2_LD, slot_R, end_L)
        out = _exchange(_scatter(out, by_expert_R), recv_splits, send_splits, self.group)

        copies = _scatter(out, order_N).view(num_tokens, top_k, width)
        return (copies * routing.weight_TK.unsqueeze(2).to(out.dtype)).sum(1)

    def _exchange_counts(self, sent_WL):
        if self.group is None:
            return sent_WL
        received_WL = torch.empty_like(sent_WL)
        dist.all_to_all_single(received_WL, sent_WL, group=self.group)
        return received_WL


def _scatter(rows, to_R):
    """Row r goes to place to_R[r], a permutation: the gradient of index_copy is a gather, that of a gather has
    atomics, about a millisecond for 65536 x 2048 on an H200."""
    return torch.empty_like(rows).index_copy_(0, to_R, rows)


def _add_bias(rows, bias, slot_R, end_L):
    return rows if bias is None else _AddBias.apply(rows, bias, slot_R, end_L)


class _AddBias(torch.autograd.Function):
    """rows + bias[slot]; its gradient is a grouped product with ones, that of a gather has atomics."""

    @staticmethod
    def forward(ctx, rows, bias_LX, slot_R, end_L):
        ctx.save_for_backward(end_L)
        return rows + bias_LX[slot_R]

    @staticmethod
    def backward(ctx, grad):
        ones = grad.new_ones(grad.shape[0], 8)  # 8 columns: a row of 16 bytes is the least that grouped_mm takes
        return grad, F.grouped_mm(ones.t(), grad.contiguous(), offs=ctx.saved_tensors[0])[:, 0], None, None


def _activate(hidden, activation):
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(hidden, approximate="tanh") if activation == "gelu" else F.relu(hidden)


def _exchange(rows, send_splits, recv_splits, group):
    return rows if group is None else _AllToAll.apply(rows, send_splits, recv_splits, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, send_splits, recv_splits, group):
        ctx.args = recv_splits, send_splits, group
        out = rows.new_empty(sum(recv_splits), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), recv_splits, send_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, *ctx.args), None, None, None
