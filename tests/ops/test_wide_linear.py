"""The router's float32 linear map of bfloat16 activations, against float64."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops import wide_linear as module
from smartmoe.ops.wide_linear import split, wide_linear


def relative(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def test_three_parts_make_a_float32():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-10, 10).repeat(50)
    total = sum(part.double() for part in split(value, 3))
    assert ((total - value).abs() <= 2.0**-24 * value.abs()).all()
    assert relative(split(value, 1)[0], value.double()) > 1e-4


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])],
)
def test_it_is_as_exact_as_float32(device):
    """On a CPU the split form is called as such: products of its parts in float32 are what matrix units compute."""
    draw = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(300, width, generator=draw).to(device) for width in (256, 24))
    weight, bias = torch.randn(24, 256, generator=draw).to(device) * 0.02, torch.randn(24, generator=draw).to(device)
    x = x.bfloat16()
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    form = wide_linear if device == "cuda" else module._SplitLinear.apply
    got = form(*inputs)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = F.linear(*wide)
    assert got.dtype == torch.float32 and relative(got, want) < 1e-6
    plain = F.linear(x, weight.bfloat16(), bias.bfloat16())
    assert relative(plain, want) > 1e-3, "products in bfloat16 are seen"
    grads = torch.autograd.grad(got, inputs, upstream)
    expected = torch.autograd.grad(want, wide, upstream.double())
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for grad, wanted, tolerance in zip(grads, expected, (4e-3, 1e-6, 1e-6), strict=True):
        assert relative(grad, wanted) < tolerance
    # the last part of the weight matters to the roundings alone: nearly all must be right
    assert (grads[0] == expected[0].to(torch.bfloat16)).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_elsewhere_it_is_the_plain_form(dtype):
    x, weight, bias = torch.randn(5, 8, dtype=dtype), torch.randn(3, 8), torch.randn(3)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(wide_linear(x, weight, bias), F.linear(x.to(wide), weight.to(wide), bias.to(wide)))
