"""Triton kernels of `smartmoe.ops.lookup`.

Numbers are sorted and cut into chunks of BLOCK_T. The rows of a run of equal ones inside a chunk are added to its sum at once.
Of other runs each chunk leaves what it has in part_2PD [2 * P, D]: row 2 p + 1 of the one that begins in chunk p and goes on,
row 2 p of the one that came in; the chunk in which it begins adds them up. What is not finite spreads inside a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_T, _BLOCK_D, _BLOCK_P = 64, 128, 128


@triton.jit
def add_runs_kernel(key_T, order_T, grad_TD, total_VD, part_2PD, T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D columns of a chunk a block."""
    chunk, start = tl.program_id(0), tl.program_id(0) * BLOCK_T
    c, d = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = start + c
    is_row, inside = t < T, d < D
    key = tl.load(key_T + t, mask=is_row, other=-1).to(tl.int64)
    next_key = tl.load(key_T + t + 1, mask=t + 1 < T, other=-1).to(tl.int64)
    before = tl.load(key_T + start - 1, mask=start > 0, other=-1).to(tl.int64)
    behind = tl.load(key_T + start + BLOCK_T, mask=start + BLOCK_T < T, other=-1).to(tl.int64)
    row = tl.load(order_T + t, mask=is_row, other=0).to(tl.int64)
    grad = tl.load(grad_TD + row[:, None] * D + d[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
    key_along = tl.load(key_T + t[None, :], mask=is_row[None, :], other=-1).to(tl.int64)
    same = tl.where(key[:, None] == key_along, 1.0, 0.0).to(grad.dtype)
    run = tl.dot(same, grad, input_precision="ieee")  # of each row, all of its run
    is_last = (is_row & ((next_key != key) | (c == BLOCK_T - 1)))[:, None] & inside[None, :]
    came, goes_on = key == before, key == behind
    is_whole = is_last & ((came | goes_on) == 0)[:, None]
    to = total_VD + key[:, None] * D + d[None, :]
    tl.store(to, tl.load(to, mask=is_whole, other=0.0) + run, mask=is_whole)
    place = 2 * chunk.to(tl.int64) + tl.where(came, 0, 1)
    tl.store(part_2PD + place[:, None] * D + d[None, :], run, mask=is_last & (came | goes_on)[:, None])


@triton.jit
def join_runs_kernel(key_T, total_VD, part_2PD, T, D, P, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    """BLOCK_D columns of the run that begins in a chunk and goes on, if there is one, a block."""
    chunk, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    behind, inside = (chunk + 1) * BLOCK_T, d < D
    key = tl.load(key_T + behind - 1, mask=behind < T, other=-1)
    before = tl.load(key_T + chunk * BLOCK_T - 1, mask=chunk > 0, other=-1)
    following = tl.load(key_T + behind, mask=behind < T, other=-2)
    if (following == key) & (key != before):
        num = 0
        for start in range(chunk + 1, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            num += tl.sum((tl.load(key_T + p * BLOCK_T, mask=p < P, other=-2) == key).to(tl.int32), 0)
        from_2PD = part_2PD + (2 * chunk + 1).to(tl.int64) * D + d
        total = tl.load(from_2PD, mask=inside, other=0.0)
        from_2PD += D
        for _ in range(num):
            total += tl.load(from_2PD, mask=inside, other=0.0)
            from_2PD += 2 * D
        to = total_VD + key.to(tl.int64) * D + d
        tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


def add_rows(total_VD: torch.Tensor, idx_T: torch.Tensor, grad_TD: torch.Tensor) -> None:
    """total[idx[t]] += grad[t]; T > 0."""
    num_rows, width = grad_TD.shape
    key_T, order_T = idx_T.sort(stable=True)
    grid = triton.cdiv(num_rows, _BLOCK_T), triton.cdiv(width, _BLOCK_D)
    part_2PD = total_VD.new_empty(2 * grid[0], width)
    sizes = {"BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D, "num_warps": 4}
    add_runs_kernel[grid](key_T, order_T, grad_TD.contiguous(), total_VD, part_2PD, num_rows, width, **sizes)
    join_runs_kernel[grid](key_T, total_VD, part_2PD, num_rows, width, grid[0], BLOCK_P=_BLOCK_P, **sizes)
