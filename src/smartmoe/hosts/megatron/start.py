"""First weights of Megatron's own experts as those of SmartMoE's layer, so that their losses can be laid over each other."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from smartmoe.config import RunConfig
from smartmoe.layer import INIT_STD, Experts


@torch.no_grad()
def start_as_smartmoe(run: RunConfig, config: TransformerConfig, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Give the experts of Megatron's own layers in `chunks`, before they are wrapped, the values that SmartMoE's begin with:
    they depend on seed, layer, and number of the expert alone. Returns chunks, as Megatron's pre_wrap_hooks do.

    Raises ValueError for experts that Megatron keeps in another form than one MLP each.
    """
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)):
        if not hasattr(layer.experts, "local_experts"):
            raise ValueError(
                f"--smartmoe-same-start: {type(layer.experts).__name__} keeps all experts in one: leave --moe-grouped-gemm "
                "out, or --smartmoe-same-start"
            )
        for logical, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            first, second = _values(run, layer.layer_number - 1, logical, config.init_method_std / INIT_STD)
            expert.linear_fc1.weight.copy_(first.t()), expert.linear_fc2.weight.copy_(second.t())
    return chunks


def _values(run: RunConfig, layer_idx: int, logical: int, factor: float) -> list[torch.Tensor]:
    made = Experts(
        run.model, (logical,), impl="loop", layer_idx=layer_idx, seed=run.workload.seed, dtype=torch.float32, device="cpu"
    )
    return [param[0] * factor for param in (made.w1_LDF, made.w2_LFD)]
