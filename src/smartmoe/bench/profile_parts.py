"""The pieces of a training step as the trainer runs them, one function each, ready to be timed by profile_cluster.

Each builder takes a `Site` (device, dtype, ranks) and sizes and returns step(mark): it calls mark() between forward and
backward, or never for a piece that has one part. Of a piece with a backward part step(mark, copies) runs so many forward and
then one backward pass through all of them. Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from smartmoe.bench.measure import World
from smartmoe.config import GateConfig, ModelConfig, ParallelPlan, Workload
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.gates import build_gate
from smartmoe.gpt import attend
from smartmoe.mesh import Mesh, all_gather, reduce_scatter
from smartmoe.ops.adamw import accumulate_
from smartmoe.ops.all_to_all import group_size
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import count_slots, make_plan, slots_of
from smartmoe.ops.regroup import order_by_slot, reorder, restore
from smartmoe.ops.residual_norm import residual_norm
from smartmoe.ops.token_loss import summed_cross_entropy
from smartmoe.optimizer import MixedAdamW
from smartmoe.parallel.data import GradientBuffers

Step = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Site:
    """Where pieces run, and in what precision."""

    world: World
    dtype: torch.dtype

    def randn(self, *shape, grad: bool = False) -> torch.Tensor:
        made = torch.randn(shape, device=self.world.device, dtype=torch.float32).mul_(0.02).to(self.dtype)
        return made.requires_grad_(grad)


def _there_and_back(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad=None) -> Step:
    if grad is None:
        with torch.no_grad():
            grad = torch.randn_like(forward()).mul_(1e-3)  # products of equal numbers take less power

    def step(mark, copies=1):
        out = [forward() for _ in range(copies)]
        mark()
        torch.autograd.grad(out, inputs, [grad] * copies, allow_unused=True)

    return step


def linear(site: Site, tokens: int, inner: int, outer: int) -> Step:
    x, w = site.randn(tokens, inner, grad=True), site.randn(outer, inner, grad=True)
    return _there_and_back(lambda: F.linear(x, w), [x, w])


def attention(site: Site, samples: int, heads: int, tokens: int, head_dim: int) -> Step:
    """Of a block, between its two products."""
    qkv_BTX = site.randn(samples, tokens, heads * 3 * head_dim, grad=True)
    return _there_and_back(lambda: attend(qkv_BTX, head_dim), [qkv_BTX])


class _Sum:
    """A weight's `grad_sink` that holds the gradients of earlier micro-batches."""

    is_urgent, held_G, may_end_late = False, None, False

    def __init__(self, weight: torch.Tensor):
        self._total = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)

    def take(self) -> tuple[torch.Tensor, bool]:
        return self._total, False


def expert_weights(site: Site, slots: int, width: int, ffn: int, activation: str) -> list[torch.Tensor]:
    """Both matrices and biases. ffn: the width of one expert's inside (its first matrix is twice as wide for swiglu). Their
    gradients are added to float32 sums, as in training."""
    wide = ffn * (2 if activation == "swiglu" else 1)
    shapes = ((slots, width, wide), (slots, wide), (slots, ffn, width), (slots, width))
    weights = [site.randn(*shape, grad=True) for shape in shapes]
    for weight in weights:
        weight.grad_sink = _Sum(weight)
    return weights


def experts(rows_RD, grad_RD, counts_L: list[int], weights: list[torch.Tensor], activation: str, impl: str) -> Step:
    """As many rows for each expert; grad_RD: of the result. Pieces may share all of them."""
    rows_RD, count = rows_RD.detach().requires_grad_(), torch.tensor(counts_L, device=rows_RD.device)
    return _there_and_back(
        lambda: expert_ffn(rows_RD, count, *weights, activation=activation, impl=impl), [rows_RD, *weights], grad_RD
    )


def gate(site: Site, tokens: int, width: int, experts: int, top_k: int, limited: bool) -> Step:
    """The naive gate, or with `limited` a gate with capacity and balance loss, statistics of this rank alone; then what the
    layer makes of its choice: slots, and counts for whoever watches. Backward ends with the sum of what comes to x from the
    gate and what comes through the experts."""
    model = ModelConfig(hidden_size=width, num_heads=1, num_experts=experts, top_k=top_k, seq_len=tokens)
    config = GateConfig(kind="gshard" if limited and top_k == 2 else "naive", capacity=1.2 if limited else None)
    module = build_gate(model, config, layer_idx=0, seed=1, seq_len=tokens, device=site.world.device)
    x_TD, grad_TD = site.randn(tokens, width, grad=True), site.randn(tokens, width)
    token_id = torch.arange(tokens, device=site.world.device)
    params = [p for p in module.parameters()]
    slot_of_expert_E = torch.arange(experts, device=site.world.device)

    def step(mark, copies=1):
        out = []
        for _ in range(copies):
            routing = module(x_TD, token_id, num_segments=1)
            slots_of(routing.expert_idx_TK, slot_of_expert_E.unsqueeze(1))
            count_slots(routing.expert_idx_TK, experts)
            out += [routing.weight_TK.sum() + routing.balance_loss, x_TD.view_as(x_TD)]
        mark()
        torch.autograd.grad(out, [x_TD, *params], [None, grad_TD] * copies, allow_unused=True)

    return step


def route(site: Site, tokens: int, copies: int, width: int) -> Step:
    """All that the basic dispatcher does on one rank, exchange and sizes apart: plan, permute, reorder, and back."""
    top_k, num_slots = copies // tokens, 16
    x_TD = site.randn(tokens, width, grad=True)
    weight_TK = torch.rand(tokens, top_k, device=site.world.device, requires_grad=True)
    slot_TK = torch.rand(tokens, num_slots, device=site.world.device).topk(top_k, dim=1).indices
    with torch.no_grad():
        half = count_slots(slot_TK, num_slots) // 2
        received_WL = torch.stack([half, count_slots(slot_TK, num_slots) - half])

    def forward():
        count_slots(slot_TK, num_slots)
        plan = make_plan(slot_TK, num_slots, copies)
        order = order_by_slot(received_WL, copies)
        rows = restore(reorder(permute(x_TD, plan), order), order)
        return combine(rows, weight_TK, plan)

    return _there_and_back(forward, [x_TD, weight_TK])


DIRECT_SLOTS = 8  # of a rank, in the piece that times the direct dispatcher


def direct_slots(ep_rank: int, num_ranks: int, tokens: int, top_k: int, bias: float) -> torch.Tensor:
    """[tokens, top_k] slots that a rank's tokens choose, on the host; the larger `bias`, the more of them on rank 0, all
    from 1 on."""
    scores = torch.rand(tokens, DIRECT_SLOTS * num_ranks, generator=torch.Generator().manual_seed(ep_rank))
    scores[:, :DIRECT_SLOTS] += bias
    return scores.topk(top_k, dim=1).indices


def direct(site: Site, tokens: int, top_k: int, width: int, group, bias: float) -> Step:
    """The direct dispatcher's whole way there and back over `group`, experts left out. Collective."""
    world, num_ranks = site.world, group_size(group)
    dispatcher = DirectDispatcher(group, DIRECT_SLOTS, float(num_ranks))
    x_TD = site.randn(tokens, width, grad=True)
    weight_TK = torch.rand(tokens, top_k, device=world.device, requires_grad=True)
    slot_TK = direct_slots(world.ep_rank, num_ranks, tokens, top_k, bias).to(world.device)

    def forward():
        rows, handle = dispatcher.dispatch(x_TD, slot_TK, weight_TK)
        if not rows.is_cuda:
            rows = rows[: int(handle.plan.num_rows)]
        return dispatcher.combine(rows, handle)

    return _there_and_back(forward, [x_TD, weight_TK])


def norm(site: Site, tokens: int, width: int) -> Step:
    """The two layer norms of a block, the addition between them and the one at its end; attention and experts left out."""
    x = site.randn(tokens, width, grad=True)
    first, second = (torch.nn.LayerNorm(width).to(site.world.device, site.dtype) for _ in range(2))

    def forward():
        same, normed = residual_norm(x, None, first)
        total, normed = residual_norm(same, normed, second)
        return total + normed

    return _there_and_back(forward, [x, *first.parameters(), *second.parameters()])


def embedding(site: Site, tokens: int, width: int, vocab: int) -> Step:
    table, position = site.randn(vocab, width, grad=True), site.randn(tokens, width, grad=True)
    idx = torch.randint(vocab, (tokens,), device=site.world.device)
    place = torch.arange(tokens, device=site.world.device)
    return _there_and_back(lambda: F.embedding(idx, table) + F.embedding(place, position), [table, position])


def loss(site: Site, tokens: int, vocab: int) -> Step:
    """Each copy has logits of its own: their gradients overwrite them."""
    logits = [site.randn(tokens, vocab, grad=True) for _ in range(2)]
    target = torch.randint(vocab, (tokens,), device=site.world.device)
    grad = torch.full((1,), 1e-3, device=site.world.device)

    def step(mark, copies=1):
        out = [summed_cross_entropy(each, target).view(1) for each in logits[:copies]]
        mark()
        torch.autograd.grad(out, logits[:copies], [grad] * copies)

    return step


def _params(site: Site, numel: int, tensors: int) -> list[tuple[str, torch.nn.Parameter]]:
    size = -(-numel // tensors)
    return [(f"p{k}", torch.nn.Parameter(site.randn(1, size))) for k in range(tensors)]


def by_sample(site: Site, numel: int) -> Step:
    """A gathered sequence from rank by rank to sample by sample, as tensor parallelism needs it."""
    x_WBN = site.randn(2, 4, numel // 8)
    return lambda mark: x_WBN.transpose(0, 1).contiguous()


def accumulate(site: Site, numel: int, tensors: int) -> Step:
    """Adding each gradient to its float32 sum, as the hooks do after every micro-batch."""
    params = [param for _, param in _params(site, numel, tensors)]
    sums = [torch.zeros_like(param, dtype=torch.float32) for param in params]

    @torch.no_grad()
    def step(mark):
        for total, param in zip(sums, params, strict=True):
            accumulate_(total, param, is_first=False)

    return step


def optimizer(site: Site, numel: int, tensors: int) -> tuple[Step, Callable[[], None]]:
    """(a whole optimizer step without its reductions, what refills the gradients after it)."""
    named = _params(site, numel, tensors)
    plan, device = ParallelPlan(), site.world.device
    mesh = Mesh(plan, device)
    buffers = GradientBuffers(named, {})
    adam = MixedAdamW(buffers, Workload(dtype=str(site.dtype).removeprefix("torch.")), mesh, 1, 1, lambda name: None)

    def refill():
        buffers.complete()  # as backward passes leave them
        for ref in buffers.refs:
            ref.grad.fill_(1.0)

    refill()
    return (lambda mark: adam.step(5)), refill


# ------------------------------------------------------------------------------------------------------------ exchanges


def share_rows(num_rows: int, num_ranks: int, skew: float) -> np.ndarray:
    """[W] rows that every rank sends to each rank: rank 0 gets `skew` times an even share, the others the rest."""
    first = min(num_rows, int(round(num_rows / num_ranks * skew)))
    rest = (num_rows - first) // (num_ranks - 1)
    return np.array([num_rows - rest * (num_ranks - 1), *[rest] * (num_ranks - 1)])


def all_to_all_bytes(site: Site, rows: int, width: int, skew: float) -> float:
    """Bytes of the busiest rank and direction of `all_to_all`."""
    num_ranks = site.world.num_ranks
    to_W = share_rows(rows, num_ranks, skew)
    return float(max(to_W.max() * (num_ranks - 1), rows - to_W.min()) * width * site.dtype.itemsize)


def all_to_all(site: Site, rows: int, width: int, skew: float) -> Step:
    """One exchange of rows, sizes known to the host."""
    world = site.world
    to_W = share_rows(rows, world.num_ranks, skew)
    receive = [int(to_W[world.ep_rank])] * world.num_ranks
    sent, received = site.randn(rows, width), site.randn(sum(receive), width)

    def step(mark):
        dist.all_to_all_single(received, sent, receive, to_W.tolist(), group=world.group)

    return step


def collective_bytes(site: Site, name: str, numel: int, num_ranks: int) -> float:
    """Bytes that pass each rank in a ring; float32 for all_reduce."""
    each = 8 if name == "all_reduce" else site.dtype.itemsize
    return (num_ranks - 1) / num_ranks * numel * each


def collective(site: Site, name: str, numel: int, group) -> Step:
    """all_reduce, all_gather or reduce_scatter over `group`."""
    size, device = dist.get_world_size(group), site.world.device
    if name == "all_reduce":
        total = torch.zeros(numel, device=device)
        return lambda mark: dist.all_reduce(total, group=group)
    part, whole = site.randn(numel // size), site.randn(numel // size * size)
    if name == "all_gather":
        return lambda mark: all_gather(whole, part, group=group)
    return lambda mark: reduce_scatter(part, whole, group=group)


def point_to_point(site: Site, numel: int) -> Step:
    """Neighbours 2k and 2k + 1 send to each other; a rank without one does nothing."""
    rank, num_ranks = site.world.ep_rank, site.world.num_ranks
    peer, sent, got = rank ^ 1, site.randn(numel), site.randn(numel)

    def step(mark):
        if peer < num_ranks:
            ops = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    return step
