"""Replicas of experts: their weights on the way to replica slots, their gradients on the way back to the owners.

Layer 4. A rank has L owned slots of a layer and behind them, in the same storage, G replica slots, so that one grouped
product runs over all L + G. A `Replication` says what the replica slots of one layer hold and carries weights and
gradients; the two here do it by collectives, with a plan that the host knows. Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from smartmoe.config import RunConfig
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.dispatch.symmetric_replicas import StepPlan, SymmetricReplication
from smartmoe.ops.all_to_all import gather_all, group_rank, group_size
from smartmoe.ops.late_slots import LateSlots
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
    restore_weights, wait_weights before each use, return_grads, wait_grads or leave_grads. Passes of several micro-batches
    interleave.
    is_early: whether gradients of products shall be returned when the last of them is known, beside the rest of the backward
    pass. follows_tokens: whether send_weights comes behind the dispatch, so that weights do not share the links with tokens,
    and not before it.
    """

    is_early: bool
    follows_tokens: bool

    def allocate(self, shape: tuple[int, ...], *, dtype: torch.dtype, device) -> torch.Tensor:
        """Zeroed memory for the [L + G, ...] storage of one weight."""

    def bind(self, storages: Sequence[torch.Tensor]) -> None:
        """Told, once, all storages [L + G, ...] of the layer, biases included."""

    def set_placement(self, placement: Placement) -> None:
        """The owners change, and with them what the replica slots hold."""

    def plan(self, expert_idx_TK: torch.Tensor, token_id_T: torch.Tensor) -> Any:
        """Decide for one micro-batch: an object whose `slot_TK` [T, K] int64 is the physical slot of each copy of this
        rank, ep_rank * (L + G) + index, -1 = dropped, and whose `held_G` [G] int32 is not negative for the replica slots of
        this rank that are in use, or None. Passed to the calls below; deterministic, as a recomputed pass asks again."""

    def send_weights(self, plan: Any) -> None:
        """Start to fill the replica slots with the current weights of their owners."""

    def restore_weights(self, plan: Any) -> None:
        """The same before a backward pass, where another plan has filled the slots since."""

    def wait_weights(self) -> None:
        """Whatever is launched from now on reads filled slots."""

    def late_slots(self) -> LateSlots | None:
        """How to use the owned slots of the first storage before replica slots are filled, instead of `wait_weights`; None =
        there is no other way."""

    def return_grads(self, plan: Any, grads: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start to add, in place, the gradients of replicas to those of their owners, in ascending order of ranks.

        grads: number of a storage -> (gradient of the owned slots [L, ...], of the replica slots [G, ...]); the former may
        be a sum in float32. In a backward pass each storage comes once: all of them in one call or, where `is_early`, in
        several, in the same order on every rank. What slots without an expert hold is not read."""

    def wait_grads(self) -> None:
        """Whatever is launched from now on reads whole gradients."""

    def leave_grads(self, read: Any) -> None:
        """In a backward pass, instead of `wait_grads`: whatever is launched behind the whole pass reads whole gradients. read:
        what the journey still reads, kept until it has ended. Asked only where `is_early`."""


def build_replication(config: RunConfig, ep_group) -> Replication | None:
    """The mechanism that online.replicate asks for; None = no replica slots.

    Weights and gradients travel by kernels, and "exact" is decided on the device, where the dispatcher is the direct one and
    GPUs reach each other's memory; otherwise, and where links are slowed down, by collectives. That is collective over
    ep_group on the first call.
    """
    online = config.online
    if online.replicate == "never":
        return None
    has_history = online.replicate == "history"
    is_near = config.layer.dispatcher in ("direct", "auto") and not config.cluster.slow_links_gbytes_per_s
    if is_near and group_size(ep_group) > 1:
        if why_unavailable(ep_group, over_nvlink=config.layer.dispatcher == "auto") is None:
            return (SymmetricHistory if has_history else SymmetricReplication)(ep_group, online.replica_slots)
    if has_history:
        return CollectiveHistory(ep_group, online.replica_slots)
    return ExactReplication(ep_group, online.replica_slots, copy_cost(config))


def copy_cost(config: RunConfig) -> int:
    """Token copies that a rank computes while the weights of one expert travel to it and their gradients back.

    Two journeys of n numbers against three passes of 2 n operations for each copy: the size n of an expert cancels out.
    """
    cluster, element = config.cluster, 4 if config.workload.dtype == "float32" else 2
    gbytes = cluster.inter_node_gbytes_per_s if cluster.num_nodes > 1 else cluster.intra_node_gbytes_per_s
    return round(2 * element / (gbytes * 1e9) / (6 / (cluster.tflops * 1e12)))


@dataclass(frozen=True)
class Plan:
    """What the replica slots hold, whose weights travel for it, and slot_TK: see Replication.plan."""

    replicas: Replicas
    transfers: Transfers
    slot_TK: torch.Tensor
    held_G = None


class CollectiveReplication:
    """What both modes share: memory from torch, the placement, plans from `Replicas`. num_bytes: sent by this rank for
    weights and gradients since somebody set it to 0."""

    is_early = follows_tokens = False

    def __init__(self, ep_group, num_replicas: int):
        self.ep_group, self.num_replicas, self.ep_rank = ep_group, num_replicas, group_rank(ep_group)
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

    def late_slots(self) -> None:
        return None

    def wait_grads(self) -> None:
        """Nothing to wait for: return_grads is ordered with what follows on the stream."""

    def leave_grads(self, read: Any) -> None:
        """As wait_grads."""

    @property
    def num_owned(self) -> int:
        return self.storages[0].shape[0] - self.num_replicas

    @property
    def dtype(self) -> torch.dtype:
        return self.storages[0].dtype

    def _table(self, replicas: Replicas) -> torch.Tensor:
        """The table of ops.plan.slots_of for this rank, on the device."""
        if replicas.num_copies:
            table_EB = replicas.bucket_slots(self.placement, self.ep_rank)
        else:  # one column: slots_of need not hash
            table_EB = (self.placement.primary_slot_E + self.placement.rank_of_expert() * self.num_replicas)[:, None]
        return torch.from_numpy(table_EB).to(self.storages[0].device)

    def _transfers(self, replicas: Replicas, held: Sequence[int] = ()) -> Transfers:
        return Transfers.of(self.placement, replicas, self.ep_rank, held)


class HistoryReplication:
    """Replicas that stay for whole optimizer steps: decided elsewhere, set between iterations.

    What both forms share. `send_all` comes before the first pass after weights or replicas have changed, `return_all` before
    gradients are used.
    """

    _table_EB: torch.Tensor | None = None

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
        self.replicas, self.transfers = replicas, Transfers.of(self.placement, replicas, self.ep_rank)
        self._table_EB = self._renew(self._table_EB, replicas.bucket_slots(self.placement, self.ep_rank))

    def _renew(self, old: torch.Tensor | None, values: np.ndarray) -> torch.Tensor:
        """`values` on the device, in place, where a captured graph reads them, and without waiting for it."""
        new = torch.from_numpy(values)
        if self.storages[0].is_cuda:
            new = new.pin_memory()
        if old is None:
            old = torch.empty_like(new, device=self.storages[0].device)
        return old.copy_(new, non_blocking=True)


class CollectiveHistory(HistoryReplication, CollectiveReplication):
    """By collectives, once a step in each direction. `send_all` starts to fill the slots of all layers, and the first layer
    that needs them waits; gradients of replicas gather in `grads`, float32 [G, ...] for each storage, until `return_all`, and
    travel in the dtype of the experts; on_pass is told when those of one more backward pass are in them. adds_always: also
    where there are no copies, so that a pass does the same whatever is decided.
    """

    adds_always = False
    on_pass: Callable[[CollectiveHistory], None] | None = None

    def bind(self, storages) -> None:
        super().bind(storages)
        self.grads = [
            torch.zeros(self.num_replicas, *t.shape[1:], dtype=torch.float32, device=t.device) for t in self.storages
        ]

    def plan(self, expert_idx_TK, token_id_T) -> Plan:
        return Plan(self.replicas, self.transfers, slots_of(expert_idx_TK, self._table_EB, token_id_T))

    def send_weights(self, plan) -> None:
        """They are there or on their way, since `send_all`."""

    restore_weights = send_weights

    def return_grads(self, plan, grads) -> None:
        if self.adds_always or any(plan.transfers.num_sent_W):
            for number, (_, replicas) in grads.items():
                self.grads[number].add_(replicas)
        if self.on_pass is not None:
            self.on_pass(self)


class SymmetricHistory(HistoryReplication, SymmetricReplication):
    """As exact replication between GPUs that reach each other's memory, with a plan of the host. Weights travel in the first
    pass after `send_all`, gradients in every backward pass: nothing gathers, and `return_all` finds nothing.

    Captured in a CUDA graph, the first pass after `send_all` sends weights at every replay, and no other does."""

    _is_old, _replica_N = True, None

    def __init__(self, ep_group, num_replicas: int):
        super().__init__(ep_group, num_replicas, copy_cost=None)

    def set_replicas(self, replicas: Replicas) -> None:
        super().set_replicas(replicas)
        self._replica_N = self._renew(self._replica_N, np.array(replicas.expert_of_replica, np.int32))

    def plan(self, expert_idx_TK, token_id_T) -> StepPlan:
        held_G = self._replica_N.view(self.num_ranks, self.num_replicas)[self.ep_rank]
        return StepPlan(slots_of(expert_idx_TK, self._table_EB, token_id_T), self._replica_N, held_G)

    def forget_weights(self) -> None:
        """Take what the slots hold for old: the next pass sends weights."""
        self._is_old = True

    def send_weights(self, plan) -> None:
        if self._is_old:
            super().send_weights(plan)
        self._is_old = False

    def restore_weights(self, plan) -> None:
        """They stay."""


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
        owned, replicas = zip(*grads.values(), strict=True)
        self.num_bytes += return_grads([(owned, replicas, plan.transfers)], self.ep_group)


def send_all(replications: Sequence[HistoryReplication], ep_group) -> int:
    """Have the replica slots of all layers filled with the weights of now; a layer's first pass waits for it. Collective
    over ep_group where layers send by collectives, see `start_weights`; returns the bytes that this rank's owners send."""
    gathering = [each for each in replications if isinstance(each, CollectiveHistory)]
    swaps = start_weights([(each.storages, each.num_owned, each.transfers) for each in gathering], ep_group)
    for each in gathering:
        each.swaps = swaps
    num_bytes = sum(swap.num_bytes for swap in swaps)
    for each in replications:
        if isinstance(each, SymmetricHistory):
            each.forget_weights()
            num_bytes += each.transfers.num_sent_W[each.ep_rank] * sum(storage[0].nbytes for storage in each.storages)
    return num_bytes


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

    def _count(self, replication: CollectiveHistory) -> None:
        key, coming_W = id(replication), np.array(replication.transfers.num_sent_W)
        self._passes[key] = self._passes.get(key, 0) + 1
        if self._passes[key] < self._num_passes or not coming_W.any():
            return
        if (self._sent_W + coming_W).max() <= self._limit * replication.num_replicas:  # the same on every rank
            self._sent_W = self._sent_W + coming_W
            entry = (self._owned[key], replication.grads, replication.transfers)
            self._swaps[key] = start_return([entry], self._group, replication.dtype)

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
    """Add the gathered gradients of all layers' replicas, where they gather, to the owners' and forget them.

    owned_grads: for each layer the float32 gradients [L, ...] of its parameters, in the order of its storages. early: what
    has returned some of them already. Collective over ep_group, see `return_grads`; returns the bytes that this rank sent.
    """
    done, num_bytes = early.finish() if early is not None else (set(), 0)
    gathered = [pair for pair in zip(owned_grads, replications, strict=True) if isinstance(pair[1], CollectiveHistory)]
    pairs = [pair for pair in gathered if id(pair[1]) not in done]
    if pairs:
        entries = [(owned, each.grads, each.transfers) for owned, each in pairs]
        num_bytes += return_grads(entries, ep_group, pairs[0][1].dtype)
    for _, each in gathered:
        for grad in each.grads:
            grad.zero_()
    return num_bytes
