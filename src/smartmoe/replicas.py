"""Replicas of experts: their weights on the way to replica slots, their gradients on the way back to the owners.

Layer 4. A rank has L owned slots of a layer and behind them, in the same storage, G replica slots, so that one grouped
product runs over all L + G. A `Replication` says what the replica slots of one layer hold and carries weights and
gradients; the two here do it by collectives, with a plan that the host knows. Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from smartmoe.config import RunConfig
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.dispatch.symmetric_replicas import StepPlan, SymmetricReplication
from smartmoe.ops.all_to_all import gather_all, group_rank, group_size
from smartmoe.ops.grad_sink import GradSink, sink_of
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
    restore_weights, wait_weights before each use, return_grads, wait_grads. Passes of several micro-batches interleave.
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


# ---------------------------------------------------------------------------------------------------- in a pass


class HeldExperts:
    """The experts of a layer, replicas included, as one forward pass of a micro-batch uses them: what dispatchers call.

    Made before the dispatch, so that weights can travel while tokens do.
    """

    def __init__(self, experts, replication: Replication, plan: Any):
        self.impl = experts.impl
        self._experts, self._replication, self._plan = experts, replication, plan
        if not replication.follows_tokens:
            replication.send_weights(plan)
        params = [param for param in experts.weights() if param is not None]
        self._gradients = _Gradients(replication, plan, params)
        self._owned, self._weights = _Owned.apply(self._gradients, *params), None

    def __call__(self, rows_RD: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
        """As Experts.forward, with counts of L + G slots."""
        if self._weights is None:  # made behind the dispatch, so that in backward gradients leave before it
            if self._replication.follows_tokens:
                self._replication.send_weights(self._plan)
            whole = _Storages.apply(self._gradients, self._experts.storages, *self._owned)
            for weight, sink in zip(whole, self._gradients.sinks, strict=True):
                weight.grad_sink = sink
            taken = iter(whole)
            self._weights = tuple(None if param is None else next(taken) for param in self._experts.weights())
        late = self._replication.late_slots() if rows_RD.is_cuda and self.impl == "grouped" else None
        if late is None or torch.compiler.is_compiling():
            self._replication.wait_weights()
        else:
            self._weights[0].late_slots = late
        self._gradients.num_uses += 1
        out_RD = self._experts.compute(rows_RD, count_L, self._weights)
        return _OnBackward.apply(out_RD, self._plan.slot_TK, self._replication.wait_weights)

    def finish(self, y_TD: torch.Tensor) -> torch.Tensor:
        """To be called on the layer's output: its backward pass begins with the weights that its forward pass used."""
        return _OnBackward.apply(y_TD, self._plan.slot_TK, partial(self._replication.restore_weights, self._plan))


class _Gradients:
    """The gradients of all storages in one pass: sinks that operations may fill, and what autograd brings."""

    def __init__(self, replication: Replication, plan: Any, params: Sequence[torch.Tensor]):
        self._replication, self._plan, self.num_uses = replication, plan, 0
        self.num_owned = params[0].shape[0]
        traits = {"is_urgent": replication.is_early, "held_G": plan.held_G}
        self.sinks = [_Sink(self, sink_of(param), **traits) for param in params]

    def return_early(self) -> None:
        """Return what operations have given, where that pays: when they have given the first storage's, the last to come.
        So there is one journey a pass, beside the product that follows."""
        given = {number: sink for number, sink in enumerate(self.sinks) if sink.is_given and not sink.is_returned}
        if self._replication.is_early and 0 in given:
            pairs = {number: sink.pair(self.num_owned) for number, sink in given.items()}
            self._replication.return_grads(self._plan, pairs)
            for sink in given.values():
                sink.is_returned = True

    def complete(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return what has not been; grads are autograd's. Gives the gradients of the parameters that are in no sink."""
        late, owned = {}, []
        for number, (sink, grad) in enumerate(zip(self.sinks, grads, strict=True)):
            pair = sink.settle(grad, self.num_owned)
            if pair is not None and not sink.is_returned:
                late[number] = pair
            owned.append(None if pair is None or sink.total is not None else pair[0])
        if late:
            self._replication.return_grads(self._plan, late)
        return owned

    def wait(self) -> None:
        """What is launched from now on reads whole gradients; those of replicas are no longer needed."""
        self._replication.wait_grads()
        for sink in self.sinks:
            sink.forget()


class _Sink:
    """Takes the gradient of one storage from operations (ops.grad_sink): that of owned slots goes into the parameter's own
    sink, where it has one, and that of replicas leaves as soon as the last use of the storage has given it."""

    def __init__(
        self,
        gradients: _Gradients,
        owners_sink: GradSink | None,
        *,
        is_urgent: bool,
        held_G: torch.Tensor | None,
    ):
        self._gradients, self._owners_sink = weakref.proxy(gradients), owners_sink
        self.is_urgent, self.held_G = is_urgent, held_G
        self.forget()

    def forget(self) -> None:
        self.total, self._kept, self._num_given, self.is_returned = None, None, 0, False

    @property
    def is_given(self) -> bool:
        """Whether all uses of the storage have given their gradients."""
        return 0 < self._num_given == self._gradients.num_uses

    def take(self) -> tuple[torch.Tensor | None, bool]:
        if self._owners_sink is None:
            return None, False
        self.total, is_first = self._owners_sink.take()
        return self.total, is_first

    def keep(self, rest: torch.Tensor) -> None:
        self._kept = rest if self._kept is None else self._kept.add_(rest)
        self._num_given += 1
        if self.is_given:
            self._gradients.return_early()

    def pair(self, num_owned: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As Replication.return_grads takes it; None = there is no gradient."""
        if self._kept is None:
            return None
        return (self._kept[:num_owned], self._kept[num_owned:]) if self.total is None else (self.total, self._kept)

    def settle(self, grad: torch.Tensor | None, num_owned: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same, when autograd has brought `grad` [L + G, ...], or nothing."""
        if grad is not None:
            self._kept = grad.contiguous()  # nobody else sees it: it is summed here, over all uses in the pass
        return self.pair(num_owned)


class _Owned(torch.autograd.Function):
    """The identity on the parameters; its backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx, gradients, *params):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx, *grads):
        ctx.gradients.wait()
        return None, *grads


class _Storages(torch.autograd.Function):
    """The whole storages as functions of the parameters, which are their owned parts.

    Each pass sees the memory through tensors of its own: filling replica slots for another micro-batch must not count as
    a change of what this one saved, since its backward pass restores them.
    """

    @staticmethod
    def forward(ctx, gradients, storages, *params):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(storage.data for storage in storages)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.gradients.complete(grads)


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
