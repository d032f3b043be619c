"""Process groups of a hybrid-parallel plan: the only module that makes any.

World rank = pp_stage * (dp * tp) + dp_rank * tp + tp_rank. The dp * tp ranks of one pipeline stage hold different tokens
(dp shards samples, tp shards the sequence); experts are spread over contiguous runs of `ep` of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from smartmoe.config import ParallelPlan


# torch 2.13 gave both collectives new names and deprecated the old ones; looked up at the call, as slow_links changes them.
def all_gather(whole: torch.Tensor, part: torch.Tensor, group, async_op: bool = False) -> dist.Work | None:
    """Fill `whole` with the equal parts of all ranks along dim 0; async_op: when the work that is returned has been waited
    for. Collective over `group`."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, part, group=group, async_op=async_op)


def reduce_scatter(part: torch.Tensor, whole: torch.Tensor, group, async_op: bool = False) -> dist.Work | None:
    """Sum `whole` over the ranks and leave this rank's equal part of it, along dim 0, in `part`; async_op as in `all_gather`.
    Collective over `group`."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(part, whole, group=group, async_op=async_op)


@dataclass(frozen=True)
class Mesh:
    """This process's coordinates and groups, those of a process alone by default. A group of one rank is None: there is nobody
    to talk to.

    share_mesh: by kind of parameter, the ranks that have it: "dense" (stage), "expert" (expert_dp), "tensor" (dp, tp), of
    which the second axis has the slices."""

    plan: ParallelPlan
    device: torch.device
    pp_stage: int = 0
    dp_rank: int = 0
    tp_rank: int = 0
    ep_rank: int = 0
    expert_dp_rank: int = 0
    world_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    tp_mesh: DeviceMesh | None = None
    stage_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    expert_dp_group: dist.ProcessGroup | None = None
    share_mesh: dict[str, DeviceMesh] = field(default_factory=dict)

    @property
    def stage_rank(self) -> int:
        return self.dp_rank * self.plan.tp + self.tp_rank

    @property
    def world_rank(self) -> int:
        return self.pp_stage * self.plan.stage_size + self.stage_rank


def build_mesh(plan: ParallelPlan, device: torch.device) -> Mesh:
    """Make the process groups of `plan`.

    Collective over the world, which must already be initialised and have `plan.world_size` ranks (a world of one needs no
    initialisation). Raises ValueError when the sizes differ.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != plan.world_size:
        raise ValueError(f"plan {plan.describe()} needs {plan.world_size} ranks, but {world_size} were started")
    if world_size == 1:
        return Mesh(plan, device)
    dense = init_device_mesh(device.type, (plan.pp, plan.dp, plan.tp), mesh_dim_names=("pp", "dp", "tp"))
    stages = init_device_mesh(device.type, (plan.pp, plan.stage_size), mesh_dim_names=("pp", "stage"))
    experts = init_device_mesh(
        device.type, (plan.pp, plan.expert_dp, plan.ep), mesh_dim_names=("pp", "expert_dp", "ep")
    )
    pp_stage, dp_rank, tp_rank = dense.get_coordinate()
    _, expert_dp_rank, ep_rank = experts.get_coordinate()

    def group(mesh: DeviceMesh, axis: str, size: int) -> dist.ProcessGroup | None:
        return mesh.get_group(axis) if size > 1 else None

    return Mesh(
        plan=plan,
        device=device,
        pp_stage=pp_stage,
        dp_rank=dp_rank,
        tp_rank=tp_rank,
        ep_rank=ep_rank,
        expert_dp_rank=expert_dp_rank,
        world_group=dist.group.WORLD,
        pp_group=group(dense, "pp", plan.pp),
        dp_group=group(dense, "dp", plan.dp),
        tp_group=group(dense, "tp", plan.tp),
        tp_mesh=dense["tp"] if plan.tp > 1 else None,
        stage_group=group(stages, "stage", plan.stage_size),
        ep_group=group(experts, "ep", plan.ep),
        expert_dp_group=group(experts, "expert_dp", plan.expert_dp),
        share_mesh={"dense": stages["stage"], "tensor": dense["dp", "tp"], "expert": experts["expert_dp"]},
    )


def shared_mesh(meshes: dict[ParallelPlan, Mesh] | None, plan: ParallelPlan, device: torch.device) -> Mesh:
    """The mesh of `plan` among those that earlier runs of this process made, added to them when it is new; None = make one.
    Collective over the world."""
    if meshes is None:
        return build_mesh(plan, device)
    if plan not in meshes:
        meshes[plan] = build_mesh(plan, device)
    return meshes[plan]


def second_expert_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """Another communicator for the ranks of mesh.ep_group, so that two kinds of exchanges need not wait for each other;
    None where that is None. Collective over the world."""
    plan, mine = mesh.plan, None
    if plan.ep == 1:
        return None
    for first in range(0, plan.world_size, plan.ep):  # expert groups are runs of `ep` world ranks
        group = dist.new_group(list(range(first, first + plan.ep)))
        if first <= mesh.world_rank < first + plan.ep:
            mine = group
    return mine
