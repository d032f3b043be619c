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

from smartmoe.ops.extension import have_triton


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


def _stack(value: torch.Tensor, parts: str, dim: int) -> torch.Tensor:
    """Parts of `value` [X, Y] one behind the other along `dim`: "0" its first bfloat16 part, "1" and "2" the next. One kernel
    where Triton is there: a launch takes the host longer than the work takes a GPU."""
    if value.is_cuda and have_triton():
        from smartmoe.ops.wide_linear_kernels import stack_parts

        return stack_parts(value.contiguous(), tuple(map(int, parts)), dim)
    found = split(value, 3)
    return torch.cat([found[int(part)] for part in parts], dim=dim)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED, bias_E):
        # the first three for forward, the last four for backward
        parts_XD = _stack(weight_ED, "210001", dim=0)
        ctx.save_for_backward(x_TD, parts_XD)
        num_outputs = weight_ED.shape[0]
        return _multiply(x_TD, parts_XD[: 3 * num_outputs].t()).view(-1, 3, num_outputs).sum(1) + bias_E

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, parts_XD = ctx.saved_tensors
        num_outputs, grad_x, grad_weight = grad_TE.shape[1], None, None
        grad_TX = _stack(grad_TE, "0120", dim=1)
        if ctx.needs_input_grad[0]:
            # all of the gradient with the weight's first part, and its first part with the second: what is missing is
            # 2^-16 of the result, which is rounded to 2^-9
            grad_x = grad_TX @ parts_XD[2 * num_outputs :]
        if ctx.needs_input_grad[1]:
            grad_weight = _multiply(grad_TX[:, : 3 * num_outputs].t(), x_TD).view(3, num_outputs, -1).sum(0)
        return grad_x, grad_weight, grad_TE.sum(0)
