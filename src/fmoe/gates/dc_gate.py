"""GShard's gate with a capacity that all workers share."""

from __future__ import annotations

from fmoe.gates.gshard_gate import GShardGate
from fmoe.gates.utils import limit_by_capacity


class DCGate(GShardGate):
    """As GShardGate, but an expert takes at most ceil(capacity * T) copies of all workers together. Collective."""

    def _limit(self, expert_idx_TK, num_seats: int):
        return limit_by_capacity(expert_idx_TK, self.num_expert, self.world_size, num_seats)[2]
