"""The MoE layer in a model and a training loop of one's own: what `smartmoe.trainer` would do around the passes.

Layer 4. Letters: L owned experts of this rank. A step is: send_copies, forward and backward passes of a loss whose sum over
the ranks is the loss that is meant, reduce_gradients, the optimizer's step, OnlinePlacement.after_step. After passes that are
no part of a step, such as an evaluation's: OnlinePlacement.forget_passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from smartmoe.layer import MoELayer
from smartmoe.ops.all_to_all import group_size
from smartmoe.replicas import HistoryReplication, return_all, send_all

BUCKET_BYTES = 64 << 20


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoELayers of `model`, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def send_copies(model: nn.Module) -> int:
    """Give copies of experts that stay for whole steps (online.replicate = "history") the weights of now; returns bytes sent.

    Before the first pass of every step, and of an evaluation with other weights, in the other modes, too: where an optimizer
    or such an evaluation gives parameters other memory, experts that may have copies read their weights here. Collective
    over the layers' expert group where copies stay for whole steps.
    """
    for layer in moe_layers(model):
        layer.experts.follow_parameters()
    groups = _layers_with_copies(model)
    return sum(send_all([layer.replication for layer in layers], group) for group, layers in groups)


def reduce_gradients(model: nn.Module, stage_group, expert_dp_group=None) -> None:
    """Sum the gradients of `model` over the ranks that share a parameter; after the last backward pass of a step.

    stage_group: all ranks that have the model, each with tokens of its own: gradients of everything but experts are summed
    over it. expert_dp_group: the ranks that have the same experts, None = every expert is on one rank. Experts have seen the
    tokens of all ranks of their expert group, so there is nothing to sum over that. Groups are ProcessGroups, None = this
    process alone. A parameter that no token reached gets a gradient of zeros, so that optimizers hold the same state on
    every rank. Collective over both groups and the layers' expert group. Not for a model inside DistributedDataParallel,
    which would average different experts. Raises ValueError, before anything is sent, where the groups leave ranks out.
    """
    for layer in moe_layers(model):
        _check_groups(layer, group_size(stage_group), group_size(expert_dp_group))
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    _return_copies(model)
    of_experts = {param for layer in moe_layers(model) for param in layer.experts.parameters()}
    for is_expert, group in ((False, stage_group), (True, expert_dp_group)):
        if group_size(group) > 1:
            for bucket in _buckets([param.grad for param in params if (param in of_experts) == is_expert]):
                _sum(bucket, group)


def expert_state(layer: MoELayer, *optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything [L, ...] that belongs to the experts of `layer` and moves with them: weights, and what `optimizers` keep
    with a row for each expert, such as Adam's moments or Adafactor's means over the rows and columns of each matrix. Numbers
    that belong to a whole parameter (steps) stay. For OnlinePlacement(state_of=...).

    Raises ValueError for what belongs to several experts at once and could not part with one, such as Adafactor's means over
    all experts' biases, which are one matrix to it. What an optimizer works out from a whole parameter at each step
    (Adafactor's norm of it) depends on which experts a rank has: then so do losses, a little.
    """
    tensors = []
    for name, param in layer.experts.named_parameters():
        tensors.append(param.data)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(param, {}).items():
                what = f"layer {layer.layer_idx}: {type(optimizer).__name__}'s {key} of {name}"
                tensors += _rows_of_experts(value, param, what)
    return tensors


def _rows_of_experts(value: object, param: nn.Parameter, what: str) -> list[torch.Tensor]:
    """`value` where it has a row for each expert of param [L, ...], nothing where it is no more than a number."""
    if not torch.is_tensor(value):
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if not any(torch.is_tensor(each) and each.numel() > 1 for each in inside):
            return []
        found = "holds several tensors"
    elif value.numel() == 1 and value.shape != param.shape:
        return []
    elif value.shape == param.shape or (value.shape[0] == param.shape[0] and value.shape != param.shape[1:]):
        return [value]
    else:
        found = f"has the shape {list(value.shape)}, the parameter {list(param.shape)}"
    raise ValueError(
        f"{what} {found}: experts could not take what is theirs along; give this parameter to an optimizer that keeps a row "
        "for each expert, such as AdamW, and name both in expert_state(layer, first, second)"
    )


def _check_groups(layer: MoELayer, num_ranks: int, num_same: int) -> None:
    num_parts = group_size(layer.ep_group)
    if num_parts * num_same != num_ranks:
        raise ValueError(
            f"layer {layer.layer_idx}: experts spread over {num_parts} ranks (ep_group), each on {num_same} (expert_dp_group), "
            f"do not make the {num_ranks} ranks of stage_group: ranks that share an expert would part"
        )


def _layers_with_copies(model: nn.Module) -> list[tuple[dist.ProcessGroup | None, list[MoELayer]]]:
    """The layers that send copies, by their expert group."""
    groups: dict[dist.ProcessGroup | None, list[MoELayer]] = {}
    for layer in moe_layers(model):
        if isinstance(layer.replication, HistoryReplication):
            groups.setdefault(layer.ep_group, []).append(layer)
    return list(groups.items())


def _return_copies(model: nn.Module) -> None:
    for group, layers in _layers_with_copies(model):
        grads = [[_grad_or_zeros(param) for param in layer.experts.parameters()] for layer in layers]
        sums = [[grad.float() for grad in some] for some in grads]  # the gradients themselves where they are float32
        return_all([layer.replication for layer in layers], sums, group)
        for grad, total in zip(itertools.chain(*grads), itertools.chain(*sums), strict=True):
            if total is not grad:
                grad.copy_(total)


def _grad_or_zeros(param: nn.Parameter) -> torch.Tensor:
    """Zeros for one that is frozen: what comes for it, none, is thrown away."""
    return torch.zeros_like(param) if param.grad is None else param.grad


def _buckets(grads: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one dtype together, as many as make BUCKET_BYTES."""
    for _, some in itertools.groupby(sorted(grads, key=lambda grad: str(grad.dtype)), key=lambda grad: grad.dtype):
        bucket, num_bytes = [], 0
        for grad in some:
            if bucket and num_bytes + grad.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(grad)
            num_bytes += grad.nbytes
        if bucket:
            yield bucket


def _sum(bucket: list[torch.Tensor], group) -> None:
    flat = torch.cat([grad.flatten() for grad in bucket])
    dist.all_reduce(flat, group=group)
    for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
        grad.copy_(part.view_as(grad))
