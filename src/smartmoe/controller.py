"""The state of policy "auto": what the layers' loads and times have been, what was changed, and what came of it.

Layer 1: numpy only, no clock, no communication. Every rank of a stage feeds its own with the same numbers (sums and
maxima over the stage), so all reach the same decisions. Axes: Y layers, W ranks of an expert-parallel group, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from smartmoe import policy
from smartmoe.config import OnlineConfig
from smartmoe.placement import Placement, Replicas

MIN_GAIN = 0.02
WARMUP_ITERATIONS = 2  # of a process, whose times are not believed
REVIEW_ITERATIONS = 3  # measured after a change before it is judged, the first one left out
_WINDOW = 50
_JUDGED = 8  # iterations on either side of a change that a review compares, at most
_MARGIN_OF_FEW = 0.1  # of the time before, where fewer than REVIEW_ITERATIONS do not tell how much it varies
# Loads that vary by less than this fraction do not tell what a copy costs: then all of a layer's time is taken for it.
_TELLING_VARIATION = 0.05


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes that decisions are about, and how fast they travel until that has been measured.

    Args:
        state_bytes: of an expert with all that training keeps of it.
        replica_bytes: sent and returned for one copy of an expert in an iteration.
        copy_bytes: carried for one token copy in an iteration, there and back, forward and backward.
        gbytes_per_s: of a rank, in one direction.
        node_gbytes_per_s: the same between nodes.
    """

    state_bytes: int = 0
    replica_bytes: int = 0
    copy_bytes: int = 0
    gbytes_per_s: float = 1.0
    node_gbytes_per_s: float = 1.0


@dataclass(frozen=True)
class Change:
    """What is to be done with a layer: `kind` keep, migrate, replicate, both or rollback, and what is expected of it."""

    kind: str
    placement: Placement
    replicas: Replicas
    before_ms: float
    after_ms: float
    reason: str


@dataclass(frozen=True)
class _Trial:
    """A change whose measured times are still to come: the state before it, and that state's last times and counts."""

    iteration: int
    before: policy.LayerState
    ms_before: tuple[float, ...]
    counts_before: tuple[np.ndarray, ...]


def max_over_mean(load_W: np.ndarray) -> float:
    """The fullest rank's load over the mean rank's."""
    return float(load_W.max() / load_W.mean()) if load_W.any() else 1.0


class Controller:
    """Decides for the layers of one pipeline stage.

    Args:
        placements: Y, in force at the start.
        online: interval, replicate, replica_slots, migrate, horizon (also how long a layer is left alone after a rollback),
            min_gain (None: 2 %).
        sizes: see Sizes.
        node_of_rank_W: node of each rank of the group; None = one node.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        online: OnlineConfig,
        sizes: Sizes,
        node_of_rank_W: tuple[int, ...] | None = None,
    ):
        self._online, self._sizes = online, sizes
        self._states = [self._fresh(placement) for placement in placements]
        self._rules = policy.Rules(
            may_migrate=online.migrate,
            replicate=online.replicate,
            num_replica_slots=online.replica_slots,
            horizon=online.horizon,
            min_gain=MIN_GAIN if online.min_gain is None else online.min_gain,
            node_of_rank_W=node_of_rank_W,
        )
        self.history_YWE: np.ndarray | None = None
        self._history_iteration = 0
        self._first_iteration: int | None = None  # of those taken in here
        self._fullest_and_ms: deque[tuple[float, float]] = deque(maxlen=_WINDOW * max(1, len(placements)))
        self._ms_Y: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in placements]
        self._counts_Y: list[deque[np.ndarray]] = [deque(maxlen=_WINDOW) for _ in placements]
        self.max_over_mean = 1.0
        self._trials: dict[int, _Trial] = {}
        self._rolled_back: dict[int, int] = {}
        # layer -> iteration of its last change, taken back or not, and the replicas before it
        self._changed: dict[int, tuple[int, Replicas]] = {}
        self._move_ms = sizes.state_bytes / sizes.gbytes_per_s / 1e6

    def _fresh(self, placement: Placement) -> policy.LayerState:
        return policy.LayerState(placement, Replicas.none(placement, self._online.replica_slots))

    def take_in(self, iteration: int, count_YWE: np.ndarray) -> None:
        """Token copies of an iteration (from 1) by source rank and expert. Sets `max_over_mean`, the mean of the layers."""
        waited = max(1, iteration - self._history_iteration)
        self.history_YWE = policy.blend(self.history_YWE, count_YWE, iteration, waited)
        self._history_iteration = iteration
        if self._first_iteration is None:
            self._first_iteration = iteration
        loads = [self._replicas_in(layer, iteration).host_load(each) for layer, each in enumerate(count_YWE)]
        self.max_over_mean = float(np.mean([max_over_mean(load_W) for load_W in loads]))

    def take_times(self, iteration: int, count_YWE: np.ndarray, ms_Y: Sequence[float]) -> None:
        """Each layer's time on the slowest rank in an iteration, forward and backward, and the copies that it had there.

        Iterations come in order, each once at most, after their counts and as late as they like: decisions taken since then are
        known."""
        if iteration < self._first_iteration + WARMUP_ITERATIONS:
            return
        for layer, (count_WE, ms) in enumerate(zip(count_YWE, ms_Y, strict=True)):
            if layer in self._changed and iteration <= self._changed[layer][0] + 1:
                continue  # the one that ended with the change ran without; the next pays for what has never run before
            self._ms_Y[layer].append(float(ms))
            self._counts_Y[layer].append(np.asarray(count_WE, np.float64))
            load_W = self._states[layer].replicas.host_load(count_WE)
            # with "exact", copies of each micro-batch even the load out
            fullest = load_W.mean() if self._rules.replicate == "exact" else load_W.max()
            self._fullest_and_ms.append((float(fullest), float(ms)))

    def follow(self, in_force: Sequence[tuple[Placement, Replicas]]) -> None:
        """Take placement and replicas of each layer as they are, where somebody else has changed them: a checkpoint."""
        for layer, (placement, replicas) in enumerate(in_force):
            if (placement, replicas) != (self._states[layer].placement, self._states[layer].replicas):
                self._states[layer] = replace(self._fresh(placement), replicas=replicas)
                self._changed.pop(layer, None)
                self._forget(layer)

    def _replicas_in(self, layer: int, iteration: int) -> Replicas:
        """What this iteration ran with: its counts come when what was decided after it is in force."""
        changed, before = self._changed.get(layer, (0, None))
        return before if before is not None and iteration <= changed else self._states[layer].replicas

    def moved(self, ms: float, num_experts: int) -> None:
        """A migration took `ms` on the slowest rank, whose busiest rank sent or got `num_experts`."""
        if num_experts:
            self._move_ms = 0.5 * self._move_ms + 0.5 * ms / num_experts

    def costs(self) -> policy.Costs | None:
        """What is known of the machine; None as long as no layer has been timed."""
        if not self._fullest_and_ms:
            return None
        copies, ms = np.array(self._fullest_and_ms).T
        if not copies.any():
            return None
        whole = ms.sum() / copies.sum()
        # The slope of time over load, drawn towards "all of the time is load" as far as the loads are all alike.
        off = copies - copies.mean()
        prior = len(copies) * (_TELLING_VARIATION * copies.mean()) ** 2
        slope = (float(off @ (ms - ms.mean())) + prior * whole) / (float(off @ off) + prior)
        gb = 1e6
        return policy.Costs(
            compute_ms_per_copy=float(np.clip(slope, 0.05 * whole, whole)),
            exchange_ms_per_copy=self._sizes.copy_bytes / self._sizes.gbytes_per_s / gb,
            node_exchange_ms_per_copy=self._sizes.copy_bytes / self._sizes.node_gbytes_per_s / gb,
            replica_ms_per_copy=self._sizes.replica_bytes / self._sizes.gbytes_per_s / gb,
            move_ms_per_expert=self._move_ms,
        )

    def decide(self, iteration: int, in_force: Sequence[tuple[Placement, Replicas]], no_room: str = "") -> list[Change]:
        """What to do after `iteration`, one Change a layer; the caller does it.

        in_force: placement and replicas of each layer, which somebody else may have changed. no_room: why no expert can
        move now ("" when it can), for the reason in the log.
        """
        self.follow(in_force)
        costs = self.costs()
        if costs is None or self.history_YWE is None:
            return [self._keep(layer, "no layer has been timed yet") for layer in range(len(self._states))]
        changes: dict[int, Change] = {}
        for layer in sorted(self._trials):
            verdict = self._review(layer, iteration, costs, no_room)
            if verdict is not None:
                changes[layer] = verdict
        for layer, when in self._rolled_back.items():
            # else another placement, hardly different, would be tried at once
            if layer not in changes and iteration - when < self._rules.horizon:
                changes[layer] = self._keep(layer, f"a change was rolled back after iteration {when}")
        free = [layer for layer in range(len(self._states)) if layer not in changes]
        rules = replace(self._rules, may_migrate=self._rules.may_migrate and not no_room)
        states = [self._states[layer] for layer in free]
        made = policy.decide(self.history_YWE[free], states, costs, rules, iteration) if free else []
        for layer, decision in zip(free, made, strict=True):
            refused = no_room and self._rules.may_migrate and decision.before_ms > 0
            reason = decision.reason + (f"; experts cannot move: {no_room}" if refused else "")
            kind, expected = decision.kind, (decision.before_ms, decision.after_ms)
            changes[layer] = Change(kind, decision.placement, decision.replicas, *expected, reason)
            if kind != "keep":
                self._begin_trial(layer, iteration, decision)
        return [changes[layer] for layer in range(len(self._states))]

    def _keep(self, layer: int, reason: str) -> Change:
        state = self._states[layer]
        return Change("keep", state.placement, state.replicas, 0.0, 0.0, reason)

    def _begin_trial(self, layer: int, iteration: int, decision: policy.Decision) -> None:
        before = self._states[layer]
        ms, counts = tuple(self._ms_Y[layer])[-_JUDGED:], tuple(self._counts_Y[layer])[-_JUDGED:]
        self._trials[layer] = _Trial(iteration, before, ms, counts)
        self._changed[layer] = iteration, before.replicas
        self._states[layer] = before.moved_to(decision, iteration, self._rules.horizon)
        self._ms_Y[layer].clear()
        self._counts_Y[layer].clear()

    def _forget(self, layer: int) -> None:
        self._trials.pop(layer, None)
        self._ms_Y[layer].clear()
        self._counts_Y[layer].clear()

    def _review(self, layer: int, iteration: int, costs: policy.Costs, no_room: str) -> Change | None:
        """What to do with a layer that was changed lately; None when it is free for the next decision.

        Loads change from one iteration to the next, so what is compared is by how much each iteration took longer than
        predicted for its own load, then and now, on top of what is predicted for the loads since the change.
        """
        trial, state = self._trials[layer], self._states[layer]
        measured, counts = (list(each)[-_JUDGED:] for each in (self._ms_Y[layer], self._counts_Y[layer]))
        if not trial.ms_before:
            self._trials.pop(layer)
            return None
        if len(measured) < REVIEW_ITERATIONS:
            return self._keep(layer, f"changed after iteration {trial.iteration}, not yet measured often enough")
        self._trials.pop(layer)
        then_N = self._expected_ms(trial.counts_before, trial.before, costs)
        back_N, now_N = (self._expected_ms(counts, each, costs) for each in (trial.before, state))
        back_ms, now_ms = float(np.median(back_N)), float(np.median(now_N))
        before_N, after_N = np.array(trial.ms_before) - then_N + back_ms, np.array(measured) - now_N + now_ms
        margin = policy.MARGIN if len(before_N) >= REVIEW_ITERATIONS else _MARGIN_OF_FEW
        verdict = policy.review(float(np.median(before_N)) - back_ms + now_ms, before_N, after_N, margin)
        moves = state.placement != trial.before.placement
        if verdict.kind == "keep" or (moves and no_room):
            return None
        reason = f"back to before iteration {trial.iteration}: {verdict.reason}"
        self._states[layer] = state.rolled_back(trial.before, iteration)
        self._rolled_back[layer], self._changed[layer] = iteration, (iteration, state.replicas)
        self._forget(layer)
        return Change("rollback", trial.before.placement, trial.before.replicas, now_ms, back_ms, reason)

    def _expected_ms(self, counts, state: policy.LayerState, costs: policy.Costs) -> np.ndarray:
        """Predicted for each iteration by its own counts: that of their mean would be less than the mean of all."""
        return np.array([policy.expected_ms(count_WE, state, costs, self._rules) for count_WE in counts])

    def saved(self) -> list[list[float]] | None:
        """Expected token copies of each expert, by layer: what a checkpoint keeps, whatever plan reads it. Where tokens
        come from, times and trials are learnt anew."""
        return None if self.history_YWE is None else np.rint(self.history_YWE.sum(axis=1)).tolist()

    def restore(self, iteration: int, load_YE: Sequence[Sequence[float]]) -> None:
        """Go on after `iteration` with what `saved` gave. Raises ValueError when it is of other layers."""
        load_YE, placement = np.asarray(load_YE, np.float64), self._states[0].placement
        if load_YE.shape != (len(self._states), placement.num_experts):
            raise ValueError(f"saved loads of shape {load_YE.shape} are of another model")
        shares_YWE = np.repeat(load_YE[:, None], placement.num_ranks, axis=1) / placement.num_ranks
        self.history_YWE, self._history_iteration = shares_YWE, iteration


class ControllersBySize:
    """A Controller for the layers of each size, where a model has several: what a copy costs in one says nothing of another. As
    a Controller, with sizes_Y, those of each layer."""

    def __init__(
        self,
        placements: Sequence[Placement],
        online: OnlineConfig,
        sizes_Y: Sequence[Sizes],
        node_of_rank_W: tuple[int, ...] | None = None,
    ):
        self._parts: list[tuple[list[int], Controller]] = []
        self._bytes_of_part: list[float] = []  # of an expert, over the mean of all layers
        mean_bytes = float(np.mean([sizes.state_bytes for sizes in sizes_Y]))
        for sizes in dict.fromkeys(sizes_Y):
            layers = [layer for layer, its in enumerate(sizes_Y) if its == sizes]
            part = Controller([placements[layer] for layer in layers], online, sizes, node_of_rank_W)
            self._parts.append((layers, part))
            self._bytes_of_part.append(sizes.state_bytes / mean_bytes if mean_bytes else 1.0)

    @property
    def max_over_mean(self) -> float:
        num_layers = sum(len(layers) for layers, _ in self._parts)
        return sum(len(layers) * part.max_over_mean for layers, part in self._parts) / num_layers

    @property
    def history_YWE(self) -> np.ndarray | None:
        histories = [part.history_YWE for _, part in self._parts]
        return None if histories[0] is None else np.stack(self._in_order(histories))

    def take_in(self, iteration: int, count_YWE: np.ndarray) -> None:
        for layers, part in self._parts:
            part.take_in(iteration, count_YWE[layers])

    def take_times(self, iteration: int, count_YWE: np.ndarray, ms_Y: Sequence[float]) -> None:
        for layers, part in self._parts:
            part.take_times(iteration, count_YWE[layers], [ms_Y[layer] for layer in layers])

    def moved(self, ms: float, num_experts: int) -> None:
        """As of a Controller, for experts of an average size."""
        for (_, part), share in zip(self._parts, self._bytes_of_part, strict=True):
            part.moved(ms * share, num_experts)

    def follow(self, in_force: Sequence[tuple[Placement, Replicas]]) -> None:
        for layers, part in self._parts:
            part.follow([in_force[layer] for layer in layers])

    def decide(self, iteration: int, in_force: Sequence[tuple[Placement, Replicas]], no_room: str = "") -> list[Change]:
        decided = [part.decide(iteration, [in_force[layer] for layer in layers], no_room) for layers, part in self._parts]
        return self._in_order(decided)

    def saved(self) -> list[list[float]] | None:
        loads = [part.saved() for _, part in self._parts]
        return None if loads[0] is None else self._in_order(loads)

    def restore(self, iteration: int, load_YE: Sequence[Sequence[float]]) -> None:
        for layers, part in self._parts:
            part.restore(iteration, [load_YE[layer] for layer in layers])

    def _in_order(self, of_parts: Sequence[Sequence]) -> list:
        """What each part says of its layers, by layer."""
        said = {}
        for (layers, _), values in zip(self._parts, of_parts, strict=True):
            said |= zip(layers, values, strict=True)
        return [said[layer] for layer in sorted(said)]


def build_controller(
    placements: Sequence[Placement],
    online: OnlineConfig,
    sizes_Y: Sequence[Sizes],
    node_of_rank_W: tuple[int, ...] | None = None,
) -> Controller | ControllersBySize:
    """Who decides for layers of these sizes."""
    if len(set(sizes_Y)) == 1:
        return Controller(placements, online, sizes_Y[0], node_of_rank_W)
    return ControllersBySize(placements, online, sizes_Y, node_of_rank_W)
