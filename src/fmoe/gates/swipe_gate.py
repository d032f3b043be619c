"""A gate that gives every worker equally many copies."""

from __future__ import annotations

import torch

from fmoe.functions import group_of
from fmoe.gates.naive_gate import NaiveGate
from smartmoe.ops.all_to_all import gather_all, group_rank
from smartmoe.ops.capacity import order_copies, rebalance


class SwipeGate(NaiveGate):
    """The naive gate, and in training copies that find their worker full go to one with room, to its expert k % num_expert.

    A worker takes its share of all copies of all workers, the mean where workers have different numbers of tokens.
    """

    def forward(self, inp: torch.Tensor):
        """inp: [T, D]. Returns (experts [T, K], scores [T, K] = softmax over the chosen experts). Collective in training."""
        logits_TE = self.gate(inp)
        expert_idx_TK = logits_TE.topk(self.top_k, dim=-1).indices
        if self.training:
            expert_idx_TK = self._level(expert_idx_TK)
        return expert_idx_TK, logits_TE.gather(1, expert_idx_TK).softmax(-1)

    @torch.no_grad()
    def _level(self, expert_idx_TK):
        group = group_of(self.world_size)
        num_tokens, device = expert_idx_TK.shape[0], expert_idx_TK.device
        num_tokens_W = gather_all(torch.tensor([num_tokens], device=device), group).tolist()
        first = sum(num_tokens_W[: group_rank(group)])
        worker_TK = expert_idx_TK // self.num_expert
        token_id_T = torch.arange(first, first + num_tokens, device=device)
        order = order_copies(worker_TK, token_id_T, self.world_size, 1, max(sum(num_tokens_W), 1), group)
        limit = -(-sum(num_tokens_W) * self.top_k // self.world_size)
        level_TK = rebalance(order, worker_TK, limit)
        other_TK = level_TK * self.num_expert + torch.arange(self.top_k, device=device) % self.num_expert
        return torch.where(level_TK == worker_TK, expert_idx_TK, other_TK)
