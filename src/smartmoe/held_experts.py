"""The experts of a layer, replicas included, in one forward and backward pass.

Layer 4. What dispatchers call instead of the layer's experts where there are replica slots: it has weights sent before they
are used and gradients returned when they are known, by a `replicas.Replication`. Gradients of owners may be sums that
operations add to themselves (ops.grad_sink). Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from smartmoe.ops.adamw import accumulate_
from smartmoe.ops.grad_sink import GradSink, sink_of
from smartmoe.replicas import Replication


class HeldExperts:
    """The experts of a layer, replicas included, as one forward pass of a micro-batch uses them: what dispatchers call.

    Made before the dispatch, so that weights can travel while tokens do.
    """

    def __init__(self, experts, replication: Replication, plan: Any):
        self.impl = experts.impl
        self._experts, self._replication, self._plan = experts, replication, plan
        if not replication.follows_tokens:
            replication.send_weights(plan)
        params = [param for param in experts.weights() if param is not None]
        self._gradients = _Gradients(replication, plan, params)
        self._owned, self._weights = _Owned.apply(self._gradients, *params), None

    def __call__(self, rows_RD: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
        """As Experts.forward, with counts of L + G slots."""
        if self._weights is None:  # made behind the dispatch, so that in backward gradients leave before it
            if self._replication.follows_tokens:
                self._replication.send_weights(self._plan)
            whole = _Storages.apply(self._gradients, self._experts.storages, *self._owned)
            for weight, sink in zip(whole, self._gradients.sinks, strict=True):
                weight.grad_sink = sink
            taken = iter(whole)
            self._weights = tuple(None if param is None else next(taken) for param in self._experts.weights())
        late = self._replication.late_slots() if rows_RD.is_cuda and self.impl == "grouped" else None
        if late is None or torch.compiler.is_compiling():
            self._replication.wait_weights()
        else:
            self._weights[0].late_slots = late
        self._gradients.num_uses += 1
        out_RD = self._experts.compute(rows_RD, count_L, self._weights)
        return _OnBackward.apply(out_RD, self._plan.slot_TK, self._replication.wait_weights)

    def finish(self, y_TD: torch.Tensor) -> torch.Tensor:
        """To be called on the layer's output: its backward pass begins with the weights that its forward pass used."""
        return _OnBackward.apply(y_TD, self._plan.slot_TK, partial(self._replication.restore_weights, self._plan))


class _Gradients:
    """The gradients of all storages in one pass: sinks that operations may fill, and what autograd brings."""

    def __init__(self, replication: Replication, plan: Any, params: Sequence[torch.Tensor]):
        self._replication, self._plan, self.num_uses = replication, plan, 0
        self.num_owned, self._ends_late = params[0].shape[0], False
        traits = {"is_urgent": replication.is_early, "held_G": plan.held_G}
        self.sinks = [_Sink(self, sink_of(param), **traits) for param in params]

    def return_early(self) -> None:
        """Return what operations have given, where that pays: when they have given the first storage's, the last to come.
        So there is one journey a pass, beside the product that follows."""
        given = {number: sink for number, sink in enumerate(self.sinks) if sink.is_given and not sink.is_returned}
        if self._replication.is_early and 0 in given:
            pairs = {number: sink.pair(self.num_owned) for number, sink in given.items()}
            self._replication.return_grads(self._plan, pairs)
            for sink in given.values():
                sink.is_returned = True

    def complete(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return what has not been; grads are autograd's. Gives the gradients of the parameters that are in no sink."""
        late, owned = {}, []
        self._ends_late = self._replication.is_early and all(sink.may_end_late for sink in self.sinks)
        for number, (sink, grad) in enumerate(zip(self.sinks, grads, strict=True)):
            pair = sink.settle(grad, self.num_owned, self._ends_late)
            if pair is not None and not sink.is_returned:
                late[number] = pair
            owned.append(None if pair is None or sink.total is not None else pair[0])
        if late:
            self._replication.return_grads(self._plan, late)
        return owned

    def wait(self) -> None:
        """What is launched from now on reads whole gradients, or, where these are in sums that nobody reads before, what is
        launched behind the backward pass: the journey ends beside attention's part of it. Those of replicas are no longer
        needed."""
        if self._ends_late:
            self._replication.leave_grads((self._plan, [sink.pair(self.num_owned) for sink in self.sinks]))
        else:
            self._replication.wait_grads()
        for sink in self.sinks:
            sink.forget()


class _Sink:
    """Takes the gradient of one storage from operations (ops.grad_sink): that of owned slots goes into the parameter's own
    sink, where it has one, and that of replicas leaves as soon as the last use of the storage has given it."""

    def __init__(
        self,
        gradients: _Gradients,
        owners_sink: GradSink | None,
        *,
        is_urgent: bool,
        held_G: torch.Tensor | None,
    ):
        self._gradients, self._owners_sink = weakref.proxy(gradients), owners_sink
        self.is_urgent, self.held_G = is_urgent, held_G
        self.may_end_late = owners_sink is not None and owners_sink.may_end_late
        self.forget()

    def forget(self) -> None:
        self.total, self._kept, self._num_given, self.is_returned = None, None, 0, False

    @property
    def is_given(self) -> bool:
        """Whether all uses of the storage have given their gradients."""
        return 0 < self._num_given == self._gradients.num_uses

    def take(self) -> tuple[torch.Tensor | None, bool]:
        if self._owners_sink is None:
            return None, False
        self.total, is_first = self._owners_sink.take()
        return self.total, is_first

    def keep(self, rest: torch.Tensor) -> None:
        self._kept = rest if self._kept is None else self._kept.add_(rest)
        self._num_given += 1
        if self.is_given:
            self._gradients.return_early()

    def pair(self, num_owned: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As Replication.return_grads takes it; None = there is no gradient."""
        if self._kept is None:
            return None
        return (self._kept[:num_owned], self._kept[num_owned:]) if self.total is None else (self.total, self._kept)

    def settle(
        self, grad: torch.Tensor | None, num_owned: int, into_sum: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same, when autograd has brought `grad` [L + G, ...], or nothing. into_sum: the owners' part goes there now."""
        if grad is not None:
            self._kept = grad.contiguous()  # nobody else sees it: it is summed here, over all uses in the pass
        if grad is not None and into_sum:
            total, is_first = self.take()
            accumulate_(total, self._kept[:num_owned], is_first)
            self._kept = self._kept[num_owned:]
        return self.pair(num_owned)


class _Owned(torch.autograd.Function):
    """The identity on the parameters; its backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx, gradients, *params):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx, *grads):
        ctx.gradients.wait()
        return None, *grads


class _Storages(torch.autograd.Function):
    """The whole storages as functions of the parameters, which are their owned parts.

    Each pass sees the memory through tensors of its own: filling replica slots for another micro-batch must not count as
    a change of what this one saved, since its backward pass restores them.
    """

    @staticmethod
    def forward(ctx, gradients, storages, *params):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(storage.data for storage in storages)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.gradients.complete(grads)


class _OnBackward(torch.autograd.Function):
    """The identity; its backward pass begins with `action`."""

    @staticmethod
    def forward(ctx, rows, marker, action):
        ctx.action = action
        ctx.save_for_backward(marker)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018 - asking for them makes a recomputed block run again, before the action
        ctx.action()
        return grad, None, None
