"""Megatron-LM's router as a gate of SmartMoE's layer. Imports nothing of Megatron. Shape letters: `smartmoe.ops`."""

from __future__ import annotations

import torch
from torch import nn

from smartmoe.gates import Routing


class MegatronGate(nn.Module):
    """Megatron's router with SmartMoE's result. `router` is not a child: it belongs to the Megatron layer."""

    def __init__(self, router: nn.Module, top_k: int):
        super().__init__()
        self._router, self.top_k = [router], top_k
        self.padding_mask: torch.Tensor | None = None

    def forward(self, x_TD: torch.Tensor, token_id_T: torch.Tensor, num_segments: int | None = None) -> Routing:
        """Choose experts; num_segments is Megatron's sequence length here. See gates.Gate."""
        x_SBD = x_TD.view(num_segments, -1, x_TD.shape[1])
        prob_TE, chosen_TE = self._router[0](x_SBD, self.padding_mask)
        return routing_of(prob_TE.view(x_TD.shape[0], -1), chosen_TE.view(x_TD.shape[0], -1), self.top_k)

    def set_placement(self, *args) -> None:
        """Megatron's router does not care where experts live."""


def routing_of(prob_TE: torch.Tensor, chosen_TE: torch.Tensor, top_k: int) -> Routing:
    """A Routing from Megatron's weights [T, E], 0 where not chosen, and bool map [T, E] of kept copies, at most top_k of a
    token; its losses hang on the weights already, so the balance loss is 0. Experts of a token are in ascending order."""
    kept_TK, expert_idx_TK = chosen_TE.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    kept_TK, expert_idx_TK = kept_TK[:, :top_k].bool(), expert_idx_TK[:, :top_k]
    weight_TK = prob_TE.gather(1, expert_idx_TK).float()
    return Routing(expert_idx_TK.masked_fill(~kept_TK, -1), weight_TK, prob_TE.new_zeros((), dtype=torch.float32))
