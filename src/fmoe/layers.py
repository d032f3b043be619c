"""FastMoE's general layer: any gate, any expert.

T tokens of this worker, K = top_k, W workers of `world_size`, L experts of each (num_expert), R rows of this worker's experts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fmoe.fastermoe.config import switch_from_env
from fmoe.functions import AllGather, MOEGather, MOEScatter, Slice, ensure_comm, prepare_forward
from fmoe.gates import NaiveGate
from fmoe.utils import get_torch_default_comm
from smartmoe.config import LayerConfig
from smartmoe.dispatch import build_dispatcher
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.gates import Routing

# Programs that put a layer's steps together themselves ask for it: their steps are the plain ones. FMoE asks the environment.
fmoe_faster_schedule = False


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Mark the parameters of `module`: DistributedGroupedDataParallel reduces them over the group of that name."""
    for param in module.parameters():
        param.dp_comm = comm


def _fmoe_general_global_forward(inp, gate, expert_fn, num_expert: int, world_size: int, **_):
    """Every copy of every token through its expert, not yet weighted: [T * K, ..] in the order of gate.flatten().

    inp: [T, D], or a structure of such; gate: [T] or [T, K] int64, -1 = dropped, whose result is 0. For programs that weight
    by themselves; FMoE does not use it. Collective over the group of `ensure_comm`.
    """
    pos, lec_E, gec_E, count_L, num_rows = prepare_forward(gate, num_expert, world_size)
    token_R = pos // (gate.shape[1] if gate.dim() == 2 else 1)
    rows = tree_map(lambda x: MOEScatter.apply(x, token_R, lec_E, gec_E, num_rows, world_size), inp)
    rows = expert_fn(rows, count_L)
    return tree_map(lambda x: MOEGather.apply(x, pos, lec_E, gec_E, gate.numel(), world_size), rows)


class FMoE(nn.Module):
    """A layer of num_expert experts on each of world_size workers.

    world_size: workers with different experts, those of moe_group (None: all processes). slice_group (or its older name
    mp_group): workers that have the same batch; each computes its slice and all get the whole result. gate: called as
    gate(d_model, num_expert, world_size, top_k), gives the module that is called with the input and returns (expert of each
    copy, -1 = dropped; score of each copy). expert: called as expert(d_model) num_expert times, or a list of such, one for
    each expert; its modules are called with (rows, their number [1] int64), or with the rows alone where they take no more.
    Without one a subclass sets self.experts to a module for all of them, which is called with (rows [R, D] sorted by expert,
    rows of each [L] int64). gate_hook: called with (experts, scores, None). mask: [T] integers, on any device, 0 = an ordinary
    token; mask_dict: by other value, what stands for the experts' output there. gate_bias: False is for NaiveGate and what
    derives from it; gates of other classes are not told.

    dispatcher is not FastMoE's: how tokens travel, "basic" (default, FastMoE's exchange) or "overlapped" (FasterMoE's; default
    with FMOE_FASTER_SCHEDULE_ENABLE). Both give the same result.
    """

    dispatchers = ("basic", "overlapped")
    counts_on_host, leaves_other_rows_alone = True, False

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group=None,
        slice_group=None,
        moe_group=None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] = NaiveGate,
        expert: Callable[[int], nn.Module] | list | None = None,
        gate_hook: Callable | None = None,
        mask: torch.Tensor | None = None,
        mask_dict: dict | None = None,
        gate_bias: bool = True,
        *,
        dispatcher: str | None = None,
    ):
        super().__init__()
        self.d_model, self.world_size, self.top_k = d_model, world_size, top_k
        self.moe_group, self.slice_group = moe_group, slice_group if mp_group is None else mp_group
        self.slice_size, self.slice_rank = 1, 0
        if self.slice_group is not None:
            self.slice_size, self.slice_rank = self.slice_group.size(), self.slice_group.rank()
        self.experts, self.experts_fused = None, expert is None
        if expert is not None:
            makers = expert if isinstance(expert, list) else [expert] * num_expert
            self.experts, num_expert = nn.ModuleList(make(d_model) for make in makers), len(makers)
        self.num_expert = num_expert
        has_bias = not isinstance(gate, type) or issubclass(gate, NaiveGate)
        options = {"gate_bias": False} if has_bias and not gate_bias else {}
        self.gate = gate(d_model, num_expert, world_size, top_k, **options)
        self.gate_hook, self.mask, self.mask_dict = gate_hook, mask, mask_dict
        self.dispatcher = dispatcher or ("overlapped" if switch_from_env("FMOE_FASTER_SCHEDULE_ENABLE") else "basic")
        if self.dispatcher not in self.dispatchers:
            names = ", ".join(self.dispatchers)
            raise ValueError(f'{type(self).__name__}: dispatcher = "{self.dispatcher}" is not one of {names}')
        if switch_from_env("FMOE_FASTER_SHADOW_ENABLE"):
            warnings.warn("fmoe: FMOE_FASTER_SHADOW_ENABLE has no effect; results are the same without", stacklevel=2)
        self._kept_dispatcher = None

    def __getstate__(self):
        """For copies and pickles: each makes a dispatcher of its own, which has a process group; marks are attributes of
        parameters, which torch does not copy."""
        marks = {name: param.dp_comm for name, param in self.named_parameters() if hasattr(param, "dp_comm")}
        return {**self.__dict__, "_kept_dispatcher": None, "_marks": marks}

    def __setstate__(self, state):
        marks = state.pop("_marks", {})
        super().__setstate__(state)
        for name, mark in marks.items():
            self.get_parameter(name).dp_comm = mark

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Mark the experts' parameters with `expert_dp_comm` and the gate's with "gate"."""
        for experts in self.experts if isinstance(self.experts, list) else [self.experts]:
            if experts is not None:
                mark_module_parallel_comm(experts, expert_dp_comm)
        mark_module_parallel_comm(self.gate, "gate")

    def expert_fn(self, inp, fwd_expert_count: torch.Tensor):
        """The experts' output for rows sorted by expert. inp: [R, D] or a structure of such; fwd_expert_count: [L] int64.
        Subclasses may replace it; with experts_fused = False self.experts may be a list of modules, one for each expert."""
        if self.experts_fused and not isinstance(self.experts, nn.ModuleList):
            return self.experts(inp, fwd_expert_count)
        leaves, spec = tree_flatten(inp)
        counts = fwd_expert_count.tolist()
        parts = zip(*(leaf.split(counts) for leaf in leaves), strict=True)
        outs = [
            tree_flatten(_call_expert(expert, tree_unflatten(part, spec), count))
            for expert, part, count in zip(self.experts, parts, counts, strict=True)
        ]
        whole = [torch.cat(pieces) for pieces in zip(*(out for out, _ in outs), strict=True)]
        return tree_unflatten(whole, outs[0][1])

    def forward(self, moe_inp):
        """moe_inp: [T, D], or a structure of such with the same T. Returns [T, ..], of the structure of the experts' output,
        0 for a token whose copies are all dropped. Collective over moe_group and slice_group. Raises ValueError, before
        anything is sent, where sizes do not fit."""
        leaves, spec = tree_flatten(moe_inp)
        self._check_input(leaves)
        group = self._group()
        if group is not None:
            ensure_comm(leaves[0], group)  # gates may exchange counts
        if self.slice_size > 1:
            leaves = [Slice.apply(leaf, self.slice_rank, self.slice_size, self.slice_group) for leaf in leaves]
        expert_idx_TK, score_TK = self._route(tree_unflatten(leaves, spec), leaves[0].shape[0])
        mask_T = None if self.mask is None or self.mask_dict is None else self.mask.reshape(-1).to(expert_idx_TK.device)
        slot_TK = expert_idx_TK if mask_T is None else expert_idx_TK.masked_fill((mask_T != 0).unsqueeze(1), -1)
        outs = self._through_experts(leaves, spec, group, slot_TK, score_TK)
        if mask_T is not None:
            outs = tree_map(lambda y_TD: y_TD + self._masked_output(y_TD, mask_T, score_TK), outs)
        if self.slice_size > 1:
            outs = tree_map(lambda y: AllGather.apply(y, self.slice_rank, self.slice_size, self.slice_group), outs)
        return outs

    def _check_input(self, leaves: list[torch.Tensor]) -> None:
        if any(leaf.dim() != 2 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
            shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
            raise ValueError(f"FMoE: its inputs are {shapes}, they must be [tokens, features] with equally many tokens")
        num_tokens = leaves[0].shape[0] // self.slice_size
        if self.mask is not None and self.mask_dict is not None and self.mask.numel() != num_tokens:
            raise ValueError(f"FMoE: mask has {self.mask.numel()} entries, but this worker has {num_tokens} tokens")

    def _group(self):
        if self.world_size == 1:
            return None
        group = get_torch_default_comm() if self.moe_group is None else self.moe_group
        if group.size() != self.world_size:
            raise ValueError(
                f"FMoE: world_size = {self.world_size}, but moe_group (all processes where it is None) has {group.size()}: "
                "give the group of the workers that have different experts"
            )
        return group

    def _route(self, inp, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the gate says, as ([T, K] int64 experts, [T, K] scores)."""
        top_k_idx, score = self.gate(inp)[:2]
        if self.gate_hook is not None:
            self.gate_hook(top_k_idx, score, None)
        if top_k_idx.numel() != num_tokens * self.top_k or score.numel() != num_tokens * self.top_k:
            raise ValueError(
                f"FMoE: its gate returned experts {list(top_k_idx.shape)} and scores {list(score.shape)}, they must be "
                f"[tokens, top_k] = {[num_tokens, self.top_k]}"
            )
        return top_k_idx.reshape(num_tokens, self.top_k).long(), score.reshape(num_tokens, self.top_k)

    def _through_experts(self, leaves, spec, group, slot_TK, score_TK):
        # weights of combine are float32 at least
        weight_TK = score_TK.to(torch.promote_types(score_TK.dtype, torch.float32)).masked_fill(slot_TK < 0, 0)

        def experts(rows: list[torch.Tensor], count_L):
            return self.expert_fn(tree_unflatten(rows, spec), count_L.cpu() if self.counts_on_host else count_L)

        if self.dispatcher != "basic" and len(leaves) == 1:
            return self._in_one_call(leaves[0], group, slot_TK, weight_TK, experts)
        exchange = BasicDispatcher(group, self.num_expert)
        rows, handles = zip(*(exchange.dispatch(leaf, slot_TK) for leaf in leaves), strict=True)
        outs = experts(list(rows), handles[0].count_L)
        return tree_map(lambda out: exchange.combine(out, handles[0], weight_TK), outs)

    def _in_one_call(self, x_TD, group, slot_TK, weight_TK, experts):
        dispatcher, dtype = self._dispatcher_for(group), None
        is_direct = isinstance(dispatcher, DirectDispatcher)

        def run(rows, count_L):
            nonlocal dtype
            out = experts([rows], count_L)
            dtype = out.dtype
            return out.to(rows.dtype) if is_direct else out  # its buffers have the type of the rows, under autocast, too

        run.impl = None if self.leaves_other_rows_alone else "loop"  # direct asks: "loop" gets the rows that count
        return dispatcher(x_TD, Routing(slot_TK, weight_TK, weight_TK.new_zeros(())), slot_TK, run).to(dtype)

    def _dispatcher_for(self, group):
        """Kept, as "direct" has buffers; made at the first call, when the groups are there."""
        if self._kept_dispatcher is None:
            layer = LayerConfig(dispatcher=self.dispatcher)
            self._kept_dispatcher = build_dispatcher(layer, group, slots_per_rank=self.num_expert)
        return self._kept_dispatcher

    def _masked_output(self, y_TD, mask_T, score_TK):
        """What stands for the experts' output of masked tokens, weighted as it would be; 0 for the others."""
        copies_TKD = y_TD.new_zeros(y_TD.shape[0], self.top_k, y_TD.shape[1])
        for value, stand_in in self.mask_dict.items():
            copies_TKD[mask_T == value] = stand_in
        return (score_TK.to(y_TD.dtype).unsqueeze(2) * copies_TKD).sum(1)


def _call_expert(expert: nn.Module, rows, count: int):
    """Experts written for FastMoE 1.0 take rows only, those for 1.1 their number, too."""
    accepts = inspect.signature(expert.forward).parameters.values()
    num_positional = sum(param.kind in (param.POSITIONAL_ONLY, param.POSITIONAL_OR_KEYWORD) for param in accepts)
    if num_positional > 1 or any(param.kind == param.VAR_POSITIONAL for param in accepts):
        return expert(rows, torch.tensor([count]))
    return expert(rows)
