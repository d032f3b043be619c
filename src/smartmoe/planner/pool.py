"""The space of plans: every legal one for so many GPUs, which of them fit, and pools of those that differ in placement only.

Legal is what `config.check` accepts, asked plan by plan, so the trainer and the planner cannot disagree. In a pool (the
paper's word) the plan is fixed and expert placement is free: online placement works inside it while training.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from smartmoe.config import ClusterSpec, ParallelPlan, RunConfig, check
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.memory import ERROR, MARGIN, Memory

MAX_VPP = 4  # chunks of a rank: more of them only add messages


@dataclass(frozen=True)
class Candidate:
    """A plan, with its micro-batch and its memory."""

    plan: ParallelPlan
    micro_batch: int
    memory: Memory | None = None

    @property
    def name(self) -> str:
        return name_of(self.plan, self.micro_batch)


@dataclass(frozen=True)
class Pruned:
    """A legal plan that was left out for its memory, and why. is_too_large: it cannot train; else it may, or may run out."""

    candidate: Candidate
    is_too_large: bool
    reason: str


@dataclass
class Pool:
    """What a search looks at: plans that fit, legal ones left out with the reason, and how often each check failed."""

    fitting: list[Candidate] = field(default_factory=list)
    pruned: list[Pruned] = field(default_factory=list)
    illegal: Counter = field(default_factory=Counter)

    @property
    def num_legal(self) -> int:
        return len(self.fitting) + len(self.pruned)

    @property
    def num_too_large(self) -> int:
        return sum(pruned.is_too_large for pruned in self.pruned)


def name_of(plan: ParallelPlan, micro_batch: int) -> str:
    """A plan in one word, such as pp2-dp4-ep4-mb2; `parse_name` reads it back."""
    sizes = [f"{key}{getattr(plan, key)}" for key in ("pp", "vpp", "dp", "tp", "ep") if getattr(plan, key) > 1]
    return "-".join([*sizes, f"mb{micro_batch}", *(["recompute"] if plan.recompute else [])])


def parse_name(text: str) -> tuple[ParallelPlan, int]:
    """The inverse of `name_of`. Raises ValueError for anything else."""
    sizes: dict[str, int] = {}
    for word in text.split("-"):
        key = word.rstrip("0123456789")
        if word == "recompute":
            sizes["recompute"] = True
        elif key in ("pp", "vpp", "dp", "tp", "ep", "mb") and word != key and key not in sizes:
            sizes[key] = int(word[len(key) :])
        else:
            raise ValueError(f'plan "{text}": "{word}" is none of ppN vppN dpN tpN epN mbN recompute')
    micro_batch = sizes.pop("mb", 0)
    if micro_batch < 1:
        raise ValueError(f'plan "{text}": give its micro-batch, such as mb2')
    return ParallelPlan(**sizes), micro_batch


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def candidates(
    config: RunConfig, cluster: ClusterSpec, num_gpus: int, fixed_micro_batch: int | None = None
) -> Iterator:
    """(plan, micro-batch) of every way to divide the ranks, the experts and the batch; not yet checked."""
    model, batch = config.model, config.workload.global_batch_size
    for pp in divisors(num_gpus):
        for tp in divisors(num_gpus // pp):
            dp = num_gpus // pp // tp
            micro_batches = [fixed_micro_batch] if fixed_micro_batch else divisors(batch // dp) if batch >= dp else []
            for ep in divisors(dp * tp):
                for vpp in range(1, min(MAX_VPP, max(1, model.num_layers // pp)) + 1) if pp > 1 else (1,):
                    for micro_batch in micro_batches:
                        for recompute in (False, True):
                            plan = ParallelPlan(pp=pp, vpp=vpp, dp=dp, tp=tp, ep=ep, recompute=recompute)
                            yield plan, micro_batch


def config_of(config: RunConfig, cluster: ClusterSpec, plan: ParallelPlan, micro_batch: int) -> RunConfig:
    """The run that a plan stands for."""
    workload = dataclasses.replace(config.workload, micro_batch_size=micro_batch)
    return dataclasses.replace(config, plan=plan, cluster=cluster, workload=workload)


def why_illegal(config: RunConfig, cluster: ClusterSpec, plan: ParallelPlan, micro_batch: int) -> str | None:
    """What `config.check` says against a plan, or None."""
    try:
        check(config_of(config, cluster, plan, micro_batch), "plan")
    except ValueError as error:
        return str(error).removeprefix("plan: ")
    return None


def build(cost: CostModel, num_gpus: int, fixed_micro_batch: int | None = None) -> Pool:
    """Every legal plan of `num_gpus` ranks, pruned by memory.

    Raises ValueError when the cluster does not have so many ranks, or no plan is legal (with the commonest reasons).
    """
    cluster = cluster_of(cost.cluster, num_gpus)
    legal, illegal = cost.once_of_any(
        ("legal", num_gpus, fixed_micro_batch), lambda: _legal(cost.config, cluster, num_gpus, fixed_micro_batch)
    )
    pool = Pool(illegal=illegal)
    for plan, micro_batch in legal:
        candidate = Candidate(plan, micro_batch, cost.memory(plan, micro_batch))
        pruned = left_out(cost, candidate)
        if pruned is None:
            pool.fitting.append(candidate)
        else:
            pool.pruned.append(pruned)
    if not pool.num_legal:
        common = "; ".join(reason for reason, _ in pool.illegal.most_common(3)) or "the batch is smaller than the ranks"
        raise ValueError(f"no plan of {num_gpus} GPUs is legal for model {cost.config.model.name}: {common}")
    return pool


def _legal(config, cluster, num_gpus, fixed_micro_batch) -> tuple[list[tuple[ParallelPlan, int]], Counter]:
    """(legal plans with their micro-batches, how often each check failed)."""
    legal, illegal = [], Counter()
    for plan, micro_batch in candidates(config, cluster, num_gpus, fixed_micro_batch):
        reason = why_illegal(config, cluster, plan, micro_batch)
        if reason is None:
            legal.append((plan, micro_batch))
        else:
            illegal[reason.split(";")[0]] += 1
    return legal, illegal


def fits(cost: CostModel, plan: ParallelPlan, micro_batch: int) -> bool:
    """Whether a plan takes no more than the safe part of the memory of the cost model's cluster."""
    return cost.memory(plan, micro_batch).total <= MARGIN * _device_bytes(cost)


def left_out(cost: CostModel, candidate: Candidate) -> Pruned | None:
    """Why a plan is no choice, or None where it fits.

    Too large is what would not fit though the prediction were ERROR too high, the routing even, and nothing captured, as the
    trainer goes on where a CUDA graph finds no memory. All else beyond MARGIN of the device may not fit: the trainer takes
    it, and trains or ends out of memory.
    """
    memory, device = candidate.memory, _device_bytes(cost)
    if memory.total <= MARGIN * device:
        return None
    if memory.total > (1 + ERROR) * device:
        even = cost.data_insensitive().memory(candidate.plan, candidate.micro_batch, never_captured=True)
        least = min(memory, even, key=lambda m: m.total)
        if least.total > (1 + ERROR) * device:
            limit = f"{device / 1e9:g} GB are there, and predictions are at most {ERROR:.0%} too high"
            return Pruned(candidate, True, f"is too large: {_words(least, ' at the least')}; {limit}")
    limit = f"{MARGIN * device / 1e9:.2f} of {device / 1e9:g} GB are safe"
    return Pruned(candidate, False, f"may not fit: {_words(memory)}; {limit}")


def _device_bytes(cost: CostModel) -> float:
    return cost.cluster.memory_gbytes * 1e9


def _words(memory: Memory, how: str = "") -> str:
    """The fullest stage, and what takes most of it."""
    parts = {k: v for k, v in vars(memory).items() if k != "pp_stage"}
    largest = max(parts, key=parts.get)
    return f"stage {memory.pp_stage} needs {memory.total / 1e9:.2f} GB{how}, {largest} {parts[largest] / 1e9:.2f} of them"


def cluster_of(cluster: ClusterSpec, num_gpus: int) -> ClusterSpec:
    """The part of a cluster that `num_gpus` ranks take: whole nodes, or a part of one.

    Raises ValueError when it has fewer, or the number fills no whole nodes.
    """
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus}: at least 1")
    if num_gpus > cluster.num_ranks:
        raise ValueError(
            f"cluster {cluster.name} has {cluster.num_nodes} x {cluster.ranks_per_node} = {cluster.num_ranks} ranks, "
            f"not {num_gpus}: lower --gpus, or describe a larger cluster"
        )
    if num_gpus <= cluster.ranks_per_node:
        return dataclasses.replace(cluster, num_nodes=1, ranks_per_node=num_gpus)
    if num_gpus % cluster.ranks_per_node:
        raise ValueError(
            f"{num_gpus} GPUs fill no whole nodes of cluster {cluster.name}, which have {cluster.ranks_per_node} each: "
            f"take a multiple of it"
        )
    return dataclasses.replace(cluster, num_nodes=num_gpus // cluster.ranks_per_node)
