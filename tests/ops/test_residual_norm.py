"""The residual connection with the LayerNorm behind it: the plain form everywhere, the kernels on a GPU against float64."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops.extension import have_triton
from smartmoe.ops.residual_norm import residual_norm
from smartmoe.parallel.data import GradientBuffers

# Largest error relative to the largest value: one rounding of a result whose sums are in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton"),
]
# On a CPU torch sums the gradients of half-precision weights in their own precision.
SETTINGS = [("cpu", torch.float32), *(pytest.param("cuda", dtype, marks=on_gpu) for dtype in TOLERANCE)]


def run(x, update, norm, upstream, function):
    """Both results and all gradients; upstream: gradients of (sum, normalised), None = that result is not used."""
    inputs = [t.clone().requires_grad_() for t in (x, update) if t is not None] + [norm.weight, norm.bias]
    results = function(*inputs[: -2 if update is not None else 1], *([] if update is not None else [None]), norm)
    loss = sum((r * u).sum() for r, u in zip(results, upstream, strict=True) if u is not None)
    return [*results, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def reference(x, update, norm):
    total = x if update is None else x + update
    return total, F.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize(("device", "dtype"), SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 7, 48), (2, 600, 1536)], ids=str)
@pytest.mark.parametrize("case", ["both", "no update", "sum unused"])
def test_it_is_an_addition_and_a_layer_norm(device, dtype, shape, case):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    norm = torch.nn.LayerNorm(shape[-1]).to(device, dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    x, update = draw[0], None if case == "no update" else draw[1]
    upstream = [None if case == "sum unused" else draw[2], draw[3]]
    got = run(x, update, norm, upstream, residual_norm)
    # what is normalised is the sum as it is stored: the reference gets it, and the rounding itself has slope one
    stored = (x if update is None else x + update).double()
    wide = torch.nn.LayerNorm(shape[-1]).to(device, torch.float64)
    wide.load_state_dict(norm.state_dict())
    want = run(stored, None, wide, [None if u is None else u.double() for u in upstream], reference)
    if update is not None:
        want.insert(3, want[2])
    for place, (mine, expected) in enumerate(zip(got, want, strict=True)):
        error = (mine.double() - expected).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item()), (place, error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_runs_give_the_same_bits():
    x, update, upstream = (torch.randn(5000, 768, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    norm = torch.nn.LayerNorm(768).to("cuda", torch.bfloat16)
    first, second = (run(x, update, norm, [upstream, upstream], residual_norm) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_gradients_of_weight_and_bias_go_to_their_sinks(device):
    x, upstream = (torch.randn(700, 96, device=device, dtype=torch.bfloat16) for _ in range(2))
    norm = torch.nn.LayerNorm(96).to(device, torch.bfloat16)
    wide = torch.nn.LayerNorm(96).to(device, torch.float64)
    wanted = run(x.double(), None, wide, [None, upstream.double()], reference)[3:]
    buffers = GradientBuffers(list(norm.named_parameters()), {})
    buffers._flat["dense"].fill_(torch.nan)  # nobody may read what was there
    for _ in range(3):
        residual_norm(x, None, norm)[1].backward(upstream)
    assert norm.weight.grad is None and not buffers._waiting
    for ref, once in zip(buffers.refs, wanted, strict=True):
        error = (ref.grad.double() - 3 * once).abs().max() / once.abs().max()
        assert error < 1e-5, "summed in float32, and not rounded in between"
