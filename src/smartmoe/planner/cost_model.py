"""Time and memory of one training step of a plan, under a distribution of routing loads.

The step is put together from primitives: blocks of each pipeline stage, the schedule of micro-batches, gradient
reduction, optimizer. Host and device have a clock each (planner.timeline): launches overlap with work as far as the host is
ahead, and it is so only until the dispatcher makes it wait for sizes. Everything is a distribution over the samples of
the loads. With `loads.uniform` the same code is a data-insensitive model.

Axes: S samples, M micro-batches, L MoE layers, C model chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from smartmoe.config import EQUAL_BLOCKS, ClusterSpec, ParallelPlan, RunConfig
from smartmoe.placement import Placement
from smartmoe.planner import memory
from smartmoe.planner.layer_cost import LayerSetting, LayerTimes, exchange_ms, group_bytes, layer_times
from smartmoe.planner.loads import Loads, uniform
from smartmoe.planner.memory import Memory
from smartmoe.planner.parameters import Parameters, chunk_layers, chunk_parameters, has_experts
from smartmoe.planner.primitives import Primitives
from smartmoe.planner.schedule import least_makespan, makespan, num_played, one_way
from smartmoe.planner.sharding import pass_traffic, step_traffic
from smartmoe.planner.timeline import Work, fold, join
from smartmoe.solvers import solve_greedy

PLACEMENTS = ("identity", "balanced")
# What the host launches for a captured pass of a pipeline, forward and backward: the graph, copies into its places and out.
_PLAYED = (6, 5)
GATHERING = "gather and scatter"  # of tensor parallelism, among an estimate's parts
_PRODUCTS = ("attention", "experts", "embedding and loss", "recomputation")  # parts that a chip's limit of power slows down
_FEW_SAMPLES = 20  # up to so many the largest has as large a part in the 95th percentile as in the mean
_ROUNDING = 1e-9  # relative, of sums in another order
_WAITING = ("exchange", GATHERING, "launches and waits", "gradient reduction", "step", "pipeline idle")


@dataclass(frozen=True)
class Estimate:
    """Prediction for one plan. step_ms: [S]; parts: mean ms of what the step is made of, adding up to its mean (the
    pipeline's idle time is a part); tokens: of a step; copies: of experts, "MODE SLOTS" as online.replicate and
    replica_slots, or empty."""

    plan: ParallelPlan
    micro_batch: int
    num_micro_batches: int
    step_ms: np.ndarray
    parts: dict[str, float]
    memory: Memory
    tokens: int
    copies: str = ""

    @property
    def mean_ms(self) -> float:
        return float(self.step_ms.mean())

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.step_ms, 95))

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.mean_ms * 1e3

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=self.parts.get)


@dataclass
class _Layer:
    """What one setting's blocks cost, with experts [S, M, L] or less, and without. parts: ms of the device in a block, forward
    and backward together; again: of a forward pass that is recomputed; dense: the same of a block without experts."""

    forward: Work
    backward: Work
    dense_forward: Work
    dense_backward: Work
    parts: dict[str, np.ndarray]
    again: dict[str, np.ndarray]
    dense_parts: dict[str, np.ndarray]
    dense_again: dict[str, np.ndarray]


@functools.lru_cache(maxsize=64)
def least_at_its_clock(wait_speedup: float) -> float:
    """No step is a smaller part of what it would be if waiting saved nothing. Products are some part of it, waiting at most the
    rest."""
    products = np.linspace(0, 1, 1001)  # of the parts between two of these, the larger is saved from, the smaller waits less
    return 1 - float((products[1:] * (1 - np.exp(-wait_speedup * (1 - products[:-1])))).max())


class CostModel:
    """Costs of plans for one model, workload and cluster.

    config: model, gate, layer, online and workload are read; plan and cluster are not. loads: see planner.loads.
    placement: "identity", or "balanced" = as greedy places experts for each sample: what online placement keeps up.
    expert_of_slot: [S, L, E], or host_share: [S, M or 1, L, E, W], state the placement of each sample instead; then only
    plans with so many ranks to an expert group can be judged (see planner.simulate).
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: ClusterSpec,
        primitives: Primitives,
        loads: Loads,
        placement: str = "identity",
        *,
        expert_of_slot: np.ndarray | None = None,
        host_share: np.ndarray | None = None,
    ):
        if placement not in PLACEMENTS:
            raise ValueError(f'placement = "{placement}" is not one of {", ".join(PLACEMENTS)}')
        self.config, self.cluster, self.primitives, self.loads = config, cluster, primitives, loads
        self.placement, self._expert_of_slot, self._host_share = placement, expert_of_slot, host_share
        self.dtype_bytes = 4 if config.workload.dtype == "float32" else 2
        self._layers: dict[tuple, _Layer] = {}
        self._orders: dict[int, np.ndarray | None] = {}
        self._known: dict[tuple, object] = {}  # what several plans share
        self._known_of_any: dict[tuple, object] = {}  # what all loads share, too

    def with_copies(self, config: RunConfig, host_share: np.ndarray) -> CostModel:
        """The same loads for a run whose experts have copies that compute these shares."""
        model = CostModel(config, self.cluster, self.primitives, self.loads, self.placement, host_share=host_share)
        model._orders = self._orders  # of the same loads: greedy is slow
        return model

    def with_loads(self, loads: Loads) -> CostModel:
        """The same run under other loads."""
        model = CostModel(self.config, self.cluster, self.primitives, loads, self.placement)
        model._known_of_any = self._known_of_any
        return model

    def data_insensitive(self) -> CostModel:
        """The same run under uniform loads: what a planner that does not look at the routing would use."""
        return self.once(("uniform",), lambda: self.with_loads(uniform(self.config.model)))

    # ------------------------------------------------------------------------------------------------------- one step

    def memory(self, plan: ParallelPlan, micro_batch: int, never_captured: bool = False) -> Memory:
        """Memory of the fullest stage of a plan. never_captured: as if passes were launched, whatever is best."""
        setting, num_chunks = self.setting(plan, micro_batch), plan.pp * plan.vpp
        rows = self.once(
            ("most rows", setting.tokens, plan.ep, num_chunks),
            lambda: memory.most_rows(setting, self._rows(setting), num_chunks),
        )
        held = self.once_of_any(
            ("held", plan.pp, plan.vpp, plan.dp, plan.tp, plan.ep),
            lambda: memory.held(plan, setting, self.parameters(plan), self.config.workload.zero),
        )
        num_micro = self.num_micro_batches(plan, micro_batch)
        is_captured = self.is_captured(plan, micro_batch) and not never_captured
        return memory.estimate(plan, setting, micro_batch, num_micro, rows, held, is_captured)

    def lower_bound_ms(self, plan: ParallelPlan, micro_batch: int, closely: bool = False, p95: bool = False) -> float:
        """Mean step time with one clock at a time, and without most of the pipeline's idle time: no estimate is shorter.
        closely: not far below it, for more work on the first plan of each schedule. p95: of the 95th percentile; 0 where that
        may be below the mean, of which a faster clock saves a part."""
        ways, accumulate = self._blocks(plan, micro_batch), self._accumulate(plan)
        layers, ends = self._chunk_layers(plan), self._ends(plan, micro_batch)
        starts = [*(part[0] for part in layers), layers[-1][-1] + 1]

        def of_chunks(clock):
            blocks = np.stack([getattr(way, clock) for way in ways])
            before = np.concatenate([np.zeros((*blocks.shape[:-1], 1)), blocks.cumsum(-1)], -1)
            each = np.diff(before[..., starts])
            each[1] += getattr(accumulate, clock)
            for chunk, end in ((0, ends[0]), (-1, ends[1])):
                each[..., chunk] += np.array([float(getattr(way, clock)) for way in end])[:, None, None]
            return each

        num_micro, device, way = self.num_micro_batches(plan, micro_batch), of_chunks("device"), None
        if closely and plan.pp > 1:
            played = num_played(plan.pp, num_micro, device.shape[2])
            way = one_way(plan.pp, plan.vpp, played, self.cluster.device == "cuda")
        least = least_makespan(
            plan.pp, plan.vpp, num_micro, device, None if self.is_captured(plan, micro_batch) else of_chunks("host"),
            self._hops(plan, micro_batch), way,
        )  # fmt: skip
        after, _ = self._after(plan)
        least_of_step = least_at_its_clock(self._wait_speedup)
        if p95 and least_of_step < 1 and len(least) > _FEW_SAMPLES:
            return 0.0
        ms = np.percentile(least, 95) if p95 else least.mean()
        return least_of_step * (float(ms) + after) * (1 - _ROUNDING)

    def estimate(self, plan: ParallelPlan, micro_batch: int, known: Memory | None = None) -> Estimate:
        """The whole prediction. `known`: its memory where that has been computed."""
        work = self.config.workload
        num_micro = self.num_micro_batches(plan, micro_batch)
        forward, backward = self._chunks(plan, micro_batch)
        pipeline = makespan(
            plan.pp, plan.vpp, num_micro, forward, backward, self._hops(plan, micro_batch),
            held=self.cluster.slow_links_gbytes_per_s > 0, queued=self.cluster.device == "cuda",
        )  # fmt: skip
        after, after_parts = self._after(plan)
        step = pipeline + after
        # what the busiest stage does, part by part; the rest of the pipeline's time it waits for its host, or for others
        places = range(plan.pp * plan.vpp)
        stages = [[chunk for chunk in places if chunk % plan.pp == stage] for stage in range(plan.pp)]
        busy = [float(fold(forward, [s]).then(fold(backward, [s[::-1]])).each.mean()) * num_micro for s in stages]
        stage = int(np.argmax(busy))
        parts = {name: ms * num_micro for name, ms in self._parts(plan, micro_batch, stages[stage]).items()}
        rest = max(float(pipeline.mean()) - sum(parts.values()), 0.0)
        launches = rest if plan.pp == 1 else min(max(busy[stage] - sum(parts.values()), 0.0), rest)
        parts |= {"launches and waits": launches} | after_parts
        if plan.pp > 1:
            parts["pipeline idle"] = rest - launches
        step = self._at_its_clock(step, parts, plan, micro_batch)
        return Estimate(
            plan, micro_batch, num_micro, step, parts, known or self.memory(plan, micro_batch),
            work.global_batch_size * self.config.model.seq_len,
        )  # fmt: skip

    @property
    def _wait_speedup(self) -> float:
        return self.primitives.facts.get("wait_speedup", 0.0) if self.primitives else 0.0

    def _at_its_clock(self, step: np.ndarray, parts: dict[str, float], plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """The step [S] at the clock that it has, changing `parts` likewise: a chip at its limit of power has for its products
        what it saves by waiting, for others or for links, in the mean of a step (bench.profiler: the profile knows by how
        much). Stores into the memory of others are no waiting."""
        is_busy = self.setting(plan, micro_batch).layer.dispatcher == "direct"
        waiting = [name for name in _WAITING if name in parts and not (is_busy and name == "exchange")]
        waited = sum(parts[name] for name in waiting) / float(step.mean())
        saved = {name: parts[name] * (1 - np.exp(-self._wait_speedup * waited)) for name in _PRODUCTS if name in parts}
        parts.update({name: parts[name] - ms for name, ms in saved.items()})
        return step - sum(saved.values())

    def layer_ms(self, plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """[S, M, L] forward + backward of the MoE layer alone, where the host is ahead of the device when it begins; it falls
        behind where it has to wait for the sizes of an exchange."""
        forward, backward = self.layer_times(plan, micro_batch).passes(self._sync_ms(plan, micro_batch))
        return forward.then(backward).device

    def layer_times(self, plan: ParallelPlan, micro_batch: int) -> LayerTimes:
        """The MoE layer's parts, each [S, M, L] or less. Needs primitives of the layer only."""
        setting = self.setting(plan, micro_batch)
        return self.once(
            ("layer", setting.tokens, plan.ep, setting.num_talking),
            lambda: layer_times(self.primitives, setting, self._copies(setting), self.order(plan.ep), self._host_share),
        )

    def rows(self, plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """[S, L, W] token copies that each rank of an expert group computes in a micro-batch."""
        return self._rows(self.setting(plan, micro_batch))

    # ------------------------------------------------------------------------------------------------------ its pieces

    def num_micro_batches(self, plan: ParallelPlan, micro_batch: int) -> int:
        return self.config.workload.global_batch_size // (micro_batch * plan.dp)

    def setting(self, plan: ParallelPlan, micro_batch: int) -> LayerSetting:
        config = self.config
        layer = config.layer
        if layer.dispatcher == "auto":
            near = plan.ep <= self.cluster.ranks_per_node and self.cluster.device == "cuda"
            near = near and not self.cluster.slow_links_gbytes_per_s
            layer = dataclasses.replace(layer, dispatcher="direct" if near else "basic")
        pace = tuple(self.primitives.facts.get("rank_pace", ())) if self.primitives else ()
        is_split = self.cluster.device == "cuda" and config.workload.dtype == "bfloat16"  # see ops.wide_linear
        knows_chips = len(pace) == plan.ep == self.cluster.num_ranks  # which rank has which, where there is one group
        return LayerSetting(
            model=config.model, gate=config.gate, layer=layer, tokens=micro_batch * config.model.seq_len // plan.tp,
            ep=plan.ep, stage_size=plan.stage_size, ranks_per_node=self.cluster.ranks_per_node,
            dtype_bytes=self.dtype_bytes, router_bytes=2 if is_split else 4, replica_slots=config.online.replica_slots,
            is_exact=config.online.replicate == "exact", pace=pace if knows_chips else (),
        )  # fmt: skip

    def is_captured(self, plan: ParallelPlan, micro_batch: int) -> bool:
        """Whether each pass of a micro-batch is launched as one CUDA graph, so that its launches cost nothing: the rule of
        smartmoe.graphs, which sees the layers (in other dtypes than bfloat16 the host loops over the experts)."""
        config, dispatcher = self.config, self.setting(plan, micro_batch).layer.dispatcher
        return (
            config.workload.cuda_graph == "auto" and self.cluster.device == "cuda"
            and (plan.pp == 1 or config.workload.zero < 2)
            and config.workload.dtype == "bfloat16" and dispatcher == "direct" and config.layer.experts == "grouped"
            and not config.online.return_early
        )  # fmt: skip

    def parameters(self, plan: ParallelPlan) -> list[Parameters]:
        """Of each chunk, on one rank."""
        key = ("parameters", plan.pp * plan.vpp, plan.tp, plan.ep)
        layers = self._chunk_layers(plan)
        return self.once_of_any(key, lambda: [chunk_parameters(self.config.model, plan, part) for part in layers])

    def order(self, ep: int) -> np.ndarray | None:
        """[S, M, L, E] logical expert of each slot, or None where experts stay in order."""
        if self._expert_of_slot is not None:
            return np.broadcast_to(self._expert_of_slot[:, None], self.loads.share.sum(2).shape)
        if ep == 1 or self.placement == "identity":
            return None
        if ep not in self._orders:
            share = self.loads.share
            load_SLE = share.sum(axis=(1, 2))
            start = Placement.identity(share.shape[-1], ep)
            flat = [solve_greedy(load_E, start).expert_of_slot for load_E in load_SLE.reshape(-1, share.shape[-1])]
            order = np.array(flat).reshape(load_SLE.shape)[:, None]
            self._orders[ep] = np.broadcast_to(order, (len(share), share.shape[1], *order.shape[2:]))
        return self._orders[ep]

    def _copies(self, setting: LayerSetting) -> np.ndarray:
        """[S, M, L, sources, E] token copies; sources are the ranks of an expert group, or one for all alike."""
        share = self.loads.share.transpose(0, 1, 3, 2, 4)
        if share.shape[3] > 1:
            share = share[:, :, :, np.arange(setting.ep) % share.shape[3]]
        return share * setting.copies

    def once(self, key: tuple, make):
        """What `make` returns, made once for this key: several plans share it."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def once_of_any(self, key: tuple, make):
        """The same of what depends on no loads."""
        if key not in self._known_of_any:
            self._known_of_any[key] = make()
        return self._known_of_any[key]

    def _rows(self, setting: LayerSetting) -> np.ndarray:
        """[S, L, W] rows of each rank; of the micro-batch with most rows in a sample."""
        return self.once(("rows", setting.tokens, setting.ep), lambda: self._count_rows(setting))

    def _count_rows(self, setting):
        copies, order = self._copies(setting), self.order(setting.ep)
        count = copies.sum(3) * (setting.ep if copies.shape[3] == 1 else 1)
        if self._host_share is not None:
            return (count[..., None, :] @ self._host_share)[..., 0, :].max(1)
        if order is not None:
            count = np.take_along_axis(count, order, -1)
        if setting.layer.dispatcher in EQUAL_BLOCKS:
            count = np.broadcast_to(copies.max((-2, -1), keepdims=True)[..., 0, :] * setting.ep, count.shape)
        rows = count.reshape(*count.shape[:-1], setting.ep, -1).sum(-1)
        return rows.max(1)

    def _layer(self, plan: ParallelPlan, micro_batch: int) -> _Layer:
        setting = self.setting(plan, micro_batch)
        key = (setting.tokens, plan.ep, plan.tp, setting.num_talking, micro_batch)
        if key not in self._layers:
            self._layers[key] = self._make_layer(plan, micro_batch, setting)
        return self._layers[key]

    def _make_layer(self, plan, micro_batch, setting) -> _Layer:
        times, sync_ms = self.layer_times(plan, micro_batch), self._sync_ms(plan, micro_batch)
        layer, attention, dense = times.passes(sync_ms), self._attention(plan, micro_batch), self._dense_mlp(plan, micro_batch)
        gathers = float(sum(work.device for work in self._gathers(plan, micro_batch)))  # of each pass of a half block
        halves = 1 if self.config.model.moe_every == 1 else 2
        parts = {"attention": sum(way.device for way in attention) - 2 * gathers, GATHERING: 2 * gathers}
        for way in (times.forward, times.backward):
            for name, value in way.items():
                name = {"counts": "exchange", "route": "permute"}.get(name, name)
                parts[name] = parts.get(name, 0.0) + value
        travel = times.forward.get("exchange", 0.0) + times.forward.get("counts", 0.0)
        again = {"exchange": travel, GATHERING: gathers}
        again["recomputation"] = times.forward_ms() + attention[0].device - travel - gathers
        ways = attention[0].then(dense[0]), dense[1].then(attention[1])
        dense_parts = {"attention": sum(way.device for way in (*attention, *dense)) - 2 * halves * gathers}
        dense_again = {"recomputation": ways[0].device - halves * gathers, GATHERING: halves * gathers}
        return _Layer(
            attention[0].then(layer[0]), layer[1].then(attention[1]), *ways, parts, again,
            dense_parts | {GATHERING: 2 * halves * gathers}, dense_again,
        )  # fmt: skip

    def _sync_ms(self, plan: ParallelPlan, micro_batch: int) -> float | None:
        """What the host waits for the sizes of an exchange, None where it does not have to."""
        has_sync = self.setting(plan, micro_batch).has_sync and self.cluster.device != "cpu"
        return float(self.primitives.ms("sync")) if has_sync else None

    def _attention(self, plan: ParallelPlan, micro_batch: int) -> tuple[Work, Work]:
        """Norms and attention of a block, forward and backward."""
        return self.once_of_any(("attention", micro_batch, plan.tp), lambda: self._make_attention(plan, micro_batch))

    def _make_attention(self, plan, micro_batch):
        model, tokens = self.config.model, self.setting(plan, micro_batch).tokens
        gathered, width = tokens * plan.tp, model.hidden_size
        pieces = [
            ("norm", dict(tokens=tokens, width=width)),
            ("linear", dict(tokens=gathered, inner=width, outer=3 * width / plan.tp)),
            ("attention", dict(samples=micro_batch, heads=model.num_heads / plan.tp, tokens=model.seq_len,
                               head_dim=width / model.num_heads)),
            ("linear", dict(tokens=gathered, inner=width / plan.tp, outer=width)),
        ]  # fmt: skip
        return self._both_ways(pieces, plan, micro_batch)

    def _dense_mlp(self, plan: ParallelPlan, micro_batch: int) -> tuple[Work, Work]:
        return self.once_of_any(("dense", micro_batch, plan.tp), lambda: self._make_dense_mlp(plan, micro_batch))

    def _make_dense_mlp(self, plan, micro_batch):
        model, gathered = self.config.model, self.setting(plan, micro_batch).tokens * plan.tp
        if model.moe_every == 1:
            return Work.nothing(), Work.nothing()
        inner = model.ffn_size / plan.tp
        pieces = [
            ("linear", dict(tokens=gathered, inner=model.hidden_size, outer=inner)),
            ("norm", dict(tokens=gathered / 2, width=inner)),  # its activation: as many passes as a half of the norms
            ("linear", dict(tokens=gathered, inner=inner, outer=model.hidden_size)),
        ]
        return self._both_ways(pieces, plan, micro_batch)

    def _piece(self, name: str, **sizes) -> Work:
        return Work.piece(self.primitives.ms(name, **sizes), self.primitives.host_ms(name, **sizes))

    def _both_ways(self, pieces, plan, micro_batch) -> tuple[Work, Work]:
        """Pieces in turn and, with tensor parallelism, what gathers their input and scatters their output; parts of a sequence
        lie rank by rank there, and sample by sample here."""
        ways = self._there_and_back(pieces)
        if plan.tp == 1:
            return ways
        gather, scatter = self._gathers(plan, micro_batch)
        copy = self._piece("by_sample", numel=self._gathered_numel(plan, micro_batch))
        return tuple(join([gather, copy, way, copy, scatter]) for way in ways)

    def _gathered_numel(self, plan: ParallelPlan, micro_batch: int) -> int:
        return self.setting(plan, micro_batch).tokens * plan.tp * self.config.model.hidden_size

    def _gathers(self, plan: ParallelPlan, micro_batch: int) -> tuple[Work, Work]:
        """What gathers the input of a half block and scatters its output, where tensor parallelism does."""
        if plan.tp == 1:
            return Work.nothing(), Work.nothing()
        num_bytes = self._gathered_numel(plan, micro_batch) * self.dtype_bytes
        spread = group_bytes(num_bytes, plan.tp, 1, self.cluster.ranks_per_node)
        launch = self.primitives.host_ms("all_gather", ranks=plan.tp, intra_bytes=0, inter_bytes=0)
        names = ("all_gather", "reduce_scatter")
        return tuple(Work.piece(exchange_ms(self.primitives, name, plan.tp, *spread), launch) for name in names)

    def _there_and_back(self, pieces: list[tuple[str, dict]]) -> tuple[Work, Work]:
        """Primitives with their sizes, forward in turn and backward the other way round."""
        forward, backward = (
            [self._piece(f"{name}_{way}", **sizes) for name, sizes in pieces] for way in ("forward", "backward")
        )
        return join(forward), join(backward[::-1])

    def _chunk_layers(self, plan: ParallelPlan) -> list[range]:
        num_chunks = plan.pp * plan.vpp
        return self.once_of_any(("layers", num_chunks), lambda: chunk_layers(self.config.model.num_layers, num_chunks))

    def _blocks(self, plan: ParallelPlan, micro_batch: int) -> tuple[Work, Work]:
        """(forward, backward) [S, M, layers] of every block of the model; backward with recomputation where the plan says."""
        setting = self.setting(plan, micro_batch)
        key = ("blocks", setting.tokens, plan.ep, plan.tp, setting.num_talking, micro_batch, plan.recompute)
        return self.once(key, lambda: self._make_blocks(plan, micro_batch))

    def _make_blocks(self, plan, micro_batch):
        model, layer = self.config.model, self._layer(plan, micro_batch)
        idxs = np.array([has_experts(model, idx) for idx in range(model.num_layers)])
        shape = np.broadcast_shapes(*(ms.shape for ms in vars(layer.forward).values()))

        def of_all(with_experts, dense):
            blocks = np.empty((*shape[:2], model.num_layers))
            blocks[..., idxs], blocks[..., ~idxs] = with_experts, np.asarray(dense)
            return blocks

        forward, backward = (
            Work(*map(of_all, vars(experts).values(), vars(dense).values()))
            for experts, dense in ((layer.forward, layer.dense_forward), (layer.backward, layer.dense_backward))
        )
        return forward, forward.then(backward) if plan.recompute else backward

    def _chunks(self, plan: ParallelPlan, micro_batch: int) -> tuple[Work, Work]:
        """(forward, backward) [S, M, C]."""
        blocks, layers = self._blocks(plan, micro_batch), self._chunk_layers(plan)
        forward = fold(blocks[0], [list(part) for part in layers])
        backward = fold(blocks[1], [list(part)[::-1] for part in layers])
        embedding, head = self._ends(plan, micro_batch)
        first, last = ([end.at(place, len(layers)) for end in ends] for place, ends in ((0, embedding), (-1, head)))
        message, is_captured = self._message(plan), self.is_captured(plan, micro_batch)
        passes = (
            join([message, first[0], forward, last[0]]),
            join([message, last[1], backward, first[1], self._accumulate(plan)]),
        )
        if not is_captured:
            return passes
        if plan.pp == 1:
            return tuple(Work.piece(way.device) for way in passes)
        launch = self.primitives.host_ms("launch")
        return tuple(message.then(Work.piece(way.device, num * launch)) for way, num in zip(passes, _PLAYED, strict=True))

    def _parts(self, plan: ParallelPlan, micro_batch: int, mine: list[int]) -> dict[str, float]:
        """Mean ms of the device for one micro-batch of the chunks `mine`, by part."""
        model, layer, chunks = self.config.model, self._layer(plan, micro_batch), self._chunk_layers(plan)
        idxs = [idx for chunk in mine for idx in chunks[chunk]]
        moe = [idx // model.moe_every for idx in idxs if has_experts(model, idx)]
        num_dense, shape = len(idxs) - len(moe), layer.forward.device.shape

        parts: dict[str, float] = {}
        for each, dense in ((layer.parts, layer.dense_parts), *(((layer.again, layer.dense_again),) if plan.recompute else ())):
            for name, ms in each.items():
                total = np.broadcast_to(ms, shape)[..., moe].mean((0, 1)).sum() + num_dense * dense.get(name, 0.0)
                if name != GATHERING or plan.tp > 1:
                    parts[name] = parts.get(name, 0.0) + float(total)
        ends = zip(self._ends(plan, micro_batch), (0, len(chunks) - 1), strict=True)
        parts["embedding and loss"] = float(sum(w.device for end, chunk in ends if chunk in mine for w in end))
        parts["accumulate"] = float(self._accumulate(plan).device[mine].sum())
        return parts

    def _message(self, plan: ParallelPlan) -> Work:
        """Launching what comes from and goes to neighbours, for each pass of a chunk."""
        if plan.pp == 1:
            return Work.nothing()
        return Work.piece(0.0, self.primitives.host_ms("point_to_point", ranks=2, intra_bytes=0, inter_bytes=0))

    def _accumulate(self, plan: ParallelPlan) -> Work:
        """[C] adding the gradients of a micro-batch up, apart from those that the products of experts add themselves, and
        bringing them to where they are added."""
        held = self.parameters(plan)
        if self.config.layer.experts == "grouped":
            held = [p.without_experts() for p in held]
        numel, tensors = (np.array([getattr(p, key) for p in held]) for key in ("total", "tensors"))
        key = ("accumulate", len(held), plan.tp, plan.ep)
        summed = self.once_of_any(key, lambda: self._piece("accumulate", numel=numel, tensors=tensors))
        if self.config.workload.zero < 2:
            return summed
        key = ("sharded", plan.pp, plan.vpp, plan.dp, plan.tp, plan.ep)
        return summed.then(self.once_of_any(key, lambda: self._make_sharded(plan)))

    def _make_sharded(self, plan: ParallelPlan) -> Work:
        """[C] what ZeRO-2 and 3 exchange for each micro-batch, beside what a chunk computes: it takes as long as it takes."""
        args = plan, self.dtype_bytes, self.config.workload.zero, self.config.online.replicate
        return Work.piece(np.array([self._ring_ms(pass_traffic(mine, *args)) for mine in self.parameters(plan)]))

    def _ends(self, plan: ParallelPlan, micro_batch: int) -> tuple[tuple[Work, Work], tuple[Work, Work]]:
        """(forward, backward) of the embedding, and of head and loss."""
        tokens = self.setting(plan, micro_batch).tokens
        return self.once_of_any(("ends", tokens), lambda: self._make_ends(tokens))

    def _make_ends(self, tokens):
        model = self.config.model
        embedding = [("embedding", dict(tokens=tokens, width=model.hidden_size, vocab=model.vocab_size))]
        head = [
            ("norm", dict(tokens=tokens / 2, width=model.hidden_size)),  # one of the two of a block
            ("linear", dict(tokens=tokens, inner=model.hidden_size, outer=model.vocab_size)),
            ("loss", dict(tokens=tokens, vocab=model.vocab_size)),
        ]
        return self._there_and_back(embedding), self._there_and_back(head)

    def _update_ms(self, parameters: Parameters) -> float:
        """The optimizer's step: the device's work, or the launches for so many tensors where these take longer."""
        launches = self.primitives.ms("optimizer_launches", tensors=parameters.tensors)
        return float(max(self.primitives.ms("optimizer", numel=parameters.total), launches))

    def _hops(self, plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """[C - 1] ms from chunk to chunk: activations and the sum of balance losses."""
        tokens = self.setting(plan, micro_batch).tokens
        return self.once_of_any(("hops", tokens, plan.pp, plan.vpp, plan.stage_size), lambda: self._make_hops(plan, tokens))

    def _make_hops(self, plan, tokens):
        num_bytes = tokens * self.config.model.hidden_size * self.dtype_bytes
        near = exchange_ms(self.primitives, "point_to_point", 2, num_bytes, 0.0)
        far = exchange_ms(self.primitives, "point_to_point", 2, 0.0, num_bytes)
        node = np.arange(plan.world_size).reshape(plan.pp, plan.stage_size) // self.cluster.ranks_per_node
        leaves = (node != np.roll(node, -1, 0)).any(1)[np.arange(plan.pp * plan.vpp - 1) % plan.pp]
        return np.where(leaves, float(far), float(near))

    def _ring_ms(self, traffic: list[tuple[float, int, int]]) -> float:
        """Exchanges one after the other, see planner.sharding; the unit is half an all-reduce."""
        rpn, total = self.cluster.ranks_per_node, 0.0
        for num_bytes, ranks, stride in traffic:
            spread = group_bytes(num_bytes, ranks, stride, rpn)
            total += float(exchange_ms(self.primitives, "all_reduce", ranks, *spread))
        return total

    def _after(self, plan: ParallelPlan) -> tuple[float, dict[str, float]]:
        """What comes after the pipeline: gradient reduction, optimizer, and the step's own small collectives."""
        key = ("after", plan.pp, plan.vpp, plan.dp, plan.tp, plan.ep)
        return self.once_of_any(key, lambda: self._make_after(plan))

    def _make_after(self, plan):
        worst, zero = None, self.config.workload.zero
        stages = {sum(self.parameters(plan)[stage :: plan.pp], Parameters()) for stage in range(plan.pp)}
        for mine in stages:
            reduce = self._ring_ms(step_traffic(mine, plan, self.dtype_bytes, zero, self.config.online.replicate))
            update = self._update_ms(mine.shared_out(plan) if zero else mine)
            if worst is None or reduce + update > sum(worst):
                worst = (reduce, update)
        parts = {"gradient reduction": worst[0], "optimizer": worst[1]}
        small = 0.0
        if plan.world_size > 1:
            small = 2 * self._ring_ms([(2 * 8 * 64, plan.world_size, 1)])
        parts["step"] = small + self.primitives.facts.get("step_ms", 0.0)
        return sum(parts.values()), parts
