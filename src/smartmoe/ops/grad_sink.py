"""Gradients of weights that operations add up themselves where the optimizer reads them, instead of giving them to autograd.

A weight that gets gradients from many micro-batches has one float32 buffer for their sum. An operation that computes such a
gradient by a product can add it there as it leaves the product; given to autograd it would be written in the weight's dtype,
read again, and the sum rounded along the way. A weight's attribute `grad_sink` says where the sum is (parallel.data sets it).
Operations that do not know of it give their gradients to autograd as ever, whose hooks add them to the same sum.
"""

from __future__ import annotations

from typing import Protocol

import torch

from smartmoe.ops.adamw import accumulate_


class GradSink(Protocol):
    """Where the gradients of one weight [L, ...] are summed. is_urgent: something waits for this gradient, so that it shall
    be computed before that of the rows. held_G: [G] int32, the last G rows are in use where it is not negative, and of the
    others the gradient may be anything; None = all are in use. may_end_late: nobody reads the sum before the backward pass
    has ended, so that what is added to it beside the current stream may be there by then only."""

    is_urgent: bool
    held_G: torch.Tensor | None
    may_end_late: bool

    def take(self) -> tuple[torch.Tensor | None, bool]:
        """(total [L', ...] float32, contiguous, of the first L' <= L rows, None = of none; whether it is to be overwritten
        and not added to). Whoever takes it writes it next, on the current stream."""

    def keep(self, rest: torch.Tensor) -> None:
        """Given the gradient of the other rows, [L - L', ...]: asked only of a sink whose total is shorter than the weight."""


def sink_of(weight: torch.Tensor | None) -> GradSink | None:
    """The sink of a weight that wants a gradient; None under torch.compile, which would not see what is written there."""
    if weight is None or not weight.requires_grad or torch.compiler.is_compiling():
        return None
    return getattr(weight, "grad_sink", None)


def add_to_sink(sink: GradSink, grad: torch.Tensor) -> None:
    """Give the whole gradient [L, ...] of one use of the weight to its sink."""
    total, is_first = sink.take()
    num_rows = 0 if total is None else total.shape[0]
    if num_rows:
        accumulate_(total, grad[:num_rows], is_first)
    if num_rows < grad.shape[0]:
        sink.keep(grad[num_rows:])
