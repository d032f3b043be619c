"""A linear layer of several experts at once."""

from __future__ import annotations

import math

import torch
from torch import nn

from smartmoe.ops.grouped_linear import grouped_linear


class MOELinear:
    """The products of several experts, for programs that have the weights elsewhere."""

    @staticmethod
    def apply(inp, fwd_expert_count, weight, bias=None) -> torch.Tensor:
        """As FMoELinear.forward, with its weight and bias as arguments, all of one dtype."""
        return grouped_linear(inp, fwd_expert_count, weight, bias)


class FMoELinear(nn.Module):
    """One torch.nn.Linear for each of this worker's experts.

    weight: [num_expert, out_feat, in_feat], initialised as FastMoE does (uniform within 1 / sqrt(out_feat * in_feat), as
    kaiming_uniform_ sees the stack); bias: [num_expert, out_feat], zero, or None. rank: kept for programs that read it.
    """

    def __init__(self, num_expert: int, in_feat: int, out_feat: int, bias: bool = True, rank: int = 0):
        super().__init__()
        self.num_expert, self.in_feat, self.out_feat, self.rank = num_expert, in_feat, out_feat, rank
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_expert, out_feat)) if bias else None)
        self.reset_parameters()

    def forward(self, inp: torch.Tensor, fwd_expert_count: torch.Tensor) -> torch.Tensor:
        """inp: [R, in_feat] sorted by expert; fwd_expert_count: [num_expert] int64 rows of each, on any device. Returns
        [R, out_feat]. ValueError for another dtype than the weights', but under autocast all are cast."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(inp.device.type):
            dtype = torch.get_autocast_dtype(inp.device.type)
            inp, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (inp, weight, bias))
        return MOELinear.apply(inp, fwd_expert_count, weight, bias)

    def reset_parameters(self) -> None:
        """Draw the weights anew, with torch's generator."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return (
            f"num_expert={self.num_expert}, in_features={self.in_feat}, out_features={self.out_feat}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )
