"""ZeRO-2 and 3: gradients and weights of which a rank keeps its rows only, whole for as long as a pass needs them.

A unit is a part of the model whose parameters are used together: a transformer block, the embeddings, the head. When the
backward pass of a unit is done, its gradients are reduce-scattered and added to the float32 sums of this rank's rows, so
no sum of the whole is kept from one micro-batch to the next (ZeRO-2). With ZeRO-3 the weights are gathered for the forward
and once more for the backward pass of a unit, that of the next unit while this one computes, and freed behind it. Rows,
shares, checkpoints and what moves with an expert are those of ZeRO-1 (parallel.zero).

Of a parameter that R ranks share, ZeRO-2 saves 4 (1 - 1/R) bytes a number beside what ZeRO-1 saves, and ZeRO-3 all of its
weight's bytes more: between passes float32 masters of the rows are all there is. Passes need room for the gradients of a
unit, what travels of them, and the weights of two. They cost a reduce-scatter of 4 bytes a number for every micro-batch
instead of one a step, ZeRO-3 two gathers of the weight's bytes beside it, and save the gather behind the step. So they pay
where state fills the memory, micro-batches are few or large, and links fast (planner.sharding weighs it).

torch's own FSDP2 (fully_shard) shards in the same way (Rajbhandari et al., SC 2020; Zhao et al., "PyTorch FSDP", VLDB 2023),
but makes DTensors of the parameters, takes gradients from autograd alone, and hooks modules that are called: here experts
travel as rows of plain tensors, their products add gradients to sums themselves, and a norm is used without being called.

What starts an exchange is where a pass stands, never whether a gradient has come: all ranks start the same ones in the same
order, also where a rank has no row for any of its experts.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from smartmoe.config import RunConfig
from smartmoe.ops.all_to_all import group_size
from smartmoe.parallel.data import KINDS, GradientBuffers, ParamRef
from smartmoe.parallel.zero import BUCKET_BYTES, Bucket, ShardedBuffers, lay_out

MAX_UNDER_WAY = 2  # buckets of gradients that travel while backward goes on


def make_buffers(
    config: RunConfig,
    named_params: list[tuple[str, nn.Parameter]],
    groups: dict[str, dist.ProcessGroup | None],
    chunks: list[nn.Module],
) -> GradientBuffers:
    """The gradient buffers for workload.zero. Experts stay as ZeRO-1 has them where copies of them bring gradients behind
    the passes (online.replicate = "history"), and their weights stay whole where copies share their memory."""
    zero, replicate = config.workload.zero, config.online.replicate
    if zero < 2:
        return (ShardedBuffers if zero else GradientBuffers)(named_params, groups)
    away = [kind for kind in KINDS if zero == 3 and (kind != "expert" or replicate == "never")]
    whole_sums = ["expert"] if replicate == "history" else []
    return PassShardedBuffers(named_params, groups, chunks, whole_sums=whole_sums, away=away)


@dataclass(eq=False)
class Unit:
    """Parameters that passes use together. can_go: whether passes say when they begin and end to use its weights.
    is_here: whether the weights are whole on this rank; coming: what has been asked for and has not been written into
    them; is_in_backward: between the beginning and the end of its backward pass."""

    params: list[nn.Parameter]
    can_go: bool
    buckets: list[Bucket] = field(default_factory=list)
    is_here: bool = True
    coming: list[tuple[Bucket, torch.Tensor, dist.Work]] = field(default_factory=list)
    is_in_backward: bool = False

    @property
    def away(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket.is_away]


@dataclass(eq=False)
class _Chunk:
    """The units of one model chunk, in the order of a forward pass, and the rest. When a backward pass ends is known of all
    units but those `behind`, which have no input that gets a gradient: they end with the pass."""

    in_order: list[Unit]
    rest: Unit
    has_embeddings: bool
    is_open: bool = False  # a backward pass is under way

    @property
    def behind(self) -> list[Unit]:
        return [self.rest, *self.in_order[: int(self.has_embeddings)]]


class PassShardedBuffers(ShardedBuffers):
    """Gradient buffers that hold sums of this rank's rows alone, filled unit by unit in each backward pass.

    chunks: the models that the parameters belong to; hooks are added to their modules. whole_sums: kinds whose gradients stay
    whole until `reduce`, as with ZeRO-1, because somebody adds to them behind the passes. away: kinds whose weights are
    kept as rows, too (ZeRO-3). With kinds of which no other rank has a copy nothing is done.
    """

    def __init__(
        self,
        named_params: list[tuple[str, nn.Parameter]],
        groups: dict[str, dist.ProcessGroup | None],
        chunks: Iterable[nn.Module],
        *,
        whole_sums: Sequence[str] = (),
        away: Sequence[str] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self._in_passes = {kind for kind, group in groups.items() if group_size(group) > 1} - set(whole_sums)
        self._away = self._in_passes & set(away)
        self._chunks = [_units_of(chunk) for chunk in chunks]
        self._units = [unit for chunk in self._chunks for unit in (*chunk.in_order, chunk.rest)]
        self._unit_of = {id(param): number for number, unit in enumerate(self._units) for param in unit.params}
        self._taken: dict[int, torch.Tensor] = {}  # gradients that operations have summed in this pass, by ref
        self._under_way: deque[tuple[Bucket, torch.Tensor, dist.Work]] = deque()
        self._masters: list[torch.Tensor] = []
        super().__init__(named_params, groups, bucket_bytes)
        for bucket in self.buckets:
            if bucket.unit is not None:
                self._units[bucket.unit].buckets.append(bucket)
        self._buckets_of_ref = {cut.ref_idx: bucket for bucket in self.buckets for cut in bucket.cuts}
        for chunk, units in zip(chunks, self._chunks, strict=True):
            _Hooks(weakref.proxy(self), units).join(chunk)

    def _allocate(self, kind: str, locals_: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return [None] * len(locals_) if kind in self._in_passes else super()._allocate(kind, locals_)

    def _when(self, ref: ParamRef) -> tuple[int | None, bool]:
        if ref.kind not in self._in_passes:
            return None, False
        number = self._unit_of[id(ref.param)]
        return number, ref.kind in self._away and self._units[number].can_go

    # ------------------------------------------------------------------------------------------------------ gradients

    def take(self, ref_idx: int) -> tuple[torch.Tensor, bool]:
        ref = self.refs[ref_idx]
        if ref.grad is not None:
            return super().take(ref_idx)
        is_first = ref_idx not in self._taken
        if is_first:
            self._taken[ref_idx] = torch.empty(ref.param.shape, dtype=torch.float32, device=ref.param.device)
        return self._taken[ref_idx], is_first

    def collect(self, unit: Unit) -> None:
        """Add what one backward pass has given a unit to the sums of this rank's rows; it travels while others compute.
        Collective over the groups of its buckets."""
        for bucket in unit.buckets:
            if len(self._under_way) == MAX_UNDER_WAY:
                self._add_next()
            grads = [self._whole_grad(cut.ref_idx) for cut in bucket.cuts]
            self._under_way.append((bucket, *self.scatter(bucket, grads, async_op=True)))

    def add_all(self) -> None:
        """Add what is still under way."""
        while self._under_way:
            self._add_next()

    def _add_next(self) -> None:
        bucket, mine_X, work = self._under_way.popleft()
        work.wait()
        sums = self.grads_of(bucket)
        parts = lay_out(mine_X, sums)
        are_first = [self.fill(cut.ref_idx) for cut in bucket.cuts]  # a bucket's are filled together
        (torch._foreach_copy_ if all(are_first) else torch._foreach_add_)(sums, parts)

    def _whole_grad(self, ref_idx: int) -> torch.Tensor:
        """What this pass has given a parameter, which forgets it; zeros where nothing came."""
        param = self.refs[ref_idx].param
        total, grad = self._taken.pop(ref_idx, None), param.grad
        param.grad = None
        if total is None:
            return torch.zeros((), device=param.device).expand(param.shape) if grad is None else grad
        return total if grad is None else total.add_(grad)

    def complete(self) -> None:
        """Raises RuntimeError where a gradient came when those of its unit had been collected."""
        for ref_idx, ref in enumerate(self.refs):
            if ref.grad is None and (ref.param.grad is not None or ref_idx in self._taken):
                raise RuntimeError(
                    f"{ref.name}: a gradient came after the backward pass of its block, which workload.zero = 2 and 3 do "
                    f"not see: take workload.zero = 1"
                )
        super().complete()

    def zero(self) -> None:
        super().zero()
        self._taken.clear()
        self._under_way.clear()
        for ref in self.refs:
            if ref.grad is None:
                ref.param.grad = None
        for chunk in self._chunks:
            chunk.is_open = False
        self.let_go()

    # -------------------------------------------------------------------------------------------------------- weights

    def adopt(self, masters: Sequence[torch.Tensor]) -> None:
        self._masters = list(masters)
        self.let_go()

    def is_away(self, ref_idx: int) -> bool:
        bucket = self._buckets_of_ref.get(ref_idx)
        return bucket is not None and bucket.is_away

    def publish(self, masters: Sequence[torch.Tensor], only_cut: bool = False) -> None:
        super().publish(masters, only_cut)
        self.let_go()  # it is old now

    @torch.no_grad()
    def ask(self, unit: Unit) -> None:
        """Start to gather the weights of a unit, where they are neither here nor on their way. Collective over the groups of
        its buckets."""
        if not unit.is_here and not unit.coming:
            unit.coming = [(bucket, *self.gather(bucket, self._masters, async_op=True)) for bucket in unit.away]

    @torch.no_grad()
    def bring(self, unit: Unit) -> None:
        """Have the weights of a unit: whatever is launched from now on reads them. Collective as `ask`."""
        if unit.is_here:
            return
        self.ask(unit)
        for bucket, all_RX, work in unit.coming:
            for cut in bucket.cuts:
                _resize(self.refs[cut.ref_idx].param, self.refs[cut.ref_idx].param.numel())
            work.wait()
            self.spread(bucket, all_RX)
        unit.coming, unit.is_here = [], True

    def send_away(self, unit: Unit) -> None:
        """Let go of the weights of a unit."""
        for bucket in unit.away:
            for cut in bucket.cuts:
                _resize(self.refs[cut.ref_idx].param, 0)
        unit.coming, unit.is_here, unit.is_in_backward = [], not unit.away, False

    def let_go(self) -> None:
        for unit in self._units:
            self.send_away(unit)


def _resize(param: nn.Parameter, numel: int) -> None:
    """Give the memory of a parameter back, or take memory for it; tensors that autograd has saved see the same memory."""
    storage, num_bytes = param.untyped_storage(), numel * param.element_size()
    if storage.nbytes() != num_bytes:
        storage.resize_(num_bytes)


# ------------------------------------------------------------------------------------------------------------ where a pass is


def _units_of(chunk: nn.Module) -> _Chunk:
    """The units of a model: its `blocks`, `token_embedding` with `position_embedding`, and `head`, where it has them. What else
    it has may be used without being called: nobody can say when."""
    embeddings, head = getattr(chunk, "token_embedding", None), getattr(chunk, "head", None)
    parts = [] if embeddings is None else [[embeddings, chunk.position_embedding]]
    parts += [[block] for block in chunk.blocks.values()] + ([] if head is None else [[head]])
    in_order = [Unit([param for module in part for param in module.parameters()], can_go=True) for part in parts]
    known = {id(param) for unit in in_order for param in unit.params}
    rest = Unit([param for param in chunk.parameters() if id(param) not in known], can_go=False)
    return _Chunk(in_order, rest, has_embeddings=embeddings is not None)


class _Hooks:
    """Tells the buffers where the passes of a chunk are."""

    def __init__(self, buffers: PassShardedBuffers, chunk: _Chunk):
        self._buffers, self._chunk = buffers, chunk

    def join(self, model: nn.Module) -> None:
        units = list(self._chunk.in_order)
        if self._chunk.has_embeddings:
            first = units.pop(0)
            model.token_embedding.register_forward_pre_hook(lambda module, args: self._begin_forward(first))
            model.position_embedding.register_forward_hook(lambda module, args, output: self._end_forward(first))
        for block, unit in zip(model.blocks.values(), units, strict=False):
            block.register_forward_pre_hook(partial(self._enter_block, unit))
            block.register_forward_hook(partial(self._leave_block, unit))
        if getattr(model, "head", None) is not None:
            model.head.register_forward_pre_hook(partial(self._enter_block, units[-1]))
            model.head.register_forward_hook(partial(self._leave_head, units[-1]))

    def _enter_block(self, unit: Unit, module: nn.Module, args: tuple) -> tuple:
        self._begin_forward(unit)
        num_marked = 1 if len(args) == 1 or args[1] is None else 2  # x, and a block's update
        return *_Mark.apply(partial(self._end_backward, unit), *args[:num_marked]), *args[num_marked:]

    def _leave_block(self, unit: Unit, module: nn.Module, args: tuple, output: tuple) -> tuple:
        output = _Mark.apply(partial(self._begin_backward, unit), *output)
        self._end_forward(unit)
        return output

    def _leave_head(self, unit: Unit, module: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        if logits.requires_grad:  # not a mark: the loss may overwrite logits, which it may not do to a view
            logits.register_hook(lambda _: self._begin_backward(unit))  # its backward pass follows: the weights stay
        else:
            self._end_forward(unit)

    def _next_to(self, unit: Unit, step: int) -> Unit | None:
        place = self._chunk.in_order.index(unit) + step
        return self._chunk.in_order[place] if 0 <= place < len(self._chunk.in_order) else None

    def _begin_forward(self, unit: Unit) -> None:
        if unit.is_in_backward:  # its activations are computed again
            return
        self._buffers.bring(unit)
        following = self._next_to(unit, 1)
        if following is not None:
            self._buffers.ask(following)

    def _end_forward(self, unit: Unit) -> None:
        if not unit.is_in_backward:
            self._buffers.send_away(unit)

    def _begin_backward(self, unit: Unit) -> None:
        if not self._chunk.is_open:
            self._chunk.is_open = True
            Variable._execution_engine.queue_callback(self._end_pass)
        self._buffers.bring(unit)
        unit.is_in_backward = True
        following = self._next_to(unit, -1)
        if following is not None and following not in self._chunk.behind:  # gradients of embeddings need no weights
            self._buffers.ask(following)

    def _end_backward(self, unit: Unit) -> None:
        self._buffers.send_away(unit)
        self._buffers.collect(unit)

    def _end_pass(self) -> None:
        self._chunk.is_open = False
        for unit in self._chunk.behind:
            self._buffers.collect(unit)
        self._buffers.add_all()


class _Mark(torch.autograd.Function):
    """The identity; its backward pass, when all gradients behind it are known, calls `reached`."""

    @staticmethod
    def forward(ctx, reached: Callable[[], None], *tensors):
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.reached()
        return None, *grads
