"""Triton kernels of `gumbel.choose`. T tokens in the order in which they compete for seats, in blocks of BLOCK_T; E experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_T = 64


@triton.jit
def _row(logits_TE, t, inside_T, e, E):
    """Logits and probabilities of a block of tokens."""
    value = tl.load(logits_TE + t[:, None] * E + e[None, :], mask=inside_T[:, None] & (e < E)[None, :], other=float("-inf"))
    value = tl.where(inside_T[:, None], value, tl.where((e < E)[None, :], 0.0, float("-inf")))
    power = tl.exp(value - tl.max(value, 1)[:, None])
    return value, power / tl.sum(power, 1)[:, None]


@triton.jit
def choose_kernel(logits_TE, uniform_TE, expert_2T, count_2BE, prob_BE, T, E, B, scale, shift, SAMPLE: tl.constexpr,
                  BLOCK_T: tl.constexpr, E_PAD: tl.constexpr):  # fmt: skip
    """Both choices of every token, and how many tokens of each block chose an expert; sums of probabilities of the block."""
    block = tl.program_id(0)
    t, e = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, E_PAD)
    inside_T, known_E = t < T, e < E
    value, prob = _row(logits_TE, t, inside_T, e, E)
    # of equal probabilities the first, as the reference
    first = tl.argmax(tl.where(known_E[None, :], prob, -1.0), 1)
    if SAMPLE:
        uniform = tl.load(uniform_TE + t[:, None] * E + e[None, :], mask=inside_T[:, None] & known_E[None, :], other=0.5)
        value += -tl.log(-tl.log(uniform * scale + shift))
    second = tl.argmax(tl.where(e[None, :] == first[:, None], float("-inf"), value), 1)
    tl.store(expert_2T + t, first, mask=inside_T)
    tl.store(expert_2T + T + t, second, mask=inside_T)
    is_first = ((e[None, :] == first[:, None]) & inside_T[:, None]).to(tl.int32)
    is_second = ((e[None, :] == second[:, None]) & inside_T[:, None]).to(tl.int32)
    tl.store(count_2BE + block * E + e, tl.sum(is_first, 0), mask=known_E)
    tl.store(count_2BE + (B + block) * E + e, tl.sum(is_second, 0), mask=known_E)
    tl.store(prob_BE + block * E + e, tl.sum(tl.where(inside_T[:, None], prob, 0.0), 0), mask=known_E)


@triton.jit
def _seats(expert_2T, count_2BE, taken_E, k, block, t, inside_T, e, E, T, B, limit, BLOCK_T: tl.constexpr, B_PAD: tl.constexpr):
    """Whether copy k of each token of the block has a seat, its expert, and how many copies k each expert has."""
    b = tl.arange(0, B_PAD)
    there = (b < B)[:, None] & (e < E)[None, :]
    count_BE = tl.load(count_2BE + (k * B + b)[:, None] * E + e[None, :], mask=there, other=0)
    earlier_E = taken_E + tl.sum(tl.where((b < block)[:, None], count_BE, 0), 0)
    expert = tl.load(expert_2T + k * T + t, mask=inside_T, other=0)
    chosen = ((e[None, :] == expert[:, None]) & inside_T[:, None]).to(tl.int32)
    place = tl.sum(chosen * (tl.cumsum(chosen, 0) - chosen + earlier_E[None, :]), 1)
    return inside_T & (place < limit), expert, tl.sum(count_BE, 0)


@triton.jit
def seat_kernel(logits_TE, expert_2T, count_2BE, prob_BE, pruned_TK, weight_TK, fraction_E, loss, T, E, B, limit, eps, factor,
                BLOCK_T: tl.constexpr, E_PAD: tl.constexpr, B_PAD: tl.constexpr):  # fmt: skip
    """Experts with -1 where there is no seat, weights of the kept copies; the first block also the balance loss."""
    block = tl.program_id(0)
    t, e = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, E_PAD)
    inside_T = t < T
    _, prob = _row(logits_TE, t, inside_T, e, E)
    none_E = tl.zeros([E_PAD], tl.int32)
    kept0, expert0, total_E = _seats(expert_2T, count_2BE, none_E, 0, block, t, inside_T, e, E, T, B, limit, BLOCK_T, B_PAD)
    kept1, expert1, _ = _seats(expert_2T, count_2BE, total_E, 1, block, t, inside_T, e, E, T, B, limit, BLOCK_T, B_PAD)
    part0 = tl.sum(tl.where((e[None, :] == expert0[:, None]) & kept0[:, None], prob, 0.0), 1)
    part1 = tl.sum(tl.where((e[None, :] == expert1[:, None]) & kept1[:, None], prob, 0.0), 1)
    whole = tl.maximum(part0 + part1, eps)
    tl.store(pruned_TK + t * 2, tl.where(kept0, expert0, -1).to(tl.int64), mask=inside_T)
    tl.store(pruned_TK + t * 2 + 1, tl.where(kept1, expert1, -1).to(tl.int64), mask=inside_T)
    tl.store(weight_TK + t * 2, part0 / whole, mask=inside_T)
    tl.store(weight_TK + t * 2 + 1, part1 / whole, mask=inside_T)
    if block == 0:
        b = tl.arange(0, B_PAD)
        there = (b < B)[:, None] & (e < E)[None, :]
        prob_E = tl.sum(tl.load(prob_BE + b[:, None] * E + e[None, :], mask=there, other=0.0), 0)
        share_E = total_E.to(tl.float32) / T
        tl.store(fraction_E + e, share_E, mask=e < E)
        tl.store(loss, factor * tl.sum(share_E * (prob_E / T)))


@triton.jit
def backward_kernel(logits_TE, pruned_TK, fraction_E, grad_weight_TK, grad_loss, grad_TE, T, E, eps, factor,
                    BLOCK_T: tl.constexpr, E_PAD: tl.constexpr):  # fmt: skip
    """Gradients of the logits."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, E_PAD)
    inside_T, known_E = t < T, e < E
    _, prob = _row(logits_TE, t, inside_T, e, E)
    # a dropped copy, -1, is no expert's
    is0 = e[None, :] == tl.load(pruned_TK + t * 2, mask=inside_T, other=-1)[:, None]
    is1 = e[None, :] == tl.load(pruned_TK + t * 2 + 1, mask=inside_T, other=-1)[:, None]
    part0, part1 = tl.sum(tl.where(is0, prob, 0.0), 1), tl.sum(tl.where(is1, prob, 0.0), 1)
    grad0 = tl.load(grad_weight_TK + t * 2, mask=inside_T, other=0.0)
    grad1 = tl.load(grad_weight_TK + t * 2 + 1, mask=inside_T, other=0.0)
    whole = part0 + part1
    mean = tl.where(whole >= eps, (grad0 * part0 + grad1 * part1) / tl.maximum(whole, eps), 0.0)
    whole = tl.maximum(whole, eps)
    slope = tl.load(grad_loss) * factor / T * tl.load(fraction_E + e, mask=known_E, other=0.0)
    grad = tl.where(is0, ((grad0 - mean) / whole)[:, None], 0.0) + tl.where(is1, ((grad1 - mean) / whole)[:, None], 0.0)
    grad += slope[None, :]
    grad = prob * (grad - tl.sum(prob * grad, 1)[:, None])
    tl.store(grad_TE + t[:, None] * E + e[None, :], grad, mask=inside_T[:, None] & known_E[None, :])


def forward(logits_TE, uniform_TE, limit: int, factor: float, info: torch.finfo):
    """(pruned_TK, weight_TK, fraction_E, loss): see `gumbel.choose`; fraction_E: of tokens whose first choice is the expert."""
    num_tokens, num_experts = logits_TE.shape
    blocks, pad = triton.cdiv(num_tokens, _BLOCK_T), triton.next_power_of_2(num_experts)
    expert_2T = logits_TE.new_empty(2, num_tokens, dtype=torch.int32)
    count_2BE = logits_TE.new_empty(2, blocks, num_experts, dtype=torch.int32)
    prob_BE, fraction_E = logits_TE.new_empty(blocks, num_experts), logits_TE.new_empty(num_experts)
    choose_kernel[(blocks,)](
        logits_TE, uniform_TE, expert_2T, count_2BE, prob_BE, num_tokens, num_experts, blocks, 1 - info.eps - info.tiny,
        info.tiny, SAMPLE=uniform_TE is not None, BLOCK_T=_BLOCK_T, E_PAD=pad,
    )  # fmt: skip
    pruned_TK = logits_TE.new_empty(num_tokens, 2, dtype=torch.int64)
    weight_TK, loss = logits_TE.new_empty(num_tokens, 2), logits_TE.new_empty(())
    seat_kernel[(blocks,)](
        logits_TE, expert_2T, count_2BE, prob_BE, pruned_TK, weight_TK, fraction_E, loss, num_tokens, num_experts, blocks,
        limit, info.eps, factor, BLOCK_T=_BLOCK_T, E_PAD=pad, B_PAD=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return pruned_TK, weight_TK, fraction_E, loss


def backward(logits_TE, pruned_TK, fraction_E, grad_weight_TK, grad_loss, factor: float, eps: float) -> torch.Tensor:
    """The gradient of the logits, [T, E] float32."""
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE)
    backward_kernel[(triton.cdiv(num_tokens, _BLOCK_T),)](
        logits_TE, pruned_TK, fraction_E, grad_weight_TK, grad_loss, grad_TE, num_tokens, num_experts, eps, factor,
        BLOCK_T=_BLOCK_T, E_PAD=triton.next_power_of_2(num_experts),
    )  # fmt: skip
    return grad_TE
