"""What ZeRO-2 and 3 keep on a rank and send in passes: the planner's view of parallel.zero_passes. Bytes everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartmoe.config import ParallelPlan

if TYPE_CHECKING:
    from smartmoe.planner.memory import Parameters

BUCKET_BYTES = 64 << 20  # parallel.zero: staged for one reduction, or as many as the largest parameter has
UNDER_WAY = 2  # parallel.zero_passes: buckets of gradients that travel at once


def sharers(mine: Parameters, plan: ParallelPlan) -> tuple[tuple[float, int], ...]:
    """(numbers of parameters, ranks that have a copy of them) of dense, tensor-parallel and expert parameters."""
    return (mine.dense, plan.stage_size), (mine.tensor, plan.dp), (mine.expert, plan.expert_dp)


def kept_bytes(mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int, replicate: str = "never"):
    """(weights, float32 sums of gradients) that a rank keeps from one micro-batch to the next. Of what it shares ZeRO-2 keeps
    sums of its part, ZeRO-3 no weights either, as they are made of float32 masters; copies of experts (replicate, as
    online.replicate) keep their owners' weights whole, those that stay for steps their sums, too."""
    weights = dtype_bytes * (mine.total - mine.router) + 4 * mine.router
    sums = 4 * mine.total
    for numel, num in sharers(mine, plan):
        is_expert = numel is mine.expert
        if num > 1 and zero >= 2 and not (is_expert and replicate == "history"):
            sums -= 4 * numel * (1 - 1 / num)
        if num > 1 and zero == 3 and not (is_expert and replicate != "never"):
            weights -= dtype_bytes * numel
    if zero == 3 and plan.stage_size > 1:
        weights -= (4 - dtype_bytes) * mine.router
    return weights, sums


def pass_bytes(unit: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int) -> float:
    """The most that passes take for a unit, the largest of a model, at a time: its gradients whole, what travels of them, and
    with ZeRO-3 the weights of this and the next unit, of which one is still as it came."""
    shared = [(numel, num) for numel, num in sharers(unit, plan) if num > 1 and numel]
    if zero < 2 or not shared:
        return 0.0
    numel = sum(each for each, _ in shared)
    grads = dtype_bytes * (unit.total - unit.expert) + 4 * unit.expert * (plan.expert_dp > 1)
    staged = min(UNDER_WAY * max(BUCKET_BYTES, 4 * max(unit.largest, unit.largest_expert)), 4 * numel)
    return grads + staged + (3 * dtype_bytes * numel if zero == 3 else 0.0)


def pass_traffic(mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int) -> list[tuple[float, int, int]]:
    """(bytes that pass a rank's links for one micro-batch, ranks, how far apart) by kind of parameter: with ZeRO-2 float32
    gradients, with ZeRO-3 weights as well, for the forward and for the backward pass."""
    width = 0 if zero < 2 else 4 + 2 * dtype_bytes * (zero == 3)
    strides = (1, plan.tp, plan.ep)
    kinds = zip(sharers(mine, plan), strides, strict=True)
    return [(width * numel, num, stride) for (numel, num), stride in kinds if num > 1 and numel and width]
