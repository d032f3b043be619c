"""A process that ends right behind a collective over gloo ends well."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smartmoe.ops import gloo_exit

SRC = Path(__file__).resolve().parents[2] / "src"
# The loop keeps the interpreter's lock while gloo's thread, done with the sum, waits for it to let go of the tensor.
PROGRAM = """
import sys, torch, torch.distributed as dist
import smartmoe.layer
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = dist.group.WORLD
sys.setswitchinterval(60)
tensor = torch.ones(8)
dist.all_reduce(tensor, async_op=True)
for _ in range(10**7):
    pass
dist.destroy_process_group()
"""


def test_a_process_ends_well_right_behind_a_collective():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
def test_a_thread_that_ends_while_it_is_looked_at_has_no_work(monkeypatch, error):
    class Gone:
        def __truediv__(self, name):
            return self

        def read_text(self):
            raise error

    monkeypatch.setattr(gloo_exit, "TASKS", SimpleNamespace(glob=lambda pattern: [Gone()]))
    assert not gloo_exit._is_running()
