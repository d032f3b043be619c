"""Online expert placement: watch the load, decide, move experts between iterations.

Layer 4. Axes: L MoE layers of this pipeline stage, M micro-batches, E experts, R ranks of the stage, N slots of a rank,
B bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.config import OnlineConfig
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.placement import EMPTY, Placement, max_over_mean, num_moves, rank_load, solve_greedy, solve_least_move

SOLVERS = {"greedy": solve_greedy, "least_move": solve_least_move}


# ------------------------------------------------------------------------------------------------------------ moving


@torch.no_grad()
def migrate(entries: Sequence[tuple[Sequence[torch.Tensor], Placement, Placement]], ep_group) -> int:
    """Move experts, with everything that belongs to them, from where `old` has them to where `new` wants them.

    All layers and tensors travel in one all_to_all_single of bytes, so copies are exact for any dtype. Moves inside a
    rank are copies there; a slot that becomes empty keeps its bytes. Needs room for all that is sent and received.

    Args:
        entries: (tensors, old, new) for each layer, in the same order on every rank. tensors: [N, ...] each, all that
            this rank keeps by local slot (weights, masters, moments), any dtype and stride, on one device, written in
            place, no two of them sharing memory.
        ep_group: the ranks between which experts move, ep_rank = rank in it; None = this process alone.
    Returns: bytes that this rank sent to others. Raises ValueError, before anything is moved, when sizes do not fit.
    Collective over ep_group, except that no rank communicates when no expert of any layer changes ranks.
    """
    for idx, entry in enumerate(entries):
        _check_entry(f"migrate: entry {idx}", *entry, group_size(ep_group))
    entries = [entry for entry in entries if entry[1] != entry[2]]
    moves = [_moves(old, new, group_rank(ep_group)) for _, old, new in entries]
    rows = [[_ByteRows(t) for t in tensors] for tensors, _, _ in entries]
    arrived, num_bytes_sent = [], 0
    if any(num_moves(old, new) for _, old, new in entries):
        arrived, num_bytes_sent = _exchange(rows, moves, ep_group)
    # All that leaves has been read by now, so slots may be written: first from inside the rank, then from outside.
    for layer_rows, move in zip(rows, moves, strict=True):
        for each in layer_rows:
            kept = [(slot, each.bytes_NB[source].clone()) for source, slot in move.inside]
            for slot, row_B in kept:
                each.bytes_NB[slot].copy_(row_B)
    for row_B, data_B in arrived:
        row_B.copy_(data_B)
    for layer_rows in rows:
        for each in layer_rows:
            each.write_back()
    return num_bytes_sent


@dataclass(frozen=True)
class _Moves:
    """What one rank does for one layer, by local slot: send[w] to rank w, receive[w] from rank w, inside (from, to)."""

    send: list[list[int]]
    receive: list[list[int]]
    inside: list[tuple[int, int]]


def _moves(old: Placement, new: Placement, ep_rank: int) -> _Moves:
    """Fill every slot whose expert changes from its own rank where that has the expert, else from the primary slot."""
    num_ranks, per_rank = old.num_ranks, old.slots_per_rank
    moves = _Moves([[] for _ in range(num_ranks)], [[] for _ in range(num_ranks)], [])
    for slot, expert in enumerate(new.expert_of_slot):
        if expert in (EMPTY, old.expert_of_slot[slot]):
            continue
        target, source = slot // per_rank, old.primary[expert] // per_rank
        at_home = old.experts_of_rank(target)
        if expert in at_home:
            if target == ep_rank:
                moves.inside.append((at_home.index(expert), slot % per_rank))
            continue
        if source == ep_rank:
            moves.send[target].append(old.primary[expert] % per_rank)
        if target == ep_rank:
            moves.receive[source].append(slot % per_rank)
    return moves


class _ByteRows:
    """A tensor [N, ...] as [N, B] uint8; one that is not contiguous is worked on as a copy and written back."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._work = tensor.detach(), tensor.detach().contiguous()
        num_slots = tensor.shape[0]
        self.bytes_NB = self._work.view(num_slots, tensor.numel() // num_slots).view(torch.uint8)

    def write_back(self) -> None:
        if not self._tensor.is_contiguous():
            self._tensor.copy_(self._work)


def _exchange(rows: list[list[_ByteRows]], moves: list[_Moves], ep_group):
    """Returns ([(row of a slot, the bytes that came for it)], number of bytes sent). Collective."""
    num_ranks = group_size(ep_group)

    def rows_of_rank(slots_of: list[list[list[int]]], ep_rank: int) -> list[torch.Tensor]:
        pairs = zip(rows, slots_of, strict=True)
        return [each.bytes_NB[slot] for layer, slots in pairs for slot in slots[ep_rank] for each in layer]

    leaving = [rows_of_rank([move.send for move in moves], ep_rank) for ep_rank in range(num_ranks)]
    coming = [rows_of_rank([move.receive for move in moves], ep_rank) for ep_rank in range(num_ranks)]
    send_splits, receive_splits = ([sum(map(len, part)) for part in parts] for parts in (leaving, coming))
    device = next(each.bytes_NB.device for layer in rows for each in layer)
    nothing_B = torch.empty(0, dtype=torch.uint8, device=device)
    sent_B = torch.cat([nothing_B, *(row for part in leaving for row in part)])
    received_B = torch.empty(sum(receive_splits), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received_B, sent_B, receive_splits, send_splits, group=ep_group)
    targets = [row for part in coming for row in part]
    return list(zip(targets, received_B.split([len(row) for row in targets]), strict=True)), sum(send_splits)


def _check_entry(where: str, tensors, old: Placement, new: Placement, num_ranks: int) -> None:
    if old.num_ranks != num_ranks:
        raise ValueError(f"{where}: placement for {old.num_ranks} ranks, but the group has {num_ranks}")
    num_moves(old, new)  # raises when the two differ in shape
    if not tensors:
        raise ValueError(f"{where}: no tensors; give all that belongs to the experts of the layer")
    for idx, tensor in enumerate(tensors):
        if tensor.dim() < 1 or tensor.shape[0] != old.slots_per_rank:
            raise ValueError(
                f"{where}: tensor {idx} has shape {list(tensor.shape)}, expected {old.slots_per_rank} slots in dim 0"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"{where}: tensor {idx} is on {tensor.device}, tensor 0 on {tensors[0].device}")
    starts = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len(set(starts)) < len(starts):
        raise ValueError(f"{where}: two tensors share memory and would be moved twice; pass each once")


# ---------------------------------------------------------------------------------------------------------- watching


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
