"""Gradients of expert weights that products add to the optimizer's buffers, instead of giving them to autograd."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from smartmoe.ops import expert_ffn as ffn
from smartmoe.ops.grad_sink import sink_of
from smartmoe.parallel.data import GradientBuffers

COUNTS = [[3, 0, 5], [0, 8, 0], [0, 0, 0], [4, 1, 2]]  # of four micro-batches


class PlainProducts:
    """What the extension multiplies, in plain torch."""

    @staticmethod
    def _bounds(end_L):
        return zip(range(len(end_L)), [0, *end_L.tolist()], end_L.tolist(), strict=False)

    @classmethod
    def multiply_rows(cls, rows, weight, bias, end_L, transposed):
        weight = weight.transpose(1, 2) if transposed else weight
        parts = [rows[a:b] @ weight[slot] + (0 if bias is None else bias[slot]) for slot, a, b in cls._bounds(end_L)]
        return torch.cat(parts)

    @classmethod
    def multiply_activate(cls, rows, weight, bias, end_L, activation):
        hidden = cls.multiply_rows(rows, weight, None, end_L, False)
        return hidden, ffn.activate_rows(hidden, bias, end_L, activation)

    @classmethod
    def multiply_slope(cls, grad, weight, bias, end_L, hidden, activation, reuse, total, is_first):
        grad_act = cls.multiply_rows(grad, weight, None, end_L, True)
        grad_hidden, act, grad_bias = ffn.activate_rows_backward(hidden, bias, grad_act, end_L, activation, False)
        return grad_hidden, act, cls._add(grad_bias, total, is_first)

    @classmethod
    def multiply_slots(cls, rows, grad, end_L, total, is_first, held_G):
        return cls._add(torch.stack([rows[a:b].t() @ grad[a:b] for _, a, b in cls._bounds(end_L)]), total, is_first)

    @staticmethod
    def _add(part, total, is_first):
        if total is None:
            return part
        num = total.shape[0]
        total.copy_(part[:num]) if is_first else total.add_(part[:num])
        return part[num:]


def buffers_of(device, dtype, width, with_sink):
    """Experts of three slots, their gradient buffers full of NaN, and a list that gets the names of gradients that autograd
    brings."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"w1": (3, width, 2 * width), "b1": (3, 2 * width), "w2": (3, 2 * width, width), "b2": (3, width)}
    params = {n: torch.nn.Parameter((torch.randn(s, generator=draw) * 0.1).to(device, dtype)) for n, s in shapes.items()}
    for param in params.values():
        param.parallel = "expert"
    buffers, came = GradientBuffers(list(params.items()), {}), []
    for name, param in params.items():
        if not with_sink:
            del param.grad_sink
        param.register_hook(lambda grad, name=name: came.append(name) if grad is not None else None)
    buffers.zero()
    buffers._flat["expert"].fill_(torch.nan)  # nobody may read what was there
    return buffers, list(params.values()), came


def gradients(run, device, dtype, width, with_sink):
    """The buffers after four micro-batches, and whose gradients came by autograd."""
    buffers, params, came = buffers_of(device, dtype, width, with_sink)
    draw = torch.Generator().manual_seed(1)
    for count_L in COUNTS:
        rows = torch.randn(sum(count_L), width, generator=draw).to(device, dtype).requires_grad_()
        out = run(rows, torch.tensor(count_L, device=device), *params)
        (out * torch.randn(out.shape, generator=draw).to(device, dtype)).sum().backward()
    buffers.complete()
    return {ref.name: ref.grad.clone() for ref in buffers.refs}, sorted(came)


def on_cpu(*args):
    return ffn.expert_ffn(*args, "gelu", "grouped")


def as_on_cuda(*args):
    return ffn.fused_ffn(*args, "gelu")


def recomputed(*args):
    return checkpoint(as_on_cuda, *args, use_reentrant=False)


@pytest.mark.parametrize("run", [on_cpu, as_on_cuda, recomputed])
@pytest.mark.parametrize("products", [None, PlainProducts])
def test_what_the_products_add_is_what_the_hooks_would(run, products, monkeypatch):
    monkeypatch.setattr(ffn, "products_for", lambda *factors: products)
    wanted, all_came = gradients(run, "cpu", torch.float32, 8, with_sink=False)
    got, came = gradients(run, "cpu", torch.float32, 8, with_sink=True)
    assert came == (sorted(["b1", "b2"] * 4) if run is on_cpu else []) and len(all_came) == 16
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad), name


def test_a_sum_that_begins_anywhere_gets_what_the_product_cannot_add_itself(monkeypatch):
    """As in a host's buffer, behind a parameter of odd size."""

    class Products(PlainProducts):
        @classmethod
        def multiply_slots(cls, rows, grad, end_L, total, is_first, held_G):
            assert total is None or total.data_ptr() % 16 == 0
            return super().multiply_slots(rows, grad, end_L, total, is_first, held_G)

    class Sink:
        is_urgent, held_G = False, None
        total, is_first, kept = torch.full((2 * 8 * 16 + 1,), torch.nan)[1:].view(2, 8, 16), True, None

        def take(self):
            is_first, self.is_first = self.is_first, False
            return self.total, is_first

        def keep(self, rest):
            self.kept = rest

    monkeypatch.setattr(ffn, "products_for", lambda *factors: Products)
    sink, rows, grad = Sink(), torch.randn(8, 8), torch.randn(8, 16)
    end_L = torch.tensor([3, 3, 8], dtype=torch.int32)
    wanted = PlainProducts.multiply_slots(rows, grad, end_L, None, False, None)
    for times in (1, 2):
        assert ffn._weight_gradient(rows, grad, end_L, sink) is None
        torch.testing.assert_close(sink.total, times * wanted[:2])
        assert torch.equal(sink.kept, wanted[2:])


def test_one_by_one_and_where_autograd_brings_some_of_it():
    """Experts one by one know of no sinks; a weight used in both ways gets the sum of both."""

    def both(*args):
        return ffn.expert_ffn(*args, "gelu", "loop") + on_cpu(*args) + on_cpu(*args)

    got, came = gradients(both, "cpu", torch.float32, 8, with_sink=True)
    wanted, all_came = gradients(both, "cpu", torch.float32, 8, with_sink=False)
    assert came == all_came and len(came) == 16
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradients_are_summed_in_float32_without_being_rounded_first():
    """Between products that round to the weight's dtype nothing changes."""
    wanted, _ = gradients(on_cpu, "cpu", torch.bfloat16, 16, with_sink=False)
    got, _ = gradients(on_cpu, "cpu", torch.bfloat16, 16, with_sink=True)
    assert all(torch.equal(got[name], grad) and grad.dtype == torch.float32 for name, grad in wanted.items())


def test_a_sum_that_is_reduced_while_the_pass_runs_may_not_end_late():
    buffers, params, _ = buffers_of("cpu", torch.float32, 16, with_sink=True)
    assert all(param.grad_sink.may_end_late for param in params)
    buffers.reduce_early(num_passes=1)
    assert not any(param.grad_sink.may_end_late for param in params)


def test_a_second_backward_pass_adds_again():
    buffers, params, _ = buffers_of("cpu", torch.float32, 8, with_sink=True)
    y = on_cpu(torch.randn(4, 8), torch.tensor([1, 3, 0]), *params).square().sum()
    y.backward(retain_graph=True)
    buffers.complete()
    once = [ref.grad.clone() for ref in buffers.refs]
    y.backward()
    buffers.complete()
    for ref, grad in zip(buffers.refs, once, strict=True):
        torch.testing.assert_close(ref.grad, 2 * grad)


def test_who_asks_for_gradients_of_a_frozen_or_compiled_weight_gets_none_in_the_sink(monkeypatch):
    _, (w1, *_), _ = buffers_of("cpu", torch.float32, 8, with_sink=True)
    assert sink_of(w1) is w1.grad_sink and sink_of(None) is None
    assert sink_of(w1.detach()) is None and sink_of(torch.nn.Parameter(w1.detach())) is None
    assert sink_of(w1.requires_grad_(False)) is None
    w1.requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert sink_of(w1) is None


@pytest.mark.gpu
def test_on_a_gpu_both_ways_agree():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-6)):
        wanted, _ = gradients(on_cpu, "cuda", dtype, 64, with_sink=False)
        got, came = gradients(on_cpu, "cuda", dtype, 64, with_sink=True)
        assert came == []
        for name, grad in wanted.items():
            assert (got[name] - grad).norm() <= tolerance * grad.norm(), name
