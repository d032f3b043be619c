"""Linear maps whose weights' gradients are added to their sums by the product itself (ops.grad_sink).

Given to autograd, a gradient would be written in the weight's dtype, and read again to be added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.ops.grad_sink import sink_of


class DenseLinear(nn.Linear):
    """nn.Linear without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [.., in_features] of the weight's dtype. Returns [.., out_features]. On CUDA, of half precision, the weight's
        gradient goes to its sink, where it has one."""
        sink = sink_of(self.weight) if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else None
        return F.linear(x, self.weight) if sink is None else SummedLinear.apply(x, self.weight, sink)


class SummedLinear(torch.autograd.Function):
    """x @ weight.T, with the gradient of weight [O, I] in the sink's float32 sum of the same shape."""

    @staticmethod
    def forward(ctx, x, weight, sink):
        ctx.sink = sink
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows_TO, rows_TI = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        grad_x = (rows_TO @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        _add_product(*ctx.sink.take(), rows_TO.t(), rows_TI)
        return grad_x, None, None


def _add_product(total: torch.Tensor, is_first: bool, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, or total = a @ b where it is the first, in float32."""
    if not a.is_cuda:  # has no products of halves in float32
        product = a.float() @ b.float()
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
