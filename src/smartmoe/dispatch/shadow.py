"""Expert shadowing: hot experts' weights visit every rank instead of the tokens visiting the experts.

Source: FasterMoE (He et al., PPoPP'22), section 4.1, with the decision rule of its published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.config import ClusterSpec

# One forward product and two backward ones; tokens travel out and back, in forward and in backward.
_COMPUTE_PASSES = 3
_TOKEN_TRIPS = 4


@dataclass(frozen=True)
class ShadowCost:
    """The speeds that the decision weighs: bytes per second and rank, floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def of(cls, cluster: ClusterSpec) -> ShadowCost:
        """The slowest link that tokens may cross, and the nominal speed of a rank."""
        gbytes = cluster.inter_node_gbytes_per_s if cluster.num_nodes > 1 else cluster.intra_node_gbytes_per_s
        return cls(gbytes * 1e9, cluster.tflops * 1e12)


def choose_shadows(
    count_S: np.ndarray, num_ranks: int, row_bytes: int, expert_bytes: int, row_flops: float, cost: ShadowCost
):
    """Decide which experts to shadow: a list of slots, ascending.

    count_S: [S] rows for each slot over all ranks. row_bytes: one token row; expert_bytes: one expert's weights;
    row_flops: operations of one row through one expert. Greedy: the hottest expert of the fullest rank is shadowed as
    long as 3 * compute + 4 * exchange of the fullest rank + one weight transfer for each shadow becomes less. Rows of
    shadowed experts count for no rank. The original knows one expert a rank; this is its rule for any number. Pure:
    equal inputs, equal decision.
    """
    left_WL = np.asarray(count_S, dtype=np.int64).reshape(num_ranks, -1).copy()
    second_per_row = _COMPUTE_PASSES * row_flops / cost.flops_per_s + _TOKEN_TRIPS * row_bytes / cost.bytes_per_s
    second_per_shadow = expert_bytes / cost.bytes_per_s
    chosen: list[int] = []
    best = second_per_row * left_WL.sum(1).max()
    while len(chosen) < left_WL.size - 1:
        ep_rank = int(left_WL.sum(1).argmax())
        slot = ep_rank * left_WL.shape[1] + int(left_WL[ep_rank].argmax())
        left_WL.reshape(-1)[slot] = 0
        latency = second_per_row * left_WL.sum(1).max() + second_per_shadow * (len(chosen) + 1)
        if latency >= best:
            break
        best = latency
        chosen.append(slot)
    return sorted(chosen)


class ShadowTransfer:
    """The weights of shadowed slots on their way to every rank, and later their gradients on the way back.

    slots: global slots, ascending. Both directions are asynchronous: one broadcast (in backward one sum at the owner)
    for each owner, all of its weights in one buffer.
    """

    def __init__(self, slots: list[int], slots_per_rank: int, group):
        self.group, self.ep_rank = group, group.rank()
        self.local = [slot % slots_per_rank if slot // slots_per_rank == self.ep_rank else None for slot in slots]
        owners = [slot // slots_per_rank for slot in slots]
        self.runs = [(r, owners.index(r), owners.index(r) + owners.count(r)) for r in sorted(set(owners))]
        self.works: list = []

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []

    def broadcast(self, flat_ZP: torch.Tensor) -> None:
        for owner, start, end in self.runs:
            source = dist.get_global_rank(self.group, owner)
            self.works.append(dist.broadcast(flat_ZP[start:end], source, group=self.group, async_op=True))

    def reduce(self, flat_ZP: torch.Tensor) -> None:
        for owner, start, end in self.runs:
            target = dist.get_global_rank(self.group, owner)
            self.works.append(dist.reduce(flat_ZP[start:end], target, group=self.group, async_op=True))


def start_shadow(slots: list[int], slots_per_rank: int, weights, group):
    """Launch the transfer of the weights of `slots`; finish with `wait_shadow`. Collective. Returns (buffer,
    transfer)."""
    transfer = ShadowTransfer(slots, slots_per_rank, group)
    return _Start.apply(transfer, *[weight for weight in weights if weight is not None]), transfer


def wait_shadow(flat_ZP: torch.Tensor, transfer: ShadowTransfer, weights):
    """The weights of the shadowed slots, in the form of `weights` with Z slots in the place of L."""
    flat_ZP = _Wait.apply(flat_ZP, transfer)
    parts = iter(flat_ZP.split([weight[0].numel() for weight in weights if weight is not None], dim=1))
    # a part is a column range of the buffer: grouped GEMM wants it contiguous
    return tuple(None if w is None else next(parts).contiguous().view(-1, *w.shape[1:]) for w in weights)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transfer, *weights):
        ctx.transfer, ctx.shapes = transfer, [weight.shape for weight in weights]
        flat_ZP = weights[0].new_empty(len(transfer.local), sum(weight[0].numel() for weight in weights))
        for z, local in enumerate(transfer.local):
            if local is not None:
                torch.cat([weight[local].reshape(-1) for weight in weights], out=flat_ZP[z])
        transfer.broadcast(flat_ZP)
        return flat_ZP

    @staticmethod
    def backward(ctx, grad_ZP):
        ctx.transfer.wait()
        grads, start = [], 0
        for shape in ctx.shapes:
            size = shape[1:].numel()
            grad = grad_ZP.new_zeros(shape)
            for z, local in enumerate(ctx.transfer.local):
                if local is not None:
                    grad[local] = grad_ZP[z, start : start + size].view(shape[1:])
            grads.append(grad)
            start += size
        return None, *grads


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat_ZP, transfer):
        ctx.transfer = transfer
        transfer.wait()
        return flat_ZP.view_as(flat_ZP)

    @staticmethod
    def backward(ctx, grad_ZP):
        # a copy: the sum is formed in place, and the incoming gradient is autograd's
        grad_ZP = grad_ZP.clone(memory_format=torch.contiguous_format)
        ctx.transfer.reduce(grad_ZP)
        return grad_ZP, None
