"""Moving experts between ranks with everything that belongs to them: weights, fp32 masters, moments.

Layer 4. Axes: N slots of a rank, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.placement import EMPTY, Placement, num_moves


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
