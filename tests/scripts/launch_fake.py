"""scripts/launch.py with the fake entry in place of torchrun; takes its arguments."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

import launch  # noqa: E402
import runner  # noqa: E402
from launch import data  # noqa: E402


class _Tokens:
    num_tokens = 0


def fake_command(runs, run_dirs, resume):
    return [sys.executable, str(HERE / "fake_entry.py"), *map(str, run_dirs)]


if __name__ == "__main__":
    runner.GRACE_S = 1.0
    if num_gpus := int(os.environ.get("FAKE_GPUS", "0")):
        launch.count_gpus = lambda: num_gpus
        launch.num_cores = lambda: int(os.environ["FAKE_CORES"])
    data.load_tokens = lambda *args, **kwargs: _Tokens
    launch.Launcher = lambda **kwargs: runner.Launcher(command=fake_command, **kwargs)
    sys.exit(launch.main())
