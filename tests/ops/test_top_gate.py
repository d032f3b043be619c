"""The router in one pass each way, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops import top_gate as module
from smartmoe.ops.extension import have_triton
from smartmoe.ops.top_gate import top_gate
from smartmoe.parallel.data import GradientBuffers

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton"),
]
SETTINGS = [("cpu", torch.float32), ("cpu", torch.bfloat16), pytest.param("cuda", torch.bfloat16, marks=on_gpu)]
SIZES = [(70, 48, 5, 2), (300, 96, 32, 2), (513, 160, 40, 3), (65, 32, 4, 4), (10, 64, 1, 1), (1000, 1536, 64, 4)]


def relative(got, want):
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()


def drawn(device, dtype, num_tokens, width, num_experts, top_k):
    """x, weight, bias, and gradients of the weights of choices and of x."""
    draw = torch.Generator().manual_seed(1)
    sizes = [(num_tokens, width), (num_experts, width), (num_experts,), (num_tokens, top_k), (num_tokens, width)]
    x, weight, bias, slope, beside = (torch.randn(size, generator=draw).to(device) for size in sizes)
    return x.to(dtype), weight * 0.2, bias, slope, beside.to(dtype)


@pytest.mark.parametrize(("device", "dtype"), SETTINGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("goes_on", [True, False])
def test_it_is_its_formula(device, dtype, sizes, goes_on):
    *tensors, slope, beside = drawn(device, dtype, *sizes)
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    expert_TK, weight_TK, x = top_gate(*inputs, sizes[3])
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    top_TK, wanted_TK = F.linear(*wide).topk(sizes[3], dim=-1)
    assert torch.equal(expert_TK, wanted_TK) and torch.equal(x, inputs[0]) and weight_TK.dtype == torch.float32
    wanted = top_TK.softmax(-1)
    assert relative(weight_TK, wanted) < 1e-5
    found = torch.autograd.grad((weight_TK * slope).sum() + (x * beside).sum() * goes_on, inputs)
    expected = torch.autograd.grad((wanted * slope).sum() + (wide[0] * beside).sum() * goes_on, wide)
    for got, want, tolerance in zip(found, expected, (1e-5 if dtype == torch.float32 else 1e-2, 1e-5, 1e-5), strict=True):
        assert relative(got, want) < tolerance


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_gradients_go_to_the_sinks(device):
    x, weight, bias, slope, _ = drawn(device, torch.bfloat16, 300, 96, 32, 2)
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    found = torch.autograd.grad((top_gate(x, weight, bias, 2)[1] * slope).sum(), [weight, bias])
    buffers = GradientBuffers([("weight", weight), ("bias", bias)], {})
    buffers._flat["dense"].fill_(torch.nan)  # nobody may read what was there
    for _ in range(3):
        (top_gate(x, weight, bias, 2)[1] * slope).sum().backward()
    assert weight.grad is None and not buffers._waiting
    for ref, once in zip(buffers.refs, found, strict=True):
        torch.testing.assert_close(ref.grad, 3 * once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_what_is_no_number_gives_experts_all_the_same(device):
    """As torch has it: such a logit is the largest, and infinite ones have their order."""
    x, weight, bias, *_ = drawn(device, torch.bfloat16, 70, 32, 5, 4)
    x[3], bias[2:] = torch.nan, -torch.inf
    expert_TK, weight_TK, _ = top_gate(x, weight, bias, 4)
    assert all(len(set(row)) == 4 and set(row) <= set(range(5)) for row in expert_TK.tolist())
    assert weight_TK[3].isnan().all() and (expert_TK[torch.arange(70, device=device) != 3, :2] < 2).all()
    wanted = F.linear(x[4].double(), weight.double(), bias.double())[expert_TK[4]].softmax(0)
    assert relative(weight_TK[4], wanted) < 1e-5


def test_large_routers_and_other_types_take_the_composition(monkeypatch):
    monkeypatch.setattr(module, "_TopGate", None)
    for sizes in ((10, 16, 128, 2), (10, 16, 4, 2)):
        *tensors, _, _ = drawn("cpu", torch.bfloat16, *sizes)
        assert top_gate(*tensors, 2)[2] is tensors[0]
