"""The feed-forward network of many experts at once, on rows sorted by expert.

Three forms with one result. On CUDA, impl "grouped" is two operations with their own backward: the first product with
the activation, and the second product. They keep the rows and the pre-activation, recompute the activation, and sum the
gradient of the first bias in the pass that makes its addends; that they are two lets go of the pre-activation before the
gradients of the first product are made. Backward uses the memory of the pre-activation again (outside of torch.compile,
with the extension; for swiglu only with its products): a second backward pass through one graph (retain_graph) is then
torch's error about a tensor modified in place. Where the extension has products of its own, biases, the activation and
its slope are applied as the product is written. On a CPU, "grouped" is the composition that autograd differentiates.
"loop" is that of FastMoE everywhere, "batched" that of Tutel: equal blocks, one product of all.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from smartmoe.ops.activation import (
    activate,
    activate_rows,
    activate_rows_backward,
    add_bias_rows,
    give_sums,
    sum_rows,
    widening,
)
from smartmoe.ops.adamw import accumulate_
from smartmoe.ops.extension import path_for, products_for
from smartmoe.ops.grad_sink import add_to_sink, sink_of
from smartmoe.ops.late_slots import late_slots_of
from smartmoe.ops.library import register
from smartmoe.ops.plan import ends_of

_ONES_WIDTH = 8
_NAMES = ("gelu", "relu", "swiglu")


def expert_ffn(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation: str, impl: str) -> torch.Tensor:
    """act(rows @ w1 + b1) @ w2 + b2, with the weights of the slot that each row belongs to.

    rows_RD: [R, D] sorted by slot; count_L: [L] int64 rows of each slot, on the device of the rows (any of them, and R,
    may be 0). Their sum is R; on CUDA with impl "grouped" it may be less: the rows behind are then neither read nor
    written, in forward and backward, and hold anything in the result and in the gradient.
    w1_LDF: [L, D, F] ([L, D, 2F] for swiglu), b1_LF, w2_LFD, b2_LD (the biases may both be None): dtype of the rows. With
    impl "grouped" their gradients go into their sinks where they have one (ops.grad_sink; on a CPU those of w1 and w2), and
    autograd gets none.
    Returns [R, D]. impl "grouped": two grouped GEMMs, no host synchronisation on CUDA in bfloat16 where torch has them
    (ops.extension.choose_path); "loop": one GEMM pair for each expert, reads the counts on the host (FastMoE's form in
    the SmartMoE artifact); "batched": two batched products, of R / L rows for each slot, as buffers of equal size have; count_L
    is not read (ValueError unless L divides R). The result of a slot depends on its own rows and weights only, in bits too, not
    on which slot it is.
    """
    if activation not in _NAMES:
        raise ValueError(f'activation = "{activation}" is not one of {", ".join(_NAMES)}')
    if impl == "grouped":
        _check_strides(rows_RD, w1_LDF, w2_LFD)
        if rows_RD.is_cuda:
            return fused_ffn(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
        return _grouped(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
    if impl == "loop":
        return _loop(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
    if impl == "batched":
        return _batched(rows_RD, w1_LDF, b1_LF, w2_LFD, b2_LD, activation)
    raise ValueError(f'experts = "{impl}" is not one of grouped, loop, batched')


def _check_strides(rows_RD, w1_LDF, w2_LFD):
    widths = {"rows": rows_RD.shape[1], "w1": w1_LDF.shape[2], "activations": w2_LFD.shape[1], "w2": w2_LFD.shape[2]}
    for name, width in widths.items():
        num_bytes = width * rows_RD.element_size()
        if num_bytes % 16:
            raise ValueError(
                f"expert_ffn: a row of {name} is {num_bytes} bytes, grouped GEMM needs a multiple of 16: "
                f'change hidden_size or ffn_size, or take experts = "loop"'
            )


def fused_ffn(rows_RD, count_L, w1_LDF, b1_LF, w2_LFD, b2_LD, activation: str) -> torch.Tensor:
    """`expert_ffn` as on CUDA. What the extension does is plain torch where it is missing, so it runs on a CPU, too."""
    end_L = ends_of(count_L)
    hidden_RF, act_RF = _matmul_activate(rows_RD, end_L, w1_LDF, b1_LF, activation)
    return _activated_matmul(hidden_RF, act_RF, end_L, b1_LF, w2_LFD, b2_LD, activation)


def _bounds(end_L):
    """(slot, first row, last row + 1) of each slot; reads them on the host."""
    ends = end_L.tolist()
    return zip(range(len(ends)), [0, *ends], ends, strict=False)


def _times_weights(rows, weight, end_L, transposed=False, bias=None):
    """Each row times its slot's matrix, weight [L, X, Y], or [L, Y, X] when transposed; plus the bias of its slot."""
    weight_LXY = weight.transpose(1, 2) if transposed else weight
    if not rows.shape[0]:
        return rows.new_empty(0, weight_LXY.shape[2])
    kernels = products_for(rows, weight, bias)
    if kernels:
        return kernels.multiply_rows(rows, weight, bias, end_L, transposed)
    if path_for(rows).gemm == "grouped":
        out = F.grouped_mm(rows, weight_LXY, offs=end_L)
    else:
        out = rows.new_empty(rows.shape[0], weight_LXY.shape[2])
        for slot, start, end in _bounds(end_L):
            torch.mm(rows[start:end], weight_LXY[slot], out=out[start:end])
    return out if bias is None else add_bias_rows(out, bias, end_L)


def _weight_gradient(rows, grad, end_L, sink=None):
    """For each slot, its rows transposed times its gradients: [L, X, Y]; None when the sink has got it instead."""
    kernels = products_for(rows, grad) if rows.shape[0] else None
    if kernels:
        total, is_first = (None, False) if sink is None else sink.take()
        fits = total is None or total.data_ptr() % 16 == 0  # they add 16 bytes at once
        held_G = None if sink is None else sink.held_G
        out = kernels.multiply_slots(rows, grad, end_L, total if fits else None, is_first, held_G)
        if sink is None:
            return out
        if not fits:
            num_totals = total.shape[0]
            accumulate_(total, out[:num_totals], is_first)
            out = out[num_totals:]
        if out.shape[0]:
            sink.keep(out)
        return None
    out = _plain_weight_gradient(rows, grad, end_L)
    return out if sink is None else add_to_sink(sink, out)


def _plain_weight_gradient(rows, grad, end_L):
    shape = (end_L.shape[0], rows.shape[1], grad.shape[1])
    if not rows.shape[0]:
        return rows.new_zeros(shape)
    if path_for(rows).gemm == "grouped":
        return F.grouped_mm(rows.t(), grad, offs=end_L)
    out = rows.new_empty(shape)
    for slot, start, end in _bounds(end_L):
        torch.mm(rows[start:end].t(), grad[start:end], out=out[slot])
    return out


def _run_matmul_activate(rows, end_L, weight, b1, activation):
    rows, late = rows.contiguous(), late_slots_of(weight)
    kernels = products_for(rows, weight, b1) if rows.shape[0] else None
    if kernels and late is None:
        return kernels.multiply_activate(rows, weight, b1, end_L, activation)
    if kernels:
        hidden = rows.new_empty(rows.shape[0], weight.shape[2])
        act = rows.new_empty(rows.shape[0], weight.shape[2] // widening(activation))
        with late.beside():
            kernels.multiply_activate_into(rows, weight, b1, end_L, activation, late.first, weight.shape[0], hidden, act)
        kernels.multiply_activate_into(rows, weight, b1, end_L, activation, 0, late.first, hidden, act)
        late.wait()
        return hidden, act
    if late is not None:
        late.wait()
    hidden = _times_weights(rows, weight, end_L)
    return hidden, activate_rows(hidden, b1, end_L, activation)


def _run_matmul_backward(grad, rows, end_L, weight, sink=None):
    grad, rows = grad.contiguous(), rows.contiguous()
    is_urgent = sink is not None and sink.is_urgent
    if is_urgent:
        _weight_gradient(rows, grad, end_L, sink)
    grad_rows = _times_weights(grad, weight, end_L, transposed=True)
    return grad_rows, None if is_urgent else _weight_gradient(rows, grad, end_L, sink)


def _run_activated_matmul(hidden, act, end_L, b1, w2, b2, activation):
    return _times_weights(act, w2, end_L, bias=b2)


def _run_activated_matmul_backward(grad, hidden, end_L, b1, w2, activation, has_b2, reuse=False, sinks=(None, None, None)):
    grad = grad.contiguous()
    none, (sink_b1, sink, sink_b2) = grad.new_empty(0), sinks
    grad_b2 = none
    if sink_b2 is not None:
        give_sums(sink_b2, grad, end_L)
    elif has_b2:
        grad_b2 = sum_rows(grad, end_L)
    kernels = products_for(grad, w2, b1) if grad.shape[0] else None
    if kernels:
        total_b1 = (None, False) if sink_b1 is None else sink_b1.take()
        grad_hidden, act, grad_b1 = kernels.multiply_slope(grad, w2, b1, end_L, hidden, activation, reuse, *total_b1)
        if sink_b1 is not None and grad_b1.shape[0]:
            sink_b1.keep(grad_b1)
        if reuse:
            torch.autograd.graph.increment_version(hidden)
    else:
        grad_act = _times_weights(grad, w2, end_L, transposed=True)
        grad_hidden, act, grad_b1 = activate_rows_backward(hidden, b1, grad_act, end_L, activation, reuse)
        del grad_act
        if sink_b1 is not None:
            add_to_sink(sink_b1, grad_b1)
    return grad_hidden, none if grad_b1 is None else grad_b1, _weight_gradient(act, grad, end_L, sink), grad_b2


def _setup_matmul_activate(ctx, inputs, output):
    # the activation gets no gradient: that of the pre-activation holds it
    ctx.set_materialize_grads(False)
    ctx.sink = sink_of(inputs[2])
    ctx.save_for_backward(*inputs[:3])


def _matmul_activate_gradients(ctx, grad_hidden, _):
    if ctx.sink is None:
        grad_rows, grad_weight = _grouped_matmul_backward(grad_hidden, *ctx.saved_tensors)
    else:
        grad_rows, grad_weight = _run_matmul_backward(grad_hidden, *ctx.saved_tensors, sink=ctx.sink)
    return grad_rows, None, grad_weight, None, None


def _setup_activated_matmul(ctx, inputs, output):
    hidden, _, end_L, b1, w2, b2, ctx.activation = inputs
    ctx.sinks = sink_of(b1), sink_of(w2), sink_of(b2)
    ctx.has_b2 = b2 is not None
    ctx.gives_b1, ctx.gives_b2 = b1 is not None and ctx.sinks[0] is None, ctx.has_b2 and ctx.sinks[2] is None
    ctx.save_for_backward(hidden, end_L, b1, w2)


def _activated_matmul_gradients(ctx, grad):
    args = (grad, *ctx.saved_tensors, ctx.activation, ctx.has_b2)
    if ctx.sinks == (None, None, None):
        grads = _activated_matmul_backward(*args)
    else:
        grads = _run_activated_matmul_backward(*args, reuse=True, sinks=ctx.sinks)
    grad_hidden, grad_b1, grad_w2, grad_b2 = grads
    return grad_hidden, None, None, grad_b1 if ctx.gives_b1 else None, grad_w2, grad_b2 if ctx.gives_b2 else None, None


def _fake_like(tensor):
    return tensor.new_empty(tensor.shape)


def _fake_matmul_activate(rows, end_L, weight, b1, activation):
    width = weight.shape[2]
    return rows.new_empty(rows.shape[0], width), rows.new_empty(rows.shape[0], width // widening(activation))


def _fake_activated_matmul_backward(grad, hidden, end_L, b1, w2, activation, has_b2):
    grad_b1 = grad.new_empty(0) if b1 is None else _fake_like(b1)
    grad_b2 = grad.new_empty((w2.shape[0], w2.shape[2]) if has_b2 else (0,))
    return _fake_like(hidden), grad_b1, _fake_like(w2), grad_b2


_grouped_matmul_backward = register(
    "grouped_matmul_backward(Tensor grad, Tensor rows, Tensor end_L, Tensor weight) -> (Tensor, Tensor)",
    _run_matmul_backward,
    lambda grad, rows, end_L, weight: (_fake_like(rows), _fake_like(weight)),
)
_matmul_activate = register(
    "matmul_activate(Tensor rows, Tensor end_L, Tensor weight, Tensor? b1, str activation) -> (Tensor, Tensor)",
    _run_matmul_activate,
    _fake_matmul_activate,
    backward=_matmul_activate_gradients,
    setup=_setup_matmul_activate,
)
_activated_matmul_backward = register(
    "activated_matmul_backward(Tensor grad, Tensor hidden, Tensor end_L, Tensor? b1, Tensor w2, str activation, "
    "bool has_b2) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_activated_matmul_backward,
    _fake_activated_matmul_backward,
    eager=partial(_run_activated_matmul_backward, reuse=True),
)
_activated_matmul = register(
    "activated_matmul(Tensor hidden, Tensor act, Tensor end_L, Tensor? b1, Tensor w2, Tensor? b2, str activation) -> Tensor",
    _run_activated_matmul,
    lambda hidden, act, end_L, b1, w2, b2, activation: hidden.new_empty(hidden.shape[0], w2.shape[2]),
    backward=_activated_matmul_gradients,
    setup=_setup_activated_matmul,
)


# The compositions that autograd differentiates.


def _grouped(rows, count_L, w1, b1, w2, b2, activation):
    end_L = count_L.cumsum(0).to(torch.int32)
    hidden = _add_bias(_Product.apply(rows, w1, end_L, sink_of(w1)), b1, count_L, end_L)
    hidden = _activate_slots(hidden, count_L, activation)
    return _add_bias(_Product.apply(hidden, w2, end_L, sink_of(w2)), b2, count_L, end_L)


def _activate_slots(hidden, count_L, activation):
    """The activation slot by slot: on a CPU the scalar tail of an elementwise loop, and the seams between threads,
    round otherwise than its vector part, so the bits of a slot would depend on where its rows lie."""
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


def _batched(rows, w1, b1, w2, b2, activation):
    if rows.shape[0] % w1.shape[0]:
        raise ValueError(
            f'experts = "batched": {rows.shape[0]} rows are not {w1.shape[0]} equal blocks: take dispatcher = "padded" or '
            f'"pipelined", or experts = "grouped"'
        )
    rows_LCD = rows.view(w1.shape[0], -1, rows.shape[1])
    hidden_LCF = _batched_affine(rows_LCD, w1, b1)
    shape = hidden_LCF.shape
    act_LCF = activate(hidden_LCF.view(-1, shape[2]), activation).view(shape[0], shape[1], -1)
    return _batched_affine(act_LCF, w2, b2).view(rows.shape[0], -1)


def _batched_affine(blocks, matrix, bias):
    return torch.bmm(blocks, matrix) if bias is None else torch.baddbmm(bias.unsqueeze(1), blocks, matrix)


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


class _Product(torch.autograd.Function):
    """Each row times its slot's matrix, on a CPU; the gradient of the matrices goes into the sink where there is one."""

    @staticmethod
    def forward(ctx, rows, weight, end_L, sink):
        ctx.sink = sink
        ctx.save_for_backward(rows, weight, end_L)
        return F.grouped_mm(rows, weight, offs=end_L)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, end_L = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight.transpose(1, 2), offs=end_L)
        grad_weight = F.grouped_mm(rows.t(), grad, offs=end_L)
        return grad_rows, grad_weight if ctx.sink is None else add_to_sink(ctx.sink, grad_weight), None, None
