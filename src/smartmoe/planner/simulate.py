"""A training run that never runs: plan x routing trace x placement policy on any cluster, iteration by iteration.

What an iteration decides depends on counts alone, so the policy is played first, on the host and in order, as online
placement would; then the times of all iterations follow from the cost model, micro-batch by micro-batch through the real
pipeline schedule. What is sent for migration and replication is charged at full price: nothing of it is hidden behind
computation. All source ranks of a micro-batch are taken as alike.

Axes: I iterations, M micro-batches, L MoE layers, E experts, W ranks of an expert group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smartmoe import record
from smartmoe.config import ClusterSpec, ParallelPlan, RunConfig, to_dict
from smartmoe.placement import Placement, num_moves
from smartmoe.planner import pool
from smartmoe.planner.copies import CopyCosts, replicate
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.layer_cost import busiest_bytes, exchange_ms
from smartmoe.planner.loads import Loads
from smartmoe.planner.primitives import Primitives
from smartmoe.solvers import solve_greedy, solve_least_move

POLICIES = ("static", "greedy", "least_move", "replicate_history", "replicate_exact")
SOLVERS = {"greedy": solve_greedy, "least_move": solve_least_move}
_CHUNK_BYTES = 2e8  # of the largest array made at once
MAX_SOLVES = 30_000  # beyond so many, exact replication is solved once for the micro-batches of an iteration


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How experts are placed while the run goes on: asked every `interval` iterations; `replica_slots` for each rank."""

    kind: str = "static"
    interval: int = 10
    replica_slots: int = 0

    def __post_init__(self):
        if self.kind not in POLICIES:
            raise ValueError(f'policy "{self.kind}" is not one of {", ".join(POLICIES)}')
        if self.interval < 1:
            raise ValueError(f"interval = {self.interval} must be at least 1")
        if self.kind.startswith("replicate") != (self.replica_slots > 0):
            raise ValueError(
                f"policy {self.kind} with {self.replica_slots} replica slots: give slots to replication only"
            )


@dataclass
class Played:
    """What a policy did. expert_of_slot: [I, L, E]; host_share: [I, M or 1, L, E, W] in its place with replication.

    moved: events of migration, (iteration, layer, experts that crossed ranks, experts through the busiest rank).
    copies: [I, M or 1, L] most replicas that a rank receives or owner sends; nothing without replication.
    """

    expert_of_slot: np.ndarray | None = None
    host_share: np.ndarray | None = None
    moved: list[tuple[int, int, int, np.ndarray]] = field(default_factory=list)
    copies: np.ndarray | None = None
    is_exact: bool = False


@dataclass(frozen=True)
class Simulation:
    """Times in ms. step_ms: [I]; layer_forward_ms, layer_backward_ms: [I, L], micro-batches added up; overhead_ms: [I] of
    step_ms, for moving and copying experts; max_over_mean: [I] of rank loads, mean over layers; events: lines of
    events.jsonl."""

    step_ms: np.ndarray
    layer_forward_ms: np.ndarray
    layer_backward_ms: np.ndarray
    overhead_ms: np.ndarray
    max_over_mean: np.ndarray
    events: list[dict]


def simulate(
    config: RunConfig, cluster: ClusterSpec, primitives: Primitives, loads: Loads, policy: Policy
) -> Simulation:
    """Run `config` (its plan and micro-batch) for as many iterations as `loads` has samples.

    Raises ValueError when the plan is not legal on this cluster.
    """
    plan, micro_batch = config.plan, config.workload.micro_batch_size
    reason = pool.why_illegal(config, cluster, plan, micro_batch)
    if reason is not None:
        raise ValueError(f"plan {pool.name_of(plan, micro_batch)} is not legal: {reason}")
    share = loads.share.mean(axis=2, keepdims=True)  # all sources alike
    num_micro = config.num_micro_batches
    if share.shape[1] > num_micro:
        share = share[:, :num_micro]
    online = dataclasses.replace(config.online, replica_slots=policy.replica_slots)
    config = dataclasses.replace(config, online=online)
    rows = share[:, :, 0]
    num_iterations = len(share)
    costs = CopyCosts.of(config, cluster, primitives, loads, num_micro)
    played = _play(rows, plan.ep, policy, costs.tokens_per_copy(policy.kind == "replicate_exact"))
    pieces = []
    for part in _parts(num_iterations, rows.shape[1:], plan.ep if played.host_share is not None else 1):
        cost = CostModel(
            config, cluster, primitives, Loads(share[part], loads.about),
            expert_of_slot=None if played.expert_of_slot is None else played.expert_of_slot[part],
            host_share=None if played.host_share is None else played.host_share[part],
        )  # fmt: skip
        pieces.append(_times(cost, plan, micro_batch, num_micro))
    step, forward, backward, balance = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
    overhead, events = _overhead(played, costs, num_iterations)
    return Simulation(step + overhead, forward, backward, overhead, balance, events)


def _parts(num_iterations, shape, factor):
    """Slices of iterations that fit in memory at once."""
    each = 8 * float(np.prod(shape)) * factor * 4
    size = max(1, int(_CHUNK_BYTES / each))
    return [slice(start, start + size) for start in range(0, num_iterations, size)]


def _times(cost: CostModel, plan: ParallelPlan, micro_batch: int, num_micro: int):
    """(step [I], forward [I, L], backward [I, L], max over mean load [I]) of one part."""
    step = cost.estimate(plan, micro_batch).step_ms
    times = cost.layer_times(plan, micro_batch)
    num_seen = cost.loads.share.shape[1]
    weight_M = np.bincount(np.arange(num_micro) % num_seen, minlength=num_seen)
    forward, backward = (
        np.einsum("sml,m->sl", np.broadcast_to(ms, cost.loads.share.sum((2, 4)).shape), weight_M)
        for ms in (times.forward_ms(), times.backward_ms())
    )
    rows_SLW = cost.rows(plan, micro_batch)
    mean = rows_SLW.mean(-1)
    balance = np.where(mean > 0, rows_SLW.max(-1) / np.maximum(mean, 1e-12), 1.0).mean(1)
    return step, forward, backward, balance


# ---------------------------------------------------------------------------------------------------------------- policy


def _play(share_IMLE: np.ndarray, ep: int, policy: Policy, tokens_per_copy: float) -> Played:
    """The placement that serves each iteration: it was decided from earlier ones, except by exact replication.

    tokens_per_copy: as a fraction of all token copies of a group's micro-batch, what is computed in the time that one copy
    of an expert costs.
    """
    num_iterations, num_micro, num_layers, num_experts = share_IMLE.shape
    if policy.kind == "static" or ep == 1:
        return Played()
    start = Placement.identity(num_experts, ep)
    if policy.kind in SOLVERS:
        return _play_moves(share_IMLE.sum(1), start, policy, num_iterations, num_layers)
    every = policy.kind == "replicate_exact"
    alike = not every or num_iterations * num_micro * num_layers > MAX_SOLVES
    load = share_IMLE.mean(1, keepdims=True) if alike else share_IMLE
    shape = (*load.shape, ep)
    share, copies = np.zeros(shape), np.zeros(load.shape[:3])
    owners = [start] * (load.shape[1] * num_layers)
    owner = np.zeros((num_experts, ep))
    owner[np.arange(num_experts), start.rank_of_expert()] = 1.0
    current, current_copies = np.broadcast_to(owner, shape[1:]), np.zeros(load.shape[1:3])
    for row in range(num_iterations):
        if every:
            current, current_copies = replicate(load[row], owners, policy.replica_slots, tokens_per_copy)
        share[row], copies[row] = current, current_copies
        if not every and (row + 1) % policy.interval == 0:
            current, current_copies = replicate(load[row], owners, policy.replica_slots, tokens_per_copy)
    return Played(host_share=share, copies=copies, is_exact=every)


def _play_moves(load_ILE, start, policy, num_iterations, num_layers) -> Played:
    solve, current = SOLVERS[policy.kind], [start] * num_layers
    order = np.zeros(load_ILE.shape, int)
    moved = []
    for row in range(num_iterations):
        order[row] = [placement.expert_of_slot for placement in current]
        if (row + 1) % policy.interval == 0:
            for layer in range(num_layers):
                new = solve(load_ILE[row, layer], current[layer])
                if new is not current[layer] and new != current[layer]:
                    crossing = _crossing(current[layer], new)
                    moved.append((row, layer, num_moves(current[layer], new), crossing))
                    current[layer] = new
    return Played(expert_of_slot=order, moved=moved)


def _crossing(old: Placement, new: Placement) -> np.ndarray:
    """[W, W] experts that go from rank to rank."""
    travel = np.zeros((old.num_ranks, old.num_ranks))
    np.add.at(travel, (old.rank_of_expert(), new.rank_of_expert()), 1.0)
    return travel


def _overhead(played: Played, costs: CopyCosts, num_iterations: int) -> tuple[np.ndarray, list[dict]]:
    """(ms [I] for moving and copying experts, events). Stages work at the same time: the slowest counts."""
    setting, events = costs.setting, []
    row_bytes = setting.model.hidden_size * setting.dtype_bytes
    cost_IP = np.zeros((num_iterations, costs.num_stages))
    for row, layer, num_moved, travel in played.moved:
        spread = busiest_bytes(travel * (costs.state_bytes / row_bytes), setting)
        ms = float(exchange_ms(costs.primitives, "all_to_all", setting.ep, *spread))
        cost_IP[row, costs.stage_of[layer]] += ms
        events.append(
            {"iteration": row + 1, "layer": layer, "kind": "migrate", "num_moved": num_moved, "cost_ms": round(ms, 4)}
        )
    if played.copies is not None:
        cost_IP += costs.of_stages(played.copies, played.is_exact)
        before = np.zeros_like(played.copies[0])
        for row, copies in enumerate(played.copies):
            if not played.is_exact and (copies != before).any():
                events.append({"iteration": row + 1, "kind": "replicate", "num_copied": int(copies.sum())})
            before = copies
    return cost_IP.max(1), events


# ------------------------------------------------------------------------------------------------------------------ files


def write_run(
    run_dir: Path,
    run_id: str,
    config: RunConfig,
    found: Simulation,
    bars: list[dict],
    facts: dict,
    with_spans: bool = True,
) -> None:
    """A run directory that says it is simulated, with the files of a measured one (logs/README.md)."""
    facts = {**facts, "num_ranks": config.plan.world_size, "entry": "simulate"}
    record.create_run(run_dir, run_id, to_dict(config), bars, source="simulated", provenance=record.provenance(**facts))
    writer = record.RunWriter(run_dir)
    for row, step_ms in enumerate(found.step_ms):
        balance = round(float(found.max_over_mean[row]), 4)
        writer.metric({"iteration": row + 1, "step_ms": round(float(step_ms), 4), "load_max_over_mean": balance})
        for layer in range(found.layer_forward_ms.shape[1]) if with_spans else ():
            times = {
                key: round(float(ms[row, layer]), 4)
                for key, ms in (("forward_ms", found.layer_forward_ms), ("backward_ms", found.layer_backward_ms))
            }
            writer.span({"iteration": row + 1, "rank": 0, "layer": layer, **times})
    for event in found.events:
        writer.event(event)
    writer.close()
    record.set_status(run_dir, "ok", "simulated")
