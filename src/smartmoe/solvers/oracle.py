"""Exact solvers for small sizes, the oracles of the others: mixed-integer programs for HiGHS, through scipy.

Layer 0: numpy, and scipy where these are called. Names as in `placement`: E experts, W ranks, G replica slots per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartmoe.placement import EMPTY, Placement, Replicas, check_load
from smartmoe.solvers.ownership import check_solvable, keep_slots


def _scipy(who: str):
    try:
        from scipy.optimize import LinearConstraint, milp
    except ImportError:
        raise ValueError(f'{who} needs scipy: pip install scipy') from None
    return LinearConstraint, milp


def solve_exact(load_E: Sequence[float] | np.ndarray, current: Placement) -> Placement:
    """A placement whose fullest rank has the least possible load, as a mixed-integer program (scipy, HiGHS).

    For small sizes only: the oracle of the other solvers. Experts that stay on their rank keep their slot.

    Args:
        load_E: [E] load per logical expert, not negative.
        current: gives ranks and slots, and which experts keep theirs; without replicas.
    Raises ValueError when scipy is not installed or the program is not solved.
    """
    load_E = check_solvable(load_E, current)
    linear_constraint, milp = _scipy("solve_exact")
    num_ranks, num_experts = current.num_ranks, current.num_experts
    num_cells, scale = num_ranks * num_experts, load_E.sum() or 1.0
    # Variables: assign[rank, expert] in {0, 1}, then the load of the fullest rank.
    ones_E, eye_W = np.ones((1, num_experts)), np.eye(num_ranks)
    once = np.hstack([np.kron(np.ones((1, num_ranks)), np.eye(num_experts)), np.zeros((num_experts, 1))])
    slots = np.hstack([np.kron(eye_W, ones_E), np.zeros((num_ranks, 1))])
    fullest = np.hstack([np.kron(eye_W, load_E[None, :] / scale), -np.ones((num_ranks, 1))])
    constraints = [
        linear_constraint(once, 1, 1),
        linear_constraint(slots, 0, current.slots_per_rank),
        linear_constraint(fullest, -np.inf, 0),
    ]
    objective, integral = np.zeros(num_cells + 1), np.ones(num_cells + 1)
    objective[-1], integral[-1] = 1.0, 0.0
    bounds = (np.zeros(num_cells + 1), np.append(np.ones(num_cells), np.inf))
    result = milp(objective, constraints=constraints, integrality=integral, bounds=bounds, options={"mip_rel_gap": 0.0})
    if result.x is None:
        raise ValueError(f"solve_exact: {result.message}")
    assign = result.x[:num_cells].reshape(num_ranks, num_experts)
    return keep_slots(assign.argmax(axis=0), current)


def solve_exact_replicas(
    load_E: Sequence[float] | np.ndarray, placement: Placement, num_replica_slots: int, gap: float = 1e-6
) -> Replicas:
    """Replicas with which the fullest rank has the least possible load, whatever they cost; all sources split alike.

    Args:
        load_E: [E] load per logical expert, not negative.
        placement: who owns which expert.
        num_replica_slots: G, at least 0.
        gap: the fraction by which the result may miss the optimum.
    Raises ValueError when scipy is not installed or the program is not solved.
    """
    load_E, num_ranks, num_experts = check_load(load_E, placement), placement.num_ranks, placement.num_experts
    none = Replicas.none(placement, num_replica_slots)
    if num_replica_slots == 0 or num_ranks == 1 or not load_E.any():
        return none
    linear_constraint, milp = _scipy("solve_exact_replicas")
    num_cells, owned_EW = num_experts * num_ranks, none.share_SEW[0] > 0
    # Variables: share[expert, rank], then copied[expert, rank] in {0, 1}, then the load of the fullest rank over the mean.
    nothing, eye = np.zeros((num_cells, 1)), np.eye(num_cells)
    whole = np.hstack([np.kron(np.eye(num_experts), np.ones(num_ranks)), np.zeros((num_experts, num_cells + 1))])
    hosted = np.hstack([eye, -eye, nothing])
    slots = np.hstack(
        [np.zeros((num_ranks, num_cells)), np.tile(np.eye(num_ranks), num_experts), np.zeros((num_ranks, 1))]
    )
    load = np.kron(load_E / load_E.sum() * num_ranks, np.eye(num_ranks))
    fullest = np.hstack([load, np.zeros((num_ranks, num_cells)), -np.ones((num_ranks, 1))])
    result = milp(
        np.append(np.zeros(2 * num_cells), 1.0),
        constraints=[
            linear_constraint(whole, 1, 1),
            linear_constraint(hosted, -np.inf, owned_EW.ravel()),
            linear_constraint(slots, 0, num_replica_slots),
            linear_constraint(fullest, -np.inf, 0),
        ],
        integrality=np.repeat([0, 1, 0], [num_cells, num_cells, 1]),
        bounds=(
            np.append(np.zeros(2 * num_cells), 1.0),
            np.concatenate([np.ones(num_cells), ~owned_EW.ravel(), [np.inf]]),
        ),
        options={"mip_rel_gap": gap},
    )
    if result.x is None:
        raise ValueError(f"solve_exact_replicas: {result.message}")
    copied_EW = result.x[num_cells : 2 * num_cells].reshape(num_experts, num_ranks) > 0.5
    share_EW = np.where(copied_EW | owned_EW, np.maximum(result.x[:num_cells].reshape(num_experts, num_ranks), 0), 0)
    share_EW /= share_EW.sum(axis=1, keepdims=True)
    replicas = [np.flatnonzero(copied_EW[:, ep_rank]).tolist() for ep_rank in range(num_ranks)]
    flat = [expert for row in replicas for expert in row + [EMPTY] * (num_replica_slots - len(row))]
    return Replicas(tuple(flat), np.broadcast_to(share_EW, (num_ranks, num_experts, num_ranks)))
