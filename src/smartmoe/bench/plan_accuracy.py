"""Predicted against measured step time and memory of several plans, in one world:

    torchrun --nproc-per-node N -m smartmoe.bench.plan_accuracy --model M --cluster C --profile P.json [--plans NAME ...]

All plans train the same model on the same text; routing does not depend on the plan, so the counts that the first plan
records are the loads under which every plan is predicted. Step times are medians after warm-up, of the slowest rank. The
row "regret" says how much slower than the best measured plan the planner's choice is, and that of uniform loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.bench.measure import World, run_in_world
from smartmoe.config import ParallelPlan, RunConfig
from smartmoe.data import load_tokens
from smartmoe.mesh import build_mesh
from smartmoe.planner import loads, pool, search
from smartmoe.planner.commands import add_setting, setting_of
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.loads import Loads
from smartmoe.slow_links import slow_links
from smartmoe.trace import ExpertTrace
from smartmoe.trainer import Trainer


@dataclasses.dataclass
class Row:
    """One plan: medians in ms, GB of torch's allocator (0 on a CPU). blind_ms: predicted under uniform loads."""

    name: str
    measured_ms: float
    p10_ms: float
    p90_ms: float
    predicted_ms: float = 0.0
    blind_ms: float = 0.0
    measured_gb: float = 0.0
    predicted_gb: float = 0.0


def measure(config: RunConfig, world: World, tokens, num_iterations: int) -> tuple[Row, np.ndarray | None]:
    """Train a few iterations of a plan: (its row, counts [I, R, L, M, E] where one stage has all layers). Collective."""
    is_cuda = world.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, build_mesh(config.plan, world.device), tokens)
    times, counts = [], []
    for _ in range(num_iterations):
        times.append(trainer.run_iteration().step_ms)
        if config.plan.pp == 1:
            counts.append(trainer.online.gather_counts())
    kept = np.array(times[config.workload.warmup_iterations :])
    peak = world.largest(torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0)
    name = pool.name_of(config.plan, config.workload.micro_batch_size)
    p10, median, p90 = np.percentile(kept, (10, 50, 90))
    del trainer
    gc.collect()
    if world.group is not None:
        dist.barrier()
    return Row(name, float(median), float(p10), float(p90), measured_gb=peak), np.stack(counts) if counts else None


def choose(cost: CostModel, num_ranks: int, num_plans: int) -> list[tuple[ParallelPlan, int]]:
    """Plans of many kinds: the best of every combination of pp, tp, ep and recomputation, evenly from best to worst."""
    result = search.search(cost, num_ranks, top=100_000)
    kinds = {(e.plan.pp, e.plan.vpp, e.plan.tp, e.plan.ep, e.plan.recompute): e for e in reversed(result.ranked)}
    ranked = sorted(kinds.values(), key=lambda e: e.mean_ms)
    places = np.unique(np.linspace(0, len(ranked) - 1, min(num_plans, len(ranked))).round().astype(int))
    return [(ranked[place].plan, ranked[place].micro_batch) for place in places]


def recorder_of(cost: CostModel, num_ranks: int) -> tuple[ParallelPlan, int]:
    """The fastest plan of one stage, whose ranks see all layers and all of a sample's tokens."""
    fitting = [c for c in pool.build(cost, num_ranks).fitting if c.plan.pp == c.plan.tp == 1]
    if not fitting:
        raise ValueError("no plan with pp = tp = 1 fits, and one is needed to record the routing")
    best = min(fitting, key=lambda c: cost.estimate(c.plan, c.micro_batch, c.memory).mean_ms)
    return best.plan, best.micro_batch


def run(args: argparse.Namespace, world: World) -> list[Row]:
    """Measure all plans, predict them, print and write. Collective."""
    config, cost = setting_of(args)
    cluster = pool.cluster_of(cost.cluster, world.num_ranks)
    cost.cluster = cluster
    plans = [pool.parse_name(name) for name in args.plans] if args.plans else choose(cost, world.num_ranks, args.choose)
    recorder = recorder_of(cost, world.num_ranks)
    tokens = load_tokens(config.workload.data, config.model.vocab_size, seed=config.workload.seed)
    rows, trace = [], None
    for plan, micro_batch in [recorder, *plans]:
        run_config = pool.config_of(config, cluster, plan, micro_batch)
        work = dataclasses.replace(run_config.workload, iterations=1000, warmup_iterations=args.warmup)
        with slow_links(cluster.slow_links_gbytes_per_s):
            row, counts = measure(
                dataclasses.replace(run_config, workload=work), world, tokens, args.warmup + args.steps
            )
        if trace is None:
            trace = counts[args.warmup :]
            continue
        rows.append(row)
        if world.ep_rank == 0:
            print(f"{row.name:34s} {row.measured_ms:9.1f} ms ({row.p10_ms:.1f} - {row.p90_ms:.1f})", flush=True)
    if world.ep_rank == 0:
        predict(rows, plans, cost, loads_of(trace, config))
        print(format_rows(rows))
        if args.out:
            facts = record.provenance(
                device=torch.cuda.get_device_name() if world.device.type == "cuda" else record.cpu_name()
            )
            record.write_json(
                args.out,
                {
                    "provenance": facts,
                    "cluster": vars(cluster),
                    "rows": [vars(row) for row in rows],
                    **statistics(rows),
                },
            )
    return rows


def loads_of(counts_IRLME: np.ndarray, config: RunConfig) -> Loads:
    """What the measured iterations routed."""
    trace = ExpertTrace(counts_IRLME.astype(np.int32), np.arange(len(counts_IRLME)) + 1, {"top_k": config.model.top_k})
    return dataclasses.replace(loads.from_trace(trace, config.model), about="recorded beside").mean_over_micro_batches()


def predict(rows: list[Row], plans, cost: CostModel, seen: Loads) -> None:
    """Fill in the predictions, in place."""
    for kind, chosen in (("predicted_ms", seen), ("blind_ms", loads.uniform(cost.config.model))):
        model = CostModel(cost.config, cost.cluster, cost.primitives, chosen, "identity")
        for row, (plan, micro_batch) in zip(rows, plans, strict=True):
            estimate = model.estimate(plan, micro_batch)
            setattr(row, kind, estimate.mean_ms)
            if kind == "predicted_ms":
                row.predicted_gb = estimate.memory.allocated / 1e9


def statistics(rows: list[Row]) -> dict[str, float]:
    """MAPE and Kendall's tau of the step times, regret of the choice with and without looking at the loads."""
    measured, predicted, blind = (
        np.array([getattr(r, k) for r in rows]) for k in ("measured_ms", "predicted_ms", "blind_ms")
    )
    found = {
        "mape": float(np.abs(predicted / measured - 1).mean()),
        "tau": kendall_tau(predicted, measured),
        "regret": float(measured[predicted.argmin()] / measured.min() - 1),
        "blind_mape": float(np.abs(blind / measured - 1).mean()),
        "blind_tau": kendall_tau(blind, measured),
        "blind_regret": float(measured[blind.argmin()] / measured.min() - 1),
    }
    memory = np.array([[r.predicted_gb, r.measured_gb] for r in rows])
    if memory[:, 1].all():
        found["memory_mape"] = float(np.abs(memory[:, 0] / memory[:, 1] - 1).mean())
    return found


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's rank correlation (tau-a) of two series; 1.0 for fewer than two."""
    upper = np.triu_indices(len(a), 1)
    signs = [np.sign(x[:, None] - x[None])[upper] for x in (a, b)]
    return float((signs[0] * signs[1]).mean()) if len(a) > 1 else 1.0


def format_rows(rows: list[Row]) -> str:
    """The table and its statistics."""
    lines = [
        f"{'plan':34s} {'measured':>9s} {'predicted':>9s} {'error':>7s} {'uniform':>9s} {'GB':>6s} {'predicted':>9s}"
    ]
    for r in sorted(rows, key=lambda r: r.measured_ms):
        error = r.predicted_ms / r.measured_ms - 1
        lines.append(f"{r.name:34s} {r.measured_ms:9.1f} {r.predicted_ms:9.1f} {error:+7.0%} {r.blind_ms:9.1f} "
                     f"{r.measured_gb:6.2f} {r.predicted_gb:9.2f}")  # fmt: skip
    s = statistics(rows)
    lines.append(f"step time: MAPE {s['mape']:.1%}, Kendall tau {s['tau']:.2f}, regret {s['regret']:.1%}; "
                 f"uniform loads: {s['blind_mape']:.1%}, {s['blind_tau']:.2f}, {s['blind_regret']:.1%}")  # fmt: skip
    if "memory_mape" in s:
        lines.append(f"memory: MAPE {s['memory_mape']:.1%}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.plan_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_setting(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--plans", nargs="+", metavar="NAME", help="such as pp2-dp2-ep2-mb1 (default: --choose of all kinds)"
    )
    parser.add_argument("--choose", type=int, default=12, help="how many plans to choose without --plans; default: 12")
    parser.add_argument("--steps", type=int, default=8, help="measured iterations of each plan; default: 8")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before them; default: 3")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write rows and statistics")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
