"""Do several runs one after another in one world of processes:

    torchrun --nproc-per-node N -m smartmoe.sequence RUN_DIR RUN_DIR .. [--resume]

Each RUN_DIR/run.json names in provenance.entry the program that does it (`ENTRIES`), and all plans have N ranks. A run is what
it would be alone, with a model, an optimizer and a text of its own; imports, the device, connections and compiled kernels are
those of the world, so that only the first run pays for them. What the ranks print goes to RUN_DIR/console.log. A run that
ended well gets RUN_DIR/finished.json; the first that fails ends the world, with its error.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.config import ParallelPlan, RunConfig, check, from_dict
from smartmoe.hosts import HOSTS
from smartmoe.mesh import Mesh
from smartmoe.train import fail, start_world

OWN = {"train": "smartmoe.train", "replay": "smartmoe.bench.replay"}
ENTRIES = {**OWN, **{name: host.module for name, host in HOSTS.items()}}
RESUMABLE = ("train", "megatron")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smartmoe.sequence", description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a directory with run.json")
    parser.add_argument("--resume", action="store_true", help="continue each from its newest checkpoint, if any")
    args = parser.parse_args(argv)
    world_rank = int(os.environ.get("RANK", "0"))
    meshes: dict[ParallelPlan, Mesh] = {}
    for run_dir in args.run_dirs:
        _print_into(run_dir / "console.log")
        try:
            code = do_run(run_dir, meshes, args.resume)
        except Exception as error:
            fail(run_dir, world_rank, error)
        if code:
            return code
        if world_rank == 0:
            record.write_json(run_dir / "finished.json", {"finished": record.utc_now()})
        dist.barrier()  # a rank that fails at once in the next run would end the world before this is written
    dist.destroy_process_group()
    return 0


def do_run(run_dir: Path, meshes: dict[ParallelPlan, Mesh], resume: bool = False) -> int:
    """Do one run in the world of this process, which the first one starts; returns its exit code. Collective over the world.

    meshes: the process groups of earlier runs by plan, added to. Raises ValueError for a run that is of another size or
    whose program is none of `ENTRIES`.
    """
    run = record.read_run(run_dir)
    config = check(from_dict(RunConfig, run["config"], f"{run_dir}/run.json: config"), str(run_dir))
    entry = run.get("provenance", {}).get("entry", "train")
    if entry not in ENTRIES:
        raise ValueError(f"{run_dir}/run.json: entry {entry!r} is not one of {', '.join(ENTRIES)}")
    device = start_world(config, alone=True)
    if config.plan.world_size != dist.get_world_size():
        raise ValueError(
            f"{run_dir}: plan {config.plan.describe()} is of {config.plan.world_size} ranks, this world has "
            f"{dist.get_world_size()}: give runs of one size"
        )
    words = [str(run_dir), *(["--resume"] if resume and entry in RESUMABLE else [])]
    program = importlib.import_module(ENTRIES[entry])
    code = program.main(words, meshes) if entry in OWN else program.main(words, stay=True)
    gc.collect()  # models and optimizers are full of circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()
    return code


def _print_into(path: Path) -> None:
    """Let what this process prints from now on be appended to `path`, that of libraries included."""
    sys.stdout.flush()
    sys.stderr.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
