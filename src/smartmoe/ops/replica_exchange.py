"""Weights of experts to replica slots, and gradients of replicas to the owners: packed exchanges that the host plans.

Shape letters are those of `smartmoe.ops`, and G replica slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.placement import EMPTY, Placement, Replicas


@dataclass(frozen=True)
class Transfers:
    """Whose weights go where in one layer, as one rank sees it. send_W: local owned slots whose experts rank w holds
    replicas of; receive_W: index of the replica slots that rank w's experts fill; both in the order of replica slots.
    num_sent_W: how many slots each rank sends, the same on every rank."""

    send_W: tuple[tuple[int, ...], ...]
    receive_W: tuple[tuple[int, ...], ...]
    num_sent_W: tuple[int, ...]

    @classmethod
    def of(cls, placement: Placement, replicas: Replicas, ep_rank: int, held: Sequence[int] = ()) -> Transfers:
        """held: [W * G] experts that stand in the replica slots already, none of which travel; empty = nothing is there."""
        send = [[] for _ in range(placement.num_ranks)]
        receive = [[] for _ in range(placement.num_ranks)]
        num_sent = [0] * placement.num_ranks
        for slot, expert in enumerate(replicas.expert_of_replica):
            if expert == EMPTY or (held and held[slot] == expert):
                continue
            host, index = divmod(slot, replicas.num_replica_slots)
            owner, owned_slot = divmod(placement.primary[expert], placement.slots_per_rank)
            num_sent[owner] += 1
            if owner == ep_rank:
                send[host].append(owned_slot)
            if host == ep_rank:
                receive[owner].append(index)
        return cls(tuple(map(tuple, send)), tuple(map(tuple, receive)), tuple(num_sent))


@torch.no_grad()
def start_weights(entries: Sequence[tuple[Sequence[torch.Tensor], int, Transfers]], ep_group) -> list[Swap]:
    """Start to fill the replica slots of layers from their owners, in one exchange as long as that is balanced
    (`_batches`).

    entries: (storages [L + G, ...] of one dtype, L, transfers) for each layer, in the same order on every rank. The last
    exchange is on its way until `fill` ends it; those before, if any, are done. Collective over ep_group, except that no
    rank communicates when there is no replica.
    """
    swaps: list[Swap] = []
    for batch in _batches(entries, entries[0][0][0].shape[0] - entries[0][1] if entries else 0):
        leaving = _parts([[(storages, slots) for slots in move.send_W] for storages, _, move in batch])
        arriving = _parts(
            [[(storages, [owned + g for g in slots]) for slots in move.receive_W] for storages, owned, move in batch]
        )
        if swaps:
            fill(swaps[-1])  # before the next one takes as much memory
        swaps.append(Swap(leaving, arriving, batch[0][0][0], ep_group))
    return swaps


@torch.no_grad()
def fill(swap: Swap) -> None:
    """Write what came into the slots it is for; the second time nothing is left to do."""
    for part in swap.take():
        for slot, value in part:
            slot.copy_(value)


@torch.no_grad()
def return_grads(
    entries: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Transfers]],
    ep_group,
    dtype: torch.dtype | None = None,
) -> int:
    """Add the gradients of replicas to those of the owners, in one exchange as long as that is balanced.

    entries: (owned [L, ...], replicas [G, ...], transfers) for each layer, in the same order on every rank; the replicas all
    of one dtype, in which they travel unless `dtype` says another. An owner sums its own gradient and those of the replicas,
    by ascending rank, in float32 at least, and rounds once: the same bits in every run. Returns the bytes that this rank
    sent. Collective as `start_weights`.
    """
    num_bytes = 0
    for batch in _batches(entries, entries[0][1][0].shape[0] if entries else 0):
        swap = start_return(batch, ep_group, dtype)
        num_bytes += swap.num_bytes
        finish_return(swap)
    return num_bytes


@torch.no_grad()
def start_return(
    batch: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Transfers]],
    ep_group,
    dtype: torch.dtype | None = None,
) -> Swap:
    """Start to bring the gradients of replicas to the ranks of their owners. batch: as the entries of `return_grads`, at
    least one; those of the owners are not touched before `finish_return`. Collective over ep_group."""
    leaving = _parts([[(replicas, slots) for slots in move.receive_W] for _, replicas, move in batch])
    arriving = _parts([[(owned, slots) for slots in move.send_W] for owned, _, move in batch])
    return Swap(leaving, arriving, batch[0][1][0], ep_group, dtype)


@torch.no_grad()
def finish_return(swap: Swap) -> None:
    """Add what has come to the owners' gradients, as `return_grads` says."""
    addends: dict[int, list[torch.Tensor]] = {}
    for part in swap.take():
        for slot, value in part:
            addends.setdefault(slot.data_ptr(), [slot]).append(value)
    for slot, *values in addends.values():
        total = slot.to(torch.promote_types(slot.dtype, torch.float32))  # slot itself where that is its type
        for value in values:
            total.add_(value)
        slot.copy_(total)


def _batches(entries: Sequence[tuple], num_replicas: int) -> list[list[tuple]]:
    """Layers that travel together: all of them, or less where one rank has much more to send than its slots receive.

    So a rank stages at most twice the experts of all its replica slots, or W * G of them for a layer, however skewed
    replication is; that is part of the budget in config.replica_bytes. The same on every rank.
    """
    limit, batches, total_W = 2 * len(entries) * num_replicas, [], None
    for entry in entries:
        num_sent_W = np.array(entry[2].num_sent_W)
        if not num_sent_W.any():
            continue
        if batches and (total_W + num_sent_W).max() <= limit:
            batches[-1].append(entry)
            total_W = total_W + num_sent_W
        else:
            batches.append([entry])
            total_W = num_sent_W
    return batches


def _parts(layers: list[list[tuple[Sequence[torch.Tensor], Sequence[int]]]]) -> list[list[torch.Tensor]]:
    """By rank, the slots of all layers and tensors in the order in which they travel."""
    by_rank = zip(*layers, strict=True)
    return [[t[slot] for tensors, slots in pairs for slot in slots for t in tensors] for pairs in by_rank]


class Swap:
    """An exchange under way: leaving[w] goes to rank w, what comes from there has the shapes of arriving[w]. Collective.
    It travels as `dtype`, or that of `like`. num_bytes: sent by this rank."""

    def __init__(
        self,
        leaving: list[list[torch.Tensor]],
        arriving: list[list[torch.Tensor]],
        like: torch.Tensor,
        ep_group,
        dtype: torch.dtype | None = None,
    ):
        send_splits, receive_splits = (
            [sum(t.numel() for t in part) for part in parts] for parts in (leaving, arriving)
        )
        self._arriving, self._splits = arriving, receive_splits
        parts = [t.reshape(-1) for part in leaving for t in part]
        self._sent = like.new_empty(sum(send_splits), dtype=dtype)
        if parts:
            torch._foreach_copy_(list(self._sent.split([part.numel() for part in parts])), parts)
        self._received = like.new_empty(sum(receive_splits), dtype=dtype)
        self.num_bytes = self._sent.numel() * self._sent.element_size()
        self._work = dist.all_to_all_single(
            self._received, self._sent, receive_splits, send_splits, group=ep_group, async_op=True
        )

    def take(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Wait and give, by rank, each of `arriving` with what came for it; nothing the second time."""
        if self._work is None:
            return []
        self._work.wait()
        pairs = [
            [
                (slot, value.view(slot.shape))
                for slot, value in zip(part, block.split([t.numel() for t in part]), strict=True)
            ]
            for part, block in zip(self._arriving, self._received.split(self._splits), strict=True)
        ]
        self._work = self._sent = self._received = None
        return pairs
