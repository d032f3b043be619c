"""The distribution of routing loads that a plan is judged under: from a trace, from a prior by gate, or uniform.

Axes: S samples (iterations), M micro-batches, R source ranks, L MoE layers, E experts. An axis of length 1 among M and R
means that all micro-batches, or all ranks, are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smartmoe.config import GateConfig, ModelConfig
from smartmoe.trace import ExpertTrace

# Exponent of the Zipf law by gate. Without a balance loss the published trace of a naive gate (32 experts, top-2) has a
# busiest expert with 12 times the mean and shares as a Zipf law of exponent 1.4; gates with a balance loss or noise stay
# near level. Assumptions until a short run has recorded a trace: give it with --trace.
ZIPF_OF_GATE = {
    "naive": 1.4, "trace": 1.4, "faster": 0.6, "noisy": 0.6, "gshard": 0.5, "switch": 0.5, "swipe": 0.0, "zero": 50.0,
}  # fmt: skip


@dataclass(frozen=True)
class Loads:
    """share: [S, M, R, L, E] float64, fraction of a rank's token copies of a micro-batch that go to each expert; what is
    missing to 1 was dropped. `about`: where it is from, in words."""

    share: np.ndarray
    about: str

    @property
    def num_samples(self) -> int:
        return self.share.shape[0]

    def limited(self, capacity: float | None) -> Loads:
        """No expert gets more than capacity / E of all copies; None changes nothing."""
        if capacity is None:
            return self
        mean = self.share.mean(axis=2, keepdims=True)
        limit = capacity / self.share.shape[4]
        keep = np.minimum(1.0, limit / np.maximum(mean, 1e-12))
        return Loads(self.share * keep, f"{self.about}, capacity {capacity:g}")

    def mean_over_micro_batches(self) -> Loads:
        """Micro-batches and source ranks taken as alike: the form that a search over many plans uses."""
        return Loads(self.share.mean(axis=(1, 2), keepdims=True), self.about)


def num_moe_layers(model: ModelConfig) -> int:
    """How many blocks have experts."""
    return model.num_layers // model.moe_every


def uniform(model: ModelConfig) -> Loads:
    """Every expert equally loaded: what a planner that does not look at the data assumes."""
    share = np.full((1, 1, 1, max(1, num_moe_layers(model)), model.num_experts), 1 / model.num_experts)
    return Loads(share, "uniform loads (data-insensitive)")


def zipf(model: ModelConfig, gate: GateConfig, num_samples: int = 16, seed: int = 0) -> Loads:
    """A prior by gate type: shares ~ 1 / place^a, places shuffled in each layer and sample; a is that of ZIPF_OF_GATE
    times 0.6 to 1.4, evenly over the samples, because nobody knows it before training.

    An expert gets at most 1 / top_k of all copies: a token cannot take it twice.
    """
    exponent, num_experts = ZIPF_OF_GATE[gate.kind], model.num_experts
    spread_S = 0.6 + 0.8 * (np.arange(num_samples) + 0.5) / num_samples
    weight_SE = np.arange(1, num_experts + 1, dtype=float) ** -(exponent * spread_S[:, None])
    weight_SE /= weight_SE.sum(1, keepdims=True)
    capped_SE = np.stack([_capped(weight_E, 1 / model.top_k) for weight_E in weight_SE])
    rng = np.random.default_rng(seed)
    shape = (num_samples, 1, 1, max(1, num_moe_layers(model)), num_experts)
    share = rng.permuted(np.broadcast_to(capped_SE[:, None, None, None], shape).copy(), axis=-1)
    return Loads(share, f"Zipf prior {exponent:g} of gate {gate.kind}").limited(gate.capacity)


def _capped(share_E: np.ndarray, limit: float) -> np.ndarray:
    """`share` with what is above `limit` spread over the others in proportion."""
    if limit * len(share_E) <= 1:
        return np.full_like(share_E, 1 / len(share_E))
    for _ in range(len(share_E)):
        above = share_E > limit + 1e-15
        if not above.any():
            break
        rest = ~(share_E >= limit)
        share_E = np.where(above, limit, share_E)
        share_E[rest] *= (1 - limit * (~rest).sum()) / max(share_E[rest].sum(), 1e-300)
    return share_E


def from_trace(trace: ExpertTrace, model: ModelConfig, num_samples: int | None = None) -> Loads:
    """Loads as recorded; `num_samples` iterations, evenly spread (None: all).

    A model with another number of MoE layers takes the trace's layers at the same relative depth. Raises ValueError
    when the trace has another number of experts or another top-k, so is of another model.
    """
    num_iterations, _, num_layers, _, num_experts = trace.counts.shape
    for what, got, want in (
        ("experts", num_experts, model.num_experts),
        ("top_k", trace.meta.get("top_k", model.top_k), model.top_k),
    ):
        if got != want:
            raise ValueError(f"the trace is of another model: it has {what} = {got}, model {model.name} has {want}")
    rows = np.arange(num_iterations)
    if num_samples is not None and num_samples < num_iterations:
        rows = np.linspace(0, num_iterations - 1, num_samples).round().astype(int)
    wanted = max(1, num_moe_layers(model))
    layers = (np.arange(wanted) * num_layers) // wanted
    counts = trace.counts[rows][:, :, layers].astype(float).transpose(0, 3, 1, 2, 4)
    total = counts.sum(-1, keepdims=True)
    # the copies sent are tokens * k where the trace says so; else what was counted
    sent = trace.meta.get("tokens_per_micro_batch_and_rank", 0) * model.top_k
    share = counts / np.maximum(np.maximum(total, sent), 1)
    first, last = trace.iteration[rows[0]], trace.iteration[rows[-1]]
    return Loads(share, f"trace, {len(rows)} iterations {first} .. {last}")
