"""A kernel that writes down the order of an exchange's pieces. Triton is needed to import it."""

import triton
import triton.language as tl

from smartmoe.dispatch.direct_kernels import _mixed_piece, _piece


@triton.jit
def order_kernel(is_push_N, turn_N, part_N, num_turns, lag, behind, share, PUSHES: tl.constexpr, READS: tl.constexpr,
                 MIXED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of all pieces: [num_turns * (PUSHES + READS)] int32 each."""
    taken = tl.arange(0, BLOCK)
    if MIXED:
        is_push, turn, part = _mixed_piece(taken, num_turns, lag, behind, share, PUSHES, READS)
    else:
        is_push, turn, part = _piece(taken, num_turns, lag, PUSHES, READS)
    inside = taken < num_turns * (PUSHES + READS)
    tl.store(is_push_N + taken, is_push.to(tl.int32), mask=inside)
    tl.store(turn_N + taken, turn, mask=inside)
    tl.store(part_N + taken, part, mask=inside)
