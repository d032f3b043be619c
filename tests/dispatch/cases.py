"""The table of routings that every dispatcher must carry, and the program that carries them on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.degree_search import Choice, DegreeSearch
from smartmoe.dispatch.overlapped import OverlappedDispatcher
from smartmoe.dispatch.padded import PaddedDispatcher
from smartmoe.dispatch.pipelined import PipelinedDispatcher
from smartmoe.dispatch.shadow import ShadowCost
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.ops.plan import slots_of
from smartmoe.placement import Placement
from tests import oracle

WIDTH, FFN = 16, 24
# Transfers are free and computing is dear: shadow whatever lowers the fullest rank.
EAGER = ShadowCost(bytes_per_s=1e30, flops_per_s=1.0)


@dataclass(frozen=True)
class Case:
    """One routing: tokens of each rank, experts, choices, and where experts live."""

    name: str
    num_tokens_W: tuple[int, ...]
    num_experts: int
    top_k: int
    kind: str = "random"
    activation: str = "gelu"
    bias: bool = True
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens_W)

    def placement(self) -> Placement:
        """A random arrangement; slots beyond the experts stay empty."""
        slots_per_rank = -(-self.num_experts // self.num_ranks)
        experts = np.full(slots_per_rank * self.num_ranks, -1)
        experts[: self.num_experts] = np.arange(self.num_experts)
        np.random.default_rng(self.seed).shuffle(experts)
        return Placement(self.num_ranks, tuple(experts.tolist()))

    def inputs(self, ep_rank: int):
        """(x [T, D], expert_idx [T, K], weight [T, K], grad of y [T, D]) of one rank, float64."""
        generator = torch.Generator().manual_seed(1000 * self.seed + ep_rank)
        num, shape = self.num_tokens_W[ep_rank], (self.num_tokens_W[ep_rank], self.top_k)
        scores = torch.rand(num, self.num_experts, generator=generator)
        expert_idx = scores.argsort(1)[:, : self.top_k]
        if self.kind == "hot":
            expert_idx = torch.full(shape, 1 % self.num_experts)
        elif self.kind == "few":
            expert_idx = expert_idx % 2
        elif self.kind == "drops":
            expert_idx = torch.where(torch.rand(shape, generator=generator) < 0.4, -1, expert_idx)
        elif self.kind == "all dropped":
            expert_idx = torch.full(shape, -1)
        elif self.kind == "one rank dropped" and ep_rank == 0:
            expert_idx = torch.full(shape, -1)
        weight = torch.rand(shape, generator=generator, dtype=torch.float64).masked_fill(expert_idx < 0, 0)
        x, grad = (oracle.rounded(torch.randn(num, WIDTH, generator=generator)) for _ in range(2))
        return x, expert_idx, weight, grad

    def weights(self):
        return oracle.make_weights(self.num_experts, WIDTH, FFN, self.activation, self.bias, self.seed)


def cases(num_ranks: int) -> list[Case]:
    """Every kind of trouble on `num_ranks` ranks."""
    even, odd = (8,) * num_ranks, tuple(5 + 3 * (rank % 3) for rank in range(num_ranks))
    per_rank = 2 * num_ranks
    return [
        Case("even", even, per_rank, 2),
        Case("one choice, swiglu", odd, per_rank, 1, activation="swiglu", seed=1),
        Case("three choices, empty slots", odd, 5 if num_ranks != 3 else 7, 3, seed=2),
        Case("one hot expert", even, per_rank, 2, kind="hot", seed=3),
        Case("two experts of many", odd, per_rank, 2, kind="few", seed=4),
        Case("dropped copies, no bias", odd, per_rank, 2, kind="drops", bias=False, seed=5),
        Case("everything dropped", even, per_rank, 2, kind="all dropped", seed=6),
        Case("a rank sends nothing", even, per_rank, 2, kind="one rank dropped", seed=7),
        Case("a rank has no tokens", (0, *odd[1:]), num_ranks, 1, seed=8),
    ]


class StackedExperts:
    """Experts with given weights, as a dispatcher sees them."""

    def __init__(self, weights, activation, impl):
        self._weights, self.activation, self.impl = weights, activation, impl

    def weights(self):
        return self._weights

    def __call__(self, rows, count_L):
        return self.compute(rows, count_L, self._weights)

    def compute(self, rows, count_L, weights):
        return expert_ffn(rows, count_L, *weights, activation=self.activation, impl=self.impl)


def dispatchers(group, slots_per_rank: int) -> dict:
    return {
        "basic": BasicDispatcher(group, slots_per_rank),
        "padded": PaddedDispatcher(group, slots_per_rank),
        "pipelined 1": PipelinedDispatcher(group, slots_per_rank, 1),
        "pipelined 4": PipelinedDispatcher(group, slots_per_rank, 4),
        "weights travel": always(PipelinedDispatcher(group, slots_per_rank), Choice(1, weights_travel=group is not None)),
        **({"two steps": in_two_steps(group, slots_per_rank, 2)} if group is not None and group.size() == 4 else {}),
        "overlapped 1": OverlappedDispatcher(group, slots_per_rank, 1),
        "overlapped 2": OverlappedDispatcher(group, slots_per_rank, 2),
        "overlapped all": OverlappedDispatcher(group, slots_per_rank, 99),
        "shadowing": OverlappedDispatcher(group, slots_per_rank, 2, EAGER),
    }


def in_two_steps(group, slots_per_rank: int, degree: int) -> PipelinedDispatcher:
    """One that takes the group's ranks for two nodes and always sends inside them first."""
    nodes = tuple(2 * rank // group.size() for rank in range(group.size()))
    return always(PipelinedDispatcher(group, slots_per_rank, degree, nodes), Choice(degree, in_two_steps=True))


def always(dispatcher: PipelinedDispatcher, choice: Choice) -> PipelinedDispatcher:
    """One that has no choice."""
    dispatcher.search, dispatcher._out_of_question = DegreeSearch((choice,)), lambda *args: ()
    return dispatcher


def carry(case: Case, dispatcher, impl: str, ep_rank: int, dtype, device, max_copies=None) -> dict:
    """Forward and backward of one case on this rank: y and the gradients of x, the combine weights and the
    experts."""
    x, expert_idx, weight, grad = (t.to(device) for t in case.inputs(ep_rank))
    x = x.to(dtype).requires_grad_()
    weight = weight.float().requires_grad_()
    placement = case.placement()
    weights = oracle.slots_of_rank(case.weights(), placement, ep_rank, dtype, device)
    slot_of_expert = torch.from_numpy(placement.primary_slot_E).to(device)
    routing = oracle.make_routing(expert_idx, weight, max_copies)
    slot_TK = slots_of(expert_idx, slot_of_expert[:, None])
    y = dispatcher(x, routing, slot_TK, StackedExperts(weights, case.activation, impl))
    y.backward(grad.to(dtype))
    return {
        "y": y.detach().cpu(),
        "x": x.grad.cpu(),
        "weight": weight.grad.cpu(),
        "experts": [None if w is None else w.grad.cpu() for w in weights],
    }


def expected(case: Case) -> list[dict]:
    """The oracle's answer for every rank."""
    weights = tuple(None if w is None else w.requires_grad_() for w in case.weights())
    answers = []
    for ep_rank in range(case.num_ranks):
        x, expert_idx, weight, grad = case.inputs(ep_rank)
        x.requires_grad_(), weight.requires_grad_()
        y = oracle.moe(x, expert_idx, weight, weights, case.activation)
        y.backward(grad)
        zero = torch.zeros_like
        answers.append(
            {"y": y.detach(), "x": x.grad, "weight": weight.grad if weight.grad is not None else zero(weight)}
        )
    for ep_rank, answer in enumerate(answers):
        answer["experts"] = [
            None if w is None else _grads_of_slots(w, case.placement().experts_of_rank(ep_rank)) for w in weights
        ]
    return answers


def _grads_of_slots(weight, experts):
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return torch.stack([grad[e] if e >= 0 else torch.zeros_like(grad[0]) for e in experts])


def compare(case: Case, got: list[dict], what: str, dtype) -> None:
    for ep_rank, (mine, want) in enumerate(zip(got, expected(case), strict=True)):
        label = f"{case.name}, {what}, ep_rank {ep_rank}"
        for key in ("y", "x", "weight"):
            oracle.assert_close(mine[key], want[key], dtype, f"{label}, {key}")
        for name, mine_w, want_w in zip(("w1", "b1", "w2", "b2"), mine["experts"], want["experts"], strict=True):
            assert (mine_w is None) == (want_w is None)
            if mine_w is not None:
                oracle.assert_close(mine_w, want_w, dtype, f"{label}, {name}")
