"""The commands `smartmoe profile`, `smartmoe plan` and `smartmoe simulate`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smartmoe.config import DTYPES, GATES, OnlineConfig, RunConfig, slowed
from smartmoe.planner import inputs, loads, pool, search, simulate
from smartmoe.planner.cost_model import CostModel, Estimate
from smartmoe.record import check_out, safe_run_id
from smartmoe.trace import synthetic
from smartmoe.trace_synthetic import SKEWS

PLAN_EPILOG = """\
examples:
  smartmoe plan --model gpt-l16-h1536 --cluster v100x16 --gpus 16
  smartmoe plan --model run.toml --cluster local --gpus 2 --trace runs/first/trace.npz --out best.toml
  smartmoe plan --model gpt-l16-h1536 --cluster v100x16 --gpus 16 --explain 1 dp16-ep16-mb2

A plan's name has the ranks of its pipeline (pp), model chunks of each (vpp), data (dp), tensor (tp) and expert parallelism
(ep), and the samples of a micro-batch (mb). Step ms are the mean over loads, GB those of the fullest rank, the bottleneck is
the largest part of the step; --explain lists all parts. Of them "launches and waits" is time in which the device waits for
its host, "pipeline idle" for other stages, and "step" what remains to be done once a step.

The loads that plans are judged under are those of --trace (of the published kind, or of a short run with record_trace = true),
else a prior by the type of gate. --loads uniform judges as a planner does that does not look at the routing.
"""


PROFILE_EPILOG = """\
examples:
  smartmoe profile --ranks 2 --out local.profile.json             measure 2 GPUs of this machine in bfloat16
  smartmoe profile --ranks 2 --device cpu --out cpu.profile.json
  smartmoe plan --model run.toml --cluster local --profile local.profile.json --gpus 2
"""

SIMULATE_EPILOG = """\
examples:
  smartmoe simulate --model gpt-l16-h1536 --cluster inky --gpus 16 --plan pp2-dp8-ep8-mb4 --policy greedy
  smartmoe simulate --model run.toml --cluster inky --gpus 8 --plan dp8-ep8-mb4 --trace routing.npz --policy replicate_history
      --slots 2 --out sim/copies --bar "FIGURE,,8/+inf,smartmoe"
  ./RUNME-a.sh --logs sim                                         draws what --out and --bar put there, hatched: simulated

It prints the median and 95th percentile of an iteration in ms, what moving and copying experts takes of it, the fullest rank's
load over the mean and the memory of the fullest rank. --out writes a run directory as training does.
"""


def add_parsers(commands, start: Callable[[list[str]], int], check_gpus: Callable[[str, int], None]) -> None:
    """Add the planner's commands to an argparse subparsers object. `start` runs a command line to its end, check_gpus(for
    what, how many) raises ValueError where they are not there."""
    _add_profile(commands, start, check_gpus)
    _add_plan(commands)
    _add_simulate(commands)


# ---------------------------------------------------------------------------------------------------------------- profile


def _add_profile(commands, start, check_gpus) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure what this machine's pieces of a training step take",
        description="Measure the primitives that `smartmoe plan` reads: products, attention, exchanges, optimizer. "
        "About a minute on two GPUs. Options behind -- go to smartmoe.bench.profile_cluster (--dtype, --shapes, --tokens).",
        epilog=PROFILE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, default=2, help="processes (GPUs) that measure together; default: 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where torch sees one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the profile to write")
    parser.add_argument("--slow-links", type=float, default=0.0, metavar="GB/S",
                        help="slow exchanges between ranks down to this rate")  # fmt: skip
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(command=lambda args: _profile(args, start, check_gpus))


def _profile(args: argparse.Namespace, start, check_gpus) -> int:
    if args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: at least 1")
    if args.slow_links < 0:
        raise ValueError(f"--slow-links {args.slow_links:g}: GB/s must be positive, or 0 for links as they are")
    check_out(args.out)
    if args.device == "cuda":
        check_gpus("--device cuda", args.ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command += ["-m", "smartmoe.bench.profile_cluster", "--out", str(args.out), *args.more]
    command += ["--slow-links", str(args.slow_links)] if args.slow_links else []
    return start(command + (["--device", args.device] if args.device else []))


# ------------------------------------------------------------------------------------------------------------------- plan


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan", help="find the fastest plan for a model on a cluster", epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Rank every legal plan that fits in memory by predicted step time. Trains nothing, needs no GPU.",
    )  # fmt: skip
    add_setting(parser)
    parser.add_argument("--gpus", type=int, required=True, help="ranks to plan for")
    parser.add_argument("--micro-batch", type=int, default=None, help="only plans with this micro-batch")
    parser.add_argument("--placement", choices=("identity", "balanced"), default="balanced",
                        help="experts stay in order, or are placed online (default)")  # fmt: skip
    parser.add_argument(
        "--score", choices=search.SCORES, default="mean", help="rank by the mean or the 95th percentile"
    )
    parser.add_argument("--copies", choices=("auto", "never"), default="auto",
                        help="try the plans of the table with copies of hot experts too (default), or not")  # fmt: skip
    parser.add_argument("--top", type=int, default=15, help="rows to print; default: 15")
    parser.add_argument(
        "--explain", nargs=2, metavar=("A", "B"), help="compare two plans, by row or by name, part by part"
    )
    parser.add_argument("--pruned", type=int, default=0, metavar="N",
                        help="print N plans that are too large or may not fit, and why")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE.toml", help="write the best plan as a run for `smartmoe train`"
    )
    parser.set_defaults(command=_plan)


def add_setting(parser) -> None:
    """The options that say what is planned for: model, cluster, workload, loads."""
    parser.add_argument("--model", required=True, help="a name in models.toml, or a run's .toml file")
    parser.add_argument("--cluster", required=True, help="a name in clusters/, or a .toml file")
    parser.add_argument("--configs", type=Path, default=inputs.default_folder(), metavar="DIR",
                        help="folder of models.toml and clusters/, where names are looked up; default: scripts here, else "
                        "that of the repository")  # fmt: skip
    parser.add_argument(
        "--profile", type=Path, help="a measured profile (default: <cluster>.profile.json beside its file)"
    )
    parser.add_argument(
        "--slow-links",
        type=float,
        default=0.0,
        metavar="GB/S",
        help="as if exchanges between ranks had this rate; default: as the cluster's links are",
    )
    parser.add_argument("--gate", choices=GATES, help="default: the run's, or naive")
    parser.add_argument("--capacity", type=float, help="of the gate, such as 1.2; default: the run's, or none")
    parser.add_argument("--batch", type=int, help="samples in a step; default: the run's, or 256 for a model by name")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the run's, or bfloat16 on cuda")
    parser.add_argument(
        "--dispatcher", choices=("basic", "overlapped", "padded", "direct", "auto"),
        help="how rows travel (layer.dispatcher); default: the run's, or basic"
    )
    parser.add_argument("--trace", help="routing to judge under: .npz, .csv, a folder of tables, or synthetic:KIND")
    parser.add_argument("--loads", choices=("prior", "uniform"), default="prior",
                        help="without a trace: skewed as the type of gate is known to be (default), or even")  # fmt: skip
    parser.add_argument("--samples", type=int, default=16, help="how many loads to judge under, iterations of the trace or "
                        "draws; default: 16")  # fmt: skip


def setting_of(args: argparse.Namespace) -> tuple[RunConfig, CostModel]:
    """The run without its plan, and the cost model that the options describe."""
    for option, number in (("--samples", args.samples), ("--batch", args.batch)):
        if number is not None and number < 1:
            raise ValueError(f"{option} {number}: at least 1")
    cluster, rates, cluster_file = inputs.read_cluster(args.cluster, args.configs)
    cluster = slowed(cluster, args.slow_links)
    config = inputs.read_model(args.model, args.configs)
    inputs.refuse_swin(config.model)
    by_name = not args.model.endswith((".toml", ".json"))
    work, gate = config.workload, config.gate
    work = dataclasses.replace(
        work,
        global_batch_size=args.batch or (256 if by_name else work.global_batch_size),
        dtype=args.dtype or ("bfloat16" if by_name and cluster.device == "cuda" else work.dtype),
    )
    gate = dataclasses.replace(
        gate, kind=args.gate or gate.kind, capacity=gate.capacity if args.capacity is None else args.capacity
    )
    layer = dataclasses.replace(config.layer, dispatcher=args.dispatcher or config.layer.dispatcher)
    config = dataclasses.replace(config, workload=work, gate=gate, layer=layer)
    primitives = inputs.read_primitives(cluster, rates, cluster_file, args.profile, work.dtype)
    if cluster.num_nodes == 1:  # a node that ranks were profiled on has them, whatever its file says
        there = max(cluster.ranks_per_node, primitives.facts.get("ranks", 1))
        cluster = dataclasses.replace(cluster, ranks_per_node=there)
    memory = min(cluster.memory_gbytes, primitives.facts.get("memory_gbytes", math.inf))  # no more than was found there
    cluster = dataclasses.replace(cluster, memory_gbytes=memory)
    chosen = inputs.choose_loads(config.model, gate, args.trace, args.loads, args.samples)
    return config, CostModel(config, cluster, primitives, chosen, getattr(args, "placement", "identity"))


def _plan(args: argparse.Namespace) -> int:
    start = time.monotonic()
    config, cost = setting_of(args)
    cost.cluster = pool.cluster_of(cost.cluster, args.gpus)
    _check_options(args, cost)
    result = search.search(cost, args.gpus, args.top, args.score, args.micro_batch, args.copies == "auto")
    where = f"{args.gpus} of cluster {cost.cluster.name} ({cost.primitives.source})"
    print(f"{config.model.name} on {where}: {result.num_judged} plans simulated in {time.monotonic() - start:.1f} s")
    print(search.format_table(result, args.top))
    print(_insensitive(cost, result, args))
    for pruned in sorted(result.pool.pruned, key=lambda p: p.candidate.memory.total)[: args.pruned]:
        print(f"left out: {pruned.candidate.name} {pruned.reason}")
    if args.explain:
        one, other = (search.find(cost, result, word, args.gpus) for word in args.explain)
        print("\n" + search.explain(cost, one, other))
    if args.out:
        args.out.write_text(run_of(cost, result.ranked[0], args.placement), encoding="utf-8")
        print(f"wrote {args.out}: smartmoe train {args.out}")
    return 0


def _check_options(args: argparse.Namespace, cost: CostModel) -> None:
    """Say what is wrong with the options before a search that may take a while."""
    for option, number in (("--top", args.top), ("--micro-batch", args.micro_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{option} {number}: at least 1")
    if args.out:
        check_out(args.out)
    for word in args.explain or ():
        if not word.isdigit():
            search.named(cost, word, args.gpus)
        elif not 1 <= int(word) <= args.top:
            raise ValueError(f"--explain {word}: the table has rows 1 .. {args.top}; more with --top")


def _insensitive(cost: CostModel, result: search.Result, args) -> str:
    """What a planner would choose that does not look at the routing, and what that choice takes under these loads."""
    try:
        blind = search.search(cost.data_insensitive(), args.gpus, 1, args.score, args.micro_batch).ranked[0]
    except ValueError as error:  # where a capacity drops more of these loads than of even ones
        return f"without looking at the loads: {error}"
    name, best = search.words_of(blind), result.ranked[0]
    seen = cost.estimate(blind.plan, blind.micro_batch)
    pruned = pool.left_out(cost, pool.Candidate(blind.plan, blind.micro_batch, seen.memory))
    if pruned:
        return f"without looking at the loads: {name}, which under them {pruned.reason}"
    return f"without looking at the loads: {name}, {seen.mean_ms:.1f} ms under them, {seen.mean_ms / best.mean_ms:.2f} x row 1"


def run_of(cost: CostModel, estimate: Estimate, placement: str) -> str:
    """The TOML of the run that an estimate stands for."""
    config = pool.config_of(cost.config, cost.cluster, estimate.plan, estimate.micro_batch)
    moves = placement == "balanced" and estimate.plan.ep > 1
    online = config.online
    if estimate.copies:
        mode, slots = estimate.copies.split()
        policy = "auto" if mode == "history" else "greedy" if moves else "static"
        online = OnlineConfig(policy=policy, interval=10, migrate=moves, replicate=mode, replica_slots=int(slots))
    elif moves and online.policy == "static":
        online = OnlineConfig(policy="greedy", interval=10)
    changes = moves or estimate.copies
    config = dataclasses.replace(config, online=online, system="smartmoe" if changes else "smartmoe_static")
    comment = f"# {pool.name_of(estimate.plan, estimate.micro_batch)}: {estimate.mean_ms:.1f} ms a step predicted"
    return f"{comment} ({cost.primitives.source} cluster {cost.cluster.name}, {cost.loads.about})\n{inputs.to_toml(config)}"


# --------------------------------------------------------------------------------------------------------------- simulate


def _add_simulate(commands) -> None:
    parser = commands.add_parser(
        "simulate",
        help="play a plan, a routing trace and a placement policy on a described cluster",
        description="Predict every iteration of a training run: no GPU, no training.",
        epilog=SIMULATE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_setting(parser)
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    parser.add_argument(
        "--plan", required=True, metavar="NAME", help="as `smartmoe plan` names it, such as pp2-dp4-ep4-mb2"
    )
    parser.add_argument("--policy", choices=simulate.POLICIES, default="static",
                        help="who moves or copies experts; default: static, nobody")  # fmt: skip
    parser.add_argument("--interval", type=int, default=10, help="iterations between decisions; default: 10")
    parser.add_argument("--slots", type=int, default=0,
                        help="copies of experts that a rank has room for, for the replicate policies; default: 0")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=None, help="default: those of the trace, or 200")
    parser.add_argument("--skew", choices=tuple(SKEWS), default="zipf-strong",
                        help="without --trace: the class of a synthetic one; default: zipf-strong")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a run directory, marked as simulated")
    parser.add_argument(
        "--bar", default="", metavar="FIGURE,PANEL,GROUP,SERIES", help="its place in a figure (FIGURE: the name of its file)"
    )
    parser.set_defaults(command=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    start = time.monotonic()
    if args.out and ((args.out / "run.json").exists() or args.out.is_file()):
        raise ValueError(f"{args.out} holds a run already, or is a file: give another --out")
    plan, micro_batch = pool.parse_name(args.plan)
    config, cost = setting_of(args)
    cluster = pool.cluster_of(cost.cluster, args.gpus)
    if args.trace:
        chosen = inputs.read_loads(args.trace, config.model)
    else:
        chosen = loads.from_trace(_synthetic(config, args), config.model)
    chosen = chosen.limited(config.gate.capacity)
    num_iterations = chosen.num_samples if args.iterations is None else args.iterations
    if not 1 <= num_iterations <= chosen.num_samples:
        raise ValueError(f"--iterations {num_iterations}: the trace has {chosen.num_samples}")
    chosen = loads.Loads(chosen.share[:num_iterations], chosen.about)
    bars = [_bar(args.bar)] if args.bar else []
    policy = simulate.Policy(kind=args.policy, interval=args.interval, replica_slots=args.slots)
    config = pool.config_of(config, cluster, plan, micro_batch)
    work = dataclasses.replace(config.workload, iterations=num_iterations, warmup_iterations=0)
    config = dataclasses.replace(
        config, workload=work, system="smartmoe_static" if args.policy == "static" else "smartmoe"
    )
    found = simulate.simulate(config, cluster, cost.primitives, chosen, policy)
    memory = cost.memory(plan, micro_batch)
    pruned = pool.left_out(cost, pool.Candidate(plan, micro_batch, memory))
    took = time.monotonic() - start
    print(
        f"{args.plan} with {args.policy} on {args.gpus} of cluster {cluster.name} ({cost.primitives.source}), {chosen.about}"
    )
    print(f"{num_iterations} iterations simulated in {took:.1f} s: step median {np.median(found.step_ms):.1f} ms, "
          f"p95 {np.percentile(found.step_ms, 95):.1f} ms; moving and copying experts {found.overhead_ms.mean():.2f} ms of it; "
          f"max/mean load {found.max_over_mean.mean():.2f}; {len(found.events)} changes; "
          f"{memory.total / 1e9:.1f} GB on the fullest rank")  # fmt: skip
    if pruned:
        print(f"{args.plan} {pruned.reason}")
    if args.out:
        facts = {"device": f"cluster {cluster.name}", "primitives": cost.primitives.source, "loads": chosen.about}
        simulate.write_run(args.out, safe_run_id(args.plan, args.policy), config, found, bars, facts)
    return 0


def _synthetic(config: RunConfig, args):
    num_layers = max(1, loads.num_moe_layers(config.model))
    copies = config.model.seq_len * config.model.top_k
    return synthetic(
        args.skew, num_iterations=args.iterations or 200, num_ranks=1, num_layers=num_layers, num_micro_batches=2,
        num_experts=config.model.num_experts, num_copies=copies,
    )  # fmt: skip


def _bar(text: str) -> dict:
    words = text.split(",")
    if len(words) != 4:
        raise ValueError(f'--bar "{text}": expected FIGURE,PANEL,GROUP,SERIES (a part may be empty)')
    return dict(zip(("figure", "panel", "group", "series"), words, strict=True))
