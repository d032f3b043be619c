"""One rank of a benchmark run: `python -m smartmoe.hosts.deepspeed_alpa.bench NUM_GPUS [options]` under any launcher that
sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. The options are those of run_deepspeed_benchmark.sh.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import sys
import time
from importlib.metadata import version

import deepspeed
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.data import TokenDataset, load_tokens
from smartmoe.hosts.deepspeed.engine import init_world, make_engine, parameter_groups
from smartmoe.hosts.deepspeed.text import micro_batch
from smartmoe.hosts.deepspeed_alpa import options, report
from smartmoe.hosts.deepspeed_alpa.engine import engine_config, make_optimizer
from smartmoe.hosts.deepspeed_alpa.model import MoETransformer
from smartmoe.hosts.deepspeed_alpa.moe import build_moe, check_waits_for_nothing, layer_config
from smartmoe.hosts.deepspeed_alpa.suites import Case
from smartmoe.ops.extension import choose_path


def build(args: argparse.Namespace, case: Case, device: torch.device):
    """The DeepSpeed engine of a case with the back end args.backend. Collective over the world."""
    config = layer_config(
        case, dispatcher=args.dispatcher, activation=args.activation, seed=args.seed, ranks_per_node=args.gpus_per_node
    )
    model = MoETransformer(
        config.model,
        lambda idx: build_moe(args.backend, config, idx, sample=args.second == "gumbel", device=device),
        dropout=args.dropout,
        balance_weight=args.balance_weight,
        recompute=not args.no_recompute,
        seed=args.seed,
    ).to(device)
    optimizer = make_optimizer(args.optimizer, parameter_groups(model))
    engine = make_engine(model, optimizer, engine_config(case, args.zero, args.precision))
    # other noise on every rank, the same for both back ends
    torch.manual_seed(args.seed + dist.get_rank())
    if args.backend in options.captured_backends(args):
        if device.type == "cuda":
            check_waits_for_nothing(model)
        shape = case.micro_batch_size, case.model.seq_len
        token_id_BT = torch.arange(shape[0] * shape[1], device=device).view(shape)
        engine.module.capture(token_id_BT % case.model.vocab_size, token_id_BT)
    return engine


def _samples(case: Case, iteration: int, micro_step: int) -> range:
    """The samples of this rank in one micro-step: each of the text's once an epoch."""
    first = iteration * case.batch_size + (micro_step * case.num_gpus + dist.get_rank()) * case.micro_batch_size
    return range(first, first + case.micro_batch_size)


def run_iteration(engine, tokens: TokenDataset, case: Case, iteration: int, device) -> tuple[float, float]:
    """(loss, seconds): the mean loss over micro-batches and ranks, and the time of the slowest rank. Batches are made
    before the clock starts. Collective; synchronises with the host."""
    steps, seq_len = range(case.num_micro_batches), case.model.seq_len
    batches = [micro_batch(tokens, _samples(case, iteration, step), seq_len, device) for step in steps]
    _synchronise(device)
    dist.barrier()
    start, total = time.perf_counter(), torch.zeros((), device=device)
    for batch in batches:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    _synchronise(device)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return total.item() / (case.num_micro_batches * case.num_gpus), seconds.item()


def measure(args: argparse.Namespace, case: Case, device: torch.device) -> dict:
    """Build, warm up and measure one case; the result is that of every rank. Collective over the world."""
    if dist.get_world_size() != case.num_gpus:
        raise ValueError(f"{case.num_gpus} ranks are asked for, but {dist.get_world_size()} were started")
    tokens, before = _shared_tokens(args, case), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of others in this process
    engine = build(args, case, device)
    losses, seconds = [], []
    for iteration in range(args.warmup + args.iterations):
        loss, duration = run_iteration(engine, tokens, case, iteration, device)
        losses.append(loss)
        if iteration >= args.warmup:
            seconds.append(duration)
        if dist.get_rank() == 0:
            print(f"iteration {iteration + 1}: loss {loss:.5f}, {duration:.3f} s", flush=True)
    engine.module.release()
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0)
    return {
        "backend": args.backend,
        "captured": args.backend in options.captured_backends(args),
        "case": dataclasses.asdict(case),
        "options": {name: value for name, value in vars(args).items() if name != "hostfile"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "summary": report.summarise(case, seconds),
        "seconds": seconds,
        "losses": losses,
        "peak_memory_bytes": peaks,
        "versions": {
            "commit": record.provenance()["git"],
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "numpy")},
            "cuda": torch.version.cuda,
        },
    }


def check_capture(args: argparse.Namespace, capability: tuple[int, int]) -> None:
    """Raise ValueError when SmartMoE's experts are to be captured and a GPU of this compute capability computes them one by
    one."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    if args.backend == "smartmoe" and "smartmoe" in options.captured_backends(args):
        path = choose_path(capability, dtype, False)
        if path.gemm == "loop":
            raise ValueError(options.one_by_one(path.reason))


def _shared_tokens(args, case: Case) -> TokenDataset:
    """The tokens; one rank of each node makes the cache, the others find it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        load_tokens(args.data, case.model.vocab_size, args.cache, seed=args.seed)
    dist.barrier()
    return load_tokens(args.data, case.model.vocab_size, args.cache, seed=args.seed)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    args, case = options.parse(argv)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        if device.type == "cuda":
            check_capture(args, torch.cuda.get_device_capability(device))
            torch.cuda.set_device(device)
        init_world("nccl" if device.type == "cuda" else "gloo")
        result = measure(args, case, device)
        if dist.get_rank() == 0:
            path = report.write(result, args.out)
            print(f"{report.describe(result)}\n  {path}", flush=True)
    except ValueError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr)
        return 2
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
