"""Experts in Megatron's optimizers: where weights, fp32 masters and moments of each lie, so that they can move together.

Megatron's distributed optimizer cuts a flat buffer into equal parts, one for each rank with the same experts; a part
may begin inside an expert. Letters: L slots of this rank, N elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from smartmoe.migrate import Staging, migrate
from smartmoe.online import OnlinePlacement
from smartmoe.ops.all_to_all import group_size
from smartmoe.placement import num_moves


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + len of one state of a parameter; `part` is None where this rank keeps none of them."""

    name: str
    param: torch.nn.Parameter
    part: torch.Tensor | None
    start: int

    def whole_view(self) -> torch.Tensor:
        """[L, ...], sharing memory with the state."""
        return self.part.view(self.param.shape)


class ExpertStates:
    """The states of experts' parameters in `optimizer`, Megatron's (a chain of them as a rule).

    expert_dp_group: the ranks with the same experts, over which the distributed optimizer cuts states; None = one rank.
    """

    def __init__(self, optimizer, expert_dp_group):
        self._optimizers = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        self.group = expert_dp_group

    def pieces(self, param: torch.nn.Parameter) -> list[Piece]:
        """Master and moments of `param` here, in an order that is the same on all ranks; a master that is the weight
        itself is left out. Moments that no step has made yet are missing everywhere."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                if any(param in chunk for chunk in _params_of_buffers(optimizer)):
                    return _without_aliases(param, self._sharded(optimizer, param))
            elif any(param is known for group in _model_groups(optimizer) for known in group):
                return _without_aliases(param, _unsharded(optimizer, param))
        raise ValueError(f"an expert's parameter of shape {list(param.shape)} is in no optimizer: is it frozen?")

    def _sharded(self, optimizer, param) -> list[Piece]:
        states, start = {}, 0
        if param in optimizer.model_param_gbuf_map:
            states = optimizer._get_main_param_and_optimizer_states(param)
            start = optimizer._get_model_param_range_map(param)["param"].start
        mine = {name: tensor for name, tensor in states.items() if tensor.dim() == 1}
        names = sorted(set().union(*self._all(sorted(mine))))
        return [Piece(name, param, mine.get(name), start) for name in names]

    def _all(self, mine):
        if group_size(self.group) == 1:
            return [mine]
        answers = [None] * group_size(self.group)
        dist.all_gather_object(answers, mine, group=self.group)
        return answers

    def gathered(self, piece: Piece) -> torch.Tensor:
        """[L, ...]: the whole state, from the ranks that keep its parts. Collective over the expert-dp group."""
        whole_N = torch.zeros(piece.param.numel(), dtype=torch.float32, device=piece.param.device)
        if piece.part is not None:
            whole_N[piece.start : piece.start + piece.part.numel()] = piece.part
        # parts do not overlap, so a sum of their bits is exact
        dist.all_reduce(whole_N.view(torch.int32), group=self.group)
        return whole_N.view(piece.param.shape)

    @staticmethod
    def scatter(piece: Piece, whole: torch.Tensor) -> None:
        """Keep this rank's part of what `gathered` gave and a migration changed."""
        if piece.part is not None:
            piece.part.copy_(whole.view(-1)[piece.start : piece.start + piece.part.numel()])


def _with_torch_adam(optimizer) -> Iterator[DistributedOptimizer]:
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(each, "optimizer", None)
        if isinstance(each, DistributedOptimizer) and isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            yield each


def before_loading(optimizer) -> None:
    """Without Apex and Transformer Engine, Megatron's distributed optimizer (0.19) stumbles over the numbers of steps that
    torch's Adam keeps beside its moments: it wants them before the first step has made them, and in every checkpoint."""
    for each in _with_torch_adam(optimizer):
        inner, fill = each.optimizer, each._set_main_param_and_optimizer_states
        for param in [param for group in inner.param_groups for param in group["params"] if not inner.state[param]]:
            moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[param] = {"step": torch.tensor(0.0), **moments}
        # what is no tensor is left as it is
        each._set_main_param_and_optimizer_states = lambda param, tensors, fill=fill: fill(
            param, {"step": None, **tensors}
        )


def after_loading(optimizer) -> None:
    """Give every parameter a number of steps of its own: Megatron loads one tensor into all of them, which the next step
    would raise once for each."""
    for each in _with_torch_adam(optimizer):
        for state in each.optimizer.state.values():
            state["step"] = state["step"].clone()


def _params_of_buffers(optimizer) -> Iterator[dict]:
    for buffer in optimizer.buffers:
        yield buffer.param_index_map


def _model_groups(optimizer):
    groups = [*getattr(optimizer, "float16_groups", []), *getattr(optimizer, "fp32_from_fp32_groups", [])]
    return groups or [group["params"] for group in optimizer.optimizer.param_groups]


def _unsharded(optimizer, param) -> list[Piece]:
    main = getattr(param, "main_param", None)
    main = param if main is None else main
    states = {"param": main, **optimizer.optimizer.state.get(main, {})}
    tensors = {name: tensor for name, tensor in states.items() if torch.is_tensor(tensor)}
    return [
        Piece(name, param, tensor.detach().view(-1), 0)
        for name, tensor in sorted(tensors.items())
        if tensor.numel() == param.numel()
    ]


def _without_aliases(param, pieces: Sequence[Piece]) -> list[Piece]:
    """Without the master of an fp32 parameter, which is the parameter; named "param" by Megatron."""
    return pieces if param.dtype != torch.float32 else [piece for piece in pieces if piece.name != "param"]


class MegatronPlacement(OnlinePlacement):
    """Online placement whose migrations reach into Megatron's optimizers. See OnlinePlacement."""

    def __init__(self, layers, online, *, states: ExpertStates, **kwargs):
        self._states = states
        super().__init__(layers, online, state_of=self._whole_states, **kwargs)

    def _pieces(self, layer) -> list[Piece]:
        return [piece for param in layer.experts.parameters() for piece in self._states.pieces(param)]

    def _is_cut(self) -> bool:
        return group_size(self._states.group) > 1 and any(
            isinstance(optimizer, DistributedOptimizer) for optimizer in self._states._optimizers
        )

    def _whole_states(self, layer) -> list[torch.Tensor]:
        weights = [param.data for param in layer.experts.parameters()]
        return weights if self._is_cut() else weights + [piece.whole_view() for piece in self._pieces(layer)]

    def move(self, targets: list[tuple]) -> float:
        """As OnlinePlacement.move; where the states of an expert lie on several ranks, each is put together, moved and
        cut again, one at a time. Collective over the expert group and the expert-dp group."""
        if self._is_cut():
            for layer, new in targets:
                if num_moves(layer.placement, new):
                    self._move_cut_states(layer, new, self._staging)
        return super().move(targets)

    def _move_cut_states(self, layer, new, staging: Staging) -> None:
        for piece in self._pieces(layer):
            whole = self._states.gathered(piece)
            migrate([([whole], layer.placement, new)], self._ep_group, staging)
            self._states.scatter(piece, whole)
