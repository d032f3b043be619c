"""Copies of hot experts in a plan: what they cost, and where they pay.

A plan's experts may have copies on other ranks (online.replicate), placed and weighed by the solver that training uses. What
they save is told by the cost model under the shares that the copies compute; what they cost is memory for the slots, and
sending weights and gradients, both in the training dtype, charged at full price: nothing of it is hidden behind computation.

Axes: S samples, M micro-batches, L MoE layers, E experts, W ranks of an expert group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from smartmoe.config import EQUAL_BLOCKS, ClusterSpec, RunConfig, expert_numel
from smartmoe.placement import Placement
from smartmoe.planner import pool
from smartmoe.planner.cost_model import CostModel, Estimate
from smartmoe.planner.layer_cost import LayerSetting, exchange_ms
from smartmoe.planner.loads import Loads
from smartmoe.planner.parameters import chunk_layers, has_experts
from smartmoe.planner.primitives import Primitives
from smartmoe.solvers import solve_replicas_layers

SLOTS = (1, 2, 4)  # numbers of replica slots that are tried
MOST_SHARES = 3e7  # numbers in the shares of all samples: beyond, copies are not tried
KEPT_SHARES = 3e6  # up to so many their model is kept, since many plans have the same
PART = "copies of experts"  # its name among an estimate's parts


def with_copies(cost: CostModel, estimate: Estimate, value=lambda e: e.mean_ms) -> Estimate:
    """The best of a plan without copies and with them, in any number of slots that is legal and fits in memory: the one with
    the least `value` of an estimate.

    Copies stay for a step ("history") where all micro-batches of the loads are alike, else they may also be of each
    micro-batch ("exact").
    """
    plan, shape = estimate.plan, cost.loads.share.shape
    too_many = shape[0] * shape[1] * shape[3] * shape[4] * plan.ep > MOST_SHARES
    if plan.ep == 1 or too_many or cost.config.layer.dispatcher in EQUAL_BLOCKS:
        return estimate
    modes = ("history", "exact") if shape[1] > 1 else ("history",)
    found = [_judge(cost, estimate, mode, slots) for mode in modes for slots in SLOTS]
    return min([estimate, *filter(None, found)], key=value)


def model_with_copies(cost: CostModel, estimate: Estimate) -> CostModel:
    """The cost model of an estimate that has copies, under the shares that they compute."""
    mode, slots = estimate.copies.split()
    return _model(cost, estimate, mode, int(slots))[0]


def _judge(cost: CostModel, estimate: Estimate, mode: str, slots: int) -> Estimate | None:
    """None where that many copies are not legal, or do not fit in memory."""
    model, extra_S = _model(cost, estimate, mode, slots)
    if model is None or not pool.fits(model, estimate.plan, estimate.micro_batch):
        return None
    found = model.estimate(estimate.plan, estimate.micro_batch)
    parts = {**found.parts, PART: float(extra_S.mean())}
    return dataclasses.replace(found, step_ms=found.step_ms + extra_S, parts=parts, copies=f"{mode} {slots}")


def _model(cost: CostModel, estimate: Estimate, mode: str, slots: int) -> tuple[CostModel | None, np.ndarray | None]:
    """(the cost model with these copies, [S] ms of a step that they take); (None, None) where they are not legal."""
    plan, micro_batch = estimate.plan, estimate.micro_batch
    online = dataclasses.replace(cost.config.online, policy="static", replicate=mode, replica_slots=slots)
    config = pool.config_of(dataclasses.replace(cost.config, online=online), cost.cluster, plan, micro_batch)
    if pool.why_illegal(config, cost.cluster, plan, micro_batch) is not None:
        return None, None
    exact = mode == "exact"
    costs = CopyCosts.of(config, cost.cluster, cost.primitives, cost.loads, estimate.num_micro_batches)
    load_SMLE = cost.loads.share.mean(2)
    load_SMLE = load_SMLE if exact else load_SMLE.mean(1, keepdims=True)
    per_copy = costs.tokens_per_copy(exact)

    def find():
        owners = cost.once(("owners", plan.ep, exact), lambda: _owners(cost, plan.ep, load_SMLE.shape))
        share, copies = replicate(load_SMLE.reshape(-1, *load_SMLE.shape[2:]), owners, slots, per_copy)
        model = cost.with_copies(config, share.reshape(*load_SMLE.shape, plan.ep))
        return model, copies.reshape(load_SMLE.shape[:3])

    is_small = load_SMLE.size * plan.ep <= KEPT_SHARES
    model, copies = cost.once(("copies", plan.ep, slots, exact, per_copy), find) if is_small else find()
    return model, costs.of_stages(copies, exact).max(1)


def _owners(cost: CostModel, ep: int, shape: tuple[int, ...]) -> list[Placement]:
    """Who owns the experts, for each sample, micro-batch and layer."""
    order = cost.order(ep)
    if order is None:
        return [Placement.identity(shape[-1], ep)] * int(np.prod(shape[:-1]))
    rows = np.broadcast_to(order[:, : shape[1]], shape).reshape(-1, shape[-1])
    return [Placement(ep, tuple(row)) for row in rows.tolist()]


def replicate(
    load_MLE: np.ndarray, placements: list[Placement], num_slots: int, copy_cost: float
) -> tuple[np.ndarray, np.ndarray]:
    """(host_share [M, L, E, W], most copies in or out of a rank [M, L]) for loads that are shares of a group's.

    placements: the owners, M * L of them. copy_cost: see CopyCosts.tokens_per_copy.
    """
    num_ranks, shape = placements[0].num_ranks, load_MLE.shape
    flat = load_MLE.reshape(-1, 1, shape[-1]) / num_ranks
    count = np.broadcast_to(flat, (len(flat), num_ranks, shape[-1]))
    found = solve_replicas_layers(count, placements, num_slots, copy_cost=copy_cost, local=False)
    share = np.stack([replicas.share_SEW[0] for replicas in found])
    owner_YE = np.stack([placement.rank_of_expert() for placement in placements])
    is_copy = share > 0
    np.put_along_axis(is_copy, owner_YE[..., None], False, -1)
    received = is_copy.sum(1).max(-1)
    pairs = zip(owner_YE, is_copy.sum(2), strict=True)
    sent = np.stack([np.bincount(owner, weights=each, minlength=num_ranks) for owner, each in pairs]).max(-1)
    return share.reshape(*shape, num_ranks), np.maximum(received, sent).reshape(shape[:2])


@dataclass(frozen=True)
class CopyCosts:
    """What moving experts costs in this run."""

    setting: LayerSetting
    primitives: Primitives
    stage_of: list[int]  # of each MoE layer
    num_stages: int
    numel: int  # parameters of one expert
    num_micro: int
    returns: int  # how often in a step gradients of copies that stay for it come back

    @classmethod
    def of(
        cls, config: RunConfig, cluster: ClusterSpec, primitives: Primitives, loads: Loads, num_micro: int
    ) -> CopyCosts:
        plan = config.plan
        setting = CostModel(config, cluster, primitives, loads).setting(plan, config.workload.micro_batch_size)
        # as replicas.build_replication has it: kernels return them in every backward pass, collectives gather them first
        has_kernels = setting.layer.dispatcher == "direct" and cluster.device == "cuda" and plan.ep <= cluster.ranks_per_node
        returns = num_micro if has_kernels else 1
        return cls(setting, primitives, _stage_of_layers(config), plan.pp, expert_numel(config.model), num_micro, returns)

    @property
    def state_bytes(self) -> int:
        """Of one expert that changes its owner: weights, masters, two moments."""
        width = self.setting.dtype_bytes
        return self.numel * (12 + (width if width < 4 else 0))

    def copy_ms(self, num_copies: np.ndarray, exact: bool) -> np.ndarray:
        """Replicas through the busiest rank: for a step their weights there once, and gradients back as often as they return;
        when decided for each micro-batch, for one of these weights there, once more before its backward, and gradients back."""
        size = num_copies * self.numel * self.setting.dtype_bytes
        near = self.setting.ep <= self.setting.ranks_per_node
        journeys = ((3 * size, 1),) if exact else ((2 * size, 1), (size, self.returns - 1))
        ms = sum(
            times * exchange_ms(self.primitives, "all_to_all", self.setting.ep, num_bytes * near, num_bytes * (not near))
            for num_bytes, times in journeys
            if times
        )
        return np.where(num_copies > 0, ms, 0.0)

    def of_stages(self, copies_SML: np.ndarray, exact: bool) -> np.ndarray:
        """[S, stages] ms of a step for copies_SML copies through the busiest rank; M = 1 where they are the same for a
        step's micro-batches, or like one another."""
        ms_SML = self.copy_ms(copies_SML, exact)
        times = self.num_micro / copies_SML.shape[1] if exact else 1.0
        cost_SP = np.zeros((len(copies_SML), self.num_stages))
        for layer, stage in enumerate(self.stage_of):
            cost_SP[:, stage] += ms_SML[:, :, layer].sum(1) * times
        return cost_SP

    def tokens_per_copy(self, exact: bool) -> float:
        """Of all token copies of a group's micro-batch, the fraction that is computed while one copy is sent."""
        model, rows = self.setting.model, float(self.setting.copies)
        sizes = dict(active=1, slots=1, width=model.hidden_size, ffn=self.setting.inner)
        row_ms = sum(
            float(self.primitives.ms(f"experts_{way}", rows=2 * rows, padded_rows=2 * rows, deep_rows=2 * rows, **sizes))
            - float(self.primitives.ms(f"experts_{way}", rows=rows, padded_rows=rows, deep_rows=rows, **sizes))
            for way in ("forward", "backward")
        )
        copy_ms = float(self.copy_ms(np.array(1.0), exact)) / (1 if exact else self.num_micro)
        return copy_ms / max(row_ms, 1e-9) / self.setting.ep


def _stage_of_layers(config: RunConfig) -> list[int]:
    """The pipeline rank of each MoE layer."""
    plan, model = config.plan, config.model
    chunks = chunk_layers(model.num_layers, plan.pp * plan.vpp)
    return [c % plan.pp for c, part in enumerate(chunks) for layer in part if has_experts(model, layer)]
