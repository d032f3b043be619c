"""Moving experts between ranks with everything that belongs to them: weights, fp32 masters, moments.

Layer 4. Axes: N slots of a rank, B bytes. Rows travel straight from and to the tensors that hold them. Only where the
slot that a row goes to still holds what another rank, or another slot, waits for (experts that change places), the row
rests in a staging buffer of fixed size, reused for all layers: a migration is cut into rounds that fit it. While a round
is under way the one before is copied out, so two halves of the buffer serve in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.placement import EMPTY, Placement, num_moves

STAGING_BYTES = 64 << 20
_ALIGN_BYTES = 16  # rounds cut rows at multiples of this


class Staging:
    """The memory that migrations use beside the tensors: at most `num_bytes`, taken at the first need and kept."""

    def __init__(self, num_bytes: int = STAGING_BYTES):
        self.half_bytes = max(num_bytes // 2, 1)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def halves(self, need_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers of `need_bytes` each, uint8, in the same memory at every call as long as it is large enough."""
        if self._buffer.device != device or self._buffer.numel() < 2 * need_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # gives the old one back first
            self._buffer = torch.empty(2 * need_bytes, dtype=torch.uint8, device=device)
        return self._buffer[:need_bytes], self._buffer[need_bytes : 2 * need_bytes]


@torch.no_grad()
def migrate(
    entries: Sequence[tuple[Sequence[torch.Tensor], Placement, Placement]], ep_group, staging: Staging | None = None
) -> int:
    """Move experts, with everything that belongs to them, from where `old` has them to where `new` wants them.

    Bytes are copied, so any dtype arrives exactly. A slot that becomes empty keeps its bytes. On a GPU nothing waits
    for the host: work that is queued later on the current stream sees the experts in place.

    Args:
        entries: (tensors, old, new) for each layer, in the same order on every rank. tensors: [N, ...] each, all that
            this rank keeps by local slot (weights, masters, moments), any dtype and stride, on one device, written in
            place, no two of them sharing memory.
        ep_group: the ranks between which experts move, ep_rank = rank in it; None = this process alone. Over NCCL it
            must have communicated before, because only ranks that send or receive take part.
        staging: kept by the caller so that migrations use the same memory; None = memory of this call's own.
    Returns: bytes that this rank sent to others. Raises ValueError, before anything is moved, when sizes do not fit.
    To be called by all ranks of ep_group; point-to-point between those that exchange experts.
    """
    for idx, entry in enumerate(entries):
        _check_entry(f"migrate: entry {idx}", *entry, group_size(ep_group))
    entries = [entry for entry in entries if entry[1] != entry[2]]
    if not entries:
        return 0
    staging = staging or Staging()
    moves = [_moves(old, new, group_rank(ep_group)) for _, old, new in entries]
    rows = [[_ByteRows(tensor) for tensor in tensors] for tensors, _, _ in entries]
    # Ranks agree on the rounds because each knows how many slots change on the rank where most do.
    num_rows = [_most_changed_slots(old, new) for _, old, new in entries]
    rounds = _rounds([[each.bytes_NB.shape[1] for each in layer] for layer in rows], num_rows, staging.half_bytes)
    need_bytes = max((sum(moves[p.layer].num_staged * p.width for p in pieces) for pieces in rounds), default=0)
    halves = staging.halves(need_bytes, rows[0][0].bytes_NB.device)
    num_bytes_sent, pending = 0, None
    for idx, pieces in enumerate(rounds):
        started = _start(pieces, rows, moves, halves[idx % 2], ep_group)
        if pending is not None:
            _finish(pending)
        pending = started
        num_bytes_sent += sum(len(moves[piece.layer].send) * piece.width for piece in pieces)
    if pending is not None:
        _finish(pending)
    for layer in rows:
        for each in layer:
            each.write_back()
    return num_bytes_sent


# ---------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Moves:
    """What one rank does for one layer, by local slot: send (to rank, from slot), receive (from rank, into slot), inside
    (from slot, into slot). Those into the slots of `busy`, whose old expert somebody else gets, go by staging."""

    send: list[tuple[int, int]]
    receive: list[tuple[int, int]]
    inside: list[tuple[int, int]]
    busy: frozenset[int]

    @property
    def num_staged(self) -> int:
        return sum(slot in self.busy for _, slot in self.receive + self.inside)


def _moves(old: Placement, new: Placement, ep_rank: int) -> _Moves:
    """Fill every slot whose expert changes from its own rank where that has the expert, else from the primary slot."""
    per_rank, send, receive, inside = old.slots_per_rank, [], [], []
    hosted = [old.experts_of_rank(rank) for rank in range(old.num_ranks)]
    for slot, (before, expert) in enumerate(zip(old.expert_of_slot, new.expert_of_slot, strict=True)):
        if expert in (EMPTY, before):
            continue
        (target, place), (source, source_place) = divmod(slot, per_rank), divmod(old.primary[expert], per_rank)
        if expert in hosted[target]:
            if target == ep_rank:
                inside.append((hosted[target].index(expert), place))
            continue
        if source == ep_rank:
            send.append((target, source_place))
        if target == ep_rank:
            receive.append((source, place))
    busy = {slot for _, slot in send} | {slot for slot, _ in inside}
    return _Moves(send, receive, inside, frozenset(busy))


def _most_changed_slots(old: Placement, new: Placement) -> int:
    changed = np.not_equal(old.expert_of_slot, new.expert_of_slot).reshape(old.num_ranks, -1)
    return max(1, int(changed.sum(axis=1).max()))


@dataclass(frozen=True)
class _Piece:
    """Bytes start .. stop of every row of one tensor of one layer."""

    layer: int
    tensor: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


def _rounds(row_bytes: list[list[int]], num_rows: list[int], half_bytes: int) -> list[list[_Piece]]:
    """Cut the rows of all layers' tensors into rounds, each of at most `half_bytes` when num_rows rows of it are staged.

    All moves of one piece fall in one round, so experts can change places in any cycle.
    """
    half_bytes = max(half_bytes, _ALIGN_BYTES * max(num_rows))
    rounds: list[list[_Piece]] = [[]]
    left = half_bytes
    for layer, widths in enumerate(row_bytes):
        for tensor, width in enumerate(widths):
            start = 0
            while start < width:
                fits = left // num_rows[layer]
                if fits < width - start:
                    fits -= fits % _ALIGN_BYTES
                if not fits:
                    rounds.append([])
                    left = half_bytes
                    continue
                stop = min(width, start + fits)
                rounds[-1].append(_Piece(layer, tensor, start, stop))
                left -= num_rows[layer] * (stop - start)
                start = stop
    return [pieces for pieces in rounds if pieces]


# ------------------------------------------------------------------------------------------------------------ moving


class _ByteRows:
    """A tensor [N, ...] as [N, B] uint8; one that is not contiguous is worked on as a copy and written back."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._work = tensor.detach(), tensor.detach().contiguous()
        num_slots = tensor.shape[0]
        self.bytes_NB = self._work.view(num_slots, tensor.numel() // num_slots).view(torch.uint8)

    def write_back(self) -> None:
        if not self._tensor.is_contiguous():
            self._tensor.copy_(self._work)


def _start(pieces: list[_Piece], rows: list[list[_ByteRows]], moves: list[_Moves], half_B: torch.Tensor, ep_group):
    """Start one round. Returns (works to wait for, [(row, its bytes in staging)] to copy out afterwards)."""
    ops, copies, used = [], [], 0
    for piece in pieces:
        part_NB = rows[piece.layer][piece.tensor].bytes_NB[:, piece.start : piece.stop]
        move = moves[piece.layer]

        def landing(slot: int, part_NB=part_NB, move=move) -> torch.Tensor:
            nonlocal used
            if slot not in move.busy:
                return part_NB[slot]
            staged_B = half_B[used : used + part_NB.shape[1]]
            used += part_NB.shape[1]
            copies.append((part_NB[slot], staged_B))
            return staged_B

        for source, slot in move.inside:
            landing(slot).copy_(part_NB[source])
        ops += [dist.P2POp(dist.isend, part_NB[slot], group=ep_group, group_peer=to) for to, slot in move.send]
        ops += [dist.P2POp(dist.irecv, landing(slot), group=ep_group, group_peer=at) for at, slot in move.receive]
    return (dist.batch_isend_irecv(ops) if ops else []), copies


def _finish(round_under_way) -> None:
    works, copies = round_under_way
    for work in works:
        work.wait()
    for row_B, staged_B in copies:
        row_B.copy_(staged_B)


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
