"""The MoE layer: gate -> placement -> dispatch -> experts -> combine; nothing else.

Layer 4. Shape letters are those of `smartmoe.ops`, and B samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from smartmoe.config import ModelConfig, RunConfig, check_layer
from smartmoe.dispatch import build_dispatcher, nodes_of
from smartmoe.gates import Routing, build_gate
from smartmoe.held_experts import HeldExperts
from smartmoe.ops.activation import widening
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.ops.hashing import make_key
from smartmoe.ops.plan import slots_of
from smartmoe.placement import Placement, Replicas
from smartmoe.replicas import HistoryReplication, build_replication

INIT_STD = 0.02
MANY_WEIGHTS = 1 << 20


class Experts(nn.Module):
    """The experts of this rank, stacked by local slot.

    Parameters, all of one dtype: w1_LDF [L, D, F] ([L, D, 2F] for swiglu), b1_LF, w2_LFD [L, F, D], b2_LD; biases are
    None without model.expert_bias. Each is initialised from (seed, layer_idx, logical expert, parameter name) alone:
    the same values under every world size, plan and placement. An empty slot (-1) is zero.

    storages: the memory of each parameter, [L + num_replicas, ...] from `allocate`; the parameter is its first L slots,
    those behind belong to replicas.
    """

    def __init__(
        self,
        model: ModelConfig,
        expert_of_slot_L: tuple[int, ...],
        *,
        impl: str,
        layer_idx: int,
        seed: int,
        dtype,
        device,
        num_replicas: int = 0,
        allocate: Callable[..., torch.Tensor] = torch.zeros,
    ):
        super().__init__()
        self.activation, self.impl, self.num_replicas = model.activation, impl, num_replicas
        num_owned, storages = len(expert_of_slot_L), []
        width = model.ffn_size * widening(model.activation)
        stds = {"w1_LDF": INIT_STD, "w2_LFD": INIT_STD / math.sqrt(2 * model.num_layers), "b1_LF": 0.0, "b2_LD": 0.0}
        shapes = {
            "w1_LDF": (model.hidden_size, width),
            "b1_LF": (width,),
            "w2_LFD": (model.ffn_size, model.hidden_size),
            "b2_LD": (model.hidden_size,),
        }
        for name, shape in shapes.items():
            if name.startswith("b") and not model.expert_bias:
                self.register_parameter(name, None)
                continue
            stacked = allocate((num_owned + num_replicas, *shape), dtype=dtype, device=device)
            if stds[name]:
                hosted = {slot: expert for slot, expert in enumerate(expert_of_slot_L) if expert >= 0}
                keys = [make_key(seed, layer_idx, expert, name) for expert in hosted.values()]
                for slot, values in zip(hosted, _normal_values(keys, shape, stds[name]), strict=True):
                    stacked[slot].copy_(values)
            param = nn.Parameter(stacked[:num_owned])
            param.parallel = "expert"
            self.register_parameter(name, param)
            storages.append(stacked)
        self.storages = tuple(storages) if num_replicas else ()

    def _apply(self, fn, recurse=True):
        if self.storages:
            raise ValueError(
                "experts with replica slots stay as they were made: build the layer in its dtype, on its device"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, *rest):
        if self.storages and metadata.get("assign_to_params_buffers"):
            raise ValueError("experts with replica slots stay as they were made: load their state_dict without assign=True")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def weights(self) -> tuple[torch.Tensor | None, ...]:
        """(w1_LDF, b1_LF, w2_LFD, b2_LD)."""
        return self.w1_LDF, self.b1_LF, self.w2_LFD, self.b2_LD

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Copy the parameters into the storages, with which experts that have replica slots compute, where somebody has given
        them other memory (`param.data = ..`): an optimizer with buffers of its own, a swap of averaged weights."""
        params = [param for param in self.weights() if param is not None]
        for storage, param in zip(self.storages, params, strict=False):
            if storage.data_ptr() != param.data_ptr():
                storage[: param.shape[0]].copy_(param)

    def forward(self, rows_RD: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
        """rows_RD: [R, D] sorted by local slot; count_L: [L] int64, rows of each slot. Returns [R, D]."""
        return self.compute(rows_RD, count_L, self.weights())

    def compute(self, rows_RD: torch.Tensor, count_L: torch.Tensor, weights) -> torch.Tensor:
        """The same with other weights than its own: a tuple as `weights()` gives, for as many slots as count_L."""
        return expert_ffn(rows_RD, count_L, *weights, activation=self.activation, impl=self.impl)


def _normal_values(keys: list[int], shape: tuple[int, ...], std: float) -> Iterator[torch.Tensor]:
    """Normal numbers of this shape for each key. Large ones are drawn by several threads, one each: a thread fills no more
    than some 100 million a second, and a rank may hold billions of weights, so that only those being drawn are in memory."""

    def draw(key: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key))

    if math.prod(shape) < MANY_WEIGHTS:
        yield from map(draw, keys)
        return
    num_threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(keys), num_threads):
            yield from threads.map(draw, keys[start : start + num_threads])


class MoELayer(nn.Module):
    """A mixture-of-experts feed-forward layer whose experts are spread over `ep_group`.

    config: model, gate, layer, online (replicas), cluster and workload (seed, batch size) are read. placement: where
    experts live, None = in order.
    ep_group, stage_group: ProcessGroup or None for this process alone. dtype: of the experts; the gate is always
    float32.
    observers: called as f(layer_idx, routing, token_id_BT) on every forward, also when activations are recomputed.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        layer_idx: int,
        placement: Placement | None = None,
        ep_group=None,
        stage_group=None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        model, seed = check_layer(config, f"layer {layer_idx}").model, config.workload.seed
        placement = placement or Placement.identity(model.num_experts, group_size(ep_group))
        self.layer_idx, self.ep_group = layer_idx, ep_group
        self.observers: list[Callable[[int, Routing, torch.Tensor], None]] = []
        self._node_of_rank_W = list(nodes_of(ep_group, config.cluster.ranks_per_node))
        self.gate = build_gate(
            model,
            config.gate,
            layer_idx=layer_idx,
            seed=seed,
            stage_group=stage_group,
            global_batch_size=config.workload.global_batch_size,
            device=device,
        )
        self.replication, num_replicas = build_replication(config, ep_group), config.online.replica_slots
        self.experts = Experts(
            model,
            placement.experts_of_rank(group_rank(ep_group)),
            impl=config.layer.experts,
            layer_idx=layer_idx,
            seed=seed,
            dtype=dtype,
            device=device,
            num_replicas=num_replicas,
            allocate=self.replication.allocate if self.replication else torch.zeros,
        )
        if self.replication:
            self.replication.bind(self.experts.storages)
        self._slots_per_rank = placement.slots_per_rank
        self.dispatcher = build_dispatcher(
            config.layer, ep_group, slots_per_rank=placement.slots_per_rank + num_replicas, cluster=config.cluster
        )
        slot_of_expert_E = torch.zeros(model.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("slot_of_expert_E", slot_of_expert_E, persistent=False)
        self.set_placement(placement)

    def set_placement(self, placement: Placement) -> None:
        """Route to `placement` from now on, without replicas until they are set or decided anew. The weights must be there
        already, or be moved by the caller (smartmoe.migrate).

        Raises ValueError when the number of experts, ranks or slots differs from this layer's.
        """
        got = (placement.num_experts, placement.num_ranks, placement.slots_per_rank)
        want = (self.slot_of_expert_E.shape[0], group_size(self.ep_group), self._slots_per_rank)
        if got != want:
            raise ValueError(
                f"layer {self.layer_idx}: a placement of (experts, ranks, slots a rank) = {got} does not fit {want}; "
                f"build it for {want[0]} experts on {want[1]} ranks"
            )
        self.placement = placement
        self.slot_of_expert_E.copy_(torch.from_numpy(placement.primary_slot_E))
        if self.replication:
            self.replication.set_placement(placement)
        self.gate.set_placement(placement.rank_of_expert(), self._node_of_rank_W, group_rank(self.ep_group))

    @property
    def replicas(self) -> Replicas:
        """What `set_replicas` set last; with online.replicate = "exact" nothing, as each micro-batch has its own."""
        if isinstance(self.replication, HistoryReplication):
            return self.replication.replicas
        return Replicas.none(self.placement, self.experts.num_replicas)

    def set_replicas(self, replicas: Replicas) -> None:
        """Route to `replicas` from now on (online.replicate = "history"). Their weights must be sent before the first
        forward pass of every step, and gradients brought to the owners before the optimizer's step: replicas.send_all and
        return_all, which the trainer calls.

        Raises ValueError when they do not fit the layer's placement, replica slots or mode.
        """
        if not isinstance(self.replication, HistoryReplication):
            raise ValueError(f'layer {self.layer_idx}: replicas are set with online.replicate = "history" only')
        self.replication.set_replicas(replicas)

    def forward(self, x_BTD: torch.Tensor, token_id_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route, compute, combine.

        x_BTD: [B, T, D], the dtype of the experts; token_id_BT: [B, T] int64, each sample's ids consecutive. Returns
        (y_BTD, 0-dim float32 share of the balance loss). Collective over ep_group and, for some gates, over
        stage_group. Raises ValueError, before anything is sent, for another shape or dtype.
        """
        self._check_input(x_BTD, token_id_BT)
        x_TD, token_id_T = x_BTD.flatten(0, 1), token_id_BT.flatten()
        routing = self.gate(x_TD, token_id_T, num_segments=token_id_BT.shape[0])
        for observer in self.observers:
            observer(self.layer_idx, routing, token_id_BT)
        if routing.x_TD is not None:
            x_TD = routing.x_TD
        if self.replication is None:
            slot_TK = slots_of(routing.expert_idx_TK, self.slot_of_expert_E.unsqueeze(1))
            y_TD = self.dispatcher(x_TD, routing, slot_TK, self.experts)
        else:
            y_TD = self._forward_with_replicas(x_TD, routing, token_id_T)
        return y_TD.view(x_BTD.shape), routing.balance_loss

    def _check_input(self, x_BTD: torch.Tensor, token_id_BT: torch.Tensor) -> None:
        hidden_size, dtype = self.experts.w1_LDF.shape[1], self.experts.w1_LDF.dtype
        if x_BTD.dim() != 3 or x_BTD.shape[2] != hidden_size or x_BTD.dtype != dtype:
            raise ValueError(
                f"layer {self.layer_idx}: x_BTD is {x_BTD.dtype} {list(x_BTD.shape)}, its experts take {dtype} "
                f"[samples, tokens of each, {hidden_size}]: reshape or cast it, or build the layer with another dtype"
            )
        if token_id_BT.shape != x_BTD.shape[:2] or token_id_BT.dtype != torch.int64:
            raise ValueError(
                f"layer {self.layer_idx}: token_id_BT is {token_id_BT.dtype} {list(token_id_BT.shape)}, it must be int64 "
                f"{list(x_BTD.shape[:2])}: the number of each token, for instance sample * seq_len + position"
            )

    def get_extra_state(self) -> dict:
        """What `state_dict` keeps beside the weights of this rank's slots: which experts they are."""
        return self.placement.to_dict()

    def set_extra_state(self, state: dict) -> None:
        """As `set_placement`: a state_dict of the same rank brings its placement with it."""
        self.set_placement(Placement.from_dict(state))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """One without a placement, of an earlier version or a host that keeps placements by itself, is whole, too: its experts
        are taken for those of the placement in force."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}_extra_state" in missing:
            missing.remove(f"{prefix}_extra_state")

    def _forward_with_replicas(self, x_TD, routing: Routing, token_id_T) -> torch.Tensor:
        plan = self.replication.plan(routing.expert_idx_TK, token_id_T)
        experts = HeldExperts(self.experts, self.replication, plan)
        return experts.finish(self.dispatcher(x_TD, routing, plan.slot_TK, experts))
