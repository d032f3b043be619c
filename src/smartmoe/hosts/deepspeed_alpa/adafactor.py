"""Adafactor with a first moment, as the artifact used it."""

from __future__ import annotations

import torch


class MomentumAdafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern, 2018) with relative steps, parameter scaling, and momentum `beta1` of the update.

    Step t moves by max(1e-3, RMS(p)) * min(1e-2, 1 / sqrt(t)), whatever learning rate a schedule has: there is none to
    pass. Second moments decay by 1 - t^-0.8 and are factored over the last two dims of a parameter that has two or more;
    the update's RMS is limited to 1. With the defaults of torch-optimizer 0.3.0 as the artifact sets them. beta1 = 0 keeps
    no first moment.
    """

    def __init__(self, params, beta1: float = 0.9, weight_decay: float = 1e-2):
        super().__init__(params, {"beta1": beta1, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have gradients."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, self.state[param], group)
        return loss

    def _update(self, param, grad, state, group):
        if not state:
            state["step"] = 0
            for name, shape in _moment_shapes(param.shape, group["beta1"]).items():
                state[name] = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
        state["step"] += 1
        decay = 1.0 - state["step"] ** -0.8
        update = _normalised(grad, state, decay)
        size = _rms(param).clamp(min=1e-3) * min(1e-2, state["step"] ** -0.5)
        update.mul_(size / _rms(update).clamp(min=1.0))
        if group["beta1"]:
            update = state["first"].lerp_(update, 1.0 - group["beta1"])
        if group["weight_decay"]:
            param.mul_(1.0 - group["weight_decay"] * size)
        param.sub_(update)


def _moment_shapes(shape, beta1) -> dict[str, tuple]:
    first = {"first": shape} if beta1 else {}
    if len(shape) < 2:
        return {"second": shape, **first}
    return {"row": shape[:-1], "column": (*shape[:-2], shape[-1]), **first}


def _normalised(grad, state, decay):
    square = grad.square().add_(1e-30)
    if "second" in state:
        return state["second"].lerp_(square, 1.0 - decay).rsqrt() * grad
    row = state["row"].lerp_(square.mean(-1), 1.0 - decay)
    column = state["column"].lerp_(square.mean(-2), 1.0 - decay)
    return (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2) * grad


def _rms(tensor):
    return tensor.norm() / max(tensor.numel(), 1) ** 0.5
