"""Exchange without the host: ranks store tokens straight into the memory of the ranks that need them.

Every rank learns the whole routing with the tokens, so that nobody waits for counts: rows lie in a buffer of fixed size
and how many of them are in use stays on the device. Shape letters are those of `smartmoe.ops`, and N = tokens of all
ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from smartmoe.dispatch.transport import CollectiveTransport, LocalPlan, make_local_plan
from smartmoe.ops.all_to_all import group_size

_TRANSPORTS: dict[tuple, object] = {}


@dataclass
class Handle:
    """What combine needs to undo a dispatch. count_L: [L] int64 rows of each local slot, their sum may be less than R.

    weight_TK: the weights that dispatch was given; their gradient travels through this tensor.
    """

    transport: object
    slot_TK: torch.Tensor
    plan: LocalPlan | None = None
    weight_TK: torch.Tensor | None = None

    @property
    def count_L(self) -> torch.Tensor:
        return self.plan.count_L


class DirectDispatcher:
    """Each token travels once to every rank that hosts some of its experts, and one summed row returns.

    Collective over the group; no host synchronisation after the first call (which agrees on the largest number of
    tokens of a rank, allocates, and must not be captured in a CUDA graph). Every later call must have at most as many.

    row_factor: rows that a rank can take, in multiples of an even share, ceil(row_factor * C * K) (C = tokens a rank
    may have, K copies each), never more than all copies of all ranks. Memory grows with it, time hardly does: kernels look
    at the rows in use. In the paper's published routing trace (32 experts where they start) the fullest of 2 ranks has
    1.35 times the mean, of 4 ranks 2.06 times, of 8 ranks 3.42 times. A routing that needs more rows on any rank turns the
    output of that call into NaN on every rank, so that no step can use it, and the next call or `check` raises
    ValueError. num_ranks as row_factor can hold anything.

    On CUDA: symmetric memory of torch between GPUs that reach each other's memory (smartmoe.dispatch.symmetric). On a
    CPU: the same steps over collectives (smartmoe.dispatch.transport).
    """

    def __init__(self, ep_group, slots_per_rank: int, row_factor: float = 2.0, max_tokens: int | None = None):
        self.group, self.slots_per_rank, self.row_factor = ep_group, slots_per_rank, row_factor
        self.num_ranks, self.max_tokens = group_size(ep_group), max_tokens
        self._transport = None

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result up to the order of sums.

        Experts get all R rows and counts whose sum may be less: they must leave the rest alone. Where they read the
        counts on the host anyway (a CPU, or impl "loop") they get the used rows only.
        """
        rows_RD, handle = self.dispatch(x_TD, slot_TK, routing.weight_TK)
        if not rows_RD.is_cuda or getattr(experts, "impl", None) == "loop":
            rows_RD = rows_RD[: int(handle.plan.num_rows)]
        # this package's grouped experts do not keep their output, of others one cannot know
        reuse = rows_RD.is_cuda and getattr(experts, "impl", None) == "grouped" and not torch.compiler.is_compiling()
        return self.combine(experts(rows_RD, handle.count_L), handle, reuse)

    def dispatch(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor):
        """Send tokens, slots and weights.

        x_TD: [T, D]; slot_TK: [T, K] int64, -1 = dropped; weight_TK: [T, K] float32. Returns rows [R, D] sorted by local
        slot, inside a slot by (source rank, token, k), undefined from the sum of the counts on; and the handle for one
        `combine`. Collective, no host synchronisation.
        """
        transport = self._transport_for(x_TD, slot_TK)
        handle = Handle(transport, slot_TK.contiguous())
        copies = transport.capacity * slot_TK.shape[1]
        row_bound = min(math.ceil(self.row_factor * copies), self.num_ranks * copies)
        rows_RD, handle.weight_TK = _Dispatch.apply(x_TD, weight_TK, handle, row_bound)
        return rows_RD, handle

    def combine(self, rows_RD: torch.Tensor, handle: Handle, reuse: bool = False) -> torch.Tensor:
        """Bring the experts' rows back and sum them with the weights of the dispatch: returns [T, D]. Collective, no
        host synchronisation.

        reuse: in backward the gradient of rows_RD may take its place, where nobody else keeps it; a second backward pass
        through the same graph is then an error.
        """
        return _Combine.apply(rows_RD.contiguous(), handle.weight_TK, handle, reuse)

    @property
    def shared_bytes(self) -> int:
        """Memory of this rank that the others store into, once for all layers of the same sizes; 0 before the first call."""
        return 0 if self._transport is None else self._transport.shared_bytes

    def check(self) -> None:
        """Raise ValueError when a routing did not fit since the last check. Synchronises with the device."""
        if self._transport is not None:
            self._transport.wait()
            self._raise_alarm()

    def _raise_alarm(self):
        needed = int(self._transport.alarm[0])
        if needed:
            self._transport.alarm.zero_()
            raise ValueError(
                f"direct dispatcher: a routing needed {needed} rows on one rank, more than layer.row_factor = "
                f"{self.row_factor} leaves room for; that output is NaN. Raise layer.row_factor (up to {self.num_ranks}, "
                f'which can hold anything), or take layer.dispatcher = "basic"'
            )

    def _transport_for(self, x_TD, slot_TK):
        if self._transport is None:
            capacity = max(1, self.max_tokens or _largest(x_TD, self.group))
            self._transport = _shared_transport(self.group, self.slots_per_rank, capacity, x_TD, slot_TK.shape[1])
        self._raise_alarm()
        if x_TD.shape[0] > self._transport.capacity:
            raise ValueError(
                f"direct dispatcher: {x_TD.shape[0]} tokens, but its buffers were made for {self._transport.capacity}: "
                f"build it with max_tokens of the largest batch, or let the first call have the largest batch"
            )
        return self._transport


def _largest(x_TD, group) -> int:
    count = torch.tensor([x_TD.shape[0]], device=x_TD.device)
    if group_size(group) > 1:
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    return int(count)


def _shared_transport(group, slots_per_rank, capacity, x_TD, top_k):
    """One transport, and one set of buffers, for all layers of the same sizes; lives as long as the process."""
    key = (group, slots_per_rank, capacity, x_TD.shape[1], top_k, x_TD.dtype, x_TD.device)
    if key not in _TRANSPORTS:
        if x_TD.is_cuda:
            from smartmoe.dispatch.symmetric import SymmetricTransport

            _TRANSPORTS[key] = SymmetricTransport(group, slots_per_rank, capacity, x_TD, top_k)
        else:
            _TRANSPORTS[key] = CollectiveTransport(group, slots_per_rank, capacity)
    return _TRANSPORTS[key]


class _Dispatch(torch.autograd.Function):
    """Forward sends tokens; backward returns their gradients, and the weights' that `_Combine` sent on their way."""

    @staticmethod
    def forward(ctx, x_TD, weight_TK, handle, row_bound):
        transport = handle.transport
        arrivals = transport.send(x_TD.contiguous(), handle.slot_TK, weight_TK.detach().contiguous())
        handle.plan = make_local_plan(transport, arrivals, row_bound)
        ctx.transport = transport
        ctx.save_for_backward(handle.slot_TK, *handle.plan.tensors())
        return transport.gather(arrivals.tokens_ND, handle.plan), weight_TK.view_as(weight_TK)

    @staticmethod
    def backward(ctx, grad_RD, _):
        slot_TK, *tensors = ctx.saved_tensors
        grad_TD = ctx.transport.sum_back(grad_RD.contiguous(), LocalPlan(*tensors), slot_TK, weighted=False)
        grad_TK = ctx.transport.weight_grad(slot_TK) if ctx.needs_input_grad[1] else None
        return grad_TD, grad_TK, None, None


class _Combine(torch.autograd.Function):
    """Forward returns weighted sums; backward sends the gradient of the output to where the rows are."""

    @staticmethod
    def forward(ctx, rows_RD, weight_TK, handle, reuse):
        ctx.transport, ctx.reuse = handle.transport, reuse
        ctx.save_for_backward(rows_RD, weight_TK, handle.slot_TK, *handle.plan.tensors())
        return handle.transport.sum_back(rows_RD, handle.plan, handle.slot_TK, weighted=True)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_RD, weight_TK, slot_TK, *tensors = ctx.saved_tensors
        grad_ND = ctx.transport.push(grad_TD.contiguous(), slot_TK)
        grad_RD = ctx.transport.weigh(grad_ND, rows_RD, LocalPlan(*tensors), ctx.reuse)
        # The weights' gradients are on their way: _Dispatch.backward returns them, what stands here is not read.
        return grad_RD, weight_TK.detach() if ctx.needs_input_grad[1] else None, None, None
