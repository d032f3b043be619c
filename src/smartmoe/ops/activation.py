"""Activations between the two matrices of an expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(hidden_RF: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply "gelu" (tanh form, as GPT), "relu", or "swiglu" (silu of the first half times the second: [R, 2F] -> [R,
    F])."""
    if activation == "gelu":
        return F.gelu(hidden_RF, approximate="tanh")
    if activation == "relu":
        return F.relu(hidden_RF)
    if activation == "swiglu":
        gate, value = hidden_RF.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f'activation = "{activation}" is not one of gelu, relu, swiglu')


def widening(activation: str) -> int:
    """How many times wider than F the first matrix is: 2 for "swiglu", else 1."""
    return 2 if activation == "swiglu" else 1
