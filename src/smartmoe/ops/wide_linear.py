"""A float32 linear map of bfloat16 activations, computed by bfloat16 matrix units with the accuracy of float32.

For routers: few outputs, so that reading the activations is all the work, and a copy of them in float32 with a float32
product several times that. A float32 number is the sum of three bfloat16 numbers up to 2^-24 of it, products of bfloat16
numbers are exact in float32, and matrix units sum in float32 (the splitting of Ootomo and Yokota, "Recovering Single
Precision Accuracy from Tensor Cores While Surpassing the FP32 Theoretical Peak Performance", IJHPCA 2022).

T tokens, D model width, E outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def wide_linear(x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + bias in float32: [T, E] float32, also for activations of half precision.

    x_TD: [T, D] of any floating type; weight_ED and bias_E: float32. The gradient of x is rounded to its type.
    """
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and x_TD.shape[0] and not torch.compiler.is_compiling():
        return _SplitLinear.apply(x_TD, weight_ED, bias_E)
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E.to(dtype))


def split(value: torch.Tensor, num_parts: int) -> list[torch.Tensor]:
    """bfloat16 tensors whose sum is `value` (float32) up to 2^(-8 * num_parts) of it, the largest first."""
    parts, rest = [], value
    for place in range(num_parts):
        parts.append(rest.to(torch.bfloat16))
        if place < num_parts - 1:
            rest = rest - parts[-1]
    return parts


def _multiply(a, b):
    """a @ b of bfloat16 matrices, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED, bias_E):
        parts_XD = torch.cat(split(weight_ED, 3))
        ctx.save_for_backward(x_TD, parts_XD)
        return _multiply(x_TD, parts_XD.t()).view(x_TD.shape[0], 3, -1).sum(1) + bias_E

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, parts_XD = ctx.saved_tensors
        grad_x = grad_weight = None
        high, middle, low = split(grad_TE, 3)
        if ctx.needs_input_grad[0]:
            first, second, _ = parts_XD.chunk(3)
            # without the product of both second parts, 2^-16 of the result, which is rounded to 2^-9
            grad_x = torch.cat([high, high, middle], dim=1) @ torch.cat([first, second, first])
        if ctx.needs_input_grad[1]:
            grad_weight = _multiply(torch.cat([high, middle, low], dim=1).t(), x_TD).view(3, -1, x_TD.shape[1]).sum(0)
        return grad_x, grad_weight, grad_TE.sum(0)
