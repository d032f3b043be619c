"""Figures 11, 12 and 13 of the paper as the simulator sees them, beside the published values: single layers on the clusters
that scripts/published_clusters.py fitted on whole steps (figures 8 and 10; pinky on the mean of figure 12's layers, too).

    python scripts/published_layers.py --trace FILE.npz             every panel, simulated beside published
    python scripts/published_layers.py --trace FILE.npz --out DIR   also write them as simulated runs that the figures draw

FILE.npz: the published routing trace (iterations 1, 11 .. of the artifact's moe_trace). Figure 11's measured values are the
paper's; predicted are those of our cost model on cluster inky, forward and backward, for the counts that the paper's estimate
took (rank 0, micro-batch 0). Figure 12 is pinky's run of 64 GPUs, without and with greedy placement. Figure 13 is layer 6 on 8
GPUs of inky; placement follows the iterations before, where the paper's followed the same one. The artifact does not tell how
many samples a GPU had: 32 are taken, which meet its static mean, so that only the other curves are a test.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from published_clusters import EXPONENTS, ROOT, read_bars, simulated_run

from smartmoe import record
from smartmoe.config import (
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    to_dict,
)
from smartmoe.planner import described, inputs, loads, pool, simulate
from smartmoe.planner.cost_model import CostModel
from smartmoe.trace import ExpertTrace

PANELS = {"8-4": (8, 4), "8-8": (8, 8), "16-8": (16, 8)}  # of figure 11: GPUs, micro-batch
MODEL = ModelConfig(
    name="GPT-L24-H1536", num_layers=24, hidden_size=1536, ffn_size=3072, num_heads=16, seq_len=1024, vocab_size=50304,
    num_experts=32,
)  # fmt: skip
CURVES = {"static": None, "every_100": 10, "every_10": 1}  # of figure 13: recorded iterations between decisions
CURVE_LAYER, CURVE_GPUS, CURVE_BATCH = 6, 8, 32
NUM_SPANS = 40  # iterations of figure 12


def read_table(name: str) -> list[dict]:
    with open(ROOT / "logs" / "published" / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def setting(num_gpus: int, micro_batch: int, model: ModelConfig = MODEL):
    """(run, primitives) of a layer whose experts are spread over GPUs of inky."""
    cluster, rates, _ = inputs.read_cluster("inky", ROOT / "scripts")
    cluster = pool.cluster_of(cluster, num_gpus)
    work = Workload(global_batch_size=micro_batch * num_gpus, micro_batch_size=micro_batch, dtype="float16")
    run = RunConfig(
        model=model, gate=GateConfig(kind="naive"), layer=LayerConfig(experts="loop"), workload=work, cluster=cluster,
        plan=ParallelPlan(dp=num_gpus, ep=num_gpus),
    )  # fmt: skip
    return run, described.describe(cluster, rates, "float16")


def figure_11(trace: ExpertTrace) -> dict[str, list[dict]]:
    """Panel -> rows of predictions.jsonl, for the points whose counts are public."""
    row_of = {iteration: row for row, iteration in enumerate(trace.iteration.tolist())}
    panels = {}
    for panel, (num_gpus, micro_batch) in PANELS.items():
        mine = [p for p in read_table("fig11.csv") if p["panel"] == panel and int(p["iteration"]) in row_of]
        counts = trace.counts[:, 0, :, 0].astype(float)
        share = (counts / counts.sum(-1, keepdims=True))[:, None, None]
        run, primitives = setting(num_gpus, micro_batch)
        seen, blind = (
            CostModel(run, run.cluster, primitives, chosen).layer_ms(run.plan, micro_batch)
            for chosen in (loads.Loads(share, "published trace"), loads.uniform(run.model))
        )
        panels[panel] = [
            {
                "iteration": int(p["iteration"]),
                "layer": int(p["layer"]),
                "predicted_ms": round(float(seen[row_of[int(p["iteration"])], 0, int(p["layer"])]), 4),
                "measured_ms": float(p["measured_ms"]),
                "naive_ms": round(float(blind[0, 0, 0]), 4),
            }
            for p in mine
        ]
    return panels


def figure_12():
    """Series -> (run, simulation) of pinky's run of 64 GPUs without capacity."""
    bar = next(
        b for b in read_bars(ROOT / "logs" / "published" / "bars.csv")
        if b.cluster == "pinky" and b.group == "64/+inf" and b.config.system == "smartmoe"
    )  # fmt: skip
    cluster, rates, _ = inputs.read_cluster("pinky", ROOT / "scripts")
    sides = {"static": dataclasses.replace(bar, is_dynamic=False), "dynamic": dataclasses.replace(bar, is_dynamic=True)}
    return {series: simulated_run(side, cluster, rates, EXPONENTS, NUM_SPANS) for series, side in sides.items()}


def figure_13(trace: ExpertTrace):
    """Series -> (run, simulation) of one layer along the trace."""
    one = dataclasses.replace(MODEL, num_layers=1)
    counts = trace.counts[:, :1, CURVE_LAYER : CURVE_LAYER + 1, :1].astype(float).transpose(0, 3, 1, 2, 4)
    chosen = loads.Loads(counts / counts.sum(-1, keepdims=True), "published trace")
    found = {}
    for series, interval in CURVES.items():
        run, primitives = setting(CURVE_GPUS, CURVE_BATCH, one)
        if interval:
            run = dataclasses.replace(run, online=OnlineConfig(policy="greedy", interval=interval))
        policy = simulate.Policy(kind="greedy", interval=interval) if interval else simulate.Policy()
        found[series] = run, simulate.simulate(run, run.cluster, primitives, chosen, policy)
    return found


def layer_ms(found: simulate.Simulation) -> np.ndarray:
    """[I] of a run of one layer, with what moving experts took."""
    return (found.layer_forward_ms + found.layer_backward_ms)[:, 0] + found.overhead_ms


# ------------------------------------------------------------------------------------------------------------------ tables


def table_11(panels: dict[str, list[dict]]) -> str:
    lines = ["| panel | points | our MAPE | our R2 | r2 of a line | slope | ms missing | paper's estimate: MAPE | R2 |",
             "|---" * 9 + "|"]  # fmt: skip
    for panel, rows in panels.items():
        real, guess = (np.array([row[key] for row in rows]) for key in ("measured_ms", "predicted_ms"))
        paper = {
            (p["iteration"], p["layer"]): float(p["predicted_ms"])
            for p in read_table("fig11.csv")
            if p["panel"] == panel
        }
        theirs = np.array([paper[str(row["iteration"]), str(row["layer"])] for row in rows])
        spread = np.square(real - real.mean()).sum()
        slope, constant = np.polyfit(guess, real, 1)
        lines.append(
            f"| {panel} | {len(rows)} | {np.abs(guess / real - 1).mean():.0%} | "
            f"{1 - np.square(real - guess).sum() / spread:.2f} | {np.corrcoef(guess, real)[0, 1] ** 2:.2f} | {slope:.2f} | "
            f"{constant:.1f} | {np.abs(theirs / real - 1).mean():.0%} | {1 - np.square(real - theirs).sum() / spread:.2f} |"
        )
    return "\n".join(lines)


def table_12(sides: dict) -> str:
    """Mean ms of an iteration: 32 micro-batches of a layer."""
    lines = [
        "| layer | backward static: published | simulated | speed-up of backward: published | simulated |",
        "|---" * 5 + "|",
    ]
    spans = {
        series: (found.layer_forward_ms.mean(0), found.layer_backward_ms.mean(0))
        for series, (_, found) in sides.items()
    }
    errors = []
    for row in read_table("fig12.csv"):
        layer, real = (
            int(row["layer"]),
            [float(row[f"{side}_backward_s"]) / 200 * 1e3 for side in ("static", "dynamic")],
        )
        mine = [float(spans[side][1][layer]) for side in ("static", "dynamic")]
        errors.append((mine[0] / real[0] - 1, (mine[0] / mine[1]) / (real[0] / real[1]) - 1))
        lines.append(f"| {layer} | {real[0]:.0f} | {mine[0]:.0f} ({errors[-1][0]:+.0%}) | {real[0] / real[1]:.2f} | "
                     f"{mine[0] / mine[1]:.2f} ({errors[-1][1]:+.0%}) |")  # fmt: skip
    means = np.abs(np.array(errors)).mean(0)
    return "\n".join([*lines, f"\nmean |error|: {means[0]:.0%} of the times, {means[1]:.0%} of the speed-ups"])


def table_13(curves: dict) -> str:
    published = {row["interval"]: [] for row in read_table("fig13.csv")}
    for row in read_table("fig13.csv"):
        if int(row["iteration"]) <= 2491:
            published[row["interval"]].append((float(row["static_ms"]), float(row["dynamic_ms"])))
    static = layer_ms(curves["static"][1])
    lines = [
        "| | mean ms: published | simulated | speed-up over static: published | simulated | changes: simulated |",
        "|---" * 6 + "|",
    ]
    real_static = np.mean([s for s, _ in published["100"]])
    lines.append(f"| static | {real_static:.0f} | {static.mean():.0f} ({static.mean() / real_static - 1:+.0%}) | | | |")
    for series, interval in (("every_100", "100"), ("every_10", "10")):
        before, after = np.array(published[interval]).mean(0)
        mine = layer_ms(curves[series][1])
        ratio, real = static.mean() / mine.mean(), before / after
        lines.append(f"| {series} | {after:.0f} | {mine.mean():.0f} ({mine.mean() / after - 1:+.0%}) | {real:.2f} | "
                     f"{ratio:.2f} ({ratio / real - 1:+.0%}) | {len(curves[series][1].events)} |")  # fmt: skip
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------- runs


def write(out: Path, panels, sides, curves, trace: ExpertTrace) -> None:
    """Simulated runs below out/fig11, fig12 and fig13."""
    facts = {"primitives": "described", "entry": "simulate"}
    for panel, rows in panels.items():
        num_gpus, micro_batch = PANELS[panel]
        run, _ = setting(num_gpus, micro_batch)
        bar = {"figure": "fig11", "panel": "inky", "group": f"{num_gpus}/{micro_batch}", "series": "layer"}
        _create(out / "fig11" / f"inky-{panel}", run, bar, {**facts, "device": "cluster inky", "num_ranks": num_gpus})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "fig11" / f"inky-{panel}" / "predictions.jsonl").write_text(text, encoding="utf-8")
        record.set_status(out / "fig11" / f"inky-{panel}", "ok", "simulated")
    for series, (run, found) in sides.items():
        bar = {"figure": "fig12", "panel": "pinky, 64 GPUs", "group": "", "series": series}
        facts_of_run = {"device": "cluster pinky", "primitives": "described"}
        simulate.write_run(out / "fig12" / f"pinky-64-{series}", f"pinky-64-{series}", run, found, [bar], facts_of_run)
    for series, (run, found) in curves.items():
        folder = out / "fig13" / f"inky-8-{series}"
        bar = {"figure": "fig13", "panel": "inky, 8 GPUs", "group": "", "series": series}
        _create(folder, run, bar, {**facts, "device": "cluster inky", "num_ranks": CURVE_GPUS})
        writer = record.RunWriter(folder)
        for row, ms in enumerate(layer_ms(found)):
            writer.metric({"iteration": int(trace.iteration[row]), "step_ms": round(float(ms), 4)})
        for event in found.events:
            writer.event({**event, "iteration": int(trace.iteration[event["iteration"] - 1])})
        writer.close()
        record.set_status(folder, "ok", "simulated")


def _create(folder: Path, run: RunConfig, bar: dict, facts: dict) -> None:
    record.create_run(
        folder, folder.name, to_dict(run), [bar], source="simulated", provenance=record.provenance(**facts)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE.npz", help="the published routing trace")
    parser.add_argument("--out", type=Path, help="write simulated runs below this directory")
    args = parser.parse_args(argv)
    try:
        trace = ExpertTrace.load(args.trace)
    except (OSError, ValueError) as error:
        print(f"--trace: {error}", file=sys.stderr)
        return 2
    if trace.counts.shape[2:] != (24, 4, 32):
        print(f"--trace {args.trace}: not the published trace of 24 layers and 32 experts", file=sys.stderr)
        return 2
    panels, sides, curves = figure_11(trace), figure_12(), figure_13(trace)
    print("\n\n".join([table_11(panels), table_12(sides), table_13(curves)]))
    if args.out:
        write(args.out, panels, sides, curves, trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
