"""Triton kernels of `smartmoe.ops.adamw`: flat tensors, BLOCK numbers a block."""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK, _UPDATE_BLOCK = 2048, 1024


@triton.jit
def update_kernel(master, grad, exp_avg, exp_avg_sq, weight, N, grad_scale, rate, keep, beta1, beta2, eps, correction,
                  WRITES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
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
    if WRITES:
        tl.store(weight + at, p, mask=inside)


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
    grid = (triton.cdiv(master.numel(), _UPDATE_BLOCK),)
    if master.numel():
        update_kernel[grid](master, grad, exp_avg, exp_avg_sq, weight if writes else master, master.numel(), *numbers,
                            WRITES=writes, BLOCK=_UPDATE_BLOCK, num_warps=4)  # fmt: skip


def accumulate(total, part, is_first: bool) -> None:
    grid = (triton.cdiv(total.numel(), _BLOCK),)
    if total.numel():
        accumulate_kernel[grid](total, part, total.numel(), FIRST=is_first, BLOCK=_BLOCK, num_warps=8)
