"""Replay a trace through one MoE layer:  torchrun --nproc-per-node N -m smartmoe.bench.replay [RUN_DIR] [options]

Without RUN_DIR, ways of placing experts are compared on one layer of a given size (see bench/replay_compare.py).

With RUN_DIR one run is replayed for its files: RUN_DIR/run.json has the config; gate.trace names a trace, relative to
RUN_DIR or to the current folder. Each iteration of the trace is one global batch, forward and backward, routed as the
trace says. The time of a step is that of the slowest rank and includes what online placement costs. A placement is decided
from the iterations that have been replayed and serves the next ones: no step runs with a placement made for itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.bench.measure import describe_failure, run_in_world
from smartmoe.bench.replay_compare import CASES, MODES, compare, shape_of
from smartmoe.bench.replay_layer import ReplayedLayer
from smartmoe.bench.report import add_options, at_least, checked
from smartmoe.config import DISPATCHERS, ParallelPlan, RunConfig, check, from_dict
from smartmoe.layer import MoELayer
from smartmoe.load_map import fullest_over_mean
from smartmoe.mesh import Mesh, shared_mesh
from smartmoe.placement import Placement
from smartmoe.slow_links import slow_links
from smartmoe.trace import ExpertTrace, read_trace
from smartmoe.train import start_world

NUM_WARMUP_STEPS = 2  # before the first step that is recorded: connections, allocations


def main(argv: list[str] | None = None, meshes: dict[ParallelPlan, Mesh] | None = None) -> int:
    """meshes: see `smartmoe.train.main`."""
    args = parse_args(argv)
    return run_in_world(args, compare) if args.run_dir is None else _replay_run(args, meshes)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:14s} {mode.about}" for name, mode in MODES.items())
    cases = "\n".join(f"  {name:14s} {about}" for name, about in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.replay", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog=f"modes:\n{listed}\n\ncases:\n{cases}\n\nexamples:\n"
        "  torchrun --nproc-per-node 2 -m smartmoe.bench.replay --shapes S1 S2 --trace trace.npz --json out.json\n"
        "  torchrun --nproc-per-node 2 -m smartmoe.bench.replay --shapes S2 --trace trace.npz --iteration 991 --layer 6\n"
        "  torchrun --nproc-per-node 2 -m smartmoe.bench.replay --device cpu --shapes 256,64,128,8,2 "
        "--trace synthetic:zipf-strong --limit 5\n",
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR",
                        help='replay one run: a directory with run.json, whose config has gate.kind = "trace"')  # fmt: skip
    parser.add_argument("--layer", type=int, default=None, help="layer of the trace (default: RUN_DIR's middle, else 0)")
    group = parser.add_argument_group("comparing modes (without RUN_DIR)")
    group.add_argument("--trace", metavar="TRACE", help=".npz, a folder of text tables, or synthetic:KIND")
    group.add_argument("--shapes", nargs="+", type=checked(shape_of), metavar="SHAPE",
                       default=[shape_of("S1"), shape_of("S2")],
                       help="names of bench.layer, T,D,F,E,K[,activation], or a run's .toml: its micro-batch")  # fmt: skip
    group.add_argument("--cases", nargs="+", choices=CASES, default=["trace"], metavar="CASE", help="as below")
    group.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES], metavar="MODE", help="default: all")
    group.add_argument("--dispatcher", choices=DISPATCHERS, default="auto", help="of all modes but shadowing")
    group.add_argument("--every", type=at_least(1), default=1, metavar="N", help="time every N-th recorded iteration")
    group.add_argument("--iteration", type=int, metavar="I", help="time this iteration only")
    group.add_argument("--limit", type=at_least(1), metavar="N", help="time N iterations at most")
    group.add_argument("--repeat", type=at_least(2), default=5, metavar="N", help="steps of each mode in an iteration")
    group.add_argument("--micro-batches", type=at_least(1), default=1, metavar="M", help="in a step")
    group.add_argument("--replica-slots", type=at_least(1), default=2, metavar="G", help="room for copies on each rank")
    group.add_argument("--lead-cycles", type=at_least(0), default=8_000_000, metavar="C",
                       help="cycles that a GPU idles before each step, so that the host is ahead as in training")  # fmt: skip
    add_options(parser, timing=False)
    args = parser.parse_args(argv)
    if args.run_dir is None:
        args.layer = args.layer or 0
    return args


def _replay_run(args: argparse.Namespace, meshes: dict[ParallelPlan, Mesh] | None) -> int:
    with describe_failure(args.run_dir):
        run = record.read_run(args.run_dir)
        config = from_dict(RunConfig, run["config"], f"{args.run_dir}/run.json: config")
        config, trace = open_trace(check(config, str(args.run_dir)), args.run_dir)
        device = start_world(config)
        mesh = shared_mesh(meshes, config.plan, device)
        num_layers = trace.counts.shape[2]
        layer_idx = num_layers // 2 if args.layer is None else args.layer
        if not 0 <= layer_idx < num_layers:
            raise ValueError(f"--layer {layer_idx}: the trace has layers 0 .. {num_layers - 1}")
        with slow_links(config.cluster.slow_links_gbytes_per_s):
            replay(config, trace, layer_idx, mesh, args.run_dir)
        if meshes is None and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    return 0


def open_trace(config: RunConfig, run_dir: Path) -> tuple[RunConfig, ExpertTrace]:
    """The trace of `config`, and `config` with the trace's real path and online.interval in steps of the replay.

    Raises ValueError when the config is of another kind of run, the trace does not fit the model, or its iterations
    are too far apart for the interval.
    """
    if config.gate.kind != "trace" or config.plan.pp != 1:
        raise ValueError('a replay needs gate.kind = "trace" and plan.pp = 1: it is about one layer')
    beside = run_dir / config.gate.trace
    path = str(beside) if beside.exists() else config.gate.trace
    trace = read_trace(path, experts=config.model.num_experts, layers=config.model.num_layers)
    if trace.counts.shape[4] != config.model.num_experts:
        raise ValueError(f"{path}: {trace.counts.shape[4]} experts, but model.num_experts = {config.model.num_experts}")
    stride = int(np.median(np.diff(trace.iteration))) if len(trace.iteration) > 1 else 1
    interval = config.online.interval
    if config.online.policy != "static" and interval % stride:
        raise ValueError(f"online.interval = {interval} is no multiple of {stride}, the iterations' step in {path}")
    online = dataclasses.replace(config.online, interval=max(1, interval // stride))
    gate = dataclasses.replace(config.gate, trace=path)
    return dataclasses.replace(config, gate=gate, online=online), trace


def replay(config: RunConfig, trace: ExpertTrace, layer_idx: int, mesh: Mesh, run_dir: Path) -> None:
    """Run the iterations of `trace`, at most workload.iterations, and write the run's files. Collective."""
    bench = LayerBench(config, layer_idx, mesh)
    writer = record.RunWriter(run_dir) if mesh.world_rank == 0 else None
    num_steps = min(config.workload.iterations, len(trace.iteration))
    load_IE = trace.counts[:num_steps, :, layer_idx].sum((1, 2), dtype=np.int64)
    for step in range(num_steps):
        iteration = int(trace.iteration[step])
        load_W = bench.rank_load(load_IE[step])
        step_ms, events = bench.step(step)
        if writer:
            load = round(fullest_over_mean(load_W), 4)
            writer.metric({"iteration": iteration, "step_ms": round(step_ms, 4), "load_max_over_mean": load})
            writer.load({"iteration": iteration, "layer": layer_idx, "expert_load": load_IE[step].tolist(),
                         "rank_load": np.round(load_W, 2).tolist()})  # fmt: skip
            for event in events:
                writer.event({**event, "iteration": iteration})
            if step % 10 == 0 or step + 1 == num_steps:
                writer.log(
                    f"[{step + 1}/{num_steps}] iteration {iteration}  {step_ms:.2f} ms  max/mean load {load:.2f}"
                )
    if writer:
        writer.close()


class LayerBench:
    """One MoE layer with its whole training state, and the tokens that go through it."""

    def __init__(self, config: RunConfig, layer_idx: int, mesh: Mesh):
        self.config, self.mesh = config, mesh
        model, work, plan = config.model, config.workload, config.plan
        dtype = getattr(torch, work.dtype)
        layer = MoELayer(
            config, layer_idx=layer_idx, placement=Placement.identity(model.num_experts, plan.ep),
            ep_group=mesh.ep_group, stage_group=mesh.stage_group, dtype=dtype, device=mesh.device,
        )  # fmt: skip
        width = model.seq_len // plan.tp
        generator = torch.Generator().manual_seed(work.seed + mesh.stage_rank)
        shape = (2, work.micro_batch_size, width, model.hidden_size)
        self.x_BTD, self.grad_BTD = torch.randn(shape, generator=generator).to(mesh.device, dtype)
        self._replayed = ReplayedLayer(
            layer, mesh.ep_group, mesh.stage_group, config.online, config.num_micro_batches
        )
        for _ in range(NUM_WARMUP_STEPS):
            self._run(0)
        self._replayed.start_deciding()

    def step(self, step: int) -> tuple[float, list[dict]]:
        """Forward, backward and placement of one iteration: (ms of the slowest rank, events). Collective."""
        self._synchronise()
        if self.mesh.world_group is not None:
            dist.barrier()
        start = time.perf_counter()
        events = self._run(step)
        self._synchronise()
        worst = torch.tensor([(time.perf_counter() - start) * 1e3], dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item(), events

    def rank_load(self, load_E: np.ndarray) -> np.ndarray:
        """[W] token copies that each rank of the expert group computes, of load_E [E] spread evenly over the sources."""
        num_ranks = self.config.plan.ep
        share_E, rest_E = np.divmod(load_E, num_ranks)
        return self._replayed.rank_load((share_E + (np.arange(num_ranks)[:, None] < rest_E))[None])

    def _run(self, step: int) -> list[dict]:
        self._replayed.begin_step()
        for micro in range(self.config.num_micro_batches):
            self._replayed.work(self.x_BTD, self._token_id(step, micro), self.grad_BTD)
        self._replayed.end_step()
        self._replayed.prepare(step + 1)
        events = self._replayed.after_step(step + 1)
        self._replayed.drop_gradients()
        return events

    def _token_id(self, step: int, micro: int) -> torch.Tensor:
        """Global token ids of this rank's part of a micro-batch, [B, T] int64."""
        work, plan, seq_len = self.config.workload, self.config.plan, self.config.model.seq_len
        first = step * work.global_batch_size + (micro * plan.dp + self.mesh.dp_rank) * work.micro_batch_size
        sample_B = torch.arange(first, first + work.micro_batch_size, device=self.mesh.device)
        width = seq_len // plan.tp
        position_T = torch.arange(self.mesh.tp_rank * width, (self.mesh.tp_rank + 1) * width, device=self.mesh.device)
        return sample_B[:, None] * seq_len + position_T

    def _synchronise(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
