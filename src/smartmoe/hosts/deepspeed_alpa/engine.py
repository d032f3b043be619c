"""The DeepSpeed engine of the benchmark: its configuration, parameter groups that know experts, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn

from smartmoe.hosts.deepspeed_alpa.adafactor import MomentumAdafactor
from smartmoe.hosts.deepspeed_alpa.suites import Case

MAX_GROUP_NUMEL = 178_956_971  # DeepSpeed's own bound on a group of experts
BUCKET_NUMEL = 500_000_000


def init_world(backend: str) -> None:
    """Start DeepSpeed's communication over `backend`, "nccl" or "gloo", from the environment that launchers set, or over
    the process group that is there. Collective over the world."""
    if backend == "gloo":
        # DeepSpeed would compile an all-reduce of its own, which takes half a minute and adds in another order than gloo
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def engine_config(case: Case, zero: int, precision: str) -> dict:
    """DeepSpeed's configuration for a case: the artifact's, with the real batch size.

    zero: 0, 1 or 2; precision: "fp16" with the artifact's static loss scale of 1, "bf16" or "fp32". Raises ValueError for
    ZeRO-3, which DeepSpeed does not have for its own MoE layers.
    """
    if zero == 3:
        raise ValueError("ZeRO-3 does not work with DeepSpeed's MoE layers: take --zero 0, 1 or 2")
    if zero not in (0, 1, 2):
        raise ValueError(f"ZeRO stage {zero} does not exist: take --zero 0, 1 or 2")
    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.num_micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "allgather_partitions": True,
            "allgather_bucket_size": BUCKET_NUMEL,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_NUMEL,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif precision != "fp32":
        raise ValueError(f'precision "{precision}" is not one of fp16, bf16, fp32')
    return config


def parameter_groups(model: nn.Module, max_numel: int = MAX_GROUP_NUMEL) -> list[dict]:
    """The model's parameters as DeepSpeed's optimizer groups: one of dense ones, then experts in groups of at most
    `max_numel` elements, or of one parameter that is larger."""
    dense = {"params": [param for param in model.parameters() if param.requires_grad], "name": "dense"}
    split = split_params_into_different_moe_groups_for_optimizer(dense, max_group_size=max_numel)
    # a first parameter above the bound leaves an empty group in front of it, which ZeRO cannot partition
    return [group for group in split if group["params"]]


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


def _adafactor(groups):
    return torch.optim.Adafactor(groups, lr=1e-2)


def _adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)


# "adafactor" is Alpa's own setting (no momentum; lr is the bound on the relative step), "adafactor-momentum" that of the
# artifact's DeepSpeed runs.
OPTIMIZERS = {"adafactor": _adafactor, "adafactor-momentum": MomentumAdafactor, "adamw": _adamw}


def make_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer `name` over `groups`. Raises ValueError for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(f'optimizer "{name}" is not one of {", ".join(OPTIMIZERS)}')
    return OPTIMIZERS[name](groups)


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict):
    """DeepSpeed's engine of `model`. Collective over the world. Raises ValueError when the optimizer's groups do not keep
    experts apart (`check_groups`)."""
    check_groups(model, optimizer.param_groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
