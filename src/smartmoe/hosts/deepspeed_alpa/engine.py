"""The DeepSpeed engine of the benchmark: its configuration and its optimizers."""

from __future__ import annotations

import torch

from smartmoe.hosts.deepspeed.engine import zero_config
from smartmoe.hosts.deepspeed_alpa.adafactor import MomentumAdafactor
from smartmoe.hosts.deepspeed_alpa.suites import Case


def engine_config(case: Case, zero: int, precision: str) -> dict:
    """DeepSpeed's configuration for a case: the artifact's, with the real batch size.

    zero: 0, 1 or 2; precision: "fp16" with the artifact's static loss scale of 1, "bf16" or "fp32". Raises ValueError for
    ZeRO-3, which DeepSpeed does not have for its own MoE layers.
    """
    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.num_micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the GPU twice in each micro-step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_config(zero),
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif precision != "fp32":
        raise ValueError(f'precision "{precision}" is not one of fp16, bf16, fp32')
    return config


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
