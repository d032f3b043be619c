"""Linear maps that sum their weights' gradients themselves, against autograd."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops.dense_linear import DenseLinear, SummedLinear
from smartmoe.parallel.data import GradientBuffers

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("needs_x", [True, False])
def test_the_sink_gets_the_sum_of_all_gradients(device, needs_x):
    draw = torch.Generator().manual_seed(0)
    linear = DenseLinear(16, 24).to(device, torch.bfloat16)
    buffers = GradientBuffers(list(linear.named_parameters()), {})
    buffers._flat["dense"].fill_(torch.nan)  # nobody may read what was there
    wanted = torch.zeros(24, 16, dtype=torch.float64, device=device)
    for _ in range(3):
        x = torch.randn(2, 5, 16, generator=draw).to(device, torch.bfloat16).requires_grad_(needs_x)
        grad = torch.randn(2, 5, 24, generator=draw).to(device, torch.bfloat16)
        y = linear(x) if device == "cuda" else SummedLinear.apply(x, linear.weight, linear.weight.grad_sink)
        assert torch.equal(y, F.linear(x, linear.weight))
        y.backward(grad)
        wanted += grad.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
        assert linear.weight.grad is None
        if needs_x:
            torch.testing.assert_close(x.grad, grad @ linear.weight, rtol=1e-2, atol=1e-3)
    buffers.complete()
    torch.testing.assert_close(buffers.refs[0].grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_a_sink_or_on_a_cpu_it_is_torchs_own():
    linear, x = DenseLinear(8, 4), torch.randn(3, 8, requires_grad=True)
    assert linear.bias is None and torch.equal(linear(x), F.linear(x, linear.weight))
    GradientBuffers(list(linear.named_parameters()), {})
    assert linear(x).grad_fn.name() == F.linear(x, linear.weight).grad_fn.name()
