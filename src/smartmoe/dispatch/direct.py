"""Exchange without the host: ranks store tokens straight into the memory of the ranks that need them.

Every rank learns the whole routing with the tokens, so that nobody waits for counts: rows lie in a buffer of fixed size
and how many of them are in use stays on the device. Shape letters are those of `smartmoe.ops`, and N = tokens of all
ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from smartmoe.dispatch import direct_ops
from smartmoe.dispatch.transport import CollectiveTransport, LocalPlan, Told, make_local_plan
from smartmoe.ops.all_to_all import group_size
from smartmoe.ops.plan import count_slots

_TRANSPORTS: dict[tuple, object] = {}
_TAKE_ROOM: ContextVar[Callable[[int], int]] = ContextVar("rows to make of those that a dispatcher would", default=int)
_STEPS_PER_SHARE = 64  # the number of rows grows by such a part of an even share, so that it seldom changes
_log = logging.getLogger(__name__)


@dataclass
class Handle:
    """What combine needs to undo a dispatch. count_L: [L] int64 rows of each local slot, their sum may be less than R.

    weight_TK: the weights that dispatch was given; their gradient travels through this tensor.
    """

    transport: object
    slot_TK: torch.Tensor
    told: Told
    plan: LocalPlan | None = None
    weight_TK: torch.Tensor | None = None

    @property
    def count_L(self) -> torch.Tensor:
        return self.plan.count_L


class CompiledHandle(NamedTuple):
    """The same inside torch.compile, as operations take it; sizes: [2] int32, num_rows and num_needed of the plan."""

    slot_TK: torch.Tensor
    row_NK: torch.Tensor
    copy_R: torch.Tensor
    weight_NK: torch.Tensor
    count_L: torch.Tensor
    sizes: torch.Tensor


def same_room() -> tuple[AbstractContextManager, AbstractContextManager]:
    """A context for a forward pass and one for its repetition in the backward pass: the calls of dispatchers inside have the
    same number of rows both times, which torch.utils.checkpoint insists on, whatever was learnt between. Its context_fn."""
    num_rows: list[int] = []
    return _Room(num_rows, repeats=False), _Room(num_rows, repeats=True)


class _Room(AbstractContextManager):
    def __init__(self, num_rows: list[int], repeats: bool):
        self._num_rows, self._repeats = num_rows, repeats

    def __enter__(self):
        earlier, outer = iter(tuple(self._num_rows)), _TAKE_ROOM.get()

        def note(wanted: int) -> int:
            self._num_rows.append(outer(wanted))
            return self._num_rows[-1]

        self._token = _TAKE_ROOM.set((lambda wanted: next(earlier)) if self._repeats else note)

    def __exit__(self, *error):
        _TAKE_ROOM.reset(self._token)


class DirectDispatcher:
    """Each token travels once to every rank that hosts some of its experts, and one summed row returns.

    Collective over the group. The first call agrees on the largest number of tokens of a rank and allocates; it must not be
    captured in a CUDA graph, and every later call must have at most as many tokens. The first `num_careful` calls also
    ask how many rows their routing needs before they make room, so that the host waits; after them it never does.

    row_factor: room for rows of the experts on a rank, in multiples of the most that any routing so far needed on the
    fullest rank, an even share at least, and never more than all copies of all ranks. Every call tells all hosts what it
    needed and they learn it without waiting, so the room follows the routing and memory is what the fullest rank needs and
    row_factor on top, not what could happen. It never shrinks. num_ranks as row_factor has room for anything from the
    start, and no call but the first waits.

    A routing that needs more than there is room for turns the output of that call into NaN on every rank, so that no step
    can use it, and later calls have the room that it needed. `overflow` says so, and whoever asks it after each
    optimizer step that a NaN prevented can set `waits_to_be_asked` and repeat the step, as the trainer does. Otherwise the
    next call or `check` raises ValueError. In the published routing trace (250 of 2,491 iterations, 24 layers, experts in
    order on 2, 4 or 8 ranks) row_factor 1.125 would run out of room in 5 to 7 recorded iterations, all before iteration
    170, where calls are still careful; a fixed room of twice an even share would in 249 on 4 and on 8 ranks. A CUDA graph
    keeps the room it was captured with. A pass that is repeated in the backward pass learns nothing; where other passes stand
    between the two, as in a pipeline, torch.utils.checkpoint needs `same_room` as its context_fn.

    Inside torch.compile the four steps of an exchange are operations (dispatch.direct_ops) in one graph. The first call must
    be made outside of it. There, nothing is raised and the room stays as it is until `check` or `overflow` is called:
    after every step; a graph is compiled anew when the room has grown.

    On CUDA: symmetric memory of torch between GPUs that reach each other's memory (smartmoe.dispatch.symmetric). On a
    CPU: the same steps over collectives (smartmoe.dispatch.transport).
    """

    waits_to_be_asked = False
    num_careful = 256

    def __init__(self, ep_group, slots_per_rank: int, row_factor: float = 1.125, max_tokens: int | None = None):
        self.group, self.slots_per_rank, self.row_factor = ep_group, slots_per_rank, row_factor
        self.num_ranks, self.max_tokens = group_size(ep_group), max_tokens
        self.transport, self.told = None, None
        self._number = direct_ops.number_of(self)
        self._capacity = self._most_needed = self._num_rows = self._num_calls = 0

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result up to the order of sums.

        Experts get all R rows and counts whose sum may be less: they must leave the rest alone. Where they read the
        counts on the host anyway (a CPU, or impl "loop") they get the used rows only.
        """
        rows_RD, handle = self.dispatch(x_TD, slot_TK, routing.weight_TK)
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and (not rows_RD.is_cuda or getattr(experts, "impl", None) == "loop"):
            rows_RD = rows_RD[: int(handle.plan.num_rows)]
        # this package's grouped experts do not keep their output, of others one cannot know
        reuse = rows_RD.is_cuda and getattr(experts, "impl", None) == "grouped" and not is_compiling
        return self.combine(experts(rows_RD, handle.count_L), handle, reuse)

    def dispatch(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor):
        """Send tokens, slots and weights.

        x_TD: [T, D]; slot_TK: [T, K] int64, -1 = dropped; weight_TK: [T, K] float32. Returns rows [R, D] sorted by local
        slot, inside a slot by (source rank, token, k), undefined from the sum of the counts on; and the handle for one
        `combine`. Collective, no host synchronisation.
        """
        if torch.compiler.is_compiling():
            slot_TK = slot_TK.contiguous()
            sizes = self._num_rows, self.num_ranks * self._capacity, self.slots_per_rank
            rows_RD, *tensors = direct_ops.dispatch(x_TD, slot_TK, weight_TK, self._number, *sizes)
            return rows_RD, CompiledHandle(slot_TK, *tensors)
        transport = self._transport_for(x_TD, slot_TK, weight_TK)
        handle = Handle(transport, slot_TK.contiguous(), self.told)
        rows_RD, handle.weight_TK = _Dispatch.apply(x_TD, weight_TK, handle, _TAKE_ROOM.get()(self._num_rows))
        return rows_RD, handle

    def combine(self, rows_RD: torch.Tensor, handle: Handle, reuse: bool = False) -> torch.Tensor:
        """Bring the experts' rows back and sum them with the weights of the dispatch: returns [T, D]. Collective, no
        host synchronisation.

        reuse: in backward the gradient of rows_RD may take its place, where nobody else keeps it; a second backward pass
        through the same graph is then an error.
        """
        if torch.compiler.is_compiling():
            return direct_ops.combine(rows_RD, *handle, self._number)
        return _Combine.apply(rows_RD.contiguous(), handle.weight_TK, handle, reuse)

    @property
    def shared_bytes(self) -> int:
        """Memory of this rank that the others store into, once for all layers of the same sizes; 0 before the first call."""
        return 0 if self.transport is None else self.transport.shared_bytes

    @property
    def is_settled(self) -> bool:
        """Whether the calls from now on are alike: none agrees with other ranks on sizes or asks how many rows it needs."""
        return self.transport is not None and (
            self._num_calls >= self.num_careful or self.row_factor >= self.num_ranks
        )

    @property
    def num_rows(self) -> int:
        """Rows that the last call made room for; 0 before the first."""
        return self._num_rows

    def outgrows(self, num_rows: int) -> bool:
        """Whether some routing, as far as it is known here, came within half the margin of `row_factor` to so many rows,
        and later calls have more: then a graph that was captured with them should be captured anew. Does not wait."""
        self._make_room()
        return num_rows < min(self._num_rows, self._most_needed * (1 + self.row_factor) / 2)

    def overflow(self) -> int:
        """Rows that a routing needed on the fullest rank and did not find since the last question, 0 = all calls had
        room. The next call has it. Synchronises with the device; the same on every rank of the group."""
        if self.transport is None:
            return 0
        self.transport.wait()
        self._make_room()
        needed = int(self.told.on_host[0])
        self.told.on_host[0] = 0
        return needed

    def check(self) -> None:
        """Raise ValueError when a routing did not fit since the last check. Synchronises with the device."""
        needed = self.overflow()
        if needed:
            self._raise_overflow(needed)

    def _raise_overflow(self, needed):
        raise ValueError(
            f"direct dispatcher: a routing needed {needed} rows on one rank, more than there was room for with "
            f"layer.row_factor = {self.row_factor}; that output is NaN. End the run, since other ranks may hear of it in "
            f"another call. A loop that drops steps whose gradients are not finite may set waits_to_be_asked and go on, as the "
            f"next call has room. Or raise layer.row_factor (up to {self.num_ranks}, which has room for anything), or take "
            f'layer.dispatcher = "basic"'
        )

    def _transport_for(self, x_TD, slot_TK, weight_TK):
        if self.transport is None:
            self._first_call(x_TD, slot_TK)
        if not self._num_rows or torch._C._current_graph_task_id() == -1:  # -1: not inside a backward pass
            self._num_calls += 1
            if self._is_careful(x_TD):
                self._most_needed = max(self._most_needed, self._rows_needed(slot_TK, weight_TK))
            self._make_room()
        if self._num_calls > 1:
            needed = int(self.told.on_host[0])
            if needed and not self.waits_to_be_asked:
                self.told.on_host[0] = 0
                self._raise_overflow(needed)
        self.check_tokens(x_TD.shape[0])
        return self.transport

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ValueError when so many tokens have no room in the buffers of this rank, or there are none yet."""
        if not self._capacity:
            raise ValueError(
                "direct dispatcher: its first call, which agrees with the other ranks on sizes, is inside torch.compile: call "
                "it once without, with the largest batch"
            )
        if num_tokens > self._capacity:
            raise ValueError(
                f"direct dispatcher: {int(num_tokens)} tokens, but its buffers were made for {self._capacity}: "
                f"build it with max_tokens of the largest batch, or let the first call have the largest batch"
            )

    def _first_call(self, x_TD, slot_TK):
        num_tokens = torch.tensor([x_TD.shape[0]], device=x_TD.device)
        if self.num_ranks > 1:
            dist.all_reduce(num_tokens, op=dist.ReduceOp.MAX, group=self.group)
        self._capacity = max(1, self.max_tokens or int(num_tokens))
        self.transport = _shared_transport(self.group, self.slots_per_rank, self._capacity, x_TD, slot_TK.shape[1])
        self._even_share, self.told = self._capacity * slot_TK.shape[1], self.transport.new_told()

    def _is_careful(self, x_TD) -> bool:
        if self._num_calls > self.num_careful or self.row_factor >= self.num_ranks:
            return False
        return not (x_TD.is_cuda and torch.cuda.is_current_stream_capturing())

    def _rows_needed(self, slot_TK, weight_TK) -> int:
        """Rows that this routing needs on the fullest rank. Collective, synchronises with the host."""
        is_odd_TK = weight_TK.detach().isnan()
        rank_TK = slot_TK.div(self.slots_per_rank, rounding_mode="floor").masked_fill(is_odd_TK, -1)
        num_rows_W = count_slots(rank_TK, self.num_ranks)
        dist.all_reduce(num_rows_W, group=self.group)
        return int(num_rows_W.max())

    def _make_room(self):
        """Take in what the calls so far have told, as far as it is known here, and set the rows of the next."""
        self._most_needed = max(self._most_needed, *self.told.on_host.tolist())
        wanted, step = self.row_factor * max(self._most_needed, self._even_share), -(-self._even_share // _STEPS_PER_SHARE)
        num_rows = min(math.ceil(wanted / step) * step, self.num_ranks * self._even_share)
        if self._num_rows and num_rows > self._num_rows:
            share = num_rows / self._even_share
            _log.info("direct dispatcher: room for %d rows from now on, %.2f of an even share", num_rows, share)
        self._num_rows = max(self._num_rows, num_rows)


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
        x_TD = x_TD.contiguous()
        announced = transport.announce(handle.slot_TK, weight_TK.detach().contiguous())
        handle.plan = make_local_plan(transport, *announced, row_bound)
        ctx.transport = transport
        ctx.save_for_backward(handle.slot_TK, *handle.plan.tensors())
        return transport.bring(x_TD, handle.slot_TK, handle.plan), weight_TK.view_as(weight_TK)

    @staticmethod
    def backward(ctx, grad_RD, _):
        slot_TK, *tensors = ctx.saved_tensors
        plan = LocalPlan(*tensors)
        grad_TK = plan.weight_NK.new_empty(slot_TK.shape) if ctx.needs_input_grad[1] else None
        grad_TD = ctx.transport.sum_back(grad_RD.contiguous(), plan, slot_TK, grad_TK=grad_TK)
        return grad_TD, grad_TK, None, None


class _Combine(torch.autograd.Function):
    """Forward returns weighted sums; backward sends the gradient of the output to where the rows are."""

    @staticmethod
    def forward(ctx, rows_RD, weight_TK, handle, reuse):
        ctx.transport, ctx.reuse = handle.transport, reuse
        ctx.save_for_backward(rows_RD, weight_TK, handle.slot_TK, *handle.plan.tensors())
        return handle.transport.sum_back(rows_RD, handle.plan, handle.slot_TK, handle.told)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_RD, weight_TK, slot_TK, *tensors = ctx.saved_tensors
        grad_RD = ctx.transport.weigh(grad_TD.contiguous(), slot_TK, rows_RD, LocalPlan(*tensors), ctx.reuse)
        # The weights' gradients are on their way: _Dispatch.backward returns them, what stands here is not read.
        return grad_RD, weight_TK.detach() if ctx.needs_input_grad[1] else None, None, None
