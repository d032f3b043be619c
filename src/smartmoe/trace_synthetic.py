"""Synthetic routings of known skew: the eight classes on which placement and replication are judged.

Layer 0: numpy only. Axes as in `smartmoe.trace`: I iterations, R ranks, L layers, M micro-batches, E experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How likely experts are. Every layer has its own order of popularity, drawn from the seed.

    Args:
        exponent: the expert at place p of its layer's order has weight 1 / p^exponent. 0 = all alike.
        share: fraction of all copies that one hot expert of each layer takes; 0 = there is none. More than 1 / top-k
            cannot be routed: a token takes an expert once.
        period: iterations after which the hot expert moves on, or the order changes; 0 = never.
        chance, length: of a burst, where only bursts have a hot expert: probability that one begins in an iteration,
            and the iterations it lasts.
        layered: exponents rise over the layers, from 0 in the first to `exponent` in the last.
        flips: after `period` iterations all layers take another order, then the first again, and so on.
    """

    about: str
    exponent: float = 0.0
    share: float = 0.0
    period: int = 0
    chance: float = 0.0
    length: int = 0
    layered: bool = False
    flips: bool = False


SKEWS = {
    "uniform": Skew(about="every expert equally likely"),
    "zipf-mild": Skew(about="Zipf with exponent 0.5", exponent=0.5),
    "zipf-strong": Skew(about="Zipf with exponent 1.2", exponent=1.2),
    "one-hot": Skew(about="one expert of each layer takes 40 % of the copies, the others share the rest", share=0.4),
    "rotating-hot": Skew(about="the hot expert is another one every 10 iterations", share=0.4, period=10),
    "bursty": Skew(about="mild Zipf, and now and then a random expert takes 40 % for 5 iterations",
                   exponent=0.5, share=0.4, chance=0.05, length=5),
    "layered": Skew(about="uniform in the first layer, Zipf with exponent 1.6 in the last", exponent=1.6, layered=True),
    "alternating": Skew(about="strong Zipf between two orders every 10 iterations: what was learned is wrong by then",
                        exponent=1.2, period=10, flips=True),
}  # fmt: skip


def skew_of(kind: str, **changes) -> Skew:
    """A class of SKEWS, with some of its numbers changed. Raises ValueError for an unknown name or number."""
    if kind not in SKEWS:
        raise ValueError(f'trace: kind = "{kind}" is not one of {", ".join(SKEWS)}')
    known = {field.name for field in dataclasses.fields(Skew)} - {"about"}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f'trace: "{kind}" has no {", ".join(unknown)}; known: {", ".join(sorted(known))}')
    skew = dataclasses.replace(SKEWS[kind], **changes)
    for name, low, high in (("exponent", 0, 100), ("share", 0, 1), ("chance", 0, 1), ("period", 0, None),
                            ("length", 0, None)):  # fmt: skip
        value = getattr(skew, name)
        if not value >= low or (high is not None and value > high):
            raise ValueError(f"trace: {name} = {value} must be at least {low}" + (f", at most {high}" if high else ""))
    if skew.flips and not skew.period:
        raise ValueError("trace: flips needs a period of at least 1 iteration")
    return skew


def chances(skew: Skew, num_iterations: int, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """[I, L, E] float64, the probability that a copy goes to each expert; equal arguments, equal result."""
    rng = np.random.default_rng(seed)
    orders_2LE = rng.permuted(np.tile(np.arange(num_experts), (2, num_layers, 1)), axis=2)  # place of each expert
    rises_L = np.linspace(0, 1, num_layers) if skew.layered and num_layers > 1 else np.ones(num_layers)
    weight_2LE = (orders_2LE + 1.0) ** -(skew.exponent * rises_L[:, None])
    weight_2LE /= weight_2LE.sum(2, keepdims=True)
    phase_I = np.arange(num_iterations) // skew.period if skew.period else np.zeros(num_iterations, int)
    chance_ILE = weight_2LE[phase_I % 2 if skew.flips else np.zeros(num_iterations, int)]
    if skew.share and num_experts > 1:
        hot_IL = _hot_experts(skew, orders_2LE[0], phase_I, rng)
        rows_I, layers_L = np.ogrid[:num_iterations, :num_layers]
        is_hot_IL = hot_IL >= 0
        without = chance_ILE.copy()
        without[rows_I, layers_L, hot_IL] = 0
        without *= (1 - skew.share) / without.sum(2, keepdims=True)
        without[rows_I, layers_L, hot_IL] = skew.share
        chance_ILE = np.where(is_hot_IL[:, :, None], without, chance_ILE)
    return chance_ILE


def _hot_experts(skew: Skew, place_LE: np.ndarray, phase_I: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[I, L] the hot expert of each iteration and layer, -1 = none."""
    num_iterations, (num_layers, num_experts) = len(phase_I), place_LE.shape
    if not skew.chance:
        # in the shuffled order, so that successors sit anywhere
        return place_LE.argsort(1).T[phase_I % num_experts]
    begins_I = np.flatnonzero(rng.random(num_iterations) < skew.chance)
    experts_IL = rng.integers(num_experts, size=(num_iterations, num_layers))
    hot_IL = np.full((num_iterations, num_layers), -1)
    for begin in begins_I:
        hot_IL[begin : begin + skew.length] = experts_IL[begin]
    return hot_IL


def draw_counts(chance_ILE: np.ndarray, num_ranks: int, num_micro_batches: int, num_copies: int, seed: int = 0):
    """[I, R, L, M, E] int32 counts of `num_copies` copies in each cell, drawn from `chance_ILE`."""
    rng = np.random.default_rng([seed, 1])
    num_iterations, num_layers, num_experts = chance_ILE.shape
    counts = np.empty((num_iterations, num_ranks, num_layers, num_micro_batches, num_experts), np.int32)
    for row, chance_LE in enumerate(chance_ILE):
        counts[row] = rng.multinomial(num_copies, chance_LE[:, None], (num_ranks, num_layers, num_micro_batches))
    return counts
