"""Tensor parallelism with sequence sharding, by PyTorch's DTensor styles.

Between blocks every rank holds its own part of the sequence; attention and dense MLP gather the sequence, work on their
slice of heads or columns, and scatter the sum back (Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", MLSys 2023). Everything else sees each token on one rank only.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)


def apply_tensor_parallel(blocks: nn.ModuleDict, tp_mesh: DeviceMesh | None) -> None:
    """Shard the attention and dense MLP weights of `blocks` over `tp_mesh`, in place; None changes nothing.

    Collective over the tp group. Sharded parameters get `parallel = "tensor"`.
    """
    if tp_mesh is None:
        return
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    scatter = RowwiseParallel(output_layouts=Shard(1))
    plan = {
        "attention": gather,
        "attention.qkv": ColwiseParallel(),
        "attention.out": scatter,
        "mlp": gather,
        "mlp.up": ColwiseParallel(),
        "mlp.down": scatter,
    }
    for block in blocks.values():
        present = {key: style for key, style in plan.items() if getattr(block, key.split(".")[0], None) is not None}
        parallelize_module(block, tp_mesh, present)
        for key in present:
            if "." in key:
                block.get_submodule(key).weight.parallel = "tensor"
