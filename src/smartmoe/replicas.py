"""Replicas of experts: their weights on the way to replica slots, their gradients on the way back to the owners.

Layer 4. A rank has L owned slots of a layer and behind them, in the same storage, G replica slots, so that one grouped
product runs over all L + G. A `Replication` says what the replica slots of one layer hold and carries weights and
gradients; the two here do it by collectives, with a plan that the host knows. Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from smartmoe.config import RunConfig
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.dispatch.symmetric_replicas import SymmetricReplication
from smartmoe.ops.all_to_all import gather_all, group_rank, group_size
from smartmoe.ops.plan import count_slots, slots_of
from smartmoe.ops.replica_exchange import (
    Swap,
    Transfers,
    fill,
    finish_return,
    return_grads,
    start_return,
    start_weights,
)
from smartmoe.placement import Placement, Replicas
from smartmoe.solvers.exact_step import solve_exact_step


class Replication(Protocol):
    """What a layer asks of a mechanism. One object a layer; every rank of the expert group makes the same calls.

    In a forward pass: plan, send_weights, then wait_weights before each use of the storages. In its backward pass:
    restore_weights, wait_weights before each use, return_grads, wait_grads. Passes of several micro-batches interleave.
    """

    def allocate(self, shape: tuple[int, ...], *, dtype: torch.dtype, device) -> torch.Tensor:
        """Zeroed memory for the [L + G, ...] storage of one weight."""

    def bind(self, storages: Sequence[torch.Tensor]) -> None:
        """Told, once, all storages [L + G, ...] of the layer, biases included."""

    def set_placement(self, placement: Placement) -> None:
        """The owners change, and with them what the replica slots hold."""

    def plan(self, expert_idx_TK: torch.Tensor, token_id_T: torch.Tensor) -> Any:
        """Decide for one micro-batch: an object whose `slot_TK` [T, K] int64 is the physical slot of each copy of this
        rank, ep_rank * (L + G) + index, -1 = dropped. Passed to the calls below; deterministic, as a recomputed pass asks
        again."""

    def send_weights(self, plan: Any) -> None:
        """Start to fill the replica slots with the current weights of their owners."""

    def restore_weights(self, plan: Any) -> None:
        """The same before a backward pass, where another plan has filled the slots since."""

    def wait_weights(self) -> None:
        """Whatever is launched from now on reads filled slots."""

    def return_grads(self, plan: Any, grads: Sequence[torch.Tensor]) -> None:
        """Start to add, in place, what the replicas hold of grads [L + G, ...] to the owners' parts, in ascending order of
        ranks; those, [:L], become the gradients of the parameters. Once in a backward pass, for all storages together,
        before the gradients of the dispatch return: the two may overlap."""

    def wait_grads(self) -> None:
        """Whatever is launched from now on reads whole gradients."""


def build_replication(config: RunConfig, ep_group) -> Replication | None:
    """The mechanism that online.replicate asks for; None = no replica slots.

    "exact" is decided on the device where the dispatcher is the direct one and GPUs reach each other's memory, otherwise,
    and where links are slowed down, by collectives. That is collective over ep_group on the first call.
    """
    online = config.online
    if online.replicate == "never":
        return None
    if online.replicate == "history":
        return HistoryReplication(ep_group, online.replica_slots)
    is_near = config.layer.dispatcher in ("direct", "auto") and not config.cluster.slow_links_gbytes_per_s
    if is_near and group_size(ep_group) > 1:
        if why_unavailable(ep_group, over_nvlink=config.layer.dispatcher == "auto") is None:
            return SymmetricReplication(ep_group, online.replica_slots)
    return ExactReplication(ep_group, online.replica_slots, copy_cost(config))


def copy_cost(config: RunConfig) -> int:
    """Token copies that a rank computes while the weights of one expert travel to it and their gradients back.

    Two journeys of n numbers against three passes of 2 n operations for each copy: the size n of an expert cancels out.
    """
    cluster, element = config.cluster, 4 if config.workload.dtype == "float32" else 2
    gbytes = cluster.inter_node_gbytes_per_s if cluster.num_nodes > 1 else cluster.intra_node_gbytes_per_s
    return round(2 * element / (gbytes * 1e9) / (6 / (cluster.tflops * 1e12)))


# ---------------------------------------------------------------------------------------------------- in a pass


class HeldExperts:
    """The experts of a layer, replicas included, as one forward pass of a micro-batch uses them: what dispatchers call.

    Made before the dispatch, so that the weights travel while tokens do.
    """

    def __init__(self, experts, replication: Replication, plan: Any):
        self.impl = experts.impl
        self._experts, self._replication, self._plan = experts, replication, plan
        replication.send_weights(plan)
        params = [param for param in experts.weights() if param is not None]
        self._owned, self._weights = _Owned.apply(replication, *params), None

    def __call__(self, rows_RD: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
        """As Experts.forward, with counts of L + G slots."""
        if self._weights is None:  # made behind the dispatch, so that in backward gradients leave before it
            taken = iter(_Storages.apply(self._replication, self._plan, self._experts.storages, *self._owned))
            self._weights = tuple(None if param is None else next(taken) for param in self._experts.weights())
        self._replication.wait_weights()
        out_RD = self._experts.compute(rows_RD, count_L, self._weights)
        return _OnBackward.apply(out_RD, self._plan.slot_TK, self._replication.wait_weights)

    def finish(self, y_TD: torch.Tensor) -> torch.Tensor:
        """To be called on the layer's output: its backward pass begins with the weights that its forward pass used."""
        return _OnBackward.apply(y_TD, self._plan.slot_TK, partial(self._replication.restore_weights, self._plan))


class _Owned(torch.autograd.Function):
    """The identity on the parameters; its backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx, replication, *params):
        ctx.replication = replication
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx, *grads):
        ctx.replication.wait_grads()
        return None, *grads


class _Storages(torch.autograd.Function):
    """The whole storages as functions of the parameters, which are their owned parts.

    Each pass sees the memory through tensors of its own: filling replica slots for another micro-batch must not count as
    a change of what this one saved, since its backward pass restores them.
    """

    @staticmethod
    def forward(ctx, replication, plan, storages, *params):
        ctx.replication, ctx.plan, ctx.num_owned = replication, plan, params[0].shape[0]
        return tuple(storage.data for storage in storages)

    @staticmethod
    def backward(ctx, *grads):
        # nobody else sees these gradients: they are summed here, over all uses in the pass
        grads = [grad.contiguous() for grad in grads]
        ctx.replication.return_grads(ctx.plan, grads)
        return None, None, None, *(grad[: ctx.num_owned] for grad in grads)


class _OnBackward(torch.autograd.Function):
    """The identity; its backward pass begins with `action`."""

    @staticmethod
    def forward(ctx, rows, marker, action):
        ctx.action = action
        ctx.save_for_backward(marker)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018 - asking for them makes a recomputed block run again, before the action
        ctx.action()
        return grad, None, None


# ---------------------------------------------------------------------------------------------------- the two modes


@dataclass(frozen=True)
class Plan:
    """What the replica slots hold, whose weights travel for it, and slot_TK: see Replication.plan."""

    replicas: Replicas
    transfers: Transfers
    slot_TK: torch.Tensor


class CollectiveReplication:
    """What both modes share: memory from torch, the placement, plans from `Replicas`. num_bytes: sent by this rank for
    weights and gradients since somebody set it to 0."""

    def __init__(self, ep_group, num_replicas: int):
        self.ep_group, self.num_replicas = ep_group, num_replicas
        self.storages: tuple[torch.Tensor, ...] = ()
        self.placement: Placement | None = None
        self.num_bytes = 0
        self.swaps: Sequence[Swap] = ()  # what is still to be written into replica slots

    def allocate(self, shape, *, dtype, device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def bind(self, storages) -> None:
        self.storages = tuple(storages)

    def set_placement(self, placement: Placement) -> None:
        self.placement = placement

    def wait_weights(self) -> None:
        for swap in self.swaps:
            fill(swap)
        self.swaps = ()

    def wait_grads(self) -> None:
        """Nothing to wait for: return_grads is ordered with what follows on the stream."""

    @property
    def num_owned(self) -> int:
        return self.storages[0].shape[0] - self.num_replicas

    def _table(self, replicas: Replicas) -> torch.Tensor:
        """The table of ops.plan.slots_of for this rank, on the device."""
        if replicas.num_copies:
            table_EB = replicas.bucket_slots(self.placement, group_rank(self.ep_group))
        else:  # one column: slots_of need not hash
            table_EB = (self.placement.primary_slot_E + self.placement.rank_of_expert() * self.num_replicas)[:, None]
        return torch.from_numpy(table_EB).to(self.storages[0].device)

    def _transfers(self, replicas: Replicas, held: Sequence[int] = ()) -> Transfers:
        return Transfers.of(self.placement, replicas, group_rank(self.ep_group), held)


class HistoryReplication(CollectiveReplication):
    """Replicas that stay for whole optimizer steps.

    Decided elsewhere and set between iterations. `send_all` starts to fill the slots of all layers before the first pass
    after a step, and the first layer that needs them waits; gradients of replicas gather in `grads`, float32 [G, ...] for
    each storage, until `return_all`; on_pass is told when those of one more backward pass are in them. adds_always: also
    where there are no copies, so that a pass does the same whatever is decided.
    """

    adds_always = False
    on_pass: Callable[[HistoryReplication], None] | None = None
    _table_EB: torch.Tensor | None = None

    def bind(self, storages) -> None:
        super().bind(storages)
        self.grads = [
            torch.zeros(self.num_replicas, *t.shape[1:], dtype=torch.float32, device=t.device) for t in self.storages
        ]

    @property
    def has_copies(self) -> bool:
        """Whether some expert has a copy on some rank, so that gradients return."""
        return any(self.transfers.num_sent_W)

    def set_placement(self, placement: Placement) -> None:
        super().set_placement(placement)
        self.set_replicas(Replicas.none(placement, self.num_replicas))

    def set_replicas(self, replicas: Replicas) -> None:
        """Route to `replicas` from now on; their weights must be sent before the next pass.

        Raises ValueError when they do not belong to the layer's placement and number of replica slots.
        """
        replicas.check(self.placement)
        if replicas.num_replica_slots != self.num_replicas:
            raise ValueError(
                f"replicas: made for {replicas.num_replica_slots} replica slots a rank, the layer has {self.num_replicas}"
            )
        self.replicas, self.transfers = replicas, self._transfers(replicas)
        table_EB = torch.from_numpy(replicas.bucket_slots(self.placement, group_rank(self.ep_group)))
        if self._table_EB is None:
            self._table_EB = torch.empty_like(table_EB, device=self.storages[0].device)
        self._table_EB.copy_(table_EB)  # in place: a captured graph reads it there

    def plan(self, expert_idx_TK, token_id_T) -> Plan:
        return Plan(self.replicas, self.transfers, slots_of(expert_idx_TK, self._table_EB, token_id_T))

    def send_weights(self, plan) -> None:
        """They are there or on their way, since `send_all`."""

    restore_weights = send_weights

    def return_grads(self, plan, grads) -> None:
        if self.adds_always or any(plan.transfers.num_sent_W):
            for total, grad in zip(self.grads, grads, strict=True):
                total.add_(grad[self.num_owned :])
        if self.on_pass is not None:
            self.on_pass(self)


class ExactReplication(CollectiveReplication):
    """Replicas decided for each micro-batch from its own counts, by the same solver on every rank.

    A pass gathers counts (one all-gather, one host synchronisation) and sends weights, its backward pass returns
    gradients, all collective over ep_group. Where another pass has filled the slots since, the backward pass first fills
    them again, those that differ. copy_cost: see solvers.solve_exact_step.
    """

    def __init__(self, ep_group, num_replicas: int, copy_cost: int = 0):
        super().__init__(ep_group, num_replicas)
        self.copy_cost = copy_cost
        self._held: tuple[int, ...] = ()  # what stands in the replica slots of all ranks; nothing before the first pass

    def plan(self, expert_idx_TK, token_id_T) -> Plan:
        count_E = count_slots(expert_idx_TK, self.placement.num_experts)
        count_SE = gather_all(count_E.unsqueeze(0), self.ep_group).cpu().numpy()
        replicas = solve_exact_step(count_SE, self.placement, self.num_replicas, self.copy_cost)
        slot_TK = slots_of(expert_idx_TK, self._table(replicas), token_id_T)
        return Plan(replicas, self._transfers(replicas), slot_TK)

    def send_weights(self, plan) -> None:
        self._fill(plan.replicas, plan.transfers)

    def restore_weights(self, plan) -> None:
        if self._held != plan.replicas.expert_of_replica:
            self._fill(plan.replicas, self._transfers(plan.replicas, self._held))

    def _fill(self, replicas: Replicas, transfers: Transfers) -> None:
        self.wait_weights()  # of a pass that has not used them: what is held below is in the slots or on its way
        self.swaps = start_weights([(self.storages, self.num_owned, transfers)], self.ep_group)
        self.num_bytes += sum(swap.num_bytes for swap in self.swaps)
        self._held = replicas.expert_of_replica

    def return_grads(self, plan, grads) -> None:
        owned, replicas = ([part(grad) for grad in grads] for part in (self._owned, self._replicas))
        self.num_bytes += return_grads([(owned, replicas, plan.transfers)], self.ep_group)

    def _owned(self, tensor):
        return tensor[: self.num_owned]

    def _replicas(self, tensor):
        return tensor[self.num_owned :]


def send_all(replications: Sequence[HistoryReplication], ep_group) -> int:
    """Start to fill the replica slots of all layers with the weights of now; a layer's first pass waits for it. Collective
    over ep_group, see `start_weights`; returns the bytes that this rank sent."""
    swaps = start_weights([(each.storages, each.num_owned, each.transfers) for each in replications], ep_group)
    for each in replications:
        each.swaps = swaps
    return sum(swap.num_bytes for swap in swaps)


class EarlyReturn:
    """Takes gradients of replicas to the owners while the backward pass goes on: those of a layer when all micro-batches
    of the step have been through it.

    They travel over a communicator of their own, so that they neither wait for exchanges of tokens nor hold them up. What
    would need more memory than returning all of them at the end stays for `return_all`, as does the sum: not a bit differs.

    Args:
        replications: of the layers, in the same order on every rank.
        owned_grads: as `return_all` gets them.
        side_group: the ranks of the expert group, in a ProcessGroup that nothing else uses.
        num_passes: backward passes of a step through each layer.
    """

    def __init__(
        self,
        replications: Sequence[HistoryReplication],
        owned_grads: Sequence[Sequence[torch.Tensor]],
        side_group,
        num_passes: int,
    ):
        self._owned = {id(each): owned for each, owned in zip(replications, owned_grads, strict=True)}
        self._group, self._num_passes = side_group, num_passes
        self._limit = max(2 * len(replications), group_size(side_group))  # config.replica_bytes
        self.reset()
        for each in replications:
            each.on_pass = self._count

    def reset(self) -> None:
        """Forget the step: no pass has been made."""
        self._passes: dict[int, int] = {}
        self._swaps: dict[int, Swap] = {}
        self._sent_W: np.ndarray | int = 0  # experts that each rank's owners get back

    def _count(self, replication: HistoryReplication) -> None:
        key, coming_W = id(replication), np.array(replication.transfers.num_sent_W)
        self._passes[key] = self._passes.get(key, 0) + 1
        if self._passes[key] < self._num_passes or not coming_W.any():
            return
        if (self._sent_W + coming_W).max() <= self._limit * replication.num_replicas:  # the same on every rank
            self._sent_W = self._sent_W + coming_W
            entry = (self._owned[key], replication.grads, replication.transfers)
            self._swaps[key] = start_return([entry], self._group)

    def finish(self) -> tuple[set[int], int]:
        """Add what was returned; (ids of those replications, bytes that this rank sent)."""
        done, num_bytes = set(self._swaps), sum(swap.num_bytes for swap in self._swaps.values())
        for swap in self._swaps.values():
            finish_return(swap)
        self.reset()
        return done, num_bytes


def return_all(
    replications: Sequence[HistoryReplication],
    owned_grads: Sequence[Sequence[torch.Tensor]],
    ep_group,
    early: EarlyReturn | None = None,
) -> int:
    """Add the gathered gradients of all layers' replicas to the owners' and forget them.

    owned_grads: for each layer the float32 gradients [L, ...] of its parameters, in the order of its storages. early: what
    has returned some of them already. Collective over ep_group, see `return_grads`; returns the bytes that this rank sent.
    """
    done, num_bytes = early.finish() if early is not None else (set(), 0)
    pairs = [pair for pair in zip(owned_grads, replications, strict=True) if id(pair[1]) not in done]
    num_bytes += return_grads([(owned, each.grads, each.transfers) for owned, each in pairs], ep_group)
    for each in replications:
        for grad in each.grads:
            grad.zero_()
    return num_bytes
