"""Embeddings whose weights' gradients are added to their sums without a gradient of the table's size (ops.grad_sink).

torch sorts the numbers, writes a table of gradients in the weight's dtype, mostly zeros, and has it added. On CUDA with Triton
two kernels behind the sort add the rows of each number to the sum in float32, in an order that depends on the numbers alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.ops.extension import have_triton
from smartmoe.ops.grad_sink import sink_of


class Embedding(nn.Embedding):
    """nn.Embedding of all numbers alike: without a padding index, a largest norm, or sparse gradients. distinct: no number
    comes twice in a call."""

    def __init__(self, num_embeddings: int, embedding_dim: int, distinct: bool = False):
        super().__init__(num_embeddings, embedding_dim)
        self._distinct = distinct

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """idx: [..] integers. Returns [.., embedding_dim]. On CUDA, of half precision, the weight's gradient goes to its sink,
        where it has one."""
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        sink = sink_of(self.weight) if idx.is_cuda and is_half and have_triton() else None
        return F.embedding(idx, self.weight) if sink is None else SummedLookup.apply(idx, self.weight, sink, self._distinct)


class SummedLookup(torch.autograd.Function):
    """weight[idx], with the gradient of weight [V, D] in the sink's float32 sum of the same shape."""

    @staticmethod
    def forward(ctx, idx, weight, sink, distinct):
        ctx.sink, ctx.distinct = sink, distinct
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        total, is_first = ctx.sink.take()
        if is_first:
            total.zero_()
        idx_T, grad_TD = idx.flatten(), grad.reshape(-1, total.shape[1])
        if ctx.distinct or not idx_T.shape[0] or not grad.is_cuda:
            total.index_add_(0, idx_T, grad_TD.float())
        else:
            from smartmoe.ops.lookup_kernels import add_rows

            add_rows(total, idx_T, grad_TD)
        return None, None, None, None
