"""The gate of Switch Transformer (Fedus et al., 2021)."""

from __future__ import annotations

import math

import torch

from fmoe.gates.naive_gate import NaiveGate
from fmoe.gates.utils import limit_by_capacity


class SwitchGate(NaiveGate):
    """One expert for each token, by the probability of a linear layer with noise in training; its score is the probability.

    capacity: (training, evaluation); an expert takes at most ceil(capacity * T / num_expert) copies of all workers.
    """

    def __init__(self, d_model, num_expert, world_size, topk=1, switch_eps=0.1, capacity=(1.2, 2.4), gate_bias=True):
        if topk != 1:
            raise ValueError(f"SwitchGate: it chooses one expert: top_k must be 1, not {topk}")
        super().__init__(d_model, num_expert, world_size, top_k=1, gate_bias=gate_bias)
        self.switch_eps, self.capacity = switch_eps, capacity

    def forward(self, inp: torch.Tensor):
        """inp: [T, D]. Returns (experts [T, 1], scores [T, 1]). Collective."""
        logits_TE = self.gate(inp)
        if self.training:
            logits_TE = logits_TE + torch.empty_like(logits_TE).uniform_(1 - self.switch_eps, 1 + self.switch_eps)
        prob_TE = logits_TE.float().softmax(-1)
        score_TK, expert_idx_TK = prob_TE.topk(1, dim=-1)
        limit = math.ceil(self.capacity[0 if self.training else 1] * inp.shape[0] / self.num_expert)
        sent_E, _, expert_idx_TK = limit_by_capacity(expert_idx_TK, self.num_expert, self.world_size, limit)
        num_kept = sent_E.sum().clamp(min=1)
        self.set_loss((sent_E / num_kept * (prob_TE.sum(0) / num_kept)).sum() * self.tot_expert)
        return expert_idx_TK, score_TK.to(inp.dtype)
