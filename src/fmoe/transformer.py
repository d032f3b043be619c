"""FastMoE's layer in place of the MLP of a transformer block."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from fmoe.layers import FMoE
from fmoe.linear import FMoELinear


class _Expert(nn.Module):
    """Two linear layers of num_expert experts with an activation, a callable, between."""

    def __init__(self, num_expert: int, d_model: int, d_hidden: int, activation, rank: int = 0):
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp, fwd_expert_count):
        """inp: [R, d_model] sorted by expert; fwd_expert_count: [num_expert] int64. Returns [R, d_model]."""
        return self.h4toh(self.activation(self.htoh4(inp, fwd_expert_count)), fwd_expert_count)


class FMoETransformerMLP(FMoE):
    """An MLP of a transformer block with experts: FMoE for inputs of any shape [.., d_model].

    activation: any callable that treats rows separately, a module if it has parameters; expert_dp_comm: the mark of the
    experts' parameters; expert_rank: kept for programs that read it; the rest are FMoE's arguments.

    dispatcher is not FastMoE's: beside FMoE's also "direct" and "auto" (direct where the GPUs of moe_group are linked by
    NVLink, else basic). Direct wants no later batch larger than the first, and raises ValueError after a routing that needed
    far more rows than any before (smartmoe.dispatch.direct). With experts in place of this module's own, or an activation that
    has parameters, its host waits for the number of rows in every pass.

    Both layouts of FastMoE's checkpoints load: "experts.htoh4.weight" [num_expert, ..], which is this module's own, and
    "experts.0.htoh4.weight" [1, ..] of one expert after the other.
    """

    dispatchers = ("basic", "overlapped", "direct", "auto")

    @property
    def counts_on_host(self) -> bool:
        """Whether its experts were replaced: others may read their counts as FastMoE gives them."""
        return type(self.experts) is not _Expert or getattr(self.expert_fn, "__func__", None) is not FMoE.expert_fn

    @property
    def leaves_other_rows_alone(self) -> bool:
        """Whether rows behind the counted ones, which may hold anything, are in no gradient: an activation with parameters
        would sum over them."""
        if self.counts_on_host:
            return False
        activation = self.experts.activation
        return not isinstance(activation, nn.Module) or next(activation.parameters(), None) is None

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation=F.gelu,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        **kwargs,
    ):
        super().__init__(num_expert=num_expert, d_model=d_model, **kwargs)
        self.experts = _Expert(num_expert, d_model, d_hidden, activation, rank=expert_rank)
        self.mark_parallel_comm(expert_dp_comm)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """inp: [.., d_model]; returns the same shape. Collective, as FMoE."""
        return super().forward(inp.reshape(-1, self.d_model)).reshape(inp.shape)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if isinstance(self.experts, _Expert):
            _stack_experts(state_dict, f"{prefix}experts.")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _stack_experts(state_dict: dict, prefix: str) -> None:
    """Put what lies there by expert, "<prefix><idx>.<name>" [1, ..], under "<prefix><name>" [num_expert, ..]."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key in list(state_dict):
        match = re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)", key)
        if match:
            found.setdefault(match[2], {})[int(match[1])] = state_dict.pop(key)
    for name, parts in found.items():
        state_dict[prefix + name] = torch.cat([parts[idx] for idx in sorted(parts)])
