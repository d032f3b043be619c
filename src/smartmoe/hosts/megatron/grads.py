"""Gradients of SmartMoE's experts straight into Megatron's sums: what Megatron calls gradient accumulation fusion, for which
its own layers need Apex or Transformer Engine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class MainGrad:
    """A parameter's `grad_sink` (ops.grad_sink): its `main_grad`, part of a buffer that Megatron clears before each step."""

    is_urgent, held_G, may_end_late = False, None, False

    def __init__(self, param: torch.nn.Parameter):
        self._param = weakref.proxy(param)

    def take(self) -> tuple[torch.Tensor, bool]:
        """(the sum, False): every gradient is added."""
        return self._param.main_grad, False

    def keep(self, rest: torch.Tensor) -> None:
        """Never asked: the sum is as long as the parameter."""
        raise ValueError(f"gradients of {rest.shape[0]} more experts than the parameter has")


def sum_in_main_grads(params: Iterable[torch.nn.Parameter]) -> None:
    """Have the operations that compute gradients of `params` add them to Megatron's float32 sums, where there are such:
    autograd then gets none, and Megatron's hooks find nothing to add. Not for --overlap-grad-reduce, whose hooks insist on a
    gradient."""
    for param in params:
        total = getattr(param, "main_grad", None)
        if total is not None and total.dtype == torch.float32 and total.is_contiguous():
            param.grad_sink = MainGrad(param)
