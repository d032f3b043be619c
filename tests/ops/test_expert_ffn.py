"""The feed-forward network of many experts: against the oracle, and the same bits in every slot."""

import pytest
import torch

from smartmoe.ops.expert_ffn import expert_ffn
from tests import oracle

COUNTS = ([3, 0, 5], [0, 0, 0], [0, 9, 0], [1, 1, 1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_equals_the_oracle(impl, activation, bias):
    for counts in COUNTS:
        _compare(impl, activation, bias, counts, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_equals_the_oracle_on_a_gpu(impl, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for activation in ("gelu", "swiglu"):
        for counts in (*COUNTS, [300, 0, 77]):
            _compare(impl, activation, True, counts, "cuda", dtype)


def _compare(impl, activation, bias, counts, device, dtype):
    generator = torch.Generator().manual_seed(3)
    want_w = [w if w is None else w.requires_grad_() for w in oracle.make_weights(3, 16, 24, activation, bias)]
    got_w = [w if w is None else w.detach().to(device, dtype).requires_grad_() for w in want_w]
    x = oracle.rounded(torch.randn(sum(counts), 16, generator=generator)).requires_grad_()
    rows = x.detach().to(device, dtype).requires_grad_()
    slot = torch.repeat_interleave(torch.tensor(counts))
    want = oracle.moe(x, slot.unsqueeze(1), torch.ones(len(slot), 1).double(), want_w, activation)
    got = expert_ffn(rows, torch.tensor(counts, device=device), *got_w, activation=activation, impl=impl)
    grad = oracle.rounded(torch.randn(want.shape, generator=generator))
    want.backward(grad)
    got.backward(grad.to(device, dtype))
    oracle.assert_close(got.detach(), want.detach(), dtype, "rows")
    oracle.assert_close(rows.grad, x.grad, dtype, "gradient of rows")
    for name, mine, theirs in zip(("w1", "b1", "w2", "b2"), got_w, want_w, strict=True):
        if mine is not None:
            want_grad = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            oracle.assert_close(mine.grad, want_grad, dtype, f"gradient of {name}")


@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_bits_do_not_depend_on_the_slot(impl):
    _same_bits(impl, "cpu", torch.float32, 20, 36)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_bits_do_not_depend_on_the_slot_on_a_gpu(impl, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _same_bits(impl, "cuda", dtype, 256, 512)


def _same_bits(impl, device, dtype, width, ffn):
    """One expert with the same rows, before, between and behind others, with odd numbers of rows about it."""
    torch.manual_seed(0)
    mine = [torch.randn(s, device=device, dtype=dtype) for s in ((width, ffn), (ffn,), (ffn, width), (width,))]
    rows, grad = (torch.randn(37, width, device=device, dtype=dtype) for _ in range(2))
    seen = []
    for place in range(4):
        counts = [11, 0, 130]
        counts.insert(place, 37)
        weights = []
        for w in mine:
            others = [torch.randn_like(w) for _ in range(3)]
            others.insert(place, w)
            weights.append(torch.stack(others).requires_grad_())
        start = sum(counts[:place])
        x = torch.randn(sum(counts), width, device=device, dtype=dtype)
        x[start : start + 37] = rows
        x.requires_grad_()
        y = expert_ffn(x, torch.tensor(counts, device=device), *weights, activation="gelu", impl=impl)
        dy = torch.randn_like(y)
        dy[start : start + 37] = grad
        y.backward(dy)
        part = slice(start, start + 37)
        seen.append([y[part].detach(), x.grad[part], *(w.grad[place] for w in weights)])
    for other in seen[1:]:
        for first, second in zip(seen[0], other, strict=True):
            assert torch.equal(first, second)


def test_rows_that_grouped_gemm_cannot_take_are_refused_with_the_remedy():
    weights = [torch.zeros(1, 6, 8), None, torch.zeros(1, 8, 6), None]
    with pytest.raises(ValueError, match="24 bytes.*loop"):
        expert_ffn(torch.zeros(2, 6), torch.tensor([2]), *weights, activation="gelu", impl="grouped")
    gated = [torch.zeros(1, 8, 12), None, torch.zeros(1, 6, 8), None]  # the first matrix fits, its gated half does not
    with pytest.raises(ValueError, match="activations is 24 bytes.*ffn_size"):
        expert_ffn(torch.zeros(2, 8), torch.tensor([2]), *gated, activation="swiglu", impl="grouped")
    with pytest.raises(ValueError, match="grouped, loop"):
        expert_ffn(torch.zeros(2, 6), torch.tensor([2]), *weights, activation="gelu", impl="other")
    with pytest.raises(ValueError, match="gelu, relu, swiglu"):
        expert_ffn(torch.zeros(2, 6), torch.tensor([2]), *weights, activation="tanh", impl="loop")
