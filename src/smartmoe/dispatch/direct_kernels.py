"""Triton kernels of the direct exchange: stores into peers' memory, and the row movements on either side of them.

Addresses: peers_W [W] int64 holds the address of every rank's copy of one symmetric buffer; a kernel adds the byte offset
of a region, a multiple of 16. A call of the exchange ends in `_signal` (the last block to finish writes the number of the
call into every peer's flags, with release order over the system) and its result is read after `_wait` (acquire). Flags
count up and never are reset, so graph replays and plain calls mix. state: [2] int32, blocks done in this call and number of
calls. Everything is summed in float32 in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _peer(peers_W, rank, offset, dtype: tl.constexpr):
    address = tl.multiple_of(tl.load(peers_W + rank) + offset, 16)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _place(source, rank):
    """Where the rows of rank `source` lie in the shared buffer of another rank, which has no place for its own."""
    return tl.where(source > rank, source - 1, source)


@triton.jit
def _signal(peers_W, state, flag_offset, me, num_blocks, W: tl.constexpr):
    # all stores of this block, then its arrival; the last arrival therefore stands behind all stores of the call
    tl.debug_barrier()
    if tl.atomic_add(state, 1, sem="acq_rel", scope="sys") == num_blocks - 1:
        tl.store(state, 0)
        call = tl.load(state + 1) + 1
        tl.store(state + 1, call)
        for peer in tl.static_range(W):
            tl.atomic_xchg(_peer(peers_W, peer, flag_offset, tl.int32) + me, call, sem="release", scope="sys")


@triton.jit
def _wait(peers_W, state, flag_offset, me, W: tl.constexpr):
    call = tl.load(state + 1)
    flags = _peer(peers_W, me, flag_offset, tl.int32)
    for peer in tl.static_range(W):
        seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
        while seen - call < 0:
            seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _load_tokens(own_TD, others_ND, token, live, d, D, me, capacity, W: tl.constexpr):
    """Rows of tokens n = (source rank, t): of this rank from its own tensor, of the others from the shared buffer."""
    source = token // capacity
    t = token - source * capacity
    is_own = (source == me)[:, None]
    row = tl.load(own_TD + t[:, None] * D + d[None, :], mask=live & is_own, other=0.0)
    if W > 1:
        at = (source - (source > me).to(tl.int64)) * capacity + t
        theirs = tl.load(others_ND + at[:, None] * D + d[None, :], mask=live & (is_own == 0), other=0.0)
        row = tl.where(is_own, row, theirs)
    return row


@triton.jit
def meet_kernel(peers_W, state, me, flag_offset, W: tl.constexpr):
    """Wait until the streams of all ranks are here. One block."""
    _signal(peers_W, state, flag_offset, me, 1, W)
    tl.debug_barrier()  # all threads of the block must read the same number of the call
    _wait(peers_W, state, flag_offset, me, W)


@triton.jit
def push_kernel(x_TD, slot_TK, weight_TK, peers_W, state, me, num_tokens, capacity, slots_per_rank, D, token_offset,
                slot_offset, weight_offset, flag_offset, K: tl.constexpr, W: tl.constexpr, WITH_META: tl.constexpr,
                K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Store each token into the memory of every other rank that one of its copies goes to; slots and weights to all."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, K_PAD)
    copy = t[:, None] * K + k[None, :]
    is_copy = (t < num_tokens)[:, None] & (k < K)[None, :]
    slot = tl.load(slot_TK + copy, mask=is_copy, other=-1).to(tl.int32)
    owner = tl.where(slot >= 0, slot // slots_per_rank, -1)
    if WITH_META:
        weight = tl.load(weight_TK + copy, mask=is_copy, other=0.0)
        in_buffer = (t < capacity)[:, None] & (k < K)[None, :]
        for target in tl.static_range(W):
            tl.store(_peer(peers_W, target, slot_offset, tl.int32) + me * capacity * K + copy, slot, mask=in_buffer)
            tl.store(_peer(peers_W, target, weight_offset, tl.float32) + me * capacity * K + copy, weight, mask=in_buffer)
    goes = tl.max(owner, 1) >= 0
    read_at = t.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        row = tl.load(x_TD + read_at[:, None] + d[None, :], mask=goes[:, None] & (d < D)[None, :], other=0.0)
        for step in tl.static_range(W - 1):
            peer = (me + 1 + step) % W
            wanted = tl.max((owner == peer).to(tl.int32), 1) > 0
            out = _peer(peers_W, peer, token_offset, x_TD.dtype.element_ty)
            write_at = (_place(me, peer) * capacity + t).to(tl.int64) * D
            tl.store(out + write_at[:, None] + d[None, :], row, mask=wanted[:, None] & (d < D)[None, :])
    _signal(peers_W, state, flag_offset, me, tl.num_programs(0), W)


@triton.jit
def receive_kernel(slot_N, weight_N, local_N, weight_out_N, odd, peers_W, state, me, num_copies, slots_per_rank,
                   flag_offset, W: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Wait for the tokens of all ranks; copy slots, as slots of this rank or -1, and weights out of the shared buffer. odd:
    [1] int32, takes the number of the call when some weight is not a number."""
    _wait(peers_W, state, flag_offset, me, W)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(slot_N + n, mask=n < num_copies, other=-1) - me * slots_per_rank
    local = tl.where((local >= 0) & (local < slots_per_rank), local, -1)
    tl.store(local_N + n, local.to(tl.int64), mask=n < num_copies)
    weight = tl.load(weight_N + n, mask=n < num_copies, other=0.0)
    tl.store(weight_out_N + n, weight, mask=n < num_copies)
    if tl.max((weight != weight).to(tl.int32), 0) > 0:
        tl.store(odd, tl.load(state + 1))


@triton.jit
def bound_kernel(wanted_L, count_L, num_rows, num_needed, odd, state, L, R, L_PAD: tl.constexpr):
    """Cut the counts of slots where their running sum passes R. One block; num_needed is negated after an odd call."""
    slot = tl.arange(0, L_PAD)
    wanted = tl.load(wanted_L + slot, mask=slot < L, other=0)
    end = tl.cumsum(wanted, 0)
    kept = tl.minimum(end, R) - tl.minimum(end - wanted, R)
    tl.store(count_L + slot, kept, mask=slot < L)
    tl.store(num_rows, tl.sum(kept, 0).to(tl.int32))
    needed = tl.sum(wanted, 0).to(tl.int32)
    tl.store(num_needed, tl.where(tl.load(odd) == tl.load(state + 1), -needed, needed))


@triton.jit
def gather_kernel(own_TD, others_ND, rows_RD, copy_R, num_rows, me, capacity, D, K: tl.constexpr, W: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Copy each row's token into the row; rows that are not in use stay unwritten."""
    used = tl.load(num_rows)
    if tl.program_id(0) * BLOCK_R < used:
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        token = tl.load(copy_R + r, mask=r < used, other=0) // K
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            live = (r < used)[:, None] & (d < D)[None, :]
            row = _load_tokens(own_TD, others_ND, token, live, d, D, me, capacity, W)
            tl.store(rows_RD + r.to(tl.int64)[:, None] * D + d[None, :], row, mask=live)


@triton.jit
def weigh_kernel(own_TD, others_ND, rows_RD, grad_RD, copy_R, weight_N, num_rows, peers_W, state, me, capacity, D, grad_offset,
                 flag_offset, K: tl.constexpr, W: tl.constexpr, WAIT: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Wait for the gradients of the output; each row's gradient is its token's times its weight, and the product of row
    and token's gradient goes to the token's rank as the gradient of the weight."""
    if WAIT:
        _wait(peers_W, state, flag_offset, me, W)
    used = tl.load(num_rows)
    if tl.program_id(0) * BLOCK_R < used:
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        copy = tl.load(copy_R + r, mask=r < used, other=0)
        weight = tl.load(weight_N + copy, mask=r < used, other=0.0)
        token = copy // K
        dot = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            live = (r < used)[:, None] & (d < D)[None, :]
            at = r.to(tl.int64)[:, None] * D + d[None, :]
            grad = _load_tokens(own_TD, others_ND, token, live, d, D, me, capacity, W).to(tl.float32)
            row = tl.load(rows_RD + at, mask=live, other=0.0).to(tl.float32)
            tl.store(grad_RD + at, (grad * weight[:, None]).to(grad_RD.dtype.element_ty), mask=live)
            dot += tl.sum(grad * row, 1)
        address = tl.load(peers_W + token // capacity, mask=r < used, other=0) + grad_offset
        out = address.to(tl.pointer_type(tl.float32)) + copy % (capacity * K)
        tl.store(out, dot, mask=r < used)


@triton.jit
def sum_back_kernel(rows_RD, row_N, weight_N, y_TD, num_rows, num_needed, peers_W, state, me, capacity, num_tokens, R, D,
                    part_offset, needed_offset, flag_offset, K: tl.constexpr, W: tl.constexpr, WEIGHTED: tl.constexpr,
                    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Sum the rows of each token over k and store the sum into the memory of the token's rank; in y_TD for own tokens.

    With weights, every rank is also told how many rows this one needed: n, -n when that is more than R; of an odd routing
    0, or -1 when it is more than R."""
    # blocks for the other ranks and for this one alternate: rows wait for the link while others go to local memory
    source = (me + 1 + tl.program_id(0) % W) % W
    t = tl.program_id(0) // W * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < capacity
    copy = (source * capacity + t).to(tl.int64) * K
    used = tl.load(num_rows)
    some = t < 0
    for k in tl.static_range(K):
        some = some | (tl.load(row_N + copy + k, mask=here, other=used) < used)
    out, at, write = y_TD, t.to(tl.int64) * D, t < num_tokens
    if W > 1:
        is_own = source == me
        address = tl.where(is_own, y_TD.to(tl.int64), tl.load(peers_W + source) + part_offset)
        address = tl.multiple_of(address, 16).to(tl.pointer_type(rows_RD.dtype.element_ty))
        out = tl.multiple_of(address, 16)
        at = (tl.where(is_own, 0, _place(me, source) * capacity) + t).to(tl.int64) * D
        write = some & ((source != me) | write)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(row_N + copy + k, mask=here, other=used)
            live = (row < used)[:, None] & (d < D)[None, :]
            picked = tl.load(rows_RD + row[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
            if WEIGHTED:
                weight = tl.load(weight_N + copy + k, mask=here, other=0.0)
                total += picked * weight[:, None]
            else:
                total += picked
        tl.store(out + at[:, None] + d[None, :], total.to(out.dtype.element_ty), mask=write[:, None] & (d < D)[None, :])
    if W > 1:
        if WEIGHTED:
            if tl.program_id(0) == 0:
                needed = tl.load(num_needed)
                fits = tl.abs(needed) <= R
                if needed < 0:
                    needed = tl.where(fits, 0, 1)
                needed = tl.where(fits, needed, -needed)
                for peer in tl.static_range(W):
                    tl.store(_peer(peers_W, peer, needed_offset, tl.int32) + me, needed)
        _signal(peers_W, state, flag_offset, me, tl.num_programs(0), W)


@triton.jit
def collect_kernel(part_ND, slot_TK, y_TD, needed_W, told, most, peers_W, state, me, num_tokens, capacity, slots_per_rank,
                   D, flag_offset, K: tl.constexpr, W: tl.constexpr, CHECK: tl.constexpr, K_PAD: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Wait for the sums of all ranks and add them, ranks ascending, this one's from y_TD; NaN when some rank ran out of rows.

    CHECK: the host is told, [2] int32, the rows that were needed and not there, and the most that any call needed, which
    `most` [1] int32 keeps."""
    _wait(peers_W, state, flag_offset, me, W)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, K_PAD)
    is_copy = (t < num_tokens)[:, None] & (k < K)[None, :]
    slot = tl.load(slot_TK + t[:, None] * K + k[None, :], mask=is_copy, other=-1).to(tl.int32)
    owner = tl.where(slot >= 0, slot // slots_per_rank, -1)
    poison = 0.0
    if CHECK:
        lacking = 0
        if tl.program_id(0) == 0:
            largest = tl.load(most)
            for source in tl.static_range(W):
                largest = tl.maximum(largest, tl.abs(tl.load(needed_W + source)))
            tl.store(most, largest)
            tl.store(told + 1, largest)
        for source in tl.static_range(W):
            lacking = tl.minimum(lacking, tl.load(needed_W + source))
        tl.store(told, -lacking, mask=lacking < -1)
        poison = tl.where(lacking < 0, float("nan"), 0.0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for source in tl.static_range(W):
            sent = tl.max((owner == source).to(tl.int32), 1) > 0
            live = sent[:, None] & (d < D)[None, :]
            is_own = ((t * 0 + source) == me)[:, None]
            mine = tl.load(y_TD + t.to(tl.int64)[:, None] * D + d[None, :], mask=live & is_own, other=0.0)
            at = (_place(source, me) * capacity + t).to(tl.int64) * D
            theirs = tl.load(part_ND + at[:, None] + d[None, :], mask=live & (is_own == 0), other=0.0)
            total += tl.where(is_own, mine, theirs).to(tl.float32)
        total = total + poison
        tl.store(y_TD + t.to(tl.int64)[:, None] * D + d[None, :], total.to(y_TD.dtype.element_ty),
                 mask=(t < num_tokens)[:, None] & (d < D)[None, :])  # fmt: skip
