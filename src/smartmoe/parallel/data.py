"""Data-parallel gradients: fp32 accumulation over micro-batches and one reduction per kind of parameter.

A parameter's attribute `parallel` says who shares it: "dense" (the default) every rank of the stage, "tensor" the ranks
with the same tensor slice (dp), "expert" the ranks that host the same experts (expert-dp). Losses are normalised by the
global number of tokens, so gradients are summed, never averaged.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from smartmoe.ops.adamw import accumulate_
from smartmoe.ops.all_to_all import group_rank
from smartmoe.parallel.early import EarlyReduction

KINDS = ("dense", "tensor", "expert")
SMALL, MANY = 1 << 18, 64  # gradients of fewer numbers wait until there are so many


@dataclass(frozen=True)
class ParamRef:
    """One parameter as the optimizer and the checkpoint see it: its storage on this rank and its fp32 gradient, None where
    only a share of that is kept (parallel.zero_passes)."""

    name: str
    kind: str
    param: nn.Parameter
    local: torch.Tensor
    grad: torch.Tensor | None


@dataclass(frozen=True)
class Share:
    """What of a parameter the optimizer of this rank updates: its values, a view of the parameter's storage, and their fp32
    gradient, contiguous and reduced. It is share `idx` of `num`; idx None = another rank that has the same answers for it.
    """

    value: torch.Tensor
    grad: torch.Tensor
    idx: int | None
    num: int


class GradientBuffers:
    """Flat fp32 gradient buffers of a module, filled by autograd hooks and reduced over the right groups.

    named_params: of any dtype on one device. groups: kind -> process group (None = nobody else has a copy). refs: the
    parameters; shares: what of each the optimizer of this rank updates, here all of it. Operations that can add a gradient
    to the buffers themselves do so by the parameter's `grad_sink` (ops.grad_sink); the hooks take in what autograd gets.
    """

    def __init__(self, named_params: list[tuple[str, nn.Parameter]], groups: dict[str, dist.ProcessGroup | None]):
        self._groups = groups
        self._flat: dict[str, torch.Tensor] = {}
        self._empty: set[int] = set()  # of refs: those without a gradient since the last step
        self._waiting: dict[int, torch.Tensor] = {}  # small gradients that are not accumulated yet, by ref
        self._place = {name: place for place, (name, _) in enumerate(named_params)}
        self.early: EarlyReduction | None = None
        self._early_kinds: frozenset[str] = frozenset()
        self.refs: list[ParamRef] = []
        for kind in KINDS:
            members = [(name, p) for name, p in named_params if getattr(p, "parallel", "dense") == kind]
            if members:
                self._add(kind, members)
        self.shares = [
            Share(ref.local, ref.grad, 0 if group_rank(groups.get(ref.kind)) == 0 else None, 1) for ref in self.refs
        ]

    def _add(self, kind: str, members: list[tuple[str, nn.Parameter]]) -> None:
        locals_ = [param.detach() for _, param in members]
        for (name, param), local, grad in zip(members, locals_, self._allocate(kind, locals_), strict=True):
            self._empty.add(len(self.refs))
            if grad is not None:
                param.register_post_accumulate_grad_hook(self._accumulate_into(len(self.refs), grad))
            param.grad_sink = _BufferSink(weakref.proxy(self), len(self.refs))
            self.refs.append(ParamRef(name, kind, param, local, grad))

    def _allocate(self, kind: str, locals_: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """The fp32 gradient of each of these parameters, one behind the other."""
        flat = torch.zeros(sum(t.numel() for t in locals_), dtype=torch.float32, device=locals_[0].device)
        self._flat[kind] = flat
        parts = flat.split([local.numel() for local in locals_])
        return [part.view(local.shape) for part, local in zip(parts, locals_, strict=True)]

    def _accumulate_into(self, ref_idx: int, grad: torch.Tensor):
        mine = weakref.proxy(self)  # a hook that has its parameter through C++, where nobody looks for cycles, keeps it forever
        is_small = grad.numel() < SMALL

        def hook(param: nn.Parameter) -> None:
            if param.grad is not None:  # else all of it went into the sink
                mine.take_in(ref_idx, param.grad, is_small)
                param.grad = None

        return hook

    def take_in(self, ref_idx: int, part: torch.Tensor, may_wait: bool) -> None:
        """Accumulate a gradient, or keep it for a while."""
        if not may_wait or self.early is not None:
            accumulate_(self.refs[ref_idx].grad, part, is_first=self.fill(ref_idx))
            return
        if len(self._waiting) == MANY or ref_idx in self._waiting:
            self.flush()
        self._waiting[ref_idx] = part

    def flush(self) -> None:
        """Accumulate the gradients that wait: few calls for all, as a launch takes longer than such a sum."""
        groups = defaultdict(list)
        for ref_idx, part in self._waiting.items():
            groups[self.fill(ref_idx), part.dtype].append((self.refs[ref_idx].grad, part))
        self._waiting.clear()
        for (is_first, dtype), pairs in groups.items():
            totals, parts = map(list, zip(*pairs, strict=True))
            if dtype != torch.float32 and not is_first:  # torch adds those of two dtypes one by one, but copies them together
                parts, halves = [torch.empty_like(total) for total in totals], parts
                torch._foreach_copy_(parts, halves)
            (torch._foreach_copy_ if is_first else torch._foreach_add_)(totals, parts)

    def fill(self, ref_idx: int) -> bool:
        """Note that a gradient is about to be written; returns whether it is the first since `zero` and must overwrite."""
        is_first = ref_idx in self._empty
        self._empty.discard(ref_idx)
        return is_first

    def take(self, ref_idx: int) -> tuple[torch.Tensor, bool]:
        """See GradSink.take."""
        return self.refs[ref_idx].grad, self.fill(ref_idx)

    def adopt(self, masters: Sequence[torch.Tensor]) -> None:
        """Told, once, the fp32 values of all shares: the optimizer changes them in place."""

    def is_away(self, ref_idx: int) -> bool:
        """Whether this parameter's values are on this rank only while passes use them, and its share alone at other times."""
        return False

    def let_go(self) -> None:
        """Let go of whole values that a pass without its backward pass has left here."""

    def filled(self) -> list[int]:
        """The refs, by index, that have a gradient since `zero`."""
        return [ref_idx for ref_idx in range(len(self.refs)) if ref_idx not in self._empty]

    def reduce_late(self, late: bool) -> None:
        """Whether passes reduce nothing but inside `early.within`, as those do that a graph replays: its hooks ran once."""
        if self.early is not None:
            self.early.waits_for_finish = late
            self.early.reset(1 if late else None)

    def reduce_early(self, num_passes: int, kinds: Sequence[str] = KINDS) -> None:
        """From now on reduce gradients of these kinds while backward passes run, as they become complete: after
        num_passes gradients for each parameter since `zero`. Nobody but backward passes may change them."""
        groups = {kind: self._groups[kind] for kind in kinds if kind in self._flat and self._groups.get(kind) is not None}
        order = [self._place[ref.name] for ref in self.refs]
        self.early = EarlyReduction(self.refs, self._flat, order, groups, num_passes)
        self._early_kinds = frozenset(groups)
        for ref_idx, ref in enumerate(self.refs):
            ref.param.register_hook(self._note(ref_idx))

    def _note(self, ref_idx: int):
        """A hook that runs once in a pass, before the hook that accumulates and behind all uses of the parameter, also
        where no gradient comes to it because the sink has it."""
        mine = weakref.proxy(self)
        return lambda _: mine.early.note(ref_idx)

    def zero(self) -> None:
        """Forget the gradients: what they were is overwritten by the first backward pass, or by `complete`."""
        self._waiting.clear()
        self._empty = set(range(len(self.refs)))
        if self.early is not None:
            self.early.reset()

    def complete(self) -> None:
        """Accumulate what waits, and zero what no backward pass has written since `zero`. Before this only hooks may touch
        the gradients; `reduce` does so first."""
        self.flush()
        for ref_idx in self._empty:
            grad = self.refs[ref_idx].grad
            (self.shares[ref_idx].grad if grad is None else grad).zero_()
        self._empty.clear()

    def is_reduced(self, kind: str) -> bool:
        """Whether other ranks add to gradients of this kind."""
        return self._groups.get(kind) is not None

    def reduce(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Sum the gradients over each kind's group. Collective over dense, tensor and expert groups, one after the other.

        meanwhile: called while the last is under way; it may read gradients that are not reduced, and write none."""
        self.complete()
        work: dist.Work | None = None
        for kind, flat in self._flat.items():
            if self.is_reduced(kind) and kind not in self._early_kinds:
                if work is not None:  # NCCL does not promise that two communicators at once get by; they have one link, too
                    work.wait()
                work = dist.all_reduce(flat, group=self._groups[kind], async_op=True)
        meanwhile()
        if work is not None:
            work.wait()  # on a GPU the stream waits, not the host
        if self.early is not None:
            self.early.finish()

    def scale(self, factor: float) -> None:
        for flat in self._flat.values():
            flat.mul_(factor)

    @torch.no_grad()
    def publish(self, masters: Sequence[torch.Tensor], only_cut: bool = False) -> None:
        """Write the fp32 values of all shares, given this rank's in their order, into the parameters; only_cut: only where
        the share is not the whole parameter."""
        if only_cut:
            return
        for master, share in zip(masters, self.shares, strict=True):
            if share.num == 1 and master.data_ptr() != share.value.data_ptr():
                share.value.copy_(master)


class _BufferSink:
    """A parameter's `grad_sink`: its place in the buffers."""

    is_urgent, held_G = False, None

    def __init__(self, buffers: GradientBuffers, ref_idx: int):
        self._buffers, self._ref_idx = buffers, ref_idx

    @property
    def may_end_late(self) -> bool:
        return self._buffers.early is None and self._buffers.refs[self._ref_idx].grad is not None

    def take(self) -> tuple[torch.Tensor, bool]:
        return self._buffers.take(self._ref_idx)
