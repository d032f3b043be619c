"""Triton kernels of `smartmoe.ops.adamw`: flat tensors, BLOCK numbers a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from smartmoe.ops.spans import Spans

SPAN = 1024  # numbers that a block updates
_BLOCK = 2048


@triton.jit
def _updated(master, grad, exp_avg, exp_avg_sq, at, inside, grad_scale, rate, keep, beta1, beta2, eps, correction):
    """Update some numbers; returns the new masters."""
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    p = tl.load(master + at, mask=inside, other=0.0) * keep
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p -= rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(master + at, p, mask=inside)
    return p


@triton.jit
def update_kernel(master, grad, exp_avg, exp_avg_sq, weight, N, grad_scale, rate, keep, beta1, beta2, eps, correction,
                  WRITES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    p = _updated(master, grad, exp_avg, exp_avg_sq, at, inside, grad_scale, rate, keep, beta1, beta2, eps, correction)
    if WRITES:
        tl.store(weight + at, p, mask=inside)


@triton.jit
def update_spans_kernel(address_RN, size_N, first_N1, place_P, weight_like, N, grad_scale, rate, keep, beta1, beta2, eps,
                        correction, BLOCK: tl.constexpr):  # fmt: skip
    """One span of ops.spans a block; rows of address_RN: master, grad, exp_avg, exp_avg_sq, and weight where there is one, of
    weight_like's type."""
    span = tl.program_id(0)
    place = tl.load(place_P + span)
    at = (span - tl.load(first_N1 + place)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, address = at < tl.load(size_N + place), address_RN + place
    master = tl.load(address).to(tl.pointer_type(tl.float32))
    grad = tl.load(address + N).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(address + 2 * N).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(address + 3 * N).to(tl.pointer_type(tl.float32))
    weight = tl.load(address + 4 * N)
    p = _updated(master, grad, exp_avg, exp_avg_sq, at, inside, grad_scale, rate, keep, beta1, beta2, eps, correction)
    tl.store(weight.to(weight_like.dtype) + at, p, mask=inside & (weight != 0))


@triton.jit
def accumulate_kernel(total, part, N, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    value = tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
    if not FIRST:
        value += tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, value, mask=inside)


def update(master, grad, exp_avg, exp_avg_sq, weight, *numbers: float) -> None:
    """numbers: gradient scale, learning rate over the first correction, what decay keeps, both betas, eps, and 1 over the
    root of the second correction."""
    writes = weight is not None
    grid = (triton.cdiv(master.numel(), SPAN),)
    if master.numel():
        update_kernel[grid](master, grad, exp_avg, exp_avg_sq, weight if writes else master, master.numel(), *numbers,
                            WRITES=writes, BLOCK=SPAN, num_warps=4)  # fmt: skip


def update_spans(spans: Spans, weight_like: torch.Tensor, *numbers: float) -> None:
    """numbers: as of `update`."""
    num_spans = spans.place_P.shape[0]
    if num_spans:
        update_spans_kernel[(num_spans,)](spans.address_RN, spans.size_N, spans.first_N1, spans.place_P, weight_like,
                                          spans.size_N.shape[0], *numbers, BLOCK=SPAN, num_warps=4)  # fmt: skip


def accumulate(total, part, is_first: bool) -> None:
    grid = (triton.cdiv(total.numel(), _BLOCK),)
    if total.numel():
        accumulate_kernel[grid](total, part, total.numel(), FIRST=is_first, BLOCK=_BLOCK, num_warps=8)
