"""The feed-forward network of many experts at once, on rows sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smartmoe.ops.activation import activate

_ONES_WIDTH = 8


def expert_ffn(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation: str, impl: str) -> torch.Tensor:
    """act(rows @ w1 + b1) @ w2 + b2, with the weights of the slot that each row belongs to.

    rows_RD: [R, D] sorted by slot; count_L: [L] int64 rows of each slot, on the device of the rows, their sum is R
    (any of them, and R, may be 0). w1_LDF: [L, D, F] ([L, D, 2F] for swiglu), b1_LF, w2_LFD, b2_LD (the biases may
    both be None): dtype of the rows. Returns [R, D]. impl "grouped": two grouped GEMMs, no host synchronisation on
    CUDA in bfloat16; "loop": one GEMM pair for each expert, reads the counts on the host (FastMoE's form in the
    SmartMoE artifact). The result of a slot depends on its own rows and weights only, in bits too, not on which slot
    it is.
    """
    if impl == "grouped":
        _check_strides(rows_RD, w1_LDF, w2_LFD)
        return _grouped(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
    if impl == "loop":
        return _loop(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
    raise ValueError(f'experts = "{impl}" is not one of grouped, loop')


def _check_strides(rows_RD, w1_LDF, w2_LFD):
    for name, width in (("rows", rows_RD.shape[1]), ("w1", w1_LDF.shape[2]), ("w2", w2_LFD.shape[2])):
        num_bytes = width * rows_RD.element_size()
        if num_bytes % 16:
            raise ValueError(
                f"expert_ffn: a row of {name} is {num_bytes} bytes, grouped GEMM needs a multiple of 16: "
                f'change hidden_size or ffn_size, or take experts = "loop"'
            )


def _grouped(rows, count_L, w1, b1, w2, b2, activation):
    end_L = count_L.cumsum(0).to(torch.int32)
    hidden = _add_bias(_Contiguous.apply(F.grouped_mm(rows, w1, offs=end_L)), b1, count_L, end_L)
    hidden = _activate_slots(hidden, count_L, activation)
    return _add_bias(_Contiguous.apply(F.grouped_mm(hidden, w2, offs=end_L)), b2, count_L, end_L)


def _activate_slots(hidden, count_L, activation):
    """The activation of all rows; on a CPU slot by slot: the scalar tail of an elementwise loop, and the seams between
    threads, round otherwise than its vector part, so the bits of a slot would depend on where its rows lie."""
    if hidden.is_cuda:
        return activate(hidden, activation)
    return torch.cat([activate(part, activation) for part in hidden.split(count_L.tolist())])


def _loop(rows, count_L, w1, b1, w2, b2, activation):
    # unbind and not indexing: its backward stacks the gradients once instead of adding L arrays of full size
    num_slots = w1.shape[0]
    b1s = [None] * num_slots if b1 is None else b1.unbind()
    b2s = [None] * num_slots if b2 is None else b2.unbind()
    out = []
    for part, m1, c1, m2, c2 in zip(rows.split(count_L.tolist()), w1.unbind(), b1s, w2.unbind(), b2s, strict=True):
        hidden = activate(_affine(part, m1, c1), activation)
        out.append(_affine(hidden, m2, c2))
    return torch.cat(out)


def _affine(rows, matrix, bias):
    return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)


def _add_bias(rows, bias_LF, count_L, end_L):
    return rows if bias_LF is None else _AddBias.apply(rows, bias_LF, count_L, end_L)


class _AddBias(torch.autograd.Function):
    """Add to each row the bias of its slot; the bias gradient is a grouped product with ones: one pass, no
    atomics."""

    @staticmethod
    def forward(ctx, rows_RF, bias_LF, count_L, end_L):
        ctx.save_for_backward(end_L)
        slot_R = torch.repeat_interleave(count_L, output_size=rows_RF.shape[0])
        return rows_RF + bias_LF.index_select(0, slot_R)

    @staticmethod
    def backward(ctx, grad_RF):
        (end_L,) = ctx.saved_tensors
        if not grad_RF.shape[0]:
            return grad_RF, grad_RF.new_zeros(end_L.shape[0], grad_RF.shape[1]), None, None
        ones = grad_RF.new_ones(grad_RF.shape[0], _ONES_WIDTH)
        grad_bias = F.grouped_mm(ones.t(), grad_RF.contiguous(), offs=end_L)[:, 0]
        return grad_RF, grad_bias, None, None


class _Contiguous(torch.autograd.Function):
    """The identity; makes the gradient contiguous, which the backward of grouped_mm needs."""

    @staticmethod
    def forward(ctx, rows):
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()
