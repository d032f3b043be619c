"""Whole training iterations of several systems, one after the other, with the real trainer:

    torchrun --nproc-per-node N -m smartmoe.bench.train_step --systems fastmoe padded smartmoe_static smartmoe:direct

All systems train the same model on the same text, or images, from the same weights. Tokens/s (of images: patches) and TFLOP/s
of model FLOPs (models.flops_per_sample) are those of the median iteration after warm-up; with --profile one more iteration runs
under torch's profiler, which says where the GPU's time goes. A system that runs out of memory or fails is a row, and the others
go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from pathlib import Path

import numpy as np
import torch

from smartmoe import systems
from smartmoe.bench.kernel_times import format_breakdown, profile
from smartmoe.bench.measure import LeftAloneError, World, run_in_world, spread
from smartmoe.bench.report import Report, add_options, at_least, dtype_of
from smartmoe.config import DISPATCHERS, GATES, OnlineConfig, ParallelPlan, RunConfig, check
from smartmoe.data import TokenDataset
from smartmoe.images import ImageDataset
from smartmoe.mesh import build_mesh
from smartmoe.models import flops_per_sample
from smartmoe.planner import inputs, pool
from smartmoe.samples import load_data
from smartmoe.trainer import Trainer

SYNTHETIC_TOKENS = 1 << 22


def config_of(args: argparse.Namespace, base: RunConfig, name: str, num_ranks: int) -> RunConfig:
    """The run of a system: "name", "name:dispatcher", and behind that "+plain": without a CUDA graph, "+zero2": with
    workload.zero = 2. Raises ValueError when there is no such system or sizes do not fit."""
    whole, *hows = name.split("+")
    for how in hows:
        if how not in ("plain", "zero1", "zero2", "zero3"):
            raise ValueError(
                f'system "{name}": "+{how}" is neither "+plain", without a CUDA graph, nor "+zero1" to "+zero3"'
            )
    system, _, dispatcher = whole.partition(":")
    if dispatcher and dispatcher not in DISPATCHERS:
        raise ValueError(f'system "{name}": dispatcher "{dispatcher}" is not one of {", ".join(DISPATCHERS)}')
    chosen = systems.get(system)
    if chosen.host:
        raise ValueError(f'system "{name}" is trained by a program of its own: run it with scripts/launch.py')
    model = dataclasses.replace(
        base.model,
        num_experts=args.experts or base.model.num_experts,
        num_layers=args.layers or base.model.num_layers,
        expert_bias=base.model.expert_bias and not args.no_bias,
    )
    work = dataclasses.replace(
        base.workload,
        global_batch_size=args.batch or args.micro_batch * num_ranks * 4,
        micro_batch_size=args.micro_batch,
        dtype=dtype_of(args),
        lr=2e-4,
        min_lr=2e-5,
        lr_warmup_iterations=10,
        iterations=max(100, args.warmup + args.iterations + 1),
        warmup_iterations=args.warmup,
        seed=args.seed,
        zero=next((int(how[-1]) for how in hows if how != "plain"), base.workload.zero),
        cuda_graph="never" if "plain" in hows else "auto",
    )
    cluster, _, _ = inputs.read_cluster("local" if args.device == "cuda" else "cpu", args.configs)
    cluster = dataclasses.replace(cluster, num_nodes=1, ranks_per_node=num_ranks)
    plan = pool.parse_name(f"{args.plan}-mb1")[0] if args.plan else ParallelPlan(dp=num_ranks, ep=num_ranks)
    online = OnlineConfig(policy=args.policy, interval=args.interval, replicate=args.replicate, replica_slots=args.slots)
    config = systems.build(
        system,
        model=model,
        gate=dataclasses.replace(
            base.gate,
            kind="trace" if args.trace else args.gate or base.gate.kind,
            trace=args.trace or base.gate.trace,
            capacity=args.capacity,
        ),
        workload=work,
        cluster=cluster,
        plan=plan if chosen.plan_given else None,
        online=online if chosen.online else None,
    )
    if dispatcher:
        config = dataclasses.replace(config, layer=dataclasses.replace(config.layer, dispatcher=dispatcher))
    return check(config, f'system "{name}"')


def read_data(args: argparse.Namespace, base: RunConfig) -> TokenDataset | ImageDataset:
    """The text, or images, of --data; with --synthetic independent tokens of Zipf's frequencies, or made-up images."""
    vocab_size, is_text = base.model.vocab_size, base.model.swin is None
    if not args.synthetic or not is_text:
        paths = ("synthetic",) if args.synthetic else tuple(args.data or base.workload.data)
        work = dataclasses.replace(base.workload, data=paths, seed=args.seed)
        return load_data(dataclasses.replace(base, workload=work))
    share = 1.0 / np.arange(1, vocab_size + 1)
    place = np.random.default_rng(args.seed).random(SYNTHETIC_TOKENS)
    tokens = np.searchsorted(share.cumsum() / share.sum(), place).clip(max=vocab_size - 1)
    return TokenDataset([("synthetic", tokens)], vocab_size, args.seed)


def measure(
    config: RunConfig, world: World, data: TokenDataset | ImageDataset, args: argparse.Namespace, is_profiled: bool
) -> dict:
    """Train with one system: times, losses and memory of this rank, and the profile of rank 0. Collective."""
    is_cuda = world.device.type == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, build_mesh(config.plan, world.device), data)
    said = [trainer.graphs.reason]
    trainer.graphs.tell = said.append
    results = [trainer.run_iteration() for _ in range(args.warmup + args.iterations)]
    found = {
        "graph": said[-1],
        "step_ms": [result.step_ms for result in results],
        "loss": [result.lm_loss for result in results],
        "max_over_mean": [result.load_max_over_mean for result in results],
        "num_moved": [sum(event["num_moved"] for event in result.events) for result in results],
        "peak_bytes": max(result.peak_memory_bytes for result in results),
    }
    if is_profiled and is_cuda:
        if world.ep_rank == 0:
            found["profile"] = profile(trainer.run_iteration)
        else:
            trainer.run_iteration()
    trainer.close()
    return found


def make_row(config: RunConfig, results: list[dict], warmup: int) -> dict:
    """What the ranks measured, as one row. Times are already those of the slowest rank."""
    work, num_ranks = config.workload, len(results)
    tokens = work.global_batch_size * config.model.seq_len
    step = spread(results[0]["step_ms"][warmup:])
    seconds = step["median"] / 1e3
    profiled = results[0].get("profile")
    return {
        "step_ms": step,
        "tokens_per_s": round(tokens / seconds, 1),
        "tflops_per_gpu": round(flops_per_sample(config.model) * work.global_batch_size / seconds / num_ranks / 1e12, 3),
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "max_over_mean": round(spread(results[0]["max_over_mean"][warmup:])["median"], 3),
        "each_max_over_mean": [round(load, 3) for load in results[0]["max_over_mean"]],
        "num_moved": results[0]["num_moved"],
        "loss": [round(loss, 6) for loss in results[0]["loss"]],
        "first_ms": round(results[0]["step_ms"][0], 1),
        "graph": results[0]["graph"],
        **({"profile": profiled} if profiled else {}),
    }


def format_row(row: dict, top: int) -> str:
    """One line of the table, then the profile."""
    if row["status"] != "ok":
        return f"{row['system']:26s} {row['status']}: {row['reason']}"
    step = row["step_ms"]
    line = (
        f"{row['system']:26s} {step['median']:9.1f} ({step['p10']:.1f} - {step['p90']:.1f}) {row['tokens_per_s']:12,.0f} "
        f"{row['tflops_per_gpu']:8.2f} {row['peak_bytes'] / 1e9:7.1f} {row['max_over_mean']:6.2f}  "
        f"{row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}  first {row['first_ms']:.0f} ms"
    )
    if row["graph"].startswith("CUDA graph"):
        line += f"\n  {row['graph']}"
    return line + "\n" + format_breakdown(row["profile"], top) if "profile" in row else line


HEADER = f"{'system':26s} step ms, median (p10 - p90)     tokens/s  TFLOP/s  peak GB  load  loss"


def run(args: argparse.Namespace, world: World) -> list[dict]:
    """Measure all systems, print and write. Collective."""
    base = inputs.read_model(args.model, args.configs)
    data = read_data(args, base)
    configs = {name: config_of(args, base, name, world.num_ranks) for name in args.systems}
    first = next(iter(configs.values()))
    settings = {
        "model": dataclasses.asdict(first.model),
        "workload": dataclasses.asdict(first.workload),
        "gate": dataclasses.asdict(first.gate),
        "data": [data.describe()] if isinstance(data, ImageDataset) else [name for name, _ in data.parts],
        "flops_per_token": flops_per_sample(first.model) / first.model.seq_len,
        "note": args.note,
    }
    report = Report("train_step", world, args.json, settings, keys=("system",))
    report.say(f"{first.model.name}: {first.model.num_experts} experts, {first.plan.world_size} ranks, "
               f"{first.num_micro_batches} micro-batches of {first.workload.micro_batch_size}, {first.workload.dtype}; "
               f"{settings['flops_per_token'] / 1e9:.3f} GFLOP a token")  # fmt: skip
    report.say(HEADER)

    def is_profiled(name: str) -> bool:
        return args.profile is not None and (not args.profile or name in args.profile)

    try:
        for name, config in configs.items():
            row = {
                "system": name,
                "plan": config.plan.describe(),
                "layer": dataclasses.asdict(config.layer),
                "online": dataclasses.asdict(config.online),
            }
            report.measure(
                row,
                lambda name=name, config=config: measure(config, world, data, args, is_profiled(name)),
                lambda results, config=config: make_row(config, results, args.warmup),
                lambda row: format_row(row, args.top),
            )
    except LeftAloneError as error:
        report.give_up(error)
    return report.data["rows"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, timing=False)
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME[:DISPATCHER][+plain][+zeroN]",
        help="+plain: the passes of a micro-batch run as they are, not from a CUDA graph; +zero2: workload.zero = 2",
        default=["fastmoe", "fastermoe", "padded", "smartmoe_static", "smartmoe"],
    )
    parser.add_argument("--model", default="gpt-l16-h1536", help="a name in models.toml, or a run's .toml file")
    parser.add_argument("--configs", type=Path, default=Path("scripts"), help="where names are looked up")
    parser.add_argument("--experts", type=at_least(1), help="other than the model's")
    parser.add_argument("--layers", type=at_least(1), help="other than the model's")
    parser.add_argument("--no-bias", action="store_true", help="experts without biases")
    parser.add_argument("--plan", help="such as pp2-dp1-ep1, for systems that take one; default: dp = ep = all ranks")
    parser.add_argument("--micro-batch", type=at_least(1), default=8, help="samples of a rank in a pass; default: 8")
    parser.add_argument("--batch", type=at_least(1), help="samples in an iteration; default: 4 micro-batches a rank")
    parser.add_argument("--gate", choices=GATES)
    parser.add_argument("--trace", metavar="FILE.npz", help="route as this trace does, instead of by a gate that learns")
    parser.add_argument("--capacity", type=float, help="of the gate; default: dropless")
    parser.add_argument("--policy", default="auto", help="of online placement, for smartmoe; default: auto")
    parser.add_argument("--interval", type=at_least(1), default=10, help="iterations between decisions; default: 10")
    parser.add_argument("--replicate", default="never", help="copies of experts, for smartmoe; default: never")
    parser.add_argument("--slots", type=at_least(0), default=0, help="copies a rank has room for; default: 0")
    parser.add_argument("--data", nargs="+", help="text files or a .bin/.idx prefix; default: Python's library; for a Swin "
                        "model a folder of IDX files; default: Fashion-MNIST")  # fmt: skip
    parser.add_argument("--synthetic", action="store_true", help="no text: independent tokens of Zipf's frequencies; no "
                        "images: made-up ones")  # fmt: skip
    parser.add_argument("--warmup", type=at_least(1), default=3, help="untimed iterations; default: 3")
    parser.add_argument("--iterations", type=at_least(1), default=8, help="timed iterations; default: 8")
    parser.add_argument(
        "--profile", nargs="*", metavar="NAME", help="profile one more iteration of these systems (CUDA); default: of all"
    )
    parser.add_argument("--top", type=at_least(0), default=25, help="kernels to list; default: 25")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run_in_world(args, run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
