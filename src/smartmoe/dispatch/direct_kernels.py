"""Triton kernels of the direct exchange: stores into peers' memory, and the row movements on either side of them.

Addresses: peers_W [W] int64 holds the address of every rank's copy of one symmetric buffer; a kernel adds the byte offset
of a region, a multiple of 16. Flags hold the number of the call that last raised them, are raised with release order over
the system and read with acquire order; they are never reset, so graph replays and plain calls mix. Everything is summed in
float32 in a fixed order; no values are added atomically.

The kernels that move rows are one launch for both ends of the link. Their work is divided into pieces: a push stores the
rows of a few tokens into a peer's memory and raises the flag of these tokens there; a read waits for such a flag and uses
what came. Blocks take pieces by a counter, in an order in which the pushes are `lag` ahead of the reads. So the link is busy
from the first to the last moment, what arrives is used while the rest is on its way, and a block that waits for a peer never
keeps a push of this rank from being done: whatever number of blocks runs, no two ranks can wait for each other.

Only reads need the plan of the rows. With EARLY, `spread_kernel` and the kernels of the plan begin while those before them run
(programmatic dependent launch), so that tokens are on their way while the routing is announced, counted and placed; the reads
catch up (`_mixed_piece`). The announcement itself begins behind everything before it, so what pushes touch is complete. Each
kernel behind it waits, before it touches what others of them write, until the one before it is complete, and each ends after
that: what is complete behind the last of them is complete behind all. But a peer that sees flags of an early call knows nothing
of the announcement before it: see SymmetricTransport.announce.
state: [3] int32, blocks done in this call, number of calls, pieces taken.

A rank that has died or left its loop answers nothing any more. Who waits for it polls MOST_POLLS times, some ten minutes, says
so and ends its context by a trap: its process gets a CUDA error instead of standing for ever. Nothing that ranks do one by one
between two exchanges takes as long; where they save, they meet before the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_POLLS = tl.constexpr(1 << 30)  # of about half a microsecond


@triton.jit
def _count_poll(polls, me):
    """One poll more; the last one ends the context. Returns their number."""
    polls += 1
    if polls > MOST_POLLS + tl.program_id(0) * 4096:  # so that one block says it: each of its threads does
        tl.device_print("direct exchange: a peer did not come; this rank", me)
        polls = tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [polls], dtype=tl.int32, is_pure=False, pack=1)
    return polls


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
        polls = 0
        while seen - call < 0:
            polls = _count_poll(polls, me)
            seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _raise(peers_W, rank, flag_offset, at, W: tl.constexpr, W_PAD: tl.constexpr):
    """Raise flag `at` of rank `rank`, or of all others than -1 - rank, behind all stores of this block so far: once in each
    call, so that one more is the call's number. To exchange the two would send an answer back over the link."""
    tl.debug_barrier()
    w = tl.arange(0, W_PAD)
    raised = (w < W) & tl.where(rank >= 0, w == rank, w != -1 - rank)
    address = tl.load(peers_W + w, mask=raised, other=0) + flag_offset
    tl.atomic_add(address.to(tl.pointer_type(tl.int32)) + at, 1, mask=raised, sem="release", scope="sys")


@triton.jit
def _await(flags, awaited, me, call):
    """Wait until those flags of this rank that are `awaited` are raised. What is polled is read without order, so that many
    blocks can wait."""
    least = tl.min(tl.load(flags, mask=awaited, other=call, volatile=True) - call, 0)
    polls = 0
    while least < 0:
        polls = _count_poll(polls, me)
        least = tl.min(tl.load(flags, mask=awaited, other=call, volatile=True) - call, 0)
    seen = tl.atomic_add(flags, 0, mask=awaited, sem="acquire", scope="sys")
    least = tl.min(tl.where(awaited, seen - call, 0), 0)
    while least < 0:
        seen = tl.atomic_add(flags, 0, mask=awaited, sem="acquire", scope="sys")
        least = tl.min(tl.where(awaited, seen - call, 0), 0)
    tl.debug_barrier()


@triton.jit
def _await_all(peers_W, flag_offset, at, other, num_flags, me, call, W: tl.constexpr, W_PAD: tl.constexpr):
    """Wait for flags `at` and `other` of every other rank; flags are [W, num_flags]."""
    i = tl.arange(0, 2 * W_PAD)
    w = i // 2
    flags = _peer(peers_W, me, flag_offset, tl.int32) + w * num_flags + tl.where(i % 2 == 0, at, other)
    _await(flags, (w < W) & (w != me), me, call)


@triton.jit
def _piece(taken, num_turns, lag, PUSHES: tl.constexpr, READS: tl.constexpr):
    """Piece number `taken`: (is it a push, its turn, its part of the turn). A turn has so many pushes and reads; its reads
    come together with the pushes of the turn that is `lag` later."""
    ahead = lag * PUSHES
    rest = taken - ahead
    both: tl.constexpr = PUSHES + READS
    tail = rest - (num_turns - lag) * both
    is_first, is_last = rest < 0, tail >= 0
    part = tl.where(is_last, tail % READS, rest % both)
    turn = tl.where(is_last, num_turns - lag + tail // READS, rest // both)
    is_push = is_first
    if PUSHES > 0:
        is_push = is_first | ((is_last == 0) & (part < PUSHES))
        turn = tl.where(is_first, taken // PUSHES, tl.where(is_push, turn + lag, turn))
        part = tl.where(is_first, taken % PUSHES, tl.where(is_push | is_last, part, part - PUSHES))
    return is_push, turn, part


@triton.jit
def _mixed_piece(taken, num_turns, ahead, behind, share, PUSHES: tl.constexpr, READS: tl.constexpr):
    """As `_piece`, in another order: the pushes of `ahead` turns, pushes and reads evenly mixed, the reads of `behind` turns;
    1 <= behind <= ahead <= num_turns. So no read comes before the pushes of its turn. share: of pushes in the mixture, in 2^31,
    rounded up."""
    first, pushes = ahead * PUSHES, (num_turns - ahead) * PUSHES
    mixed = tl.maximum(taken - first, 0)
    pushed, pushed_then = tl.umulhi(2 * mixed, share), tl.umulhi(2 * mixed + 2, share)
    is_first, is_last = taken < first, mixed >= pushes + (num_turns - behind) * READS
    is_push = is_first | ((is_last == 0) & (pushed_then > pushed))
    push, read = tl.where(is_first, taken, first + pushed), mixed - tl.where(is_last, pushes, pushed)
    return is_push, tl.where(is_push, push // PUSHES, read // READS), tl.where(is_push, push % PUSHES, read % READS)


@triton.jit
def _finish(state, call):
    """The last block of a call counts it."""
    tl.debug_barrier()
    if tl.atomic_add(state, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(state, 0)
        tl.store(state + 1, call)
        tl.store(state + 2, 0)


@triton.jit
def meet_kernel(peers_W, state, me, flag_offset, W: tl.constexpr):
    """Wait until the streams of all ranks are here. One block."""
    _signal(peers_W, state, flag_offset, me, 1, W)
    tl.debug_barrier()  # all threads of the block must read the same number of the call
    _wait(peers_W, state, flag_offset, me, W)


@triton.jit
def announce_kernel(slot_N, weight_N, local_N, weight_out_N, odd, peers_W, state, me, num_copies, room, slots_per_rank,
                    copy_offset, W: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Tell all ranks the slots and weights of this one's copies, and lay out those of all: local_N [W * room], slots of this
    rank or -1, and weight_out_N. odd: [1] int32, takes the number of the call when some weight is not a number.

    A copy travels as one word of 8 bytes, which arrives whole: weight, slot + 1, and in the last bit whether the number of
    the call is odd. Every call writes every word, so a word has come when that bit is the call's; no flag is needed."""
    call = tl.load(state + 1) + 1
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < room
    slot = tl.load(slot_N + i, mask=i < num_copies, other=-1).to(tl.int32)
    weight = tl.load(weight_N + i, mask=i < num_copies, other=0.0).to(tl.float32)
    word = (weight.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ((slot + 1) * 2 + (call & 1)).to(tl.int64)
    for step in tl.static_range(W - 1):
        peer = (me + 1 + step) % W
        tl.store(_peer(peers_W, peer, copy_offset, tl.int64) + me * room + i, word, mask=inside)
    if EARLY:  # the words are ahead of the tokens
        tl.extra.cuda.gdc_launch_dependents()
    for step in tl.static_range(W):
        source = (me + step) % W
        if step > 0:
            came = _peer(peers_W, me, copy_offset, tl.int64) + source * room + i
            word = tl.load(came, mask=inside, other=call & 1, volatile=True)
            polls = 0
            while tl.max((word ^ call) & 1, 0) > 0:
                polls = _count_poll(polls, me)
                word = tl.load(came, mask=inside, other=call & 1, volatile=True)
            slot = (word & 0xFFFFFFFF).to(tl.int32) // 2 - 1
            weight = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        local = slot - me * slots_per_rank
        local = tl.where((local >= 0) & (local < slots_per_rank), local, -1)
        tl.store(local_N + source * room + i, local.to(tl.int64), mask=inside)
        tl.store(weight_out_N + source * room + i, weight, mask=inside)
        if tl.max((weight != weight).to(tl.int32), 0) > 0:
            tl.store(odd, call)
    _finish(state, call)


@triton.jit
def _bound(wanted_L, count_L, num_rows, num_needed, odd, told, L, R, is_writer, L_PAD: tl.constexpr):
    """Cut the counts of slots where their running sum passes R; num_needed is negated after an odd announcement. Returns the
    rows in use. Only a writer stores."""
    slot = tl.arange(0, L_PAD)
    wanted = tl.load(wanted_L + slot, mask=slot < L, other=0)
    needed = tl.sum(wanted, 0)
    if is_writer:
        end = tl.cumsum(wanted, 0)
        tl.store(count_L + slot, tl.minimum(end, R) - tl.minimum(end - wanted, R), mask=slot < L)
        tl.store(num_rows, tl.minimum(needed, R).to(tl.int32))
        tl.store(num_needed, tl.where(tl.load(odd) == tl.load(told + 1), -needed, needed).to(tl.int32))
    return tl.minimum(needed, R).to(tl.int32)


@triton.jit
def _push_tokens(x_TD, slot_TK, peers_W, turn, me, num_tokens, capacity, slots_per_rank, D, token_offset, K: tl.constexpr,
                 W: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Store tokens into the memory of every other rank that one of their copies goes to."""
    t = turn * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, K_PAD)
    is_copy = (t < num_tokens)[:, None] & (k < K)[None, :]
    slot = tl.load(slot_TK + t[:, None] * K + k[None, :], mask=is_copy, other=-1).to(tl.int32)
    owner = tl.where(slot >= 0, slot // slots_per_rank, me)
    goes = tl.max((owner != me).to(tl.int32), 1) > 0
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


@triton.jit
def _tokens_of(own_TD, peers_W, source, me, capacity, D, token_offset, W: tl.constexpr):
    """Where the tokens of a rank lie: this rank's in its own tensor, those of others in the shared buffer."""
    if W > 1:
        theirs = tl.load(peers_W + me) + token_offset + _place(source, me).to(tl.int64) * capacity * D * (
            own_TD.dtype.element_ty.primitive_bitwidth // 8
        )
        address = tl.multiple_of(tl.where(source == me, own_TD.to(tl.int64), theirs), 16)
        return tl.multiple_of(address.to(tl.pointer_type(own_TD.dtype.element_ty)), 16)
    else:
        return own_TD


@triton.jit
def _lay_out(tokens_TD, rows_RD, row_N, used, first, t, here, D, K: tl.constexpr, BLOCK_T: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Copy tokens into the rows of their copies. first: the first copy of the rank that they are from."""
    copy = first + t.to(tl.int64) * K
    some = t < 0
    for k in tl.static_range(K):
        some = some | (tl.load(row_N + copy + k, mask=here, other=used) < used)
    if tl.max(some.to(tl.int32), 0) > 0:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            is_column = (d < D)[None, :]
            tile = tl.load(tokens_TD + t.to(tl.int64)[:, None] * D + d[None, :], mask=some[:, None] & is_column, other=0.0)
            for k in tl.static_range(K):
                row = tl.load(row_N + copy + k, mask=here, other=used)
                tl.store(rows_RD + row[:, None] * D + d[None, :], tile, mask=(row < used)[:, None] & is_column)


@triton.jit
def _weigh(grads_TD, rows_RD, grad_RD, out_N, row_N, weight_N, used, first, t, capacity, D, K: tl.constexpr,
           K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradient of each row is its token's times its weight; the product of row and token's gradient is that of the
    weight, for the token's rank. grad_RD may be rows_RD. All copies of BLOCK_T tokens from t on at once."""
    i = tl.arange(0, BLOCK_T * K_PAD)
    token, k = t + i // K_PAD, i % K_PAD
    copy = token.to(tl.int64) * K + k
    row = tl.load(row_N + first + copy, mask=(token < capacity) & (k < K), other=used)
    live = row < used
    if tl.max(live.to(tl.int32), 0) > 0:
        weight = tl.load(weight_N + first + copy, mask=live, other=0.0)
        dot = tl.zeros((BLOCK_T * K_PAD,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = live[:, None] & (d < D)[None, :]
            at = row[:, None] * D + d[None, :]
            grad = tl.load(grads_TD + token.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            answer = tl.load(rows_RD + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_RD + at, (grad * weight[:, None]).to(grad_RD.dtype.element_ty), mask=mask)
            dot += tl.sum(grad * answer, 1)
        tl.store(out_N + copy, dot, mask=live)


@triton.jit
def spread_kernel(own_TD, slot_TK, rows_RD, grad_RD, row_N, weight_N, wanted_L, count_L, num_rows, num_needed, odd, told,
                  peers_W, state, me, num_tokens, capacity, slots_per_rank, R, D, lag, behind, share, token_offset, grad_offset,
                  flag_offset, K: tl.constexpr, W: tl.constexpr, WEIGH: tl.constexpr, BOUND: tl.constexpr,
                  EARLY: tl.constexpr, L_PAD: tl.constexpr, K_PAD: tl.constexpr, W_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Bring each token to the ranks of its copies, and there into their rows. Rows that are not in use stay unwritten.

    WEIGH: the tokens are gradients of the output, and the rows get theirs in grad_RD: see `_weigh`. Otherwise rows_RD gets
    the tokens. BOUND: the plan has only wanted_L, the rows that slots would have, and the rest is made here: see `_bound`.
    EARLY, with BOUND: begun before the plan is there. lag, behind, share: `_piece` takes the first, `_mixed_piece` all."""
    call = tl.load(state + 1) + 1
    num_turns = tl.cdiv(capacity, BLOCK_T)
    PUSHES: tl.constexpr = 1 if W > 1 else 0
    taken = tl.atomic_add(state + 2, 1, sem="relaxed")
    if EARLY:
        used = -1
    elif BOUND:
        used = _bound(wanted_L, count_L, num_rows, num_needed, odd, told, slots_per_rank, R, taken == 0, L_PAD)
    else:
        used = tl.load(num_rows)
    while taken < num_turns * (PUSHES + W):
        if EARLY:
            is_push, turn, part = _mixed_piece(taken, num_turns, lag, behind, share, PUSHES, W)
        else:
            is_push, turn, part = _piece(taken, num_turns, lag, PUSHES, W)
        if is_push:
            _push_tokens(own_TD, slot_TK, peers_W, turn, me, num_tokens, capacity, slots_per_rank, D, token_offset, K, W,
                         K_PAD, BLOCK_T, BLOCK_D)  # fmt: skip
            _raise(peers_W, -1 - me, flag_offset, me * num_turns + turn, W, W_PAD)
        else:
            if EARLY:
                if used < 0:  # the first read of this block
                    tl.extra.cuda.gdc_wait()
                    is_writer = (turn == 0) & (part == 0)
                    used = _bound(wanted_L, count_L, num_rows, num_needed, odd, told, slots_per_rank, R, is_writer, L_PAD)
            source = (me + part) % W
            if part > 0:
                w = tl.arange(0, W_PAD)
                flags = _peer(peers_W, me, flag_offset, tl.int32) + w * num_turns + turn
                _await(flags, w == source, me, call)
            tokens_TD = _tokens_of(own_TD, peers_W, source, me, capacity, D, token_offset, W)
            first = source.to(tl.int64) * capacity * K
            t = turn * BLOCK_T
            if WEIGH:
                out_N = _peer(peers_W, source, grad_offset, tl.float32)
                _weigh(tokens_TD, rows_RD, grad_RD, out_N, row_N, weight_N, used, first, t, capacity, D, K, K_PAD, BLOCK_T,
                       BLOCK_W)  # fmt: skip
            else:
                t_T = t + tl.arange(0, BLOCK_T)
                _lay_out(tokens_TD, rows_RD, row_N, used, first, t_T, t_T < capacity, D, K, BLOCK_T, BLOCK_D)
        taken = tl.atomic_add(state + 2, 1, sem="relaxed")
    if EARLY:  # of a block that had no reads, too
        tl.extra.cuda.gdc_wait()
    _finish(state, call)


@triton.jit
def _sum(rows_RD, row_N, weight_N, used, copy, here, d, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr,
         BLOCK_D: tl.constexpr):  # fmt: skip
    """The sum over k of the rows of tokens, with WEIGHTED times their weights: [BLOCK_T, BLOCK_D] float32."""
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_N + copy + k, mask=here, other=used)
        live = (row < used)[:, None] & (d < D)[None, :]
        picked = tl.load(rows_RD + row[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
        if WEIGHTED:
            total += picked * tl.load(weight_N + copy + k, mask=here, other=0.0)[:, None]
        else:
            total += picked
    return total


@triton.jit
def _word(num_needed, R):
    """What a rank tells of the rows that it needed: n, -n when that is more than R; of an odd routing 0, or -1 when it is
    more than R."""
    needed = tl.load(num_needed)
    fits = tl.abs(needed) <= R
    needed = tl.where(needed < 0, tl.where(fits, 0, 1), needed)
    return tl.where(fits, needed, -needed)


@triton.jit
def sum_kernel(rows_RD, row_N, weight_N, y_TD, grad_TK, slot_TK, num_rows, num_needed, told, most, peers_W, state, me,
               capacity, num_tokens, slots_per_rank, R, D, lag, behind, share, part_offset, grad_offset, needed_offset,
               flag_offset, K: tl.constexpr, W: tl.constexpr, WEIGHTED: tl.constexpr, GRADS: tl.constexpr,
               MIXED: tl.constexpr, K_PAD: tl.constexpr, W_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Sum the rows of each token over k, bring the sum to the token's rank and sum there over ranks, in ascending order.

    With weights, all ranks tell each other how many rows they needed (`_word`): y is NaN when some rank ran out of rows,
    and the host is told, [2] int32, the rows that were needed and not there, and the most that any call needed, which `most`
    [1] int32 keeps. With GRADS, grad_TK gets the weights' gradients that came by the last call with WEIGH of
    `spread_kernel`: zero where a copy is dropped. MIXED: pieces come as `_mixed_piece` has them."""
    call = tl.load(state + 1) + 1
    used = tl.load(num_rows)
    num_turns = tl.cdiv(capacity, BLOCK_T)
    taken = tl.atomic_add(state + 2, 1, sem="relaxed")
    while taken < num_turns * W:
        if MIXED:
            is_push, turn, part = _mixed_piece(taken, num_turns, lag, behind, share, W - 1, 1)
        else:
            is_push, turn, part = _piece(taken, num_turns, lag, W - 1, 1)
        if is_push:
            peer = (me + 1 + part) % W
            t = turn * BLOCK_T + tl.arange(0, BLOCK_T)
            here = t < capacity
            copy = (peer * capacity + t).to(tl.int64) * K
            some = t < 0
            for k in tl.static_range(K):
                some = some | (tl.load(row_N + copy + k, mask=here, other=used) < used)
            out = _peer(peers_W, peer, part_offset, rows_RD.dtype.element_ty)
            at = (_place(me, peer) * capacity + t).to(tl.int64) * D
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                total = _sum(rows_RD, row_N, weight_N, used, copy, here, d, D, K, WEIGHTED, BLOCK_T, BLOCK_D)
                mask = some[:, None] & (d < D)[None, :]
                tl.store(out + at[:, None] + d[None, :], total.to(out.dtype.element_ty), mask=mask)
            if WEIGHTED:
                if turn == 0:
                    tl.store(_peer(peers_W, peer, needed_offset, tl.int32) + me, _word(num_needed, R))
            _raise(peers_W, peer, flag_offset, me * num_turns + turn, W, W_PAD)
        else:
            poison = 0.0
            if W > 1:
                # with the flags of the first turn the words came
                _await_all(peers_W, flag_offset, turn, 0 if WEIGHTED else turn, num_turns, me, call, W, W_PAD)
                if WEIGHTED:
                    w = tl.arange(0, W_PAD)
                    word = tl.load(_peer(peers_W, me, needed_offset, tl.int32) + w, mask=(w < W) & (w != me), other=0)
                    word = tl.where(w == me, _word(num_needed, R), word)
                    lacking = tl.min(word, 0)
                    if turn == 0:
                        largest = tl.maximum(tl.load(most), tl.max(tl.abs(word), 0))
                        tl.store(most, largest)
                        tl.store(told + 1, largest)
                        tl.store(told, -lacking, mask=lacking < -1)
                    poison = tl.where(lacking < 0, float("nan"), 0.0)
            t = turn * BLOCK_T + tl.arange(0, BLOCK_T)
            here = t < capacity
            k = tl.arange(0, K_PAD)
            is_copy = (t < num_tokens)[:, None] & (k < K)[None, :]
            slot = tl.load(slot_TK + t[:, None] * K + k[None, :], mask=is_copy, other=-1).to(tl.int32)
            owner = tl.where(slot >= 0, slot // slots_per_rank, -1)
            if GRADS:
                entry = t[:, None] * K + k[None, :]
                came = tl.load(_peer(peers_W, me, grad_offset, tl.float32) + entry, mask=slot >= 0, other=0.0)
                tl.store(grad_TK + entry, came, mask=is_copy)
            copy = (me * capacity + t).to(tl.int64) * K
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                # rounded as the sums of the others are: where an expert lives changes no bit
                mine = _sum(rows_RD, row_N, weight_N, used, copy, here, d, D, K, WEIGHTED, BLOCK_T, BLOCK_D)
                mine = mine.to(y_TD.dtype.element_ty).to(tl.float32)
                total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
                for source in tl.static_range(W):
                    sent = (tl.max((owner == source).to(tl.int32), 1) > 0) & (source != me)
                    at = (_place(source, me) * capacity + t).to(tl.int64) * D
                    part_ND = _peer(peers_W, me, part_offset, y_TD.dtype.element_ty)
                    theirs = tl.load(part_ND + at[:, None] + d[None, :], mask=sent[:, None] & (d < D)[None, :], other=0.0)
                    total += tl.where(source == me, mine, theirs.to(tl.float32))
                total = total + poison
                tl.store(y_TD + t.to(tl.int64)[:, None] * D + d[None, :], total.to(y_TD.dtype.element_ty),
                         mask=(t < num_tokens)[:, None] & (d < D)[None, :])  # fmt: skip
        taken = tl.atomic_add(state + 2, 1, sem="relaxed")
    _finish(state, call)
