"""How long the pieces of a training step take on a cluster: measured points, and the rule between them.

A profile is one JSON file (see `Profile`). For each primitive the time is

    base(sizes) * correction(sizes)

base is linear in physical amounts (operations, bytes, messages) with non-negative coefficients, fitted to the measured
points by least squares of relative errors. correction is what the points say beyond that: the ratio of measured to
base at each of them, averaged with weights 1 / distance^4 in the logarithms of the sizes. So a measured size is given
back as it was measured, sizes between follow their neighbours, and sizes outside follow the physics. A described cluster
has coefficients only (smartmoe.planner.described).

Every primitive has two times: what the device takes, and what the host takes to launch it. Milliseconds everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SCHEMA = 4
TILE_ROWS = 128  # rows of a tile of a grouped product: an expert's rows are computed in multiples of it
TILE_COLUMNS = 256
_NEAR = 1e-6  # squared distance (of logarithms) below which a point is taken as the point itself
_EXACT = 1e-16  # sum of squared errors (of logarithms) below which points are met but for rounding
_CHUNK = 4096  # sizes evaluated at once
_GIGA, _MEGA = 1e-9, 1e-6


@dataclass(frozen=True)
class Kind:
    """A primitive: what its sizes are called, what its device time is linear in, and what its host time is linear in.
    write_rows: a further argument of `amounts`, 0 or one of these, which the points of a profile choose."""

    sizes: tuple[str, ...]
    amounts: Callable[..., tuple]
    host_amounts: Callable[..., tuple] = lambda **sizes: (1.0,)
    write_rows: tuple[float, ...] = ()


def _linear(tokens, inner, outer):
    return 1.0, tokens * inner * outer * _GIGA, tokens * (inner + outer) * _MEGA, inner * outer * _MEGA


def _attention(samples, heads, tokens, head_dim):
    return 1.0, samples * heads * tokens**2 * head_dim * _GIGA, samples * heads * tokens * head_dim * _MEGA


def _experts(rows, padded_rows, active, slots, width, ffn, deep_rows, write_rows=0.0):
    """write_rows: while a processor adds a finished tile of a weight gradient to the sum in memory, it could multiply so many
    rows. Every expert with rows costs that: those processors that have none of a hot expert's last tiles do it meanwhile, and
    its depth counts only where it takes longer."""
    matrix = width * ffn
    deep_rows = np.maximum(deep_rows, rows + write_rows * active)
    return (
        1.0, active, rows * matrix * _GIGA, padded_rows * matrix * _GIGA, rows * (2 * width + ffn) * _MEGA,
        active * matrix * _MEGA, slots * matrix * _MEGA, deep_rows * matrix * _GIGA,
    )  # fmt: skip


def _experts_host(rows, padded_rows, active, slots, width, ffn, deep_rows):
    return 1.0, slots


def expert_sizes(count: np.ndarray, width: int, ffn: int, processors: int) -> dict[str, np.ndarray]:
    """What the time of experts depends on of their rows, count [..., slots]: each [...]. ffn: of both products together."""
    return dict(
        rows=count.sum(-1), padded_rows=(np.ceil(count / TILE_ROWS) * TILE_ROWS).sum(-1), active=(count > 0).sum(-1),
        deep_rows=deep_rows(count, width, ffn, processors),
    )  # fmt: skip


def deep_rows(count: np.ndarray, width: int, ffn: int, processors: int) -> np.ndarray:
    """[...] rows that would take as long as weight gradients of count [..., slots] rows do, if each processor had its even
    share of them; processors: of the device, 0 = not known, then nothing is uneven.

    A tile of a weight gradient is a sum over all rows of its expert, by one processor; those of the fullest expert come first.
    Some processor has ceil(k * tiles / processors) tiles of the k fullest experts, each at least as deep as the k-th's: the
    longest of these turns is what the product waits for (a bound of list scheduling that one or a few hot experts reach).
    """
    rows = count.sum(-1)
    if not processors:
        return rows
    tiles = max(1, round(width * ffn / 2 / (TILE_ROWS * TILE_COLUMNS)))
    turns_L = np.ceil(np.arange(1, count.shape[-1] + 1) * tiles / processors)
    depth = (-np.sort(-count, axis=-1) * turns_L).max(-1)
    return np.maximum(depth * processors / tiles, rows)


def _gate(tokens, width, experts, top_k):
    return 1.0, tokens * width * _MEGA, tokens * experts * _MEGA, tokens * top_k * _MEGA


def _route(tokens, copies, width):
    return 1.0, copies * width * _MEGA, tokens * width * _MEGA, copies * _MEGA


def _direct(tokens, copies, width, ranks, off_bytes):
    return 1.0, copies * width * _MEGA, tokens * width * _MEGA, ranks - 1.0, off_bytes * _MEGA


def _table(tokens, width, vocab):
    return 1.0, tokens * width * _MEGA, vocab * width * _MEGA


def _update(numel, tensors):
    return 1.0, tensors, numel * _MEGA


def _update_host(numel, tensors):
    return 1.0, tensors


def _exchange(ranks, intra_bytes, inter_bytes):
    return 1.0, ranks - 1.0, intra_bytes * _MEGA, inter_bytes * _MEGA


_TOKENS = ("tokens", "width")
_EXPERTS = ("rows", "padded_rows", "active", "slots", "width", "ffn", "deep_rows")
_PARTS = {
    "linear": Kind(("tokens", "inner", "outer"), _linear),
    "attention": Kind(("samples", "heads", "tokens", "head_dim"), _attention),
    "experts": Kind(_EXPERTS, _experts, _experts_host),
    "experts_loop": Kind(_EXPERTS, _experts, _experts_host),
    "gate": Kind((*_TOKENS, "experts", "top_k"), _gate),
    "gate_limited": Kind((*_TOKENS, "experts", "top_k"), _gate),
    "route": Kind(("tokens", "copies", "width"), _route),
    "direct": Kind(("tokens", "copies", "width", "ranks", "off_bytes"), _direct),
    "norm": Kind(_TOKENS, lambda tokens, width: (1.0, tokens * width * _MEGA)),
    "embedding": Kind((*_TOKENS, "vocab"), _table),
    "loss": Kind(("tokens", "vocab"), lambda tokens, vocab: (1.0, tokens * vocab * _MEGA)),
}
# What each part is: the forms in which it is measured. "_forward" and "_backward" of the parts of a model; the rest once.
KINDS: dict[str, Kind] = {f"{name}_{way}": kind for name, kind in _PARTS.items() for way in ("forward", "backward")}
KINDS |= {
    "experts_backward": Kind(_EXPERTS, _experts, _experts_host, tuple(range(100, 1700, 100))),
    "accumulate": Kind(("numel", "tensors"), _update, _update_host),
    "by_sample": Kind(("numel",), lambda numel: (1.0, numel * _MEGA)),
    "optimizer": Kind(("numel",), lambda numel: (1.0, numel * _MEGA)),
    "optimizer_launches": Kind(("tensors",), lambda tensors: (1.0, tensors)),
    "all_to_all": Kind(("ranks", "intra_bytes", "inter_bytes"), _exchange),
    "all_reduce": Kind(("ranks", "intra_bytes", "inter_bytes"), _exchange),
    "all_gather": Kind(("ranks", "intra_bytes", "inter_bytes"), _exchange),
    "reduce_scatter": Kind(("ranks", "intra_bytes", "inter_bytes"), _exchange),
    "point_to_point": Kind(("ranks", "intra_bytes", "inter_bytes"), _exchange),
    "launch": Kind((), lambda: (1.0,)),
    "sync": Kind((), lambda: (1.0,)),
}
EXCHANGES = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "point_to_point")


# ---------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Time in ms: coefficients [A] of the amounts, and the corrections at measured points.

    log_sizes: [P, Q] log(1 + size); log_ratio: [P] log of measured over base. No points: base alone. write_rows: that of the
    amounts (see Kind).
    """

    coefficients: np.ndarray
    log_sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    log_ratio: np.ndarray = field(default_factory=lambda: np.zeros(0))
    write_rows: float = 0.0

    @classmethod
    def fit(cls, amounts_PA: np.ndarray, sizes_PQ: np.ndarray, times_P: np.ndarray) -> Curve:
        """The curve through measured times (ms, positive) at sizes whose amounts are given."""
        coefficients = fit_non_negative(amounts_PA / times_P[:, None], np.ones(len(times_P)))
        base_P = np.maximum(amounts_PA @ coefficients, 1e-9)
        return cls(coefficients, np.log1p(sizes_PQ), np.log(times_P / base_P))

    def at(self, amounts_NA: np.ndarray, sizes_NQ: np.ndarray) -> np.ndarray:
        """[N] ms."""
        base_N = amounts_NA @ self.coefficients
        if not self.log_ratio.size or not self.log_sizes.shape[1]:
            return base_N * (np.exp(self.log_ratio.mean()) if self.log_ratio.size else 1.0)
        log_NQ = np.log1p(sizes_NQ)
        correction = [self._correction(log_NQ[start : start + _CHUNK]) for start in range(0, len(log_NQ), _CHUNK)]
        return base_N * np.exp(np.concatenate(correction)) if correction else base_N

    def _correction(self, log_NQ):
        gap_NPQ = log_NQ[:, None] - self.log_sizes
        weight_NP = 1.0 / (np.einsum("npq,npq->np", gap_NPQ, gap_NPQ) + _NEAR) ** 2
        return weight_NP @ self.log_ratio / weight_NP.sum(1)


def fit_non_negative(matrix_PA: np.ndarray, target_P: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0, [A]: the best of all subsets of columns whose plain solution is >= 0.

    Exact for the handful of columns that it is used with. Columns are scaled first, so their units do not matter.
    """
    scale_A = np.maximum(np.abs(matrix_PA).max(0), 1e-30)
    scaled, best, best_error = matrix_PA / scale_A, np.zeros(matrix_PA.shape[1]), float(target_P @ target_P)
    for size in range(1, min(matrix_PA.shape) + 1):
        for columns in map(list, itertools.combinations(range(matrix_PA.shape[1]), size)):
            solution, *_ = np.linalg.lstsq(scaled[:, columns], target_P, rcond=None)
            rest = target_P - scaled[:, columns] @ solution
            if solution.min() >= 0 and rest @ rest < best_error * (1 - 1e-9):
                best, best_error = np.zeros_like(best), float(rest @ rest)
                best[columns] = solution
    return best / scale_A


# --------------------------------------------------------------------------------------------------------------- profile


@dataclass(frozen=True)
class Point:
    """One measured size. `device_ms` and `host_ms` are medians with p10 and p90; host_ms is empty where it was not measured,
    as the larger sizes need not be. A held-out point takes no part in fits, nor in what is found of chips' paces."""

    sizes: dict[str, float]
    device_ms: dict[str, float]
    host_ms: dict[str, float]
    held_out: bool = False


@dataclass(frozen=True)
class Profile:
    """What was measured: points by primitive, the dtype, and the facts (versions, device, topology)."""

    points: dict[str, list[Point]]
    dtype: str
    facts: dict

    def to_dict(self) -> dict:
        points = {name: [vars(point) for point in found] for name, found in self.points.items()}
        return {"schema": SCHEMA, "kind": "profile", "dtype": self.dtype, "facts": self.facts, "points": points}

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises ValueError naming the file and what is wrong with it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: cannot read this profile: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != "profile":
            raise ValueError(f"{path}: not a profile; make one with: smartmoe profile")
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: a profile of schema {data.get('schema')}, made by another version; this one reads schema {SCHEMA}: "
                f"make a new one with: smartmoe profile"
            )
        try:
            points = {name: [_point(name, raw) for raw in found] for name, found in data["points"].items()}
            return cls(points, str(data["dtype"]), dict(data["facts"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged profile: {type(error).__name__}: {error}") from None


def _point(name: str, raw: dict) -> Point:
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        raise ValueError(f'unknown primitive "{name}"' + (f'; did you mean "{near[0]}"?' if near else ""))
    point = Point(**raw)
    if set(point.sizes) != set(KINDS[name].sizes):
        raise ValueError(f"{name}: sizes {sorted(point.sizes)}, expected {sorted(KINDS[name].sizes)}")
    times = [*point.device_ms.values(), *point.host_ms.values(), *point.sizes.values()]
    if not point.device_ms.get("median", 0) > 0 or not np.isfinite(np.array(times, float)).all() or min(times) < 0:
        raise ValueError(f"{name}: a time or a size that is no positive number")
    return point


class Primitives:
    """Predicts primitives. `device` and `host`: name -> Curve; `facts`: where the numbers come from."""

    def __init__(self, device: dict[str, Curve], host: dict[str, Curve], source: str, facts: dict | None = None):
        self._device, self._host, self.source, self.facts = device, host, source, facts or {}

    @classmethod
    def fit(cls, profile: Profile) -> Primitives:
        """Fit all points that are not held out."""
        device, host = {}, {}
        for name, points in profile.points.items():
            kept = [point for point in points if not point.held_out]
            if kept:
                kind = KINDS[name]
                sizes_PQ = np.array([[p.sizes[key] for key in kind.sizes] for p in kept], float)
                device[name] = _fit_device(kind, sizes_PQ, _medians(kept, "device_ms"))
                is_known = np.array([bool(p.host_ms) for p in kept])
                host_P = np.maximum(_medians([p for p in kept if p.host_ms], "host_ms"), 1e-6)
                host[name] = Curve(_fit_host(_tables(kind.host_amounts, kind, sizes_PQ[is_known])[0], host_P))
        return cls(device, host, "measured", profile.facts)

    def has(self, name: str) -> bool:
        return name in self._device

    def ms(self, name: str, **sizes) -> np.ndarray:
        """Device time [...] in ms of primitive `name` at `sizes` (numbers or arrays that broadcast).

        Raises ValueError when the profile lacks it.
        """
        return self._evaluate(self._device, name, _amounts, sizes)

    def host_ms(self, name: str, **sizes) -> np.ndarray:
        """What the host takes to launch it, in ms; 0 where the host is the device (CPUs)."""
        return self._evaluate(self._host, name, lambda kind, _: kind.host_amounts, sizes)

    def slowest_ms(self, name: str, pace=1.0, **sizes) -> np.ndarray:
        """`ms` times `pace` of the slowest entry along the last axis of the sizes; pace: a number, or one for each entry. Which
        one that is, base alone decides where there are many."""
        kind = KINDS[name]
        columns = dict(
            zip(kind.sizes, np.broadcast_arrays(*(np.asarray(sizes[k], float) for k in kind.sizes)), strict=True)
        )
        if columns[kind.sizes[0]].shape[-1] <= 4:
            return (self.ms(name, **columns) * pace).max(-1)
        if name not in self._device:
            return self.ms(name, **columns)  # says what is missing
        curve = self._device[name]
        amounts = np.stack(np.broadcast_arrays(*_amounts(kind, curve.write_rows)(**columns)), -1)
        base = amounts @ curve.coefficients
        worst = (base * pace).argmax(-1)[..., None]
        pace_of_worst = np.take_along_axis(np.broadcast_to(pace, base.shape), worst, -1)[..., 0]
        return pace_of_worst * self.ms(name, **{key: np.take_along_axis(c, worst, -1)[..., 0] for key, c in columns.items()})

    def _evaluate(self, curves, name, amounts_of, sizes):
        if name not in curves:
            raise ValueError(
                f'this profile has no "{name}"; it has {", ".join(sorted(curves))}: profile the cluster again'
            )
        kind = KINDS[name]
        columns = np.broadcast_arrays(*(np.asarray(sizes[key], float) for key in kind.sizes)) if kind.sizes else []
        shape = columns[0].shape if columns else ()
        sizes_NQ = np.stack([c.reshape(-1) for c in columns], 1) if columns else np.zeros((1, 0))
        amounts = amounts_of(kind, curves[name].write_rows)
        return curves[name].at(*_tables(amounts, kind, sizes_NQ)).reshape(shape)

    def with_links(self, inter_ms_per_mbyte: float, inter_latency_ms: float) -> Primitives:
        """The same with another cost of what crosses nodes, which a profile of one node cannot know."""
        device = dict(self._device)
        for name in EXCHANGES:
            if name in device:
                old = device[name]
                per = old.coefficients.copy()
                per[3] = inter_ms_per_mbyte
                device[name] = Curve(per, old.log_sizes, old.log_ratio)
        facts = {**self.facts, "inter_latency_ms": inter_latency_ms}
        return Primitives(device, self._host, self.source, facts)


def _amounts(kind: Kind, write_rows: float) -> Callable[..., tuple]:
    return functools.partial(kind.amounts, write_rows=write_rows) if write_rows else kind.amounts


def _fit_device(kind: Kind, sizes_PQ: np.ndarray, times_P: np.ndarray) -> Curve:
    """The curve of the points: more write_rows are tried as long as they bring base nearer to them; not where it passes through
    all, as it does through a few: what is left is rounding, which another machine has otherwise."""
    best, least = None, np.inf
    for write_rows in (0.0, *kind.write_rows):
        curve = Curve.fit(*_tables(_amounts(kind, write_rows), kind, sizes_PQ), times_P)
        error = float(np.square(curve.log_ratio).sum())
        if error >= least * (1 - 1e-6):
            break
        best, least = dataclasses.replace(curve, write_rows=write_rows), error
        if least < _EXACT:
            break
    return best


def _tables(amounts, kind: Kind, sizes_NQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(amounts [N, A], sizes [N, Q])."""
    columns = amounts(**dict(zip(kind.sizes, sizes_NQ.T, strict=True)))
    return np.stack([np.broadcast_to(c, len(sizes_NQ)) for c in columns], 1), sizes_NQ


def _medians(points: list[Point], key: str) -> np.ndarray:
    return np.array([getattr(point, key)["median"] for point in points], float)


def _fit_host(amounts_PA: np.ndarray, times_P: np.ndarray) -> np.ndarray:
    """Through the lower quartile of the points: what else a host does only adds, and does so to one of them or another."""
    coefficients = fit_non_negative(amounts_PA / times_P[:, None], np.ones(len(times_P)))
    return coefficients * np.percentile(times_P / np.maximum(amounts_PA @ coefficients, 1e-9), 25)


def held_out_errors(profile: Profile) -> dict[str, dict[str, float]]:
    """Relative errors of the device time at the held-out points, by primitive and under "all".

    Each: {"num", "median", "p90"}, fractions of the measured time.
    """
    primitives, errors = Primitives.fit(profile), {}
    for name, points in profile.points.items():
        held = [point for point in points if point.held_out]
        if held and primitives.has(name):
            sizes = {key: np.array([p.sizes[key] for p in held], float) for key in KINDS[name].sizes}
            measured = _medians(held, "device_ms")
            errors[name] = np.abs(primitives.ms(name, **sizes) / measured - 1)
    if errors:
        errors["all"] = np.concatenate(list(errors.values()))
    return {
        name: {"num": len(e), "median": float(np.median(e)), "p90": float(np.percentile(e, 90))}
        for name, e in errors.items()
    }
