"""Online expert placement: watch the load, decide, move experts between iterations.

Layer 4. Axes: L MoE layers of this pipeline stage, M micro-batches, E experts, R ranks of the stage, W of the expert group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import controller, policy
from smartmoe.config import OnlineConfig
from smartmoe.controller import Change, Sizes, build_controller
from smartmoe.migrate import STAGING_BYTES, Staging, migrate
from smartmoe.observe import LoadRecorder, StageView
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.placement import Placement, Replicas, max_over_mean, num_moves, rank_load
from smartmoe.replicas import SymmetricHistory
from smartmoe.solvers import solve_greedy, solve_least_move
from smartmoe.timing import LayerTimer

SOLVERS = {"greedy": solve_greedy, "least_move": solve_least_move}
# Device memory that must be left when migrations take their staging buffer.
SPARE_BYTES = 256 << 20


def is_due(online: OnlineConfig, iteration: int) -> bool:
    """Whether `after_step` of `iteration` returns events; the same on every rank of a run."""
    if online.policy == "static":
        return False
    return policy.is_due(iteration, online.interval) if online.policy == "auto" else iteration % online.interval == 0


def lack_of_room(least_free_bytes: float) -> str:
    """Why no expert can move when the fullest GPU has this much memory left; "" when it can."""
    needed = STAGING_BYTES + SPARE_BYTES
    if least_free_bytes >= needed:
        return ""
    return f"its buffer needs {needed / 1e6:.0f} MB, {least_free_bytes / 1e6:.0f} MB are free on the fullest GPU"


def guessed_sizes(layer, online: OnlineConfig, state: Sequence[torch.Tensor], num_micro_batches: int = 1) -> Sizes:
    """What moving and copying experts of `layer` costs, for the links that a device usually has.

    state: all tensors [N, ...] of the layer's experts, weights first where they are no masters themselves."""
    weights = list(layer.experts.parameters()) if hasattr(layer, "experts") else list(state)
    numel, element = sum(weight[0].numel() for weight in weights), weights[0].element_size()
    gbytes_per_s = 300.0 if weights[0].device.type == "cuda" else 1.0
    return Sizes(
        state_bytes=sum(tensor[0].nbytes for tensor in state),
        replica_bytes=bytes_of_replica(online, numel, element, num_micro_batches, gathers_gradients(layer)),
        gbytes_per_s=gbytes_per_s,
        node_gbytes_per_s=gbytes_per_s,
    )


def gathers_gradients(layer) -> bool:
    """Whether gradients of copies that stay for a step return once in it, and not in every backward pass."""
    return not isinstance(getattr(layer, "replication", None), SymmetricHistory)


def bytes_of_replica(
    online: OnlineConfig, numel: int, element: int, num_micro_batches: int, is_gathered: bool = True
) -> int:
    """Sent and returned in an iteration for one copy of an expert of `numel` weights of `element` bytes. is_gathered: in
    "history" mode gradients return once, not for each micro-batch."""
    if online.replicate == "history":
        return (1 + (1 if is_gathered else num_micro_batches)) * numel * element
    # for each micro-batch: weights for the forward pass, again for the backward pass, gradients back
    return 3 * numel * element * num_micro_batches


def free_device_bytes(device: torch.device, set_aside: int = 0) -> int | None:
    """Memory of the device that tensors can take; None = as much as they want, on a CPU. set_aside: bytes of what torch's
    allocator holds without using them that only graphs can take."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + max(cached - set_aside, 0)


class OnlinePlacement:
    """Balances the experts of this pipeline stage's MoE layers while training goes on.

    With greedy and least_move the load is summed over the stage after every iteration; every `online.interval` iterations
    the solver is asked with the load of the iteration just done. Nothing else is remembered: a resumed run decides as
    an uninterrupted one. With auto see `_Auto`. Decisions rest on the same integers on every rank, so all reach the same.

    Args:
        layers: the MoELayers of this rank, the same on all ranks of the stage; a LoadRecorder joins their observers.
        online: see OnlineConfig.
        ep_group, stage_group: ProcessGroups (ep inside stage), or None for this process alone.
        state_of: all tensors [N, ...] that belong to the experts of a layer, for `migrate`.
        sizes: of each layer, bytes and speeds for auto's first decisions; None = as the layers tell them, see `guessed_sizes`.
        node_of_rank_W: for auto, the node of each rank of ep_group; None = one.
        timer: for auto, what times the layers here, as LayerTimer's `turn` and `forget`; None = a LayerTimer on them.
        free_bytes: the device memory that is free; None = as CUDA says, and unlimited on a CPU.
        num_micro_batches: of an iteration, where sizes are not given.
    """

    def __init__(
        self,
        layers: Sequence,
        online: OnlineConfig,
        *,
        ep_group,
        stage_group,
        state_of: Callable[..., list[torch.Tensor]],
        sizes: Sequence[Sizes] | None = None,
        node_of_rank_W: tuple[int, ...] | None = None,
        timer: LayerTimer | None = None,
        free_bytes: Callable[[], int | None] | None = None,
        num_micro_batches: int = 1,
    ):
        self._layers, self._online, self._state_of = list(layers), online, state_of
        self._ep_group, self._stage_group = ep_group, stage_group
        num_experts = self._layers[0].placement.num_experts if self._layers else 0
        self._recorder = LoadRecorder([layer.layer_idx for layer in self._layers], num_experts)
        self._device = state_of(self._layers[0])[0].device if self._layers else torch.device("cpu")
        self._staging = Staging()
        self._free = free_bytes or (lambda: free_device_bytes(self._device))
        self._max_over_mean = 1.0
        for layer in self._layers:
            layer.observers.append(self._recorder)
        self._auto = None
        if online.policy == "auto" and self._layers:
            sizes = sizes or [guessed_sizes(layer, online, state_of(layer), num_micro_batches) for layer in self._layers]
            self._auto = _Auto(self, sizes, node_of_rank_W, timer)

    def after_step(self, iteration: int) -> list[dict]:
        """Take in what the layers saw in `iteration` (from 1) and, when it is due, place experts anew.

        Returns one event per layer when a decision was due, otherwise none, with the keys of events.jsonl: iteration,
        layer, kind ("keep", "migrate", "replicate", "both", "rollback"), num_moved (experts sent between ranks), num_copies
        (replicas in force afterwards), cost_ms (of the migration here, shared evenly by the layers that moved),
        max_over_mean_before and _after (of the load seen), reason; with auto also predicted_ms_before and _after.
        Collective over stage_group (and ep_group when experts move). Waits for the device; with auto, where nothing
        moves, only for the iterations before, and for passes that were replayed from a CUDA graph.
        """
        if not self._layers:
            return []
        self._recorder.turn()
        if self._auto is not None:
            return self._auto.after_step(iteration)
        load_LE = self._sum_over_stage(self._recorder.counts().sum(axis=1))
        balance = [max_over_mean(load_E, layer.placement) for load_E, layer in zip(load_LE, self._layers, strict=True)]
        self._max_over_mean = float(np.mean(balance))
        return self._place(iteration, load_LE) if is_due(self._online, iteration) else []

    def prepare(self, iteration: int) -> None:
        """Think about what `after_step` of this iteration will do, as far as that is known: to be called while the device
        works on the iteration, so that it does not wait for the host afterwards. May be left out. The same on every rank."""
        if self._auto is not None:
            self._auto.prepare(iteration)

    def load_max_over_mean(self) -> float:
        """Fullest rank's load over the mean rank's, mean of the layers, in the last iteration (with auto the one before,
        as the reduction is still under way); not collective."""
        return self._max_over_mean

    def gather_counts(self) -> np.ndarray:
        """Counts of the last iteration, [R, L, M, E] int32, ranks by stage_rank. Collective over stage_group."""
        counts = torch.from_numpy(self._recorder.counts().astype(np.int32)).to(self._device)
        num_ranks = group_size(self._stage_group)
        if num_ranks == 1 or not counts.numel():
            return counts.cpu().numpy()[None].repeat(num_ranks, axis=0)
        gathered = counts.new_empty(num_ranks * len(counts), *counts.shape[1:])
        dist.all_gather_into_tensor(gathered, counts, group=self._stage_group)
        return gathered.view(num_ranks, *counts.shape).cpu().numpy()

    def saved_loads(self) -> dict[int, list[float]]:
        """What a checkpoint keeps for auto: layer_idx -> expected token copies per expert; nothing for other policies."""
        loads = self._auto.controller.saved() if self._auto else None
        return {} if loads is None else {layer.layer_idx: load for layer, load in zip(self._layers, loads, strict=True)}

    def restore_loads(self, iteration: int, loads: dict[int, list[float]]) -> None:
        """Go on after `iteration` from what `saved_loads` gave, under any plan; layers that it lacks learn anew."""
        if self._auto and all(layer.layer_idx in loads for layer in self._layers):
            self._auto.controller.restore(iteration, [loads[layer.layer_idx] for layer in self._layers])

    def _sum_over_stage(self, load_LE: np.ndarray) -> np.ndarray:
        if group_size(self._stage_group) == 1:
            return load_LE
        total = torch.from_numpy(load_LE).to(self._device)
        dist.all_reduce(total, group=self._stage_group)
        return total.cpu().numpy()

    def _place(self, iteration: int, load_LE: np.ndarray) -> list[dict]:
        events, moving = [], []
        for layer, load_E in zip(self._layers, load_LE, strict=True):
            old = layer.placement
            new, reason = self._decide(load_E, old)
            event = {
                "iteration": iteration,
                "layer": layer.layer_idx,
                "kind": "keep" if new == old else "migrate",
                "num_moved": num_moves(old, new),
                "num_copies": 0,
                "cost_ms": 0.0,
                "max_over_mean_before": max_over_mean(load_E, old),
                "max_over_mean_after": max_over_mean(load_E, new),
                "reason": reason,
            }
            events.append(event)
            if new != old:
                moving.append((layer, new, event))
        no_room = self._no_room() if moving else ""
        if no_room:
            for _, _, event in moving:
                event |= {"kind": "keep", "num_moved": 0, "max_over_mean_after": event["max_over_mean_before"]}
                event["reason"] = f"experts cannot move: {no_room}"
            moving = []
        if moving:
            cost_ms = self.move([(layer, new) for layer, new, _ in moving])
            for _, _, event in moving:
                event["cost_ms"] = round(cost_ms / len(moving), 3)
        return events

    def _no_room(self) -> str:
        """Why the staging buffer cannot be taken, "" when it can or is. Collective over stage_group at the first need."""
        free = None if self._staging.num_bytes else self._free()
        if free is None:
            return ""
        least = torch.tensor(free, device=self._device)
        if group_size(self._stage_group) > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._stage_group)
        return lack_of_room(float(least))

    def forget_passes(self) -> None:
        """Those since the last `after_step` will be repeated, or were an evaluation's: neither count nor time them."""
        self._recorder.turn()
        if self._auto is not None:
            self._auto.forget_times()

    def _decide(self, load_E: np.ndarray, current: Placement) -> tuple[Placement, str]:
        """The placement to have from now on, and why."""
        new, min_gain = SOLVERS[self._online.policy](load_E, current), self._online.min_gain or 0.0
        before, after = rank_load(load_E, current).max(), rank_load(load_E, new).max()
        if not after < before:
            return current, "the solver found nothing better"
        gain = 1 - after / before
        if not gain > min_gain:
            return current, f"fullest rank would fall by {gain:.1%}, min_gain is {min_gain:.1%}"
        return new, f"fullest rank {before:.0f} -> {after:.0f} token copies, {gain:.1%} less"

    def move(self, targets: list[tuple]) -> float:
        """Give each (layer, new placement) its placement, moving all layers' experts with their state together.

        Returns the milliseconds it took here, without what is done once (taking and registering the staging buffer).
        Collective over ep_group.
        """
        if any(num_moves(layer.placement, new) for layer, new in targets):
            self._staging.exchange(self._ep_group, self._device)
        self._wait_for_device()
        start = time.perf_counter()
        migrate(
            [(self._state_of(layer), layer.placement, new) for layer, new in targets], self._ep_group, self._staging
        )
        for layer, new in targets:
            layer.set_placement(new)
        self._wait_for_device()
        return (time.perf_counter() - start) * 1e3

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def watchers(self) -> list:
        """What follows the layers' passes here, as graphs.Watcher."""
        return [self._recorder, *([self._auto.timer] if self._auto is not None else [])]


@dataclass
class _Sent:
    """Iteration whose counts are on their way, with the times of the one before; the view that brings them, in memory of its
    own; experts of a timed migration."""

    iteration: int
    view: StageView
    num_moved: int


class _Auto:
    """Policy "auto": counts of an iteration are reduced over the stage while the next one runs, together with the times of the
    one before, and read after that: what is decided after iteration i knows the counts of i - 1 and the times of i - 2,
    always, on CPUs as well. So the host never asks for what a GPU still has to do, and the GPU does not stand idle while
    the host decides. When a decision is due the controller takes it, and here it is carried out."""

    def __init__(self, online: OnlinePlacement, sizes: Sequence[Sizes], node_of_rank_W, timer: LayerTimer | None):
        self._online, self._layers, self._config = online, online._layers, online._online
        self._device = online._device
        self.timer = timer or LayerTimer({layer.layer_idx: layer for layer in self._layers}, self._device)
        placements = [layer.placement for layer in self._layers]
        self.controller = build_controller(placements, self._config, sizes, node_of_rank_W)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._sent: _Sent | None = None
        self._untimed: tuple[int, np.ndarray] | None = None  # the last iteration read, and its counts
        self._move_ms, self._num_moved, self._has_room = 0.0, 0, False
        self._prepared: list[Change] | None = None

    def prepare(self, iteration: int) -> None:
        """Decide what `after_step` of this iteration will carry out: the iterations before it are all that it knows."""
        if self._prepared is None and is_due(self._config, iteration):
            self._prepared = self._choose(iteration, self._read())

    def after_step(self, iteration: int) -> list[dict]:
        changes, self._prepared = self._prepared, None
        if changes is None:
            no_room = self._read()
            changes = self._choose(iteration, no_room) if is_due(self._config, iteration) else None
        moves = any(change.placement != old.placement for change, old in zip(changes or (), self._layers, strict=False))
        # where no expert moves, routing tables are on their way before `_send` may wait for replayed passes
        events = self._carry_out(iteration, changes) if changes and not moves else []
        self._send(iteration)
        return self._carry_out(iteration, changes) if moves else events

    def forget_times(self) -> None:
        """The layers' times since the last iteration are those of passes that do not count."""
        self.timer.forget()

    def _send(self, iteration: int) -> None:
        group = self._online._stage_group
        num_ranks, ep_rank = self._layers[0].placement.num_ranks, group_rank(self._online._ep_group)
        sums_LE = self._online._recorder.sums(self._device)
        counts_LWE = sums_LE.new_zeros(len(sums_LE), num_ranks, sums_LE.shape[1])
        counts_LWE[:, ep_rank] = sums_LE
        times = self.timer.turn()  # of the iteration before
        # asked for where the answer is needed; maxima over the ranks, so of free memory the least counts
        asks = self._config.migrate and not self._has_room and is_due(self._config, iteration + 1)
        free = self._online._free() if asks else None
        values = [sum(times.get(layer.layer_idx, {}).values()) for layer in self._layers]
        values += [self._move_ms, -np.inf if free is None else -float(free)]
        self._sent = _Sent(iteration, StageView(counts_LWE, values, group, self._stream), self._num_moved)
        self._move_ms, self._num_moved = 0.0, 0

    def _read(self) -> str:
        """Give the controller what has arrived; returns why no expert can move now."""
        if self._sent is None:  # the first iteration here, with the experts where a checkpoint may have put them
            self.controller.follow(self._in_force())
            return ""
        counts_LWE, values = self._sent.view.read()
        *ms_L, move_ms, least_free = values.tolist()
        if self._untimed is not None and all(ms > 0 for ms in ms_L):
            self.controller.take_times(*self._untimed, ms_L)
        self._untimed = self._sent.iteration, counts_LWE
        self.controller.take_in(*self._untimed)
        self.controller.moved(move_ms, self._sent.num_moved)
        self._online._max_over_mean = self.controller.max_over_mean
        return "" if self._has_room else lack_of_room(-least_free)

    def _choose(self, iteration: int, no_room: str) -> list[Change]:
        return self.controller.decide(iteration, self._in_force(), no_room)

    def _in_force(self) -> list[tuple[Placement, Replicas]]:
        return [(layer.placement, layer.replicas) for layer in self._layers]

    def _carry_out(self, iteration: int, changes: list[Change]) -> list[dict]:
        moving = [
            (layer, change.placement)
            for layer, change in zip(self._layers, changes, strict=True)
            if change.placement != layer.placement
        ]
        events = [self._event(iteration, layer, change) for layer, change in zip(self._layers, changes, strict=True)]
        cost_ms = self._move(moving) if moving else 0.0
        for layer, change, event in zip(self._layers, changes, events, strict=True):
            if event["num_moved"]:
                event["cost_ms"] = round(cost_ms / len(moving), 3)
            if change.kind != "keep" and change.replicas != layer.replicas:
                layer.set_replicas(change.replicas)
        return events

    def _move(self, moving: list[tuple]) -> float:
        owners = [(layer.placement.rank_of_expert(), new.rank_of_expert()) for layer, new in moving]
        busiest = 0
        for old_E, new_E in owners:
            moves = old_E != new_E
            ends = [np.bincount(ends_E[moves], minlength=1) for ends_E in (old_E, new_E)]
            busiest += int(max(end.max() for end in ends))
        cost_ms = self._online.move(moving)
        self._has_room = True
        self._move_ms, self._num_moved = cost_ms, busiest
        return cost_ms

    def _event(self, iteration: int, layer, change: Change) -> dict:
        place = self._layers.index(layer)
        history = self.controller.history_YWE
        before, after = 1.0, 1.0
        if history is not None:
            both = (layer.replicas, change.replicas)
            before, after = (controller.max_over_mean(each.host_load(history[place])) for each in both)
        return {
            "iteration": iteration,
            "layer": layer.layer_idx,
            "kind": change.kind,
            "num_moved": num_moves(layer.placement, change.placement),
            "num_copies": change.replicas.num_copies,
            "cost_ms": 0.0,
            "max_over_mean_before": before,
            "max_over_mean_after": after,
            "predicted_ms_before": round(change.before_ms, 6),
            "predicted_ms_after": round(change.after_ms, 6),
            "reason": change.reason,
        }
