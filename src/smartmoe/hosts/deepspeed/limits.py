"""What the DeepSpeed host runs, and what it refuses before anything is started. Never imports torch."""

from __future__ import annotations

import math

from smartmoe.config import LayerConfig, RunConfig

MIN_CAPACITY = 4  # DeepSpeed's default: seats that an expert has at least
GATES = {"naive": (1, 2), "gshard": (2,), "switch": (1,)}  # and the top_k of each
PADDED = LayerConfig(dispatcher="padded", experts="loop")  # what SmartMoE's layer would call DeepSpeed's way
MAX_ZERO = 2


def problems(config: RunConfig) -> list[str]:
    """Why DeepSpeed's engine and MoE layer cannot do this run; each says how to mend it. Empty when they can."""
    plan, gate, work = config.plan, config.gate, config.workload
    found = []
    for key in ("pp", "vpp", "tp"):
        if getattr(plan, key) > 1:
            found.append(
                f"plan.{key} = {getattr(plan, key)}: this host runs data and expert parallelism (dp, ep) on one pipeline "
                f"stage: set plan.{key} = 1, or train it with another system"
            )
    if gate.kind not in GATES:
        found.append(f'gate.kind = "{gate.kind}" is not one that DeepSpeed\'s layer has: take {", ".join(GATES)}')
    elif config.model.top_k not in GATES[gate.kind]:
        found.append(
            f'model.top_k = {config.model.top_k} with gate.kind = "{gate.kind}": DeepSpeed routes with '
            f"top_k = {' or '.join(map(str, GATES[gate.kind]))} there"
        )
    if plan.dp > 1 and gate.scope == "global" and (gate.kind != "naive" or gate.capacity is not None):
        found.append('gate.scope = "global": DeepSpeed limits and balances each rank by itself: set gate.scope = "local"')
    if config.online.policy != "static" or config.online.replicate != "never":
        found.append(
            "online placement and copies need SmartMoE's layer: leave [online] out, or take system \"smartmoe\""
        )
    if config.layer not in (LayerConfig(), PADDED):
        found.append("[layer] is about SmartMoE's layer, and this host runs DeepSpeed's: leave it out")
    if plan.recompute and gate.kind == "gshard":
        found.append(
            'plan.recompute with gate.kind = "gshard": DeepSpeed draws second experts at random, and would draw others '
            'when it computes again: set plan.recompute = false, or gate.kind = "naive"'
        )
    if plan.recompute and gate.kind == "switch" and gate.capacity is not None:
        found.append(
            'plan.recompute with gate.kind = "switch": DeepSpeed drops tokens at random, and would drop others when it '
            "computes again: set plan.recompute = false"
        )
    if work.dtype == "float16" and not math.log2(max(work.initial_loss_scale, 1)).is_integer():
        found.append(f"workload.initial_loss_scale = {work.initial_loss_scale} must be a power of two for DeepSpeed")
    if work.dtype == "float16" and config.cluster.device == "cpu":
        found.append('workload.dtype = "float16" is for GPUs: take "float32" or "bfloat16" on a CPU')
    if work.dtype == "float16" and work.zero == 0:
        found.append(
            "workload.zero = 0 in float16: DeepSpeed 0.19.8 then updates otherwise than in float32 (losses 2 % off after "
            "five steps of a small model): set workload.zero = 1"
        )
    if not 0 <= work.zero <= MAX_ZERO:
        found.append(f"workload.zero = {work.zero}: DeepSpeed's MoE layers work with ZeRO stages 0, 1 and 2")
    if work.checkpoint_interval:
        found.append(
            "workload.checkpoint_interval: this host writes no checkpoints: set 0; a run that ends early starts anew"
        )
    for key in ("record_trace", "record_spans"):
        if getattr(config, key):
            found.append(f'{key} needs SmartMoE\'s layer: leave it out, or take system "padded" or another')
    return found
