"""Run the experiments behind the figures: expand them into runs, do the runs, record how each ended.

    python scripts/launch.py --out DIR [--cluster auto|NAME] [--figures "8 10"] [--gpus "1 2 4"] [--only REGEX]
        [--data FILE ..] [--slow-links GB/S] [--dry-run] [--resume] [--max-jobs N]

NAME is a file of clusters/: cpu and local are this machine, where one run follows the other, on GPUs several in one world of
processes and worlds side by side; any other is a Slurm cluster, where each run is a job. Runs go to
DIR/logs/<figure>/<system>/<run-id>/, what was asked for to DIR/asked.json: --resume without a choice of runs goes on with that.
Exit codes: 0 all runs ok; 1 some did not end well; 2 bad input, nothing started; 130 or 143 interrupted (go on with --resume).
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import slurm  # noqa: E402
import slurm_launch  # noqa: E402
from grid import TRAINING, Configs, Machine, Run  # noqa: E402
from runner import Interrupted, Launcher, device_name, run_environment  # noqa: E402
from slurm import Site  # noqa: E402
from worlds import Worlds, gpu_ids  # noqa: E402

from smartmoe import data, hosts, record  # noqa: E402
from smartmoe.config import ClusterSpec, slowed  # noqa: E402
from smartmoe.images import FASHION_MNIST, SYNTHETIC, why_no_images  # noqa: E402
from smartmoe.samples import load_data  # noqa: E402

HERE = ("cpu", "local")  # clusters that are this machine
ASKED = "asked.json"  # beside logs/: the options that chose the runs there


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        configs = Configs(args.configs)
        kind, cluster, site = choose_cluster(args, configs)
        cluster = slowed(cluster, args.slow_links)
        sizes = of_sizes(cluster, args.gpus, site)
        try:
            runs, left_out = configs.expand_sizes(configs.select((args.figures or "").split()), kind, sizes)
        except ValueError as error:
            raise ValueError(f"{error}{better_sizes(sizes, cluster) if kind == 'local' else ''}") from None
        for figure, reason in left_out.items():
            print(f"figure {figure.removeprefix('fig')} is left out: {reason}")
        if not runs:
            raise ValueError("nothing to run: all the figures asked for are left out")
        runs = only(runs, args.only)
        if args.data:
            give_data(runs, args.data)
        wanted = runs
        runs, skipped = without_what_lacks(wanted, site)
        if args.dry_run:
            print_plan(wanted, runs, site, configs.machines.get(kind, Machine()))
        for reason, lacking in skipped.items():
            names = ", ".join(dict.fromkeys(run.config.system for run in lacking))
            print(f"skipped: {len(lacking)} runs of {names}: {reason}")
        if not runs:
            raise ValueError("nothing to run: all runs are skipped")
        if args.dry_run:
            return 0
        return launch(args, runs, skipped, cluster, site, configs.machines.get(kind, Machine()))
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options; with --resume and none that chooses runs, those that were given in that folder before as well. Raises
    ValueError where these cannot be read."""
    parser = argparse.ArgumentParser(
        prog="launch.py", description="Run the experiments behind the figures.",
        epilog="Exit codes: 0 all runs ok; 1 some did not end well; 2 bad input; 130/143 interrupted.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="where DIR/logs is written (needed unless --dry-run)")
    parser.add_argument(
        "--cluster",
        default="",
        metavar="NAME",
        help="a file of clusters/: cpu: gloo ranks on this machine; local: this machine's GPUs; slurm or another: jobs; "
        "auto: Slurm where it answers, else GPUs when there are any, else cpu (default)",
    )
    parser.add_argument("--figures", default=None, metavar='"8 10"', help="figures to run (default: all)")
    parser.add_argument("--gpus", default="", metavar='"1 2 4"', help="with local: runs on so many GPUs each, those that fit "
                        "side by side (default: on all GPUs of the machine)")  # fmt: skip
    parser.add_argument("--only", default="", metavar="REGEX",
                        help="of their runs only those in whose path this is found, and traces that these replay")  # fmt: skip
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE",
                        type=lambda name: name if name == SYNTHETIC else str(Path(name).absolute()),
                        help="text files or Megatron .bin/.idx prefixes to train on (default: Python's library), and for "
                        f"figure 9 a folder of images in IDX files, or {SYNTHETIC} (default: {FASHION_MNIST})")  # fmt: skip
    parser.add_argument("--slow-links", type=float, default=0.0, metavar="GB/S", help="slow every exchange between ranks "
                        "down to this rate, to stand in for a slow network; panels say so (default: as links are)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the runs, start nothing")
    parser.add_argument("--resume", action="store_true",
                        help="skip the runs in DIR that are done, do the others; alone it goes on with the cluster, figures, "
                        "GPUs, runs and data that were asked for in DIR last")  # fmt: skip
    parser.add_argument("--max-jobs", type=int, default=None, metavar="N",
                        help="on Slurm: at most N of the runs in the queue at a time (default: all)")  # fmt: skip
    parser.add_argument("--configs", type=Path, default=ROOT / "scripts",
                        help="folder of models.toml, experiments/ and clusters/ (default: scripts)")  # fmt: skip
    args = parser.parse_args(argv)
    chooses = args.cluster or args.figures or args.gpus or args.only or args.slow_links or args.data
    if args.resume and args.out and not chooses and (before := asked(args.out)):
        print(f"as asked for before: {shlex.join(before)}")
        args = parser.parse_args([*before, *argv])
    args.cluster = args.cluster or "auto"
    if args.out is None and not args.dry_run:
        parser.error("--out DIR is needed, or --dry-run")
    if args.max_jobs is not None and args.max_jobs < 1:
        parser.error("--max-jobs must be at least 1")
    args.max_jobs = args.max_jobs or 0  # no limit
    if args.figures is not None and not args.figures.split():
        parser.error("--figures names none: leave it out for all")
    return args


# -------------------------------------------------------------------------------------------------------- the cluster


def choose_cluster(args: argparse.Namespace, configs: Configs) -> tuple[str, ClusterSpec, Site | None]:
    """The kind of cluster that grids name, its spec, and its site where runs are jobs of Slurm; says what was found here.
    Puts the name of its file into `args.cluster`."""
    wanted = args.cluster
    if wanted not in ("auto", *configs.clusters):
        raise ValueError(f"--cluster {wanted}: {configs.folder}/clusters has: {', '.join(configs.clusters)}")
    num_gpus = 0 if wanted == "cpu" else count_gpus()
    inside = os.environ.get("SLURM_JOB_ID", "")
    no_slurm = slurm.why_not() if wanted == "auto" and not inside else ""
    if wanted == "auto":
        found = f"this is inside job {inside}: its own node is used" if inside else no_slurm or "yes"
        print(f"found: Slurm: {found}; ", end="")
        has_slurm = not inside and not no_slurm and "slurm" in configs.clusters
        wanted = "slurm" if has_slurm else "local" if num_gpus else "cpu"
    else:
        print("found: ", end="")
    print(f"GPUs: {num_gpus}; CPU: {num_cores()} cores, {record.cpu_name()}")
    if wanted not in configs.clusters:
        raise ValueError(f"{configs.folder}/clusters: no {wanted}.toml")
    args.cluster = wanted  # what goes on with these runs is to find the same
    cluster, site = configs.clusters[wanted], configs.sites[wanted]
    if wanted in HERE:
        if args.max_jobs:
            raise ValueError(f"--max-jobs is about Slurm: on {wanted} one run follows the other")
        if wanted == "local" and num_gpus == 0:
            raise ValueError(
                "--cluster local needs CUDA GPUs and a CUDA build of torch; neither --cluster cpu nor auto does"
            )
        if wanted == "local":
            cluster = dataclasses.replace(cluster, ranks_per_node=num_gpus)
        print(f"running on: {wanted} ({cluster.num_ranks} ranks on {cluster.device})")
        return wanted, cluster, None
    sizes = f"{cluster.num_nodes} nodes x {cluster.ranks_per_node} ranks on {cluster.device}"
    print(f"running on: {wanted} (jobs of {sizes})")
    return site.grids or wanted, cluster, site


def of_sizes(cluster: ClusterSpec, words: str, site: Site | None) -> list[ClusterSpec]:
    """`cluster` with each of the numbers of GPUs in `words`, the largest first; as it is without words. Raises ValueError for
    anything but different numbers of GPUs that this machine has."""
    if not words:
        return [cluster]
    if site or cluster.device != "cuda":
        raise ValueError(f"--gpus {words}: is about the GPUs of this machine: add --cluster local")
    sizes = [int(size) if size.isdecimal() else 0 for size in words.split()]
    if not sizes or not all(1 <= size <= cluster.ranks_per_node for size in sizes) or len({*sizes}) < len(sizes):
        raise ValueError(f"--gpus {words}: needs different numbers from 1 to {cluster.ranks_per_node}, the GPUs found here")
    return [dataclasses.replace(cluster, ranks_per_node=size) for size in sorted(sizes, reverse=True)]


def better_sizes(sizes: list[ClusterSpec], cluster: ClusterSpec) -> str:
    """What to say beside a problem of runs of these sizes: models and plans divide by powers of two alone."""
    if all(size.ranks_per_node.bit_count() == 1 for size in sizes):
        return ""
    fitting = " ".join(str(2**power) for power in range(cluster.ranks_per_node.bit_length()))
    return f'; all figures have runs for powers of two: --gpus "{fitting}"'


def count_gpus() -> int:
    """CUDA devices that torch can use; asks torch, in a process of its own, only where the driver is installed."""
    if not shutil.which("nvidia-smi"):
        return 0
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        return int(subprocess.run(ask, capture_output=True, text=True, timeout=120, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


# ----------------------------------------------------------------------------------------------------------- the runs


def print_plan(wanted: list[Run], runs: list[Run], site: Site | None, machine: Machine) -> None:
    """The runs that are wanted as a table, and how long those of them take that can be done: what --dry-run is for."""
    width = max(len(str(run.folder)) for run in wanted)
    print(f"{'run':<{width}}  {'plan':<30} {'iterations':>10} {'min':>5}  serves")
    for run in wanted:
        bars = ", ".join(f"{bar['figure']} {bar['group']} {bar['series']}" for bar in run.bars)
        plan, iterations = run.config.plan.describe(), run.config.workload.iterations
        bars = bars or "the trace that others replay"
        print(f"{str(run.folder):<{width}}  {plan:<30} {iterations:>10} {run.estimate_s / 60:>5.1f}  {bars}")
    if site is None:
        gpus = gpu_ids(count_gpus()) if wanted[0].config.cluster.device == "cuda" else []
        print(Worlds(None, runs, machine, gpus, num_cores()).describe())
    else:
        print(f"{len(runs)} runs, about {sum(run.estimate_s for run in runs) / 60:.0f} minutes")
        options = {" ".join(site.job_options(run.config.cluster, run.timeout_s)) for run in runs}
        print("\n".join(f"each a job: sbatch {words} scripts/job.sbatch RUN_DIR" for words in sorted(options)))


def only(runs: list[Run], pattern: str) -> list[Run]:
    """The runs in whose folder `pattern` is found, and those whose traces they need. Raises ValueError when there is none."""
    try:
        found = [run for run in runs if re.search(pattern, str(run.folder))]
    except re.error as error:
        raise ValueError(f"--only {pattern}: not a regular expression: {error}") from None
    if not found:
        raise ValueError(f"--only {pattern}: found in none of the {len(runs)} runs, for instance {runs[0].folder}")
    keys = {run.key for run in found} | {run.needs.key for run in found if run.needs}
    return [run for run in runs if run.key in keys]


def give_data(runs: list[Run], names: list[str]) -> None:
    """Let each run train on those of `names` that suit its model: images, which are folders, or text. Raises ValueError where
    they suit none."""
    for name in names:
        if name != SYNTHETIC and not any(Path(name + ending).exists() for ending in ("", ".bin")):
            raise ValueError(f"--data {name}: there is no such file or folder, and no {name}.bin")
    is_taken = False
    for run in runs:
        wants_images = run.config.model.swin is not None
        suiting = [name for name in names if (name == SYNTHETIC or Path(name).is_dir()) == wants_images]
        if suiting:
            work = dataclasses.replace(run.config.workload, data=tuple(suiting))
            run.config, is_taken = dataclasses.replace(run.config, workload=work), True
    if not is_taken:
        raise ValueError(
            f"--data {' '.join(names)}: none of these runs trains on it: those of figure 9 take a folder of images that is "
            f"there, or {SYNTHETIC}, the others text"
        )


def without_what_lacks(runs: list[Run], site: Site | None) -> tuple[list[Run], dict[str, list[Run]]]:
    """The runs that this Python can start, and the others by reason: a program or images that are not installed. What a
    container or another Python on the nodes of a Slurm cluster has, only the runs find out."""
    skipped: dict[str, list[Run]] = {}
    if site and (site.container or site.python):
        return runs, skipped
    for run in runs:
        host = hosts.HOSTS.get(run.entry)
        reason = host.lacking if host else ""
        if run.config.model.swin is not None and not site:
            reason = reason or why_no_images(run.config.workload.data)
        if reason:
            skipped.setdefault(reason, []).append(run)
    lacking = {run.key for group in skipped.values() for run in group}
    return [run for run in runs if run.key not in lacking], skipped


def launch(
    args: argparse.Namespace, runs: list[Run], skipped: dict[str, list[Run]], cluster: ClusterSpec, site: Site | None,
    machine: Machine,
) -> int:  # fmt: skip
    """Do `runs` under args.out/logs, and write `skipped` down there as such. Returns the exit code."""
    root = args.out / "logs"
    if site:
        try:
            slurm.preflight(site, cluster, max(run.timeout_s for run in runs))
        except ValueError as error:
            raise ValueError(f"cluster {cluster.name}, as its file in clusters/ describes it: {error}") from None
    if root.exists() and any(root.iterdir()) and not args.resume:
        raise ValueError(f"{root} has runs already: add --resume to go on there, or give another --out")
    trained = {}
    for run in runs:
        if run.entry in TRAINING:
            model, files = run.config.model, run.config.workload.data
            trained.setdefault((files, model.swin.num_classes if model.swin else model.vocab_size), run.config)
    for (files, _), config in sorted(trained.items(), key=lambda item: item[0]):  # before the ranks ask for them all at once
        if config.model.swin is not None:
            if not why_no_images(files):  # else the nodes of a cluster have them, or the runs say what is missing
                print(load_data(config).describe(), flush=True)
            continue
        tokens = load_data(config, cache_dir=ROOT / data.CACHE_DIR)
        print(f"{tokens.num_tokens} tokens of {', '.join(files) or 'Python library source'}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    with (args.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{args.out}: another launcher is at work here") from None
        except OSError:
            pass  # a file system without locks
        record.write_json(args.out / ASKED, {"arguments": ["--cluster", args.cluster, *chosen(args)]})
        launcher = Launcher(
            root=root.resolve(),
            provenance=record.provenance(device=device_name(cluster)),
            env=run_environment(cluster.device),
            cwd=ROOT,
        )
        for reason, lacking in skipped.items():
            for run in lacking:
                launcher.set_aside(run, reason)
        if site is None:
            gpus = gpu_ids(cluster.ranks_per_node) if cluster.device == "cuda" else []
            return interruptible(lambda: do_all(launcher, runs, machine, gpus), f"go on with {same_again(args)}")
        campaign = slurm_launch.Campaign(launcher, site, args.out.resolve(), runs, args.max_jobs, same_again(args))
        return interruptible(lambda: slurm_launch.do_all(campaign), "the jobs were left to Slurm")


def same_again(args: argparse.Namespace) -> str:
    """The command that goes on with these runs."""
    return shlex.join(["./RUNME-b.sh", "--cluster", args.cluster, "--resume", str(args.out.resolve()), *chosen(args)])


def chosen(args: argparse.Namespace) -> list[str]:
    """The options beside --cluster that choose runs, as words of a command."""
    words = ["--configs", str(args.configs.resolve())] if args.configs != ROOT / "scripts" else []
    words += ["--figures", args.figures] if args.figures else []
    words += ["--gpus", args.gpus] if args.gpus else []
    words += ["--only", args.only] if args.only else []
    words += ["--max-jobs", str(args.max_jobs)] if args.max_jobs else []
    words += ["--slow-links", f"{args.slow_links:g}"] if args.slow_links else []
    return [*words, *(["--data", *args.data] if args.data else [])]


def asked(out: Path) -> list[str]:
    """The options that chose the runs in `out`, as words of a command; none where it does not say. Raises ValueError where it
    cannot be read."""
    path = out / ASKED
    if not path.exists():
        return []
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError("not words")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a launcher wrote ({error}): say what to run, for instance --figures 8") from None
    return words


def interruptible(work: Callable[[], int], words: str) -> int:
    """Do `work`, which Ctrl-C and SIGTERM end by Interrupted; returns its exit code or that of the interruption."""
    code: list[int] = []

    def interrupt(number, _frame):
        code.append(128 + number)
        if len(code) == 1:  # later ones must not disturb the clean stop
            raise Interrupted

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work()
    except Interrupted:
        print(f"interrupted; {words}", file=sys.stderr)
        return code[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def do_all(launcher: Launcher, runs: list[Run], machine: Machine, gpus: list[str]) -> int:
    """Do the runs that are not done yet, whatever happens to any one of them. Returns the exit code."""
    waiting = [run for run in runs if launcher.needs_running(run)]
    for run in runs:
        if run in waiting:
            launcher.declare(run)
        else:
            launcher.keep(run)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    worlds = Worlds(launcher, waiting, machine, gpus, num_cores())
    print(f"{worlds.describe()}, in {launcher.root}", flush=True)
    bad = worlds.do_all()
    if bad:
        print(f"{len(bad)} of {len(waiting)} runs did not end well: {', '.join(str(run.folder) for run in bad)}")
    return 1 if bad else 0


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
