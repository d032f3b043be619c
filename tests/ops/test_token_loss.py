"""The cross-entropy over a vocabulary: the plain form everywhere, the kernels on a GPU against float64."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops.extension import have_triton
from smartmoe.ops.token_loss import summed_cross_entropy

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton"),
]
# Largest error of a gradient, which lies in -1 .. 1: one rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SETTINGS = [("cpu", dtype) for dtype in TOLERANCE]
SETTINGS += [pytest.param("cuda", dtype, marks=on_gpu) for dtype in TOLERANCE]


@pytest.mark.parametrize(("device", "dtype"), SETTINGS)
@pytest.mark.parametrize("shape", [(1, 257), (300, 1000), (7, 8192), (5, 50257)], ids=str)
def test_it_is_the_cross_entropy_in_float32(device, dtype, shape):
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=draw) * 4).to(device, dtype)
    target = torch.randint(0, shape[1], shape[:1], generator=draw).to(device)
    logits[0, target[0]] = 90.0  # the exponential of it is no float32
    logits[-1, 0] = -torch.inf
    target[-1] = 1
    mine, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, want = summed_cross_entropy(mine * 1, target), F.cross_entropy(wide, target, reduction="sum")
    assert loss.dtype == torch.float32 and abs(loss.item() - want.item()) <= 1e-5 * abs(want.item()) + 1e-6
    (loss * 0.5).backward()
    (want * 0.5).backward()
    assert (mine.grad.double() - wide.grad).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton")
def test_a_second_backward_pass_is_an_error():
    logits = torch.randn(4, 300, device="cuda", requires_grad=True)
    loss = summed_cross_entropy(logits * 1, torch.zeros(4, dtype=torch.int64, device="cuda"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
