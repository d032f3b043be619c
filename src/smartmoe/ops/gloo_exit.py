"""Importing this lets gloo's threads finish before the interpreter ends, which torch leaves to chance (seen with 2.13).

A thread of gloo that has done a collective then lets go of its tensors, for which it needs the interpreter's lock. One that
asks for it after finalization has begun is ended inside C++ code that forbids this: "terminate called without an active
exception", and a run that was done fails with SIGABRT. destroy_process_group joins these threads only where nothing else
holds the group, and layers and meshes do.
"""

from __future__ import annotations

import atexit
import time
from pathlib import Path

TASKS = Path("/proc/self/task")
THREAD_NAME = "pt_gloo_runloop"
PATIENCE_S = 10.0  # a collective that some other rank never joins does not keep this process


def _let_gloo_finish() -> None:
    deadline = time.monotonic() + PATIENCE_S
    num_idle = 0
    while num_idle < 2 and time.monotonic() < deadline:
        time.sleep(0.001)  # gives the interpreter's lock to a thread that waits for it
        num_idle = 0 if _is_running() else num_idle + 1


def _is_running() -> bool:
    """Whether a thread of gloo has work: asleep (S) it waits for a collective, since nobody else holds the lock for long."""
    for task in TASKS.glob("*"):
        try:
            name, state = (task / "stat").read_text().split("(", 1)[1].rsplit(") ", 1)
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended, the latter between opening and reading
            continue
        if name == THREAD_NAME and state[0] != "S":
            return True
    return False


atexit.register(_let_gloo_finish)
