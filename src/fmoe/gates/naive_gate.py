"""Top-k of a linear layer."""

from __future__ import annotations

import torch
from torch import nn

from fmoe.gates.base_gate import BaseGate


class NaiveGate(BaseGate):
    """The top_k largest of a linear layer, scores = softmax over them; its loss is 0."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True):
        super().__init__(num_expert, world_size)
        self.gate, self.top_k = nn.Linear(d_model, self.tot_expert, bias=gate_bias), top_k

    def forward(self, inp: torch.Tensor, return_all_scores: bool = False):
        """inp: [T, D]. Returns (experts [T, K], scores [T, K]), the largest first, and with return_all_scores [T, tot_expert]
        of the linear layer."""
        logits_TE = self.gate(inp)
        top_TK, expert_idx_TK = logits_TE.topk(self.top_k, dim=-1)
        self.set_loss(torch.zeros(1, requires_grad=True, device=inp.device))
        chosen = expert_idx_TK, top_TK.softmax(-1)
        return (*chosen, logits_TE) if return_all_scores else chosen

    def _first_choice_loss(self, logits_TE, expert_idx_TK):
        """Mean over experts of (share of first choices) * (mean probability), times num_expert^2, as FastMoE defines it."""
        num_tokens = max(logits_TE.shape[0], 1)
        count_E = torch.zeros(self.tot_expert, device=logits_TE.device)
        count_E.scatter_add_(0, expert_idx_TK[:, 0], torch.ones(logits_TE.shape[0], device=logits_TE.device))
        prob_E = logits_TE.softmax(-1).sum(0) / num_tokens
        return (count_E / num_tokens * prob_E).mean() * self.num_expert**2
