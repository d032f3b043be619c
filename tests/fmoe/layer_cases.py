"""FMoE layers on every rank of a world against a loop over tokens, in float64, that has all ranks' experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fmoe
from fmoe.gates import BaseGate, NaiveGate

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 4e-2}
MASK_VALUES = {1: torch.linspace(-1, 1, 8), 3: 0.5}


class Forced(BaseGate):
    """A gate as users write them, in the older form of results: a table says which experts; scores are learnt."""

    table: Callable

    def __init__(self, d_model, num_expert, world_size, top_k):
        super().__init__(num_expert, world_size)
        self.gate, self.top_k = nn.Linear(d_model, self.tot_expert), top_k

    def forward(self, inp):
        expert_idx_TK = type(self).table(inp.shape[0], self.tot_expert, self.top_k).to(inp.device)
        score_TK = self.gate(inp).gather(1, expert_idx_TK.clamp(min=0)).softmax(-1)
        return expert_idx_TK.flatten(), score_TK.unsqueeze(1)


class OfFirst(NaiveGate):
    """The naive gate for an input of several tensors."""

    def forward(self, inp):
        return super().forward(inp["a"])


class Counting(nn.Linear):
    """An expert that is told how many rows it gets."""

    def forward(self, inp, fwd_expert_count):
        assert fwd_expert_count.tolist() == [inp.shape[0]]
        return super().forward(inp)


class TwoInputs(nn.Module):
    def __init__(self, num_expert, d_model):
        super().__init__()
        self.fc = fmoe.FMoELinear(num_expert, d_model, d_model)

    def forward(self, inp, fwd_expert_count):
        assert fwd_expert_count.device.type == "cpu" and int(fwd_expert_count.sum()) == inp["a"].shape[0]
        return [self.fc(inp["a"], fwd_expert_count) * inp["b"], self.fc(inp["b"], fwd_expert_count)]


def narrow_expert(d_model):
    return nn.Sequential(nn.Linear(d_model, 7), nn.Tanh(), nn.Linear(7, 5))


def table_of(choose):
    """A gate whose copy (t, k) goes to choose(t, k, E)."""

    def table(num_tokens, num_experts, top_k):
        rows = [[choose(t, k, num_experts) for k in range(top_k)] for t in range(num_tokens)]
        return torch.tensor(rows, dtype=torch.int64).reshape(num_tokens, top_k)

    return type("Forced", (Forced,), {"table": staticmethod(table)})


@dataclass(frozen=True)
class Case:
    """tokens: of each rank, a function of the rank."""

    name: str
    tokens: Callable = lambda rank: 13
    num_expert: int = 3
    top_k: int = 2
    d_model: int = 8
    gate: type = NaiveGate
    kind: str = "mlp"
    dispatcher: str = "basic"
    dtype: torch.dtype = torch.float32
    mask: bool = False


CASES = [
    Case("plain"),
    Case("one choice, odd sizes", top_k=1, d_model=6, tokens=lambda rank: 5 + rank),
    Case("empty rank", tokens=lambda rank: 7 * (rank != 0)),
    Case("no tokens", tokens=lambda rank: 0),
    Case("hot expert", gate=table_of(lambda t, k, E: E - 1)),
    Case("hot expert, one choice", gate=table_of(lambda t, k, E: 0), top_k=1, num_expert=1),
    Case("dropped", gate=table_of(lambda t, k, E: (t + k) % E if (t + k) % 3 else -1)),
    Case("float64", dtype=torch.float64),
    Case("mask", mask=True),
    Case("mask, one choice", mask=True, top_k=1, dispatcher="overlapped"),
    Case("direct", dispatcher="direct"),
    Case("direct, dropped", dispatcher="direct", gate=table_of(lambda t, k, E: t % E if t % 2 + k else -1)),
    Case("direct, odd sizes, empty rank", dispatcher="direct", d_model=6, tokens=lambda rank: 4 * (rank != 0)),
    Case("auto", dispatcher="auto"),
    Case("overlapped", dispatcher="overlapped", tokens=lambda rank: 3 + 4 * rank),
    Case("module class", kind="class", tokens=lambda rank: 4 * rank),
    Case("module class, overlapped", kind="class", dispatcher="overlapped"),
    Case("modules", kind="list", num_expert=2, top_k=1),
    Case("two inputs", kind="tree", gate=OfFirst),
]


def build(case: Case, world_size: int, **kwargs) -> fmoe.FMoE:
    common = dict(
        d_model=case.d_model, world_size=world_size, top_k=case.top_k, gate=case.gate, dispatcher=case.dispatcher, **kwargs
    )
    if case.kind == "mlp":
        return fmoe.FMoETransformerMLP(case.num_expert, d_hidden=2 * case.d_model, **common).to(case.dtype)
    if case.kind == "class":
        return fmoe.FMoE(case.num_expert, expert=narrow_expert, **common)
    if case.kind == "list":
        return fmoe.FMoE(expert=[lambda d: Counting(d, 5), lambda d: nn.Linear(d, 5)], **common)
    moe = fmoe.FMoE(case.num_expert, **common)
    moe.experts = TwoInputs(case.num_expert, case.d_model)
    return moe


def compare(case: Case, rank: int, world_size: int, device: torch.device | str = "cpu") -> None:
    """Output, and gradients of input, gate and this rank's experts, equal the loop's."""
    torch.manual_seed(0)
    seen = []
    moe = build(case, world_size, gate_hook=lambda idx, score, _: seen.append(idx)).to(device)
    torch.manual_seed(1 + rank)
    num_tokens = case.tokens(rank)
    for param in moe.experts.parameters():
        nn.init.normal_(param, std=0.5)
    if case.mask:
        moe.mask = torch.arange(num_tokens) % 4  # on the CPU, as modules do not move it; no value for 2: 0
        moe.mask_dict = {1: MASK_VALUES[1].to(device), 3: MASK_VALUES[3]}
    inp = torch.randn(2, num_tokens, case.d_model, dtype=case.dtype)
    a_TD, b_TD = (part.to(device, copy=True).requires_grad_() for part in inp)
    outs = moe({"a": a_TD, "b": b_TD} if case.kind == "tree" else a_TD)
    outs = outs if isinstance(outs, list) else [outs]
    upstream = [torch.randn_like(out) for out in outs]
    torch.autograd.backward(outs, upstream)

    if case.dispatcher in ("direct", "overlapped"):
        assert type(moe._kept_dispatcher).__name__ == f"{case.dispatcher.capitalize()}Dispatcher"
    expert_idx_TK = seen[0].reshape(num_tokens, case.top_k).cpu()
    twins = [part.double().requires_grad_() for part in inp]
    wanted, gate_twin, experts_E = oracle(case, moe, twins, expert_idx_TK, rank, world_size)
    torch.autograd.backward(wanted, [grad.cpu().double() for grad in upstream])
    for got, want in zip(outs, wanted, strict=True):
        close(f"{case.name}: output", got, want)
    close(f"{case.name}: gradient of the input", a_TD.grad, twins[0].grad)
    if case.kind == "tree":
        close(f"{case.name}: gradient of the other input", b_TD.grad, twins[1].grad)
    for name, param in moe.gate.named_parameters():
        close(f"{case.name}: gradient of gate.{name}", param.grad, gate_twin[name].grad)
    mine = of_experts(moe, grads=True)
    for expert, named in enumerate(experts_E):
        for name, leaf in named.items():
            total = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if world_size > 1:
                total = total.to(device)
                dist.all_reduce(total)
            if expert // moe.num_expert == rank:
                close(f"{case.name}: gradient of expert {expert} {name}", mine[expert % moe.num_expert][name], total)


def of_experts(moe, grads: bool) -> list[dict]:
    """For each expert of this rank, its tensors by name, on the CPU."""

    def tensors(module):
        return {name: (p.grad if grads else p.detach()).cpu() for name, p in module.named_parameters()}

    if isinstance(moe.experts, nn.ModuleList):
        return [tensors(expert) for expert in moe.experts]
    stacked = tensors(moe.experts)
    return [{name: tensor[expert] for name, tensor in stacked.items()} for expert in range(moe.num_expert)]


def oracle(case: Case, moe, inputs, expert_idx_TK, rank: int, world_size: int):
    """(outputs, the gate's parameters by name, each expert's by name), all float64 and differentiable."""
    own = of_experts(moe, grads=False)
    every = [own] * world_size
    if world_size > 1:
        every = [None] * world_size
        dist.all_gather_object(every, own)
    experts_E = [{n: t.double().requires_grad_() for n, t in named.items()} for part in every for named in part]
    gate = {name: param.detach().cpu().double().requires_grad_() for name, param in moe.gate.named_parameters()}
    logits_TE = inputs[0] @ gate["gate.weight"].t() + gate["gate.bias"]
    if isinstance(moe.gate, NaiveGate):
        assert torch.equal(expert_idx_TK, logits_TE.topk(case.top_k).indices), f"{case.name}: other experts"
    rows = []
    for t, chosen in enumerate(expert_idx_TK.tolist()):
        score_K = torch.stack([logits_TE[t, max(expert, 0)] for expert in chosen]).softmax(0)
        total = [torch.zeros(width, dtype=torch.float64) for width in widths(case)]
        mask = int(moe.mask[t]) if case.mask else 0
        for expert, score in zip(chosen, score_K, strict=True):
            if mask:
                outs = [MASK_VALUES.get(mask, 0.0) * torch.ones(case.d_model)]
            elif expert >= 0:
                outs = run_expert(case, moe, expert, experts_E[expert], [part[t] for part in inputs])
            else:
                continue
            total = [so_far + score * out for so_far, out in zip(total, outs, strict=True)]
        rows.append(total)
    outs = [torch.stack(column) for column in zip(*rows, strict=True)]
    if not rows:
        outs = [0 * inputs[0].sum() + 0 * logits_TE.sum() + torch.zeros(0, width) for width in widths(case)]
    return outs, gate, experts_E


def widths(case: Case) -> list[int]:
    return {"mlp": [case.d_model], "tree": [case.d_model] * 2}.get(case.kind, [5])


def run_expert(case: Case, moe, expert: int, named: dict, inputs) -> list:
    if case.kind == "mlp":
        hidden = F.gelu(named["htoh4.weight"] @ inputs[0] + named["htoh4.bias"])
        return [named["h4toh.weight"] @ hidden + named["h4toh.bias"]]
    if case.kind == "tree":
        a, b = (named["fc.weight"] @ part + named["fc.bias"] for part in inputs)
        return [a * inputs[1], b]
    module = moe.experts[expert % moe.num_expert]
    rows = inputs[0].unsqueeze(0)
    args = (rows, torch.tensor([1])) if isinstance(module, Counting) else (rows,)
    return [functional_call(module, named, args)[0]]


def close(what: str, got, want) -> None:
    assert got is not None and got.shape == want.shape, what
    if want.numel():
        error, size = (got.cpu().double() - want.cpu()).abs().max().item(), want.abs().max().item()
        assert error <= TOLERANCE[got.dtype] * max(1.0, size), f"{what}: off by {error:.1e}"
