"""Measure the primitives of this cluster:  torchrun --nproc-per-node N -m smartmoe.bench.profile_cluster --out FILE

All ranks do the same at the same time, as in training, on GPUs that were busy just before; a time is that of the slowest
rank. Sizes come from the shapes asked for (--shapes D,F,HEADS,EXPERTS,TOP_K,SEQ,VOCAB); some are held out of every fit and
tell how well an unseen size is predicted. The file is what `smartmoe plan` reads: format and rule in
smartmoe.planner.primitives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.bench import profile_parts as parts
from smartmoe.bench.busy import WARM_MS, BusyWork, lead_ms
from smartmoe.bench.measure import World, run_in_world, spread
from smartmoe.bench.profile_parts import Site
from smartmoe.config import ParallelPlan
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.mesh import build_mesh
from smartmoe.ops.all_to_all import group_size
from smartmoe.planner.primitives import Point, Profile, expert_sizes, held_out_errors
from smartmoe.slow_links import slow_links

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHAPES = {
    "cuda": ("768,1536,12,16,2,1024,8192", "2560,5120,16,32,2,1024,8192"),
    "cpu": ("128,256,4,16,2,128,2048",),
}
TOKENS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (64, 128, 256, 512)}
_HOST_RUNS = (4, 8)  # the fewest and the most of a piece for its host's time, of which the first is left out
_HOST_SECONDS = 0.02
_MOST_FOR_HOST = 5e-3  # seconds of a piece: what takes longer has launches like those of smaller sizes
# Pieces that make the host wait for the device: it cannot get ahead, and their device time holds their launches.
WAITING = ("optimizer", "optimizer_launches", "experts_loop")
_LEAST_HOST_MS = 2e-3
_TELL_SECONDS = 10.0
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


@dataclass(frozen=True)
class Case:
    """One measurement: the primitive (two, _forward and _backward, when `has_backward`), its sizes, and how to run it.
    busiest: the rank that has the most to do, None = all have the same."""

    name: str
    sizes: dict[str, float]
    build: Callable[[], object]
    has_backward: bool
    is_held_out: bool
    busiest: int | None = None


@dataclass
class _Ready:
    """A case that has run: step and reset of its piece, ms of other work before each run, how often to run it, [iterations,
    parts] ms of the host that launches it (None: not measured), and the marks of its runs."""

    case: Case
    step: Callable
    reset: Callable
    lead: float
    num: int
    host_IP: np.ndarray | None
    runs: list[list] = field(default_factory=list)


class Profiler:
    """Runs cases and keeps their points. Collective: all ranks have the same cases."""

    def __init__(self, world: World, dtype: str, seconds_per_case: float):
        self.site, self.dtype, self.seconds = Site(world, DTYPES[dtype]), dtype, seconds_per_case
        self.points: dict[str, list[Point]] = {}
        self._experts: list[tuple[Case, np.ndarray]] = []  # times of each rank, [ranks] ms
        self._tell_at = time.monotonic() + _TELL_SECONDS
        self._has_host: set[str] = set()  # names of cases
        self._has_one_clock = world.device.type == "cpu" and len(set(world.share(platform.node()))) == 1
        self._busy = BusyWork(world, self.site.dtype)

    def run(self, cases: list[Case], rounds: int) -> None:
        """Measure cases, in an order of chance: what drifts with time is no rule of sizes. Each for the seconds of a case, all
        runs in a row; or, with rounds > 0, all cases ready at once and one run of each in every round, without a pause and
        behind equally much other work: all meet the same clock, as the layers of a step do."""
        draw = np.random.default_rng(0)
        order = [cases[place] for place in draw.permutation(len(cases))]
        if not rounds:
            for place, case in enumerate(order):
                self._tell(f"{place} of {len(order)} pieces")
                self._run_alone(case)
            return
        ready = [found for found in map(self._prepare, order) if found]
        leads = [each.lead for each in ready if each.lead]
        for each in ready:
            each.lead = float(np.mean(leads)) if each.lead else 0.0
        for number in range(rounds):
            self._tell(f"{number} of {rounds} rounds of {len(ready)} pieces")
            self._run_once([ready[place] for place in draw.permutation(len(ready))])
        for each in ready:
            self._keep(each)

    def _tell(self, words: str) -> None:
        """Say how far it is, now and then, from rank 0."""
        if time.monotonic() > self._tell_at and self.site.world.ep_rank == 0:
            print(f"profiling: {words}", file=sys.stderr, flush=True)
            self._tell_at = time.monotonic() + _TELL_SECONDS

    def _run_alone(self, case: Case) -> None:
        ready = self._prepare(case)
        if ready:
            self._run_once([ready] * ready.num)
            self._keep(ready)

    def _prepare(self, case: Case) -> _Ready | None:
        """Build a case and find how long to be busy before it; None on all ranks when it is out of memory on any."""
        world = self.site.world
        built, is_alone = [], case.sizes.get("ranks", 1) == 1

        def build():
            made = case.build()
            built.extend(made if isinstance(made, tuple) else (made, lambda: None))

        def first():
            built[0](lambda: None)

        # a piece in which ranks meet begins when all have built it
        for calls in ((build, first),) if is_alone else ((build,), (first,)):
            if not self._fits(calls):
                return None
        step, reset = built
        reset()
        step(lambda: None)
        reset()
        world.synchronize()
        start = time.perf_counter()
        step(lambda: None)
        launched = time.perf_counter() - start
        world.synchronize()
        took = world.largest(time.perf_counter() - start)
        reset()
        num, num_parts = int(np.clip(self.seconds / max(took, 1e-6), 5, 25)), 1 + case.has_backward
        if world.device.type != "cuda":
            lead, host_IP = 0.0, np.zeros((1, num_parts))
        elif case.name in WAITING:
            lead, host_IP = 0.0, np.full((1, num_parts), _LEAST_HOST_MS)
        else:
            lead, host_IP = lead_ms(1e3 * launched, 1e3 * took), None
            if took < _MOST_FOR_HOST or case.name not in self._has_host:
                host_IP = self._launch_ms(step, reset, case.has_backward, int(np.clip(_HOST_SECONDS / took, *_HOST_RUNS)))
                self._has_host |= set() if case.is_held_out else {case.name}
        return _Ready(case, step, reset, lead, num, host_IP)

    def _fits(self, calls: Iterable[Callable]) -> bool:
        """Call them in turn: whether there was memory for it on all ranks. A rank that went on alone would wait for those that
        did not."""
        try:
            for call in calls:
                call()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        return all(self.site.world.share(fits))

    def _run_once(self, order: list[_Ready]) -> None:
        """Each of them in turn, as often as it is named."""
        self._busy.launch(WARM_MS)
        for ready in order:
            ready.runs.append(self._once(ready.step, ready.reset, ready.lead)[0])
        self.site.world.synchronize()

    def _keep(self, ready: _Ready) -> None:
        """Make points of what was measured."""
        case, marks_IM = ready.case, [[self._passed(run[0], mark) for mark in run] for run in ready.runs]
        words = self.site.world.share({"marks": marks_IM, "host": None if ready.host_IP is None else ready.host_IP.tolist()})
        marks_WIM = np.array([w["marks"] for w in words])
        device_IP = slowest_parts(marks_WIM, self._has_one_clock)
        if ready.host_IP is not None:
            host_WIP = np.array([w["host"] for w in words])
            host_IP = host_WIP[np.median(host_WIP, axis=1).sum(1).argmax()]
        if case.name == "experts":
            self._experts.append((case, np.median(marks_WIM[:, :, -1] - marks_WIM[:, :, 0], axis=1)))
        names = [f"{case.name}_forward", f"{case.name}_backward"] if case.has_backward else [case.name]
        for part, name in enumerate(names):
            host = {} if ready.host_IP is None else spread(host_IP[:, part])
            device = {key: max(value, 1e-5) for key, value in spread(device_IP[:, part]).items()}
            self.points.setdefault(name, []).append(Point(case.sizes, device, host, case.is_held_out))

    def settle(self) -> list[float]:
        """Bring times of experts that were measured on one rank to those of the slowest one. Returns for each rank its time
        over the slowest's for the same products: chips whose power is limited differ in their clocks."""
        num_ranks = self.site.world.num_ranks
        if self._has_one_clock or not self._experts:
            return [1.0] * num_ranks
        pace_W = rank_pace(self._experts, num_ranks)
        for name in ("experts_forward", "experts_backward"):
            for place, (case, _) in enumerate(self._experts):
                if case.busiest is not None:
                    point = self.points[name][place]
                    slowest = {key: ms / pace_W[case.busiest] for key, ms in point.device_ms.items()}
                    self.points[name][place] = dataclasses.replace(point, device_ms=slowest)
        return pace_W.round(4).tolist()

    def _launch_ms(self, step, reset, has_backward: bool, num_runs: int) -> np.ndarray:
        """[runs, parts] ms of the host. It launches onto an idle device, as one that is behind does: launches behind much other
        work take it longer. Of a piece with a backward part it is what a second one adds: a step has many in a row, and what
        wakes up at the first, such as the thread of backward passes, does so once for all of them."""
        found = []
        for each in (functools.partial(step, copies=copies) for copies in (1, 2)) if has_backward else (step,):
            runs = []
            for _ in range(num_runs):
                self.site.world.synchronize()
                runs.append(self._once(each, reset, 0.0)[1])
            # the marks' own time on the host is between the two that they note
            found.append(1e3 * np.diff(np.array(runs), axis=1)[1:, 1::2])
        if has_backward:
            return np.maximum(found[1] - np.median(found[0], axis=0), _LEAST_HOST_MS)
        return found[0]

    def _once(self, step, reset, lead):
        world, device, host = self.site.world, [], []
        is_cuda = world.device.type == "cuda"

        def mark():
            host.append(time.perf_counter())
            if is_cuda:
                device.append(torch.cuda.Event(enable_timing=True))
                device[-1].record()
            else:
                device.append(host[-1])
            host.append(time.perf_counter())

        if lead:  # the host gets ahead, so that no launch is in the device's time
            self._busy.launch(lead)
        world.align()
        mark()
        step(mark)
        mark()
        reset()
        return device, host

    @staticmethod
    def _passed(first, mark) -> float:
        if isinstance(mark, float):
            return mark * 1e3
        return 0.0 if mark is first else first.elapsed_time(mark)


def rank_pace(timed: list[tuple[Case, np.ndarray]], num_ranks: int) -> np.ndarray:
    """[ranks] time of each rank over that of the slowest one for the same products. timed: cases with the times of each rank,
    of which those count that had the case's sizes to do: all ranks, or the busiest one. Least squares of logarithms, with one
    unknown for each size and one for each rank."""
    idx_of_size, seen = {}, []
    for case, times_W in timed:
        size_idx = idx_of_size.setdefault(tuple(sorted(case.sizes.items())), len(idx_of_size))
        ranks = range(num_ranks) if case.busiest is None else (case.busiest,)
        seen += [(size_idx, rank, np.log(times_W[rank])) for rank in ranks]
    matrix, log_ms = np.zeros((len(seen), len(idx_of_size) + num_ranks)), np.array([row[2] for row in seen])
    for place, (size_idx, rank, _) in enumerate(seen):
        matrix[place, [size_idx, len(idx_of_size) + rank]] = 1.0
    pace_W = np.exp(np.linalg.lstsq(matrix, log_ms, rcond=None)[0][len(idx_of_size) :])
    return pace_W / pace_W.max()


def slowest_parts(marks_WIM: np.ndarray, one_clock: bool) -> np.ndarray:
    """[iterations, parts] ms of the slowest rank, of the times at which each rank passed its marks.

    With one clock for all ranks a part ends when the last rank has ended it, and the first begins when the first rank does:
    ranks that wait for a core, because there are fewer cores than ranks, wait in a training step as well.
    """
    if not one_clock:
        return np.diff(marks_WIM, axis=2).max(0)
    ends_IM = marks_WIM.max(0)
    ends_IM[:, 0] = marks_WIM[:, :, 0].min(0)
    return np.diff(ends_IM, axis=1)


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
                    if impl == "loop" and (skew or slots == shape.experts):
                        continue  # its time is that of the products: even loads tell it
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
    facts["rank_pace"] = profiler.settle()
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
    parser = argparse.ArgumentParser(prog="python -m smartmoe.bench.profile_cluster", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--shapes", nargs="+", metavar="SIZES", help="models to measure for (default: small to 2560 wide)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens of a rank in a micro-batch to measure at")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each of some hundred cases")
    parser.add_argument(
        "--slow-links", type=float, default=0.0, metavar="GB/S", help="slow exchanges down to this rate"
    )
    parser.add_argument("--out", type=Path, required=True, help="the profile to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
