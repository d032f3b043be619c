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
    """How one system differs from the others. `scope` is that of gate statistics and capacity (see GateConfig)."""

    about: str
    layer: LayerConfig = LayerConfig()
    scope: str = "global"
    plan_given: bool = False
    online: bool = False
    unavailable: str = ""


# FastMoE launches one GEMM per expert, and so do FasterMoE and DeepSpeed's Experts: layer.experts = "loop". Alpa's row
# is, as in the paper, the plan that Alpa would take carried out by the same code as SmartMoE's: the two differ in the
# plan alone.
_LOOP = LayerConfig(dispatcher="basic", experts="loop")
_OURS = LayerConfig(dispatcher="basic", experts="grouped")

SYSTEMS: dict[str, System] = {
    "fastmoe": System(
        about="expert parallel over all ranks (dp = ep), blocking exchange; capacity is global as in upstream FastMoE",
        layer=_LOOP,
    ),
    "fastermoe": System(
        about="FastMoE's plan with exchange and computation overlapped in groups of ranks, and hot experts shadowed",
        layer=LayerConfig(dispatcher="overlapped", experts="loop", shadowing=True),
    ),
    "deepspeed": System(
        about="FastMoE's plan with padded expert buffers; each rank limits its own tokens; no drops without capacity",
        layer=LayerConfig(dispatcher="padded", experts="loop"),
        scope="local",
    ),
    "tutel": System(
        about="adaptive parallelism and pipelining of padded exchanges",
        unavailable="its adaptive switching of parallelism and pipelining degree is not built, and without it the "
        "numbers would not be Tutel's",
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
    cost, and with `replicate` makes copies as well). Raises ValueError when the system is unknown or not
    available, when something is missing or does not belong to it, and when sizes do not fit.
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
        layer=chosen.layer,
        online=online or OnlineConfig(),
        workload=workload,
        plan=plan,
        cluster=cluster,
        record_trace=record_trace,
        record_spans=record_spans,
    )
    return check(config, f'system "{system}"')


def get(system: str) -> System:
    """The entry of `system` in SYSTEMS. Raises ValueError when it is unknown or not available yet."""
    if system not in SYSTEMS:
        raise ValueError(f'unknown system "{system}"; known: {", ".join(SYSTEMS)}')
    if SYSTEMS[system].unavailable:
        raise ValueError(f'system "{system}" is not available yet: {SYSTEMS[system].unavailable}')
    return SYSTEMS[system]
