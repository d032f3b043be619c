"""All-to-all exchanges of rows that autograd can cross, blocking or split in a start and a wait.

Collective over the group, also with zero rows. A group of None or of one rank exchanges nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import smartmoe.ops.gloo_exit  # noqa: F401  every process that exchanges may do so over gloo


def group_size(group) -> int:
    """Ranks of a process group; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group) -> int:
    """This process's rank in a process group; 0 for None."""
    return 0 if group is None else group.rank()


def gather_all(tensor: torch.Tensor, group) -> torch.Tensor:
    """The tensors of all ranks, equal in shape, one after the other along dim 0. Collective, no gradient."""
    if group_size(group) == 1:
        return tensor
    out = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
    # torch 2.13 gave this collective a new name and deprecated the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, tensor.contiguous(), group=group)
    return out


def exchange_counts(count_WL: torch.Tensor, group) -> torch.Tensor:
    """Send row w to rank w and receive its row for us: [W, L] int64 -> [W, L] int64. Collective."""
    if group_size(group) == 1:
        return count_WL
    received = torch.empty_like(count_WL)
    dist.all_to_all_single(received, count_WL.contiguous(), group=group)
    return received


def exchange_rows(rows_RD: torch.Tensor, send_splits: list[int], recv_splits: list[int], group) -> torch.Tensor:
    """Send consecutive runs of rows to the ranks and return what they sent, source ranks ascending. Collective, both
    ways.

    rows_RD: [sum(send_splits), D]; returns [sum(recv_splits), D]. Backward is the reverse exchange.
    """
    buffer, pending = start_exchange(rows_RD, send_splits, recv_splits, group)
    return wait_exchange(buffer, pending)


class Pending:
    """An exchange under way: its splits, its group, the work to wait for, and in backward the buffer that it fills."""

    def __init__(self, send_splits, recv_splits, group):
        self.send_splits, self.recv_splits, self.group = send_splits, recv_splits, group
        self.work = self.grad_buffer = None

    def launch(self, rows: torch.Tensor, send_splits: list[int], recv_splits: list[int]) -> torch.Tensor:
        out = rows.new_empty(sum(recv_splits), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            out, rows.contiguous(), recv_splits, send_splits, group=self.group, async_op=True
        )
        return out

    def wait(self) -> None:
        self.work.wait()
        self.work = None


def start_exchange(
    rows_RD, send_splits: list[int], recv_splits: list[int], group
) -> tuple[torch.Tensor, Pending | None]:
    """Launch an exchange and return a buffer that must go through `wait_exchange` before anything else reads it.

    In backward the pair changes roles: the wait launches the reverse exchange and the start waits for it, so
    autograd, which walks nodes in reverse order of their creation, overlaps in backward whatever was overlapped in
    forward.
    """
    if group_size(group) == 1:
        return rows_RD, None
    pending = Pending(send_splits, recv_splits, group)
    return _Start.apply(rows_RD, pending), pending


def wait_exchange(buffer: torch.Tensor, pending: Pending | None) -> torch.Tensor:
    """Wait for `start_exchange` and return its rows. Blocks the current CUDA stream, on CPU the caller."""
    return buffer if pending is None else _Wait.apply(buffer, pending)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, pending):
        ctx.pending = pending
        return pending.launch(rows, pending.send_splits, pending.recv_splits)

    @staticmethod
    def backward(ctx, _):
        # what arrives here only marks the order; the rows came by the pending exchange, in another number
        pending = ctx.pending
        pending.wait()
        grad_rows, pending.grad_buffer = pending.grad_buffer, None
        return grad_rows, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, pending):
        ctx.pending = pending
        pending.wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx, grad_rows):
        pending = ctx.pending
        pending.grad_buffer = pending.launch(grad_rows, pending.recv_splits, pending.send_splits)
        return grad_rows, None
