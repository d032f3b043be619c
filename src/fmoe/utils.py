"""What FastMoE asks of torch.distributed."""

from __future__ import annotations

import torch.distributed as dist


def get_torch_default_comm() -> dist.ProcessGroup:
    """The group of all processes. Raises RuntimeError where torch.distributed is not initialised."""
    if not dist.is_initialized():
        raise RuntimeError("fmoe: more than one worker needs torch.distributed: call init_process_group first")
    return dist.group.WORLD
