"""One linear map for each slot, on rows sorted by slot: for experts that are not the network of `ops.expert_ffn`.

Weights lie as those of torch.nn.Linear, [L, outputs, inputs]. The products are those of `ops.expert_ffn`, on CUDA without a
host synchronisation where those need none. F outputs, D inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smartmoe.ops.activation import add_bias_rows, sum_rows
from smartmoe.ops.expert_ffn import _times_weights, _weight_gradient
from smartmoe.ops.plan import ends_of

_ALIGNMENT = 16


def grouped_linear(rows_RD, count_L, weight_LFD, bias_LF=None) -> torch.Tensor:
    """rows @ weight.T + bias, with the weights of the slot that each row belongs to: [R, F].

    rows_RD: [R, D] sorted by slot; count_L: [L] int64 rows of each slot, any of them may be 0. Their sum is R or less: the
    rows behind hold anything in the result and in the gradient. weight_LFD: [L, F, D]; bias_LF: [L, F] or None; dtype of the
    rows, ValueError otherwise. In float64, and where rows are no multiple of 16 bytes, slots are multiplied one by one, which
    reads the counts on the host.
    """
    kinds = {tensor.dtype for tensor in (rows_RD, weight_LFD, bias_LF) if tensor is not None}
    if len(kinds) > 1 or rows_RD.dim() != 2 or rows_RD.shape[1] != weight_LFD.shape[2]:
        raise ValueError(
            f"grouped_linear: rows are {rows_RD.dtype} {list(rows_RD.shape)}, the weights take {weight_LFD.dtype} "
            f"[rows, {weight_LFD.shape[2]}]: cast the input or the module, or reshape the input"
        )
    is_odd = any(width * rows_RD.element_size() % _ALIGNMENT for width in weight_LFD.shape[1:])
    if is_odd or rows_RD.dtype == torch.float64:
        return _loop(rows_RD, count_L.tolist(), weight_LFD, bias_LF)
    return _GroupedLinear.apply(rows_RD, ends_of(count_L.to(rows_RD.device)), weight_LFD, bias_LF)


def _loop(rows, counts: list[int], weight_LFD, bias_LF):
    bias = [None] * len(counts) if bias_LF is None else bias_LF.unbind()
    parts = rows.split([*counts, rows.shape[0] - sum(counts)])
    out = [F.linear(part, *affine) for part, *affine in zip(parts, weight_LFD.unbind(), bias, strict=False)]
    return torch.cat([*out, rows.new_zeros(parts[-1].shape[0], weight_LFD.shape[1])])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, end_L, weight, bias):
        rows, weight = rows.contiguous(), weight.contiguous()
        ctx.save_for_backward(rows, end_L, weight)
        out = _times_weights(rows, weight, end_L, transposed=True)
        return out if bias is None or not out.shape[0] else add_bias_rows(out, bias, end_L)

    @staticmethod
    def backward(ctx, grad):
        rows, end_L, weight = ctx.saved_tensors
        grad, (need_rows, _, need_weight, need_bias) = grad.contiguous(), ctx.needs_input_grad
        grad_rows = _times_weights(grad, weight, end_L) if need_rows else None
        grad_weight = _weight_gradient(grad, rows, end_L) if need_weight else None
        return grad_rows, None, grad_weight, sum_rows(grad, end_L) if need_bias else None
