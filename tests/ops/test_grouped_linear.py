"""One linear map for each slot, against torch's own slot by slot."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops.grouped_linear import grouped_linear

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(8, 24), (6, 24), (8, 5)])
@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 9, 0), (0, 0, 0), (2, 2, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_slot_has_its_own_map(dtype, widths, counts, has_bias):
    torch.manual_seed(0)
    num_rows = sum(counts) + 2 * (sum(counts) > 0)  # the rows behind belong to nobody
    rows, weight, bias = torch.randn(num_rows, widths[0]), torch.randn(3, *widths[::-1]), torch.randn(3, widths[1])
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (rows, weight, *[bias] * has_bias)]
    twins = [tensor.detach().double().requires_grad_() for tensor in inputs]
    used = slice(0, sum(counts))
    got = grouped_linear(inputs[0], torch.tensor(counts), *inputs[1:])
    parts = zip(twins[0][used].split(counts), *(twin.unbind() for twin in twins[1:]), strict=True)
    want = torch.cat([F.linear(*part) for part in parts])
    upstream = torch.randn(num_rows, widths[1], dtype=dtype)
    grads = torch.autograd.grad(got, inputs, upstream)
    expected = torch.autograd.grad(want, twins, upstream[used].double())
    assert got.dtype == dtype and got.shape == (num_rows, widths[1])
    pairs = [(got[used], want), (grads[0][used], expected[0][used]), *zip(grads[1:], expected[1:], strict=True)]
    for value, wanted in pairs:
        assert value.shape == wanted.shape and value.dtype == dtype
        if wanted.numel():
            assert (value.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max().clamp(min=1)


def test_what_does_not_fit_is_refused():
    weight = torch.randn(2, 8, 4)
    for rows in (torch.randn(3, 8), torch.randn(3, 4).double(), torch.randn(1, 3, 4)):
        with pytest.raises(ValueError, match=r"the weights take torch.float32 \[rows, 4\]"):
            grouped_linear(rows, torch.tensor([1, 2]), weight)
