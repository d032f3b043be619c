"""The Triton kernel of `smartmoe.ops.wide_linear`: float32 numbers cut into bfloat16 parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def stack_kernel(value, out, N, Y, row_step, part_step, PARTS: tl.constexpr, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """value: [N / Y, Y] flat. Number y of row x goes to x * row_step + y, and from there each of the NUM parts part_step on;
    which part is a digit of PARTS to the base of 3, the first the lowest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    v = tl.load(value + at, mask=inside, other=0.0)
    first = v.to(tl.bfloat16)
    rest = v - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    to = out + at // Y * row_step + at % Y
    for i in tl.static_range(NUM):
        part = PARTS // 3**i % 3
        if part == 0:
            tl.store(to + i * part_step, first, mask=inside)
        elif part == 1:
            tl.store(to + i * part_step, second, mask=inside)
        else:
            tl.store(to + i * part_step, third, mask=inside)


def stack_parts(value: torch.Tensor, parts: tuple[int, ...], dim: int) -> torch.Tensor:
    """Parts (0, 1, 2) of a contiguous float32 `value` [X, Y], one behind the other along `dim`, bfloat16."""
    num_rows, width = value.shape
    num = len(parts)
    out = value.new_empty((num * num_rows, width) if dim == 0 else (num_rows, num * width), dtype=torch.bfloat16)
    row_step, part_step = (width, num_rows * width) if dim == 0 else (num * width, width)
    code = sum(part * 3**place for place, part in enumerate(parts))
    if value.numel():
        stack_kernel[(triton.cdiv(value.numel(), _BLOCK),)](value, out, value.numel(), width, row_step, part_step,
                                                            PARTS=code, NUM=num, BLOCK=_BLOCK)  # fmt: skip
    return out
