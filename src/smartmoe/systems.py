"""The systems under comparison: a name -> the complete RunConfig of one run of it.

Layer 1: never imports torch. All systems train the same model on the same data; they differ in the plan, in the
mechanism that carries tokens to experts, and in who moves experts while training.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
)


@dataclass(frozen=True, kw_only=True)
class System:
    """How one system differs from the others. `scope` is that of gate statistics and capacity (see GateConfig).

    `host`: who trains it, a name in smartmoe.hosts.HOSTS; "" is smartmoe.train. `zero`: its ZeRO stage where the workload
    asks for none. `artifact`: with the model and settings of the paper's artifact, which were not those of its other systems.
    """

    about: str
    layer: LayerConfig = LayerConfig()
    scope: str = "global"
    plan_given: bool = False
    online: bool = False
    host: str = ""
    zero: int = 0
    artifact: bool = False


# FastMoE launches one GEMM per expert, and so do FasterMoE and DeepSpeed's Experts: layer.experts = "loop". Alpa's row
# is, as in the paper, the plan that Alpa would take carried out by the same code as SmartMoE's: the two differ in the
# plan alone.
_LOOP = LayerConfig(dispatcher="basic", experts="loop")
_PADDED = LayerConfig(dispatcher="padded", experts="loop")
_TUTEL = LayerConfig(dispatcher="pipelined", experts="batched")
_OURS = LayerConfig(dispatcher="auto", experts="grouped")

SYSTEMS: dict[str, System] = {
    "fastmoe": System(
        about="expert parallel over all ranks (dp = ep), blocking exchange; capacity is global as in upstream FastMoE",
        layer=_LOOP,
    ),
    "fastermoe": System(
        about="FastMoE's plan with exchange and computation overlapped in groups of ranks, and hot experts shadowed",
        layer=LayerConfig(dispatcher="overlapped", experts="loop", shadowing=True),
    ),
    "padded": System(
        about="FastMoE's plan with padded expert buffers, DeepSpeed's way in our code; each rank limits its own tokens; no "
        "drops without capacity",
        layer=_PADDED,
        scope="local",
    ),
    "deepspeed": System(
        about="the package deepspeed: its engine with ZeRO-1 (or workload.zero) and its own MoE layer, on FastMoE's plan",
        layer=_PADDED,
        scope="local",
        host="deepspeed",
        zero=1,
    ),
    "deepspeed_artifact": System(
        about="the package deepspeed as the paper's artifact ran it: another model (top-1, experts twice as wide, in every "
        "second layer), one sample a micro-batch; with ZeRO-1, as fp16 without ZeRO goes wrong in it today",
        layer=_PADDED,
        scope="local",
        host="deepspeed",
        zero=1,
        artifact=True,
    ),
    "megatron": System(
        about="the package megatron-core: Megatron-LM's loop, distributed optimizer and own MoE layer, on FastMoE's plan",
        layer=_LOOP,
        scope="local",
        host="megatron",
        zero=1,
    ),
    "tutel": System(
        about="FastMoE's plan with Tutel's exchange in our code: equal buffers in 1 to 8 pieces that travel while batched "
        "experts compute, or weights that travel instead, whichever is fastest; each rank limits its own tokens",
        layer=_TUTEL,
        scope="local",
    ),
    "alpa": System(about="plan of a data-insensitive search (given), run by our layer", layer=_OURS, plan_given=True),
    "smartmoe_static": System(about="a skew-aware plan (given); experts stay in place", layer=_OURS, plan_given=True),
    "smartmoe": System(
        about="a skew-aware plan (given) and online expert placement", layer=_OURS, plan_given=True, online=True
    ),
}


def build(
    system: str,
    *,
    model: ModelConfig,
    gate: GateConfig,
    workload: Workload,
    cluster: ClusterSpec,
    plan: ParallelPlan | None = None,
    online: OnlineConfig | None = None,
    record_trace: bool = False,
    record_spans: bool = False,
) -> RunConfig:
    """The checked RunConfig of `system`.

    `plan` belongs to alpa, smartmoe_static and smartmoe; the others have their own (dp = ep = all ranks). `online`
    belongs to smartmoe (default: greedy, every 10 iterations, as in the paper; policy "auto" decides by measured time and
    cost, and with `replicate` makes copies as well). Raises ValueError when the system is unknown, when
    something is missing or does not belong to it, and when sizes do not fit.
    """
    chosen = get(system)
    if chosen.plan_given and plan is None:
        raise ValueError(f'system "{system}" needs a plan: give plan = {{ pp = .., dp = .., tp = .., ep = .. }}')
    fixed = ParallelPlan(dp=cluster.num_ranks, ep=cluster.num_ranks)
    if not chosen.plan_given:
        if plan is not None and dataclasses.replace(plan, recompute=False) != fixed:
            raise ValueError(
                f'system "{system}" has its own plan ({fixed.describe()}) and cannot run {plan.describe()}: '
                "leave the plan out"
            )
        plan = plan or fixed
    if chosen.online:
        online = online or OnlineConfig(policy="greedy", interval=10)
        if online.policy == "static":
            raise ValueError(f'system "{system}" moves experts online: for policy "static" take "smartmoe_static"')
    elif online is not None and online.policy != "static":
        raise ValueError(f'system "{system}" has no online placement: leave online out, or take system "smartmoe"')
    config = RunConfig(
        system=system,
        model=model,
        gate=dataclasses.replace(gate, scope=chosen.scope),
        layer=_room_for_any_routing(chosen.layer, plan),
        online=online or OnlineConfig(),
        workload=dataclasses.replace(workload, zero=workload.zero or chosen.zero),
        plan=plan,
        cluster=cluster,
        record_trace=record_trace,
        record_spans=record_spans,
    )
    return check(_as_in_artifact(config) if chosen.artifact else config, f'system "{system}"')


def _room_for_any_routing(layer: LayerConfig, plan: ParallelPlan) -> LayerConfig:
    """`layer` with buffers of the direct exchange that a rank which gets all rows does not overflow."""
    if layer.dispatcher != "auto":
        return layer
    return dataclasses.replace(layer, row_factor=max(layer.row_factor, float(plan.ep)))


def _as_in_artifact(config: RunConfig) -> RunConfig:
    """What the artifact's scripts (smartmoe-ae, 2023) gave DeepSpeed where they gave the other systems `config`: the defaults
    of its training script (top-1, experts of width 4 D, in every second layer), its own gate, micro-batches of one sample,
    a loss scale of 2^11 at first. ZeRO, which was off there, is not changed here."""
    model = dataclasses.replace(config.model, top_k=1, ffn_size=4 * config.model.hidden_size, moe_every=2)
    gate = dataclasses.replace(config.gate, kind="switch")
    workload = dataclasses.replace(config.workload, micro_batch_size=1, initial_loss_scale=2048.0)
    return dataclasses.replace(config, model=model, gate=gate, workload=workload)


def get(system: str) -> System:
    """The entry of `system` in SYSTEMS. Raises ValueError when it is unknown."""
    if system not in SYSTEMS:
        raise ValueError(f'unknown system "{system}"; known: {", ".join(SYSTEMS)}')
    return SYSTEMS[system]
