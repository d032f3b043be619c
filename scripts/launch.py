"""Run the experiments behind the figures: expand them into runs, do the runs one after another, record how each ended.

    python scripts/launch.py --out DIR [--cluster auto|cpu|local|slurm] [--figures "8 10"] [--dry-run] [--resume]

Runs go to DIR/logs/<figure>/<system>/<run-id>/. Exit codes: 0 all runs ok; 1 some did not end well; 2 bad input,
nothing started; 130 or 143 interrupted (go on with --resume).
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

from grid import Configs, Run  # noqa: E402
from runner import Interrupted, Launcher  # noqa: E402

from smartmoe import data, record  # noqa: E402
from smartmoe.config import ClusterSpec  # noqa: E402

SLURM_WAITS = (
    "running on Slurm is not available yet: its runs would need a batch job per run. On a node of the cluster, inside "
    "an allocation, --cluster local runs on that node's GPUs"
)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.cluster == "slurm":
            raise ValueError(SLURM_WAITS)
        configs = Configs(args.configs)
        kind, cluster = choose_cluster(args.cluster, configs)
        figures = configs.select(args.figures.split())
        left_out = configs.left_out(figures, kind, cluster)
        for figure, reason in left_out.items():
            print(f"figure {figure.removeprefix('fig')} is left out: {reason}")
        runs = configs.expand([figure for figure in figures if figure not in left_out], kind, cluster)
        if not runs:
            raise ValueError("nothing to run: all the figures asked for are left out")
        if args.data:
            for run in runs:
                run.config = dataclasses.replace(
                    run.config, workload=dataclasses.replace(run.config.workload, data=tuple(args.data))
                )
        if args.dry_run:
            print_plan(runs)
            return 0
        return launch(args, runs, cluster)
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.py", description="Run the experiments behind the figures.",
        epilog="Exit codes: 0 all runs ok; 1 some did not end well; 2 bad input; 130/143 interrupted.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="where DIR/logs is written (needed unless --dry-run)")
    parser.add_argument(
        "--cluster",
        choices=("auto", "cpu", "local", "slurm"),
        default="auto",
        help="cpu: gloo ranks on this machine; local: this machine's GPUs; auto: GPUs when there are any (default)",
    )
    parser.add_argument("--figures", default="", metavar='"8 10"', help="figures to run (default: all)")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", type=lambda name: str(Path(name).absolute()),
                        help="text files or Megatron .bin/.idx prefixes to train on (default: Python's library)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the runs, start nothing")
    parser.add_argument("--resume", action="store_true", help="skip the runs in DIR that are done, do the others")
    parser.add_argument("--configs", type=Path, default=ROOT / "scripts",
                        help="folder of models.toml, experiments/ and clusters/ (default: scripts)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out DIR is needed, or --dry-run")
    return args


# -------------------------------------------------------------------------------------------------------- the cluster


def choose_cluster(wanted: str, configs: Configs) -> tuple[str, ClusterSpec]:
    """The declared kind (file name under clusters/) and its spec; says what was found on this machine."""
    num_gpus = 0 if wanted == "cpu" else count_gpus()
    slurm = "yes, but not used: not available yet" if shutil.which("sbatch") else "no"
    print(f"found: Slurm: {slurm}; GPUs: {num_gpus}; CPU: {len(os.sched_getaffinity(0))} cores, {record.cpu_name()}")
    kind = ("local" if num_gpus else "cpu") if wanted == "auto" else wanted
    if kind == "local" and num_gpus == 0:
        raise ValueError(
            "--cluster local needs CUDA GPUs and a CUDA build of torch; neither --cluster cpu nor auto does"
        )
    if kind not in configs.clusters:
        raise ValueError(f"{configs.folder}/clusters: no {kind}.toml")
    cluster = configs.clusters[kind]
    if kind == "local":
        cluster = dataclasses.replace(cluster, ranks_per_node=num_gpus)
    print(f"running on: {kind} ({cluster.num_ranks} ranks on {cluster.device})")
    return kind, cluster


def count_gpus() -> int:
    """CUDA devices that torch can use; asks torch, in a process of its own, only where the driver is installed."""
    if not shutil.which("nvidia-smi"):
        return 0
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        return int(subprocess.run(ask, capture_output=True, text=True, timeout=120, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def device_name(cluster: ClusterSpec) -> str:
    if cluster.device == "cpu":
        return record.cpu_name()
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return "CUDA GPU"


# ----------------------------------------------------------------------------------------------------------- the runs


def print_plan(runs: list[Run]) -> None:
    """The runs as a table: what --dry-run is for."""
    width = max(len(str(run.folder)) for run in runs)
    print(f"{'run':<{width}}  {'plan':<30} {'iterations':>10} {'min':>5}  serves")
    for run in runs:
        bars = ", ".join(f"{bar['figure']} {bar['group']} {bar['series']}" for bar in run.bars)
        plan, iterations = run.config.plan.describe(), run.config.workload.iterations
        bars = bars or "the trace that others replay"
        print(f"{str(run.folder):<{width}}  {plan:<30} {iterations:>10} {run.estimate_s / 60:>5.1f}  {bars}")
    print(f"{len(runs)} runs, about {sum(run.estimate_s for run in runs) / 60:.0f} minutes")


def launch(args: argparse.Namespace, runs: list[Run], cluster: ClusterSpec) -> int:
    """Do `runs` under args.out/logs. Returns the exit code."""
    root = args.out / "logs"
    if root.exists() and any(root.iterdir()) and not args.resume:
        raise ValueError(f"{root} has runs already: add --resume to go on there, or give another --out")
    trained = {(run.config.workload.data, run.config.model.vocab_size) for run in runs if run.entry == "train"}
    for files, vocab_size in sorted(trained):  # before the ranks ask for them all at once
        tokens = data.load_tokens(files, vocab_size, cache_dir=ROOT / data.CACHE_DIR)
        print(f"{tokens.num_tokens} tokens of {', '.join(files) or 'Python library source'}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    with (args.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{args.out}: another launcher is at work here") from None
        python_path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        launcher = Launcher(
            root=root.resolve(),
            provenance=record.provenance(device=device_name(cluster)),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
        )
        return do_all(launcher, runs)


def do_all(launcher: Launcher, runs: list[Run]) -> int:
    """Do the runs that are not done yet, whatever happens to any one of them. Returns the exit code."""
    waiting = [run for run in runs if launcher.needs_running(run)]
    for run in runs:
        if run in waiting:
            launcher.declare(run)
        else:
            launcher.keep(run)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    print(
        f"{len(waiting)} runs, about {sum(run.estimate_s for run in waiting) / 60:.0f} minutes, in {launcher.root}",
        flush=True,
    )
    bad, code = [], []

    def interrupt(number, _frame):
        code.append(128 + number)
        if len(code) == 1:  # later ones must not disturb the clean stop
            raise Interrupted

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for place, run in enumerate(waiting):
            label = f"[{place + 1}/{len(waiting)}] {run.folder}"
            left_s = sum(later.estimate_s for later in waiting[place + 1 :])
            if launcher.do(run, label, left_s) != "ok":
                bad.append(run)
            sys.stdout.flush()
    except Interrupted:
        print(f"interrupted; {launcher.root} can be continued with --resume", file=sys.stderr)
        return code[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if bad:
        print(f"{len(bad)} of {len(waiting)} runs did not end well: {', '.join(str(run.folder) for run in bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
