"""Time and memory of one training step of a plan, under a distribution of routing loads.

The step is put together from primitives: blocks of each pipeline stage, the schedule of micro-batches, gradient
reduction, optimizer. A block takes what the slower of host and device takes, because launches overlap with work; where
the dispatcher makes the host wait for sizes, what that costs is added. Everything is a distribution over the samples of
the loads. With `loads.uniform` the same code is a data-insensitive model.

Axes: S samples, M micro-batches, L MoE layers, C model chunks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from smartmoe.config import ClusterSpec, ParallelPlan, RunConfig
from smartmoe.placement import Placement
from smartmoe.planner import memory
from smartmoe.planner.layer_cost import LayerSetting, LayerTimes, exchange_ms, group_bytes, layer_times
from smartmoe.planner.loads import Loads
from smartmoe.planner.memory import Memory, Parameters, chunk_layers, chunk_parameters, has_experts
from smartmoe.planner.primitives import Primitives
from smartmoe.planner.schedule import makespan
from smartmoe.solvers import solve_greedy

PLACEMENTS = ("identity", "balanced")


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
    """What one setting's MoE layers cost, and what else repeats in each block."""

    times: LayerTimes
    forward: np.ndarray  # [S, M, L] ms of a block with experts
    backward: np.ndarray
    dense_forward: float
    dense_backward: float
    parts: dict[str, np.ndarray] = field(default_factory=dict)


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
        self._parameters: dict[tuple, list[Parameters]] = {}
        self._known: dict[tuple, object] = {}  # what several plans share

    # ------------------------------------------------------------------------------------------------------- one step

    def memory(self, plan: ParallelPlan, micro_batch: int) -> Memory:
        """Memory of the fullest stage of a plan."""
        setting = self.setting(plan, micro_batch)
        rows_SLW = self._rows(setting)
        return memory.estimate(
            plan, setting, micro_batch, self.num_micro_batches(plan, micro_batch), rows_SLW, self.parameters(plan),
            self.config.workload.zero,
        )  # fmt: skip

    def lower_bound_ms(self, plan: ParallelPlan, micro_batch: int) -> float:
        """Mean step time without the pipeline's idle time: no schedule can be shorter."""
        forward, backward, _ = self._chunks(plan, micro_batch)
        busy = (forward + backward).mean(1)
        per_stage = busy.reshape(len(busy), plan.vpp, plan.pp).sum(1).max(1)
        after, _ = self._after(plan)
        return float(per_stage.mean()) * self.num_micro_batches(plan, micro_batch) + after

    def estimate(self, plan: ParallelPlan, micro_batch: int, known: Memory | None = None) -> Estimate:
        """The whole prediction. `known`: its memory where that has been computed."""
        work = self.config.workload
        num_micro = self.num_micro_batches(plan, micro_batch)
        forward, backward, parts = self._chunks(plan, micro_batch)
        pipeline = makespan(plan.pp, plan.vpp, num_micro, forward, backward, self._hops(plan, micro_batch))
        after, after_parts = self._after(plan)
        step = pipeline + after
        # what the busiest stage does, part by part; the rest of the pipeline's time is idle or p2p
        parts = {name: value * num_micro for name, value in parts.items()}
        idle = float(pipeline.mean()) - sum(parts.values())
        parts |= after_parts
        if plan.pp > 1:
            parts["pipeline idle"] = max(idle, 0.0)
        return Estimate(
            plan, micro_batch, num_micro, step, parts, known or self.memory(plan, micro_batch),
            work.global_batch_size * self.config.model.seq_len,
        )  # fmt: skip

    def layer_ms(self, plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """[S, M, L] forward + backward of the MoE layer alone, where the host is ahead of the device when it begins; it falls
        behind where it has to wait for the sizes of an exchange."""
        times, setting = self.layer_times(plan, micro_batch), self.setting(plan, micro_batch)
        if self.cluster.device == "cpu" or not setting.has_sync:
            return times.forward_ms() + times.backward_ms()
        before = times.forward["gate"] + times.forward.get("counts", 0.0) + float(self.primitives.ms("sync"))
        return before + times.behind_the_sync_ms()

    def layer_times(self, plan: ParallelPlan, micro_batch: int) -> LayerTimes:
        """The MoE layer's parts, each [S, M, L] or less. Needs primitives of the layer only."""
        setting = self.setting(plan, micro_batch)
        return self._once(
            ("layer", setting.tokens, plan.ep, plan.stage_size),
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
        return LayerSetting(
            model=config.model, gate=config.gate, layer=layer, tokens=micro_batch * config.model.seq_len // plan.tp,
            ep=plan.ep, stage_size=plan.stage_size, ranks_per_node=self.cluster.ranks_per_node,
            dtype_bytes=self.dtype_bytes, replica_slots=config.online.replica_slots,
            is_exact=config.online.replicate == "exact",
        )  # fmt: skip

    def parameters(self, plan: ParallelPlan) -> list[Parameters]:
        """Of each chunk, on one rank."""
        key = (plan.pp * plan.vpp, plan.tp, plan.ep)
        if key not in self._parameters:
            layers = chunk_layers(self.config.model.num_layers, plan.pp * plan.vpp)
            self._parameters[key] = [chunk_parameters(self.config.model, plan, part) for part in layers]
        return self._parameters[key]

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

    def _once(self, key: tuple, make):
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _rows(self, setting: LayerSetting) -> np.ndarray:
        """[S, L, W] rows of each rank; of the micro-batch with most rows in a sample."""
        return self._once(("rows", setting.tokens, setting.ep), lambda: self._count_rows(setting))

    def _count_rows(self, setting):
        copies, order = self._copies(setting), self.order(setting.ep)
        count = copies.sum(3) * (setting.ep if copies.shape[3] == 1 else 1)
        if self._host_share is not None:
            return (count[..., None, :] @ self._host_share)[..., 0, :].max(1)
        if order is not None:
            count = np.take_along_axis(count, order, -1)
        if setting.layer.dispatcher == "padded":
            count = np.broadcast_to(copies.max((-2, -1), keepdims=True)[..., 0, :] * setting.ep, count.shape)
        rows = count.reshape(*count.shape[:-1], setting.ep, -1).sum(-1)
        return rows.max(1)

    def _layer(self, plan: ParallelPlan, micro_batch: int) -> _Layer:
        setting = self.setting(plan, micro_batch)
        # Of the stage's size only whether the global gate talks, and over how many ranks, matters.
        key = (setting.tokens, plan.ep, plan.tp, plan.stage_size, micro_batch)
        if key not in self._layers:
            self._layers[key] = self._make_layer(plan, micro_batch, setting)
        return self._layers[key]

    def _make_layer(self, plan, micro_batch, setting) -> _Layer:
        times = self.layer_times(plan, micro_batch)
        forward, backward, host_forward, host_backward = self._attention(plan, micro_batch, setting)
        sync = float(self.primitives.ms("sync")) if setting.has_sync and self.cluster.device != "cpu" else 0.0
        block_forward = np.maximum(times.forward_ms() + forward, times.host_forward_ms + host_forward) + sync
        block_backward = np.maximum(times.backward_ms() + backward, times.host_backward_ms + host_backward)
        dense = self._dense_mlp(plan, setting)
        parts = {"attention": np.full(1, forward + backward)}
        for way in (times.forward, times.backward):
            for name, value in way.items():
                name = {"counts": "exchange", "route": "permute"}.get(name, name)
                parts[name] = parts.get(name, 0.0) + value
        return _Layer(
            times, block_forward, block_backward,
            max(forward + dense[0], host_forward + dense[2]), max(backward + dense[1], host_backward + dense[3]), parts,
        )  # fmt: skip

    def _attention(self, plan, micro_batch, setting):
        """Norms and attention of a block: (forward, backward, host forward, host backward) in ms."""
        model, tokens = self.config.model, setting.tokens
        gathered, width = tokens * plan.tp, model.hidden_size
        pieces = [
            ("norm", dict(tokens=tokens, width=width)),
            ("linear", dict(tokens=gathered, inner=width, outer=3 * width / plan.tp)),
            ("linear", dict(tokens=gathered, inner=width / plan.tp, outer=width)),
            ("attention", dict(samples=micro_batch, heads=model.num_heads / plan.tp, tokens=model.seq_len,
                               head_dim=width / model.num_heads)),
        ]  # fmt: skip
        return self._sum(pieces, plan, setting, gathers=1)

    def _dense_mlp(self, plan, setting):
        model, gathered = self.config.model, setting.tokens * plan.tp
        if model.moe_every == 1:
            return 0.0, 0.0, 0.0, 0.0
        inner = model.ffn_size / plan.tp
        pieces = [
            ("linear", dict(tokens=gathered, inner=model.hidden_size, outer=inner)),
            ("linear", dict(tokens=gathered, inner=inner, outer=model.hidden_size)),
            ("norm", dict(tokens=gathered / 2, width=inner)),  # its activation: as many passes as a half of the norms
        ]
        return self._sum(pieces, plan, setting, gathers=1)

    def _sum(self, pieces, plan, setting, gathers):
        totals = [0.0, 0.0, 0.0, 0.0]
        for name, sizes in pieces:
            for way, key in enumerate((f"{name}_forward", f"{name}_backward")):
                totals[way] += float(self.primitives.ms(key, **sizes))
                totals[2 + way] += float(self.primitives.host_ms(key, **sizes))
        if plan.tp > 1:
            num_bytes = setting.tokens * plan.tp * self.config.model.hidden_size * self.dtype_bytes
            spread = group_bytes(num_bytes, plan.tp, 1, self.cluster.ranks_per_node)
            both = sum(exchange_ms(self.primitives, n, plan.tp, *spread) for n in ("all_gather", "reduce_scatter"))
            for way in range(2):
                totals[way] += gathers * float(both)
                totals[2 + way] += (
                    2
                    * gathers
                    * float(self.primitives.host_ms("all_gather", ranks=plan.tp, intra_bytes=0, inter_bytes=0))
                )
        return tuple(totals)

    def _chunks(self, plan: ParallelPlan, micro_batch: int):
        """(forward [S, M, C], backward [S, M, C], mean parts of the busiest stage for one micro-batch)."""
        model, setting, layer = self.config.model, self.setting(plan, micro_batch), self._layer(plan, micro_batch)
        num_chunks = plan.pp * plan.vpp
        chunks = chunk_layers(model.num_layers, num_chunks)
        moe_before = np.cumsum([0, *(has_experts(model, idx) for idx in range(model.num_layers))])
        edges = np.array([[part[0], part[-1] + 1] for part in chunks])
        moe_edges = moe_before[edges]

        def over_chunks(values_SML):
            total = np.concatenate([np.zeros((*values_SML.shape[:2], 1)), values_SML.cumsum(2)], 2)
            return total[:, :, moe_edges[:, 1]] - total[:, :, moe_edges[:, 0]]

        num_dense = (edges[:, 1] - edges[:, 0]) - (moe_edges[:, 1] - moe_edges[:, 0])
        forward = over_chunks(layer.forward) + num_dense * layer.dense_forward
        backward = over_chunks(layer.backward) + num_dense * layer.dense_backward
        if plan.recompute:
            backward = backward + forward
        held = self.parameters(plan)
        accumulate = self._once(
            ("accumulate", num_chunks, plan.tp, plan.ep),
            lambda: np.array([self._state_ms("accumulate", p) for p in held]),
        )
        ends = self._once(("ends", setting.tokens), lambda: self._ends(setting))
        for chunk, (there, back) in ((0, ends[0]), (-1, ends[1])):
            forward[:, :, chunk] += there
            backward[:, :, chunk] += back
        backward = backward + accumulate
        busy = (forward + backward).mean((0, 1)).reshape(plan.vpp, plan.pp).sum(0)
        stage = int(busy.argmax())
        mine = [stage + turn * plan.pp for turn in range(plan.vpp)]
        parts = self._parts(plan, layer, mine, over_chunks, num_dense, accumulate, ends, float(busy[stage]))
        return forward, backward, parts

    def _parts(self, plan, layer, mine, over_chunks, num_dense, accumulate, ends, busy):
        """Mean ms of the parts of one micro-batch on the busiest stage; they add up to `busy`."""
        parts = {}
        for name, value in layer.parts.items():
            full = np.broadcast_to(value, layer.forward.shape) if np.ndim(value) < 3 else value
            parts[name] = float(over_chunks(full).mean((0, 1))[mine].sum())
        dense = layer.dense_forward + layer.dense_backward
        parts["attention"] += float(num_dense[mine].sum() * dense)
        parts["accumulate"] = float(accumulate[mine].sum())
        last = plan.pp * plan.vpp - 1
        parts["embedding and loss"] = float(sum(ends[0]) * (0 in mine) + sum(ends[1]) * (last in mine))
        if plan.recompute:
            parts["recomputation"] = float(over_chunks(layer.forward).mean((0, 1))[mine].sum())
            parts["recomputation"] += float(num_dense[mine].sum() * layer.dense_forward)
        parts["launches and waits"] = max(busy - sum(parts.values()), 0.0)
        return parts

    def _ends(self, setting):
        """(forward, backward) ms of the embedding, and of head and loss."""
        model, ms = self.config.model, self.primitives.ms
        ends = []
        for pieces in (
            [("embedding", dict(tokens=setting.tokens, width=model.hidden_size, vocab=model.vocab_size))],
            [
                ("norm", dict(tokens=setting.tokens / 2, width=model.hidden_size)),  # one of the two of a block
                ("linear", dict(tokens=setting.tokens, inner=model.hidden_size, outer=model.vocab_size)),
                ("loss", dict(tokens=setting.tokens, vocab=model.vocab_size)),
            ],
        ):
            sums = [
                sum(float(ms(f"{name}_{way}", **sizes)) for name, sizes in pieces) for way in ("forward", "backward")
            ]
            ends.append(tuple(sums))
        return ends

    def _state_ms(self, name: str, parameters: Parameters) -> float:
        sizes = dict(numel=parameters.total, tensors=parameters.tensors)
        return float(max(self.primitives.ms(name, **sizes), self.primitives.host_ms(name, **sizes)))

    def _hops(self, plan: ParallelPlan, micro_batch: int) -> np.ndarray:
        """[C - 1] ms from chunk to chunk: activations and the sum of balance losses."""
        num_chunks, setting = plan.pp * plan.vpp, self.setting(plan, micro_batch)
        if num_chunks == 1:
            return np.zeros(0)
        num_bytes = setting.tokens * self.config.model.hidden_size * self.dtype_bytes
        near = exchange_ms(self.primitives, "point_to_point", 2, num_bytes, 0.0)
        far = exchange_ms(self.primitives, "point_to_point", 2, 0.0, num_bytes)
        rank = np.arange(plan.world_size).reshape(plan.pp, plan.stage_size)
        node = rank // self.cluster.ranks_per_node
        leaves = [(node[c % plan.pp] != node[(c + 1) % plan.pp]).any() for c in range(num_chunks - 1)]
        return np.where(leaves, float(far), float(near))

    def _after(self, plan: ParallelPlan) -> tuple[float, dict[str, float]]:
        """What comes after the pipeline: gradient reduction, optimizer, and the step's own small collectives."""
        key = ("after", plan.pp, plan.vpp, plan.dp, plan.tp, plan.ep)
        return self._once(key, lambda: self._make_after(plan))

    def _make_after(self, plan):
        rpn, worst, zero = self.cluster.ranks_per_node, None, self.config.workload.zero
        # numbers travel twice: summed float32 gradients, and with ZeRO-1 the weights that come of them
        width = 4 + self.dtype_bytes if zero else 2 * 4
        stages = {sum(self.parameters(plan)[stage :: plan.pp], Parameters()) for stage in range(plan.pp)}
        for mine in stages:
            reduce = 0.0
            for numel, ranks, stride in (
                (mine.dense, plan.stage_size, 1),
                (mine.tensor, plan.dp, plan.tp),
                (mine.expert, plan.expert_dp, plan.ep),
            ):
                if ranks > 1 and numel:
                    spread = group_bytes(width * numel, ranks, stride, rpn)
                    reduce += float(exchange_ms(self.primitives, "all_reduce", ranks, *spread))
            update = self._state_ms("optimizer", mine.shared_out(plan) if zero else mine)
            if worst is None or reduce + update > sum(worst):
                worst = (reduce, update)
        parts = {"gradient reduction": worst[0], "optimizer": worst[1]}
        small = 0.0
        if plan.world_size > 1:
            spread = group_bytes(2 * 8 * 64, plan.world_size, 1, rpn)
            small = 2 * float(exchange_ms(self.primitives, "all_reduce", plan.world_size, *spread))
        parts["step"] = small + self.primitives.facts.get("step_ms", 0.0)
        return sum(parts.values()), parts
