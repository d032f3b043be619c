"""Online expert placement: watch the load, decide, move experts between iterations.

Layer 4. Axes: L MoE layers of this pipeline stage, M micro-batches, E experts, R ranks of the stage, N slots of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.config import OnlineConfig
from smartmoe.migrate import migrate
from smartmoe.ops.all_to_all import group_size
from smartmoe.placement import Placement, max_over_mean, num_moves, rank_load
from smartmoe.solvers import solve_greedy, solve_least_move

SOLVERS = {"greedy": solve_greedy, "least_move": solve_least_move}


class LoadRecorder:
    """An observer of MoE layers: token copies per layer, micro-batch and logical expert on this rank.

    A forward pass is known by the id of its first token, so one that is recomputed counts once; dropped copies (-1) do
    not count. Recording only enqueues work on the device; `take` synchronises with the host, once.

    Args:
        layer_indices: layer_idx of the layers watched, in the order of the counts.
        num_experts: E.
    """

    def __init__(self, layer_indices: Sequence[int], num_experts: int):
        self._place = {layer_idx: place for place, layer_idx in enumerate(layer_indices)}
        self._num_experts = num_experts
        self._seen: list[tuple[int, torch.Tensor]] = []

    def __call__(self, layer_idx: int, routing, token_id_BT: torch.Tensor) -> None:
        if not token_id_BT.numel():
            return
        # Bin 0 takes the dropped copies, and then makes room for the id of the first token.
        bin_S = routing.expert_idx_TK.detach().flatten() + 1
        row = bin_S.new_zeros(self._num_experts + 1).scatter_add_(0, bin_S, torch.ones_like(bin_S))
        row[0] = token_id_BT.flatten()[0]
        self._seen.append((self._place[layer_idx], row))

    def take(self) -> np.ndarray:
        """[L, M, E] int64, what was seen since the last call; micro-batches in the order of their tokens."""
        if not self._seen:
            return np.zeros((len(self._place), 0, self._num_experts), np.int64)
        places = [place for place, _ in self._seen]
        rows = torch.stack([row for _, row in self._seen]).cpu().numpy()
        self._seen.clear()
        first_ids, micro_batch = np.unique(rows[:, 0], return_inverse=True)
        counts_LME = np.zeros((len(self._place), len(first_ids), self._num_experts), np.int64)
        counts_LME[places, micro_batch] = rows[:, 1:]
        return counts_LME


# ---------------------------------------------------------------------------------------------------------- deciding


class OnlinePlacement:
    """Balances the experts of this pipeline stage's MoE layers while training goes on.

    After every iteration the load is summed over the stage; every `online.interval` iterations the solver is asked with
    the load of the iteration just done, on the same integers on every rank, so all reach the same decision. Nothing
    else is remembered: a resumed run decides as an uninterrupted one.

    Args:
        layers: the MoELayers of this rank, the same on all ranks of the stage; a LoadRecorder joins their observers.
        online: policy, interval, and the fraction by which the fullest rank's load must fall for a move to be made.
        ep_group, stage_group: ProcessGroups (ep inside stage), or None for this process alone.
        state_of: all tensors [N, ...] that belong to the experts of a layer, for `migrate`.
    """

    def __init__(
        self,
        layers: Sequence,
        online: OnlineConfig,
        *,
        ep_group,
        stage_group,
        state_of: Callable[..., list[torch.Tensor]],
    ):
        self._layers, self._online, self._state_of = list(layers), online, state_of
        self._ep_group, self._stage_group = ep_group, stage_group
        num_experts = self._layers[0].placement.num_experts if self._layers else 0
        self._recorder = LoadRecorder([layer.layer_idx for layer in self._layers], num_experts)
        self._device = state_of(self._layers[0])[0].device if self._layers else torch.device("cpu")
        self._counts_LME = self._recorder.take()
        self._max_over_mean = 1.0
        for layer in self._layers:
            layer.observers.append(self._recorder)

    def after_step(self, iteration: int) -> list[dict]:
        """Take in what the layers saw in `iteration` (from 1) and, when it is due, place experts anew.

        Returns one event per layer when the solver was asked, otherwise none, with the keys of events.jsonl:
        iteration, layer, kind ("migrate" or "keep"), num_moved (experts sent between ranks), cost_ms (of the migration
        here, shared evenly by the layers that moved), max_over_mean_before and _after (of the load seen), reason.
        Collective over stage_group (and ep_group when experts move); synchronises with the host.
        """
        if not self._layers:
            return []
        self._counts_LME = self._recorder.take()
        load_LE = self._sum_over_stage(self._counts_LME.sum(axis=1))
        balance = [max_over_mean(load_E, layer.placement) for load_E, layer in zip(load_LE, self._layers, strict=True)]
        self._max_over_mean = float(np.mean(balance))
        if self._online.policy == "static" or iteration % self._online.interval:
            return []
        return self._place(iteration, load_LE)

    def load_max_over_mean(self) -> float:
        """Fullest rank's load over the mean rank's in the last iteration, mean of the layers; not collective."""
        return self._max_over_mean

    def gather_counts(self) -> np.ndarray:
        """Counts of the last iteration, [R, L, M, E] int32, ranks by stage_rank. Collective over stage_group."""
        counts = torch.from_numpy(self._counts_LME.astype(np.int32)).to(self._device)
        num_ranks = group_size(self._stage_group)
        if num_ranks == 1 or not counts.numel():
            return counts.cpu().numpy()[None].repeat(num_ranks, axis=0)
        gathered = counts.new_empty(num_ranks * len(counts), *counts.shape[1:])
        dist.all_gather_into_tensor(gathered, counts, group=self._stage_group)
        return gathered.view(num_ranks, *counts.shape).cpu().numpy()

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
                "cost_ms": 0.0,
                "max_over_mean_before": max_over_mean(load_E, old),
                "max_over_mean_after": max_over_mean(load_E, new),
                "reason": reason,
            }
            events.append(event)
            if new != old:
                moving.append((layer, new, event))
        if moving:
            cost_ms = self.move([(layer, new) for layer, new, _ in moving])
            for _, _, event in moving:
                event["cost_ms"] = round(cost_ms / len(moving), 3)
        return events

    def _decide(self, load_E: np.ndarray, current: Placement) -> tuple[Placement, str]:
        """The placement to have from now on, and why."""
        new = SOLVERS[self._online.policy](load_E, current)
        before, after = rank_load(load_E, current).max(), rank_load(load_E, new).max()
        if not after < before:
            return current, "the solver found nothing better"
        gain = 1 - after / before
        if not gain > self._online.min_gain:
            return current, f"fullest rank would fall by {gain:.1%}, min_gain is {self._online.min_gain:.1%}"
        return new, f"fullest rank {before:.0f} -> {after:.0f} token copies, {gain:.1%} less"

    def move(self, targets: list[tuple]) -> float:
        """Give each (layer, new placement) its placement, moving all layers' experts with their state together.

        Returns the milliseconds it took here. Collective over ep_group.
        """
        self._wait_for_device()
        start = time.perf_counter()
        migrate([(self._state_of(layer), layer.placement, new) for layer, new in targets], self._ep_group)
        for layer, new in targets:
            layer.set_placement(new)
        self._wait_for_device()
        return (time.perf_counter() - start) * 1e3

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
