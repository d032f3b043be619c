"""One step of AdamW on float32 masters that also scales the gradient and writes the weights in their compute precision.

On CUDA with Triton this is one pass, 30 bytes a parameter with 16-bit weights, where torch's fused AdamW, a pass that scales
gradients for clipping and one that converts the masters are 42.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from smartmoe.ops.extension import have_triton


@dataclass(frozen=True)
class Hyperparameters:
    """Of one step: lr, betas, eps and decoupled weight decay (Loshchilov and Hutter, ICLR 2019); step counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def can_fuse(master: torch.Tensor) -> bool:
    """Whether `adamw_` works on the device of these masters."""
    return master.is_cuda and have_triton()


def adamw_(master, grad, exp_avg, exp_avg_sq, weight: torch.Tensor | None, grad_scale: float, with_: Hyperparameters) -> None:
    """Update master, exp_avg and exp_avg_sq in place from grad * grad_scale, and write the new master into weight.

    master, grad, exp_avg, exp_avg_sq: float32, contiguous, on a CUDA device; weight: of any floating type, contiguous, as
    many numbers, or None. grad stays as it is.
    """
    from smartmoe.ops.adamw_kernels import update

    correction = math.sqrt(1 - with_.beta2**with_.step)
    rate = with_.lr / (1 - with_.beta1**with_.step)
    numbers = (grad_scale, rate, 1 - with_.lr * with_.weight_decay, with_.beta1, with_.beta2, with_.eps, 1 / correction)
    update(master, grad, exp_avg, exp_avg_sq, weight, *numbers)


def accumulate_(total: torch.Tensor, part: torch.Tensor, is_first: bool) -> None:
    """total += part, or total = part where it is the first (the old contents are not read). total: float32; part: of any
    floating type, the same shape; both contiguous."""
    if can_fuse(total) and part.dtype != torch.float32 and total.is_contiguous() and part.is_contiguous():
        from smartmoe.ops.adamw_kernels import accumulate

        accumulate(total, part, is_first)
    elif is_first:
        total.copy_(part)
    else:
        total.add_(part)
