"""Who computes how much: the lines of loads.jsonl, from counts of token copies and from where experts and copies are.

Layer 1: numpy only. Axes: R ranks of a stage, M micro-batches, E experts, W ranks of an expert group, which are its sources S.
"""

from __future__ import annotations

import numpy as np

from smartmoe.placement import Placement, Replicas
from smartmoe.solvers import solve_exact_step


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
