"""FasterMoE is switched by environment variables; these read them."""

from __future__ import annotations

import os


def float_from_env(key: str, default: float = -1) -> float:
    """The variable `key` as a number, or `default` where it is not set."""
    return float(os.environ.get(key, default))


def switch_from_env(key: str, default: bool = False) -> bool:
    """Whether the variable `key` is 1, ON or TRUE (in any case), or `default` where it is not set."""
    return os.environ.get(key, str(default)).upper() in ("1", "ON", "TRUE")
