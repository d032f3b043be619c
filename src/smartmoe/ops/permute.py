"""Token copies to rows, and rows back to tokens with a weighted sum; both differentiable and free of atomics.

On CUDA each direction is one pass of the extension that walks over tokens: it reads and writes the rows of token copies
only, so that rows without a copy, wherever they lie, are neither read nor written (those of a padded plan are zeroed).
The plain form, used elsewhere, gives rows without a copy some finite value.
"""

from __future__ import annotations

import torch

from smartmoe.ops.extension import kernels_for
from smartmoe.ops.library import register
from smartmoe.ops.plan import RoutingPlan


def permute(x_TD: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Copy tokens into rows.

    x_TD: [T, D]. Returns [R, D] of the same dtype, zero in filling rows. The gradient of a token is the sum over its
    copies in the order of k, in float32 at least: two runs give the same bits.
    """
    return _permute(x_TD, plan.copy_of_row_R, plan.row_of_copy_TK, plan.padded)


def combine(rows_RD: torch.Tensor, weight_TK: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Sum the rows of each token's copies, weighted, in the order of k.

    rows_RD: [R, D]; weight_TK: [T, K] float32. A dropped copy adds nothing. Accumulates in float32 at least and
    returns [T, D] of the dtype of the rows.
    """
    return _combine(rows_RD, weight_TK, plan.copy_of_row_R, plan.row_of_copy_TK, plan.padded)


def _run_permute(x_TD, copy_of_row_R, row_of_copy_TK, padded):
    kernels = kernels_for(x_TD)
    if kernels:
        return kernels.permute(x_TD.contiguous(), copy_of_row_R, row_of_copy_TK, padded)
    return permute_reference(x_TD, copy_of_row_R, row_of_copy_TK, padded)


def _run_gather_sum(rows_RD, row_of_copy_TK, weight_TK):
    kernels = kernels_for(rows_RD, weight_TK)
    if kernels:
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        return kernels.gather_sum(rows_RD.contiguous(), row_of_copy_TK, weight_TK)
    return gather_sum_reference(rows_RD, row_of_copy_TK, weight_TK)


def _run_combine(rows_RD, weight_TK, copy_of_row_R, row_of_copy_TK, padded):
    return _run_gather_sum(rows_RD, row_of_copy_TK, weight_TK)


def _run_combine_backward(grad_TD, rows_RD, weight_TK, copy_of_row_R, row_of_copy_TK, padded, need_weight):
    kernels = kernels_for(rows_RD, weight_TK)
    args = copy_of_row_R, row_of_copy_TK, padded, need_weight
    if kernels:
        return kernels.combine_backward(grad_TD.contiguous(), rows_RD.contiguous(), weight_TK.contiguous(), *args)
    return combine_backward_reference(grad_TD, rows_RD, weight_TK, *args)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _token_of_row(copy_of_row_R, top_k: int):
    return copy_of_row_R.clamp(min=0) // max(top_k, 1)


def _gather_copies(rows_RD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
    """rows[row], with zeros where the row lies outside, widened for accumulation."""
    num_rows = rows_RD.shape[0]
    picked = rows_RD.index_select(0, row_T.clamp(max=num_rows - 1)).to(_accumulation_dtype(rows_RD.dtype))
    return picked.masked_fill_((row_T >= num_rows).unsqueeze(1), 0)


def permute_reference(x_TD, copy_of_row_R, row_of_copy_TK, padded: bool) -> torch.Tensor:
    """`permute` in plain torch."""
    if not x_TD.shape[0]:
        return x_TD.new_zeros(copy_of_row_R.shape[0], x_TD.shape[1])
    rows = x_TD.index_select(0, _token_of_row(copy_of_row_R, row_of_copy_TK.shape[1]))
    return rows.masked_fill_((copy_of_row_R < 0).unsqueeze(1), 0) if padded else rows


def gather_sum_reference(rows_RD, row_of_copy_TK, weight_TK=None) -> torch.Tensor:
    """The sum over k of (weight times) the row of copy (t, k) in plain torch: [T, D]."""
    num_tokens, top_k = row_of_copy_TK.shape
    dtype = _accumulation_dtype(rows_RD.dtype)
    total = torch.zeros(num_tokens, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    if rows_RD.shape[0]:
        for k in range(top_k):
            picked = _gather_copies(rows_RD, row_of_copy_TK[:, k])
            total = (
                total + picked if weight_TK is None else torch.addcmul(total, picked, weight_TK[:, k : k + 1].to(dtype))
            )
    return total.to(rows_RD.dtype)


def combine_backward_reference(grad_TD, rows_RD, weight_TK, copy_of_row_R, row_of_copy_TK, padded, need_weight):
    """The gradients of the rows and of the weights (empty when not wanted), in plain torch."""
    dtype = _accumulation_dtype(rows_RD.dtype)
    grad_TD = grad_TD.to(dtype)
    if grad_TD.shape[0]:
        weight_R = weight_TK.to(dtype).reshape(-1)[copy_of_row_R.clamp(min=0)]
        if padded:
            weight_R = weight_R.masked_fill(copy_of_row_R < 0, 0)
        token_of_row_R = _token_of_row(copy_of_row_R, row_of_copy_TK.shape[1])
        grad_rows = (grad_TD.index_select(0, token_of_row_R) * weight_R.unsqueeze(1)).to(rows_RD.dtype)
    else:
        grad_rows = torch.zeros_like(rows_RD)
    if not need_weight:
        return grad_rows, weight_TK.new_empty(0)
    grad_weight = torch.zeros_like(weight_TK)
    if rows_RD.shape[0]:
        for k in range(weight_TK.shape[1]):
            grad_weight[:, k] = (_gather_copies(rows_RD, row_of_copy_TK[:, k]) * grad_TD).sum(1)
    return grad_rows, grad_weight


def _setup_permute(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _permute_backward(ctx, grad_RD):
    (row_of_copy_TK,) = ctx.saved_tensors
    return _gather_sum(grad_RD, row_of_copy_TK, None), None, None, None


def _setup_combine(ctx, inputs, output):
    *tensors, ctx.padded = inputs
    ctx.save_for_backward(*tensors)


def _combine_backward(ctx, grad_TD):
    need_weight = ctx.needs_input_grad[1]
    grad_rows, grad_weight = _combine_gradients(grad_TD, *ctx.saved_tensors, ctx.padded, need_weight)
    return grad_rows, grad_weight if need_weight else None, None, None, None


def _fake_rows(x_TD, copy_of_row_R, row_of_copy_TK, padded):
    return x_TD.new_empty(copy_of_row_R.shape[0], x_TD.shape[1])


def _fake_tokens(rows_RD, row_of_copy_TK):
    return rows_RD.new_empty(row_of_copy_TK.shape[0], rows_RD.shape[1])


def _fake_gradients(grad_TD, rows_RD, weight_TK, copy_of_row_R, row_of_copy_TK, padded, need_weight):
    return rows_RD.new_empty(rows_RD.shape), weight_TK.new_empty(weight_TK.shape if need_weight else (0,))


_gather_sum = register(
    "gather_sum(Tensor rows_RD, Tensor row_of_copy_TK, Tensor? weight_TK) -> Tensor",
    _run_gather_sum,
    lambda rows_RD, row_of_copy_TK, weight_TK: _fake_tokens(rows_RD, row_of_copy_TK),
)
_combine_gradients = register(
    "combine_backward(Tensor grad_TD, Tensor rows_RD, Tensor weight_TK, Tensor copy_of_row_R, Tensor row_of_copy_TK, "
    "bool padded, bool need_weight) -> (Tensor, Tensor)",
    _run_combine_backward,
    _fake_gradients,
)
_permute = register(
    "permute(Tensor x_TD, Tensor copy_of_row_R, Tensor row_of_copy_TK, bool padded) -> Tensor",
    _run_permute,
    _fake_rows,
    backward=_permute_backward,
    setup=_setup_permute,
)
_combine = register(
    "combine(Tensor rows_RD, Tensor weight_TK, Tensor copy_of_row_R, Tensor row_of_copy_TK, bool padded) -> Tensor",
    _run_combine,
    lambda rows_RD, weight_TK, copy_of_row_R, row_of_copy_TK, padded: _fake_tokens(rows_RD, row_of_copy_TK),
    backward=_combine_backward,
    setup=_setup_combine,
)
