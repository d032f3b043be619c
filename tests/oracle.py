"""The plain answer: an MoE layer computed token by token in float64 on one process, differentiable.

Everything that carries tokens about is compared with this, forward and backward.
"""

from __future__ import annotations

import math

import torch

from smartmoe.gates import Routing
from smartmoe.placement import Placement

# Largest error allowed, relative to the largest value of the tensor compared.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float64: 1e-10}


def activate(hidden, activation: str):
    """Written out, so that a wrong choice of a library function shows."""
    if activation == "gelu":
        return 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    if activation == "relu":
        return hidden.clamp(min=0)
    half = hidden.shape[-1] // 2
    return hidden[:half] * torch.sigmoid(hidden[:half]) * hidden[half:]


def expert(x_D, weights, expert_idx: int, activation: str):
    """One token through one expert. weights: (w1, b1, w2, b2) stacked by logical expert, biases may be None."""
    w1, b1, w2, b2 = (None if w is None else w[expert_idx] for w in weights)
    hidden = x_D @ w1 if b1 is None else x_D @ w1 + b1
    out = activate(hidden, activation) @ w2
    return out if b2 is None else out + b2


def moe(x_TD, expert_idx_TK, weight_TK, weights, activation: str = "gelu"):
    """y_t = sum over kept copies k of weight[t, k] * expert[expert_idx[t, k]](x_t), in float64."""
    rows = []
    for x_D, expert_idx_K, weight_K in zip(x_TD, expert_idx_TK.tolist(), weight_TK, strict=True):
        y_D = 0.0 * x_D
        for k, expert_idx in enumerate(expert_idx_K):
            if expert_idx >= 0:
                y_D = y_D + weight_K[k] * expert(x_D, weights, expert_idx, activation)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 1.0


def naive_weights(x_TD, gate_weight_ED, gate_bias_E, expert_idx_TK):
    """Softmax over the logits of the chosen experts; 0 for dropped copies."""
    logits_TK = (x_TD @ gate_weight_ED.t() + gate_bias_E).gather(1, expert_idx_TK.clamp(min=0))
    return logits_TK.softmax(-1).masked_fill(expert_idx_TK < 0, 0)


def admitted_copies(expert_idx_TK, token_id_T, limit: int):
    """Which copies get one of `limit` seats of their expert, in the order (k, token id): plain loop, [T, K] bool."""
    taken: dict[int, int] = {}
    keep = torch.zeros(expert_idx_TK.shape, dtype=torch.bool)
    for k in range(expert_idx_TK.shape[1]):
        for t in torch.argsort(token_id_T).tolist():
            expert_idx = int(expert_idx_TK[t, k])
            keep[t, k] = taken.get(expert_idx, 0) < limit
            taken[expert_idx] = taken.get(expert_idx, 0) + 1
    return keep


def rounded(tensor):
    """float64 values that bfloat16 holds exactly, so that inputs are the same in every dtype."""
    return tensor.to(torch.bfloat16).double()


def make_weights(num_experts: int, width: int, ffn: int, activation: str = "gelu", bias: bool = True, seed: int = 0):
    """Random (w1, b1, w2, b2) by logical expert, float64, large enough that every term shows."""
    generator = torch.Generator().manual_seed(seed)
    wide = ffn * (2 if activation == "swiglu" else 1)
    shapes = ((width, wide), (wide,), (ffn, width), (width,))
    weights = [rounded(torch.randn(num_experts, *s, generator=generator) / s[0] ** 0.5) for s in shapes]
    return tuple(w if bias or w.dim() == 3 else None for w in weights)


def slots_of_rank(weights, placement: Placement, ep_rank: int, dtype, device="cpu"):
    """The stacked weights that one rank holds under `placement`; empty slots hold noise that must never be used."""
    experts = placement.experts_of_rank(ep_rank)
    stacked = []
    for w in weights:
        if w is None:
            stacked.append(None)
            continue
        parts = [w[e] if e >= 0 else torch.full_like(w[0], 7.0) for e in experts]
        stacked.append(torch.stack(parts).to(device, dtype).requires_grad_())
    return tuple(stacked)


def make_routing(expert_idx_TK, weight_TK, max_copies: int | None = None) -> Routing:
    return Routing(expert_idx_TK, weight_TK, torch.zeros(()), max_copies)


def assert_close(got, want, dtype, what: str = ""):
    """Compare within TOLERANCE[dtype] of the largest wanted value (and of 1e-3, for tensors of zeros)."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel():
        error, scale = (got - want).abs().max().item(), max(want.abs().max().item(), 1e-3)
        assert error <= TOLERANCE[dtype] * scale, f"{what}: error {error:.3g} of {scale:.3g}"
