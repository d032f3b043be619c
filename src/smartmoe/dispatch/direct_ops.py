"""The direct exchange as operations of torch, so that torch.compile keeps one graph through it.

Each of the four names its dispatcher by a number. Sizes that the dispatcher's first call agreed on are arguments, as a compiled
graph is kept on disk by its operations and their arguments: another program's would be of other sizes.
What they change beside their results (the peers' memory) is read by operations that need their results, so that their order
in a graph is the order of the exchange. Shape letters are those of `smartmoe.dispatch.transport`.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from smartmoe.dispatch.transport import LocalPlan, make_local_plan
from smartmoe.ops.library import register

_DISPATCHERS: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_PLAN = "Tensor slot_TK, Tensor row_NK, Tensor copy_R, Tensor weight_NK, Tensor count_L, Tensor sizes, int dispatcher"


def number_of(dispatcher) -> int:
    """A number by which the operations find `dispatcher` as long as it lives."""
    number = next(_NUMBERS)
    _DISPATCHERS[number] = dispatcher
    return number


def _plan(row_NK, copy_R, weight_NK, count_L, sizes) -> LocalPlan:
    return LocalPlan(row_NK, copy_R, weight_NK, count_L, sizes[:1], sizes[1:])


def _sender(dispatcher, x_TD):
    owner = _DISPATCHERS[dispatcher]
    owner.check_tokens(x_TD.shape[0])
    return owner.transport


def _run_dispatch(x_TD, slot_TK, weight_TK, dispatcher, row_bound, num_tokens, num_slots):
    transport, x_TD = _sender(dispatcher, x_TD), x_TD.contiguous()
    plan = make_local_plan(transport, *transport.announce(slot_TK, weight_TK.contiguous()), row_bound)
    row_NK, copy_R, weight_NK, count_L, num_rows, num_needed = plan.tensors()
    assert (num_tokens, num_slots) == (len(row_NK), len(count_L)), "not the sizes that the dispatcher agreed on"
    rows_RD = transport.bring(x_TD, slot_TK, plan)
    return rows_RD, row_NK, copy_R, weight_NK, count_L, torch.cat([num_rows, num_needed])


def _fake_dispatch(x_TD, slot_TK, weight_TK, dispatcher, row_bound, num_tokens, num_slots):
    _sender(dispatcher, x_TD)  # says what is wrong with a call while it is compiled
    top_k = slot_TK.shape[1]
    return (
        x_TD.new_empty(row_bound, x_TD.shape[1]),
        slot_TK.new_empty(num_tokens, top_k),
        slot_TK.new_empty(row_bound),
        weight_TK.new_empty(num_tokens, top_k),
        slot_TK.new_empty(num_slots),
        slot_TK.new_empty(2, dtype=torch.int32),
    )


def _setup_dispatch(ctx, inputs, output):
    _, slot_TK, _, ctx.dispatcher, *_ = inputs
    ctx.save_for_backward(slot_TK, *output[1:])


def _dispatch_gradients(ctx, grad_RD, *_):
    slot_TK, *plan = ctx.saved_tensors
    grad_TD, grad_TK = _return(grad_RD, slot_TK, *plan, ctx.dispatcher)
    return grad_TD, None, grad_TK, *[None] * 4


def _run_return(grad_RD, slot_TK, row_NK, copy_R, weight_NK, count_L, sizes, dispatcher):
    transport = _DISPATCHERS[dispatcher].transport
    plan, grad_TK = _plan(row_NK, copy_R, weight_NK, count_L, sizes), weight_NK.new_empty(slot_TK.shape)
    return transport.sum_back(grad_RD.contiguous(), plan, slot_TK, grad_TK=grad_TK), grad_TK


def _run_combine(rows_RD, slot_TK, row_NK, copy_R, weight_NK, count_L, sizes, dispatcher):
    owner = _DISPATCHERS[dispatcher]
    plan = _plan(row_NK, copy_R, weight_NK, count_L, sizes)
    return owner.transport.sum_back(rows_RD.contiguous(), plan, slot_TK, owner.told)


def _setup_combine(ctx, inputs, output):
    *tensors, ctx.dispatcher = inputs
    ctx.save_for_backward(*tensors)


def _combine_gradients(ctx, grad_TD):
    return _weigh(grad_TD, *ctx.saved_tensors, ctx.dispatcher), *[None] * 7


def _run_weigh(grad_TD, rows_RD, slot_TK, row_NK, copy_R, weight_NK, count_L, sizes, dispatcher):
    transport = _DISPATCHERS[dispatcher].transport
    plan = _plan(row_NK, copy_R, weight_NK, count_L, sizes)
    return transport.weigh(grad_TD.contiguous(), slot_TK, rows_RD.contiguous(), plan)


def _fake_sum(rows_RD, slot_TK):
    return rows_RD.new_empty(slot_TK.shape[0], rows_RD.shape[1])


dispatch = register(
    "direct_dispatch(Tensor x_TD, Tensor slot_TK, Tensor weight_TK, int dispatcher, int row_bound, "
    "int num_tokens, int num_slots) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_dispatch,
    _fake_dispatch,
    backward=_dispatch_gradients,
    setup=_setup_dispatch,
)
_return = register(
    f"direct_return(Tensor grad_RD, {_PLAN}) -> (Tensor, Tensor)",
    _run_return,
    lambda grad_RD, slot_TK, row_NK, copy_R, weight_NK, *_: (
        _fake_sum(grad_RD, slot_TK),
        weight_NK.new_empty(slot_TK.shape),
    ),
)
combine = register(
    f"direct_combine(Tensor rows_RD, {_PLAN}) -> Tensor",
    _run_combine,
    lambda rows_RD, slot_TK, *_: _fake_sum(rows_RD, slot_TK),
    backward=_combine_gradients,
    setup=_setup_combine,
)
_weigh = register(
    f"direct_weigh(Tensor grad_TD, Tensor rows_RD, {_PLAN}) -> Tensor",
    _run_weigh,
    lambda grad_TD, rows_RD, *_: rows_RD.new_empty(rows_RD.shape),
)
