"""DeepSpeed's engine: its communication, parameter groups that know experts, and the checks that it does not make."""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn

MAX_GROUP_NUMEL = 178_956_971  # DeepSpeed's own bound on a group of experts
BUCKET_NUMEL = 500_000_000


def init_world(backend: str) -> None:
    """Start DeepSpeed's communication over `backend`, "nccl" or "gloo", from the environment that launchers set, or over
    the process group that is there. Collective over the world.

    Raises ValueError when DeepSpeed has chosen another kind of device than `backend` is for.
    """
    kind = get_accelerator().device_name()
    if kind != {"nccl": "cuda", "gloo": "cpu"}[backend]:
        raise ValueError(
            f"DeepSpeed has chosen {kind} as its accelerator, but the run is one over {backend}: start it with "
            f"DS_ACCELERATOR={'cpu' if backend == 'gloo' else 'cuda'} in the environment, or change cluster.device"
        )
    if backend == "gloo":
        # DeepSpeed would compile an all-reduce of its own, which takes half a minute and adds in another order than gloo
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def zero_config(stage: int) -> dict:
    """DeepSpeed's table "zero_optimization" for `stage` 0, 1 or 2. Raises ValueError for others: ZeRO-3 is not for DeepSpeed's
    MoE layers."""
    if stage == 3:
        raise ValueError("ZeRO-3 does not work with DeepSpeed's MoE layers: take ZeRO stage 0, 1 or 2")
    if stage not in (0, 1, 2):
        raise ValueError(f"ZeRO stage {stage} does not exist: take 0, 1 or 2")
    return {
        "stage": stage,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET_NUMEL,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_NUMEL,
        "overlap_comm": True,
        "contiguous_gradients": True,
    }


def split_groups(groups: Iterable[dict], max_numel: int = MAX_GROUP_NUMEL) -> list[dict]:
    """Groups of an optimizer, each with a name of its own, with their experts' parameters taken out into groups that
    DeepSpeed knows as such: of at most `max_numel` elements, or of one parameter that is larger. Other settings of a group
    (weight_decay) go with its parameters."""
    split = split_params_into_different_moe_groups_for_optimizer(list(groups), max_group_size=max_numel)
    # a first parameter above the bound leaves an empty group in front of it, which ZeRO cannot partition
    return [group for group in split if group["params"]]


def parameter_groups(model: nn.Module, max_numel: int = MAX_GROUP_NUMEL) -> list[dict]:
    """The model's parameters as DeepSpeed's optimizer groups: one of dense ones, then the experts (see `split_groups`)."""
    dense = {"params": [param for param in model.parameters() if param.requires_grad], "name": "dense"}
    return split_groups([dense], max_numel)


def check_groups(model: nn.Module, groups: Iterable[dict]) -> None:
    """Raise ValueError unless every parameter is in one group, and experts are in groups marked as such: otherwise their
    gradients would be averaged over ranks that hold other experts."""
    groups, names = list(groups), {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    seen = [id(param) for group in groups for param in group["params"]]
    missing, twice = set(names) - set(seen), {param for param in seen if seen.count(param) > 1}
    for wrong, what in ((missing, "in no group of the optimizer"), (twice, "in several groups of the optimizer")):
        if wrong:
            raise ValueError(f"{sorted(names[param] for param in wrong if param in names)[:3]}: {what}")
    for group in groups:
        for param in group["params"]:
            if is_moe_param(param) and (not group.get("moe") or group.get("name") != param.group_name):
                raise ValueError(
                    f"{names[id(param)]} belongs to an expert, but its group of the optimizer does not say so: build the "
                    "groups with parameter_groups(model)"
                )
            if group.get("moe") and not is_moe_param(param):
                raise ValueError(f"{names[id(param)]} belongs to no expert, but is in a group of experts")


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict):
    """DeepSpeed's engine of `model`. Collective over the world. Raises ValueError when the optimizer's groups do not keep
    experts apart (`check_groups`)."""
    check_groups(model, optimizer.param_groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
