"""The primitives of one run's MoE layer, measured at the sizes that its routing can reach: a small profile, in seconds.

A hot rank is measured as it occurs: it has many rows while the others share the rest; each size on two ranks in turn, so that
chips can be told apart. All pieces are measured without a pause, each once in every round, in an order of chance: the clock of
a GPU at its limit of power hunts by a tenth and follows what was done within the last tenth of a second, so that runs in a row
are all wrong alike, and those behind pauses too fast. Sizes follow from the model and the number of ranks alone; no trace is
looked at.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from smartmoe.bench import profile_parts as parts
from smartmoe.bench.measure import World
from smartmoe.bench.profile_cluster import (
    all_to_all_case,
    both_ways,
    collective_case,
    direct_case,
    expert_case_sizes,
    measure,
)
from smartmoe.bench.profile_parts import Site
from smartmoe.bench.profiler import Case, Profiler
from smartmoe.config import RunConfig
from smartmoe.planner.primitives import Profile

ROUNDS = {"cpu": 3, "cuda": 10}  # of each hot rank
# Of a rank's rows over its experts: the exponent of their Zipf law, and the part of the experts that have any. Few may have
# all of them without one that is hot: what each of them costs is then told from the depth of the hot one's tiles.
EXPERT_LAWS = ((0.0, 1.0), (1.2, 1.0), (1.2, 0.5), (2.0, 1.0), (5.0, 1.0))
MOST_CHOICES = 16  # experts of a token in the piece that puts rows in order


def profile_layer(config: RunConfig, world: World, path: Path) -> Profile:
    """Measure the layer's primitives, write them to `path` from rank 0, and return them. Collective.

    config: experts over all ranks of the world, one stage.
    """
    profiler = Profiler(world, config.workload.dtype, 0.0)
    model, tokens = config.model, config.workload.micro_batch_size * config.model.seq_len
    sizes = {"width": model.hidden_size, "ffn": model.ffn_size, "experts": model.num_experts, "tokens": tokens}
    cases, slow = layer_cases(profiler.site, config, tokens), config.cluster.slow_links_gbytes_per_s
    return measure(profiler, cases, path, [sizes], slow, ROUNDS[world.device.type])


def hot_shares(num_ranks: int) -> list[tuple[float, bool]]:
    """(rows of the hot rank over an even share, whether held out), from even loads to all rows on one rank."""
    if num_ranks == 1:
        return [(1.0, False)]
    grid = np.geomspace(1.0, num_ranks, 9).round(3).tolist()
    between = round((grid[3] * grid[4]) ** 0.5, 3)
    return [(share, False) for share in grid] + [(between, True)]


def layer_cases(site: Site, config: RunConfig, tokens: int) -> list[Case]:
    """What planner.layer_cost puts a layer's time together from, with `tokens` on each rank."""
    model, world = config.model, site.world
    width, top_k, copies = model.hidden_size, model.top_k, tokens * model.top_k
    choice = dict(tokens=tokens, width=width, experts=model.num_experts, top_k=top_k)
    cases = [
        both_ways(name, choice, False, functools.partial(parts.gate, site, **choice, limited=limited))
        for name, limited in (("gate", False), ("gate_limited", True))
    ]
    is_direct = config.layer.dispatcher == "direct"
    # rows are put in order before and after the exchange: a hot rank has more of those received
    most = min(MOST_CHOICES, top_k * (world.num_ranks + 1) // 2)
    for choices in sorted({top_k, max(top_k, (top_k + most) // 2), max(top_k, most)}) if not is_direct else ():
        moved = dict(tokens=tokens, copies=tokens * choices, width=width)
        cases.append(both_ways("route", moved, False, functools.partial(parts.route, site, **moved)))
    experts = _Experts(site, config, copies)
    for place, (share, held) in enumerate(hot_shares(world.num_ranks)):
        cases += [case for law in EXPERT_LAWS for case in experts.cases(share, law, held, place)]
        if world.group is not None and not is_direct:
            cases.append(all_to_all_case(site, copies, width, share, held))
    if world.group is not None:  # counts: of gates with a capacity, and of rows before these are sent
        for rows in (model.num_experts, 8 * model.num_experts):
            cases.append(all_to_all_case(site, rows, 2, 1.0, False))
            cases.append(collective_case(site, "all_reduce", rows, world.group, False))
    if is_direct:
        for bias in (0.0, 0.25, 0.5, 1.0) if world.group else (0.0,):
            sizes = (tokens // 2, tokens) if bias else (tokens // 2, tokens, 2 * tokens)
            cases += [direct_case(site, num, top_k, width, False, world.group, bias) for num in sizes]
    return cases


class _Experts:
    """Cases of experts, which share weights and rows: all of them are there at once."""

    def __init__(self, site: Site, config: RunConfig, copies: int):
        self._site, self._config, self._copies = site, config, copies
        self._slots = config.model.num_experts // site.world.num_ranks

    @functools.cached_property
    def _tensors(self):
        model, num_rows = self._config.model, self._copies * self._site.world.num_ranks + 1
        rows, grad = (self._site.randn(num_rows, model.hidden_size) for _ in range(2))
        weights = parts.expert_weights(self._site, self._slots, model.hidden_size, model.ffn_size, model.activation)
        return rows, grad, weights

    def cases(self, share: float, law: tuple[float, float], held: bool, place: int) -> list[Case]:
        """The sizes of the hot rank stand for the case, whose time is that of the slowest rank."""
        num_ranks, model = self._site.world.num_ranks, self._config.model
        rows_L = _rows_of_slots(self._copies, num_ranks, share, law, self._slots, 0)
        inner = model.ffn_size * (3 if model.activation == "swiglu" else 2)
        sizes = expert_case_sizes(self._site, rows_L, model.hidden_size, inner)
        name = "experts" if self._config.layer.experts == "grouped" else "experts_loop"
        hot = (None,) if share == 1.0 else sorted({place % num_ranks, (place + num_ranks // 2) % num_ranks})
        return [both_ways(name, sizes, held, functools.partial(self._build, share, law, rank), rank) for rank in hot]

    def _build(self, share: float, law: tuple[float, float], hot: int | None):
        world, (rows, grad, weights) = self._site.world, self._tensors
        place = (world.ep_rank - (hot or 0)) % world.num_ranks
        rows_L = _rows_of_slots(self._copies, world.num_ranks, share, law, self._slots, place).tolist()
        num, layer = sum(rows_L), self._config.layer
        return parts.experts(rows[:num], grad[:num], rows_L, weights, self._config.model.activation, layer.experts)


def _rows_of_slots(
    copies: int, num_ranks: int, share: float, law: tuple[float, float], slots: int, place: int
) -> np.ndarray:
    """[slots] rows that a rank computes where each of the ranks sends `copies`; at least one. law: see EXPERT_LAWS; place: 0 =
    the hot one. Drawn, as routing does: numbers that fill whole tiles would be faster."""
    to_W = parts.share_rows(copies, num_ranks, share) if num_ranks > 1 else np.array([copies])
    exponent, part = law
    weight = np.arange(1, slots + 1) ** -exponent * (np.arange(slots) < max(1, round(part * slots)))
    draw = np.random.default_rng([int(1000 * share), int(10 * exponent)])
    rows_L = draw.multinomial(num_ranks * to_W[place], weight / weight.sum())
    rows_L[0] = max(rows_L[0], 1)
    return rows_L
