"""The paper's own estimate of a layer's time, rebuilt from its published values.

The paper's artifact holds estimates (8 and 16 GPUs, 32 experts, hidden size 1536 as far as its files tell) but not the
model behind them. Its form and its constants follow from those values and the routing counts: the residual is below
1e-6 ms on every point whose counts are public. With n = token copies of an expert, the time of its products is piecewise
linear; a device's time is the sum over its experts, and with several nodes an exchange proportional to its copies is
added; the layer's time is that of the slowest device. It is kept as a baseline: our own model is smartmoe.planner.layer_cost.
"""

from __future__ import annotations

import numpy as np

EXPERT_MS = 0.7  # of an expert that has any copies
SMALL_MS = 2.0842788572585e-3  # each copy, up to KNEE of them
KNEE = 819.2
LARGE_MS = 6.462317714e-4  # each copy, from FULL on
FULL = 4096.0
EXCHANGE_MS = 5.6  # two nodes: the exchange of no copies
EXCHANGE_COPY_MS = 5.751466667e-4  # and of each copy that a device receives


def expert_ms(copies: np.ndarray) -> np.ndarray:
    """[...] ms that one expert takes for so many token copies; nothing for none."""
    knots = [0.0, KNEE, FULL, 2 * FULL]
    times = [EXPERT_MS, EXPERT_MS + SMALL_MS * KNEE, EXPERT_MS + LARGE_MS * FULL, EXPERT_MS + LARGE_MS * 2 * FULL]
    beyond = LARGE_MS * np.maximum(copies - 2 * FULL, 0.0)
    return np.where(np.asarray(copies) > 0, np.interp(copies, knots, times) + beyond, 0.0)


def layer_ms(copies_E: np.ndarray, num_devices: int, num_nodes: int = 1) -> np.ndarray:
    """[...] ms of a layer: copies_E [..., E] token copies of all devices for each expert, experts in order."""
    count = np.asarray(copies_E, float).reshape(*np.shape(copies_E)[:-1], num_devices, -1)
    device_ms = expert_ms(count).sum(-1)
    if num_nodes > 1:
        device_ms = device_ms + EXCHANGE_COPY_MS * count.sum(-1)
    return device_ms.max(-1) + (EXCHANGE_MS if num_nodes > 1 else 0.0)
