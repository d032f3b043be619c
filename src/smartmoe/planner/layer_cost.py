"""Time of one MoE layer under given routing loads, part by part.

Axes: W ranks of an expert-parallel group, S source ranks (W, or 1 when all sources are alike), E experts, N slots of the
group (W * slots a rank). Every time is that of the slowest rank: all ranks meet at each exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smartmoe.config import EQUAL_BLOCKS, OVERLAP_DEGREES, GateConfig, LayerConfig, ModelConfig
from smartmoe.planner.primitives import Primitives, expert_sizes
from smartmoe.planner.timeline import Work, join

# Gates that reduce statistics over the stage in every forward pass, when their scope is global.
_TALKING_GATES = ("noisy", "switch", "gshard", "faster", "swipe")
NO_SYNC = ("direct",)


@dataclass(frozen=True, kw_only=True)
class LayerSetting:
    """What a layer's time depends on besides the loads. tokens: of one rank in one micro-batch; ep ranks share the
    experts; stage_size ranks take part in global gates; dtype_bytes: of activations, router_bytes: of a router's input."""

    model: ModelConfig
    gate: GateConfig
    layer: LayerConfig
    tokens: int
    ep: int
    stage_size: int
    ranks_per_node: int
    dtype_bytes: int
    router_bytes: int = 4
    replica_slots: int = 0
    is_exact: bool = False  # replicas are of each micro-batch, not of a whole step
    pace: tuple[float, ...] = ()  # of each rank, times over the slowest one's; empty = all alike

    @property
    def copies(self) -> int:
        return self.tokens * self.model.top_k

    @property
    def inner(self) -> int:
        """Widths of an expert's two products together: flops = 2 * rows * hidden_size * inner."""
        return self.model.ffn_size * (3 if self.model.activation == "swiglu" else 2)

    @property
    def num_talking(self) -> int:
        """Ranks over which the gate adds up its statistics in every forward pass; 1 = each keeps its own."""
        talks = self.gate.capacity is not None or self.gate.kind in _TALKING_GATES
        return self.stage_size if talks and self.gate.scope == "global" else 1

    @property
    def has_sync(self) -> bool:
        """Whether the host waits for the device in every forward pass."""
        bounded = self.layer.dispatcher in EQUAL_BLOCKS and self.gate.capacity is not None and self.gate.scope == "local"
        return self.layer.dispatcher not in NO_SYNC and not bounded


@dataclass(frozen=True)
class LayerTimes:
    """Device times [...] in ms by part, and the host's launch times of the same parts, forward and backward."""

    forward: dict[str, np.ndarray]
    backward: dict[str, np.ndarray]
    host_forward: dict[str, float]
    host_backward: dict[str, float]

    def passes(self, sync_ms: float | None) -> tuple[Work, Work]:
        """(forward, backward) as the two clocks see them. sync_ms: what the host waits until it knows the sizes of an
        exchange, None where it does not ask for them."""
        half = {"route": 0.5, "exchange": 0.5}  # before the experts, and behind them
        around = ("route", "exchange", "experts", "exchange", "route")
        found = []
        for times, launches, names in (
            (self.forward, self.host_forward, ("gate", "counts", "sync", *around)),
            (self.backward, self.host_backward, (*around, "gate")),
        ):
            pieces = []
            for name in names:
                if name == "sync" and sync_ms is not None:
                    pieces.append(Work.wait(sync_ms))
                elif name in times:
                    part = half.get(name, 1.0)
                    pieces.append(Work.piece(part * times[name], part * launches.get(name, 0.0)))
            found.append(join(pieces))
        return found[0], found[1]

    def forward_ms(self) -> np.ndarray:
        return sum(self.forward.values())

    def backward_ms(self) -> np.ndarray:
        return sum(self.backward.values())


def layer_times(
    primitives: Primitives,
    setting: LayerSetting,
    copies: np.ndarray,
    expert_of_slot: np.ndarray | None = None,
    host_share: np.ndarray | None = None,
) -> LayerTimes:
    """Times of the layer.

    copies: [..., S, E] token copies that a source rank has for each expert. expert_of_slot: [..., E] logical expert of
    each slot of the group in order (ranks have equally many); None = experts in order. host_share: [..., E, W] in its
    place where experts have replicas: the fraction of an expert's copies that each rank computes.
    """
    if host_share is not None:
        per_source = copies.sum(-2)[..., None] * host_share  # [..., E, W]
        scale = setting.ep if copies.shape[-2] == 1 else 1
        travel = per_source.sum(-2)[..., None, :] if scale > 1 else copies @ host_share
        return _times(primitives, setting, travel, scale * np.swapaxes(per_source, -1, -2))
    if expert_of_slot is not None:
        order = np.broadcast_to(expert_of_slot[..., None, :], copies.shape)
        copies = np.take_along_axis(copies, order, -1)
    num_sources = copies.shape[-2]
    sent = copies.reshape(*copies.shape[:-1], setting.ep, -1)  # [..., S, W, slots]
    count = sent.sum(-3) * (setting.ep if num_sources == 1 else 1)  # [..., W, slots]
    if setting.layer.dispatcher in EQUAL_BLOCKS:
        return _padded(primitives, setting, sent, count)
    return _times(primitives, setting, sent.sum(-1), count)


def _padded(primitives, setting, sent, count):
    """Every slot gets a buffer as large as the fullest of any source and slot."""
    fullest = np.maximum(sent.max((-3, -2, -1)), 1.0)
    slots = count.shape[-1]
    travel = np.broadcast_to(fullest[..., None, None] * slots, (*fullest.shape, 1, setting.ep))
    rows = np.broadcast_to(fullest[..., None, None] * setting.ep, count.shape)
    return _times(primitives, setting, travel, rows)


def _times(primitives, setting, travel, count):
    model, layer = setting.model, setting.layer
    ways = ("forward", "backward")
    parts = {way: {} for way in ways}
    host = {way: {} for way in ways}
    gate = "gate_limited" if setting.gate.capacity is not None else "gate"
    experts = "experts_loop" if layer.experts == "loop" else "experts"
    sizes = dict(tokens=setting.tokens, width=model.hidden_size, experts=model.num_experts, top_k=model.top_k)
    work = expert_sizes(count, model.hidden_size, setting.inner, primitives.facts.get("processors", 0))
    rows = work["rows"]
    kept = travel.sum(-1).mean(-1)  # copies that a rank sends
    work |= dict(
        slots=min(count.shape[-1], model.num_experts // setting.ep + setting.replica_slots),
        width=model.hidden_size,
        ffn=setting.inner,
    )
    pace = _paces(primitives, setting, experts, work)
    for way in ways:
        part = parts[way]
        part["gate"] = primitives.ms(f"{gate}_{way}", **sizes) + np.zeros(rows.shape[:-1])
        host[way]["gate"] = float(primitives.host_ms(f"{gate}_{way}", **sizes))
        part["experts"] = primitives.slowest_ms(f"{experts}_{way}", pace, **work)
        idle = {**work, "rows": 0, "padded_rows": 0, "active": 0, "deep_rows": 0}
        host[way]["experts"] = float(primitives.host_ms(f"{experts}_{way}", **idle))
        if layer.dispatcher == "direct":
            size = dict(tokens=setting.tokens, copies=rows.max(-1), width=model.hidden_size, ranks=setting.ep)
            part["exchange"] = primitives.ms(f"direct_{way}", **size, off_bytes=_direct_bytes(setting, travel))
            host[way]["exchange"] = float(primitives.host_ms(f"direct_{way}", **{**size, "copies": 0}, off_bytes=0))
            continue
        # rows are put in order twice: those sent, and those received
        moved = dict(tokens=setting.tokens, copies=0.5 * (kept + rows.max(-1)), width=model.hidden_size)
        part["route"] = primitives.ms(f"route_{way}", **moved)
        host[way]["route"] = float(primitives.host_ms(f"route_{way}", **{**moved, "copies": 0}))
        if setting.ep > 1:
            intra, inter = busiest_bytes(travel, setting)
            once = exchange_ms(primitives, "all_to_all", setting.ep, intra, inter)
            part["exchange"] = 2 * once
            launch = float(primitives.host_ms("all_to_all", ranks=setting.ep, intra_bytes=0, inter_bytes=0))
            host[way]["exchange"] = 2 * launch
            if layer.dispatcher == "overlapped":
                both = _overlapped(once, part["experts"], min(layer.overlap_groups, setting.ep))
                part["exchange"] = np.maximum(both - part["experts"], 0.0)
            if layer.dispatcher == "pipelined":  # tried out, or asked for
                degrees = [layer.overlap_degree] if layer.overlap_degree else OVERLAP_DEGREES[1:]
                both = np.minimum.reduce([_overlapped(once, part["experts"], degree) for degree in degrees])
                part["exchange"] = np.maximum(both - part["experts"], 0.0)
    if setting.ep > 1 and layer.dispatcher in ("basic", "overlapped"):
        parts["forward"]["counts"] = exchange_ms(primitives, "all_to_all", setting.ep, 8.0 * model.num_experts, 0.0)
    if setting.num_talking > 1:
        num_bytes = 8.0 * model.num_experts * model.top_k
        spread = group_bytes(2 * num_bytes, setting.num_talking, 1, setting.ranks_per_node)
        parts["forward"]["gate"] = parts["forward"]["gate"] + exchange_ms(
            primitives, "all_reduce", setting.num_talking, *spread
        )
    return LayerTimes(parts["forward"], parts["backward"], host["forward"], host["backward"])


def _paces(primitives, setting, experts, work):
    """Of each rank, over the slowest chip when it never waits: chips differ, and one that waits for fuller ranks, in the mean
    of all loads, has power left for a higher clock (bench.profiler.rank_pace)."""
    speedup = primitives.facts.get("wait_speedup", 0.0)
    if not setting.pace or not speedup:
        return setting.pace or 1.0
    own = sum(primitives.ms(f"{experts}_{way}", **work) for way in ("forward", "backward"))
    wait_W = (1 - own / own.max(-1, keepdims=True)).reshape(-1, setting.ep).mean(0)
    return np.array(setting.pace) * np.exp(-speedup * wait_W)


def exchange_ms(primitives: Primitives, name: str, ranks: int, intra_bytes, inter_bytes) -> np.ndarray:
    """Time of a collective whose busiest rank sends or receives so many bytes inside its node, and across nodes."""
    ms = primitives.ms(name, ranks=ranks, intra_bytes=intra_bytes, inter_bytes=inter_bytes)
    return ms + np.where(np.asarray(inter_bytes) > 0, primitives.facts.get("inter_latency_ms", 0.0), 0.0)


def busiest_bytes(travel: np.ndarray, setting: LayerSetting) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the busiest direction of an exchange, (inside nodes, across nodes), each [...].

    Inside a node each rank has its own link. What leaves or enters a node goes over links that its ranks share evenly:
    the busiest node's bytes over the group's ranks in it. travel: [..., S, W] rows from each source to each rank; S = 1
    when all sources are alike.
    """
    node_W = np.arange(setting.ep) // setting.ranks_per_node
    on_node_WN = (node_W[:, None] == np.arange(node_W[-1] + 1)).astype(float)
    row_bytes = setting.model.hidden_size * setting.dtype_bytes
    alike = travel.shape[-2] == 1
    to_WN = travel @ on_node_WN  # [..., S, N] from each source to each node
    if alike:
        # from one source to its own node, itself left out, and from its node's others to each rank
        own = travel[..., 0, :]
        same = to_WN[..., 0, node_W]
        near = np.maximum((same - own).max(-1), (own * (on_node_WN.sum(0)[node_W] - 1)).max(-1))
    else:
        mine_W = np.einsum("...ww->...w", travel)
        node_WW = (node_W[:, None] == node_W[None]).astype(float)
        inside = travel * node_WW
        near = np.maximum((inside.sum(-1) - mine_W).max(-1), (inside.sum(-2) - mine_W).max(-1))
    if node_W[-1] == 0:
        return near * row_bytes, np.zeros_like(near)
    ranks_N = on_node_WN.sum(0)
    between = ranks_N[:, None] * to_WN if alike else np.swapaxes(on_node_WN, 0, 1) @ to_WN  # [..., N, N]
    stay = np.einsum("...nn->...n", between)
    far = np.maximum((between.sum(-1) - stay) / ranks_N, (between.sum(-2) - stay) / ranks_N).max(-1)
    return near * row_bytes, far * row_bytes


def group_bytes(num_bytes: float, ranks: int, stride: int, ranks_per_node: int) -> tuple[float, float]:
    """(intra, inter) bytes of the busiest link when each rank passes `num_bytes` around a ring of `ranks` ranks that
    are `stride` apart; links between nodes are shared by the group's ranks of a node."""
    passed = num_bytes * (ranks - 1) / ranks
    near = max(1, min(ranks, ranks_per_node // stride))
    return (passed if near > 1 else 0.0), (passed / near if near < ranks else 0.0)


def _direct_bytes(setting, travel):
    """A token goes once to each other rank that hosts some of its experts: expected number of them, choices taken as
    independent."""
    share = travel / max(setting.copies, 1)
    ranks_of_token = 1 - (1 - np.minimum(share, 1.0)) ** setting.model.top_k
    return sum(busiest_bytes(ranks_of_token * setting.tokens, setting))


def _overlapped(once, experts, num_groups):
    """Exchange and computation in `num_groups` steps: all sends first, then each step is computed as it arrives and its
    result sent back. Links carry one step at a time."""
    step, work = once / num_groups, experts / num_groups
    link, device = num_groups * step, np.zeros_like(step)
    for group in range(num_groups):
        device = np.maximum(device, (group + 1) * step) + work
        link = np.maximum(link, device) + step
    return link
