"""The residual connection and the LayerNorm that follows it, in one pass each way.

R rows (tokens), D model width. On CUDA with Triton the sum is written and normalised in the same pass, and in backward
the gradient that arrives beside the normalisation is added as the normalisation's is written: 8 instead of 13 passes over
[R, D]; gradients of weight and bias go to their sinks (ops.grad_sink), where they have some. Elsewhere it is the composition
that autograd differentiates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.ops.extension import have_triton
from smartmoe.ops.grad_sink import sink_of
from smartmoe.ops.part_sums import sum_parts

_MAX_WIDTH = 16384
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def residual_norm(
    x: torch.Tensor, update: torch.Tensor | None, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + update, norm(x + update)); update None: (x, norm(x)).

    x, update: [.., D], one dtype; norm has a weight and a bias of that dtype. The normalisation works in float32 on the
    sum as it is stored. The gradients of weight and bias are summed in float32, in an order that depends on the number
    of rows and on the kind of device alone.
    """
    fits = x.is_cuda and x.dtype in _DTYPES and x.shape[-1] <= _MAX_WIDTH and x.numel() > 0 and have_triton()
    if fits and norm.weight.dtype == norm.bias.dtype == x.dtype and not torch.compiler.is_compiling():
        return _ResidualNorm.apply(x, update, norm.weight, norm.bias, norm.eps)
    x = x if update is None else x + update
    return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, weight, bias, eps):
        from smartmoe.ops import residual_norm_kernels as kernels

        ctx.set_materialize_grads(False)
        ctx.has_update, ctx.sinks = update is not None, (sink_of(weight), sink_of(bias))
        total, normed, stats_2R = kernels.forward(x.contiguous(), update, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, stats_2R)
        return total.view(x.shape), normed.view(x.shape)

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        from smartmoe.ops import residual_norm_kernels as kernels

        total, weight, bias, stats_2R = ctx.saved_tensors
        if grad_normed is None:
            return grad_total, grad_total if ctx.has_update else None, None, None, None
        grad, part_PN = kernels.backward(grad_normed, grad_total, total, weight, stats_2R)
        return grad, grad if ctx.has_update else None, *sum_parts(part_PN, (weight, bias), ctx.sinks), None
