"""Routing plans, permutation and weighted combine, against index loops and numerical gradients."""

import itertools

import pytest
import torch

from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import MAX_KERNEL_SLOTS, count_slots, ends_of, make_padded_plan, make_plan, slots_of

TABLES = [
    ([[2, 0], [1, 2], [0, 1]], 3),
    ([[2, -1], [-1, -1], [2, 2]], 4),
    ([[-1], [-1]], 2),
    ([[5], [5], [5]], 6),
]


def both_plans(slot_TK, num_slots):
    count = count_slots(slot_TK, num_slots)
    yield make_plan(slot_TK, num_slots, int(count.sum()))
    yield make_padded_plan(slot_TK, num_slots, max(1, int(count.max())))


@pytest.mark.parametrize("table, num_slots", TABLES)
def test_plan_is_stable_by_slot_and_leaves_dropped_copies_out(table, num_slots):
    slot_TK = torch.tensor(table)
    flat = slot_TK.flatten().tolist()
    want = sorted((n for n in range(len(flat)) if flat[n] >= 0), key=lambda n: (flat[n], n))
    plan = make_plan(slot_TK, num_slots, len(want))
    assert plan.copy_of_row_R.tolist() == want
    counts = [flat.count(s) for s in range(num_slots)]
    assert count_slots(slot_TK, num_slots).tolist() == counts
    assert ends_of(torch.tensor(counts)).tolist() == list(itertools.accumulate(counts))
    for n, slot in enumerate(flat):
        row = int(plan.row_of_copy_TK.flatten()[n])
        assert want[row] == n if slot >= 0 else row >= len(want)


@pytest.mark.parametrize("table, num_slots", TABLES)
def test_padded_plan_gives_each_slot_its_own_buffer(table, num_slots):
    slot_TK = torch.tensor(table)
    flat, capacity = slot_TK.flatten().tolist(), 3
    plan = make_padded_plan(slot_TK, num_slots, capacity)
    for slot in range(num_slots):
        mine = [n for n in range(len(flat)) if flat[n] == slot][:capacity]
        buffer = plan.copy_of_row_R[slot * capacity : (slot + 1) * capacity].tolist()
        assert buffer == mine + [-1] * (capacity - len(mine))
    for n, slot in enumerate(flat):
        row = int(plan.row_of_copy_TK.flatten()[n])
        assert plan.copy_of_row_R[row] == n if slot >= 0 else row == num_slots * capacity


def test_a_copy_beyond_a_buffer_is_dropped_not_written_elsewhere():
    plan = make_padded_plan(torch.tensor([[0], [0], [1]]), 2, 1)
    assert plan.copy_of_row_R.tolist() == [0, 2]
    assert plan.row_of_copy_TK.flatten().tolist() == [0, 2, 1]


def test_dropped_copies_stay_dropped_under_any_placement():
    slots = slots_of(torch.tensor([[0, -1], [2, 1]]), torch.tensor([[5], [3], [4]]))
    assert slots.tolist() == [[5, -1], [4, 3]]


@pytest.mark.parametrize("table, num_slots", TABLES)
def test_permute_and_combine_with_their_gradients(table, num_slots):
    slot_TK = torch.tensor(table)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(slot_TK.shape[0], 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(slot_TK.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    for plan in both_plans(slot_TK, num_slots):
        rows = permute(x, plan)
        for row, n in enumerate(plan.copy_of_row_R.tolist()):
            assert torch.equal(rows[row], x[n // slot_TK.shape[1]] if n >= 0 else torch.zeros(3).double())
        assert torch.autograd.gradcheck(lambda x, plan=plan: permute(x, plan), x)
        if rows.numel():
            free = torch.randn(rows.shape, generator=generator, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(lambda r, w, plan=plan: combine(r, w, plan), (free, weight))
        got = combine(rows, weight, plan)
        want = x * (weight * (slot_TK >= 0)).sum(1, keepdim=True)
        assert torch.allclose(got, want)


def test_dropped_copies_hide_even_infinite_rows():
    slot_TK = torch.tensor([[0, -1]])
    plan = make_plan(slot_TK, 1, 1)
    rows = torch.tensor([[float("inf")]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0]], requires_grad=True)
    combine(rows, weight, plan).backward(torch.ones(1, 1))
    assert weight.grad[0, 1] == 0


def test_combine_sums_in_float32_and_keeps_the_dtype_of_rows():
    slot_TK = torch.zeros(1, 3, dtype=torch.int64)
    plan = make_plan(slot_TK, 1, 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    total = combine(rows, torch.ones(1, 3), plan)
    assert total.dtype == torch.bfloat16 and total.item() == 258.0


def test_the_tables_of_the_most_slots_and_what_the_kernel_has_besides_fit_in_48_kb():
    tables, own = 3 + 1, 16  # place_kernel of csrc/kernels/plan.cu: of totals, of starts, .., of one warp; as ptxas counts
    assert tables * MAX_KERNEL_SLOTS * 4 + own <= 48 * 1024
