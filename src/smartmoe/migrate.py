"""Moving experts between ranks with everything that belongs to them: weights, fp32 masters, moments.

Layer 4. Axes: N slots of a rank, B bytes. All that leaves a rank is first gathered in a staging buffer of fixed size,
because experts change places: a slot may be needed by the one that comes before the one that goes has left. What does
not fit travels in rounds, for which two halves of the buffer serve in turn, so that gathering overlaps the exchange.
GPUs of one host then copy out of each other's staging into the slots (the copy engines move both directions at once at
the speed of one); elsewhere, and where links are slowed down, one all-to-all a round carries it into a second buffer.
Measured on two GPUs, messages straight from and to the tensors were slower than either: each costs the host more than it
saves the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.placement import EMPTY, Placement, num_moves
from smartmoe.slow_links import are_slowed

STAGING_BYTES = 128 << 20
_ALIGN_BYTES = 16  # rounds cut rows at multiples of this
_ENGINE_BYTES = 1 << 20  # from here on a copy of its own pays


@torch.no_grad()
def migrate(
    entries: Sequence[tuple[Sequence[torch.Tensor], Placement, Placement]], ep_group, staging: Staging | None = None
) -> int:
    """Move experts, with everything that belongs to them, from where `old` has them to where `new` wants them.

    Bytes are copied, so any dtype arrives exactly. A slot that becomes empty keeps its bytes. On a GPU the host does not
    wait: work that is queued later on the current stream sees the experts in place.

    Args:
        entries: (tensors, old, new) for each layer, in the same order on every rank. tensors: [N, ...] each, all that
            this rank keeps by local slot (weights, masters, moments), any dtype and stride, on one device, written in
            place, no two of them sharing memory.
        ep_group: the ranks between which experts move, ep_rank = rank in it; None = this process alone.
        staging: kept by the caller so that migrations use the same memory; None = memory of this call's own.
    Returns: bytes that this rank sent to others. Raises ValueError, before anything is moved, when sizes do not fit.
    Collective over ep_group, except that no rank communicates when no expert of any layer changes ranks.
    """
    for idx, entry in enumerate(entries):
        _check_entry(f"migrate: entry {idx}", *entry, group_size(ep_group))
    entries = [entry for entry in entries if entry[1] != entry[2]]
    if not entries:
        return 0
    moves = [_moves(old, new) for _, old, new in entries]
    rows = [[_Rows(tensor) for tensor in tensors] for tensors, _, _ in entries]
    crossing = any(move.source != move.target for layer in moves for move in layer)
    exchange = (staging or Staging()).exchange(ep_group if crossing else None, rows[0][0].work.device)
    num_ranks, ep_rank = group_size(ep_group), group_rank(ep_group)
    unit = torch.int64 if all(each.is_aligned for layer in rows for each in layer) else torch.uint8
    views = [[each.view(unit) for each in layer] for layer in rows]
    widths = [[each.num_bytes for each in layer] for layer in rows]
    num_bytes_sent = 0
    for pieces in _rounds(widths, [_most_rows(layer) for layer in moves], exchange.half_bytes):
        parcel = _Parcel(pieces, views, moves, num_ranks, ep_rank, unit)
        exchange.carry(parcel)
        num_bytes_sent += sum(parcel.sent_bytes_W)
    exchange.finish()
    for layer in rows:
        for each in layer:
            each.write_back()
    return num_bytes_sent


# ---------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Move:
    """One expert's way: from (rank, local slot) to (rank, local slot)."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def _moves(old: Placement, new: Placement) -> list[_Move]:
    """Fill every slot whose expert changes from its own rank where that has the expert, else from the primary slot."""
    per_rank, moves = old.slots_per_rank, []
    for slot in np.flatnonzero(np.not_equal(old.expert_of_slot, new.expert_of_slot)).tolist():
        expert = new.expert_of_slot[slot]
        if expert == EMPTY:
            continue
        target, hosted = slot // per_rank, old.experts_of_rank(slot // per_rank)
        at = target * per_rank + hosted.index(expert) if expert in hosted else old.primary[expert]
        moves.append(_Move(*divmod(at, per_rank), target, slot % per_rank))
    return moves


def _most_rows(moves: list[_Move]) -> int:
    """Rows of a tensor that a rank gathers or gets, on the rank where it is most."""
    num_out, num_in = Counter(move.source for move in moves), Counter(move.target for move in moves)
    return max(1, *num_out.values(), *num_in.values()) if moves else 1


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
    """Cut the rows of all layers' tensors into rounds, each of at most `half_bytes` when num_rows rows of it travel.

    All moves of one piece fall in one round, so experts can change places in any cycle. The first round is small, because
    nothing travels while it is gathered. Equal on all ranks. Raises ValueError when half_bytes is too small for a cut.
    """
    if half_bytes < _ALIGN_BYTES * max(num_rows):
        raise ValueError(f"migrate: staging of 2 x {half_bytes} bytes is too small for {max(num_rows)} experts a rank")
    rounds: list[list[_Piece]] = [[]]
    left = max(half_bytes // 4, _ALIGN_BYTES * max(num_rows))
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


class _Rows:
    """A tensor [N, ...] as [N, B] of bytes; one that is not contiguous is worked on as a copy and written back."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self.work = tensor, tensor.detach()
        self.is_copy = not tensor.is_contiguous()
        if self.is_copy:
            self.work = self.work.contiguous()
        self.num_slots = tensor.shape[0]
        self.num_bytes = self.work.numel() // self.num_slots * self.work.element_size()
        self.is_aligned = self.num_bytes % 8 == 0 and self.work.data_ptr() % 8 == 0

    def view(self, unit: torch.dtype) -> torch.Tensor:
        """[N, B / size of unit]."""
        return self.work.view(self.num_slots, self.work.numel() // self.num_slots).view(unit)

    def write_back(self) -> None:
        if self.is_copy:
            self._tensor.copy_(self.work)


class _Parcel:
    """What one rank gathers and fills in one round, as views of `unit`.

    outgoing: rows in the order of the ranks they go to, then those that stay on this rank. incoming: (rank, rows) from
    each other rank that has some; settling: rows that get what stays. sent_bytes_W, got_bytes_W: to and from each rank;
    start_W: where in its staging each rank has what comes here. In a row of ranks, the order is that of pieces and moves.
    """

    def __init__(self, pieces, views, moves, num_ranks: int, ep_rank: int, unit: torch.dtype):
        self._unit = unit
        num_bytes_WW = [[0] * num_ranks for _ in range(num_ranks)]  # from, to
        out_W: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
        in_W: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
        for piece in pieces:
            units_NB = views[piece.layer][piece.tensor]
            part = slice(piece.start // unit.itemsize, piece.stop // unit.itemsize)
            for move in moves[piece.layer]:
                num_bytes_WW[move.source][move.target] += piece.width
                if move.source == ep_rank:
                    out_W[move.target].append(units_NB[move.source_slot, part])
                if move.target == ep_rank:
                    in_W[move.source].append(units_NB[move.target_slot, part])
        self.settling, stays = in_W[ep_rank], out_W[ep_rank]
        self.stay_bytes = num_bytes_WW[ep_rank][ep_rank]
        for rank in range(num_ranks):
            num_bytes_WW[rank][rank] = 0
        self.outgoing = [row for rank, part in enumerate(out_W) if rank != ep_rank for row in part] + stays
        self.incoming = [(rank, part) for rank, part in enumerate(in_W) if rank != ep_rank and part]
        self.sent_bytes_W, self.got_bytes_W = num_bytes_WW[ep_rank], [row[ep_rank] for row in num_bytes_WW]
        self.start_W = [sum(row[:ep_rank]) for row in num_bytes_WW]

    def gather(self, half_B: torch.Tensor) -> None:
        """Copy all that leaves its slot into staging."""
        _copy(self._cut(half_B, self.outgoing), self.outgoing)

    def settle(self, half_B: torch.Tensor) -> None:
        """Fill the slots whose experts come from this rank."""
        first = sum(self.sent_bytes_W)
        _copy(self.settling, self._cut(half_B[first : first + self.stay_bytes], self.settling))

    def sources(self, rank: int, part_B: torch.Tensor) -> list[torch.Tensor]:
        """The rows from `rank` in part_B, the bytes that it has for this rank."""
        return self._cut(part_B, dict(self.incoming)[rank])

    def _cut(self, buffer_B: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [row.numel() for row in rows]
        return list(buffer_B[: sum(sizes) * self._unit.itemsize].view(self._unit).split_with_sizes(sizes)) if rows else []


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


# -------------------------------------------------------------------------------------------------------- exchanging


class Staging:
    """The memory that migrations use beside the tensors, at most `num_bytes`, taken at the first need and kept.

    For one group; on GPUs that reach each other's memory the first exchange is slow, because it is registered then.
    """

    def __init__(self, num_bytes: int = STAGING_BYTES):
        self.max_bytes = num_bytes
        self._alone: _Alone | None = None
        self._together: _Collective | _PeerMemory | None = None

    @property
    def num_bytes(self) -> int:
        """What is taken now."""
        return sum(each.num_bytes for each in (self._alone, self._together) if each is not None)

    def exchange(self, ep_group, device: torch.device):
        """What carries the parcels of one migration; ep_group None = all of them stay on their rank."""
        if group_size(ep_group) == 1:
            self._alone = self._alone or _Alone(self.max_bytes, device)
            return self._alone
        if self._together is None:
            # all ranks are of one opinion: the reason is agreed on
            near = _is_gpu(device) and not are_slowed() and why_unavailable(ep_group) is None
            self._together = (_PeerMemory if near else _Collective)(ep_group, self.max_bytes, device)
        return self._together


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class _Alone:
    """Parcels of rows that stay on this rank."""

    num_parts = 1

    def __init__(self, num_bytes: int, device: torch.device):
        self.half_bytes = num_bytes // self.num_parts // 8 * 8
        self._parts = torch.empty(self.num_parts, self.half_bytes, dtype=torch.uint8, device=device)
        self.num_bytes = self._parts.numel()

    def carry(self, parcel: _Parcel) -> None:
        parcel.gather(self._parts[0])
        parcel.settle(self._parts[0])

    def finish(self) -> None:
        """Nothing is under way."""


class _Collective(_Alone):
    """One all-to-all of bytes a round, into a second buffer; a round is copied out while the next one travels."""

    num_parts = 4

    def __init__(self, group, num_bytes: int, device: torch.device):
        super().__init__(num_bytes, device)
        self._group, self._turn, self._pending = group, 0, None

    def carry(self, parcel: _Parcel) -> None:
        out_B, in_B = self._parts[self._turn], self._parts[self._turn + 2]
        self._turn = 1 - self._turn
        parcel.gather(out_B)
        sent, got = sum(parcel.sent_bytes_W), sum(parcel.got_bytes_W)
        work = dist.all_to_all_single(
            in_B[:got], out_B[:sent], parcel.got_bytes_W, parcel.sent_bytes_W, group=self._group, async_op=True
        )
        self.finish()
        self._pending = (work, parcel, out_B, in_B[:got])

    def finish(self) -> None:
        """Fill the slots of the round under way."""
        if self._pending is None:
            return
        work, parcel, out_B, in_B = self._pending
        self._pending = None
        work.wait()
        part_W = in_B.split(parcel.got_bytes_W)
        for rank, rows in parcel.incoming:
            _copy(rows, parcel.sources(rank, part_W[rank]))
        parcel.settle(out_B)


class _PeerMemory:
    """Ranks copy out of each other's staging into their slots, on a stream of their own; the copy engines do it.

    Between two meetings of all ranks each gathers into one half and copies out of the others' same half. A half is
    written again only after the next meeting, which everybody enters having copied all it needed out of it.
    """

    def __init__(self, group, num_bytes: int, device: torch.device):
        self.half_bytes = num_bytes // 2 // 8 * 8
        self._halves_W, self._meet = _shared_halves(group, self.half_bytes, device)
        self.num_bytes = 2 * self.half_bytes
        self._ep_rank, self._turn, self._meetings = group_rank(group), 0, []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def carry(self, parcel: _Parcel) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        mine_B = self._halves_W[self._ep_rank][turn]
        if len(self._meetings) > 1 and self._stream is not None:
            torch.cuda.current_stream().wait_event(self._meetings[-1])
        parcel.gather(mine_B)
        with self._beside():
            self._meet()
            self._meetings.append(None if self._stream is None else self._stream.record_event())
            for rank, rows in parcel.incoming:
                sources = parcel.sources(rank, self._halves_W[rank][turn][parcel.start_W[rank] :])
                pairs = list(zip(rows, sources, strict=True))
                small = [pair for pair in pairs if pair[0].nbytes < _ENGINE_BYTES]
                _copy([row for row, _ in small], [source for _, source in small])
                for row, source in pairs:
                    if row.nbytes >= _ENGINE_BYTES:
                        row.copy_(source)
            parcel.settle(mine_B)

    def finish(self) -> None:
        """Meet once more: everybody has its experts, and the halves are free."""
        with self._beside():
            self._meet()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._meetings.clear()

    def _beside(self):
        """The own stream, after all that is queued on the current one; on a CPU there are none."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


def _shared_halves(group, half_bytes: int, device: torch.device):
    """(two halves of staging of each rank, as this process reaches them, a meeting of all ranks on the current stream).

    Collective."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(2 * half_bytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(buffer, group)
    # the tensor may stand inside a larger allocation, at the same place on every rank
    shift = buffer.data_ptr() - handle.get_buffer(group_rank(group), (1,), torch.uint8).data_ptr()
    whole = [handle.get_buffer(peer, (shift + 2 * half_bytes,), torch.uint8) for peer in range(group_size(group))]
    return [part[shift:].chunk(2) for part in whole], lambda: handle.barrier(channel=0)


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
