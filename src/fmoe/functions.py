"""The steps of an expert-parallel layer, for programs that put them together themselves.

Copies of tokens are sorted by expert, sent to its worker, and brought back. Letters: W workers, L experts of each, T tokens,
S copies of this worker's tokens, R rows that this worker's experts get, D features. `gate` is [T] or [T, top_k], the expert of
each copy among all W * L, -1 = dropped. Collective over the group of `ensure_comm` where world_size > 1.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from fmoe.utils import get_torch_default_comm
from smartmoe.ops.all_to_all import exchange_counts, exchange_rows, gather_all
from smartmoe.ops.plan import count_slots, make_plan
from smartmoe.ops.regroup import RowOrder, order_by_slot, reorder, restore

# FastMoE's functions take no group: they use the one that was named last.
_moe_group = None


def ensure_comm(t: torch.Tensor, comm) -> None:
    """Let the functions below talk over `comm` from now on, a ProcessGroup or None for all processes."""
    global _moe_group
    _moe_group = get_torch_default_comm() if comm is None else comm


def get_moe_group():
    """The group of the last `ensure_comm`, None before."""
    return _moe_group


def group_of(world_size: int):
    """The group that functions of world_size workers talk over: the last of `ensure_comm`, all processes before, None alone."""
    if world_size == 1:
        return None
    return get_torch_default_comm() if _moe_group is None else _moe_group


def count_by_gate(gate, num_expert: int, world_size: int, require_pos: bool = True):
    """How many copies go where: (pos, local_expert_count, global_expert_count).

    pos: [S] int64, the kept copies (index into gate.flatten()) in the order of their experts, None without require_pos;
    local_expert_count: [W * L] int64, this worker's copies of each expert; global_expert_count: [W * L], copies from each
    worker for each expert of this one. On the device of the gate; with require_pos one host synchronisation.
    """
    gate_SK = gate.reshape(-1, 1).long()
    lec_E = count_slots(gate_SK, world_size * num_expert)
    gec_WL = exchange_counts(lec_E.view(world_size, num_expert), group_of(world_size))
    pos = make_plan(gate_SK, world_size * num_expert, int(lec_E.sum())).copy_of_row_R if require_pos else None
    return pos, lec_E, gec_WL.flatten()


def prepare_forward(gate, num_expert: int, world_size: int):
    """(pos, local_expert_count, global_expert_count, fwd_expert_count, fwd_batch_size): as `count_by_gate`, the counts on the
    CPU; fwd_expert_count: [L] int64 rows of each expert of this worker, and their sum."""
    pos, lec_E, gec_E = count_by_gate(gate, num_expert, world_size)
    gec_E = gec_E.cpu()
    fwd_L = gec_E.view(world_size, num_expert).sum(0)
    return pos, lec_E.cpu(), gec_E, fwd_L, int(fwd_L.sum())


class MOEScatter:
    """Tokens to the experts' rows."""

    @staticmethod
    def apply(inp, pos, local_expert_count, global_expert_count, fwd_batch_size: int, world_size: int) -> torch.Tensor:
        """inp: [T, D]; pos: [S] int64, the row of `inp` that each copy is; the rest from `prepare_forward`. Returns
        [fwd_batch_size, D], sorted by expert, of one expert by worker. Differentiable."""
        order, send, receive = _journey(local_expert_count, global_expert_count, world_size, inp.device)
        return reorder(exchange_rows(inp.index_select(0, pos), send, receive, group_of(world_size)), order)


class MOEGather:
    """The experts' rows back to the copies of tokens."""

    @staticmethod
    def apply(rows, pos, local_expert_count, global_expert_count, local_batch_size: int, world_size: int) -> torch.Tensor:
        """rows: [R, D] in the order of MOEScatter; pos: [S] int64, where each copy belongs; the rest from `prepare_forward`.
        Returns [local_batch_size, D], zero where no copy belongs. Differentiable."""
        order, send, receive = _journey(local_expert_count, global_expert_count, world_size, rows.device)
        rows = exchange_rows(restore(rows, order), receive, send, group_of(world_size))
        return rows.new_zeros(local_batch_size, rows.shape[1]).index_copy(0, pos, rows)


class AllGather(Function):
    """Batches of all workers of a group of equal data behind each other; the gradient is this worker's part."""

    @staticmethod
    def forward(ctx, inp, rank: int, world_size: int, group):
        """inp: [B, ..], the same shape on every worker. Returns [world_size * B, ..]. Collective over `group`, None = all
        processes."""
        ctx.part = rank * inp.shape[0], inp.shape[0]
        return gather_all(inp, _all_for_none(group, world_size))

    @staticmethod
    def backward(ctx, grad_out):
        return grad_out.narrow(0, *ctx.part), None, None, None


class Slice(Function):
    """This worker's part of a batch that all workers of a group have; the gradient is gathered from all."""

    @staticmethod
    def forward(ctx, inp, rank: int, world_size: int, group):
        """inp: [B, ..]; returns [B / world_size, ..]. Raises ValueError where that is no whole number."""
        if inp.shape[0] % world_size:
            raise ValueError(
                f"fmoe: a batch of {inp.shape[0]} tokens cannot be cut into equal slices for the {world_size} workers of "
                "slice_group (mp_group): pad the batch, or leave the group out"
            )
        ctx.group, size = _all_for_none(group, world_size), inp.shape[0] // world_size
        return inp.narrow(0, rank * size, size).clone()

    @staticmethod
    def backward(ctx, grad_out):
        return gather_all(grad_out.contiguous(), ctx.group), None, None, None


def _all_for_none(group, world_size: int):
    return get_torch_default_comm() if group is None and world_size > 1 else group


def _journey(lec_E, gec_E, world_size: int, device) -> tuple[RowOrder, list[int], list[int]]:
    """(the order of received rows, rows sent to each worker, rows received from each)."""
    sent_WL, received_WL = lec_E.view(world_size, -1), gec_E.view(world_size, -1)
    send, receive = torch.stack([sent_WL.sum(1), received_WL.sum(1)]).tolist()
    return order_by_slot(received_WL.to(device), sum(receive)), send, receive
