"""Train the GPT of RUN_DIR/run.json with Megatron-LM's loop and Megatron's own MoE layer (system "megatron"):

    torchrun --nproc-per-node N -m smartmoe.hosts.megatron.run RUN_DIR [--resume]

Model, text, their order and the learning rates are those of `smartmoe.train`; initial values and router are Megatron's.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch.distributed as dist

from smartmoe import record
from smartmoe.config import RunConfig, check, from_dict
from smartmoe.hosts.megatron.limits import problems, words
from smartmoe.train import fail


def main(argv: list[str] | None = None, stay: bool = False) -> int:
    """stay: other runs follow in this process and its world."""
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.hosts.megatron.run", description="Train with Megatron-LM."
    )
    parser.add_argument("run_dir", type=Path, help="directory with run.json, whose config is trained")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in RUN_DIR, if any")
    parser.add_argument(
        "--cache", type=Path, default=None, help="where tokenised text is kept (default: .cache/smartmoe)"
    )
    args = parser.parse_args(argv)
    try:
        _run(args)
    except Exception as error:
        fail(args.run_dir, int(os.environ.get("RANK", "0")), error)
    if stay:
        forget()
    return 0


def forget() -> None:
    """Take out of Megatron's modules what the last run left there: arguments, process groups, counters. Groups of gloo are
    destroyed: each has a thread that wakes a hundred times a second, and the next run makes its own."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.training import training

    get_moe_metrics_tracker().clear()
    for group in parallel_state._global_process_group_list or ():
        if group is not None and dist.get_backend(group) == "gloo":
            dist.destroy_process_group(group)
    training.destroy_global_state()


def _run(args: argparse.Namespace) -> None:
    run = record.read_run(args.run_dir)
    config = check(from_dict(RunConfig, run["config"], f"{args.run_dir}/run.json: config"), str(args.run_dir))
    if refused := problems(config):
        raise ValueError(f"{args.run_dir}: Megatron-LM cannot do this run: " + "; ".join(refused))
    cache = [] if args.cache is None else ["--smartmoe-cache", str(args.cache)]
    sys.argv = [sys.argv[0], *words(config, args.run_dir, args.resume), *cache]  # Megatron reads it from there
    from smartmoe.hosts.megatron import options, pretrain_gpt

    parsed = pretrain_gpt.parse()
    pretrain_gpt.train(parsed, options.run_config(parsed))


if __name__ == "__main__":
    sys.exit(main())
