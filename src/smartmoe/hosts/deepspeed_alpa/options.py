"""The benchmark's command line, shared by the launcher and the ranks it starts. Never imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from smartmoe.hosts.deepspeed_alpa.suites import MODELS, NUM_GPUS, SUITES, Case, find_case

PROG = "run_deepspeed_benchmark.sh"
BACKENDS = ("deepspeed", "smartmoe")
OPTIMIZERS = ("adafactor", "adafactor-momentum", "adamw")
PRECISIONS = ("fp16", "bf16", "fp32")
LAUNCHERS = ("torchrun", "deepspeed", "slurm")
DISPATCHERS = ("auto", "basic", "direct", "padded")
CAPTURES = {"none": (), "smartmoe": ("smartmoe",), "both": BACKENDS}  # back ends whose blocks are captured
TSV_NAME = "deepspeed_results_e2e.tsv"


def build_parser() -> argparse.ArgumentParser:
    """The parser of both. Wrong usage exits with status 2."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} {'|'.join(map(str, NUM_GPUS))} [options], --help explains them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train the MoE models of Alpa's artifact with DeepSpeed, with its own MoE layer and with SmartMoE's,\n"
        "and report seconds of an iteration, tokens/s and TFLOP/s.",
        epilog=f"Writes <out>/{TSV_NAME} (the artifact's eight columns, appended) and one JSON file for each run.\n"
        "Exit codes: 0 done; 2 bad usage; otherwise that of the run that failed.",
    )
    parser.add_argument("num_gpus", type=int, choices=NUM_GPUS, metavar="NUM_GPUS", help=f"one of {NUM_GPUS}")
    _add_case(parser.add_argument_group("what runs"))
    _add_training(parser.add_argument_group("how it trains"))
    _add_measuring(parser.add_argument_group("what is measured"))
    _add_launch(parser.add_argument_group("how it starts"))
    return parser


def _add_case(group) -> None:
    group.add_argument("--suite", choices=SUITES, default="artifact", help="default: %(default)s")
    group.add_argument("--backend", choices=("both", *BACKENDS), default="both", help="MoE layer (default: both in turn)")
    group.add_argument("--model", choices=MODELS, metavar="NAME", help=f"another model: {', '.join(MODELS)}")
    group.add_argument("--ep", type=int, help="ranks that share the experts (default: the suite's)")
    group.add_argument("--micro-batches", type=int, help="micro-batches of an iteration (default: the suite's)")
    group.add_argument("--batch-size", type=int, help="sequences of an iteration (default: the suite's)")


def _add_training(group) -> None:
    group.add_argument("--zero", type=int, default=2, help="ZeRO stage 0, 1 or 2 (default: %(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, help="default: bf16, fp32 for suite tiny; the artifact: fp16")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adafactor", help="default: %(default)s")
    group.add_argument("--activation", choices=("gelu", "relu"), default="gelu", help="default: %(default)s")
    group.add_argument("--balance-weight", type=float, default=0.0, help="of the balance loss (default: %(default)s)")
    group.add_argument("--second", choices=("gumbel", "argmax"), default="gumbel", help="how the 2nd expert is chosen")
    group.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    group.add_argument("--no-recompute", action="store_true", help="keep activations instead of computing them twice")
    group.add_argument("--dispatcher", choices=DISPATCHERS, default="auto", help="SmartMoE's (default: %(default)s)")
    group.add_argument(
        "--capture", choices=CAPTURES, default="none",
        help="back ends whose blocks run from CUDA graphs (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--data", nargs="+", default=[], metavar="FILE", help="text, or Megatron .bin/.idx prefixes")
    group.add_argument("--seed", type=int, default=1234, help="default: %(default)s")


def _add_measuring(group) -> None:
    group.add_argument("--iterations", type=int, default=5, help="measured iterations (default: %(default)s)")
    group.add_argument("--warmup", type=int, default=2, help="iterations before them (default: %(default)s)")
    group.add_argument("--out", default="outputs_from_exec_alpa", metavar="DIR", help="default: %(default)s")
    group.add_argument("--cache", default=".cache/smartmoe", metavar="DIR", help="of tokens (default: %(default)s)")


def _add_launch(group) -> None:
    group.add_argument("--launcher", choices=LAUNCHERS, default="torchrun", help="default: %(default)s")
    group.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    group.add_argument("--hostfile", type=Path, help="default: hostfile_<n>node here, as get_hostfiles.py writes it")
    group.add_argument("--master-port", type=int, default=29500, help="default: %(default)s")
    group.add_argument("--dry-run", action="store_true", help="print the case and the commands, run nothing")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Case]:
    """The arguments and the case they choose. Exits with status 2, and says why, when they do not fit."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        case = find_case(
            args.suite, args.num_gpus, model=args.model, ep=args.ep, num_micro_batches=args.micro_batches,
            batch_size=args.batch_size,
        )  # fmt: skip
        args.precision = args.precision or ("fp32" if case.model.name == "tiny" else "bf16")
        _check(args, case)
    except ValueError as error:
        parser.error(str(error))
    return args, case


def _check(args: argparse.Namespace, case: Case) -> None:
    if args.zero == 3:
        raise ValueError("ZeRO-3 does not work with DeepSpeed's MoE layers: take --zero 0, 1 or 2")
    if args.zero not in (0, 1, 2):
        raise ValueError(f"--zero {args.zero} is not 0, 1 or 2")
    if args.iterations < 1 or args.warmup < 0 or args.gpus_per_node < 1:
        raise ValueError("--iterations and --gpus-per-node must be at least 1, --warmup at least 0")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout} must be in 0 .. 1")
    if args.capture != "none" and args.no_recompute:
        raise ValueError("--capture computes blocks again in the backward pass: leave --no-recompute out")
    if args.capture != "none" and args.dispatcher == "basic":
        raise ValueError("--capture needs an exchange for which the host does not wait: take --dispatcher direct or padded")
    # the tiny model is for CPUs, where nothing is captured in truth
    if "smartmoe" in captured_backends(args) and args.precision != "bf16" and case.model.name != "tiny":
        raise ValueError(one_by_one(args.precision))
    if args.num_gpus > args.gpus_per_node and args.num_gpus % args.gpus_per_node:
        raise ValueError(f"{args.num_gpus} GPUs do not fill nodes of {args.gpus_per_node}")


def captured_backends(args: argparse.Namespace) -> tuple[str, ...]:
    """The back ends whose blocks are captured."""
    return CAPTURES[args.capture]


def one_by_one(what: str) -> str:
    """The error for experts in `what` that cannot be captured."""
    return (
        f"--capture: experts in {what} are computed one by one, and the host waits for how many tokens each has: take "
        "--precision bf16 on GPUs of compute capability 9.0 or 10.0, or leave --capture out"
    )


def rank_arguments(args: argparse.Namespace, backend: str) -> list[str]:
    """The command line that starts a rank of one back end with these arguments."""
    words = [str(args.num_gpus)]
    skipped = {"num_gpus", "backend", "launcher", "hostfile", "master_port", "dry_run", "no_recompute", "data"}
    values = {"backend": backend, **{name: value for name, value in vars(args).items() if name not in skipped}}
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words + ["--no-recompute"] * args.no_recompute + (["--data", *args.data] if args.data else [])
