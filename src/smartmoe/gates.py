"""Gates: how tokens choose experts. Every gate gives the same `Routing`, whatever the plan.

Layer 3. Router maths in float32 (or wider). Nothing here has random state: random numbers are hashes of (seed, layer,
token id). Where a gate follows FastMoE (github.com/laekov/fastmoe) its docstring says what is kept and what is not.
Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from smartmoe.config import GateConfig, ModelConfig
from smartmoe.ops.all_to_all import group_size
from smartmoe.ops.capacity import CopyOrder, admitted, capacity_limit, order_copies, rebalance
from smartmoe.ops.hashing import make_key, normal, uniform
from smartmoe.ops.top_gate import top_gate
from smartmoe.ops.wide_linear import wide_linear
from smartmoe.trace import read_trace

SWITCH_JITTER = 0.1
NOISE_FLOOR = 1e-2
CV_FLOOR = 1e-10
INIT_STD = 0.02
# Not -inf: the softmax of a row without any valid expert must stay a number.
_NEVER = -1e30


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to.

    expert_idx_TK: [T, K] int64, logical experts, -1 = dropped copy.
    weight_TK: [T, K] float32, differentiable combine weights, 0 where dropped.
    balance_loss: 0-dim float32, this rank's share: the sum over the ranks of the stage is the loss, not weighted.
    max_copies: a bound on the copies that this rank may send to one expert, where the gate knows one without asking the
        device (capacity of scope "local"); None = no bound known.
    x_TD: the gate's input [T, D] for whoever goes on with it, where the gate can then add its gradient to the other's; None =
        it cannot.
    """

    expert_idx_TK: torch.Tensor
    weight_TK: torch.Tensor
    balance_loss: torch.Tensor
    max_copies: int | None = None
    x_TD: torch.Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """What a gate knows about the tokens of one call. num_segments: see ops.capacity.order_copies."""

    x_TD: torch.Tensor
    token_id_T: torch.Tensor
    num_segments: int | None


def router_values(model: ModelConfig, seed: int, layer_idx: int) -> torch.Tensor:
    """Initial weights of a router, [E, D] float32: the same under every plan."""
    generator = torch.Generator().manual_seed(make_key(seed, layer_idx, "gate", "weight"))
    return torch.empty(model.num_experts, model.hidden_size).normal_(0.0, INIT_STD, generator=generator)


class Gate(nn.Module, abc.ABC):
    """A linear router with float32 weights, and what all gates share: capacity and statistics over the right ranks.

    Subclasses choose in `_choose` and may prune or add a loss. With scope "global" the forward is collective over the
    stage when the gate has a capacity or a balance loss (one small collective); with "local" it never communicates.
    """

    needs_totals = False

    def __init__(
        self,
        model: ModelConfig,
        gate: GateConfig,
        *,
        layer_idx: int,
        seed: int,
        seq_len: int,
        stage_group=None,
        device=None,
    ):
        super().__init__()
        self.num_experts, self.top_k, self.seq_len = model.num_experts, model.top_k, seq_len
        self.capacity, self.scope = gate.capacity, gate.scope
        self.stage_group = stage_group
        self.group = stage_group if gate.scope == "global" else None
        self.key = make_key(seed, layer_idx, gate.kind)
        self._init_weights(model, seed, layer_idx, device)
        for param in self.parameters():
            param.parallel = "dense"

    def _init_weights(self, model, seed, layer_idx, device):
        self.weight_ED = nn.Parameter(router_values(model, seed, layer_idx).to(device))
        self.bias_E = nn.Parameter(torch.zeros(model.num_experts, device=device))

    @abc.abstractmethod
    def forward(self, x_TD: torch.Tensor, token_id_T: torch.Tensor, num_segments: int | None = None) -> Routing:
        """Choose experts.

        x_TD: [T, D]; token_id_T: [T] int64; num_segments: runs of consecutive token ids among them, None = find out
        (may synchronise with the host). Every rank of the stage has equally many tokens.
        """

    def set_placement(self, rank_of_expert_E: np.ndarray, node_of_rank_W: list[int], ep_rank: int) -> None:
        """Told where experts live: [E] ep_rank of each, [W] node of each ep_rank. Only topology-aware gates care."""

    def _logits(self, x_TD):
        return wide_linear(x_TD, self.weight_ED, self.bias_E)

    @property
    def _num_stat_ranks(self) -> int:
        return group_size(self.group)

    @property
    def _loss_divisor(self) -> int:
        """A rank's local statistic counts for one of so many; shares of a global statistic already add up."""
        return group_size(self.stage_group) if self.group is None else 1

    def _order(self, expert_idx_TK, tokens: Tokens) -> CopyOrder:
        return order_copies(
            expert_idx_TK, tokens.token_id_T, self.num_experts, tokens.num_segments, self.seq_len, self.group
        )

    def _limit(self, num_tokens: int, capacity: float) -> int:
        return capacity_limit(capacity, num_tokens * self._num_stat_ranks, self.top_k, self.num_experts)

    def _prune(self, expert_idx_TK, tokens: Tokens):
        """(experts with -1 beyond the capacity, copies of each k and expert before [K, E], copies kept [E])."""
        if self.capacity is None:
            total_KE = self._totals(expert_idx_TK) if self.needs_totals else None
            return expert_idx_TK, total_KE, None if total_KE is None else total_KE.sum(0)
        limit = self._limit(tokens.x_TD.shape[0], self.capacity)
        order = self._order(expert_idx_TK, tokens)
        pruned_TK = torch.where(admitted(order, expert_idx_TK, limit), expert_idx_TK, -1)
        return pruned_TK, order.total_KE, order.total_KE.sum(0).clamp(max=limit)

    def _totals(self, expert_idx_TK):
        total_KE = torch.zeros(self.top_k, self.num_experts, dtype=torch.int64, device=expert_idx_TK.device)
        total_KE.scatter_add_(1, expert_idx_TK.t(), torch.ones_like(expert_idx_TK.t()))
        if self._num_stat_ranks > 1:
            dist.all_reduce(total_KE, group=self.group)
        return total_KE

    def _routing(self, expert_idx_TK, weight_TK, balance_loss, num_tokens: int) -> Routing:
        bound = None
        if self.capacity is not None and self.group is None:
            bound = max(1, min(self._limit(num_tokens, self.capacity), num_tokens * self.top_k))
        weight_TK = weight_TK.masked_fill(expert_idx_TK < 0, 0).float()
        return Routing(expert_idx_TK, weight_TK, balance_loss.float(), bound)

    def _importance_loss(self, fraction_E, prob_TE, num_normal):
        """E * sum_e f_e * P_e, where P_e is the sum of this rank's probabilities over `num_normal` of all ranks."""
        mean_prob_E = prob_TE.sum(0) / num_normal
        return self.num_experts * (fraction_E.detach() * mean_prob_E).sum() / self._loss_divisor

    def _first_choice_loss(self, logits_TE, total_KE):
        """GShard's balance loss: E * sum_e f_e * P_e, f_e the fraction of tokens whose first choice is e."""
        num_tokens = max(logits_TE.shape[0] * self._num_stat_ranks, 1)
        return self._importance_loss(total_KE[0] / num_tokens, logits_TE.softmax(-1), num_tokens)


class NaiveGate(Gate):
    """Top-k of the logits, weights = softmax over the chosen ones; no balance loss. FastMoE's NaiveGate."""

    def forward(self, x_TD, token_id_T, num_segments=None):
        tokens = Tokens(x_TD, token_id_T, num_segments)
        expert_idx_TK, weight_TK, x_TD = self._choose(tokens)
        no_loss = x_TD.new_zeros((), dtype=torch.float32)  # each time another: the caller may add to it in place
        if self.capacity is not None:
            pruned_TK, _, _ = self._prune(expert_idx_TK, tokens)
            routing = self._routing(pruned_TK, weight_TK, no_loss, x_TD.shape[0])
            return replace(routing, x_TD=x_TD)
        return Routing(expert_idx_TK, weight_TK.float(), no_loss, x_TD=x_TD)

    def _choose(self, tokens: Tokens):
        """(expert_idx_TK, weight_TK, the tokens for whoever goes on with them)."""
        return top_gate(tokens.x_TD, self.weight_ED, self.bias_E, self.top_k)


class ZeroGate(NaiveGate):
    """Every copy goes to expert 0 with weight 1 / k. FastMoE's ZeroGate; its router takes no part."""

    def _choose(self, tokens):
        shape, x_TD = (tokens.x_TD.shape[0], self.top_k), tokens.x_TD
        zero_TK = torch.zeros(shape, dtype=torch.int64, device=x_TD.device)
        return zero_TK, x_TD.new_full(shape, 1.0 / self.top_k, dtype=torch.float32), x_TD


class SwipeGate(NaiveGate):
    """Top-k, then copies above an equal share are moved to experts with room; weights = softmax over the logits of
    the experts in the end. Training only. FastMoE's SwipeGate, which levels workers (its expert inside a worker is
    fixed); here experts are levelled."""

    def _choose(self, tokens):
        logits_TE = self._logits(tokens.x_TD)
        expert_idx_TK = logits_TE.topk(self.top_k, dim=-1).indices
        if self.training:
            limit = self._limit(logits_TE.shape[0], 1.0)
            expert_idx_TK = rebalance(self._order(expert_idx_TK, tokens), expert_idx_TK, limit)
        return expert_idx_TK, logits_TE.gather(1, expert_idx_TK).softmax(-1), tokens.x_TD


class SwitchGate(Gate):
    """Top-1 of softmax(logits + jitter), weight = its probability. FastMoE's SwitchGate.

    Jitter: uniform in +-0.1, added in training. Loss as there: E * sum_e f_e * P_e, where both the fraction of tokens
    f_e and the probability sums P_e are taken relative to the tokens kept. Capacity comes from the configuration.
    """

    needs_totals = True

    def forward(self, x_TD, token_id_T, num_segments=None):
        tokens, logits_TE = Tokens(x_TD, token_id_T, num_segments), self._logits(x_TD)
        if self.training:
            jitter_TE = uniform(self.key, token_id_T, self.num_experts) * 2 - 1
            logits_TE = logits_TE + SWITCH_JITTER * jitter_TE
        prob_TE = logits_TE.softmax(-1)
        weight_TK, expert_idx_TK = prob_TE.topk(1, dim=-1)
        pruned_TK, _, kept_E = self._prune(expert_idx_TK, tokens)
        num_kept = kept_E.sum().clamp(min=1)
        loss = self._importance_loss(kept_E / num_kept, prob_TE, num_kept)
        return self._routing(pruned_TK, weight_TK, loss, x_TD.shape[0])


class GShardGate(Gate):
    """Top-2, weights = softmax over the two; the second copy is kept when 2 * its weight > u, u uniform in (0, 1).

    FastMoE's GShardGate (GShard, Lepikhin et al., 2020). Loss: E * sum_e f_e * P_e, f_e the fraction of tokens whose
    first choice is e (before pruning), P_e the mean router probability. Capacity is applied before the random choice,
    as there.
    """

    needs_totals = True

    def forward(self, x_TD, token_id_T, num_segments=None):
        tokens, logits_TE = Tokens(x_TD, token_id_T, num_segments), self._logits(x_TD)
        top_TK, expert_idx_TK = logits_TE.topk(self.top_k, dim=-1)
        weight_TK = top_TK.softmax(-1)
        pruned_TK, total_KE, _ = self._prune(expert_idx_TK, tokens)
        loss = self._first_choice_loss(logits_TE, total_KE)
        skip_T = 2 * weight_TK[:, 1] <= uniform(self.key, token_id_T, 1)[:, 0]
        second_T = torch.where(skip_T, -1, pruned_TK[:, 1])
        pruned_TK = torch.stack([pruned_TK[:, 0], second_T], 1)
        return self._routing(pruned_TK, weight_TK, loss, x_TD.shape[0])


class NoisyGate(Gate):
    """Top-k of logits with learned Gaussian noise; loss = CV(importance)^2 + CV(load)^2. FastMoE's NoisyGate.

    Source: Shazeer et al., ICLR'17. Both matrices start at zero and there is no bias, as there. `load` is the smooth
    estimate of the number of tokens for which an expert is among the top k. Outside training there is no noise and
    load is the count.
    """

    def _init_weights(self, model, seed, layer_idx, device):
        shape = (model.num_experts, model.hidden_size)
        self.weight_ED = nn.Parameter(torch.zeros(shape, device=device))
        self.noise_weight_ED = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, x_TD, token_id_T, num_segments=None):
        tokens = Tokens(x_TD, token_id_T, num_segments)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        clean_TE = x_TD @ self.weight_ED.to(x_TD.dtype).t()
        noisy_TE, scale_TE = clean_TE, None
        if self.training:
            scale_TE = F.softplus(x_TD @ self.noise_weight_ED.to(x_TD.dtype).t()) + NOISE_FLOOR
            noisy_TE = clean_TE + normal(self.key, token_id_T, self.num_experts) * scale_TE
        top, idx = noisy_TE.topk(min(self.top_k + 1, self.num_experts), dim=-1)
        expert_idx_TK, weight_TK = idx[:, : self.top_k], top[:, : self.top_k].softmax(-1)
        pruned_TK, _, _ = self._prune(expert_idx_TK, tokens)
        gates_TE = torch.zeros_like(clean_TE).scatter(1, expert_idx_TK, weight_TK)
        load_E = self._load(clean_TE, noisy_TE, scale_TE, top, gates_TE)
        loss = self._shared_loss(torch.stack([gates_TE.sum(0), load_E]))
        return self._routing(pruned_TK, weight_TK, loss, x_TD.shape[0])

    def _load(self, clean_TE, noisy_TE, scale_TE, top, gates_TE):
        if scale_TE is None or self.top_k == self.num_experts:
            return (gates_TE > 0).sum(0).to(gates_TE.dtype)
        out_T, in_T = top[:, self.top_k].unsqueeze(1), top[:, self.top_k - 1].unsqueeze(1)
        threshold_TE = torch.where(noisy_TE > out_T, out_T, in_T)
        return torch.special.ndtr((clean_TE - threshold_TE) / scale_TE).sum(0)

    def _shared_loss(self, stat_2E):
        """The loss of the statistics summed over all ranks, as this rank's share with this rank's gradient."""
        if self._num_stat_ranks == 1:
            return _cv_squared(stat_2E).sum() / self._loss_divisor
        total_2E = stat_2E.detach().clone()
        dist.all_reduce(total_2E, group=self.group)
        slope_2E = _cv_squared_slope(total_2E)
        return _cv_squared(total_2E).sum() / self._num_stat_ranks + (slope_2E * (stat_2E - stat_2E.detach())).sum()


def _cv_squared(stat_XE):
    """Squared coefficient of variation along experts (0 for a single expert)."""
    if stat_XE.shape[1] == 1:
        return stat_XE[:, 0] * 0
    return stat_XE.var(1) / (stat_XE.mean(1) ** 2 + CV_FLOOR)


def _cv_squared_slope(stat_XE):
    """The gradient of each `_cv_squared`, [X, E]. By hand: autograd inside a forward pass would have torch.utils.checkpoint
    compute the whole block again on the spot."""
    num_experts = stat_XE.shape[1]
    if num_experts == 1:
        return torch.zeros_like(stat_XE)
    mean_X1, var_X1 = stat_XE.mean(1, keepdim=True), stat_XE.var(1, keepdim=True)
    square_X1 = mean_X1**2 + CV_FLOOR
    return 2 / square_X1 * ((stat_XE - mean_X1) / (num_experts - 1) - var_X1 / square_X1 * mean_X1 / num_experts)


class FasterGate(Gate):
    """Top-k with a limit on tokens that leave the node. FastMoE's FasterGate (FasterMoE, PPoPP'22, section 4.3).

    When at least outgoing_fraction * T tokens of this rank have their first choice on another node, only so many of
    them (largest logit first) keep it, as their last copy; all other copies stay on experts of this node. Loss:
    GShard's. Which experts are near depends on the placement and on the rank, so unlike all others this gate routes
    differently under different plans.
    """

    needs_totals = True

    def __init__(self, model, gate, **kwargs):
        super().__init__(model, gate, **kwargs)
        self.outgoing_fraction = gate.outgoing_fraction
        far_E = torch.zeros(model.num_experts, dtype=torch.bool, device=self.weight_ED.device)
        self.register_buffer("far_E", far_E, persistent=False)

    def set_placement(self, rank_of_expert_E, node_of_rank_W, ep_rank):
        node_W = np.asarray(node_of_rank_W)
        self.far_E.copy_(torch.from_numpy(node_W[rank_of_expert_E] != node_W[ep_rank]))

    def forward(self, x_TD, token_id_T, num_segments=None):
        tokens, logits_TE = Tokens(x_TD, token_id_T, num_segments), self._logits(x_TD)
        top_idx_TK = logits_TE.topk(self.top_k, dim=-1).indices
        expert_idx_TK, valid_TK = self._limit_outgoing(logits_TE.detach(), top_idx_TK)
        weight_TK = logits_TE.gather(1, expert_idx_TK).masked_fill(~valid_TK, _NEVER).softmax(-1)
        loss = self._first_choice_loss(logits_TE, self._totals(top_idx_TK))
        if self.capacity is not None:
            expert_idx_TK = self._prune(expert_idx_TK, tokens)[0]
        return self._routing(torch.where(valid_TK, expert_idx_TK, -1), weight_TK, loss, x_TD.shape[0])

    def _limit_outgoing(self, logits_TE, top_idx_TK):
        """(experts [T, K], which of them are valid: a node may host fewer than K experts)."""
        num_tokens = logits_TE.shape[0]
        allowance = int(num_tokens * self.outgoing_fraction)
        first_T = top_idx_TK[:, 0]
        leaves_T = self.far_E[first_T]
        score_T = logits_TE.gather(1, top_idx_TK[:, :1])[:, 0].masked_fill(~leaves_T, -torch.inf)
        may_leave_T = torch.zeros_like(leaves_T).scatter_(0, score_T.topk(allowance).indices, True) & leaves_T
        near_logit_TK, near_TK = logits_TE.masked_fill(self.far_E, -torch.inf).topk(self.top_k, dim=-1)
        valid_TK = near_logit_TK > -torch.inf
        near_TK, valid_TK = near_TK.clone(), valid_TK.clone()
        near_TK[:, -1] = torch.where(may_leave_T, first_T, near_TK[:, -1])
        valid_TK[:, -1] |= may_leave_T
        limited = leaves_T.sum() >= allowance
        limited &= leaves_T.any()
        return torch.where(limited, near_TK, top_idx_TK), valid_TK | ~limited


class TraceGate(NaiveGate):
    """Routes tokens so that experts get the shares that a recorded trace gives them, whatever the router says.

    Over the tokens of one iteration (a global batch) the copies of each expert are its counts in the trace, summed
    over ranks and micro-batches and scaled to tokens * k by largest remainder. Tokens are spread evenly: any run of
    consecutive tokens, and so any rank and micro-batch, has nearly the same shares. A token's experts differ unless
    an expert's count exceeds the number of tokens. Iterations and layers beyond the trace start over. Weights =
    softmax over the router's logits of the chosen experts.
    """

    def __init__(self, model, gate, *, layer_idx, global_batch_size: int | None = None, **kwargs):
        super().__init__(model, gate, layer_idx=layer_idx, **kwargs)
        if global_batch_size is None:
            raise ValueError('gate.kind = "trace" needs global_batch_size, to know which tokens make an iteration')
        self.tokens_per_iteration = global_batch_size * self.seq_len
        end_IE = _read_trace(gate, model, layer_idx, self.tokens_per_iteration * model.top_k)
        self.register_buffer("end_IE", torch.from_numpy(end_IE).to(self.weight_ED.device), persistent=False)
        self.stride = _even_stride(self.tokens_per_iteration)

    def _choose(self, tokens):
        logits_TE, token_id_T, num = self._logits(tokens.x_TD), tokens.token_id_T, self.tokens_per_iteration
        iteration_T = token_id_T // num % self.end_IE.shape[0]
        seat_T = token_id_T % num * self.stride % num
        seat_TK = seat_T.unsqueeze(1) + num * torch.arange(self.top_k, device=seat_T.device)
        expert_idx_TK = torch.searchsorted(self.end_IE[iteration_T], seat_TK, right=True)
        return expert_idx_TK, logits_TE.gather(1, expert_idx_TK).softmax(-1), tokens.x_TD


def _read_trace(gate: GateConfig, model: ModelConfig, layer_idx: int, num_copies: int) -> np.ndarray:
    """[I, E] int64: for each iteration of the trace, the cumulated counts of experts scaled to `num_copies`."""
    counts = read_trace(gate.trace, experts=model.num_experts, layers=model.num_layers).counts
    if counts.shape[4] != model.num_experts:
        raise ValueError(
            f"gate.trace: {gate.trace} has {counts.shape[4]} experts, the model has {model.num_experts}: "
            "set model.num_experts"
        )
    count_IE = counts[:, :, layer_idx % counts.shape[2]].sum((1, 2), dtype=np.int64)
    return np.stack([np.cumsum(scale_counts(count_E, num_copies)) for count_E in count_IE])


def scale_counts(count_E: np.ndarray, total: int) -> np.ndarray:
    """Scale counts [E] to integers that sum to `total`, by largest remainder (ties: the first). All zero = equal shares."""
    count_E = np.asarray(count_E, dtype=np.int64)
    if not count_E.sum():
        count_E = np.ones_like(count_E)
    share_E, rest_E = np.divmod(count_E * total, count_E.sum())
    share_E[np.argsort(-rest_E, kind="stable")[: total - share_E.sum()]] += 1
    return share_E


def _even_stride(num: int) -> int:
    """A step near num / golden ratio, prime to num: i * step % num visits every seat once, and any run of i evenly."""
    step = max(1, round(num * 0.6180339887498949))
    while np.gcd(step, num) != 1:
        step += 1
    return step


GATES: dict[str, Callable[..., Gate]] = {
    "naive": NaiveGate,
    "noisy": NoisyGate,
    "switch": SwitchGate,
    "gshard": GShardGate,
    "swipe": SwipeGate,
    "faster": FasterGate,
    "zero": ZeroGate,
    "trace": TraceGate,
}


def build_gate(
    model: ModelConfig,
    gate: GateConfig,
    *,
    layer_idx: int,
    seed: int,
    seq_len: int | None = None,
    stage_group=None,
    global_batch_size: int | None = None,
    device=None,
) -> Gate:
    """The gate that `gate.kind` names. `global_batch_size` (samples) is for "trace" only.

    Raises ValueError for an unknown kind, a top_k that the kind does not have, or a trace that cannot serve.
    """
    if gate.kind not in GATES:
        raise ValueError(f'gate.kind = "{gate.kind}" is not one of {", ".join(GATES)}')
    for kind, top_k in (("switch", 1), ("gshard", 2)):
        if gate.kind == kind and model.top_k != top_k:
            raise ValueError(f'gate.kind = "{kind}" needs model.top_k = {top_k}, not {model.top_k}')
    extra = {"global_batch_size": global_batch_size} if gate.kind == "trace" else {}
    return GATES[gate.kind](
        model,
        gate,
        layer_idx=layer_idx,
        seed=seed,
        seq_len=seq_len or model.seq_len,
        stage_group=stage_group,
        device=device,
        **extra,
    )
