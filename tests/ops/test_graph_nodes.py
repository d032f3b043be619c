"""Memsets of captured graphs become kernels, and what follows them finds the same."""

import pytest
import torch

from smartmoe.graphs import CudaTape
from smartmoe.ops import graph_nodes
from smartmoe.ops.extension import kernels_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _sums(x, out):
    """Sums over so many rows that blocks meet by counters, which a memset clears, and a gradient that sorts numbers."""
    place = x[:, 0].long().abs() % 16
    table = torch.ones(16, x.shape[1], device=x.device, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.nn.functional.embedding(place, table), table, x)
    out.copy_(torch.cat([x.sum(0), grad.flatten()]))


def _num_memsets(replay) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    return sum("memset" in event.key.lower() and event.key != "memset32" for event in profiler.events())


def test_no_small_memset_is_left_and_results_are_the_same(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    if kernels_for(torch.empty(0, dtype=torch.int64, device=device)) is None:
        pytest.skip("needs the extension")
    # whole numbers have the same sums in any order: torch adds gradients of few rows atomically (its pull request 172454)
    x, out = torch.randint(-99, 99, (8192, 32), device=device).float(), torch.empty(17 * 32, device=device)
    tape, wanted = CudaTape(device), torch.empty_like(out)
    with torch.enable_grad():
        _sums(x, wanted)
        replay = tape.record(lambda: _sums(x, out))
        monkeypatch.setattr(graph_nodes, "kernels_for", lambda tensor: None)
        slow = tape.record(lambda: _sums(x, wanted))
    assert _num_memsets(slow) > 0 == _num_memsets(replay)
    for _ in range(3):
        x.copy_(torch.randint(-99, 99, x.shape, device=device))
        replay()
        slow()
        assert torch.equal(out, wanted)
    tape.clear()
