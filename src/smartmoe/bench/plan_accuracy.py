"""Predicted against measured step time and memory of several plans, in one world:

    torchrun --nproc-per-node N -m smartmoe.bench.plan_accuracy --model M --cluster C --profile P.json [--plans NAME ...]

All plans train the same model on the same text; routing does not depend on the plan, so what the first plan records, sample
by sample, are the loads of every micro-batch of every plan. (Where losses of plans differ, training has blown up and they
do not route alike: lower the learning rate.) Step times are medians after warm-up, of the slowest rank; the direct dispatcher
has room for any routing, as otherwise it makes the host wait in its first 256 calls. The row "regret" says how much slower than
the best measured plan the planner's choice is, and that of uniform loads.

--out FILE.json gets rows, every step's time and the parts of the predictions, FILE.npz the loads, sample by sample. --measured
FILE.json predicts what such a file has measured, and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.bench import plan_figure
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
    """One plan: medians in ms of its last num_measured steps, GB that tensors and graphs take of a GPU (0 on a CPU).
    blind_ms: predicted under uniform loads; steps_ms, losses: of all iterations, warm-up first; parts: of predicted_ms."""

    name: str
    measured_ms: float
    p10_ms: float
    p90_ms: float
    predicted_ms: float = 0.0
    blind_ms: float = 0.0
    measured_gb: float = 0.0
    predicted_gb: float = 0.0
    is_captured: bool = False
    num_measured: int = 0
    steps_ms: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


class SampleCounts:
    """An observer of MoE layers: token copies of each sample of a global batch, layer and expert, [B, L, E] int64."""

    def __init__(self, config: RunConfig, layer_indices: list[int], world: World):
        self._world, self._seq_len = world, config.model.seq_len
        self._place = {layer_idx: place for place, layer_idx in enumerate(layer_indices)}
        shape = (config.workload.global_batch_size, len(layer_indices), config.model.num_experts)
        self._count_BLE = torch.zeros(shape, dtype=torch.int64, device=world.device)

    def __call__(self, layer_idx: int, routing, token_id_BT: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:  # recomputed
            return
        num_samples, _, num_experts = self._count_BLE.shape
        expert_BC = routing.expert_idx_TK.reshape(len(token_id_BT), -1)
        kept = (expert_BC >= 0).long()
        count_BE = torch.zeros_like(self._count_BLE[: len(token_id_BT), 0]).scatter_add_(1, expert_BC.clamp(min=0), kept)
        sample_B = token_id_BT[:, 0] // self._seq_len % num_samples
        self._count_BLE[sample_B, self._place[layer_idx]] += count_BE

    def take(self) -> np.ndarray:
        """Of all ranks since the last call. Collective."""
        if self._world.group is not None:
            dist.all_reduce(self._count_BLE)
        found = self._count_BLE.cpu().numpy().copy()
        self._count_BLE.zero_()
        return found


def measure(config: RunConfig, world: World, tokens, num_iterations: int) -> Row:
    """Train a few iterations of a plan. Collective."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, build_mesh(config.plan, world.device), tokens)
    found = [trainer.run_iteration() for _ in range(num_iterations)]
    name = pool.name_of(config.plan, config.workload.micro_batch_size)
    times = [round(result.step_ms, 3) for result in found]
    kept = times[config.workload.warmup_iterations :]
    p10, median, p90 = np.percentile(kept, (10, 50, 90)).tolist()
    peak = max(result.peak_memory_bytes for result in found) / 1e9
    row = Row(
        name, median, p10, p90, measured_gb=peak, is_captured=trainer.graphs.is_recorded, num_measured=len(kept),
        steps_ms=times, losses=[round(result.lm_loss, 5) for result in found],
    )  # fmt: skip
    trainer.close()
    del trainer
    gc.collect()
    if world.group is not None:
        dist.barrier()
    return row


def record_counts(config: RunConfig, world: World, tokens, num_iterations: int) -> np.ndarray:
    """[iterations, samples, layers, experts] token copies that training routes, by a plan of one stage. Collective."""
    work = dataclasses.replace(config.workload, cuda_graph="never")  # whose replays no observer sees
    trainer = Trainer(dataclasses.replace(config, workload=work), build_mesh(config.plan, world.device), tokens)
    counts = SampleCounts(config, sorted(trainer.layers), world)
    for layer in trainer.layers.values():
        layer.observers.append(counts)
    found = []
    for _ in range(num_iterations):
        trainer.run_iteration()
        found.append(counts.take())
    trainer.close()
    return np.stack(found)


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
    cost = cost_of(args, world.num_ranks)
    config, cluster = cost.config, cost.cluster
    plans = [search.named(cost, name, world.num_ranks, "--plans") for name in args.plans or ()]
    plans = plans or choose(cost, world.num_ranks, args.choose)
    if args.runs:  # or says here why it cannot be had, before anything is measured
        fastmoe = plan_figure.fastmoe_of(cost, [micro_batch for _, micro_batch in plans])
    recorder = recorder_of(cost, world.num_ranks)
    tokens = load_tokens(config.workload.data, config.model.vocab_size, seed=config.workload.seed)
    num_iterations, rows = args.warmup + args.steps, []
    link_rate = cluster.slow_links_gbytes_per_s

    def prepared(run_config):
        work = dataclasses.replace(run_config.workload, iterations=1000, warmup_iterations=args.warmup)
        return dataclasses.replace(run_config, workload=work)

    facts = record.provenance(device=torch.cuda.get_device_name() if world.device.type == "cuda" else record.cpu_name())
    facts = {"provenance": facts, "cluster": vars(cluster), "warmup": args.warmup}
    with slow_links(link_rate):
        first = prepared(pool.config_of(config, cluster, *recorder))
        counts_IBLE = record_counts(first, world, tokens, num_iterations)[args.warmup :]
        gc.collect()
        if args.out and world.ep_rank == 0:
            trace_of(counts_IBLE, args.warmup, config).save(args.out.with_suffix(".npz"))
        for plan, micro_batch in plans:
            rows.append(measure(prepared(pool.config_of(config, cluster, plan, micro_batch)), world, tokens, num_iterations))
            if world.ep_rank == 0:
                predict(rows[-1:], cost, counts_IBLE)
                print(f"{format_row(rows[-1])}, predicted {rows[-1].predicted_ms:.1f}", flush=True)
                if args.out:  # now already: what ends this run takes no row with it
                    write(args.out, facts, rows)
        if args.runs:
            bar = measure(prepared(fastmoe), world, tokens, num_iterations)
    if world.ep_rank == 0:
        print(format_rows(rows))
        if args.runs:
            print(f"FastMoE: {format_row(bar)}")
            links = f", {link_rate:g} GB/s" if link_rate else ""
            panel = f"{world.num_ranks} {'GPUs' if world.device.type == 'cuda' else 'CPU ranks'}{links}"
            plan_figure.write_runs(args.runs, cost, rows, (bar, fastmoe), facts["provenance"], panel)
    return rows


def write(path: Path, facts: dict, rows: list[Row]) -> None:
    """The rows so far with their statistics, beside what is known of where they were measured."""
    record.write_json(path, {**facts, "rows": [vars(row) for row in rows], **statistics(rows)})


def cost_of(args: argparse.Namespace, num_ranks: int) -> CostModel:
    """The cost model of the plans that are compared, on `num_ranks` of the cluster's ranks."""
    _, cost = setting_of(args)
    cost.cluster = pool.cluster_of(cost.cluster, num_ranks)
    layer = dataclasses.replace(cost.config.layer, row_factor=float(num_ranks))
    cost.config = dataclasses.replace(cost.config, layer=layer)
    return cost


def predict_measured(args: argparse.Namespace) -> list[Row]:
    """Predict what --measured has, without measuring anything."""
    data = json.loads(args.measured.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in data["rows"]]
    cost = cost_of(args, pool.parse_name(rows[0].name)[0].world_size)
    predict(rows, cost, ExpertTrace.load(args.measured.with_suffix(".npz")).counts[:, 0].transpose(0, 2, 1, 3))
    print(format_rows(rows))
    if args.out:
        write(args.out, data, rows)
    return rows


def trace_of(counts_IBLE: np.ndarray, warmup: int, config: RunConfig) -> ExpertTrace:
    """The loads as a trace of one rank with a micro-batch for each sample."""
    meta = {"top_k": config.model.top_k, "tokens_per_micro_batch_and_rank": config.model.seq_len}
    iteration = warmup + 1 + np.arange(len(counts_IBLE))
    return ExpertTrace(counts_IBLE.transpose(0, 2, 1, 3)[:, None].astype(np.int32), iteration, meta)


def loads_of(counts_IBLE: np.ndarray, config: RunConfig, plan: ParallelPlan, micro_batch: int) -> Loads:
    """What each rank of a stage sends in each micro-batch: sample (m * dp + d) * micro_batch + i is in micro-batch m of
    rank d."""
    num_iterations, _, num_layers, num_experts = counts_IBLE.shape
    shape = (num_iterations, -1, plan.dp, micro_batch, num_layers, num_experts)
    share = counts_IBLE.reshape(shape).sum(3) / (micro_batch * config.model.seq_len * config.model.top_k)
    return Loads(np.repeat(share, plan.tp, axis=2), "recorded beside")


def predict(rows: list[Row], cost: CostModel, counts_IBLE: np.ndarray) -> None:
    """Fill in the predictions, in place."""
    for row in rows:
        plan, micro_batch = pool.parse_name(row.name)
        seen, blind = (
            CostModel(cost.config, cost.cluster, cost.primitives, chosen).estimate(plan, micro_batch)
            for chosen in (loads_of(counts_IBLE, cost.config, plan, micro_batch), loads.uniform(cost.config.model))
        )
        row.predicted_ms, row.blind_ms, row.predicted_gb = seen.mean_ms, blind.mean_ms, seen.memory.allocated / 1e9
        row.parts = {name: round(float(ms), 3) for name, ms in seen.parts.items()}


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


def format_row(row: Row) -> str:
    """What was measured, in a line."""
    return f"{row.name:34s} {row.measured_ms:9.1f} ms ({row.p10_ms:.1f} - {row.p90_ms:.1f})"


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
    losses = np.array([row.losses for row in rows])
    if losses.size:
        lines.append(f"losses of plans differ by up to {(np.ptp(losses, axis=0) / losses.mean(0)).max():.2%}")
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
    parser.add_argument("--warmup", type=int, default=4, help="iterations before them; default: 4")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write rows, statistics and loads")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="measure FastMoE too, and write runs for the figure that DIR is named after"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="predict what is in this file only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.measured:
        predict_measured(args)
        return 0
    return run_in_world(args, run)


if __name__ == "__main__":
    sys.exit(main())
