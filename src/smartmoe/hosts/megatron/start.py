"""What Megatron's own experts are given before training: a way to their biases, and first weights as those of SmartMoE's
layer, so that losses can be laid over each other."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from smartmoe.config import RunConfig
from smartmoe.layer import INIT_STD, Experts


def leave_out_idle_reduction(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Let experts in `chunks` that no rank shares leave out their reduction over tensor-parallel ranks, as Megatron does where
    experts are spread over ranks. On one rank megatron-core 0.19 reduces over a group of one, which returns its input, and
    then adds a bias to that in place, which torch refuses. Returns chunks, as Megatron's pre_wrap_hooks do."""
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)):
        for expert in getattr(layer.experts, "local_experts", ()):
            if expert.linear_fc2.tp_group.size() == 1:
                expert.linear_fc2.explicit_expert_comm = True
    return chunks


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
        # all of a layer at once: large ones are drawn by several threads, one each
        made = Experts(
            run.model, tuple(layer.local_expert_indices), impl="loop", layer_idx=layer.layer_number - 1,
            seed=run.workload.seed, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        factor = config.init_method_std / INIT_STD
        for slot, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(made.w1_LDF[slot].t() * factor)
            expert.linear_fc2.weight.copy_(made.w2_LFD[slot].t() * factor)
    return chunks
