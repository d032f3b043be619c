"""ZeRO-1: each rank keeps fp32 masters and moments of its own rows of every parameter, not of the whole.

Gradients are reduce-scattered to the ranks that keep the rows, updated weights are gathered from them: as many bytes as
the one all-reduce that both replace (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", SC 2020). The cut of a parameter depends on its shape and the number of ranks alone. Experts are cut one by one
and all alike, so one that moves between the ranks of an expert group finds the same rows kept on the rank it comes to.

Axes: R ranks that share a parameter, X numbers of a bucket, L owned slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from smartmoe.mesh import all_gather, reduce_scatter
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.parallel.data import GradientBuffers, ParamRef, Share

BUCKET_BYTES = 64 << 20  # staged for one reduction, or as many as the largest parameter has


def cut_rows(num_rows: int, num_ranks: int) -> list[int]:
    """Rows that each rank keeps: as many for each, the last ones fewer or none (the cut of torch.chunk and of DTensor)."""
    most = -(-num_rows // num_ranks)
    return [max(0, min(most, num_rows - rank * most)) for rank in range(num_ranks)]


def cut_dim(ref: ParamRef) -> int:
    """The dimension whose rows are dealt out: the first of a dense parameter and of each expert of an [L, ...] stack; of
    a tensor-parallel slice the one along which it is not sliced already."""
    return {"dense": 0, "expert": 1, "tensor": 1 - getattr(ref.param, "sliced_dim", 0)}[ref.kind]


@dataclass(frozen=True)
class _Cut:
    """A parameter in a bucket: index in refs, the dimension cut, rows of each rank, numbers of the rank that has most."""

    ref_idx: int
    dim: int
    rows_R: list[int]
    numel: int


@dataclass(frozen=True)
class _Bucket:
    """Parameters of one group and dtype that travel together, `numel` numbers for each rank."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    cuts: list[_Cut]

    @property
    def numel(self) -> int:
        return sum(cut.numel for cut in self.cuts)


class ShardedBuffers(GradientBuffers):
    """Gradient buffers whose reduction leaves each rank the gradients of the rows that its optimizer updates.

    They stand at the beginning of the memory of the parameter's whole gradient, which is done with by then. Parameters
    that no other rank has stay whole. bucket_bytes: of staging in `reduce`; a larger parameter is staged alone.
    """

    def __init__(
        self,
        named_params: list[tuple[str, nn.Parameter]],
        groups: dict[str, dist.ProcessGroup | None],
        bucket_bytes: int = BUCKET_BYTES,
    ):
        super().__init__(named_params, groups)
        self._buckets: list[_Bucket] = []
        for idx, ref in enumerate(self.refs):
            if group_size(groups.get(ref.kind)) > 1:
                self._cut(idx, ref, groups[ref.kind], bucket_bytes)

    def _cut(self, idx: int, ref: ParamRef, group: dist.ProcessGroup, bucket_bytes: int) -> None:
        num_ranks, rank, dim = group.size(), group_rank(group), cut_dim(ref)
        rows_R = cut_rows(ref.local.shape[dim], num_ranks)
        value = ref.local.split(rows_R, dim)[rank]
        grad = ref.grad.view(-1)[: value.numel()].view(value.shape)
        self.shares[idx] = Share(value, grad, rank, num_ranks)
        cut = _Cut(idx, dim, rows_R, ref.local.numel() // ref.local.shape[dim] * rows_R[0])
        last = self._buckets[-1] if self._buckets else None
        is_alike = last is not None and (last.group, last.dtype) == (group, ref.local.dtype)
        if is_alike and 4 * num_ranks * (last.numel + cut.numel) <= bucket_bytes:
            last.cuts.append(cut)
        else:
            self._buckets.append(_Bucket(group, ref.local.dtype, [cut]))

    def reduce(self) -> None:
        """Sum the gradients over each kind's group; afterwards `shares` have the sums of this rank's rows, and what else
        is in the buffers has no meaning. Collective over dense, tensor and expert groups in this order."""
        self.complete()
        for bucket in self._buckets:
            staged_RX = self._stage(bucket, torch.float32, bucket.group.size())
            parts_R = self._parts(bucket, [ref.grad for ref in self.refs])
            for staged_X, parts in zip(staged_RX, parts_R, strict=True):
                _copy(_lay_out(staged_X, parts), parts)
            mine_X = torch.empty_like(staged_RX[0])
            reduce_scatter(mine_X, staged_RX.flatten(), group=bucket.group)
            grads = [self.shares[cut.ref_idx].grad for cut in bucket.cuts]
            _copy(grads, _lay_out(mine_X, grads))

    def scale(self, factor: float) -> None:
        torch._foreach_mul_([share.grad for share in self.shares if share.grad.numel()], factor)

    def publish(self, masters: Sequence[torch.Tensor], only_cut: bool = False) -> None:
        """Collective over dense, tensor and expert groups in this order."""
        super().publish(masters, only_cut)
        for bucket in self._buckets:
            mine_X = self._stage(bucket, bucket.dtype, 1)[0]
            rows = [masters[cut.ref_idx] for cut in bucket.cuts]
            _copy(_lay_out(mine_X, rows), rows)
            all_RX = self._stage(bucket, bucket.dtype, bucket.group.size())
            all_gather(all_RX.view(-1), mine_X, group=bucket.group)
            parts_R = self._parts(bucket, [ref.local for ref in self.refs])
            for all_X, parts in zip(all_RX, parts_R, strict=True):
                _copy(parts, _lay_out(all_X, parts))

    def _stage(self, bucket: _Bucket, dtype: torch.dtype, num_ranks: int) -> torch.Tensor:
        """[num_ranks, X] for the contents of a bucket; what a rank with fewer rows leaves open is never read."""
        return torch.empty(num_ranks, bucket.numel, dtype=dtype, device=self.refs[0].local.device)

    @staticmethod
    def _parts(bucket: _Bucket, tensors: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
        """By rank, its rows of tensors [by ref_idx], in the order of the bucket."""
        return zip(*(tensors[cut.ref_idx].split(cut.rows_R, cut.dim) for cut in bucket.cuts), strict=True)


def _lay_out(flat_X: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of flat_X, one behind the other, each shaped like one of the parts."""
    views, start = [], 0
    for part in parts:
        views.append(flat_X[start : start + part.numel()].view(part.shape))
        start += part.numel()
    return views


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(sources))
