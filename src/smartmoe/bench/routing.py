"""Routings that benchmarks hold fixed: balanced, Zipf, or as recorded in a trace.

A routing is named in one word: "balanced"; "zipf" or "zipf=EXPONENT"; "trace=FILE:ITERATION:LAYER".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from smartmoe.gates import scale_counts
from smartmoe.trace import ExpertTrace, read_trace

ZIPF_EXPONENT = 0.8
_REPAIR_ROUNDS = 100


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """A parsed name. `path`, `iteration` and `layer_idx` belong to a trace, `exponent` to Zipf (0 = balanced)."""

    label: str
    exponent: float = 0.0
    path: str | None = None
    iteration: int = 0
    layer_idx: int = 0


def parse(text: str) -> RoutingSpec:
    """Raises ValueError naming the forms that exist."""
    kind, _, rest = text.partition("=")
    try:
        if text == "balanced":
            return RoutingSpec(label="balanced")
        if kind == "zipf":
            exponent = float(rest) if rest else ZIPF_EXPONENT
            if not 0 <= exponent <= 100:
                raise ValueError("the exponent lies in 0 .. 100")
            return RoutingSpec(label=f"zipf {exponent:g}", exponent=exponent)
        if kind == "trace":
            path, iteration, layer = rest.rsplit(":", 2)
            label = f"it {int(iteration)} L{int(layer)}"
            return RoutingSpec(label=label, path=path, iteration=int(iteration), layer_idx=int(layer))
    except ValueError as error:
        raise ValueError(f'routing "{text}": {error}; expected zipf=EXPONENT or trace=FILE:ITERATION:LAYER') from None
    raise ValueError(f'routing "{text}" is not one of balanced, zipf, zipf=EXPONENT, trace=FILE:ITERATION:LAYER')


def draw(spec: RoutingSpec, num_tokens: int, num_experts: int, top_k: int, ep_rank: int, seed: int) -> np.ndarray:
    """[T, K] int64, distinct experts for each token of one rank; equal arguments, equal routing.

    balanced: uniform, so experts differ by chance as they would after a perfect gate. zipf: drawn without replacement
    with probabilities 1 / place^exponent, the same places on all ranks. trace: the counts of that iteration, layer and
    rank, first micro-batch, scaled to T * K copies (to T where an expert would get more); ranks beyond the trace start
    over. Raises ValueError when the trace does not fit.
    """
    rng = np.random.default_rng([seed, ep_rank])
    if spec.path is None:
        place_E = np.random.default_rng(seed).permutation(num_experts) + 1.0
        # the largest of log p + Gumbel noise are a draw without replacement
        score_TE = rng.gumbel(size=(num_tokens, num_experts)) - spec.exponent * np.log(place_E)
        return np.argsort(-score_TE, axis=1)[:, :top_k].copy()
    return assign(_trace_counts(spec, ep_rank, num_experts), num_tokens, top_k, rng)


def assign(count_E: np.ndarray, num_tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """[T, K] int64, distinct experts for each token, random but for the counts: those of `count_E`, as `capped`."""
    return _spread(capped(count_E, num_tokens, top_k), num_tokens, top_k, rng)


def _trace_counts(spec: RoutingSpec, ep_rank: int, num_experts: int) -> np.ndarray:
    trace = _load(spec.path, num_experts)
    _, num_ranks, num_layers, _, experts = trace.counts.shape
    if experts != num_experts:
        raise ValueError(f"{spec.path} has {experts} experts, this shape has {num_experts}")
    found = np.flatnonzero(trace.iteration == spec.iteration)
    if not len(found) or not 0 <= spec.layer_idx < num_layers:
        raise ValueError(
            f"{spec.path}: no iteration {spec.iteration} with layer {spec.layer_idx}; it has iterations "
            f"{trace.iteration[0]} .. {trace.iteration[-1]} and layers 0 .. {num_layers - 1}"
        )
    return trace.counts[found[0], ep_rank % num_ranks, spec.layer_idx, 0]


@cache
def _load(source: str, num_experts: int) -> ExpertTrace:
    return read_trace(source, experts=num_experts)


def capped(count_E: np.ndarray, num_tokens: int, top_k: int) -> np.ndarray:
    """Counts scaled to T * K, none above T; what is cut off goes to the other experts in proportion."""
    if top_k > len(count_E):
        raise ValueError(f"top_k = {top_k} is more than the {len(count_E)} experts")
    scaled_E, is_full_E = np.zeros(len(count_E), np.int64), np.zeros(len(count_E), bool)
    while True:
        rest = num_tokens * (top_k - int(is_full_E.sum()))
        scaled_E[~is_full_E] = scale_counts(count_E[~is_full_E], rest)
        over_E = scaled_E > num_tokens
        if not over_E.any():
            return scaled_E
        is_full_E |= over_E
        scaled_E[is_full_E] = num_tokens


def _spread(count_E: np.ndarray, num_tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Hand the copies out to tokens at random, then swap copies until no token has one expert twice."""
    copies = np.repeat(np.arange(len(count_E)), count_E)
    expert_TK = rng.permutation(copies).reshape(num_tokens, top_k)
    for _ in range(_REPAIR_ROUNDS):
        is_twice_TK = np.stack([(expert_TK[:, :k] == expert_TK[:, k : k + 1]).any(1) for k in range(top_k)], axis=1)
        bad = np.flatnonzero(is_twice_TK.any(1))
        if not len(bad):
            return expert_TK
        other = rng.permutation(np.setdiff1d(np.arange(num_tokens), bad))[: len(bad)]
        bad = rng.permutation(bad)[: len(other)]
        bad_k, other_k = is_twice_TK[bad].argmax(1), rng.integers(top_k, size=len(other))
        mine, theirs = expert_TK[bad, bad_k], expert_TK[other, other_k]
        fits = ~((expert_TK[other] == mine[:, None]).any(1) | (expert_TK[bad] == theirs[:, None]).any(1))
        expert_TK[bad[fits], bad_k[fits]], expert_TK[other[fits], other_k[fits]] = theirs[fits], mine[fits]
    # full experts leave random swaps no room: lay the copies out in order, T apart, and no token meets an expert twice
    return copies.reshape(top_k, num_tokens).T[rng.permutation(num_tokens)]
