"""The command `smartmoe`: profile a cluster, plan, simulate, train a model from a TOML file, report on it, look at a trace."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import numpy as np

from smartmoe import hosts, record, report, run_numbers, systems
from smartmoe.config import ClusterSpec, ParallelPlan, RunConfig, check, from_dict, read_table, to_dict
from smartmoe.load_map import fullest_over_mean, load_over_time
from smartmoe.planner.commands import add_parsers
from smartmoe.samples import load_data
from smartmoe.trace import read_trace

REPOSITORY = Path(__file__).resolve().parents[2]
_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec should load nothing
TRACE_HELP = "a trace: .npz, .csv, a folder of table_iter<I>_rank<R>.log files, or synthetic:KIND (see moe_trace/README.md)"
TRACE_EPILOG = """\
examples:
  smartmoe trace show runs/first/trace.npz                 of a run with record_trace = true
  smartmoe trace show synthetic:one-hot,share=0.8,experts=16 --ranks 8
  smartmoe trace save routing.csv routing.npz              of your own model; then smartmoe trace show routing.npz --ranks 8

routing.csv has a line for each iteration, layer and expert (columns rank and micro_batch too, if you like), or without the
column count a line for each routed token:
  iteration,layer,expert,count
  1,0,0,177
From Python: np.savez("routing.npz", counts=counts, iteration=np.arange(1, len(counts) + 1)), counts integers of the shape
[iterations, ranks, layers, micro-batches, experts] or [iterations, experts].
"""
SHOW_EPILOG = """\
Columns, of each layer and as means over iterations: load (token copies) of the busiest expert over the mean expert (1 is even);
experts that got nothing; share of all copies that the busiest and the four busiest got; correlation of expert loads with those
of the iteration before (1: history tells). Below: how full the fullest rank is over the mean under each kind of placement,
simulated, without what moving and copying costs. The picture has the same over time.

"""
EXPORT_EPILOG = """\
examples:
  smartmoe export runs/first experts.pt                              the newest good checkpoint of a run
  smartmoe export runs/first/checkpoints/iter_0000050 experts.pt --optimizer
  python -c "import torch; print(torch.load('experts.pt', weights_only=True).keys())"
"""
REPORT_EPILOG = """\
examples:
  smartmoe report runs/first                  of a run that is done, stopped or at work: how it ended or where it is, what
                                              goes on with it, speed, loss, load, memory, what was decided of experts
  smartmoe report runs/first runs/second      a line each, the fastest marked if they did the same on the same device
  smartmoe report runs/* --json runs.json     the same numbers for a program; what is not known is null
  watch -n 5 smartmoe report runs/first       follow a run

Step times are medians of the iterations after workload.warmup_iterations, with 10th and 90th percentile; tokens/s and TFLOP/s
are those of the median. TFLOP/s count what the model needs, forward and backward, not what is computed again to save memory.
Load is that of the fullest rank over the mean (1 is even). Exit code: 2 if nothing can be reported of one of the folders, else
0, also for runs that failed.
"""
EPILOG = """\
examples:
  smartmoe train run.toml --ranks 4     train on 4 processes of this machine
  smartmoe train run.toml --out DIR --resume
                                        go on from the newest checkpoint in DIR
  smartmoe report DIR                   how it went, or where it is
  smartmoe trace show trace.npz         how skewed a recorded routing is, as a table and a picture
  smartmoe trace show synthetic:bursty  the same of a synthetic one

A run.toml needs nothing; each table is optional, each key has a default (all keys: src/smartmoe/config.py):
  [model]     num_layers = 4, hidden_size = 64, num_experts = 8, top_k = 2
  [gate]      kind = "gshard", capacity = 1.2
  [plan]      pp = 2, dp = 2, ep = 2     # without it: data and expert parallel over all ranks
  [online]    policy = "greedy", interval = 10     # or "auto", with replicate = "history" and replica_slots = 1
  [workload]  iterations = 100, data = ["corpus.txt"], checkpoint_interval = 50
  [cluster]   device = "cpu", ranks_per_node = 4     # without it: as many GPUs of this machine, if it has them, else its CPU

A model with the table [model.swin] (config.SwinConfig; examples: scripts/models.toml) is a Swin transformer, trained on images:
data = ["FOLDER"] of IDX files, ["synthetic"], or without it Debian's dataset-fashion-mnist.

system = "deepspeed" trains the same run with DeepSpeed's engine and MoE layer, where that package is installed.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry of the command. Returns the exit code: 2 for bad input."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (ValueError, OSError) as error:  # OSError names the file, and what the system says of it
        print(f"smartmoe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smartmoe", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train the model that a TOML file describes", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    train.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run; unknown keys are errors")
    train.add_argument("--ranks", type=int, default=None, help="processes to start (default: what the plan needs)")
    train.add_argument("--data", nargs="+", default=None, metavar="FILE",
                       help="text files or .bin/.idx prefixes, or a folder of images, instead of workload.data")  # fmt: skip
    train.add_argument("--out", type=Path, default=None, help="run directory (default: runs/<name>-<UTC time>)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.set_defaults(command=_train)
    export = commands.add_parser(
        "export", help="write a checkpoint as one file of experts in plain order", epilog=EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    export.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory: its newest good one")
    export.add_argument("out", type=Path, help="file for torch.load(OUT, weights_only=True)")
    export.add_argument("--optimizer", action="store_true", help="with both moments of Adam")
    export.set_defaults(command=_export)
    worded = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    reporting = commands.add_parser("report", help="say how runs went, or where they are", epilog=REPORT_EPILOG, **worded)
    reporting.add_argument("run", type=Path, nargs="+", metavar="RUN", help="a run directory; several: a table")
    reporting.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")
    reporting.set_defaults(command=_report)
    trace = commands.add_parser("trace", help="look at expert-selection traces", epilog=TRACE_EPILOG, **worded)
    trace_commands = trace.add_subparsers(required=True, metavar="COMMAND")
    show = trace_commands.add_parser("show", help="print how skewed a trace is, and draw its load over time",
                                     epilog=SHOW_EPILOG + TRACE_EPILOG, **worded)  # fmt: skip
    show.add_argument("trace", help=TRACE_HELP)
    show.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: the trace's name in this folder)")
    show.add_argument("--layer", type=int, help="layer of the heat maps (default: that with the busiest expert)")
    show.add_argument("--ranks", type=int, help="ranks that experts are spread over (default: as many as in the trace)")
    show.add_argument("--interval", type=int, default=10, help="iterations between decisions; default: 10")
    show.add_argument("--replica-slots", type=int, default=2, help="copies of experts that a rank has room for; default: 2")
    show.add_argument("--text", action="store_true", help="no picture")
    show.set_defaults(command=_show)
    save = trace_commands.add_parser("save", help="write any trace as .npz", epilog=TRACE_EPILOG, **worded)
    save.add_argument("trace", help=TRACE_HELP)
    save.add_argument("out", type=Path, metavar="OUT.npz")
    save.set_defaults(command=_save)
    add_parsers(commands, start=lambda command: _run(command)[0], check_gpus=_check_gpus)
    return parser


# -------------------------------------------------------------------------------------------------------------- train


def read_config(path: Path, num_ranks: int | None) -> RunConfig:
    """The checked config of `path` for `num_ranks` processes (None: as many as its plan needs).

    A file without [plan] gets data and expert parallelism over all ranks; one without [cluster] gets this machine.
    """
    table = read_table(path)
    config = from_dict(RunConfig, table, str(path))
    world_size = num_ranks or (config.plan.world_size if "plan" in table else config.cluster.num_ranks)
    plan = config.plan if "plan" in table else ParallelPlan(dp=world_size, ep=world_size)
    cluster = config.cluster if "cluster" in table else this_machine(world_size)
    return check(RunConfig(**{**vars(config), "plan": plan, "cluster": cluster}), str(path))


def this_machine(world_size: int) -> ClusterSpec:
    """`world_size` ranks of this machine: on its GPUs where there are as many, else on the CPU. Rates are about those of GPUs
    in one machine; online placement measures its own."""
    cpu = ClusterSpec(ranks_per_node=world_size)
    if not shutil.which("nvidia-smi"):  # else torch is asked, which takes a second to start
        return cpu
    import torch

    if torch.cuda.device_count() < world_size:
        return cpu
    memory = min(torch.cuda.get_device_properties(idx).total_memory for idx in range(world_size)) / 1e9
    return ClusterSpec(
        name="local", device="cuda", ranks_per_node=world_size, memory_gbytes=memory, tflops=400.0,
        intra_node_gbytes_per_s=300.0, inter_node_gbytes_per_s=25.0,
    )  # fmt: skip


def _train(args: argparse.Namespace) -> int:
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: at least 1")
    config = hosts.check(read_config(args.config, args.ranks), str(args.config))
    host = hosts.host_of(config.system)
    if host and host.lacking:
        raise ValueError(f'system "{config.system}": {host.lacking}')
    if host and args.resume:
        raise ValueError(f'system "{config.system}" writes no checkpoints to resume from: start it with another --out')
    if args.data:
        config = dataclasses.replace(config, workload=dataclasses.replace(config.workload, data=tuple(args.data)))
    if args.resume and args.out is None:
        raise ValueError("--resume needs --out DIR, the directory of the run to go on with")
    stamp = record.utc_now().replace(":", "").replace("-", "")
    run_id = record.safe_run_id(args.config.stem, stamp)
    run_dir = args.out or Path("runs", run_id)
    has_run = (run_dir / "run.json").exists()
    if has_run and not args.resume:
        raise ValueError(f"{run_dir} holds a run already: add --resume to go on with it, or give another --out")
    if args.resume and not has_run:
        raise ValueError(f"{run_dir} holds no run to go on with: leave --resume out to start one there")
    if args.resume:
        record.read_run(run_dir)  # what is no run of ours is not written over
    if args.resume and (run_dir / "checkpoints").is_dir():
        from smartmoe import checkpoint  # and torch with it

        found = checkpoint.newest_good(run_dir / "checkpoints", lambda text: None)  # which the ranks tell
        if found is not None:
            checkpoint.read_meta_of(found, config)
            done, wanted = int(found.name.removeprefix("iter_")), config.workload.iterations
            if done == wanted and record.read_run(run_dir)["status"] == "ok":
                print(f"{run_dir}: all {wanted} iterations are done; more: workload.iterations in {args.config}")
                return 0
            if done > wanted:
                raise ValueError(f"{found} has {done} iterations, workload.iterations = {wanted}: ask for more to go on")
    _check_inputs(config, str(args.config))
    world_size = config.plan.world_size
    entry = systems.SYSTEMS[config.system].host if host else "train"
    facts = record.provenance(num_ranks=world_size, entry=entry, command=_command(args), **_device(config.cluster))
    try:
        lock = _take(run_dir)
        record.create_run(run_dir, run_id, to_dict(config), [], provenance=facts)
    except OSError as error:
        raise ValueError(f"--out {run_dir}: cannot write a run there: {error.strerror}; give another --out") from None
    (run_dir / "error.json").unlink(missing_ok=True)
    command = [sys.executable]
    if world_size > 1 or host:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command += ["-m", host.module if host else "smartmoe.train", str(run_dir), *(["--resume"] if args.resume else [])]
    where = f"{world_size} processes on the {'GPUs' if config.cluster.device == 'cuda' else 'CPU'}"
    print(f"{config.plan.describe()}, {where}, {config.workload.iterations} iterations, writing to {run_dir}", flush=True)
    record.set_status(run_dir, "running")
    with lock, (run_dir / "console.log").open("wb", buffering=0) as console:
        code, interrupted = _run(command, (lock.fileno(),), console)
        status, message = ("failed", "interrupted") if interrupted else record.outcome(run_dir, code)
        run = record.set_status(run_dir, status, message)
    if status != "ok":
        print(f"smartmoe: the run {status}: {message}; {run_numbers.how_to_go_on(run_dir, run)}", file=sys.stderr)
    return 130 if interrupted else 0 if status == "ok" else 1


def _take(run_dir: Path) -> IO:
    """An open file that keeps others out of `run_dir`, which is made, until it and what inherits it are closed. Raises
    ValueError where another is at work."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{run_dir}: a run is at work there, or just ending: wait for it, or give another --out") from None
    except OSError:
        pass  # a file system without locks
    return lock


def _command(args: argparse.Namespace) -> list[str]:
    """What started a run, but for where it goes: smartmoe report says it to whoever wants to go on with it."""
    words = ["smartmoe", "train", str(args.config), *(["--ranks", str(args.ranks)] if args.ranks else [])]
    return words + ["--data", *args.data] if args.data else words


def _device(cluster: ClusterSpec) -> dict[str, str]:
    """The name of the GPU that ranks of this machine compute on, for run.json, which has the CPU's otherwise."""
    if cluster.device != "cuda":
        return {}
    import torch

    return {"device": torch.cuda.get_device_name()}


def _check_inputs(config: RunConfig, where: str) -> None:
    """What every rank would find out for itself, and all at once: read and prepare the data, look for trace and GPUs. Raises
    ValueError."""
    cluster, system = config.cluster, systems.SYSTEMS
    near = [] if config.system in system else difflib.get_close_matches(config.system, system, n=1, cutoff=0.8)
    if near:
        raise ValueError(f'{where}: system = "{config.system}": did you mean "{near[0]}"?')
    if config.gate.kind == "trace":
        num_experts = config.model.num_experts
        found = read_trace(config.gate.trace, experts=num_experts, layers=config.model.num_layers).counts.shape[4]
        if found != num_experts:
            raise ValueError(f"{where}: gate.trace {config.gate.trace} has {found} experts, model.num_experts is {num_experts}")
    if cluster.device == "cuda":
        _check_gpus(f'{where}: cluster.device = "cuda"', min(config.plan.world_size, cluster.ranks_per_node))
    data = load_data(config)
    if config.model.swin is None:
        data.sample(0, config.model.seq_len)


def _check_gpus(what: str, needed: int) -> None:
    import torch  # and the second that it takes to start, which runs on CPUs do without

    found = torch.cuda.device_count()
    if found < needed:
        raise ValueError(
            f"{what} needs {needed} GPUs here, torch {torch.__version__} finds {found}: take fewer ranks, a CUDA build of "
            "torch, or the device cpu"
        )


def _run(command: list[str], keep: tuple[int, ...] = (), console: IO | None = None) -> tuple[int, bool]:
    """Run `command` to its end: (exit code, whether it was stopped by Ctrl-C, SIGTERM or SIGUSR1, Slurm's word before the time
    limit). It inherits the files `keep`, and ends when this process is killed. What it says on stderr goes to `console`, too;
    while it is being stopped that, torchrun's goodbye, is left out."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    child = subprocess.Popen(
        command, env=env, start_new_session=True, pass_fds=keep, preexec_fn=_as_part_of_this, stderr=subprocess.PIPE
    )
    stops: list[int] = []

    def stop(number, _frame):
        stops.append(number)
        if len(stops) == 1:  # a second one would end torchrun while its ranks still save a checkpoint
            child.terminate()

    def hand_on():
        while chunk := child.stderr.read1(65536):
            if not stops:
                with contextlib.suppress(OSError):  # nobody listens
                    os.write(2, chunk)
                if console:
                    with contextlib.suppress(OSError, ValueError):  # a full disk; closed, and the run has left processes
                        console.write(chunk)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    listener = threading.Thread(target=hand_on, daemon=True)
    listener.start()
    try:
        code = child.wait()
        listener.join(timeout=5)  # its end is closed with the last process of the run
        return code, bool(stops)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _as_part_of_this() -> None:
    """Between fork and exec: SIGTERM when the process that started this one dies, even by kill -9. SIGUSR1, which may go to
    all processes at once, is for the ranks, which handle it; torchrun would die of it and leave them."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # no Linux
        _LIBC.prctl(1, signal.SIGTERM)


def _export(args: argparse.Namespace) -> int:
    from smartmoe import checkpoint  # and torch with it, which other commands start without

    path, _ = args.checkpoint, record.check_out(args.out)
    if not (path / "meta.json").exists():
        found = checkpoint.newest_good(path / "checkpoints", lambda text: print(text, file=sys.stderr))
        if found is None:
            raise ValueError(f"{path} is neither a checkpoint nor a run directory with one")
        path = found
    facts = checkpoint.export(path, args.out, args.optimizer)
    print(
        f"{path} -> {args.out}: {facts['tensors']} tensors, {facts['experts']} experts, {facts['bytes'] / 1e6:.1f} MB"
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    reports, code = [], 0
    if args.json:
        record.check_out(args.json)
    for path in args.run:
        try:
            reports.append(run_numbers.read(path))
        except (ValueError, OSError) as error:
            print(f"smartmoe: {error}", file=sys.stderr)
            code = 2
    if reports:
        print(report.text(reports))
        if args.json:
            record.write_json(args.json, {"schema": record.SCHEMA, "runs": reports})
    return code


# ---------------------------------------------------------------------------------------------------------- trace show


def _save(args: argparse.Namespace) -> int:
    read_trace(args.trace).save(record.check_out(args.out))
    return 0


def _show(args: argparse.Namespace) -> int:
    if not args.text:
        args.out = record.check_out(args.out or _picture_of(args.trace))
    trace = read_trace(args.trace)
    num_iterations, num_ranks, num_layers, num_micro_batches, num_experts = trace.counts.shape
    span = f"{trace.iteration[0]} .. {trace.iteration[-1]}"
    print(f"{args.trace}: {num_iterations} iterations ({span}), {num_ranks} ranks, {num_layers} layers,")
    print(f"{num_micro_batches} micro-batches, {num_experts} experts; means over iterations\n")
    columns = {
        "max/mean load": trace.max_over_mean().mean(axis=0),
        "idle experts": trace.idle_experts().mean(axis=0),
        "top-1 share": trace.top_share(1).mean(axis=0),
        "top-4 share": trace.top_share(4).mean(axis=0),
    }
    if num_iterations > 1:
        correlation_IL = trace.correlation(1)
        known_IL = ~np.isnan(correlation_IL)
        total_L = np.where(known_IL, correlation_IL, 0).sum(axis=0)
        columns["lag-1 correlation"] = total_L / np.maximum(known_IL.sum(axis=0), 1)
    print("layer  " + "  ".join(columns))
    rows = [[f"{values[layer]:>{len(name)}.3f}" for name, values in columns.items()] for layer in range(num_layers)]
    for layer, cells in enumerate(rows):
        print(f"{layer:>5}  " + "  ".join(cells))
    for key, value in sorted(trace.meta.items()):
        print(f"{key}: {' '.join(str(value).split())[: shutil.get_terminal_size().columns]}")
    data = load_over_time(trace, args.layer, args.ranks, args.interval, args.replica_slots)
    print(f"\nfullest rank over the mean, layer {data['maps'][0]['layer']}, mean of the iterations; {data['note']}:")
    for load_map in data["maps"]:
        over_mean = np.mean([fullest_over_mean(np.array(load_W)) for load_W in load_map["rank_load"]])
        print(f"  {load_map['series']:24s} {over_mean:6.3f}  {load_map['source']}")
    if (args.ranks or num_ranks) == 1:
        print("one rank has every expert: --ranks N shows them spread over N")
    return 0 if args.text else _draw(args, data)


def _picture_of(source: str) -> Path:
    """Where the picture of a trace goes unless told otherwise: into this folder, under the trace's name."""
    return Path(Path(source.replace(":", "-").replace(",", "-")).name.removesuffix(".npz") + ".png")


def _draw(args: argparse.Namespace, data: dict) -> int:
    """Hand the load over time to the repository's plotting, which is no part of the installed package."""
    out = args.out
    if not (REPOSITORY / "plotting" / "trace.py").is_file():
        print(
            "smartmoe: no picture: it needs the plotting/ of the repository; install with pip install -e",
            file=sys.stderr,
        )
        return 0
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-m", "plotting.trace", str(out)]
    done = subprocess.run(
        command, input=json.dumps({"title": Path(args.trace).name, **data}), text=True, env=env, check=False
    )
    if done.returncode:
        raise ValueError(f"{out}: the picture could not be drawn (see above); --text leaves it out")
    print(f"\n{out}: load over time, layer {data['maps'][0]['layer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
