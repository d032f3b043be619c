"""Activations between the two matrices of an expert, and what goes with them in the same pass: biases and their sums.

The functions on rows take end_L, the [L] int32 running sums of the rows of each slot, on the device of the rows. Rows
from end_L[-1] on belong to no slot: the extension neither reads nor writes them, the plain form computes on them what
nobody uses and keeps them out of every sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smartmoe.ops.extension import kernels_for
from smartmoe.ops.grad_sink import GradSink, add_to_sink

_ONES_WIDTH = 8


def activate(hidden_RF: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply "gelu" (tanh form, as GPT), "relu", or "swiglu" (silu of the first half times the second: [R, 2F] -> [R,
    F])."""
    if activation == "gelu":
        return F.gelu(hidden_RF, approximate="tanh")
    if activation == "relu":
        return F.relu(hidden_RF)
    if activation == "swiglu":
        gate, value = hidden_RF.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f'activation = "{activation}" is not one of gelu, relu, swiglu')


def widening(activation: str) -> int:
    """How many times wider than F the first matrix is: 2 for "swiglu", else 1."""
    return 2 if activation == "swiglu" else 1


def activate_rows(hidden_RF, bias_LF, end_L, activation: str) -> torch.Tensor:
    """activate(hidden + the bias of each row's slot): [R, F]. bias_LF may be None. Not differentiable by itself."""
    kernels = kernels_for(hidden_RF)
    if kernels:
        return kernels.activate(hidden_RF, bias_LF, end_L, activation)
    return activate(_biased(hidden_RF, bias_LF, end_L), activation)


def activate_rows_backward(hidden_RF, bias_LF, grad_RF, end_L, activation: str, reuse: bool = False):
    """The gradients of hidden and bias (None without one), and activate_rows(...) once more: one pass.

    grad_RF: the gradient of activate_rows(...); its memory may be reused, and with `reuse` that of hidden, too. Returns
    (grad_hidden, out, grad_bias_LF), the bias gradient summed in float32 in an order that depends on the slot's own rows
    only.
    """
    kernels = kernels_for(hidden_RF)
    if kernels:
        reuse = reuse and widening(activation) == 1
        grad_hidden, out, grad_bias = kernels.activate_backward(hidden_RF, bias_LF, grad_RF, end_L, activation, reuse)
        if reuse:
            torch.autograd.graph.increment_version(hidden_RF)
    else:
        hidden_RF = _biased(hidden_RF, bias_LF, end_L)
        out, grad_hidden = activate(hidden_RF, activation), _slope(hidden_RF, grad_RF, activation)
        grad_bias = None if bias_LF is None else sum_rows(grad_hidden, end_L)
    return grad_hidden, out, None if bias_LF is None else grad_bias


def add_bias_rows(rows_RD, bias_LD, end_L) -> torch.Tensor:
    """Add to each row the bias of its slot; may do so in place. Returns the rows."""
    kernels = kernels_for(rows_RD)
    if kernels:
        kernels.add_bias_(rows_RD, bias_LD, end_L)
        return rows_RD
    return _biased(rows_RD, bias_LD, end_L)


def sum_rows(rows_RD, end_L) -> torch.Tensor:
    """The sum of each slot's rows: [L, D] of the dtype of the rows, 0 for an empty slot."""
    kernels = kernels_for(rows_RD)
    if kernels:
        return kernels.sum_slots(rows_RD, end_L, None, False)
    if not rows_RD.shape[0]:
        return rows_RD.new_zeros(end_L.shape[0], rows_RD.shape[1])
    # a grouped product with ones: no atomics, and the counts stay on the device where the product leaves them there
    ones = rows_RD.new_ones(rows_RD.shape[0], _ONES_WIDTH)
    return F.grouped_mm(ones.t(), rows_RD, offs=end_L)[:, 0].contiguous()


def give_sums(sink: GradSink, rows_RD, end_L) -> None:
    """Give `sum_rows` to a sink: what is added to sums is not rounded to the dtype of the rows."""
    kernels = kernels_for(rows_RD)
    if not kernels:
        add_to_sink(sink, sum_rows(rows_RD, end_L))
        return
    rest = kernels.sum_slots(rows_RD, end_L, *sink.take())
    if rest.shape[0]:
        sink.keep(rest)


def _biased(rows, bias_LF, end_L):
    if bias_LF is None:
        return rows
    row_R = torch.arange(rows.shape[0], device=rows.device, dtype=end_L.dtype)
    slot_R = torch.searchsorted(end_L, row_R, right=True).clamp(max=end_L.shape[0] - 1)
    return rows + bias_LF.index_select(0, slot_R)


def _slope(hidden_RF, grad_RF, activation: str):
    """The gradient of the argument of `activate`."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad_RF, hidden_RF, approximate="tanh")
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad_RF, hidden_RF, 0)
    gate, value = hidden_RF.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad_RF * value, gate), grad_RF * F.silu(gate)], dim=-1)
