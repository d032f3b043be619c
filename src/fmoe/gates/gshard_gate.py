"""GShard's gate (Lepikhin et al., 2020)."""

from __future__ import annotations

import math

import torch

from fmoe.gates.naive_gate import NaiveGate
from fmoe.gates.utils import prune_gate_by_capacity


class GShardGate(NaiveGate):
    """The naive gate with a balance loss, a capacity and random routing.

    capacity: (training, evaluation); an expert takes at most ceil(capacity * T) * K // tot_expert of this worker's copies.
    random_routing: the second choice is dropped with probability 1 - 2 * its score (K = 2).
    """

    def __init__(
        self, d_model, num_expert, world_size, topk=2, capacity=(1.2, 2.4), random_routing=True, gate_bias=True
    ):
        if random_routing and topk != 2:
            raise ValueError(f"GShardGate: random routing needs top_k = 2, not {topk}; or random_routing=False")
        super().__init__(d_model, num_expert, world_size, top_k=topk, gate_bias=gate_bias)
        self.capacity, self.random_routing = capacity, random_routing

    def forward(self, x: torch.Tensor):
        """x: [T, D]. Returns (experts [T, K], scores [T, K])."""
        expert_idx_TK, score_TK, logits_TE = super().forward(x, return_all_scores=True)
        self.set_loss(self._first_choice_loss(logits_TE, expert_idx_TK))
        expert_idx_TK = self._limit(expert_idx_TK, math.ceil(self.capacity[0 if self.training else 1] * x.shape[0]))
        if self.random_routing:
            dropped_T = 2 * score_TK[:, 1] < torch.rand(x.shape[0], device=x.device)
            expert_idx_TK[:, 1].masked_fill_(dropped_T, -1)
        return expert_idx_TK, score_TK

    def _limit(self, expert_idx_TK, num_seats: int):
        """num_seats: capacity times T."""
        limit_E = torch.full((self.tot_expert,), num_seats * self.top_k // self.tot_expert, device=expert_idx_TK.device)
        return prune_gate_by_capacity(expert_idx_TK, limit_E, self.num_expert, self.world_size)
