"""Embeddings that sum their weights' gradients themselves, against autograd."""

import pytest
import torch
import torch.nn.functional as F

from smartmoe.ops.extension import have_triton
from smartmoe.ops.lookup import Embedding, SummedLookup
from smartmoe.parallel.data import GradientBuffers

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
# numbers, width, rows of the table: one, runs that end with chunks, that go on over many, one of all, none that comes twice
SIZES = [(1, 8, 3), (64, 130, 1), (65, 16, 2), (300, 40, 7), (1000, 24, 5000), (8192, 96, 300), (640, 16, 1), (0, 8, 3)]


def summed(embedding, idx, dtype):
    """The sum of three gradients, and what it is in float64."""
    buffers = GradientBuffers(list(embedding.named_parameters()), {})
    buffers._flat["dense"].fill_(torch.nan)  # nobody may read what was there
    draw = torch.Generator().manual_seed(1)
    wanted = torch.zeros(embedding.weight.shape, dtype=torch.float64, device=idx.device)
    for _ in range(3):
        grad = torch.randn(*idx.shape, wanted.shape[1], generator=draw).to(idx.device, dtype)
        sink, distinct = embedding.weight.grad_sink, embedding._distinct
        y = embedding(idx) if idx.is_cuda else SummedLookup.apply(idx, embedding.weight, sink, distinct)
        assert torch.equal(y, F.embedding(idx, embedding.weight))
        y.backward(grad)
        wanted.index_add_(0, idx.flatten().long(), grad.flatten(0, -2).double())
        assert embedding.weight.grad is None and not buffers._waiting
    buffers.complete()
    return buffers.refs[0].grad, wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_sink_gets_the_sum_of_all_gradients(device, dtype, sizes):
    num, width, num_rows = sizes
    draw = torch.Generator().manual_seed(0)
    idx = (torch.rand(num, generator=draw) ** 3 * num_rows).to(device, torch.int32)
    found = [summed(Embedding(num_rows, width).to(device, dtype), idx.view(1, num), dtype) for _ in range(2)]
    torch.testing.assert_close(found[0][0].double(), found[0][1], rtol=1e-5, atol=3e-4)
    if device == "cuda":
        assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("device", DEVICES)
def test_distinct_numbers_need_no_order(device):
    idx = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:20].to(device)
    got, wanted = summed(Embedding(50, 8, distinct=True).to(device, torch.bfloat16), idx, torch.bfloat16)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_a_sink_or_on_a_cpu_it_is_torchs_own():
    embedding, idx = Embedding(8, 4), torch.tensor([[1, 7, 1]])
    name = F.embedding(idx, embedding.weight).grad_fn.name()
    assert embedding(idx).grad_fn.name() == name
    GradientBuffers(list(embedding.named_parameters()), {})
    assert embedding(idx).grad_fn.name() == name
