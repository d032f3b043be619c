"""What to do about an unbalanced layer: keep, migrate, replicate or both, by predicted gain against measured cost.

Layer 0: numpy only, no state, no clock, no communication: all is decided from numbers that every rank has alike. Axes: Y
layers, S source ranks, E experts, W ranks of an expert-parallel group. Counts are token copies of one iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smartmoe.placement import Placement, Replicas, most_copies, num_moves
from smartmoe.solvers import solve_exact_step, solve_joint, solve_least_move, solve_replicas_layers

FAST_ITERATIONS = 200
MODES = ("never", "history", "exact")
MARGIN = 0.01  # of a layer's time: less than this is noise


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a layer's step costs on this machine, measured while training; all in ms, per layer and iteration.

    Args:
        compute_ms_per_copy: forward and backward of one token copy, on the rank that computes the most of them.
        exchange_ms_per_copy: carrying one token copy to another rank and back, on the rank that sends or gets the most.
        node_exchange_ms_per_copy: what a copy that leaves its node costs on top of that.
        replica_ms_per_copy: one copy of an expert in one iteration: its weights sent, its gradient returned.
        move_ms_per_expert: moving the owner of one expert with its whole state, once.
    """

    compute_ms_per_copy: float
    exchange_ms_per_copy: float = 0.0
    node_exchange_ms_per_copy: float = 0.0
    replica_ms_per_copy: float = 0.0
    move_ms_per_expert: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"policy: {name} = {value} must be a number of at least 0")

    @property
    def copy_cost(self) -> float:
        """Token copies that the fullest rank computes in the time that one copy of an expert costs."""
        return self.replica_ms_per_copy / self.compute_ms_per_copy if self.compute_ms_per_copy else 0.0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be done, and how much it must gain.

    Args:
        may_migrate: whether owners may move.
        replicate: "never"; "history", replicas are part of the decision; "exact", they are chosen for each micro-batch from its
            own counts, so that predictions count on them and decisions leave them alone.
        num_replica_slots: G, replica slots that each rank has; the memory for them is taken already.
        horizon: iterations for which a change is expected to serve; what moving costs once must be gained in them.
        min_gain: a change must make the layer's predicted ms fall by more than this fraction.
        state_bytes_per_expert, free_bytes: an expert's whole state and the device memory free for a migration's buffers on
            the rank that has the least; a migration that needs more is refused. None: memory is not looked at.
        node_of_rank_W: [W] node of each rank; None: one node.
    """

    may_migrate: bool = True
    replicate: str = "history"
    num_replica_slots: int = 0
    horizon: int = 50
    min_gain: float = 0.02
    state_bytes_per_expert: int = 0
    free_bytes: int | None = None
    node_of_rank_W: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.replicate not in MODES:
            raise ValueError(f'policy: replicate = "{self.replicate}" is not one of {", ".join(MODES)}')
        if self.num_replica_slots < 0 or self.horizon < 1 or not 0 <= self.min_gain < 1:
            raise ValueError(
                f"policy: num_replica_slots = {self.num_replica_slots} must be at least 0, horizon = {self.horizon} at "
                f"least 1, min_gain = {self.min_gain} in 0 .. 1"
            )


@dataclass(frozen=True)
class LayerState:
    """How a layer is placed now, and what it must not go back to.

    Args:
        placement, replicas: in force; replicas fit the placement.
        left: (expert, rank, iteration) of each owner that moved away: expert left rank after that iteration.
        refused: placements that a review rolled back, with the iteration in which it did: not tried again for a horizon.
    """

    placement: Placement
    replicas: Replicas
    left: tuple[tuple[int, int, int], ...] = ()
    refused: tuple[tuple[Placement, int], ...] = ()

    def moved_to(self, decision: Decision, iteration: int, horizon: int) -> LayerState:
        """The state after `decision` was carried out in `iteration`; entries older than `horizon` are forgotten."""
        old_E, new_E = self.placement.rank_of_expert(), decision.placement.rank_of_expert()
        movers = np.flatnonzero(old_E != new_E).tolist()
        left = [entry for entry in self.left if iteration - entry[2] < horizon and entry[0] not in movers]
        left += [(expert, int(old_E[expert]), iteration) for expert in movers]
        refused = tuple(entry for entry in self.refused if iteration - entry[1] < horizon)
        return LayerState(decision.placement, decision.replicas, tuple(left), refused)

    def rolled_back(self, before: LayerState, iteration: int) -> LayerState:
        """`before` again, with this state's placement refused from `iteration` on."""
        refused = before.refused
        if self.placement != before.placement:
            refused += ((self.placement, iteration),)
        return LayerState(before.placement, before.replicas, before.left, refused)


@dataclass(frozen=True)
class Decision:
    """What to do with one layer.

    Args:
        kind: "keep", "replicate" (owners stay), "migrate" (owners change, no replicas) or "both".
        placement, replicas: to have from now on; those in force when kind is "keep".
        before_ms, after_ms: predicted for one iteration of the layer with what is in force, and with the decision.
        cost_ms: of moving owners, once.
        reason: for the log, one line.
    """

    kind: str
    placement: Placement
    replicas: Replicas
    before_ms: float
    after_ms: float
    cost_ms: float
    reason: str


@dataclass(frozen=True)
class Review:
    """What measuring says about a change: kind "keep" or "rollback", and why."""

    kind: str
    reason: str


@dataclass(frozen=True)
class _Candidate:
    kind: str
    placement: Placement
    replicas: Replicas


@dataclass(frozen=True)
class _Prediction:
    """ms of an iteration, and the fraction of it that an even load without replicas would save."""

    ms: float
    to_gain: float


# ------------------------------------------------------------------------------------------------------- the history


def is_due(iteration: int, interval: int) -> bool:
    """Whether to decide after `iteration` (from 1): every `interval`, and five times as often in the first 200, in which
    loads change so fast that a plan ten iterations old is half wrong."""
    every = max(1, interval // 5) if iteration <= FAST_ITERATIONS else interval
    return iteration % every == 0


def half_life(iteration: int) -> float:
    """Iterations after which a count weighs half in the history: (iteration / 250)^2, at most 30.

    Measured on the published trace: in the first 300 iterations, the newest counts alone predict the next ones best; by
    iteration 1000, half of the weight belongs to what is more than 15 iterations old, and by 1500 to 30.
    """
    return min((max(iteration, 1) / 250) ** 2, 30.0)


def blend(history: np.ndarray | None, count: np.ndarray, iteration: int, num_iterations: int = 1) -> np.ndarray:
    """The history with `count` taken in: a mean that decays with `half_life`, as float64 of the shape of `count`.

    Args:
        history: what `blend` returned last, None at the start.
        count: token copies of `iteration`, any shape.
        num_iterations: iterations since the last call.
    """
    count = np.asarray(count, np.float64)
    if history is None:
        return count.copy()
    old = 0.5 ** (num_iterations / half_life(iteration))
    return old * history + (1 - old) * count


# ------------------------------------------------------------------------------------------------------ the prediction


def predict_ms(
    count_SE: np.ndarray,
    placement: Placement,
    replicas: Replicas,
    costs: Costs,
    node_of_rank_W: Sequence[int] | None = None,
) -> float:
    """Predicted ms of a layer's iteration, without the parts that no placement changes.

    The fullest rank computes, the busiest link carries (sent or received, whichever is more), and the rank with the most
    replicas sent or received handles them.

    Args:
        count_SE: [W, E] token copies of each expert on each source rank.
        node_of_rank_W: [W] node of each rank; None: one node.
    """
    return _predict_parts(np.asarray(count_SE, np.float64), placement, replicas, costs, node_of_rank_W)[0]


def _predict_parts(count_SE, placement: Placement, replicas: Replicas, costs: Costs, node_of_rank_W):
    """(`predict_ms`, ms of it that an even load without replicas would save)."""
    load_W = replicas.host_load(count_SE)
    fullest = float(load_W.max())
    ms = costs.compute_ms_per_copy * fullest
    if costs.exchange_ms_per_copy or costs.node_exchange_ms_per_copy:
        flow_SW = np.einsum("se,sew->sw", count_SE, replicas.share_SEW)
        rank_W = np.arange(placement.num_ranks)
        node_W = np.zeros_like(rank_W) if node_of_rank_W is None else np.asarray(node_of_rank_W)
        for per_copy, group_W in ((costs.exchange_ms_per_copy, rank_W), (costs.node_exchange_ms_per_copy, node_W)):
            off_SW = flow_SW * (group_W[:, None] != group_W)
            ms += per_copy * float(max(off_SW.sum(axis=0).max(), off_SW.sum(axis=1).max()))
    copies_ms = costs.replica_ms_per_copy * most_copies(
        replicas.expert_of_replica, placement.rank_of_expert(), placement.num_ranks
    )
    return ms + copies_ms, costs.compute_ms_per_copy * float(fullest - load_W.mean()) + copies_ms


def expected_ms(count_SE: np.ndarray, state: LayerState, costs: Costs, rules: Rules) -> float:
    """`predict_ms` of what is in force, as `decide` sees it: with "exact" it counts on the copies of each micro-batch."""
    return _predict(np.asarray(count_SE, np.float64), _in_force(state), costs, rules).ms


def _busiest_with_moves(old: Placement, new: Placement) -> tuple[int, int]:
    """Experts that the busiest rank of a migration sends or gets, whichever is more; and both together."""
    old_E, new_E = old.rank_of_expert(), new.rank_of_expert()
    moves = old_E != new_E
    sent_W, got_W = (np.bincount(rank_E[moves], minlength=old.num_ranks) for rank_E in (old_E, new_E))
    return int(np.maximum(sent_W, got_W).max()), int((sent_W + got_W).max())


# -------------------------------------------------------------------------------------------------------- the decision


def decide(
    count_YSE: np.ndarray, states: Sequence[LayerState], costs: Costs, rules: Rules, iteration: int
) -> list[Decision]:
    """Decide for every layer what to do between this iteration and the next.

    A layer whose fullest rank and replicas cost at most min_gain more than a perfectly even load is kept, and nothing is
    searched. For the others there are up to four candidates: what is in force; new replicas; and, unless those leave no
    more than min_gain to gain, new owners (least move) without replicas, and owners placed for replicas to take the rest.
    The one with the least (ms * horizon + cost of moving) is taken
    if its ms are lower by more than min_gain and it gains its cost within the horizon; of equals, the smaller change. A
    migration is refused, with the reason, when its buffers do not fit the free memory, when it brings an expert back to a
    rank that it left less than a horizon ago, or when a review rolled the same placement back less than a horizon ago.

    Args:
        count_YSE: [Y, W, E] expected token copies of each expert on each source rank in an iteration (see `blend`).
        states: Y, what is in force; replicas have rules.num_replica_slots slots per rank.
        costs, rules: the same on every rank, or ranks would decide differently.
        iteration: the one just done, from 1.
    Returns: Y decisions. Raises ValueError when sizes do not fit.
    """
    count_YSE = np.asarray(count_YSE, np.float64)
    if len(count_YSE) != len(states):
        raise ValueError(f"policy: counts of {len(count_YSE)} layers for {len(states)} states")
    for state in states:
        if state.replicas.num_replica_slots != rules.num_replica_slots:
            raise ValueError(
                f"policy: replicas in force have {state.replicas.num_replica_slots} slots per rank, the rules have "
                f"{rules.num_replica_slots}"
            )
    before = [
        _predict(count_SE, _in_force(state), costs, rules) for count_SE, state in zip(count_YSE, states, strict=True)
    ]
    uneven = [layer for layer in range(len(states)) if before[layer].to_gain > rules.min_gain]
    fresh: dict[int, Replicas] = {}
    if rules.replicate == "history" and rules.num_replica_slots and uneven:
        placements = [states[layer].placement for layer in uneven]
        options = {"copy_cost": costs.copy_cost, "node_of_rank_W": rules.node_of_rank_W}
        found = solve_replicas_layers(count_YSE[uneven], placements, rules.num_replica_slots, **options)
        fresh = dict(zip(uneven, found, strict=True))
    decisions = []
    for layer, state in enumerate(states):
        if layer in uneven:
            made = _decide_layer(count_YSE[layer], state, before[layer], fresh.get(layer), costs, rules, iteration)
        else:
            made = _keep(state, before[layer].ms, f"at most {max(before[layer].to_gain, 0):.1%} to gain")
        decisions.append(made)
    return decisions


def _decide_layer(count_SE, state: LayerState, before, fresh, costs: Costs, rules: Rules, iteration: int) -> Decision:
    candidates: list[tuple[_Candidate, float]] = []
    refusals, is_even = [], False
    if fresh is not None and fresh != state.replicas:
        candidate = _Candidate("replicate", state.placement, fresh)
        predicted = _predict(count_SE, candidate, costs, rules)
        candidates.append((candidate, predicted.ms))
        is_even = predicted.to_gain <= rules.min_gain
    for candidate in [] if is_even else _migrations(count_SE, state, fresh, costs, rules):
        refusal = _refusal(candidate.placement, state, rules, iteration)
        if refusal:
            refusals.append(f"{candidate.kind} refused: {refusal}")
        else:
            candidates.append((candidate, _predict(count_SE, candidate, costs, rules).ms))
    best, best_ms, best_total, best_gain = None, before.ms, before.ms * rules.horizon, 0.0
    for candidate, ms in candidates:
        cost_ms = costs.move_ms_per_expert * _busiest_with_moves(state.placement, candidate.placement)[0]
        gain = 1 - ms / before.ms
        best_gain = max(best_gain, gain)
        if gain > rules.min_gain and ms * rules.horizon + cost_ms < best_total:
            best, best_ms, best_total = candidate, ms, ms * rules.horizon + cost_ms
    if best is None:
        return _keep(state, before.ms, "; ".join([_why_keep(candidates, best_gain, rules), *refusals]))
    cost_ms = best_total - best_ms * rules.horizon
    reason = "; ".join([_why(best, state, before.ms, best_ms, cost_ms, rules), *refusals])
    return Decision(best.kind, best.placement, best.replicas, before.ms, best_ms, cost_ms, reason)


def _in_force(state: LayerState) -> _Candidate:
    return _Candidate("keep", state.placement, state.replicas)


def _keep(state: LayerState, ms: float, reason: str) -> Decision:
    return Decision("keep", state.placement, state.replicas, ms, ms, 0.0, reason)


def _predict(count_SE, candidate: _Candidate, costs: Costs, rules: Rules) -> _Prediction:
    replicas = candidate.replicas
    if rules.replicate == "exact":
        whole_SE, copy_cost = np.rint(count_SE).astype(np.int64), round(costs.copy_cost)
        replicas = solve_exact_step(whole_SE, candidate.placement, rules.num_replica_slots, copy_cost)
    ms, uneven_ms = _predict_parts(count_SE, candidate.placement, replicas, costs, rules.node_of_rank_W)
    return _Prediction(ms, uneven_ms / ms if ms else 0.0)


def _migrations(count_SE, state: LayerState, fresh, costs: Costs, rules: Rules) -> list[_Candidate]:
    if not rules.may_migrate or state.placement.num_ranks == 1:
        return []
    none = Replicas.none
    moved = [solve_least_move(count_SE.sum(axis=0), state.placement)]
    found = [_Candidate("migrate", new, none(new, rules.num_replica_slots)) for new in moved]
    if rules.replicate != "never" and rules.num_replica_slots:
        options = {"copy_cost": costs.copy_cost, "node_of_rank_W": rules.node_of_rank_W}
        new, replicas = solve_joint(count_SE, state.placement, rules.num_replica_slots, stay=fresh, **options)
        if rules.replicate == "exact" or not replicas.num_copies:
            found.append(_Candidate("migrate", new, none(new, rules.num_replica_slots)))
        else:
            found.append(_Candidate("both", new, replicas))
    return [candidate for candidate in found if candidate.placement != state.placement]


def _refusal(new: Placement, state: LayerState, rules: Rules, iteration: int) -> str:
    """Why this placement must not be tried, "" when it may."""
    needed = _busiest_with_moves(state.placement, new)[1] * rules.state_bytes_per_expert
    if rules.free_bytes is not None and needed > rules.free_bytes:
        return f"its buffers need {needed / 1e6:.0f} MB on a rank, {rules.free_bytes / 1e6:.0f} MB are free"
    for placement, when in state.refused:
        if placement == new and iteration - when < rules.horizon:
            return f"it was rolled back after iteration {when}"
    rank_E, old_E = new.rank_of_expert(), state.placement.rank_of_expert()
    for expert, rank, when in state.left:
        if rank_E[expert] == rank != old_E[expert] and iteration - when < rules.horizon:
            return f"expert {expert} left rank {rank} only after iteration {when}"
    return ""


def _why_keep(candidates: list[tuple[_Candidate, float]], best_gain: float, rules: Rules) -> str:
    if not candidates:
        return "nothing better was found"
    if best_gain > rules.min_gain:
        return f"the best change would gain {best_gain:.1%}, less in {rules.horizon} iterations than moving costs"
    return f"the best change would gain {best_gain:.1%}, min_gain is {rules.min_gain:.1%}"


def _why(best: _Candidate, state: LayerState, before_ms: float, ms: float, cost_ms: float, rules: Rules) -> str:
    text = f"{before_ms:.3g} -> {ms:.3g} ms predicted, {1 - ms / before_ms:.1%} less"
    if best.kind != "replicate":
        saved_ms = (before_ms - ms) * rules.horizon - cost_ms
        text += f"; {num_moves(state.placement, best.placement)} experts move for {cost_ms:.3g} ms"
        text += f", {saved_ms:.3g} ms gained in {rules.horizon} iterations"
    if best.kind != "migrate":
        text += f"; {best.replicas.num_copies} copies"
    return text


# ---------------------------------------------------------------------------------------------------------- the review


def review(
    predicted_ms: float,
    measured_ms_before: Sequence[float] | np.ndarray,
    measured_ms_after: Sequence[float] | np.ndarray,
    min_margin: float = MARGIN,
) -> Review:
    """Whether a change that was carried out should be taken back.

    It is, when the time after it is above both what was predicted and the time before it by more than the noise: twice the
    standard error of the difference of the medians (1.2533 standard deviations / sqrt(n), these from the median absolute
    deviation), and no less than `min_margin` of the time before.

    Args:
        predicted_ms: expected of the same thing that was measured, with the change, under the loads after it: when the load
            itself got worse, that is no reason to go back.
        measured_ms_before, measured_ms_after: one value per iteration, at least one each, warm-up left out.
    """
    before, after = (np.asarray(ms, np.float64) for ms in (measured_ms_before, measured_ms_after))
    if not before.size or not after.size:
        raise ValueError("policy: a review needs at least one measured iteration before and one after the change")
    middle_before, middle_after = float(np.median(before)), float(np.median(after))
    error = 1.2533 * 1.4826 * math.hypot(*(_spread(ms) / math.sqrt(ms.size) for ms in (before, after)))
    margin = max(2 * error, min_margin * middle_before)
    text = f"{middle_before:.3g} -> {middle_after:.3g} ms measured, {predicted_ms:.3g} predicted, noise {margin:.2g}"
    if middle_after > predicted_ms + margin and middle_after > middle_before + margin:
        return Review("rollback", f"{text}: slower than before")
    if middle_after > predicted_ms + margin:
        return Review("keep", f"{text}: gained less than predicted")
    return Review("keep", f"{text}: as predicted")


def _spread(ms: np.ndarray) -> float:
    return float(np.median(np.abs(ms - np.median(ms))))
