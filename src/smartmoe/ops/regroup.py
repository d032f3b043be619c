"""Received rows lie by (source rank, slot); experts want them by (slot, source rank). This is the exchange of the
two."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowOrder:
    """A permutation of rows and its inverse, [R] int64 each; None = the identity."""

    source_R: torch.Tensor | None
    inverse_R: torch.Tensor | None


def order_by_slot(count_WL: torch.Tensor, num_rows: int) -> RowOrder:
    """The order that gathers each slot's rows, source ranks ascending.

    count_WL: [W, L] int64, rows received from each rank for each local slot, on the device of the rows; num_rows:
    their sum, known on the host. No host synchronisation.
    """
    if 1 in count_WL.shape:
        return RowOrder(None, None)
    flat = count_WL.reshape(-1)
    start_LW = (flat.cumsum(0) - flat).view(count_WL.shape).t().reshape(-1)
    length_LW = count_WL.t().reshape(-1)
    shift_LW = start_LW - (length_LW.cumsum(0) - length_LW)
    position_R = torch.arange(num_rows, device=flat.device)
    source_R = torch.repeat_interleave(shift_LW, length_LW, output_size=num_rows) + position_R
    inverse_R = torch.empty_like(source_R)
    inverse_R[source_R] = position_R
    return RowOrder(source_R, inverse_R)


def reorder(rows_RD: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """rows[source]; differentiable, the gradient is a gather by the inverse (no atomics)."""
    return rows_RD if order.source_R is None else _Reorder.apply(rows_RD, order.source_R, order.inverse_R)


def restore(rows_RD: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Undo `reorder`; differentiable."""
    return rows_RD if order.source_R is None else _Reorder.apply(rows_RD, order.inverse_R, order.source_R)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, source_R, inverse_R):
        ctx.inverse_R = inverse_R
        return rows_RD.index_select(0, source_R)

    @staticmethod
    def backward(ctx, grad_RD):
        return grad_RD.index_select(0, ctx.inverse_R), None, None
