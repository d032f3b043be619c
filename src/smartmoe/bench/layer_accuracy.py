"""Predicted against measured time of MoE layers along a routing trace:

    torchrun --nproc-per-node N -m smartmoe.bench.layer_accuracy --model M --cluster C --profile P.json --trace T --out RUN_DIR

One layer, forward and backward of one micro-batch, experts over all ranks; routed as each chosen iteration and layer of the
trace says. Nothing of the trace or of these times is in the profile: every point is held out. Measured is the median of some
repetitions, each from an idle device to an idle device, of the slowest rank. Beside our prediction stands that of uniform
loads. RUN_DIR gets predictions.jsonl, as figures read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from smartmoe import record
from smartmoe.bench.measure import World, run_in_world
from smartmoe.config import GateConfig, ParallelPlan, RunConfig, to_dict
from smartmoe.layer import MoELayer
from smartmoe.planner import inputs, loads, pool
from smartmoe.planner.commands import add_setting, setting_of
from smartmoe.planner.cost_model import CostModel
from smartmoe.trace import ExpertTrace


class LayerSteps:
    """One MoE layer of a trace on this rank, and a step of it."""

    def __init__(self, config: RunConfig, layer_idx: int, world: World):
        self.config, self.world = config, world
        model, work = config.model, config.workload
        dtype = getattr(torch, work.dtype)
        self.layer = MoELayer(
            config, layer_idx=layer_idx, ep_group=world.group, stage_group=world.group, dtype=dtype, device=world.device
        )
        shape = (2, work.micro_batch_size, model.seq_len, model.hidden_size)
        generator = torch.Generator().manual_seed(1 + world.ep_rank)
        self.x_BTD, self.grad_BTD = torch.randn(shape, generator=generator).to(world.device, dtype)

    def time_ms(self, row: int, repeat: int) -> float:
        """Median ms of the iteration in `row` of the trace, of the slowest rank. Collective."""
        work, seq_len = self.config.workload, self.config.model.seq_len
        first = row * work.global_batch_size + self.world.ep_rank * work.micro_batch_size
        sample_B = torch.arange(first, first + work.micro_batch_size, device=self.world.device)
        token_id_BT = sample_B[:, None] * seq_len + torch.arange(seq_len, device=self.world.device)
        times = []
        for _ in range(repeat + 1):
            x_BTD = self.x_BTD.detach().requires_grad_()
            self.world.align()
            self.world.synchronize()
            start = time.perf_counter()
            y_BTD, _ = self.layer(x_BTD, token_id_BT)
            y_BTD.backward(self.grad_BTD)
            self.world.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
            for param in self.layer.parameters():
                param.grad = None
        return float(np.median([self.world.largest(ms) for ms in times[1:]]))


def run(args: argparse.Namespace, world: World) -> list[dict]:
    """Measure and predict all points; rank 0 writes and prints. Collective."""
    config, cost = setting_of(args)
    trace = inputs.read_trace(args.trace)
    cost.cluster = pool.cluster_of(cost.cluster, world.num_ranks)
    plan = ParallelPlan(dp=world.num_ranks, ep=world.num_ranks)
    work = dataclasses.replace(
        config.workload, micro_batch_size=args.micro_batch, global_batch_size=args.micro_batch * world.num_ranks
    )
    model = dataclasses.replace(config.model, num_layers=trace.counts.shape[2])
    gate = GateConfig(kind="trace", trace=str(args.trace))
    config = dataclasses.replace(config, model=model, gate=gate, workload=work, plan=plan, cluster=cost.cluster)
    points = choose_points(trace, args.points)
    measured = measure(config, points, world, args.repeat)
    if world.ep_rank:
        return []
    rows = predict(config, cost, trace, points, measured)
    print(format_statistics(rows))
    if args.out:
        write(args.out, config, rows, world, args.figure)
    return rows


def choose_points(trace: ExpertTrace, num_points: int) -> list[tuple[int, int]]:
    """(layer, row of the trace), evenly over iterations, all layers of each; layer by layer."""
    num_iterations, _, num_layers = trace.counts.shape[:3]
    wanted = max(1, min(num_iterations, -(-num_points // num_layers)))
    rows = np.unique(np.linspace(0, num_iterations - 1, wanted).round().astype(int)).tolist()
    return [(layer, row) for layer in range(num_layers) for row in rows]


def measure(config: RunConfig, points, world: World, repeat: int) -> list[float]:
    """Median ms of each point. Collective."""
    steps, times = None, []
    for place, (layer, row) in enumerate(points):
        if place == 0 or layer != points[place - 1][0]:
            steps = LayerSteps(config, layer, world)
            steps.time_ms(row, 3)  # connections, allocations
        times.append(steps.time_ms(row, repeat))
    return times


def predict(config: RunConfig, cost: CostModel, trace: ExpertTrace, points, measured) -> list[dict]:
    """Rows of predictions.jsonl."""
    seen = loads.from_trace(trace, config.model).mean_over_micro_batches()
    predicted, blind = (
        CostModel(config, cost.cluster, cost.primitives, chosen).layer_ms(config.plan, config.workload.micro_batch_size)
        for chosen in (seen, loads.uniform(config.model))
    )
    return [
        {
            "iteration": int(trace.iteration[row]),
            "layer": layer,
            "predicted_ms": round(float(predicted[row, 0, layer]), 5),
            "measured_ms": round(ms, 5),
            "naive_ms": round(float(blind[0, 0, layer]), 5),
        }
        for (layer, row), ms in zip(points, measured, strict=True)
    ]


def statistics(rows: list[dict]) -> dict[str, float]:
    """R2 of the prediction itself (not of a line through it) and MAPE, with and without looking at the loads."""
    real = np.array([row["measured_ms"] for row in rows])
    found = {"num": len(rows)}
    for name, key in (("", "predicted_ms"), ("naive_", "naive_ms")):
        guess = np.array([row[key] for row in rows])
        spread = np.square(real - real.mean()).sum()
        found[f"{name}r2"] = float(1 - np.square(real - guess).sum() / spread) if spread else 0.0
        found[f"{name}mape"] = float(np.abs(guess / real - 1).mean())
    return found


def format_statistics(rows: list[dict]) -> str:
    s = statistics(rows)
    return (
        f"{s['num']} points: R2 {s['r2']:.3f}, MAPE {s['mape']:.1%}; "
        f"uniform loads: R2 {s['naive_r2']:.3f}, MAPE {s['naive_mape']:.1%}"
    )


def write(run_dir: Path, config: RunConfig, rows: list[dict], world: World, figure: str) -> None:
    """A run directory with predictions.jsonl, for a panel of `figure` ("" = for none)."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else record.cpu_name()
    facts = record.provenance(device=device, num_ranks=world.num_ranks, entry="layer_accuracy", **statistics(rows))
    panel = f"{world.num_ranks} ranks, micro-batch {config.workload.micro_batch_size}"
    slot = [{"figure": figure, "panel": panel, "group": "", "series": "layer"}] if figure else []
    record.create_run(run_dir, record.safe_run_id(run_dir.name), to_dict(config), slot, provenance=facts)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(run_dir, "predictions.jsonl").write_text(text, encoding="utf-8")
    record.set_status(run_dir, "ok")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.layer_accuracy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_setting(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples of a rank; default: 4")
    parser.add_argument(
        "--points", type=int, default=600, help="iterations x layers to measure, at least; default: 600"
    )
    parser.add_argument("--repeat", type=int, default=5, help="steps of each point; default: 5")
    parser.add_argument(
        "--out", type=Path, metavar="RUN_DIR", help="write predictions.jsonl and what is needed to draw it"
    )
    parser.add_argument("--figure", default="", help="the figure whose panel this is, by its name in logs/README.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.trace is None:
        print("--trace: give the routing to measure under", file=sys.stderr)
        return 2
    return run_in_world(args, run)


if __name__ == "__main__":
    sys.exit(main())
