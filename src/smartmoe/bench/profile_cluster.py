"""Measure the primitives of this cluster:  torchrun --nproc-per-node N -m smartmoe.bench.profile_cluster --out FILE

All ranks do the same at the same time, as in training, on GPUs that were busy just before; a time is that of the slowest
rank. Sizes come from the shapes asked for (--shapes D,F,HEADS,EXPERTS,TOP_K,SEQ,VOCAB); some are held out of every fit and
tell how well an unseen size is predicted. The file is what `smartmoe plan` reads: format and rule in
smartmoe.planner.primitives.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.bench import profile_parts as parts
from smartmoe.bench.measure import LeftAloneError, World, run_in_world, spread
from smartmoe.bench.profile_parts import Site
from smartmoe.bench.profiler import DTYPES, Case, Profiler
from smartmoe.config import ParallelPlan
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.mesh import build_mesh
from smartmoe.ops.all_to_all import group_size
from smartmoe.planner.primitives import Point, Profile, expert_sizes, held_out_errors
from smartmoe.slow_links import slow_links

DEFAULT_SHAPES = {
    "cuda": ("768,1536,12,16,2,1024,8192", "2560,5120,16,32,2,1024,8192"),
    "cpu": ("128,256,4,16,2,128,2048",),
}
TOKENS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (64, 128, 256, 512)}
# Exponents of the Zipf law of rows over a rank's experts, for numbers of rows in turn; the last leaves some idle.
EXPERT_SKEWS = ((0.0, 1.6), (0.8, 3.0))
_SMALL = 64  # numbers of a tensor whose update takes no time but that of its launch


@dataclass(frozen=True)
class Shape:
    """Sizes of a model whose pieces are measured."""

    width: int
    ffn: int
    heads: int
    experts: int
    top_k: int
    seq_len: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """D,F,HEADS,EXPERTS,TOP_K,SEQ,VOCAB. Raises ValueError for anything else."""
        fields = text.split(",")
        if len(fields) != 7 or not all(f.isdigit() and int(f) > 0 for f in fields):
            raise ValueError(f'shape "{text}": expected D,F,HEADS,EXPERTS,TOP_K,SEQ,VOCAB')
        return cls(*map(int, fields))


# ---------------------------------------------------------------------------------------------------------------- cases


def token_grid(tokens: list[int]) -> list[tuple[int, bool]]:
    """(tokens of a rank, whether held out): those asked for, and two between neighbours that are held out."""
    pairs = list(zip(tokens[:-1], tokens[1:], strict=True))
    between = {16 * max(1, round((a * b) ** 0.5 / 16)) for a, b in (pairs[0], pairs[-2])} if len(pairs) > 1 else set()
    return [(t, False) for t in tokens] + [(t, True) for t in sorted(between - set(tokens))]


def compute_cases(site: Site, shapes: list[Shape], tokens: list[int]) -> list[Case]:
    """What a rank does alone."""
    grid, cases = token_grid(tokens), []
    for shape in shapes:
        for num, held in grid:
            cases += _token_cases(site, shape, num, held)
        for samples, held in ((1, False), (2, False), (3, True), (4, False)):
            sizes = dict(samples=samples, heads=shape.heads, tokens=shape.seq_len, head_dim=shape.width // shape.heads)
            cases.append(both_ways("attention", sizes, held, lambda s=sizes: parts.attention(site, **s)))
        cases += _expert_cases(site, shape, tokens)
    matrix = shapes[-1].width * shapes[-1].ffn
    for factor, tensors, held in ((1, 4, False), (4, 4, False), (8, 32, False), (32, 64, False), (6, 16, True)):
        sizes = dict(numel=factor * matrix, tensors=tensors)
        cases.append(Case("accumulate", sizes, lambda s=sizes: parts.accumulate(site, **s), False, held))
    for factor, held in ((8, False), (32, False), (128, False), (20, True)):  # large tensors: the device is behind the host
        sizes = dict(numel=factor * matrix)
        cases.append(Case("optimizer", sizes, lambda s=sizes: parts.optimizer(site, tensors=4, **s), False, held))
    for tensors, held in ((8, False), (64, False), (256, False), (128, True)):  # small ones: the host is
        build = functools.partial(parts.optimizer, site, numel=_SMALL * tensors, tensors=tensors)
        cases.append(Case("optimizer_launches", dict(tensors=tensors), build, False, held))
    one = torch.zeros(8, device=site.world.device)
    cases.append(Case("launch", {}, lambda: lambda mark: one.add_(1), False, False))
    return cases


def both_ways(name: str, sizes: dict, held: bool, build: Callable[[], object], busiest: int | None = None) -> Case:
    """A piece with a forward and a backward part."""
    return Case(name, sizes, build, True, held, busiest)


def _token_cases(site, shape, tokens, held) -> list[Case]:
    width, cases = shape.width, []
    for inner, outer in ((width, 3 * width), (width, width), *(() if held else ((width, width // 2),))):
        sizes = dict(tokens=tokens, inner=inner, outer=outer)
        cases.append(both_ways("linear", sizes, held, lambda s=sizes: parts.linear(site, **s)))
    plain = dict(tokens=tokens, width=width)
    cases.append(both_ways("norm", plain, held, lambda s=plain: parts.norm(site, **s)))
    route = {**plain, "copies": tokens * shape.top_k}
    cases.append(both_ways("route", route, held, lambda s=route: parts.route(site, **s)))
    choice = {**plain, "experts": shape.experts, "top_k": shape.top_k}
    for name, limited in (("gate", False), ("gate_limited", True)):
        cases.append(
            both_ways(name, choice, held, lambda s=choice, limit=limited: parts.gate(site, **s, limited=limit))
        )
    moved = dict(numel=tokens * width)
    cases.append(Case("by_sample", moved, lambda s=moved: parts.by_sample(site, **s), False, held))
    vocab = dict(tokens=tokens, vocab=shape.vocab)
    cases.append(both_ways("loss", vocab, held, lambda s=vocab: parts.loss(site, **s)))
    table = {**plain, "vocab": shape.vocab}
    cases.append(both_ways("embedding", table, held, lambda s=table: parts.embedding(site, **s)))
    return cases


def _expert_cases(site, shape, tokens) -> list[Case]:
    """Rows over local experts: about even, and skewed with an idle expert among them. They are drawn, as routing does:
    numbers that fill whole tiles would be faster."""
    cases = []
    draw = np.random.default_rng(0)
    for slots in sorted({max(1, shape.experts // 8), max(1, shape.experts // 2), shape.experts}):
        for place, (rows, held) in enumerate(token_grid([*tokens, 2 * tokens[-1], 4 * tokens[-1]])):
            for skew in EXPERT_SKEWS[place % 2] if slots > 1 else (0.0,):
                share = np.arange(1, slots + 1) ** -skew
                counts = draw.multinomial(rows, draw.permutation(share / share.sum()))
                sizes = expert_case_sizes(site, counts, shape.width, 2 * shape.ffn)
                for name, impl in (("experts", "grouped"), ("experts_loop", "loop")):
                    if impl == "loop" and (skew >= 1 or slots == shape.experts):
                        continue  # its time is that of the products: about even loads tell it
                    run = functools.partial(_alone, site, counts.tolist(), shape, impl)
                    cases.append(both_ways(name, sizes, held, run))
    return cases


def _alone(site, counts_L, shape, impl):
    weights, rows_RD = parts.expert_weights(site, len(counts_L), shape.width, shape.ffn, "gelu"), (sum(counts_L), shape.width)
    return parts.experts(site.randn(*rows_RD), site.randn(*rows_RD), counts_L, weights, "gelu", impl)


def expert_case_sizes(site: Site, counts_L: np.ndarray, width: int, ffn: int) -> dict[str, float]:
    """Sizes of the primitive "experts" for rows of local experts; ffn: of both products together."""
    found = expert_sizes(counts_L, width, ffn, num_processors(site.world.device))
    return {key: int(value) for key, value in found.items()} | dict(slots=len(counts_L), width=width, ffn=ffn)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 = a device whose products are not divided among them tile by tile."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def exchange_cases(site: Site, shapes: list[Shape], tokens: list[int]) -> list[Case]:
    """What ranks do together; on one rank only the direct dispatcher, which lays rows out there too."""
    world, cases = site.world, []
    if world.group is None:
        return _direct_cases(site, shapes, tokens)
    width = max(shape.width for shape in shapes)
    grid = token_grid([*tokens, 2 * tokens[-1]])
    groups = [world.group]
    if world.num_ranks >= 4 and world.num_ranks % 2 == 0:
        groups.append(build_mesh(ParallelPlan(dp=world.num_ranks // 2, tp=2), world.device).tp_group)
    for rows, held in grid:
        for skew in (0.0, 1.0, 1.5) if world.num_ranks == 2 else (1.0, 2.0):
            cases.append(all_to_all_case(site, rows, width, skew, held))
        for group in groups:
            for name in ("all_reduce", "all_gather", "reduce_scatter"):
                cases.append(collective_case(site, name, rows * width, group, held))
        num_bytes = float(rows * width * site.dtype.itemsize)
        cases.append(_exchange("point_to_point", 2, num_bytes, held, parts.point_to_point, site, rows * width))
    for rows in (16, 256):
        cases += [
            collective_case(site, "all_reduce", rows, world.group, False),
            all_to_all_case(site, rows, 2, 1.0, False),
        ]
    return cases + _direct_cases(site, shapes, tokens)


def all_to_all_case(site: Site, rows: int, width: int, skew: float, held: bool) -> Case:
    """Every rank sends so many rows; rank 0 gets `skew` times an even share of them."""
    num_bytes = parts.all_to_all_bytes(site, rows, width, skew)
    return _exchange("all_to_all", site.world.num_ranks, num_bytes, held, parts.all_to_all, site, rows, width, skew)


def collective_case(site: Site, name: str, numel: int, group, held: bool) -> Case:
    """all_reduce, all_gather or reduce_scatter."""
    num_ranks = dist.get_world_size(group)
    num_bytes = parts.collective_bytes(site, name, numel, num_ranks)
    return _exchange(name, num_ranks, num_bytes, held, parts.collective, site, name, numel, group)


def _exchange(name, ranks, num_bytes, held, build, *args) -> Case:
    sizes = dict(ranks=ranks, intra_bytes=num_bytes, inter_bytes=0.0)
    return Case(name, sizes, functools.partial(build, *args), False, held)


def _direct_cases(site, shapes, tokens) -> list[Case]:
    """None where ranks cannot store into each other's memory. A plan may have all experts on every rank, too: each rank
    alone."""
    world, cases = site.world, []
    if world.device.type == "cuda" and why_unavailable(world.group):
        return cases
    for group in dict.fromkeys((None, world.group)):
        for shape in shapes[-2:]:
            grid = token_grid(tokens[-3:])
            for bias in (0.0, 0.5) if group else (0.0,):
                cases += [direct_case(site, num, shape.top_k, shape.width, held, group, bias) for num, held in grid]
    return cases


def direct_case(site: Site, tokens: int, top_k: int, width: int, held: bool, group, bias: float) -> Case:
    """The direct dispatcher over `group`, None = this rank alone; bias: see parts.direct_slots."""
    num_ranks = group_size(group)
    rank_STK = np.stack([parts.direct_slots(rank, num_ranks, tokens, top_k, bias).numpy() for rank in range(num_ranks)])
    rank_STK //= parts.DIRECT_SLOTS
    rows = max(int((rank_STK == rank).sum()) for rank in range(num_ranks))
    crossing_SW = np.stack([(rank_STK == rank).any(2).sum(1) for rank in range(num_ranks)], 1).astype(float)
    np.fill_diagonal(crossing_SW, 0.0)
    off_bytes = float(max(crossing_SW.sum(0).max(), crossing_SW.sum(1).max())) * width * site.dtype.itemsize
    sizes = dict(tokens=tokens, copies=rows, width=width, ranks=num_ranks, off_bytes=off_bytes)
    return both_ways("direct", sizes, held, lambda: parts.direct(site, tokens, top_k, width, group, bias))


def measure_sync(world: World) -> Point:
    """The round trip of a number from an idle device to the host."""
    one, times = torch.zeros(1, device=world.device), []
    for _ in range(20):
        start = time.perf_counter()
        one.add_(1).item()
        times.append((time.perf_counter() - start) * 1e3)
    found = spread(times[5:])
    return Point({}, {key: max(value, 1e-5) for key, value in found.items()}, dict.fromkeys(found, 0.0))


# ------------------------------------------------------------------------------------------------------------------ run


def topology(world: World) -> dict:
    """Devices and who reaches whose memory."""
    if world.device.type != "cuda":
        return {"device": record.cpu_name(), "num_ranks": world.num_ranks, "backend": "gloo"}
    count, mine = torch.cuda.device_count(), torch.cuda.current_device()
    return {
        "device": torch.cuda.get_device_name(),
        "num_ranks": world.num_ranks,
        "processors": num_processors(world.device),
        "backend": "nccl",
        "memory_gbytes": round(torch.cuda.get_device_properties(mine).total_memory / 1e9, 1),
        "reaches": [d for d in range(count) if d != mine and torch.cuda.can_device_access_peer(mine, d)],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def run(args: argparse.Namespace, world: World) -> Profile:
    """Measure everything and write the file from rank 0. Collective."""
    dtype = args.dtype or ("bfloat16" if world.device.type == "cuda" else "float32")
    shapes = [Shape.parse(text) for text in args.shapes or DEFAULT_SHAPES[world.device.type]]
    profiler = Profiler(world, dtype, args.seconds)
    torch.manual_seed(1)
    tokens = sorted(args.tokens or TOKENS[world.device.type])
    cases = compute_cases(profiler.site, shapes, tokens) + exchange_cases(profiler.site, shapes, tokens)
    if args.slow_links:  # a store into another rank's memory is not slowed down
        cases = [case for case in cases if case.sizes.get("ranks", 1) == 1 or case.name != "direct"]
    with slow_links(args.slow_links):
        return measure(profiler, cases, args.out, [vars(s) for s in shapes], args.slow_links)


def measure(
    profiler: Profiler, cases: list[Case], path: Path, shapes: list[dict], slow_links_rate: float, rounds: int = 0
) -> Profile:
    """Measure `cases`, and write the profile and print its held-out errors from rank 0. `shapes`: what they are sizes of;
    slow_links_rate: what links are slowed down to by the caller, 0 = not; rounds: see Profiler.run. Collective."""
    start, world = time.monotonic(), profiler.site.world
    profiler.run(cases, rounds)
    profiler.points["sync"] = [measure_sync(world)]
    facts = {**record.provenance(**topology(world)), "shapes": shapes, "ranks": world.num_ranks}
    facts["slow_links_gbytes_per_s"] = slow_links_rate
    facts |= profiler.settle()
    profile = Profile(profiler.points, profiler.dtype, facts)
    if world.ep_rank == 0:
        took = time.monotonic() - start
        facts["seconds"] = round(took, 1)
        print(format_errors(profile, took), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write_json(path, profile.to_dict())
    return profile


def format_errors(profile: Profile, took_s: float) -> str:
    """What was measured, and how well held-out sizes are predicted."""
    errors = held_out_errors(profile)
    num = sum(len(points) for points in profile.points.values())
    lines = [f"{num} points of {len(profile.points)} primitives in {took_s:.0f} s on {profile.facts['num_ranks']} ranks, "
             f"{profile.facts['device']}, {profile.dtype}", "held-out sizes:         num  median error     p90"]  # fmt: skip
    lines += [f"  {n:21s} {e['num']:4d} {e['median']:12.1%} {e['p90']:8.1%}" for n, e in sorted(errors.items())]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.profile_cluster", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where torch finds a GPU, else cpu")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--shapes", nargs="+", metavar="SIZES", help="models to measure for, as above (default: small to 2560 wide)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens of a rank in a micro-batch to measure at")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each of some hundred cases; default: 0.05")
    parser.add_argument(
        "--slow-links", type=float, default=0.0, metavar="GB/S", help="slow exchanges down to this rate (default: as links are)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the profile to write")
    return parser.parse_args(argv)


def run_or_leave(args: argparse.Namespace, world: World) -> None:
    """`run`; where ranks have lost each other, say why and end this process, so that its launcher ends those that wait."""
    try:
        run(args, world)
    except LeftAloneError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run_or_leave)


if __name__ == "__main__":
    sys.exit(main())
