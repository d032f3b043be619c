"""ZeRO-1: each rank keeps fp32 masters and moments of its own rows of every parameter, not of the whole.

Gradients are reduce-scattered to the ranks that keep the rows, updated weights are gathered from them: as many bytes as
the one all-reduce that both replace (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", SC 2020). The cut of a parameter depends on its shape and the number of ranks alone. Experts are cut one by one
and all alike, so one that moves between the ranks of an expert group finds the same rows kept on the rank it comes to.

Axes: R ranks that share a parameter, X numbers of a bucket, L owned slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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
class Bucket:
    """Parameters of one group and dtype that travel together, `numel` numbers for each rank. unit: what they are part of,
    see parallel.zero_passes; None = their gradients travel behind all passes. is_away: so are their values, but for passes."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    cuts: list[_Cut]
    unit: int | None = None
    is_away: bool = False

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
        self.buckets: list[Bucket] = []
        for idx, ref in enumerate(self.refs):
            if group_size(groups.get(ref.kind)) > 1:
                self._cut(idx, ref, groups[ref.kind], bucket_bytes)

    def _cut(self, idx: int, ref: ParamRef, group: dist.ProcessGroup, bucket_bytes: int) -> None:
        num_ranks, rank, dim = group.size(), group_rank(group), cut_dim(ref)
        rows_R = cut_rows(ref.local.shape[dim], num_ranks)
        value = ref.local.split(rows_R, dim)[rank]
        if ref.grad is None:
            grad = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        else:
            grad = ref.grad.view(-1)[: value.numel()].view(value.shape)
        self.shares[idx] = Share(value, grad, rank, num_ranks)
        cut = _Cut(idx, dim, rows_R, ref.local.numel() // ref.local.shape[dim] * rows_R[0])
        new = Bucket(group, ref.local.dtype, [cut], *self._when(ref))
        last = self.buckets[-1] if self.buckets else None
        is_alike = last is not None and dataclasses.replace(last, cuts=[]) == dataclasses.replace(new, cuts=[])
        if is_alike and 4 * num_ranks * (last.numel + cut.numel) <= bucket_bytes:
            last.cuts.append(cut)
        else:
            self.buckets.append(new)

    def _when(self, ref: ParamRef) -> tuple[int | None, bool]:
        """Bucket.unit and Bucket.is_away of a parameter."""
        return None, False

    def reduce(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Sum the gradients over each kind's group; afterwards `shares` have the sums of this rank's rows, and what else
        is in the buffers has no meaning. Collective over dense, tensor and expert groups in this order.

        meanwhile: see GradientBuffers; called first here."""
        self.complete()
        meanwhile()
        for bucket in self.buckets:
            if bucket.unit is None:
                mine_X, _ = self.scatter(bucket, [self.refs[cut.ref_idx].grad for cut in bucket.cuts])
                grads = self.grads_of(bucket)
                _copy(grads, lay_out(mine_X, grads))

    def scatter(
        self, bucket: Bucket, grads: Sequence[torch.Tensor], async_op: bool = False
    ) -> tuple[torch.Tensor, dist.Work | None]:
        """Sum whole gradients, of each parameter of a bucket, of any floating type, over the bucket's ranks: ([X] float32,
        the sums of this rank's rows, when the work has been waited for). Collective over the bucket's group."""
        staged_RX = self._stage(bucket, torch.float32, bucket.group.size())
        for staged_X, parts in zip(staged_RX, _parts(bucket, grads), strict=True):
            _copy(lay_out(staged_X, parts), parts)
        mine_X = torch.empty_like(staged_RX[0])
        return mine_X, reduce_scatter(mine_X, staged_RX.flatten(), group=bucket.group, async_op=async_op)

    def grads_of(self, bucket: Bucket) -> list[torch.Tensor]:
        """The gradients of this rank's rows."""
        return [self.shares[cut.ref_idx].grad for cut in bucket.cuts]

    def scale(self, factor: float) -> None:
        torch._foreach_mul_([share.grad for share in self.shares if share.grad.numel()], factor)

    def publish(self, masters: Sequence[torch.Tensor], only_cut: bool = False) -> None:
        """Collective over dense, tensor and expert groups in this order."""
        super().publish(masters, only_cut)
        for bucket in self.buckets:
            if not bucket.is_away:
                self.spread(bucket, self.gather(bucket, masters)[0])

    def gather(
        self, bucket: Bucket, masters: Sequence[torch.Tensor], async_op: bool = False
    ) -> tuple[torch.Tensor, dist.Work | None]:
        """([R, X] in the bucket's dtype, the values of all ranks' rows, when the work has been waited for) of masters, this
        rank's by ref_idx. Collective over the bucket's group."""
        mine_X = self._stage(bucket, bucket.dtype, 1)[0]
        rows = [masters[cut.ref_idx] for cut in bucket.cuts]
        _copy(lay_out(mine_X, rows), rows)
        all_RX = self._stage(bucket, bucket.dtype, bucket.group.size())
        return all_RX, all_gather(all_RX.view(-1), mine_X, group=bucket.group, async_op=async_op)

    def spread(self, bucket: Bucket, all_RX: torch.Tensor) -> None:
        """Write gathered values into the parameters. Autograd does not hear of it: where a pass has saved a parameter, what it
        finds there in backward are the same values."""
        parts_R = _parts(bucket, [self.refs[cut.ref_idx].param.data for cut in bucket.cuts])
        for all_X, parts in zip(all_RX, parts_R, strict=True):
            _copy(parts, lay_out(all_X, parts))

    def _stage(self, bucket: Bucket, dtype: torch.dtype, num_ranks: int) -> torch.Tensor:
        """[num_ranks, X] for the contents of a bucket; what a rank with fewer rows leaves open is never read."""
        return torch.empty(num_ranks, bucket.numel, dtype=dtype, device=self.refs[0].param.device)


def _parts(bucket: Bucket, tensors: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """By rank, its rows of tensors, one for each cut of the bucket."""
    return zip(*(t.split(cut.rows_R, cut.dim) for t, cut in zip(tensors, bucket.cuts, strict=True)), strict=True)


def lay_out(flat_X: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of flat_X, one behind the other, each shaped like one of the parts."""
    views, start = [], 0
    for part in parts:
        views.append(flat_X[start : start + part.numel()].view(part.shape))
        start += part.numel()
    return views


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(sources))
