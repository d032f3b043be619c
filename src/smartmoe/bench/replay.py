"""Replay a trace through one MoE layer:  torchrun --nproc-per-node N -m smartmoe.bench.replay RUN_DIR [--layer IDX]

RUN_DIR/run.json has the config; gate.trace is the path of an .npz trace, relative to RUN_DIR or to the current folder.
Each iteration of the trace is one global batch, forward and backward, routed as the trace says. The time of a step is
that of the slowest rank and includes what online placement costs. A placement is decided from the iterations that have
been replayed and serves the next ones: no step runs with a placement made for itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.config import RunConfig, check, from_dict
from smartmoe.layer import MoELayer
from smartmoe.mesh import Mesh, build_mesh
from smartmoe.online import OnlinePlacement
from smartmoe.placement import Placement, max_over_mean
from smartmoe.trace import ExpertTrace
from smartmoe.train import start_world

NUM_WARMUP_STEPS = 2  # before the first step that is recorded: connections, allocations


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smartmoe.bench.replay", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help='directory with run.json, whose config has gate.kind = "trace"')
    parser.add_argument(
        "--layer", type=int, default=None, help="layer of the trace to replay (default: the middle one)"
    )
    args = parser.parse_args(argv)
    world_rank = int(os.environ.get("RANK", "0"))
    try:
        run = record.read_run(args.run_dir)
        config = from_dict(RunConfig, run["config"], f"{args.run_dir}/run.json: config")
        config, trace = open_trace(check(config, str(args.run_dir)), args.run_dir)
        device = start_world(config)
        mesh = build_mesh(config.plan, device)
        num_layers = trace.counts.shape[2]
        layer_idx = num_layers // 2 if args.layer is None else args.layer
        if not 0 <= layer_idx < num_layers:
            raise ValueError(f"--layer {layer_idx}: the trace has layers 0 .. {num_layers - 1}")
        replay(config, trace, layer_idx, mesh, args.run_dir)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except Exception as error:
        is_oom = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        record.write_error(args.run_dir, world_rank, error, is_oom)
        print(f"rank {world_rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may wait in a collective for this one


def open_trace(config: RunConfig, run_dir: Path) -> tuple[RunConfig, ExpertTrace]:
    """The trace of `config`, and `config` with the trace's real path and online.interval in steps of the replay.

    Raises ValueError when the config is of another kind of run, the trace does not fit the model, or its iterations
    are too far apart for the interval.
    """
    if config.gate.kind != "trace" or config.plan.pp != 1:
        raise ValueError('a replay needs gate.kind = "trace" and plan.pp = 1: it is about one layer')
    path = run_dir / config.gate.trace
    path = path if path.exists() else Path(config.gate.trace)
    trace = ExpertTrace.load(path)
    if trace.counts.shape[4] != config.model.num_experts:
        raise ValueError(f"{path}: {trace.counts.shape[4]} experts, but model.num_experts = {config.model.num_experts}")
    stride = int(np.median(np.diff(trace.iteration))) if len(trace.iteration) > 1 else 1
    interval = config.online.interval
    if config.online.policy != "static" and interval % stride:
        raise ValueError(f"online.interval = {interval} is no multiple of {stride}, the iterations' step in {path}")
    online = dataclasses.replace(config.online, interval=max(1, interval // stride))
    gate = dataclasses.replace(config.gate, trace=str(path))
    return dataclasses.replace(config, gate=gate, online=online), trace


def replay(config: RunConfig, trace: ExpertTrace, layer_idx: int, mesh: Mesh, run_dir: Path) -> None:
    """Run the iterations of `trace`, at most workload.iterations, and write the run's files. Collective."""
    bench = LayerBench(config, layer_idx, mesh)
    writer = record.RunWriter(run_dir) if mesh.world_rank == 0 else None
    num_steps = min(config.workload.iterations, len(trace.iteration))
    load_IE = trace.counts[:num_steps, :, layer_idx].sum((1, 2), dtype=np.int64)
    for step in range(num_steps):
        iteration = int(trace.iteration[step])
        load = max_over_mean(load_IE[step], bench.layer.placement)
        step_ms, events = bench.step(step)
        if writer:
            writer.metric({"iteration": iteration, "step_ms": round(step_ms, 4), "load_max_over_mean": round(load, 4)})
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
        self.layer = MoELayer(
            config, layer_idx=layer_idx, placement=Placement.identity(model.num_experts, plan.ep),
            ep_group=mesh.ep_group, stage_group=mesh.stage_group, dtype=dtype, device=mesh.device,
        )  # fmt: skip
        width = model.seq_len // plan.tp
        generator = torch.Generator().manual_seed(work.seed + mesh.stage_rank)
        shape = (2, work.micro_batch_size, width, model.hidden_size)
        self.x_BTD, self.grad_BTD = torch.randn(shape, generator=generator).to(mesh.device, dtype)
        # What an optimizer keeps beside the weights moves with them: fp32 masters (of 16-bit weights) and two moments.
        extra = 2 if dtype == torch.float32 else 3
        weights = list(self.layer.experts.parameters())
        self.state = [w.data for w in weights] + [
            torch.zeros_like(w, dtype=torch.float32) for w in weights for _ in range(extra)
        ]
        for _ in range(NUM_WARMUP_STEPS):
            self._forward_backward(0)
        self.online = OnlinePlacement(
            [self.layer],
            config.online,
            ep_group=mesh.ep_group,
            stage_group=mesh.stage_group,
            state_of=lambda _: self.state,
        )

    def step(self, step: int) -> tuple[float, list[dict]]:
        """Forward, backward and placement of one iteration: (ms of the slowest rank, events). Collective."""
        self._synchronise()
        if self.mesh.world_group is not None:
            dist.barrier()
        start = time.perf_counter()
        self._forward_backward(step)
        events = self.online.after_step(step + 1)
        self._synchronise()
        worst = torch.tensor([(time.perf_counter() - start) * 1e3], dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item(), events

    def _forward_backward(self, step: int) -> None:
        for micro in range(self.config.num_micro_batches):
            x_BTD = self.x_BTD.detach().requires_grad_()
            y_BTD, _ = self.layer(x_BTD, self._token_id(step, micro))
            y_BTD.backward(self.grad_BTD)
        for param in self.layer.parameters():
            param.grad = None

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
