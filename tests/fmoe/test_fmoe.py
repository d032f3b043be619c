"""`import fmoe`: FastMoE's layers, data parallelism, functions and checkpoints, in worlds of 1, 2 and 3 gloo ranks."""

import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe.functions import AllGather, MOEGather, MOEScatter, Slice, ensure_comm, get_moe_group, prepare_forward
from fmoe.gates import DCGate, GShardGate, NaiveGate, SwipeGate, SwitchGate
from fmoe.layers import _fmoe_general_global_forward
from smartmoe.dispatch.direct import DirectDispatcher
from tests.dist import gpu_backend, gpu_of, spawn
from tests.fmoe import layer_cases
from tests.fmoe.layer_cases import CASES, Case, close, compare

PROGRAM = Path(__file__).parent / "program.py"
SIZES = {"htoh4.weight": (3, 16, 8), "htoh4.bias": (3, 16), "h4toh.weight": (3, 8, 16), "h4toh.bias": (3, 8)}


def _world(rank, world_size):
    for case in CASES:
        compare(case, rank, world_size)
    _slices(rank, world_size)
    _functions(rank, world_size)
    _data_parallel(rank, world_size)
    for group in (None, dist.group.WORLD):  # gates that were called before any layer, and after
        with mock.patch("fmoe.functions._moe_group", group):
            _switch(rank, world_size)
            _shared_capacity(rank, world_size)
            _swipe(rank, world_size)
    _copies(rank, world_size)
    _recomputes(rank, world_size)
    _refusals(world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_world_does_what_one_process_would(world_size):
    spawn(_world, world_size, world_size)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_process(case):
    compare(case, 0, 1)


def _on_gpus(rank, world_size):
    """In bfloat16 the gate's choice is given: nearly equal scores round to another order."""
    for case in CASES:
        compare(case, rank, world_size, gpu_of(rank))
        if case.kind == "mlp" and case.gate is not NaiveGate:
            compare(dataclasses.replace(case, dtype=torch.bfloat16), rank, world_size, gpu_of(rank))


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_on_gpus(world_size):
    spawn(_on_gpus, world_size, world_size, backend=gpu_backend(world_size))


def _slices(rank, world_size):
    """Workers with the same batch compute a slice each; all get the whole output and the whole gradient of the input."""
    for name in ("mp_group", "slice_group"):
        torch.manual_seed(3)
        moe = layer_cases.build(Case("slices"), world_size, **{name: dist.group.WORLD})
        torch.manual_seed(4 + rank)
        nn.init.normal_(moe.experts.h4toh.weight)
        torch.manual_seed(5)
        x_TD, upstream = torch.randn(4 * world_size, 8, requires_grad=True), torch.randn(4 * world_size, 8)
        y_TD = moe(x_TD)
        y_TD.backward(upstream)
        twin = x_TD.detach().double().requires_grad_()
        expert_idx_TK = moe.gate(x_TD)[0]
        (want,), gate, _ = layer_cases.oracle(Case("slices"), moe, [twin], expert_idx_TK, rank, world_size)
        want.backward(upstream.double())
        close("slices: output", y_TD, want)
        close("slices: gradient of the input", x_TD.grad, twin.grad)
        dist.all_reduce(moe.gate.gate.weight.grad)
        close("slices: gradient of the gate", moe.gate.gate.weight.grad, gate["gate.weight"].grad)
    with pytest.raises(ValueError, match="equal slices"):
        moe(torch.randn(4 * world_size + 1, 8))


def _functions(rank, world_size):
    """The steps by hand: expert e doubles, triples .. its rows; what is dropped comes back as 0."""
    x_TD = torch.arange(6.0).view(6, 1) + 10 * rank + 1
    x_TD.requires_grad_()
    ensure_comm(x_TD, dist.group.WORLD)
    assert get_moe_group() is dist.group.WORLD
    gate = torch.tensor([[(t * 2 + k + rank) % (2 * world_size) for k in range(2)] for t in range(6)])
    gate[2, 1] = gate[4, 0] = -1
    factor_E = torch.arange(2 * world_size) + 2.0

    def experts(rows, count_L):
        owned = factor_E[2 * rank : 2 * rank + 2]
        return rows * torch.repeat_interleave(owned, count_L).unsqueeze(1)

    want = torch.where(gate >= 0, factor_E[gate.clamp(min=0)], 0).reshape(12, 1) * x_TD.detach().repeat_interleave(2, 0)
    y_ND = _fmoe_general_global_forward(x_TD, gate, experts, 2, world_size)
    assert torch.equal(y_ND, want)
    y_ND.sum().backward()
    assert torch.equal(x_TD.grad[:, 0], torch.where(gate >= 0, factor_E[gate.clamp(min=0)], 0).sum(1))
    pos, sent, received, count_L, num_rows = prepare_forward(gate, 2, world_size)
    assert num_rows == count_L.sum() == received.sum() and pos.shape == (10,) and sent.sum() == 10
    rows = MOEScatter.apply(x_TD, pos // 2, sent, received, num_rows, world_size)
    assert rows.shape == (num_rows, 1)
    back = MOEGather.apply(rows, pos, sent, received, 12, world_size)
    assert torch.equal(back[pos], x_TD[pos // 2]) and int((back == 0).sum()) == 2
    whole = AllGather.apply(part := torch.full((2, 1), float(rank), requires_grad=True), rank, world_size, None)
    (whole * torch.arange(2.0 * world_size).unsqueeze(1)).sum().backward()
    assert whole[:, 0].tolist() == [r for r in range(world_size) for _ in range(2)]
    assert part.grad[:, 0].tolist() == [2.0 * rank, 2.0 * rank + 1]
    Slice.apply(whole := torch.ones(2 * world_size, 1, requires_grad=True), rank, world_size, None).mul(rank).sum().backward()
    assert whole.grad[:, 0].tolist() == [r for r in range(world_size) for _ in range(2)]


def _data_parallel(rank, world_size):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 8), layer_cases.build(Case("dp"), world_size), nn.Linear(8, 2))
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    groups = {"own_group": dist.group.WORLD, "alone_group": alone, "dp_group": None}
    ddp = fmoe.DistributedGroupedDataParallel(model, device_ids=[0], **groups)
    marks = {name: getattr(param, "dp_comm", "dp") for name, param in ddp.module.named_parameters()}
    assert {mark for name, mark in marks.items() if "experts" in name} == {"none"}
    assert {mark for name, mark in marks.items() if "gate" in name} == {"gate"}
    for name, param in model.named_parameters():
        every = _gathered(param.data)
        assert all(torch.equal(part, every[0]) for part in every) != (marks[name] == "none" and param.dim() > 2), name
    model[2].bias.dp_comm, model[2].weight.dp_comm = "own", "alone"
    ddp(torch.randn(5 + rank, 8)).square().sum().backward()
    model[0].bias.grad = None  # not there on any rank: left alone
    before = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    for call, options, divide in (
        (ddp.allreduce_params, {}, True),
        (ddp.allreduce_gradients, {"no_scale": True}, False),
        (ddp.allreduce_params, {"reduce_after": True, "fp32_allreduce": True}, True),
    ):
        for name, param in model.named_parameters():
            param.grad = before[name].clone() if name in before else None
        call(**options)
        for name, param in model.named_parameters():
            if name not in before:
                assert param.grad is None
            elif marks[name] == "none" or name == "2.weight":
                assert torch.equal(param.grad, before[name]), name
            else:
                total = torch.stack(_gathered(before[name])).sum(0)
                torch.testing.assert_close(param.grad, total / world_size if divide else total)


def _gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def _switch(rank, world_size):
    """Seats of an expert are taken by the first ranks first, inside a rank by the first tokens."""
    torch.manual_seed(7)
    gate = SwitchGate(8, 2, world_size, capacity=(1.2, 0.6)).eval()
    torch.manual_seed(8 + rank)
    x_TD = torch.randn(10, 8)
    prob_TE = gate.gate(x_TD).softmax(-1)
    expert_idx_TK, score_TK = gate(x_TD)
    wanted, taken = [], [0] * (2 * world_size)
    for first_T in _gathered(prob_TE.argmax(1)):
        seated = []
        for expert in first_T.tolist():
            seated.append(expert if taken[expert] < 3 else -1)  # ceil(0.6 * 10 / 2)
            taken[expert] += 1
        wanted.append(seated)
    assert expert_idx_TK[:, 0].tolist() == wanted[rank] and any(-1 in seated for seated in wanted)
    kept = torch.tensor([expert for expert in wanted[rank] if expert >= 0], dtype=torch.int64)
    num_kept = max(len(kept), 1)
    share_E = torch.bincount(kept, minlength=2 * world_size) / num_kept
    torch.testing.assert_close(gate.get_loss(), (share_E * prob_TE.sum(0) / num_kept).sum() * 2 * world_size)
    torch.testing.assert_close(score_TK, prob_TE.max(1, keepdim=True).values)


def _shared_capacity(rank, world_size):
    """As _switch, of two choices of each token."""
    torch.manual_seed(11)
    gate = DCGate(8, 2, world_size, capacity=(0.5, 9), random_routing=False)
    torch.manual_seed(12 + rank)
    x_TD = torch.randn(6, 8)
    taken = [0] * (2 * world_size)
    for source, chosen_TK in enumerate(_gathered(gate.gate(x_TD).topk(2).indices)):
        seated = []
        for expert in chosen_TK.flatten().tolist():
            seated.append(expert if taken[expert] < 3 else -1)
            taken[expert] += 1
        if source == rank:
            wanted = seated
    assert gate(x_TD)[0].flatten().tolist() == wanted and max(taken) > 3


def _swipe(rank, world_size):
    """Every worker takes its share; who finds it full goes to the first with room, to expert k % num_expert there."""
    torch.manual_seed(9)
    gate = SwipeGate(8, 2, world_size)
    gate.gate.bias.data[:2] += 1  # the first worker is liked
    torch.manual_seed(10 + rank)
    x_TD = torch.randn(6 + rank, 8)
    logits_TE = gate.gate(x_TD)
    expert_idx_TK, score_TK = gate(x_TD)
    tables = [None] * world_size
    dist.all_gather_object(tables, logits_TE.topk(2).indices.tolist())
    copies = sum(len(table) for table in tables) * 2
    room = [-(-copies // world_size)] * world_size
    for k in range(2):
        waiting = []
        for table in tables:
            for row in table:
                if room[row[k] // 2]:
                    room[row[k] // 2] -= 1
                else:
                    waiting.append(row)
        for row in waiting:
            worker = next(w for w in range(world_size) if room[w])
            room[worker] -= 1
            row[k] = worker * 2 + k % 2
    assert expert_idx_TK.tolist() == tables[rank]
    assert tables != [logits_TE.topk(2).indices.tolist()] * world_size
    torch.testing.assert_close(score_TK, logits_TE.gather(1, expert_idx_TK).softmax(-1))


def _copies(rank, world_size):
    """After a forward pass a layer can be copied and saved whole; it is the same layer, with the same marks."""
    torch.manual_seed(13)
    moe = layer_cases.build(Case("copies", dispatcher="overlapped"), world_size)
    x_TD = torch.randn(4, 8)
    y_TD, buffer = moe(x_TD), io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(moe), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x_TD), y_TD)
        assert all(param.dp_comm == ("gate" if "gate" in name else "none") for name, param in other.named_parameters())


def _recomputes(rank, world_size):
    """Activations that are computed again: the same random routing, the same bits; a rank may be without tokens."""
    kinds = [(GShardGate, 2, "basic"), (SwitchGate, 1, "overlapped")]
    for (gate, top_k, dispatcher), again in itertools.product(kinds, ("reentrant", "not reentrant")):
        results = []
        for checkpointed in (False, True):
            torch.manual_seed(14 + rank)
            moe = layer_cases.build(Case("again", gate=gate, top_k=top_k, dispatcher=dispatcher), world_size)
            nn.init.normal_(moe.experts.h4toh.weight)
            x_TD = torch.randn(20 * (rank + 1 < world_size), 8, requires_grad=True)
            y_TD = checkpoint(moe, x_TD, use_reentrant=again == "reentrant") if checkpointed else moe(x_TD)
            y_TD.square().sum().backward()
            results.append([y_TD.detach(), x_TD.grad, *(param.grad for param in moe.parameters())])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), f"{gate.__name__}, {again}"


def _refusals(world_size):
    moe = fmoe.FMoETransformerMLP(2, 8, 16, world_size=world_size + 1)
    with pytest.raises(ValueError, match=f"has {world_size}"):
        moe(torch.randn(3, 8))


def test_bad_inputs_are_errors_that_say_what_to_do():
    with pytest.raises(ValueError, match=r"\[tokens, features\]"):
        fmoe.FMoE(2, 8)(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="not one of basic, overlapped"):
        fmoe.FMoE(2, 8, dispatcher="direct")
    with pytest.raises(RuntimeError, match="init_process_group"):
        fmoe.FMoETransformerMLP(2, 8, 16, world_size=2)(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match="init_process_group"):
        fmoe.DistributedGroupedDataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="allreduce_params"):
        fmoe.DistributedGroupedDataParallel(nn.Linear(2, 2), auto_allreduce=True)
    with pytest.raises(ValueError, match="top_k must be 1"):
        fmoe.FMoETransformerMLP(2, 8, 16, gate=SwitchGate)
    with pytest.raises(ValueError, match="random routing"):
        fmoe.FMoETransformerMLP(4, 8, 16, gate=GShardGate, top_k=3)
    with pytest.raises(ValueError, match="cast the input"):
        fmoe.FMoELinear(2, 8, 8)(torch.randn(4, 8).double(), torch.tensor([1, 3]))
    moe = fmoe.FMoETransformerMLP(2, 8, 16, mask=torch.zeros(4), mask_dict={1: 0.0})
    with pytest.raises(ValueError, match="mask has 4 entries"):
        moe(torch.randn(3, 8))
    moe.mask, moe.gate.top_k = None, 1
    with pytest.raises(ValueError, match="its gate returned"):
        moe(torch.randn(3, 8))
    with pytest.raises(ImportError, match="smartmoe.hosts.megatron"):
        importlib.import_module("fmoe.megatron")


def test_both_layouts_of_checkpoints_load(tmp_path):
    moe = fmoe.FMoETransformerMLP(3, 8, 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()}
    assert shapes == {"gate.gate.weight": (3, 8), "gate.gate.bias": (3,)} | {f"experts.{n}": s for n, s in SIZES.items()}
    block = nn.ModuleDict({"mlp": fmoe.FMoETransformerMLP(3, 8, 16)})
    by_expert = {f"mlp.{name}": tensor for name, tensor in moe.state_dict().items() if "gate" in name}
    by_expert |= {f"mlp.experts.{i}.{n}": moe.experts.get_parameter(n)[i : i + 1] for i in range(3) for n in SIZES}
    given = dict(by_expert)
    assert str(block.load_state_dict(by_expert)) == "<All keys matched successfully>" and by_expert.keys() == given.keys()
    x_TD = torch.randn(5, 8)
    assert torch.equal(block["mlp"](x_TD), moe(x_TD))
    other = fmoe.FMoETransformerMLP(3, 8, 16)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(copy.deepcopy(other)(x_TD), moe(x_TD))
    del by_expert["mlp.experts.1.htoh4.bias"]
    with pytest.raises(RuntimeError, match="size mismatch for mlp.experts.htoh4.bias"):
        block.load_state_dict(by_expert)


def test_experts_of_data_parallel_workers_are_marked_and_all_have_gradients():
    moe = fmoe.FMoETransformerMLP(6, 8, 16, top_k=1, expert_dp_comm="dp")
    moe(torch.randn(2, 1, 8)).sum().backward()
    assert {param.dp_comm for param in moe.experts.parameters()} == {"dp"}
    assert all(param.grad is not None for param in moe.parameters()), "DistributedDataParallel wants all"


def test_experts_may_be_a_list_that_the_layer_does_not_own():
    torch.manual_seed(0)
    moe, x_TD = fmoe.FMoE(3, 8), torch.randn(6, 8)
    moe.experts, moe.experts_fused = [nn.Linear(8, 8) for _ in range(3)], False
    moe.mark_parallel_comm("dp")
    assert {param.dp_comm for expert in moe.experts for param in expert.parameters()} == {"dp"}
    expert_idx_TK, score_TK = moe.gate(x_TD)
    chosen = zip(x_TD, expert_idx_TK.tolist(), score_TK, strict=True)
    want_TD = [sum(p * moe.experts[e](x) for e, p in zip(experts, scores, strict=True)) for x, experts, scores in chosen]
    torch.testing.assert_close(moe(x_TD), torch.stack(want_TD))


def test_masked_tokens_are_weighted_by_their_scores():
    torch.manual_seed(0)
    mask = torch.tensor([0, 1, 2, 1])
    moe = fmoe.FMoETransformerMLP(4, 8, 16, top_k=1, gate=SwitchGate, mask=mask, mask_dict={1: torch.arange(8.0)})
    x_TD = torch.randn(4, 8)
    y_TD, (_, score_TK) = moe.eval()(x_TD), moe.gate(x_TD)
    assert torch.equal(y_TD[mask == 1], score_TK[mask == 1] * torch.arange(8.0)) and not y_TD[2].any() and y_TD[0].any()


def test_a_mask_may_lie_on_another_device(monkeypatch):
    """Modules do not move it, and FastMoE takes it from where it is."""
    monkeypatch.setattr(fmoe.FMoE, "_through_experts", lambda moe, leaves, *routing: leaves[0])
    moe = fmoe.FMoE(2, 8, mask=torch.tensor([0, 1, 0]), mask_dict={}).to("meta")
    assert moe(torch.empty(3, 8, device="meta")).is_meta


def test_under_autocast_experts_compute_in_its_type():
    torch.manual_seed(0)
    moe = fmoe.FMoETransformerMLP(2, 8, 16)
    x_TD = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = moe(x_TD)
    y_TD.sum().backward()
    assert y_TD.dtype == torch.bfloat16 and x_TD.grad.dtype == torch.float32
    torch.testing.assert_close(y_TD.float(), moe(x_TD), atol=2e-2, rtol=2e-2)


class Recorder(DirectDispatcher):
    """What the direct exchange of GPUs relies on: it cannot be seen on a CPU, where no rows lie behind the others."""

    def __call__(self, x_TD, routing, slot_TK, experts):
        def recorded(rows_RD, count_L):
            out = experts(rows_RD, count_L)
            self.seen = getattr(experts, "impl", None), out.dtype == rows_RD.dtype
            return out

        return super().__call__(x_TD, routing, slot_TK, recorded)


class OwnExperts(nn.Module):
    def forward(self, inp, fwd_expert_count):
        return inp * 2


@pytest.mark.parametrize("how, asks_for", [("plain", None), ("learns", "loop"), ("own", "loop"), ("own function", "loop")])
def test_a_direct_exchange_gets_what_it_needs(how, asks_for):
    """Experts that could see rows which hold anything ask for the others only; results have the type of its buffers."""
    torch.manual_seed(0)
    activation = nn.PReLU() if how == "learns" else nn.GELU()
    moe = fmoe.FMoETransformerMLP(2, 8, 16, activation=activation, dispatcher="direct")
    if how == "own":
        moe.experts = OwnExperts()
    if how == "own function":
        moe.expert_fn = lambda rows_RD, count_L: rows_RD * 2
    moe._kept_dispatcher = Recorder(None, 2)
    x_TD = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = moe(x_TD)
        moe.dispatcher = "basic"
        want_TD = moe(x_TD)
    assert moe._kept_dispatcher.seen == (asks_for, True) and y_TD.dtype == want_TD.dtype
    torch.testing.assert_close(y_TD, want_TD)


def test_the_environment_switches_fastermoes_schedule(monkeypatch):
    assert fmoe.FMoE(2, 8).dispatcher == "basic"
    monkeypatch.setenv("FMOE_FASTER_SCHEDULE_ENABLE", "ON")
    monkeypatch.setenv("FMOE_FASTER_SHADOW_ENABLE", "1")
    with pytest.warns(UserWarning, match="FMOE_FASTER_SHADOW_ENABLE has no effect"):
        assert fmoe.FMoE(2, 8).dispatcher == "overlapped"


def _program(rank):
    """What torchrun would start; its world is there already."""
    out = io.StringIO()
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(PROGRAM), run_name="__main__")
    return out.getvalue()


def test_a_program_written_for_fastmoe_trains():
    said = spawn(_program, 2)[0]
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 7 and losses[0] > 2.5 and losses[-1] < 0.3 * losses[0], said
    assert "shared parameters are equal: True" in said
