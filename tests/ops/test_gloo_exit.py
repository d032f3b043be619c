"""A process that ends right behind a collective over gloo ends well."""

import os
import subprocess
import sys
from pathlib import Path

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
