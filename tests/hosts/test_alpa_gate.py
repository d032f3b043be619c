"""The kernels of the benchmark's gate against the composition that they replace, on a GPU and in Triton's interpreter."""

import importlib.util

import pytest
import torch

pytest.importorskip("deepspeed", reason='needs the extra: pip install --no-build-isolation ".[deepspeed]"')

from smartmoe.config import GateConfig, ModelConfig  # noqa: E402
from smartmoe.hosts.deepspeed_alpa import gumbel  # noqa: E402
from tests.dist import spawn  # noqa: E402

# tokens, experts, capacity, whether the second expert is drawn, how much expert 0 is preferred
CASES = [
    (300, 16, 1.0, True, 0.0),
    (200, 5, 1.0, True, 1.0),
    (130, 8, 0.3, False, 0.0),
    (64, 16, 4.0, True, 0.0),
    (20, 4, 1.0, True, 0.0),
]


def results(device, case, fused: bool) -> list[torch.Tensor]:
    """Experts, weights, loss, gradients of input and router, and the next random number."""
    num_tokens, num_experts, capacity, sample, preferred = case
    model = ModelConfig(hidden_size=32, num_experts=num_experts, top_k=2, num_heads=4)
    config = GateConfig(kind="naive", capacity=capacity, scope="local")
    gate = gumbel.DeepSpeedGumbelGate(model, config, sample=sample, layer_idx=1, seed=3, seq_len=64, device=device)
    with torch.no_grad():
        gate.weight_ED.mul_(20)
        gate.weight_ED[0] += preferred
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = (torch.randn(num_tokens, 32, generator=generator) + 0.3).to(device).requires_grad_()
    torch.manual_seed(5)
    logits_TE = gate._logits(x_TD)
    if fused:
        uniform_TE = torch.rand_like(logits_TE) if sample else None
        found = gumbel.choose(
            logits_TE, uniform_TE, gate._limit(num_tokens, capacity), num_experts / gate._loss_divisor
        )
    else:
        routing = gate._reference(x_TD, logits_TE, torch.arange(num_tokens, device=device), 1)
        found = routing.expert_idx_TK, routing.weight_TK, routing.balance_loss
    slope_TK = torch.randn(num_tokens, 2, generator=generator).to(device)
    ((found[1] * slope_TK).sum() + 0.7 * found[2]).backward()
    more = [x_TD.grad, gate.weight_ED.grad, torch.rand(1, device=device)]
    return [tensor.detach() for tensor in (*found, *more)]


def compare(rank, device: str) -> None:
    if device == "cpu":
        from tests.dispatch.test_kernels_interpreted import _let_scalars_be_indices

        _let_scalars_be_indices()
    for case in CASES:
        expected, found = (results(torch.device(device), case, fused) for fused in (False, True))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[5], expected[5]), case
        for one, other in zip(found[1:5], expected[1:5], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton")
def test_kernels_choose_as_the_composition_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spawn(compare, 1, "cpu", fresh=True)


@pytest.mark.gpu
def test_kernels_choose_as_the_composition_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    compare(0, "cuda")


@pytest.mark.gpu
def test_noise_of_rare_numbers_is_exact_on_a_gpu():
    """The largest noise is that of numbers next to 1, whose logarithm is next to 0."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    edge = 1 - torch.arange(1, 4097, dtype=torch.float64) * 2.0**-24
    uniform_TE = torch.rand(4096, 16, generator=torch.Generator().manual_seed(1))
    uniform_TE[torch.arange(4096), torch.arange(4096) % 16] = edge.float()
    uniform_TE[:, 3] = edge.flip(0).float()
    logits_TE = torch.randn(4096, 16, generator=torch.Generator().manual_seed(2)).cuda()
    uniform_TE = uniform_TE.cuda()
    pruned_TK, *_ = gumbel.choose(logits_TE, uniform_TE, 1 << 20, 1.0)
    info = torch.finfo(torch.float32)
    noise_TE = -torch.log(-torch.log(uniform_TE * (1 - info.eps - info.tiny) + info.tiny))
    first_T1 = logits_TE.softmax(-1).argmax(-1, keepdim=True)
    second_T = (logits_TE + noise_TE).scatter(1, first_T1, -torch.inf).argmax(-1)
    assert torch.equal(pruned_TK[:, 0], first_T1[:, 0])
    # two that are a rounding apart may change places; a logarithm that is wrong next to 1 would change hundreds
    assert (pruned_TK[:, 1] != second_T).sum() <= 4


@pytest.mark.gpu
def test_logits_of_bfloat16_are_those_of_float32_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    generator = torch.Generator().manual_seed(7)
    x_TD, weight_ED = (torch.randn(shape, generator=generator).cuda().bfloat16() for shape in ((500, 768), (16, 768)))
    slope_TE, seen = torch.randn(500, 16, generator=generator).cuda(), []
    for linear in (gumbel._BfloatLinear.apply, lambda x, weight: torch.nn.functional.linear(x.float(), weight.float())):
        inputs = [tensor.clone().requires_grad_() for tensor in (x_TD, weight_ED)]
        logits_TE = linear(*inputs)
        seen.append((logits_TE, *torch.autograd.grad(logits_TE, inputs, slope_TE)))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen[0][1:], seen[1][1:], rtol=1e-2, atol=1e-2)  # rounded to bfloat16 at the end
