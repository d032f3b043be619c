"""Triton kernels of replication between GPUs that reach each other's memory: plan, weights to replicas, gradients back.

Addresses, flags and `state` are those of `direct_kernels`. replica_N [W * G] int32 is the plan that all ranks have alike:
the expert in each replica slot, -1 = none. primary_E [E] int32: the owned slot (ep_rank * L + index) of each expert. A
storage is one weight of all L + G slots of a rank; S numbers the storages of a layer, addresses_SW has the address of each
on every rank. Where no slot is in use, nothing is sent and nobody waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smartmoe.dispatch.direct_kernels import _count_poll, _peer, _signal, _wait

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _shifted(z, bits: tl.constexpr):
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mixed(z):
    """As smartmoe.ops.hashing._mix."""
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


@triton.jit
def _counted(words, is_there, call, me):
    """The numbers of words of 8 bytes, when all have come: number of the call and count. What is not there is 0."""
    word = tl.load(words, mask=is_there, other=0, volatile=True)
    polls = 0
    while tl.max((is_there & ((word >> 32).to(tl.int32) != call)).to(tl.int32)) > 0:
        polls = _count_poll(polls, me)
        word = tl.load(words, mask=is_there, other=0, volatile=True)
    return tl.where(is_there, word & 0xFFFFFFFF, 0)


@triton.jit
def _solver_pass(load_E, owner_E, owned_E, target, min_weight, W, L, G, W_PAD: tl.constexpr, E_PAD: tl.constexpr,
                 N_PAD: tl.constexpr, BUCKETS: tl.constexpr, NEAR: tl.constexpr):  # fmt: skip
    """One pass of solvers.solve_exact_step, with the experts that it closes one by one closed together.

    owned_E: the slots of owned experts. Returns (replica_N, bucket_EW, slot_EW, weight of the fullest rank)."""
    e, w, n = tl.arange(0, E_PAD), tl.arange(0, W_PAD), tl.arange(0, N_PAD)
    owns_EW = owner_E[:, None] == w[None, :]
    bucket_EW = tl.where(owns_EW, BUCKETS, 0).to(tl.int64)
    slot_EW = tl.where(owns_EW, owned_E[:, None], -1)
    kept_E = load_E * BUCKETS  # on the owner; -1 = the expert is closed
    rank_W = tl.sum(tl.where(owns_EW, kept_E[:, None], 0), 0)
    used_W = tl.zeros((W_PAD,), tl.int32)
    closed_W = w >= W
    replica_N = tl.full((N_PAD,), -1, tl.int32)
    never = target * W + 1  # more than any rank can weigh
    heaviest = tl.max(tl.where(closed_W, -1, rank_W), 0)
    while heaviest > target + target // NEAR:
        source = tl.argmax(tl.where(closed_W, -1, rank_W), 0)
        mine_E = (owner_E == source) & (kept_E > 0)
        free_EW = (used_W < G)[None, :] & (bucket_EW == 0) & (w < W)[None, :] & (owns_EW == 0)
        least_E, host_E = tl.min(tl.where(free_EW, rank_W[None, :], never), 1, return_indices=True)
        room_E = tl.minimum(heaviest - target, target - least_E)
        fits_E = (room_E + load_E // 2) // tl.maximum(load_E, 1)
        fits_E = tl.minimum(fits_E, kept_E // tl.maximum(load_E, 1))
        good_E = mine_E & (least_E < never) & (fits_E > 0) & (fits_E * load_E >= min_weight)
        most, chosen = tl.max(tl.where(good_E, kept_E, -1), 0, return_indices=True)
        is_copy = most > 0
        ahead_E = (kept_E > most) | ((kept_E == most) & (e < chosen)) | (most < 0)
        kept_E = tl.where(mine_E & (good_E == 0) & ahead_E, -1, kept_E)
        closed_W = closed_W | ((w == source) & (most < 0))
        is_chosen_E = (e == chosen) & is_copy
        host = tl.sum(tl.where(is_chosen_E, host_E, 0), 0)
        buckets = tl.sum(tl.where(is_chosen_E, fits_E, 0), 0)
        weight = tl.sum(tl.where(is_chosen_E, fits_E * load_E, 0), 0)
        place = host * G + tl.sum(tl.where(w == host, used_W, 0), 0)
        replica_N = tl.where((n == place) & is_copy, chosen, replica_N)
        slot_EW = tl.where(is_chosen_E[:, None] & (w == host)[None, :], place + (host + 1) * L, slot_EW)
        used_W += ((w == host) & is_copy).to(tl.int32)
        moved_W = (w == host).to(tl.int64) - (w == source).to(tl.int64)
        bucket_EW += tl.where(is_chosen_E[:, None], moved_W[None, :] * buckets, 0)
        rank_W += moved_W * weight
        kept_E = tl.where(is_chosen_E, kept_E - weight, kept_E)
        heaviest = tl.max(tl.where(closed_W, -1, rank_W), 0)
    return replica_N, bucket_EW, slot_EW, tl.max(rank_W, 0)


@triton.jit
def plan_kernel(expert_N, token_id_T, slot_N, primary_E, replica_N, peers_W, ended, count_offset, me, num_copies, K, L, G, E,
                min_weight, BUCKETS: tl.constexpr, NEAR: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
                E_PAD: tl.constexpr, N_PAD: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Count this rank's copies of each expert, tell all ranks, decide as solvers.solve_exact_step, and give each copy its
    physical slot, as ops.plan.slots_of with the table that was decided.

    min_weight: copies that an expert must take along to be worth sending, times BUCKETS. P: blocks, as many on every rank.
    Each tells its own counts, [2, W, P, E_PAD] words at count_offset, and decides for itself, so that no block waits for the
    last of its rank. Every call writes every word, so one has come when it has the number of the call; the words of two calls
    in a row lie in two places: a rank that is one call ahead disturbs nobody.
    ended: [1] int32, blocks of all calls that have ended: no more than P - 1 of this one when a block begins.
    """
    call = (tl.load(ended).to(tl.uint32, bitcast=True) // P + 1).to(tl.int32)  # at the end of its range it starts over
    e, w, block = tl.arange(0, E_PAD), tl.arange(0, W_PAD), tl.program_id(0)
    count_E = tl.zeros((E_PAD,), tl.int32)
    for start in range(block * BLOCK, num_copies, P * BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = tl.load(expert_N + i, mask=i < num_copies, other=-1).to(tl.int32)
        count_E += tl.histogram(expert, E_PAD, mask=expert >= 0)
    word = (call.to(tl.int64) << 32) | count_E.to(tl.int64)
    place = (call & 1) * W * P
    for step in tl.static_range(W):
        peer = (me + 1 + step) % W
        tl.store(_peer(peers_W, peer, count_offset, tl.int64) + (place + me * P + block) * E_PAD + e, word)
    primary = tl.load(primary_E + e, mask=e < E, other=-1)
    owner_E = tl.where(e < E, primary // L, -1)
    part = tl.arange(0, W_PAD * P)
    words = _peer(peers_W, me, count_offset, tl.int64) + (place + part[:, None]) * E_PAD + e[None, :]
    load_E = tl.sum(_counted(words, (part < W * P)[:, None] & (e >= 0)[None, :], call, me), 0)
    target = (tl.sum(load_E, 0) * BUCKETS + W - 1) // W
    replica, bucket_EW, slot_EW, fullest = _solver_pass(
        load_E, owner_E, primary + owner_E * G, target, min_weight, W, L, G, W_PAD, E_PAD, N_PAD, BUCKETS, NEAR
    )
    if fullest > target + target // NEAR:
        target += (fullest - target) // 2
        other, other_EW, other_slot_EW, other_fullest = _solver_pass(
            load_E, owner_E, primary + owner_E * G, target, min_weight, W, L, G, W_PAD, E_PAD, N_PAD, BUCKETS, NEAR
        )
        is_better = other_fullest < fullest
        replica, bucket_EW = tl.where(is_better, other, replica), tl.where(is_better, other_EW, bucket_EW)
        slot_EW = tl.where(is_better, other_slot_EW, slot_EW)
    if block == 0:
        n = tl.arange(0, N_PAD)
        tl.store(replica_N + n, replica, mask=n < W * G)
    # rank w hosts the buckets from the bound of rank w - 1 to its own
    entry_EW = (slot_EW + 1) * (2 * BUCKETS) + tl.cumsum(bucket_EW, 1).to(tl.int32)
    for start in range(block * BLOCK, num_copies, P * BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = tl.load(expert_N + i, mask=i < num_copies, other=-1).to(tl.int32)
        token_id = tl.load(token_id_T + i // K, mask=i < num_copies, other=0)
        bucket = (_mixed(token_id + (i % K + 1).to(tl.int64) * _GOLDEN) & (BUCKETS - 1)).to(tl.int32)
        slot = tl.full((BLOCK,), -1, tl.int32)
        for step in tl.static_range(W):
            entry_E = tl.sum(tl.where((w == W - 1 - step)[None, :], entry_EW, 0), 1)
            entry = tl.gather(entry_E, tl.maximum(expert, 0), 0)
            slot = tl.where(bucket < entry % (2 * BUCKETS), entry // (2 * BUCKETS) - 1, slot)
        tl.store(slot_N + i, tl.where(expert >= 0, slot, -1).to(tl.int64), mask=i < num_copies)
    tl.debug_barrier()  # all threads of the block have read the number of the call
    tl.atomic_add(ended, 1, sem="relaxed")


@triton.jit
def pull_kernel(replica_N, primary_E, addresses_SW, words_S, first, last, me, L, G, W, BLOCK: tl.constexpr):
    """Fill this rank's replica slots of storages first .. last - 1 from the owners' memory. words_S: [S] int64 4-byte words
    of a slot."""
    for index in range(G):
        expert = tl.load(replica_N + me * G + index)
        if expert >= 0:
            source = tl.load(primary_E + expert)
            for storage in range(first, last):
                words = tl.multiple_of(tl.load(words_S + storage), 4)  # slots are multiples of 16 bytes
                theirs = _peer(addresses_SW + storage * W, source // L, source % L * words * 4, tl.int32)
                mine = _peer(addresses_SW + storage * W, me, (L + index) * words * 4, tl.int32)
                for start in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    tl.store(mine + i, tl.load(theirs + i, mask=i < words), mask=i < words)


@triton.jit
def _stage(copies, replica_N, peers_W, stage_offset, size, me, G, BLOCK: tl.constexpr):
    """Copy the gradients of this rank's replicas to where the owners can read them."""
    stage = _peer(peers_W, me, stage_offset, copies.dtype.element_ty)
    first, step, lane = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK, tl.arange(0, BLOCK)
    for index in range(G):
        if tl.load(replica_N + me * G + index) >= 0:
            mine = copies + index * size
            row = tl.load(mine + first + lane, mask=first + lane < size)
            for start in range(first, size, step):
                i = start + lane
                following = tl.load(mine + i + step, mask=i + step < size)
                tl.store(stage + index * size + i, row, mask=i < size)
                row = following


@triton.jit
def _add(owned_grad, like, replica_N, primary_E, peers_W, stage_offset, size, me, L, G, num_replicas, N_PAD: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """Add to the gradients of owned experts those of their replicas, ranks ascending, in float32 and rounded once. like: of
    the type of the replicas' gradients."""
    n = tl.arange(0, N_PAD)
    everywhere = tl.load(replica_N + n, mask=n < num_replicas, other=-1)
    first, step, lane = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK, tl.arange(0, BLOCK)
    for replica in range(num_replicas):
        expert = tl.load(replica_N + replica)
        same = (everywhere == expert) & (n < num_replicas)
        is_first = tl.sum((same & (n < replica)).to(tl.int32), 0) == 0
        last = tl.max(tl.where(same, n, 0), 0)
        owned = tl.load(primary_E + expert, mask=expert >= 0, other=-1) - me * L
        if (expert >= 0) & is_first & (owned >= 0) & (owned < L):
            theirs = _peer(peers_W, replica // G, stage_offset, like.dtype.element_ty) + replica % G * size
            # a block ahead, since what comes over a link takes long
            row = tl.load(theirs + first + lane, mask=first + lane < size, other=0.0)
            for start in range(first, size, step):
                i = start + lane
                at = owned_grad + owned * size + i
                mine = tl.load(at, mask=i < size, other=0.0)
                following = tl.load(theirs + i + step, mask=i + step < size, other=0.0)
                total = mine.to(tl.float32) + row.to(tl.float32)
                for other in range(replica + 1, last + 1):
                    if tl.load(replica_N + other) == expert:
                        stage = _peer(peers_W, other // G, stage_offset, like.dtype.element_ty)
                        total += tl.load(stage + other % G * size + i, mask=i < size, other=0.0).to(tl.float32)
                tl.store(at, total.to(owned_grad.dtype.element_ty), mask=i < size)
                row = following


@triton.jit
def _await(flag, me, call):
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    polls = 0
    while seen - call < 0:
        polls = _count_poll(polls, me)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _tell_staged(peers_W, staged_offset, me, call, PART: tl.constexpr, W: tl.constexpr):
    tl.debug_barrier()
    for peer in tl.static_range(W):
        flags = _peer(peers_W, peer, staged_offset, tl.int32) + (PART * W + me) * tl.num_programs(0)
        tl.atomic_xchg(flags + tl.program_id(0), call, sem="release", scope="sys")


@triton.jit
def _await_staged(peers_W, staged_offset, me, call, is_from_N, n, G, PART: tl.constexpr, W: tl.constexpr):
    """Of those ranks that have something for this one: others need not wait, and hold no multiprocessor meanwhile."""
    for peer in tl.static_range(W):
        if tl.sum((is_from_N & (n // G == peer)).to(tl.int32), 0) > 0:
            flags = _peer(peers_W, me, staged_offset, tl.int32) + (PART * W + peer) * tl.num_programs(0)
            _await(flags + tl.program_id(0), me, call)
    tl.debug_barrier()


@triton.jit
def return_kernel(owned_a, copies_a, owned_b, copies_b, replica_N, primary_E, sizes_S, peers_W, state, index_a, index_b,
                  stage_a, stage_b, staged_offset, added_offset, me, L, G, num_replicas, W: tl.constexpr,
                  HAS_B: tl.constexpr, N_PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add the gradients of replicas, copies [G, ...], to those of their owners, owned [L, ...], for storage a and, if HAS_B, b.

    sizes_S: [S] int64 elements of a slot. Block p of every rank has the same elements, so it waits for the blocks p alone:
    flags [2, W, blocks] at staged_offset, of a and b. state: [2] int32, of the additions, with flags [W] at added_offset: a
    rank stages again only after all have added what was staged.
    """
    n = tl.arange(0, N_PAD)
    everywhere = tl.load(replica_N + n, mask=n < num_replicas, other=-1)
    if tl.max(everywhere, 0) >= 0:
        per_16_bytes: tl.constexpr = 128 // copies_a.dtype.element_ty.primitive_bitwidth
        size_a = tl.multiple_of(tl.load(sizes_S + index_a), per_16_bytes)
        size_b = tl.multiple_of(tl.load(sizes_S + index_b), per_16_bytes)
        _wait(peers_W, state, added_offset, me, W)
        call = tl.load(state + 1) + 1  # the last block to finish counts it up
        _stage(copies_a, replica_N, peers_W, stage_a, size_a, me, G, BLOCK)
        _tell_staged(peers_W, staged_offset, me, call, 0, W)
        if HAS_B:
            _stage(copies_b, replica_N, peers_W, stage_b, size_b, me, G, BLOCK)
            _tell_staged(peers_W, staged_offset, me, call, 1, W)
        is_mine = (everywhere >= 0) & (tl.load(primary_E + everywhere, mask=everywhere >= 0, other=-1) // L == me)
        _await_staged(peers_W, staged_offset, me, call, is_mine, n, G, 0, W)
        _add(owned_a, copies_a, replica_N, primary_E, peers_W, stage_a, size_a, me, L, G, num_replicas, N_PAD, BLOCK)
        if HAS_B:
            _await_staged(peers_W, staged_offset, me, call, is_mine, n, G, 1, W)
            _add(
                owned_b, copies_b, replica_N, primary_E, peers_W, stage_b, size_b, me, L, G, num_replicas, N_PAD, BLOCK
            )
        _signal(peers_W, state, added_offset, me, tl.num_programs(0), W)
