"""Real training with and without experts that move, copies and sharded state: do the losses stay the same?

    torchrun --nproc-per-node 2 -m smartmoe.bench.loss_parity --iterations 200 --json out.json

Every mode trains the same model from the same weights on the same text. The first is the reference; each other one's
deviation is |loss - reference| / reference in an iteration, and must stay below the tolerance of its precision. Rounding
alone makes runs drift apart, since routers turn small differences into other choices: mode "noise" shows how far, from
weights changed by one part in 10^7. With fp32 on CPUs, "again" and "moved" differ in no bit. Ends with 1 when a mode is
beyond the tolerance, or the reference cannot be trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smartmoe.bench.measure import LeftAloneError, World, run_in_world
from smartmoe.bench.report import Report, add_options, at_least, checked, dtype_of
from smartmoe.config import (
    DISPATCHERS,
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
    load,
    to_dict,
)
from smartmoe.data import TokenDataset, load_tokens
from smartmoe.mesh import build_mesh
from smartmoe.placement import EMPTY, Placement, Replicas
from smartmoe.trainer import Trainer

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}  # relative, of an iteration's loss, in 200 of them
NOISE = 1e-7
NUM_LAST = 20
SMALL = ModelConfig(num_layers=4, hidden_size=32, ffn_size=64, num_heads=4, seq_len=16, vocab_size=320)
LARGE = ModelConfig(
    num_layers=4, hidden_size=512, ffn_size=1024, num_heads=8, seq_len=512, vocab_size=2048, num_experts=16
)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What is changed about the reference run: its configuration, and what happens before an iteration (from 0)."""

    about: str
    online: OnlineConfig = OnlineConfig()
    zero: int = 0
    before: Callable[[Trainer, int, argparse.Namespace], None] = lambda trainer, iteration, args: None


def add_noise(trainer: Trainer, iteration: int, args: argparse.Namespace) -> None:
    """Change every weight a little, before the first iteration."""
    if iteration:
        return
    generator = torch.Generator().manual_seed(args.seed)
    for master in trainer.optimizer.masters:
        noise = torch.randn(master.shape, generator=generator).to(master.device)
        master.mul_(1 + NOISE * noise)
    trainer.optimizer.refresh_params()


def move_all(trainer: Trainer, iteration: int, args: argparse.Namespace) -> None:
    """Other owners for all experts, drawn at random."""
    if iteration == 0 or iteration % args.interval:
        return
    rng, targets = np.random.default_rng([args.seed, iteration]), []
    for layer in trainer.layers.values():
        old = layer.placement
        targets.append((layer, Placement(old.num_ranks, tuple(rng.permutation(old.expert_of_slot).tolist()))))
    trainer.online.move(targets)


def copy_some(trainer: Trainer, iteration: int, args: argparse.Namespace) -> None:
    """Other replicas, with other shares of their experts' tokens, drawn at random."""
    if iteration % args.interval:
        return
    rng = np.random.default_rng([args.seed, iteration])
    for layer in trainer.layers.values():
        layer.set_replicas(random_replicas(layer.placement, layer.experts.num_replicas, rng))


def random_replicas(placement: Placement, num_slots: int, rng: np.random.Generator) -> Replicas:
    """A copy of another rank's expert in every replica slot for which there is one, and random shares of all hosts."""
    owner_E = placement.rank_of_expert()
    hosts_EW, slots = np.eye(placement.num_ranks)[owner_E], []
    for ep_rank in range(placement.num_ranks):
        chosen = rng.permutation(np.flatnonzero(owner_E != ep_rank))[:num_slots].tolist()
        hosts_EW[chosen, ep_rank] = 1
        slots += chosen + [EMPTY] * (num_slots - len(chosen))
    share_SEW = rng.random((placement.num_ranks, *hosts_EW.shape)) * hosts_EW
    return Replicas(tuple(slots), share_SEW / share_SEW.sum(2, keepdims=True))


MODES = {
    "plain": Mode(about="nothing moves: the reference"),
    "again": Mode(about="the same once more"),
    "noise": Mode(about="weights changed by one part in 10^7", before=add_noise),
    "moved": Mode(about="random owners of all experts every --interval iterations, with all their state", before=move_all),
    "copied": Mode(about="random copies every --interval iterations, kept for whole steps", before=copy_some,
                   online=OnlineConfig(replicate="history")),
    "copied_early": Mode(about="the same, and their gradients return during the backward pass", before=copy_some,
                         online=OnlineConfig(replicate="history", return_early=True)),
    "exact": Mode(about="copies for every micro-batch from its own routing", online=OnlineConfig(replicate="exact")),
    "auto": Mode(about="owners and copies as policy auto decides",
                 online=OnlineConfig(policy="auto", replicate="history", interval=10)),
    "zero": Mode(about="optimizer state sharded (ZeRO-1)", zero=1),
    "zero_moved": Mode(about="sharded state, and random owners every --interval iterations", zero=1, before=move_all),
    "zero3_moved": Mode(about="sharded weights, gradients and state (ZeRO-3), owners as before", zero=3, before=move_all),
}  # fmt: skip


def base_config(args: argparse.Namespace, num_ranks: int) -> RunConfig:
    """The reference run. Raises ValueError when it fits neither the ranks nor the options."""
    is_cuda = args.device == "cuda"
    if args.run is not None:
        config = load(args.run)
        if config.plan.world_size != num_ranks:
            raise ValueError(f"{args.run}: its plan has {config.plan.world_size} ranks, started are {num_ranks}")
    else:
        config = RunConfig(
            model=LARGE if is_cuda else SMALL,
            gate=GateConfig(kind="gshard", capacity=1.5),
            # with the default rate and warm-up, weights changed by 1e-7 change the loss of an early batch by 13 % in bfloat16
            workload=Workload(
                global_batch_size=num_ranks * (16 if is_cuda else 4),
                micro_batch_size=8 if is_cuda else 2,
                lr=3e-4,
                lr_warmup_iterations=20,
            ),
            plan=ParallelPlan(dp=num_ranks, ep=num_ranks // args.expert_dp),
            # what a copy costs is left out: here they shall be made
            cluster=ClusterSpec(
                name="here", ranks_per_node=num_ranks, memory_gbytes=80.0, intra_node_gbytes_per_s=1e6, tflops=1.0
            ),
        )
    work = dataclasses.replace(
        config.workload, iterations=args.iterations, warmup_iterations=0, dtype=dtype_of(args), seed=args.seed
    )
    if args.data:
        work = dataclasses.replace(work, data=tuple(args.data))
    cluster = dataclasses.replace(config.cluster, device=args.device)
    layer = LayerConfig(dispatcher=args.dispatcher, row_factor=float(num_ranks))
    return dataclasses.replace(config, workload=work, cluster=cluster, layer=layer, online=OnlineConfig())


def config_of(base: RunConfig, mode: Mode, slots: int) -> RunConfig:
    """Raises ValueError where the mode has no meaning, for instance copies on one rank."""
    online = dataclasses.replace(mode.online, replica_slots=slots if mode.online.replicate != "never" else 0)
    work = dataclasses.replace(base.workload, zero=mode.zero)
    return check(dataclasses.replace(base, online=online, workload=work), "this mode")


def train(config: RunConfig, mode: Mode, world: World, tokens: TokenDataset, args: argparse.Namespace) -> dict:
    """Losses, times and what moved, of the whole run; the same on every rank. Collective."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer, results = Trainer(config, build_mesh(config.plan, world.device), tokens), []
    num_moves = 0
    for iteration in range(args.iterations):
        before = [layer.placement for layer in trainer.layers.values()]
        mode.before(trainer, iteration, args)
        results.append(trainer.run_iteration())
        num_moves += sum(layer.placement != old for layer, old in zip(trainer.layers.values(), before, strict=True))
    return {
        "loss": [result.lm_loss for result in results],
        "step_ms": [result.step_ms for result in results],
        "replica_bytes": int(np.mean([result.replica_bytes for result in results])),
        "peak_bytes": results[-1].peak_memory_bytes,
        "num_placements": num_moves,
    }


def make_row(found: dict, reference: list[float] | None, tolerance: float) -> dict:
    """One mode's numbers. reference: losses; None = this is it."""
    loss = np.array(found["loss"])
    off = np.abs(loss - (loss if reference is None else reference)) / np.abs(loss if reference is None else reference)
    different = np.flatnonzero(off)
    return {
        **{key: found[key] for key in ("loss", "replica_bytes", "peak_bytes", "num_placements")},
        "step_ms": round(float(np.median(found["step_ms"])), 3),
        "last_loss": float(loss[-NUM_LAST:].mean()),
        "worst": float(off.max()),
        "mean": float(off.mean()),
        "equal_iterations": int(different[0]) if len(different) else len(loss),
        "passed": bool(np.isfinite(loss).all() and off.max() <= tolerance),
    }


COLUMNS = (
    "mode           worst dev.   mean dev.  equal its   loss of last 20  step ms  placements  copies MB/it  peak GB"
)


def format_row(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['mode']:12s} {row['status']}: {row['reason']}"
    return (
        f"{row['mode']:12s} {row['worst']:11.2e} {row['mean']:11.2e} {row['equal_iterations']:10d} {row['last_loss']:16.5f} "
        f"{row['step_ms']:9.1f} {row['num_placements']:11d} {row['replica_bytes'] / 1e6:13.2f} "
        f"{row['peak_bytes'] / 1e9:8.2f}" + ("" if row["passed"] else "   BEYOND THE TOLERANCE")
    )


def run(args: argparse.Namespace, world: World) -> list[dict]:
    """Train all modes, print and write; the rows. Collective."""
    base = base_config(args, world.num_ranks)
    tolerance = args.tolerance if args.tolerance is not None else TOLERANCE[base.workload.dtype]
    tokens = load_tokens(base.workload.data, base.model.vocab_size, seed=base.workload.seed)
    settings = {"config": to_dict(base), "tolerance": tolerance, "interval": args.interval, "note": args.note,
                "how": __doc__, "data": [name for name, _ in tokens.parts]}  # fmt: skip
    report = Report("loss_parity", world, args.json, settings, keys=("mode",))
    run_of = f"{base.plan.describe()}, {base.workload.dtype}, {args.iterations} iterations"
    report.say(f"{run_of}; tolerance {tolerance:g}\n{COLUMNS}")
    reference: list[float] | None = None
    try:
        for name in dict.fromkeys(("plain", *args.modes)):
            mode = MODES[name]
            report.measure(
                {"mode": name, "about": mode.about},
                lambda mode=mode: train(config_of(base, mode, args.replica_slots), mode, world, tokens, args),
                lambda results, losses=reference: make_row(results[0], losses, tolerance),
                format_row,
            )
            row = next(row for row in report.data["rows"] if row["mode"] == name)
            reference = reference or row.get("loss")
            if reference is None:
                break  # nothing to compare with
    except LeftAloneError as error:
        report.give_up(error)
    return report.data["rows"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:11s} {mode.about}" for name, mode in MODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.loss_parity", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=f"modes:\n{listed}",
    )  # fmt: skip
    add_options(parser, timing=False)
    parser.add_argument("run", type=checked(_existing), nargs="?", metavar="RUN.toml", help="default: a small GPT")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES], metavar="MODE", help="default: all")
    parser.add_argument("--data", nargs="+", help="text files or a .bin/.idx prefix; default: Python's library")
    parser.add_argument("--iterations", type=at_least(2), default=200, help="default: 200")
    parser.add_argument("--interval", type=at_least(1), default=10, help="iterations between moves; default: 10")
    parser.add_argument("--replica-slots", type=at_least(1), default=2, help="copies a rank has room for; default: 2")
    parser.add_argument("--expert-dp", type=at_least(1), default=1, help="ranks that have the same expert; default: 1")
    parser.add_argument("--dispatcher", choices=DISPATCHERS, default="auto")
    parser.add_argument("--tolerance", type=float, help="other than that of the precision")
    return parser.parse_args(argv)


def _existing(text: str) -> Path:
    if not Path(text).is_file():
        raise ValueError(f"{text}: there is no such file")
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows: list[dict] = []
    try:
        code = run_in_world(args, lambda args, world: rows.extend(run(args, world)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compared = all(row.get("passed", row["status"] == "skipped" and row["mode"] != "plain") for row in rows)
    return code or int(not (rows and compared))


if __name__ == "__main__":
    sys.exit(main())
