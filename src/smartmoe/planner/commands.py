"""The commands `smartmoe profile`, `smartmoe plan` and `smartmoe simulate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def add_parsers(commands, start: Callable[[list[str]], int]) -> None:
    """Add the planner's commands to an argparse subparsers object. `start` runs a command line to its end."""
    _add_profile(commands, start)


# ---------------------------------------------------------------------------------------------------------------- profile


def _add_profile(commands, start) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure what this machine's pieces of a training step take",
        description="Measure the primitives that `smartmoe plan` reads: products, attention, exchanges, optimizer. "
        "About a minute on two GPUs. Options behind -- go to smartmoe.bench.profile_cluster (--dtype, --shapes, --tokens).",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes (GPUs) that measure together; default: 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where torch sees one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the profile to write")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(command=lambda args: _profile(args, start))


def _profile(args: argparse.Namespace, start) -> int:
    if args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: at least 1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command += ["-m", "smartmoe.bench.profile_cluster", "--out", str(args.out), *args.more]
    return start(command + (["--device", args.device] if args.device else []))
