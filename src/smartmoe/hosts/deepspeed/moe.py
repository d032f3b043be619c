"""DeepSpeed's own MoE layer with the initial values of SmartMoE's: they depend on (seed, layer, logical expert, name) alone.

Shape letters are those of `smartmoe.ops`, and B samples.
"""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from smartmoe.config import RunConfig
from smartmoe.gates import router_values
from smartmoe.hosts.deepspeed.limits import MIN_CAPACITY
from smartmoe.layer import Experts
from smartmoe.ops.activation import activate, widening


class Expert(nn.Module):
    """One expert as DeepSpeed computes it; also the MLP of layers without experts."""

    def __init__(self, hidden_size: int, ffn_size: int, activation: str, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(hidden_size, ffn_size * widening(activation), bias=bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(activate(self.up(x), self.activation))


class DeepSpeedMoE(MoE):
    """DeepSpeed's layer, called as SmartMoE's: (x_BTD, token_id_BT) -> (y_BTD, balance loss).

    capacity: at most ceil(capacity * tokens * k / E) copies of an expert from this rank's micro-batch, None = no limit.
    sample: draw the second of two experts (Gumbel noise), else take the best. `count_E`, int64: copies of each expert that
    this rank's tokens chose since it was set to zero, before the limit. Collective over the world (groups are made).
    """

    def __init__(self, config: RunConfig, layer_idx: int, *, capacity: float | None, sample: bool, device,
                 min_capacity: int = MIN_CAPACITY, use_rts: bool = False):  # fmt: skip
        model, ep = config.model, config.plan.ep
        expert = Expert(model.hidden_size, model.ffn_size, model.activation, model.expert_bias).to(device)
        super().__init__(
            model.hidden_size, expert, num_experts=model.num_experts, ep_size=ep, k=model.top_k,
            capacity_factor=1.0 if capacity is None else capacity, drop_tokens=capacity is not None,
            min_capacity=min_capacity, use_rts=use_rts, top2_2nd_expert_sampling=sample,
        )  # fmt: skip
        create_expert_groups(ep)
        self.to(device)
        self.register_buffer(
            "count_E", torch.zeros(model.num_experts, dtype=torch.int64, device=device), persistent=False
        )
        gate, experts = self.deepspeed_moe.gate, self.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            gate.wg.weight.copy_(router_values(model, config.workload.seed, layer_idx))
            values = _values(config, layer_idx, tuple(_experts_of_this_rank(model.num_experts, ep)), device)
            for slot, place in enumerate(experts):
                _copy_expert(place, values, slot)

    def forward(self, x_BTD, token_id_BT):
        y_BTD, balance_loss, count_E = super().forward(x_BTD)
        self.count_E += count_E
        return y_BTD, balance_loss


def create_expert_groups(ep: int) -> str:
    """DeepSpeed's name of its expert groups of `ep` consecutive ranks, which are made unless they are there.

    Collective over the world. Raises ValueError when `ep` does not divide the world.
    """
    world_size = torch.distributed.get_world_size()
    if ep < 1 or world_size % ep:
        raise ValueError(f"ep = {ep} does not divide the {world_size} ranks: take a divisor of {world_size}")
    name = f"ep_size_{ep}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep)
    return name


def _experts_of_this_rank(num_experts: int, ep: int) -> range:
    first, count = torch.distributed.get_rank() % ep * (num_experts // ep), num_experts // ep
    return range(first, first + count)


def _values(config: RunConfig, layer_idx: int, logical: tuple[int, ...], device) -> tuple[torch.Tensor | None, ...]:
    """Initial weights of the experts `logical` in one piece, which are drawn side by side."""
    seed = config.workload.seed
    experts = Experts(
        config.model, logical, impl="loop", layer_idx=layer_idx, seed=seed, dtype=torch.float32, device=device
    )
    return experts.weights()


def _copy_expert(expert: Expert, values: tuple[torch.Tensor | None, ...], slot: int) -> None:
    w1_LDF, b1_LF, w2_LFD, b2_LD = values
    expert.up.weight.copy_(w1_LDF[slot].t()), expert.down.weight.copy_(w2_LFD[slot].t())
    if b1_LF is not None:
        expert.up.bias.copy_(b1_LF[slot]), expert.down.bias.copy_(b2_LD[slot])
