"""Triton kernels of `smartmoe.ops.top_gate`. part_3ED: the weights as three bfloat16 parts, the largest first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from smartmoe.ops.wide_linear_kernels import stack_parts

_BLOCK_T = 64
_TOKENS_OF_PART = 384
_MOST_NUMBERS = 1 << 12  # of a tile of weights
_NEVER = tl.constexpr(-(2**63) + 1)


@triton.jit
def choose_kernel(x_TD, part_3ED, bias_E, expert_TK, weight_TK, T, D, E, K: tl.constexpr, K_PAD: tl.constexpr,
                  E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Logits, choices and weights of BLOCK_T tokens a block."""
    t, e, k = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    x_at = x_TD + t.to(tl.int64)[:, None] * D
    large, small = tl.zeros([BLOCK_T, E_PAD], tl.float32), tl.zeros([BLOCK_T, E_PAD], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        w_at, is_weight = part_3ED + e[None, :] * D + d[:, None], (e < E)[None, :] & (d < D)[:, None]
        small = tl.dot(x, tl.load(w_at + 2 * E * D, mask=is_weight, other=0.0), small)
        small = tl.dot(x, tl.load(w_at + E * D, mask=is_weight, other=0.0), small)
        large = tl.dot(x, tl.load(w_at, mask=is_weight, other=0.0), large)
    logits = small + large + tl.load(bias_E + e, mask=e < E, other=0.0)[None, :]
    # as integers of the same order, the largest of all where it is not a number; below them the place, the first the highest
    bits = logits.to(tl.int32, bitcast=True)
    order = tl.where(logits != logits, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (order.to(tl.int64) << 32) | (E_PAD - 1 - e).to(tl.int64)[None, :]
    key = tl.where((e < E)[None, :], key, _NEVER)
    expert, value = tl.zeros([BLOCK_T, K_PAD], tl.int64), tl.zeros([BLOCK_T, K_PAD], tl.float32)
    for i in tl.static_range(K):
        best = E_PAD - 1 - (tl.max(key, 1) & 0xFFFFFFFF)
        is_best = e.to(tl.int64)[None, :] == best[:, None]
        best_value = tl.sum(tl.where(is_best, logits, 0.0), 1)
        key = tl.where(is_best, _NEVER, key)
        expert = tl.where((k == i)[None, :], best[:, None], expert)
        value = tl.where((k == i)[None, :], best_value[:, None], value)
    highest = tl.sum(tl.where((k == 0)[None, :], value, 0.0), 1)
    power = tl.where((k < K)[None, :], tl.exp(value - highest[:, None]), 0.0)
    at = t[:, None] * K + k[None, :]
    inside = (t < T)[:, None] & (k < K)[None, :]
    tl.store(expert_TK + at, expert, mask=inside)
    tl.store(weight_TK + at, power / tl.sum(power, 1)[:, None], mask=inside)


@triton.jit
def _grad_logits(expert_TK, weight_TK, grad_TK, t, e, T, K: tl.constexpr, BLOCK_T: tl.constexpr, E_PAD: tl.constexpr):
    """The gradient of the logits of some tokens, [BLOCK_T, E_PAD], zero from T on."""
    mean = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        at = t * K + k
        mean += tl.load(weight_TK + at, mask=t < T, other=0.0) * tl.load(grad_TK + at, mask=t < T, other=0.0)
    grad = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    for k in tl.static_range(K):
        at = t * K + k
        slope = tl.load(grad_TK + at, mask=t < T, other=0.0) - mean
        slope *= tl.load(weight_TK + at, mask=t < T, other=0.0)
        expert = tl.load(expert_TK + at, mask=t < T, other=-1).to(tl.int32)
        grad += tl.where(e[None, :] == expert[:, None], slope[:, None], 0.0)
    return grad


@triton.jit
def input_gradient_kernel(part_3ED, expert_TK, weight_TK, grad_TK, beside_TD, grad_TD, grad_3TE, T, D, E, K: tl.constexpr,
                          E_PAD: tl.constexpr, ADDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradient of x, plus beside_TD where it ADDS: BLOCK_D columns of BLOCK_T tokens a block. The first block of tokens
    leaves the gradient of their logits in grad_3TE [3, T, E_PAD], as bfloat16 parts, the largest first."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, E_PAD)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here, at = (t < T)[:, None] & (d < D)[None, :], t.to(tl.int64)[:, None] * D + d[None, :]
    if ADDS:  # on the way while the other is computed
        beside = tl.load(beside_TD + at, mask=here, other=0.0)
    w_at, is_weight = part_3ED + e[:, None] * D + d[None, :], (e < E)[:, None] & (d < D)[None, :]
    w0 = tl.load(w_at, mask=is_weight, other=0.0)
    w1 = tl.load(w_at + E * D, mask=is_weight, other=0.0)
    grad = _grad_logits(expert_TK, weight_TK, grad_TK, t, e, T, K, BLOCK_T, E_PAD)
    g0 = grad.to(tl.bfloat16)
    grad -= g0.to(tl.float32)
    g1 = grad.to(tl.bfloat16)
    # what is missing is 2^-16 of the result, which is rounded to 2^-9
    result = tl.dot(g0, w1)
    result = tl.dot(g1, w0, result)
    result = tl.dot(g0, w0, result)
    if ADDS:
        result += beside.to(tl.float32)
    tl.store(grad_TD + at, result, mask=here)
    if tl.program_id(1) == 0:
        to, is_token = grad_3TE + t.to(tl.int64)[:, None] * E_PAD + e[None, :], (t < T)[:, None] & (e < E_PAD)[None, :]
        tl.store(to, g0, mask=is_token)
        tl.store(to + T * E_PAD, g1, mask=is_token)
        tl.store(to + 2 * T * E_PAD, (grad - g1.to(tl.float32)).to(tl.bfloat16), mask=is_token)


@triton.jit
def weight_gradient_kernel(x_TD, grad_3TE, part_PN, T, D, E, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
                           BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """What TOKENS tokens give to BLOCK_D columns of the weights' gradient a block, and to the biases', in their row of part_PN
    [P, E * D + E] float32."""
    part, column = tl.program_id(0), tl.program_id(1)
    d, e = column * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, E_PAD)
    sum_DE, sum_TE = tl.zeros([BLOCK_D, E_PAD], tl.float32), tl.zeros([BLOCK_T, E_PAD], tl.float32)
    for start in range(0, TOKENS, BLOCK_T):
        t = (part * TOKENS + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = (t < T)[:, None]
        x = tl.load(x_TD + t[:, None] * D + d[None, :], mask=is_token & (d < D)[None, :], other=0.0)
        from_TE = grad_3TE + t[:, None] * E_PAD + e[None, :]
        g0 = tl.load(from_TE, mask=is_token, other=0.0)
        g1 = tl.load(from_TE + T * E_PAD, mask=is_token, other=0.0)
        g2 = tl.load(from_TE + 2 * T * E_PAD, mask=is_token, other=0.0)
        sum_TE += g2.to(tl.float32) + g1.to(tl.float32) + g0.to(tl.float32)
        x_DT = tl.trans(x)
        sum_DE = tl.dot(x_DT, g2, sum_DE)
        sum_DE = tl.dot(x_DT, g1, sum_DE)
        sum_DE = tl.dot(x_DT, g0, sum_DE)
    row = part_PN + part.to(tl.int64) * (D + 1) * E
    tl.store(row + e[None, :] * D + d[:, None], sum_DE, mask=(e < E)[None, :] & (d < D)[:, None])
    if column == 0:
        tl.store(row + E * D + e, tl.sum(sum_TE, 0), mask=e < E)


def _experts_pad(num_experts: int) -> int:
    return max(triton.next_power_of_2(num_experts), 16)


def forward(x_TD, weight_ED, bias_E, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expert_TK int64, weight_TK float32, part_3ED)."""
    (num_tokens, width), num_experts, pad = x_TD.shape, weight_ED.shape[0], _experts_pad(weight_ED.shape[0])
    expert_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.int64)
    weight_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.float32)
    part_3ED = stack_parts(weight_ED.contiguous(), (0, 1, 2), 0)
    choose_kernel[(triton.cdiv(num_tokens, _BLOCK_T),)](
        x_TD, part_3ED, bias_E, expert_TK, weight_TK, num_tokens, width, num_experts, K=top_k,
        K_PAD=triton.next_power_of_2(top_k), E_PAD=pad, BLOCK_T=_BLOCK_T, BLOCK_D=min(_MOST_NUMBERS // pad, 128),
        num_warps=4 if pad <= 64 else 8, num_stages=4,
    )  # fmt: skip
    return expert_TK, weight_TK, part_3ED


def backward(x_TD, part_3ED, expert_TK, weight_TK, grad_TK, beside_TD) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x plus beside_TD, which may be None, parts [P, E * D + E] float32 of the gradients of weight and bias)."""
    (num_tokens, width), num_experts = x_TD.shape, part_3ED.shape[0] // 3
    pad, grad_TK, grad_TD = _experts_pad(num_experts), grad_TK.contiguous(), torch.empty_like(x_TD)
    sizes = {"E_PAD": pad, "BLOCK_T": _BLOCK_T, "BLOCK_D": min(_MOST_NUMBERS // pad, 128)}
    columns, num_parts = triton.cdiv(width, sizes["BLOCK_D"]), triton.cdiv(num_tokens, _TOKENS_OF_PART)
    beside = x_TD if beside_TD is None else beside_TD.contiguous()
    grad_3TE = torch.empty(3, num_tokens, pad, dtype=torch.bfloat16, device=x_TD.device)
    input_gradient_kernel[(triton.cdiv(num_tokens, _BLOCK_T), columns)](
        part_3ED, expert_TK, weight_TK, grad_TK, beside, grad_TD, grad_3TE, num_tokens, width, num_experts,
        K=expert_TK.shape[1], ADDS=beside_TD is not None, num_warps=4, **sizes,
    )  # fmt: skip
    part_PN = torch.empty(num_parts, num_experts * (width + 1), dtype=torch.float32, device=x_TD.device)
    weight_gradient_kernel[(num_parts, columns)](
        x_TD, grad_3TE, part_PN, num_tokens, width, num_experts, TOKENS=_TOKENS_OF_PART, num_warps=4, num_stages=3, **sizes
    )
    return grad_TD, part_PN
