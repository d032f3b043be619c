"""Top-k with learnt noise (Shazeer et al., 2017)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fmoe.gates.base_gate import BaseGate


class NoisyGate(BaseGate):
    """The top_k largest of a linear map with Gaussian noise of learnt width, in training; scores = softmax over them.

    Loss: squared coefficients of variation of the experts' summed scores and of their expected numbers of tokens.
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2):
        super().__init__(num_expert, world_size)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.top_k, self.noise_epsilon = top_k, 1e-2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, uniform within 1 / sqrt(tot_expert), with torch's generator, as FastMoE does."""
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, inp: torch.Tensor):
        """inp: [T, D]. Returns (experts [T, K], scores [T, K])."""
        clean_TE = logits_TE = inp @ self.w_gate
        if self.training:
            width_TE = F.softplus(inp @ self.w_noise) + self.noise_epsilon
            logits_TE = clean_TE + torch.randn_like(clean_TE) * width_TE
        top_TK, top_idx_TK = logits_TE.topk(min(self.top_k + 1, self.tot_expert), dim=1)
        expert_idx_TK, score_TK = top_idx_TK[:, : self.top_k], top_TK[:, : self.top_k].softmax(-1)
        score_TE = torch.zeros_like(logits_TE).scatter(1, expert_idx_TK, score_TK)
        if self.training and self.top_k < self.tot_expert:
            # how likely each expert is among the first, were its noise drawn again
            out_T1, in_T1 = top_TK[:, self.top_k, None], top_TK[:, self.top_k - 1, None]
            bar_TE = torch.where(logits_TE > out_T1, out_T1, in_T1)
            load_E = torch.special.ndtr((clean_TE - bar_TE) / width_TE).sum(0)
        else:
            load_E = (score_TE > 0).sum(0)
        self.set_loss(_cv_squared(score_TE.sum(0)) + _cv_squared(load_E))
        return expert_idx_TK.contiguous(), score_TK


def _cv_squared(value_E):
    value_E = value_E.float()
    if value_E.shape[0] == 1:
        return value_E.sum() * 0
    return value_E.var() / (value_E.mean() ** 2 + 1e-10)
