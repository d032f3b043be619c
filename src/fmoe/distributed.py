"""Data parallelism where parameters are shared by different groups of workers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fmoe.utils import get_torch_default_comm

_COMMS = ("dp", "gate", "moe", "world")


class DistributedGroupedDataParallel(nn.Module):
    """Averages each gradient over the group that its parameter's mark names, when it is asked to.

    A parameter's attribute `dp_comm` is its mark, "dp" where it has none (FMoE marks its experts and its gate). Keyword
    arguments named <mark>_group are the groups of marks; those of dp, gate, moe and world are all processes where they are
    not given, and parameters of any other mark, such as "none", are left alone. Other keywords (device_ids ..) are accepted
    and have no effect. need_sync: start with the parameters of the first rank of each group; collective.
    """

    def __init__(self, module: nn.Module, auto_allreduce: bool = False, need_sync: bool = True, **kwargs):
        super().__init__()
        if auto_allreduce:
            raise ValueError("auto_allreduce: call allreduce_params() after the backward pass instead, as in FastMoE")
        self.module = module
        self.comms = {mark: get_torch_default_comm() for mark in _COMMS}
        given = {key.removesuffix("_group"): group for key, group in kwargs.items() if key.endswith("_group")}
        self.comms |= {mark: group for mark, group in given.items() if group is not None}
        if need_sync:
            self._sync_params()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def allreduce_params(self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False) -> None:
        """Replace every gradient that is there by its mean over the group of its mark; after the last backward pass of a step.

        no_scale: by its sum; reduce_after: divide behind the sum and not before; fp32_allreduce: sum in float32. Collective:
        the same parameters must have gradients on all ranks of a group.
        """
        with_grad = [param for param in self.module.parameters() if param.requires_grad and param.grad is not None]
        for group, params in self._by_group(with_grad):
            grads = [param.grad for param in params]
            flat = torch.cat([grad.flatten() for grad in grads])
            flat = flat.float() if fp32_allreduce else flat
            if not no_scale and not reduce_after:
                flat /= group.size()
            dist.all_reduce(flat, group=group)
            if not no_scale and reduce_after:
                flat /= group.size()
            _spread(flat, grads)

    def allreduce_gradients(self, **kwargs) -> None:
        """`allreduce_params` by the name that training loops in Megatron's manner call it."""
        self.allreduce_params(**kwargs)

    @torch.no_grad()
    def _sync_params(self):
        for group, params in self._by_group(self.module.parameters()):
            flat = torch.cat([param.flatten() for param in params])
            dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
            _spread(flat, params)

    def _by_group(self, params) -> list[tuple[dist.ProcessGroup, list[nn.Parameter]]]:
        """The parameters of a known mark, those of one mark and dtype together, in the order of the module on every rank."""
        buckets: dict[tuple, list[nn.Parameter]] = {}
        for param in params:
            buckets.setdefault((getattr(param, "dp_comm", "dp"), param.dtype), []).append(param)
        return [(self.comms[mark], bucket) for (mark, _), bucket in buckets.items() if mark in self.comms]


def _spread(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
