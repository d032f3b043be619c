"""Token copies to rows, and rows back to tokens with a weighted sum; both differentiable and free of atomics."""

from __future__ import annotations

import torch

from smartmoe.ops.plan import RoutingPlan


def permute(x_TD: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Copy tokens into rows.

    x_TD: [T, D]. Returns [R, D] of the same dtype, zero in filling rows. The gradient of a token is the sum over its
    copies
    in the order of k, in float32 at least: two runs give the same bits.
    """
    return _Permute.apply(x_TD, plan)


def combine(rows_RD: torch.Tensor, weight_TK: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Sum the rows of each token's copies, weighted, in the order of k.

    rows_RD: [R, D]; weight_TK: [T, K] float32. A dropped copy adds nothing. Accumulates in float32 at least and
    returns [T, D] of the dtype of the rows.
    """
    return _Combine.apply(rows_RD, weight_TK, plan)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gather_copies(rows_RD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
    """rows[row], with zeros where the row lies outside, widened for accumulation."""
    num_rows = rows_RD.shape[0]
    picked = rows_RD.index_select(0, row_T.clamp(max=num_rows - 1)).to(_accumulation_dtype(rows_RD.dtype))
    return picked.masked_fill_((row_T >= num_rows).unsqueeze(1), 0)


def gather_sum(rows_RD: torch.Tensor, plan: RoutingPlan, weight_TK: torch.Tensor | None = None) -> torch.Tensor:
    """The sum over k of (weight times) the row of copy (t, k); not differentiable by itself. Returns [T, D]."""
    num_tokens, top_k = plan.row_of_copy_TK.shape
    dtype = _accumulation_dtype(rows_RD.dtype)
    total = torch.zeros(num_tokens, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    if rows_RD.shape[0]:
        for k in range(top_k):
            picked = _gather_copies(rows_RD, plan.row_of_copy_TK[:, k])
            total = (
                total + picked if weight_TK is None else torch.addcmul(total, picked, weight_TK[:, k : k + 1].to(dtype))
            )
    return total.to(rows_RD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, plan):
        ctx.plan = plan
        rows = (
            x_TD.index_select(0, plan.token_of_row_R) if x_TD.shape[0] else x_TD.new_zeros(plan.num_rows, x_TD.shape[1])
        )
        return rows.masked_fill_((plan.copy_of_row_R < 0).unsqueeze(1), 0) if plan.padded else rows

    @staticmethod
    def backward(ctx, grad_RD):
        return gather_sum(grad_RD, ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weight_TK, plan):
        ctx.plan = plan
        ctx.save_for_backward(rows_RD, weight_TK)
        return gather_sum(rows_RD, plan, weight_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_RD, weight_TK = ctx.saved_tensors
        plan, dtype = ctx.plan, _accumulation_dtype(rows_RD.dtype)
        grad_wide_TD = grad_TD.to(dtype)
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = _scatter_weighted(grad_wide_TD, weight_TK.to(dtype), plan).to(rows_RD.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_TK)
            if plan.num_rows:
                for k in range(weight_TK.shape[1]):
                    grad_weight[:, k] = (_gather_copies(rows_RD, plan.row_of_copy_TK[:, k]) * grad_wide_TD).sum(1)
        return grad_rows, grad_weight, None


def _scatter_weighted(grad_TD, weight_TK, plan):
    """Row r of the result is the gradient of its token times the weight of its copy."""
    if not grad_TD.shape[0]:
        return grad_TD.new_zeros(plan.num_rows, grad_TD.shape[1])
    weight_R = weight_TK.reshape(-1)[plan.copy_of_row_R.clamp(min=0)]
    if plan.padded:
        weight_R = weight_R.masked_fill(plan.copy_of_row_R < 0, 0)
    return grad_TD.index_select(0, plan.token_of_row_R) * weight_R.unsqueeze(1)
