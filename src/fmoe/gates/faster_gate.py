"""FasterMoE's gate for clusters whose nodes are linked slowly (He et al., PPoPP'22).

FMOE_TOPO_GPUS_PER_NODE (8) says which workers share a node, FMOE_TOPO_OUTGOING_FRACTION (0.14) how many tokens may leave it;
both are read when a gate is made.
"""

from __future__ import annotations

import torch

from fmoe.fastermoe.config import float_from_env
from fmoe.gates.naive_gate import NaiveGate


def _workers_per_node() -> int:
    return int(float_from_env("FMOE_TOPO_GPUS_PER_NODE", 8))


class FasterGate(NaiveGate):
    """Top-2 with a limit on tokens whose first choice is on another node: when as many as may leave want to, or more, those of
    the largest logits keep it as their second expert, and all other copies go to experts of this node."""

    def __init__(self, d_model: int, n_expert: int, world_size: int, node_rank: int):
        super().__init__(d_model, n_expert, world_size, top_k=2)
        self.node_rank, self.ogn_ratio = node_rank, float_from_env("FMOE_TOPO_OUTGOING_FRACTION", 0.14)
        node_E = torch.arange(self.tot_expert) // (_workers_per_node() * n_expert)
        self.register_buffer("mask", node_E != node_rank, persistent=False)

    def forward(self, inp: torch.Tensor):
        """inp: [T, D]. Returns (experts [T, 2], scores [T, 2] = softmax over the chosen experts)."""
        logits_TE = self.gate(inp)
        expert_idx_TK = logits_TE.topk(2, dim=-1).indices
        self.set_loss(self._first_choice_loss(logits_TE, expert_idx_TK))
        expert_idx_TK = self._limit_outgoing(logits_TE, expert_idx_TK)
        return expert_idx_TK, logits_TE.gather(1, expert_idx_TK).softmax(-1)

    @torch.no_grad()
    def _limit_outgoing(self, logits_TE, expert_idx_TK):
        allowance, first_T = int(logits_TE.shape[0] * self.ogn_ratio), expert_idx_TK[:, 0]
        leaves_T = self.mask[first_T]
        logit_T = logits_TE.gather(1, expert_idx_TK)[:, 0].masked_fill(~leaves_T, -torch.inf)
        may_leave_T = torch.zeros_like(leaves_T).scatter_(0, logit_T.topk(allowance).indices, True)
        near_TK = logits_TE.masked_fill(self.mask, -torch.inf).topk(2, dim=-1).indices
        near_TK[:, 1] = torch.where(may_leave_T, first_T, near_TK[:, 1])
        return torch.where(leaves_T.sum() < allowance, expert_idx_TK, near_TK)


def gen_faster_gate(rank: int):
    """A gate for FMoE(gate=..) on the worker of this rank."""

    def make(d_model: int, n_expert: int, world_size: int, top_k: int = 2) -> FasterGate:
        if top_k != 2:
            raise ValueError(f"FasterGate: it chooses two experts: top_k must be 2, not {top_k}")
        return FasterGate(d_model, n_expert, world_size, rank // _workers_per_node())

    return make
