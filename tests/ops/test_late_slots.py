"""Weights of which some slots come while the product of the others runs."""

import contextlib

import pytest
import torch

from smartmoe.ops import expert_ffn as ffn
from smartmoe.ops.late_slots import LateSlots, late_slots_of
from tests.ops.test_grad_sink import PlainProducts

NUM_OWNED, WIDTH = 2, 8


class Products(PlainProducts):
    @classmethod
    def multiply_activate_into(cls, rows, weight, bias, end_L, activation, first, last, hidden, act):
        """Only rows of the slots first .. last - 1 are written."""
        got = cls.multiply_activate(rows, weight, bias, end_L, activation)
        begin, end = ([0, *end_L.tolist()][slot] for slot in (first, last))
        for out, whole in zip((hidden, act), got, strict=True):
            out[begin:end] = whole[begin:end]


@pytest.mark.parametrize("products, wanted_events", [(Products, ["beside", "wait"]), (None, ["wait"])])
@pytest.mark.parametrize("with_bias", [True, False])
def test_nothing_reads_a_slot_before_it_is_there(products, wanted_events, with_bias, monkeypatch):
    monkeypatch.setattr(ffn, "products_for", lambda *factors: products)
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, WIDTH, 16), (4, 16), (4, 16, WIDTH), (4, WIDTH)]
    whole = [torch.randn(shape, generator=draw) for shape in shapes]
    rows, count_L = torch.randn(9, WIDTH, generator=draw), torch.tensor([3, 1, 0, 5])
    wanted = ffn.fused_ffn(rows, count_L, *(t if with_bias or t.dim() == 3 else None for t in whole), "gelu")

    storages, events = [t.clone() for t in whole], []
    for storage in storages:
        storage[NUM_OWNED:] = torch.nan

    def arrive(event):
        events.append(event)
        for storage, full in zip(storages, whole, strict=True):
            storage[NUM_OWNED:] = full[NUM_OWNED:]

    @contextlib.contextmanager
    def beside():
        arrive("beside")  # what is launched inside comes behind the slots
        yield
        for storage in storages:  # and what is launched outside may not count on them
            storage[NUM_OWNED:] = torch.nan

    storages[0].late_slots = LateSlots(NUM_OWNED, beside, lambda: arrive("wait"))
    assert late_slots_of(storages[0]) is storages[0].late_slots and late_slots_of(storages[1]) is None
    with torch.no_grad():
        got = ffn.fused_ffn(rows, count_L, *(t if with_bias or t.dim() == 3 else None for t in storages), "gelu")
    assert events == wanted_events
    torch.testing.assert_close(got, wanted)
