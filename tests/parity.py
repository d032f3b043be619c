"""Run many plans in one world and compare each with the single-process run of the same configuration.

A run is compared loss by loss while its routing is the same. When routing differs in an iteration, the logits of the
first layer where it does must agree to rounding: then two experts were within rounding of each other, the run is compared
up to that iteration and the flip is reported. Otherwise the maths is wrong, and the comparison fails.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, ParallelPlan, RunConfig, Workload, check
from smartmoe.data import load_tokens
from smartmoe.mesh import build_mesh
from smartmoe.trainer import Trainer

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "smartmoe"
SAMPLES_PER_MICRO_BATCH = 4
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-5

MODEL = ModelConfig(
    name="tiny", num_layers=4, hidden_size=32, ffn_size=64, num_heads=4, seq_len=16, vocab_size=320, num_experts=8
)
WORKLOAD = Workload(iterations=10, lr=3e-3, seed=1)


@dataclass
class Curve:
    """Losses by iteration; routing[iteration][layer] = experts [tokens of the batch, top_k] sorted (-1 dropped), and
    logits[iteration][layer] [tokens of the batch, num_experts]."""

    loss: list[float] = field(default_factory=list)
    routing: list[dict[int, np.ndarray]] = field(default_factory=list)
    logits: list[dict[int, np.ndarray]] = field(default_factory=list)


def num_micro_batches(plan: ParallelPlan) -> int:
    """As few as accumulation and a pipeline's schedule need."""
    return max(2, plan.pp)


def make_config(plan: ParallelPlan | None = None, micro_batches: int | None = None, **changes) -> RunConfig:
    """A tiny run whose global micro-batches hold the same samples under every plan."""
    plan = plan or ParallelPlan()
    workload = dataclasses.replace(
        changes.pop("workload", WORKLOAD),
        micro_batch_size=SAMPLES_PER_MICRO_BATCH // plan.dp,
        global_batch_size=SAMPLES_PER_MICRO_BATCH * (micro_batches or num_micro_batches(plan)),
    )
    cluster = ClusterSpec(name="test", ranks_per_node=plan.world_size)
    config = RunConfig(**{"model": MODEL, "workload": workload, "plan": plan, "cluster": cluster, **changes})
    return check(config)


def make_trainer(config: RunConfig, device: str = "cpu") -> Trainer:
    tokens = load_tokens(config.workload.data, config.model.vocab_size, CACHE, seed=config.workload.seed)
    return Trainer(config, build_mesh(config.plan, torch.device(device)), tokens)


def run_curve(config: RunConfig, before_iteration=None, device: str = "cpu", num_iterations: int | None = None) -> Curve:
    """Train `config`, or its first `num_iterations`, and return its curve, on every rank the same.
    before_iteration(trainer, iteration) may interfere."""
    trainer = make_trainer(config, device)
    seen: dict[int, list] = {idx: [] for idx in trainer.layers}
    for idx, layer in trainer.layers.items():
        layer.gate.register_forward_hook(
            lambda gate, args, routing, idx=idx: seen[idx].append(_note(gate, args, routing))
        )
    curve = Curve()
    for iteration in range(num_iterations or config.workload.iterations):
        if before_iteration:
            before_iteration(trainer, iteration)
        for notes in seen.values():
            notes.clear()
        curve.loss.append(trainer.run_iteration().lm_loss)
        routing, logits = _merge(seen, config, iteration)
        curve.routing.append(routing)
        curve.logits.append(logits)
    return curve


@torch.no_grad()
def _note(gate, args, routing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x_TD, token_id_T = args[:2]
    chosen = np.sort(routing.expert_idx_TK.cpu().numpy(), axis=1)
    return token_id_T.cpu().numpy(), chosen, gate._logits(x_TD).float().cpu().numpy()


def _merge(seen: dict, config: RunConfig, iteration: int) -> tuple[dict, dict]:
    parts = [seen]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, seen)
    batch = config.workload.global_batch_size * config.model.seq_len
    routing, logits = {}, {}
    for layer in {layer for part in parts for layer in part}:
        routing[layer] = np.full((batch, config.model.top_k), -2)
        logits[layer] = np.full((batch, config.model.num_experts), np.nan, np.float32)
        for token_id, chosen, values in (note for part in parts for note in part.get(layer, [])):
            routing[layer][token_id - iteration * batch] = chosen
            logits[layer][token_id - iteration * batch] = values
    return routing, logits


def compare(
    curve: Curve,
    reference: Curve,
    label: str,
    loss_tolerance: float = LOSS_TOLERANCE,
    logit_tolerance: float = LOGIT_TOLERANCE,
) -> str:
    """Assert that `curve`, maybe shorter, follows `reference`; returns a report of a flipped near-tie, or ""."""
    assert 0 < len(curve.loss) <= len(reference.loss), label
    for iteration, (loss, wanted) in enumerate(zip(curve.loss, reference.loss, strict=False)):
        for layer, table in sorted(reference.routing[iteration].items()):
            flipped = np.flatnonzero((curve.routing[iteration][layer] != table).any(axis=1))
            if not len(flipped):
                continue
            off = np.abs(curve.logits[iteration][layer] - reference.logits[iteration][layer]).max()
            where = f"{label}: iteration {iteration} layer {layer}"
            report = f"{where} routes tokens {flipped[:4]} otherwise, logits within {off:.1e}"
            assert off <= logit_tolerance, report
            return report
        assert abs(loss - wanted) <= loss_tolerance * abs(wanted), (
            f"{label}: iteration {iteration}: {loss} not {wanted}"
        )
    return ""


def legal_plans(world_size: int) -> list[ParallelPlan]:
    """Every (pp, dp, tp, ep, expert-dp) of a world, without and with interleaving and recomputation."""
    plans = []
    for pp in range(1, world_size + 1):
        for tp in range(1, world_size + 1):
            if world_size % (pp * tp):
                continue
            dp = world_size // (pp * tp)
            for ep in range(1, dp * tp + 1):
                if (dp * tp) % ep == 0:
                    for vpp in (1, 2) if pp > 1 and 2 * pp <= MODEL.num_layers else (1,):
                        for recompute in (False, True):
                            plans.append(ParallelPlan(pp=pp, vpp=vpp, dp=dp, tp=tp, ep=ep, recompute=recompute))
    return plans


GATES = {
    "dropless": GateConfig(kind="naive"),
    "capacity": GateConfig(kind="gshard", capacity=1.0, scope="global", balance_weight=0.01),
}
