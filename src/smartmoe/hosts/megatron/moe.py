"""The MoE layer in Megatron-LM: Megatron's router, SmartMoE's exchange, experts and placement, put in by a layer spec.

The router stays Megatron's own with all its arguments (losses, score functions, biases, dropping), so both layers train
the same model. Shape letters are those of `smartmoe.ops`; Megatron's hidden states are [sequence, batch, D].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_rank, get_pg_size

from smartmoe.config import RunConfig
from smartmoe.hosts.megatron.gate import MegatronGate
from smartmoe.layer import INIT_STD, MoELayer

MEGATRON_NAMES = {"w1_LDF": "linear_fc1.weight", "w2_LFD": "linear_fc2.weight"}


class SmartMoELayer(BaseMoELayer):
    """A `BaseMoELayer` of Megatron around SmartMoE's MoELayer, which is `moe` once the layer's number is known.

    Parameters of experts carry `allreduce = False`, by which Megatron reduces them over the ranks with the same experts.
    """

    def __init__(self, config, submodules, *, run: RunConfig, pg_collection, is_mtp_layer=False, name=None):
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        if is_mtp_layer:
            raise ValueError("multi-token prediction layers with experts are not supported: leave --mtp-num-layers out")
        self._run, self._num_passes = run, 0
        self._recompute = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        self._stage_group, self._expert_dp_group = pg_collection.tp_dp_cp, pg_collection.expt_dp
        self.router = submodules.router(config=config, pg_collection=pg_collection, is_mtp_layer=False)
        self.moe: MoELayer | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron calls this right after the layer is made; experts' first values depend on the number (from 1)."""
        super().set_layer_number(layer_number)
        config = self.config
        self.moe = MoELayer(
            self._run,
            layer_idx=layer_number - 1,
            ep_group=self.ep_group if get_pg_size(self.ep_group) > 1 else None,
            stage_group=self._stage_group if get_pg_size(self._stage_group) > 1 else None,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        self.moe.gate = MegatronGate(self.router, config.moe_router_topk)
        for param in self.moe.experts.parameters():
            param.allreduce = False
            with torch.no_grad():
                param.mul_(config.init_method_std / INIT_STD)

    def _apply(self, fn, recurse: bool = True):
        """Megatron moves and converts its model once it is made; SmartMoE's layer is in its dtype and place from the start,
        in memory that must stay where it holds copies of experts."""
        moe = self._modules.pop("moe", None)
        super()._apply(fn, recurse)
        if moe is not None:
            self._modules["moe"] = moe
        return self

    def forward(self, hidden_states: torch.Tensor, intermediate_tensors=None, padding_mask=None):
        """(y, None) of hidden_states [sequence, batch, D]; collective over the expert group."""
        self.moe.gate.padding_mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        num_tokens = hidden_states.shape[0] * hidden_states.shape[1]
        is_first_pass = torch._C._current_graph_task_id() == -1  # else recomputed in a backward pass
        first = self._num_passes * num_tokens if is_first_pass else 0
        self._num_passes += is_first_pass
        token_id_SB = torch.arange(first, first + num_tokens, device=hidden_states.device).view(hidden_states.shape[:2])
        observers = self.moe.observers
        if not self.training:  # online placement looks at training alone
            self.moe.observers = []
        if self._recompute and self.training:
            y_SBD, _ = tensor_parallel.checkpoint(self.moe, False, hidden_states, token_id_SB)
        else:
            y_SBD, _ = self.moe(hidden_states, token_id_SB)
        self.moe.observers = observers
        return y_SBD, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """What Megatron's distributed checkpoints hold: each weight of the experts as one tensor of all of them, of which
        this rank has its part, under the names and in the form of Megatron's own layers: either reads the other's. Experts
        must stand in plain order: the part's place says which they are."""
        part = (len(sharded_offsets), get_pg_rank(self.ep_group), get_pg_size(self.ep_group))
        offsets, replica_id = (*sharded_offsets, part), (0, 0, get_pg_rank(self._expert_dp_group))
        sharded = sharded_state_dict_default(self.router, f"{prefix}router.", sharded_offsets, metadata)
        for name, param in self.moe.experts.named_parameters():
            sharded[f"{prefix}moe.experts.{name}"] = ShardedTensorFactory(
                f"{prefix}experts.experts.{MEGATRON_NAMES[name]}",
                param,
                partial(_as_in_megatron, offsets, len(sharded_offsets)),
                lambda parts: parts[0].transpose(1, 2),
                replica_id,
            )
        return sharded


def _as_in_megatron(offsets, num_prepended: int, key, stacked, replica_id, flattened_range) -> list[ShardedTensor]:
    """Experts [L, in, out], or what an optimizer keeps of them, as Megatron stores them: [L, out, in]."""
    return [
        ShardedTensor.from_rank_offsets(
            key, stacked.transpose(1, 2), *offsets, replica_id=replica_id, prepend_axis_num=num_prepended
        )
    ]


def with_smartmoe(layer_spec: Callable | ModuleSpec, run: RunConfig) -> Callable:
    """`layer_spec` as Megatron takes it (--spec), with SmartMoE's layer wherever it has Megatron's. The result raises
    ValueError where it finds experts in another kind of layer: they would train in a run that says otherwise."""

    def spec(model_config, vp_stage=None):
        made = layer_spec
        if callable(layer_spec) and not isinstance(layer_spec, ModuleSpec):
            knows_stage = "vp_stage" in inspect.signature(layer_spec).parameters
            made = layer_spec(model_config, **({"vp_stage": vp_stage} if knows_stage else {}))
        for layer in made.layer_specs if hasattr(made, "layer_specs") else [made]:
            _replace(layer, run)
        return made

    return spec


def _replace(layer: ModuleSpec, run: RunConfig) -> None:
    builder = getattr(layer.submodules, "mlp", None)
    kind = builder.func if isinstance(builder, partial) else getattr(builder, "module", builder)
    if kind is SmartMoELayer or not (isinstance(kind, type) and issubclass(kind, BaseMoELayer)):
        return  # layers may share one spec
    if not (isinstance(builder, partial) and kind is MegatronMoELayer and issubclass(layer.module, TransformerLayer)):
        raise ValueError(
            f"--spec: {kind.__name__} in {layer.module.__name__} is not Megatron's plain layer of experts, so SmartMoE's "
            f"cannot stand in for it: leave --spec out, or take --smartmoe megatron"
        )
    layer.submodules.mlp = partial(SmartMoELayer, submodules=builder.keywords["submodules"], run=run)


def smartmoe_layers(model_chunks) -> list[SmartMoELayer]:
    """SmartMoE's layers of this rank's chunks of the model, in the order of their numbers."""
    found = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, SmartMoELayer)]
    return sorted(found, key=lambda layer: layer.layer_number)
