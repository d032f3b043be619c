"""Who computes how much: the lines of loads.jsonl, and what placement and replication would make of a trace.

Layer 1: numpy only. Axes: R ranks of a stage, M micro-batches, E experts, W ranks of an expert group, which are its sources S.
"""

from __future__ import annotations

import numpy as np

from smartmoe.placement import Placement, Replicas
from smartmoe.policy import blend, is_due
from smartmoe.solvers import solve_exact_step, solve_greedy, solve_replicas_layers
from smartmoe.trace import ExpertTrace


def planned_load(
    count_MSE: np.ndarray, placement: Placement, replicas: Replicas, copy_cost: int | None = None
) -> np.ndarray:
    """[W] float64, token copies that each rank computes by the shares of the hosts; hashing tokens to them may differ a
    little.

    Args:
        count_MSE: [M, W, E] integers, copies of each expert that the sources hold in each micro-batch.
        placement, replicas: in force.
        copy_cost: given where replicas are chosen for each micro-batch, from its own counts (see solve_exact_step): then
            of `replicas` only the number of slots is used.
    """
    if copy_cost is None:
        return replicas.host_load(count_MSE.sum(axis=0))
    chosen = [solve_exact_step(count_SE, placement, replicas.num_replica_slots, copy_cost) for count_SE in count_MSE]
    return sum(each.host_load(count_SE) for each, count_SE in zip(chosen, count_MSE, strict=True))


def load_line(
    layer_idx: int, count_RME: np.ndarray, placement: Placement, replicas: Replicas, copy_cost: int | None = None
) -> dict:
    """One layer's line of loads.jsonl, without its iteration.

    Args:
        count_RME: [R, M, E] integers, of all ranks of the stage in the order of stage_rank; each run of W ranks is one
            expert group.
        placement, replicas, copy_cost: see `planned_load`.
    """
    groups = count_RME.reshape(-1, placement.num_ranks, *count_RME.shape[1:])
    load_R = np.concatenate([planned_load(part.swapaxes(0, 1), placement, replicas, copy_cost) for part in groups])
    return {
        "layer": layer_idx,
        "expert_load": count_RME.sum(axis=(0, 1)).tolist(),
        "rank_load": np.round(load_R, 2).tolist(),
    }


def fullest_over_mean(load_W: np.ndarray) -> float:
    """1.0 is perfect balance, or no load at all."""
    return float(load_W.max() / load_W.mean()) if load_W.any() else 1.0


def load_over_time(
    trace: ExpertTrace, layer: int | None, num_ranks: int | None, interval: int, num_replica_slots: int
) -> dict:
    """What the heat maps of a trace show, JSON-ready: see plotting/trace.py.

    Four maps of one layer (None: that with the busiest expert) on `num_ranks` ranks (None: as many as in the trace), each
    with the tokens spread evenly over them as sources: experts in order; placed anew by the greedy solver after every
    `interval` training iterations, from the load of the last recorded one; copies of hot experts from a decayed history,
    as often as policy "auto" decides; and copies for each iteration from its own counts. What is decided serves the
    iterations after it, but for the last. Raises ValueError for a layer, a number of ranks or slots or an interval that
    cannot be.
    """
    over_mean_IL = trace.max_over_mean()
    _, trace_ranks, num_layers, _, num_experts = trace.counts.shape
    layer = int(over_mean_IL.mean(axis=0).argmax()) if layer is None else layer
    num_ranks = min(trace_ranks, num_experts) if num_ranks is None else num_ranks
    if not (0 <= layer < num_layers and 1 <= num_ranks <= num_experts and interval >= 1 and num_replica_slots >= 0):
        raise ValueError(
            f"--layer {layer}, --ranks {num_ranks}, --interval {interval}, --replica-slots {num_replica_slots}: the trace has "
            f"layers 0 .. {num_layers - 1} and {num_experts} experts; an interval is at least 1"
        )
    load_IE, iterations = trace.expert_load()[:, layer], trace.iteration.tolist()
    series = _Simulation(Placement.identity(num_experts, num_ranks), num_replica_slots, interval)
    for load_E, iteration, following in zip(load_IE, iterations, [*iterations[1:], None], strict=True):
        series.play(load_E, iteration, following)
    expert_load = load_IE.tolist()
    return {
        "note": f"{num_experts} experts on {num_ranks} ranks, {num_replica_slots} replica slots a rank",
        "iterations": iterations,
        "max_over_mean": over_mean_IL.T.tolist(),
        "maps": [
            {"layer": layer, "expert_load": expert_load, "series": name, "rank_load": load, "changes": series.changes[name],
             "source": "recorded" if number == 0 else "simulated"}
            for number, (name, load) in enumerate(series.rank_load.items())
        ],
    }  # fmt: skip


class _Simulation:
    """Plays the load of one layer under several placements at once."""

    def __init__(self, placement: Placement, num_replica_slots: int, interval: int):
        self._in_order = self._greedy = placement
        self._copied = self._none = Replicas.none(placement, num_replica_slots)
        self._interval, self._history, self._last = interval, None, 0
        names = ("experts in order", f"greedy, every {interval}", f"copies, every {interval}", "exact copies")
        self.rank_load: dict[str, list] = {name: [] for name in names}
        self.changes: dict[str, dict[str, list[int]]] = {name: {} for name in names}

    def play(self, load_E: np.ndarray, iteration: int, following: int | None) -> None:
        """The load of `iteration`; then what is decided before `following`, the next recorded one."""
        num_ranks, slots = self._in_order.num_ranks, self._none.num_replica_slots
        share_E, rest_E = np.divmod(load_E, num_ranks)
        count_SE = share_E + (np.arange(num_ranks)[:, None] < rest_E)
        exact = solve_exact_step(count_SE, self._in_order, slots)
        moved = Replicas.none(self._greedy, slots)
        for load, replicas in zip(self.rank_load.values(), (self._none, moved, self._copied, exact), strict=True):
            load.append(np.round(replicas.host_load(count_SE), 2).tolist())
        self._history = blend(self._history, count_SE, iteration, max(iteration - self._last, 1))
        self._last = iteration
        if following is None:
            return
        _, greedy, copied, _ = self.changes.values()
        passed = range(iteration, following)
        if any(number % self._interval == 0 for number in passed):
            new = solve_greedy(load_E, self._greedy)
            if new != self._greedy:
                greedy.setdefault("migrate", []).append(following)
            self._greedy = new
        if any(is_due(number, self._interval) for number in passed) and slots:
            (new,) = solve_replicas_layers(self._history[None], [self._in_order], slots)
            if new.expert_of_replica != self._copied.expert_of_replica:
                copied.setdefault("replicate", []).append(following)
            self._copied = new
