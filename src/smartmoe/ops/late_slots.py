"""Weights of which some slots are still on their way when the first product begins.

Copies of experts travel while tokens do; where they take longer, the slots that are there need not wait for them: the
product of the others follows on the stream that brings them, and fills the device as the first one leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LateSlots:
    """Said of a weight [L, ...] by its attribute `late_slots`: the slots from `first` on are there for what is launched inside
    `beside()`, which runs beside the current stream, after what is queued there by then; and for what is launched on the
    current stream after `wait()`, which is to be called once."""

    first: int
    beside: Callable[[], AbstractContextManager]
    wait: Callable[[], None]


def late_slots_of(weight: torch.Tensor) -> LateSlots | None:
    """Where some slots of this weight are still on their way; None under torch.compile, which would not see it."""
    return None if torch.compiler.is_compiling() else getattr(weight, "late_slots", None)
