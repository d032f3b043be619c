"""Sums over the parts of two weights' gradients, straight into where those are summed over micro-batches.

A kernel whose blocks each see some tokens leaves a row of float32 parts for each block; one more kernel sums the rows and
writes, or adds to, the weights' sinks (ops.grad_sink), where a sum, a conversion and two additions would follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smartmoe.ops.grad_sink import GradSink


def sum_parts(
    part_PN: torch.Tensor, weights: Sequence[torch.Tensor], sinks: Sequence[GradSink | None]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sum part_PN [P, N] float32 over P: its columns are the gradients of two weights, of N numbers together, one behind the
    other. Each goes to its weight's sink, and is None here, or without a sink is returned in the weight's shape and dtype.
    The order of the sums depends on P alone. Needs Triton, and a GPU.
    """
    from smartmoe.ops.part_sums_kernels import sum_parts as run

    targets = [
        (torch.empty_like(weight), True) if sink is None else sink.take()
        for weight, sink in zip(weights, sinks, strict=True)
    ]
    run(part_PN, *targets)
    return tuple(total if sink is None else None for (total, _), sink in zip(targets, sinks, strict=True))
