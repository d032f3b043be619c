"""Predicted against measured time of a run's MoE layers:  torchrun --nproc-per-node N -m smartmoe.bench.layer_accuracy RUN_DIR

RUN_DIR/run.json has the config: experts over all ranks, routed by the trace that gate.trace names, relative to RUN_DIR or to
the current folder. The ranks first measure the primitives of this layer on this cluster (profile.json), then each layer,
forward and backward of one micro-batch, in workload.iterations iterations of the trace, evenly spread. Nothing of the trace
or of these times is in the profile: every point is held out. All points are measured in turn without a pause, in an order
drawn anew for each repetition, so that what drifts is in none of them alone; measured is a point's median, of the slowest
rank. On a GPU it is between events of the device, which is busy with other work before each (bench.busy): so its clock is that
of training, and the host is ahead as there: launches cost time only where the layer makes the host wait. The direct
dispatcher has room for any routing: as in training behind its first calls, none waits. Beside it stands what uniform loads say.

RUN_DIR gets profile.json, metrics.jsonl (all layers of an iteration), predictions.jsonl, as figures read it, with all
repetitions of each point, and accuracy.json: R2 and MAPE over all points, the scatter of a measured point, from those
repetitions, and the R2 of who knew the true times: no prediction can be expected to reach more. With --profile a profile made
before serves in place of the run's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from smartmoe import record
from smartmoe.bench.busy import WARM_MS, BusyWork, lead_ms
from smartmoe.bench.measure import World, between, describe_failure, now, start_world
from smartmoe.bench.profile_layer import profile_layer
from smartmoe.bench.replay import open_trace
from smartmoe.config import RunConfig, check, from_dict
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.layer import MoELayer
from smartmoe.parallel.data import GradientBuffers
from smartmoe.planner import inputs, loads
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.primitives import Primitives, Profile
from smartmoe.slow_links import slow_links
from smartmoe.trace import ExpertTrace


class LayerSteps:
    """One MoE layer of a trace on this rank, and a step of it. xs: [2, B, T, D] what goes in, forward and backward."""

    def __init__(self, config: RunConfig, layer_idx: int, world: World, xs: torch.Tensor):
        self.config, self.world = config, world
        dtype = getattr(torch, config.workload.dtype)
        self.layer = MoELayer(
            config, layer_idx=layer_idx, ep_group=world.group, stage_group=world.group, dtype=dtype, device=world.device
        )
        self._buffers = GradientBuffers(list(self.layer.named_parameters()), {})  # sums of gradients, as the trainer has them
        self.x_BTD, self.grad_BTD = xs

    def token_id(self, row: int) -> torch.Tensor:
        """[B, T] of this rank's micro-batch in the iteration in `row` of the trace."""
        work, seq_len = self.config.workload, self.config.model.seq_len
        first = row * work.global_batch_size + self.world.ep_rank * work.micro_batch_size
        sample_B = torch.arange(first, first + work.micro_batch_size, device=self.world.device)
        return sample_B[:, None] * seq_len + torch.arange(seq_len, device=self.world.device)

    def step(self, token_id_BT: torch.Tensor) -> None:
        """Forward and backward. Collective."""
        y_BTD, _ = self.layer(self.x_BTD.detach().requires_grad_(), token_id_BT)
        y_BTD.backward(self.grad_BTD)


def run(run_dir: Path, world: World, repeat: int = 5, profile: Path | None = None) -> list[dict]:
    """Profile, measure, predict; rank 0 writes, and returns the rows of predictions.jsonl. Collective.

    Raises ValueError for a run of another kind, or when the trace or the profile does not fit it.
    """
    config, trace = open_run(run_dir, world)
    known = Profile.load(profile) if profile else None
    if known and known.dtype != config.workload.dtype:
        raise ValueError(f"{profile} was measured in {known.dtype}, the run is in {config.workload.dtype}")
    if known:
        inputs.check_links(known, config.cluster, profile)
    with slow_links(config.cluster.slow_links_gbytes_per_s):
        known = known or profile_layer(config, world, run_dir / "profile.json")
        places = choose_iterations(trace, config.workload.iterations)
        writer = record.RunWriter(run_dir) if world.ep_rank == 0 else None
        rows, rounds = [], []
        for number, round_IL in enumerate(measure(config, trace, places, world, repeat), 1):
            rounds.append(round_IL)
            measured_IL = np.median(rounds, axis=0)
            if writer:  # now already: what ends this run takes no repetition with it
                rows = predict(config, known, trace, places, np.stack(rounds, -1))
                text = "".join(json.dumps(row) + "\n" for row in rows)
                Path(run_dir, "predictions.jsonl").write_text(text, encoding="utf-8")
                record.write_json(run_dir / "accuracy.json", statistics(rows))
                words = f"{number} of {repeat} repetitions, {measured_IL.mean():.3f} ms a layer: {format_statistics(rows)}"
                writer.log(words)
                print(words, flush=True)
    if writer:
        for number, (row, ms_L) in enumerate(zip(places, measured_IL, strict=True), 1):
            iteration, step_ms = int(trace.iteration[row]), round(float(ms_L.sum()), 4)
            writer.metric({"iteration": number, "trace_iteration": iteration, "step_ms": step_ms})
        writer.close()
    return rows


def open_run(run_dir: Path, world: World) -> tuple[RunConfig, ExpertTrace]:
    """The trace and the config of a run, with the trace's real path and layers, the dispatcher that "auto" takes here, and
    one micro-batch an iteration. Collective."""
    config = from_dict(RunConfig, record.read_run(run_dir)["config"], f"{run_dir}/run.json: config")
    config, trace = open_trace(check(config, str(run_dir)), run_dir)
    plan, work, layer = config.plan, config.workload, config.layer
    if not plan.ep == plan.dp == plan.world_size == world.num_ranks or config.online.policy != "static":
        raise ValueError(
            f"{run_dir}: layers are timed with experts in place over all ranks: plan {plan.describe()} on "
            f'{world.num_ranks} ranks, online.policy = "{config.online.policy}"'
        )
    if layer.dispatcher == "auto":
        slow = config.cluster.slow_links_gbytes_per_s
        found = "basic" if slow or why_unavailable(world.group, over_nvlink=True) else "direct"
        layer = dataclasses.replace(layer, dispatcher=found)
    layer = dataclasses.replace(layer, row_factor=float(plan.ep))
    work = dataclasses.replace(work, global_batch_size=work.micro_batch_size * plan.dp)
    model = dataclasses.replace(config.model, num_layers=trace.counts.shape[2], moe_every=1)
    return dataclasses.replace(config, model=model, workload=work, layer=layer), trace


def choose_iterations(trace: ExpertTrace, num_iterations: int) -> list[int]:
    """Rows of the trace, evenly over all of it."""
    last = len(trace.iteration) - 1
    return np.unique(np.linspace(0, last, min(num_iterations, last + 1)).round().astype(int)).tolist()


def measure(config: RunConfig, trace: ExpertTrace, places: list[int], world: World, repeat: int) -> Iterator[np.ndarray]:
    """After each of the repetitions its [iterations, layers] ms. Collective."""
    busy = BusyWork(world, getattr(torch, config.workload.dtype))
    model, work = config.model, config.workload
    shape = (2, work.micro_batch_size, model.seq_len, model.hidden_size)
    xs = torch.randn(shape, generator=torch.Generator().manual_seed(1 + world.ep_rank))
    xs = xs.to(world.device, getattr(torch, work.dtype))
    layers = [LayerSteps(config, layer_idx, world, xs) for layer_idx in range(model.num_layers)]
    lead = max(_lead_ms(world, layer, layer.token_id(places[0])) for layer in layers)
    draw = np.random.default_rng(0)
    for _ in range(repeat):
        points = _one_round(world, busy, layers, places, lead, draw.permutation(len(places) * len(layers)))
        yield points.reshape(len(places), len(layers))


def _lead_ms(world: World, layer: LayerSteps, token_id_BT: torch.Tensor) -> float:
    """How long the device has to be busy before a step of this layer, the longest of all ranks. Collective."""
    took = []
    for _ in range(4):  # the first makes connections and allocations
        world.synchronize()
        start = time.perf_counter()
        layer.step(token_id_BT)
        launched = time.perf_counter() - start
        world.synchronize()
        took.append((1e3 * launched, 1e3 * (time.perf_counter() - start)))
    return world.largest(lead_ms(*np.median(took[1:], axis=0).tolist()))


def _one_round(world: World, busy: BusyWork, layers: list[LayerSteps], places: list[int], lead: float, order) -> np.ndarray:
    """[points] ms of the slowest rank, each point once in `order`; points count layers first. Collective."""
    marks = [None] * len(order)
    busy.launch(WARM_MS)
    for point in order:
        place, layer_idx = divmod(int(point), len(layers))
        layer = layers[layer_idx]
        token_id_BT = layer.token_id(places[place])
        busy.launch(lead)
        world.align()  # on the device: the host stays ahead
        start = now(world)
        layer.step(token_id_BT)
        marks[point] = (start, now(world))
    world.synchronize()
    mine = [between(*pair) for pair in marks]
    return np.array(world.share(mine)).max(0)


def predict(
    config: RunConfig, profile: Profile, trace: ExpertTrace, places: list[int], measured_ILP: np.ndarray
) -> list[dict]:
    """Rows of predictions.jsonl, of P repetitions. What crosses nodes was profiled as it is, so to the cost model the world is
    one node."""
    cluster = dataclasses.replace(config.cluster, num_nodes=1, ranks_per_node=config.plan.world_size)
    seen = loads.from_trace(trace, config.model).mean_over_micro_batches()
    primitives, micro_batch = Primitives.fit(profile), config.workload.micro_batch_size
    predicted, blind = (
        CostModel(config, cluster, primitives, chosen).layer_ms(config.plan, micro_batch)
        for chosen in (seen, loads.uniform(config.model))
    )
    return [
        {
            "iteration": int(trace.iteration[row]),
            "layer": layer,
            "predicted_ms": round(float(predicted[row, 0, layer]), 5),
            "measured_ms": round(float(np.median(ms_P)), 5),
            "naive_ms": round(float(blind[0, 0, layer]), 5),
            "repeats_ms": ms_P.round(4).tolist(),
        }
        for row, measured_LP in zip(places, measured_ILP, strict=True)
        for layer, ms_P in enumerate(measured_LP)
    ]


def statistics(rows: list[dict]) -> dict[str, float]:
    """R2 of the prediction itself (not of a line through it) and MAPE, with and without looking at the loads; "scatter", the
    relative standard deviation of measured points from the difference of their even and odd repetitions, and "ceiling_r2"."""
    real = np.array([row["measured_ms"] for row in rows])
    found = {"num": len(rows)}
    for name, key in (("", "predicted_ms"), ("naive_", "naive_ms")):
        guess = np.array([row[key] for row in rows])
        spread = np.square(real - real.mean()).sum()
        found[f"{name}r2"] = float(1 - np.square(real - guess).sum() / spread) if spread else 0.0
        found[f"{name}mape"] = float(np.abs(guess / real - 1).mean())
    repeats_NP = np.array([row["repeats_ms"] for row in rows])
    num = repeats_NP.shape[1]
    if num > 1:
        gap_N = np.median(repeats_NP[:, ::2], axis=1) - np.median(repeats_NP[:, 1::2], axis=1)
        noise = float(np.square(gap_N).mean()) * (num // 2) * (num - num // 2) / num**2  # of medians of all repetitions
        found["scatter"] = noise**0.5 / float(real.mean())
        found["ceiling_r2"] = 1 - noise / float(real.var()) if spread else 0.0
    return found


def format_statistics(rows: list[dict]) -> str:
    s = statistics(rows)
    ceiling = f" of {s['ceiling_r2']:.3f}, points scatter by {s['scatter']:.1%}" if "ceiling_r2" in s else ""
    return (
        f"{s['num']} points: R2 {s['r2']:.3f}{ceiling}, MAPE {s['mape']:.1%}; "
        f"uniform loads: R2 {s['naive_r2']:.3f}, MAPE {s['naive_mape']:.1%}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.layer_accuracy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a directory with run.json")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each point; default: 5")
    parser.add_argument("--profile", type=Path, metavar="FILE.json", help="what `smartmoe profile` wrote")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat}: at least 1")
    with describe_failure(args.run_dir):
        device = record.read_run(args.run_dir)["config"].get("cluster", {}).get("device", "cpu")
        # within the world too: leaving it waits for the other ranks
        with start_world(device) as world, describe_failure(args.run_dir):
            run(args.run_dir, world, args.repeat, args.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
