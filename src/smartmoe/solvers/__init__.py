"""Solvers that balance experts over ranks: who owns which expert, and who holds copies of which.

Layer 0: numpy only (the exact solvers need scipy).
"""

from smartmoe.solvers.exact_step import solve_exact_step
from smartmoe.solvers.oracle import solve_exact, solve_exact_replicas
from smartmoe.solvers.ownership import solve_greedy, solve_least_move
from smartmoe.solvers.replication import solve_joint, solve_replicas, solve_replicas_layers

__all__ = [
    "solve_exact",
    "solve_exact_replicas",
    "solve_exact_step",
    "solve_greedy",
    "solve_joint",
    "solve_least_move",
    "solve_replicas",
    "solve_replicas_layers",
]
