"""Which plan is fastest: pools ranked by expected step time, with the 95th percentile beside it.

A plan's busiest stage alone bounds its time from below, and so does any one way through its schedule. Plans are judged in the
order of these bounds, the closer one of those that come first only, and the search ends when no bound can reach the list any
more: the list is that of judging all of them.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np

from smartmoe.config import ParallelPlan
from smartmoe.planner import pool as pools
from smartmoe.planner.copies import model_with_copies, with_copies
from smartmoe.planner.cost_model import CostModel, Estimate
from smartmoe.planner.pool import Candidate, Pool

SCORES = ("mean", "p95")
NUM_EVEN = 4  # trying one with copies takes longest of all that a search does


@dataclass(frozen=True)
class Result:
    """Best plans first. num_judged: how many of the pool's plans the bound did not settle."""

    ranked: list[Estimate]
    pool: Pool
    num_judged: int
    about: str


def search(
    cost: CostModel,
    num_gpus: int,
    top: int = 20,
    score: str = "mean",
    fixed_micro_batch: int | None = None,
    copies: bool = False,
) -> Result:
    """The `top` fastest plans of `num_gpus` ranks that fit in memory.

    copies: then each of them, and of the NUM_EVEN that would be fastest if routing were even, is tried with copies of its
    experts too, and the list ranked anew: what is slow for its skew alone may be fastest with copies.
    Raises ValueError when nothing is legal or nothing fits, with the reason of the plan that comes nearest.
    """
    if score not in SCORES:
        raise ValueError(f'score = "{score}" is not one of {", ".join(SCORES)}')
    pool = pools.build(cost, num_gpus, fixed_micro_batch)
    if not pool.fitting:
        nearest = min(pool.pruned, key=lambda pruned: pruned.candidate.memory.total)
        raise ValueError(
            f"no plan of {num_gpus} GPUs fits safely: of {pool.num_legal} legal ones {nearest.candidate.name} comes "
            f"nearest, but it {nearest.reason}"
        )
    ranked, num_judged = _best(cost, pool.fitting, top, score)
    if copies:
        value = functools.partial(value_of, score=score)
        even, num_more = _best(cost.data_insensitive(), pool.fitting, NUM_EVEN, score)
        known = {(e.plan, e.micro_batch) for e in ranked}
        ranked += [cost.estimate(e.plan, e.micro_batch) for e in even if (e.plan, e.micro_batch) not in known]
        ranked = sorted((with_copies(cost, e, value) for e in ranked), key=value)[:top]
        num_judged += num_more
    return Result(ranked, pool, num_judged, cost.loads.about)


def value_of(estimate: Estimate, score: str) -> float:
    return estimate.mean_ms if score == "mean" else estimate.p95_ms


def _best(cost: CostModel, fitting: list[Candidate], top: int, score: str) -> tuple[list[Estimate], int]:
    bound_of = functools.partial(cost.lower_bound_ms, p95=score == "p95")
    bounds = [(bound_of(c.plan, c.micro_batch), place, False) for place, c in enumerate(fitting)]
    heapq.heapify(bounds)
    found: list[tuple[float, int, Estimate]] = []
    num_judged = 0
    while bounds:
        bound, place, is_close = heapq.heappop(bounds)
        if len(found) >= top and bound > found[top - 1][0]:
            break
        candidate = fitting[place]
        if not is_close:
            heapq.heappush(bounds, (bound_of(candidate.plan, candidate.micro_batch, closely=True), place, True))
            continue
        estimate = cost.estimate(candidate.plan, candidate.micro_batch, candidate.memory)
        num_judged += 1
        found.append((value_of(estimate, score), place, estimate))
        found.sort(key=lambda item: item[:2])
        del found[top:]
    return [estimate for _, _, estimate in found], num_judged


# ---------------------------------------------------------------------------------------------------------------- words


def format_table(result: Result, limit: int = 20) -> str:
    """The ranked plans as a table."""
    pool = result.pool
    lines = [
        f"{pool.num_legal} legal plans, {pool.num_too_large} of them too large for the memory, "
        f"{len(pool.pruned) - pool.num_too_large} that may not fit; loads: {result.about}",
        f"{'#':>3s}  {'plan':34s} {'step ms':>10s} {'p95':>10s} {'tokens/s':>11s} {'GB':>6s} {'copies':>10s}  bottleneck",
    ]
    for place, estimate in enumerate(result.ranked[:limit], 1):
        name = pools.name_of(estimate.plan, estimate.micro_batch)
        share = estimate.parts[estimate.bottleneck] / estimate.mean_ms
        lines.append(
            f"{place:3d}  {name:34s} {estimate.mean_ms:10.1f} {estimate.p95_ms:10.1f} {estimate.tokens_per_s:11,.0f} "
            f"{estimate.memory.total / 1e9:6.1f} {estimate.copies or '-':>10s}  {estimate.bottleneck} {share:.0%}"
        )
    if any(estimate.copies for estimate in result.ranked[:limit]):
        lines.append("copies: online.replicate and online.replica_slots of the run, for hot experts; -: none would pay")
    return "\n".join(lines)


def find(cost: CostModel, result: Result, word: str, num_gpus: int) -> Estimate:
    """A row by its number in the table, or any plan by its name. Raises ValueError when it is no legal plan."""
    if word.isdigit():
        if not 1 <= int(word) <= len(result.ranked):
            raise ValueError(f"--explain {word}: the table has rows 1 .. {len(result.ranked)}")
        return result.ranked[int(word) - 1]
    return cost.estimate(*named(cost, word, num_gpus))


def named(cost: CostModel, word: str, num_gpus: int, option: str = "--explain") -> tuple[ParallelPlan, int]:
    """(plan, micro-batch) of a name given to `option`. Raises ValueError when it is no legal plan."""
    try:
        plan, micro_batch = pools.parse_name(word)
        reason = pools.why_illegal(cost.config, pools.cluster_of(cost.cluster, num_gpus), plan, micro_batch)
    except ValueError as error:
        raise ValueError(f"{option} {word}: {error}") from None
    if reason is not None:
        raise ValueError(f"{option} {word}: not a legal plan: {reason}")
    return plan, micro_batch


def words_of(estimate: Estimate) -> str:
    """A plan's name, and its copies where it has any."""
    name = pools.name_of(estimate.plan, estimate.micro_batch)
    return f"{name} + copies {estimate.copies}" if estimate.copies else name


def explain(cost: CostModel, one: Estimate, other: Estimate) -> str:
    """Why the one plan is faster than the other, part by part."""
    names = [words_of(e) for e in (one, other)]
    width = max(len(name) for name in names) + 2
    lines = [f"{'ms of a step':24s}" + "".join(f"{name:>{width}s}" for name in names) + f"{'difference':>12s}"]
    for part in sorted({*one.parts, *other.parts}, key=lambda p: (-abs(one.parts.get(p, 0) - other.parts.get(p, 0)), p)):
        pair = [e.parts.get(part, 0.0) for e in (one, other)]
        lines.append(f"{part:24s}" + "".join(f"{ms:{width}.1f}" for ms in pair) + f"{pair[1] - pair[0]:+12.1f}")
    totals = [e.mean_ms for e in (one, other)]
    lines.append(
        f"{'sum (mean)':24s}" + "".join(f"{ms:{width}.1f}" for ms in totals) + f"{totals[1] - totals[0]:+12.1f}"
    )
    for title, values in (
        ("p95", [e.p95_ms for e in (one, other)]),
        ("GB of the fullest rank", [e.memory.total / 1e9 for e in (one, other)]),
        ("fullest rank / mean rank", [imbalance(cost, e) for e in (one, other)]),
    ):
        lines.append(f"{title:24s}" + "".join(f"{value:{width}.2f}" for value in values))
    for name, estimate in zip(names, (one, other), strict=True):
        pruned = pools.left_out(cost, Candidate(estimate.plan, estimate.micro_batch, estimate.memory))
        if pruned:
            lines.append(f"{name} {pruned.reason}")
    faster = names[0] if totals[0] <= totals[1] else names[1]
    gaps = {p: other.parts.get(p, 0.0) - one.parts.get(p, 0.0) for p in {*one.parts, *other.parts}}
    sign = 1 if totals[1] >= totals[0] else -1
    why = sorted((p for p in gaps if gaps[p] * sign > 0), key=lambda p: -abs(gaps[p]))[:2]
    ratio = max(totals) / min(totals)
    lines.append(f"{faster} is {ratio:.2f} times as fast" + (f", mostly by its {' and '.join(why)}" if why else ""))
    return "\n".join(lines)


def imbalance(cost: CostModel, estimate: Estimate) -> float:
    """Load of the fullest rank of an expert group over the mean rank, mean over samples and layers."""
    if estimate.copies:
        cost = model_with_copies(cost, estimate)
    rows_SLW = cost.rows(estimate.plan, estimate.micro_batch)
    mean = rows_SLW.mean(-1)
    return float(np.where(mean > 0, rows_SLW.max(-1) / np.maximum(mean, 1e-12), 1.0).mean())
