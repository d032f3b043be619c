"""What ZeRO-2 and 3 keep on a rank and send in passes: the planner's view of parallel.zero_passes. Bytes everywhere."""

from __future__ import annotations

from smartmoe.config import ParallelPlan
from smartmoe.planner.parameters import Parameters

BUCKET_BYTES = 64 << 20  # parallel.zero: staged for one reduction, or as many as the largest parameter has
UNDER_WAY = 2  # parallel.zero_passes: buckets of gradients that travel at once


def _shared(mine: Parameters, plan: ParallelPlan) -> list[tuple[str, float, int, int]]:
    """(kind, numbers of parameters, ranks that have a copy of them, how far apart these are) of what is shared."""
    kinds = (
        ("dense", mine.dense, plan.stage_size, 1),
        ("tensor", mine.tensor, plan.dp, plan.tp),
        ("expert", mine.expert, plan.expert_dp, plan.ep),
    )
    return [each for each in kinds if each[1] and each[2] > 1]


def _in_passes(mine: Parameters, plan: ParallelPlan, zero: int, replicate: str) -> list[tuple[str, float, int, int]]:
    """Of these, those whose gradients are reduced in passes: not of experts whose copies (online.replicate) stay for steps."""
    return [each for each in _shared(mine, plan) if zero >= 2 and (each[0] != "expert" or replicate != "history")]


def _away(mine: Parameters, plan: ParallelPlan, zero: int, replicate: str) -> list[tuple[str, float, int, int]]:
    """Of these, those whose weights are gathered for passes: not of experts that have copies."""
    return [each for each in _shared(mine, plan) if zero == 3 and (each[0] != "expert" or replicate == "never")]


def kept_bytes(
    mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int, replicate: str = "never"
) -> tuple[float, float]:
    """(weights, float32 sums of gradients) that a rank keeps from one micro-batch to the next. With ZeRO-3 there are no weights
    beside the float32 masters, of which they are made."""
    weights = dtype_bytes * (mine.total - mine.router) + 4 * mine.router
    sums = 4 * mine.total
    for _, numel, num, _ in _in_passes(mine, plan, zero, replicate):
        sums -= 4 * numel * (1 - 1 / num)
    for kind, numel, _, _ in _away(mine, plan, zero, replicate):
        weights -= dtype_bytes * numel + (4 - dtype_bytes) * mine.router * (kind == "dense")
    return weights, sums


def pass_bytes(
    unit: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int, replicate: str = "never"
) -> float:
    """The most that a pass takes for a unit, a block for instance: its gradients whole, in float32 as nearly all are summed by
    the operations that compute them, what travels of them, and with ZeRO-3 the weights of this and of the next unit."""
    total = sum(numel for _, numel, _, _ in _in_passes(unit, plan, zero, replicate))
    away = sum(numel for _, numel, _, _ in _away(unit, plan, zero, replicate))
    staged = min(UNDER_WAY * max(BUCKET_BYTES, 4 * max(unit.largest, unit.largest_expert)), 4 * total)
    return 4 * total + staged + 2 * dtype_bytes * away


def pass_traffic(
    mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int, replicate: str = "never"
) -> list[tuple[float, int, int]]:
    """(bytes that a micro-batch sends round a ring, ranks of it, how far apart they are), by kind of parameter: float32
    gradients, and with ZeRO-3 weights for the forward and for the backward pass."""
    weights = {kind for kind, *_ in _away(mine, plan, zero, replicate)}
    return [
        (numel * (4 + 2 * dtype_bytes * (kind in weights)), num, stride)
        for kind, numel, num, stride in _in_passes(mine, plan, zero, replicate)
    ]


def step_traffic(
    mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int, replicate: str = "never"
) -> list[tuple[float, int, int]]:
    """The same of what is sent once a step, behind the passes: without ZeRO float32 gradients there and back, with ZeRO-1
    gradients, then weights, with ZeRO-2 weights."""
    in_passes = {kind for kind, *_ in _in_passes(mine, plan, zero, replicate)}
    away = {kind for kind, *_ in _away(mine, plan, zero, replicate)}
    found = []
    for kind, numel, num, stride in _shared(mine, plan):
        width = 4 * (kind not in in_passes) + (dtype_bytes * (kind not in away) if zero else 4)
        if width:
            found.append((width * numel, num, stride))
    return found
