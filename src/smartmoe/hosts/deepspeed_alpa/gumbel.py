"""DeepSpeed's top-2 gate with SmartMoE's result: the same experts, weights and random numbers.

The reference is a composition of some hundred operations on [T, E], which a GPU has done before the host has launched them.
On CUDA with Triton they are one product, one draw and two kernels, and one more kernel backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.gates import Gate, Routing, Tokens, router_values
from smartmoe.hosts.deepspeed.limits import MIN_CAPACITY
from smartmoe.ops.extension import have_triton

_MAX_BLOCKS_BY_EXPERTS = 1 << 15  # of 64 tokens: one block of the kernel holds all of their counts


class DeepSpeedGumbelGate(Gate):
    """Top-2 as DeepSpeed's top2gating computes it, with SmartMoE's result.

    The second expert is the largest of logits + Gumbel noise without the first (`sample`), or of the logits; weights are
    the probabilities of the kept copies divided by their sum. The noise is drawn from torch's generator in DeepSpeed's
    shape and order: with the same seed both back ends draw the same. Capacity and loss are over the rank's own tokens,
    which compete for seats in the order in which they are given.
    Balance loss: E * sum_e f_e * P_e (E^2 times the mean there). Source: GShard (Lepikhin et al., 2020); DeepSpeed.
    """

    def __init__(self, model, gate, *, sample: bool, **kwargs):
        super().__init__(model, gate, **kwargs)
        self.sample = sample

    def _init_weights(self, model, seed, layer_idx, device):
        self.weight_ED = nn.Parameter(router_values(model, seed, layer_idx).to(device))

    def _logits(self, x_TD):
        if x_TD.is_cuda and x_TD.dtype == self.weight_ED.dtype == torch.bfloat16:
            return _BfloatLinear.apply(x_TD, self.weight_ED)
        return F.linear(x_TD.float(), self.weight_ED.float())

    def _limit(self, num_tokens, capacity):
        return max(super()._limit(num_tokens, capacity), MIN_CAPACITY)

    def forward(self, x_TD, token_id_T, num_segments=None):
        num_tokens, logits_TE = x_TD.shape[0], self._logits(x_TD)
        blocks = num_tokens * self.num_experts // 64
        if self.capacity is not None and logits_TE.is_cuda and have_triton() and 0 < blocks <= _MAX_BLOCKS_BY_EXPERTS:
            limit = self._limit(num_tokens, self.capacity)
            uniform_TE = torch.rand_like(logits_TE) if self.sample else None
            factor = self.num_experts / self._loss_divisor
            pruned_TK, weight_TK, loss = choose(logits_TE, uniform_TE, limit, factor)
            return Routing(pruned_TK, weight_TK, loss, max(1, min(limit, 2 * num_tokens)))
        return self._reference(x_TD, logits_TE, token_id_T, num_segments)

    def _reference(self, x_TD, logits_TE, token_id_T, num_segments):
        tokens, prob_TE = Tokens(x_TD, token_id_T, num_segments), logits_TE.softmax(-1)
        first_T1 = prob_TE.argmax(-1, keepdim=True)
        rest_TE = logits_TE.detach()
        if self.sample:
            rest_TE = rest_TE + gumbel(rest_TE)
        second_T1 = rest_TE.scatter(1, first_T1, -torch.inf).argmax(-1, keepdim=True)
        pruned_TK, total_KE, _ = self._prune(torch.cat([first_T1, second_T1], 1), tokens)
        weight_TK = prob_TE.gather(1, pruned_TK.clamp(min=0)).masked_fill(pruned_TK < 0, 0)
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).eps)
        num_tokens = max(x_TD.shape[0], 1)
        loss = self._importance_loss(total_KE[0] / num_tokens, prob_TE, num_tokens)
        return self._routing(pruned_TK, weight_TK, loss, x_TD.shape[0])


def gumbel(like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of this shape, dtype and device: the bits that torch.distributions.Gumbel(0, 1) draws, as DeepSpeed does,
    in 7 operations instead of 17."""
    info = torch.finfo(like.dtype)
    uniform = torch.rand_like(like).mul_(1 - info.eps - info.tiny).add_(info.tiny)
    return uniform.log_().neg_().log_().neg_()


def choose(
    logits_TE: torch.Tensor, uniform_TE: torch.Tensor | None, limit: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pruned_TK [T, 2] int64, weight_TK [T, 2] float32, 0-dim balance loss), differentiable, from Triton kernels.

    logits_TE: [T, E] float32; uniform_TE: the same shape, in [0, 1), the second expert's noise, None = without; limit: seats
    of an expert, which tokens take in their order, first choices before second ones; factor: of sum_e f_e * P_e.
    """
    return _Choose.apply(logits_TE.contiguous(), uniform_TE, limit, factor)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, uniform_TE, limit, factor):
        from smartmoe.hosts.deepspeed_alpa import gumbel_kernels as kernels

        info = torch.finfo(torch.float32)
        pruned_TK, weight_TK, fraction_E, loss = kernels.forward(logits_TE, uniform_TE, limit, factor, info)
        ctx.save_for_backward(logits_TE, pruned_TK, fraction_E)
        ctx.factor, ctx.eps = factor, info.eps
        ctx.mark_non_differentiable(pruned_TK)
        return pruned_TK, weight_TK, loss

    @staticmethod
    def backward(ctx, _, grad_weight_TK, grad_loss):
        from smartmoe.hosts.deepspeed_alpa import gumbel_kernels as kernels

        saved = ctx.saved_tensors
        return kernels.backward(*saved, grad_weight_TK.contiguous(), grad_loss, ctx.factor, ctx.eps), None, None, None


class _BfloatLinear(torch.autograd.Function):
    """x @ weight.T of bfloat16 matrices in float32: their products are exact, so no float32 copy of x is needed."""

    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = torch.mm(grad_TE, weight_ED.float()).to(x_TD.dtype)
        return grad_x_TD, torch.mm(grad_TE.t(), x_TD.float()).to(weight_ED.dtype)
