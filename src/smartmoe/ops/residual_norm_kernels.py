"""Triton kernels of `smartmoe.ops.residual_norm`. stats_2R: [2, R] float32, mean and 1 / standard deviation of each row."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_BLOCKS_PER_MULTIPROCESSOR, _BACKWARD_WARPS = 4, 4


@triton.jit
def norm_forward_kernel(x, update, weight, bias, total, normed, stats_2R, R, D, eps, ADDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row a block."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = d < D
    value = tl.load(x + row * D + d, mask=inside, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(update + row * D + d, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row * D + d, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.sum(value) / D
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * D + d, centred * scale * w + b, mask=inside)
    tl.store(stats_2R + row, mean)
    tl.store(stats_2R + R + row, scale)


@triton.jit
def _load_row(grad_normed, grad_total, total, stats_2R, row, end, d, R, D):
    """What backward reads of a row, zeros from `end` on."""
    here = (d < D) & (row < end)
    at = row * D + d
    return (
        tl.load(grad_normed + at, mask=here, other=0.0),
        tl.load(grad_total + at, mask=here, other=0.0),
        tl.load(total + at, mask=here, other=0.0),
        tl.load(stats_2R + row, mask=row < end, other=0.0),
        tl.load(stats_2R + R + row, mask=row < end, other=0.0),
    )


@triton.jit
def norm_backward_kernel(grad_normed, grad_total, total, weight, stats_2R, grad, part_PN, R, D, ROWS, ADDS: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """ROWS consecutive rows a block, the next one on its way while one is worked on; the block's sums for weight and bias go
    to its row of part_PN [P, 2 * D] float32."""
    block, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros([BLOCK_D], tl.float32)
    sum_b = tl.zeros([BLOCK_D], tl.float32)
    row = block * ROWS
    end = tl.minimum(row + ROWS, R)
    g, beside, value, mean, scale = _load_row(grad_normed, grad_total, total, stats_2R, row, end, d, R, D)
    while row < end:
        next_g, next_beside, next_value, next_mean, next_scale = _load_row(grad_normed, grad_total, total, stats_2R, row + 1,
                                                                           end, d, R, D)  # fmt: skip
        unit = tl.where(inside, (value.to(tl.float32) - mean) * scale, 0.0)
        slope = g.to(tl.float32)
        sum_w += slope * unit
        sum_b += slope
        slope *= w
        result = (slope - (tl.sum(slope) + unit * tl.sum(slope * unit)) / D) * scale
        if ADDS:
            result += beside.to(tl.float32)
        tl.store(grad + row * D + d, result, mask=inside)
        g, beside, value, mean, scale = next_g, next_beside, next_value, next_mean, next_scale
        row += 1
    tl.store(part_PN + block * 2 * D + d, sum_w, mask=inside)
    tl.store(part_PN + block * 2 * D + D + d, sum_b, mask=inside)


def forward(x, update, weight, bias, eps: float):
    """(x + update, its normalisation, stats_2R); without an update the first is x itself."""
    width = x.shape[-1]
    num_rows = x.numel() // width
    total = x if update is None else torch.empty_like(x)
    normed, stats_2R = torch.empty_like(x), x.new_empty(2, num_rows, dtype=torch.float32)
    update = x if update is None else update.contiguous()
    norm_forward_kernel[(num_rows,)](x, update, weight, bias, total, normed, stats_2R, num_rows, width, eps,
                                ADDS=total is not x, BLOCK_D=triton.next_power_of_2(width), num_warps=4)  # fmt: skip
    return total, normed, stats_2R


def backward(grad_normed, grad_total, total, weight, stats_2R):
    """(gradient of the sum, parts [P, 2 * D] float32 of the gradients of weight and bias); grad_total may be None."""
    width = total.shape[-1]
    num_rows = total.numel() // width
    rows = triton.cdiv(num_rows, _num_blocks(total.device))
    num_blocks = triton.cdiv(num_rows, rows)
    part_PN = total.new_empty(num_blocks, 2 * width, dtype=torch.float32)
    grad, grad_normed = torch.empty_like(total), grad_normed.contiguous()
    adds = grad_total is not None
    grad_total = grad_total.contiguous() if adds else grad_normed
    norm_backward_kernel[(num_blocks,)](grad_normed, grad_total, total, weight, stats_2R, grad, part_PN, num_rows, width,
                                   rows, ADDS=adds, BLOCK_D=triton.next_power_of_2(width),
                                   num_warps=_BACKWARD_WARPS)  # fmt: skip
    return grad.view(grad_normed.shape), part_PN


@functools.cache
def _num_blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return _BLOCKS_PER_MULTIPROCESSOR
    return _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
