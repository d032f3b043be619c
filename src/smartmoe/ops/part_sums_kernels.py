"""The Triton kernel of `smartmoe.ops.part_sums`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_ROWS = 512


@triton.jit
def sum_parts_kernel(part_PN, first, second, P, N, A, FILLS_FIRST: tl.constexpr, FILLS_SECOND: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """BLOCK_N columns a block; the first A of all go to `first`, the others to `second`."""
    n, p = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    tile = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + p
        tile += tl.load(part_PN + row[:, None] * N + n[None, :], mask=(row < P)[:, None] & (n < N)[None, :], other=0.0)
    total = tl.sum(tile, 0)
    value, here = total, n < A
    if not FILLS_FIRST:
        value += tl.load(first + n, mask=here, other=0.0)
    tl.store(first + n, value, mask=here)
    value, here = total, (n >= A) & (n < N)
    if not FILLS_SECOND:
        value += tl.load(second + n - A, mask=here, other=0.0)
    tl.store(second + n - A, value, mask=here)


def sum_parts(part_PN: torch.Tensor, first: tuple[torch.Tensor, bool], second: tuple[torch.Tensor, bool]) -> None:
    """first, second: (contiguous tensor, whether it is overwritten and not added to)."""
    num_rows, width = part_PN.shape
    block = 16 if num_rows > 128 else 32  # columns: enough blocks, and all rows under way at once
    sum_parts_kernel[(triton.cdiv(width, block),)](
        part_PN, first[0], second[0], num_rows, width, first[0].numel(), FILLS_FIRST=first[1], FILLS_SECOND=second[1],
        BLOCK_P=min(triton.next_power_of_2(num_rows), _MOST_ROWS), BLOCK_N=block,
    )  # fmt: skip
