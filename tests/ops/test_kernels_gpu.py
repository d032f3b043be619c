"""The kernels of the extension against the plain form beside each, in float64, over shapes that reach every branch."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from smartmoe.ops import extension
from smartmoe.ops.activation import activate
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.ops.permute import combine, combine_backward_reference, gather_sum_reference, permute, permute_reference
from smartmoe.ops.plan import MAX_KERNEL_SLOTS, count_slots, ends_of, make_padded_plan, make_plan, plan_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(extension._C is None, reason="smartmoe._C is not built"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Largest error relative to the largest value: one rounding of the result, and sums in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NORM_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# tokens, width, top_k, slots: no token, one, odd widths without 16-byte rows, several turns along a row, every top_k
SHAPES = [
    (0, 16, 2, 4), (1, 8, 1, 1), (5, 7, 3, 4), (33, 64, 2, 6), (64, 1536, 2, 16), (129, 2048, 8, 128), (40, 24, 5, 3),
    (50, 2560, 4, 9), (70, 33, 6, 256), (31, 4096, 7, 40),
]  # fmt: skip


def close(got, want, dtype, what):
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.double() - want.double()).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1e-3, want.double().abs().max().item()), (what, error)


def close_in_norm(got, want, dtype, what):
    """For products of rounded factors, and for relu: where its argument rounds across 0, single values differ."""
    assert got.shape == want.shape, what
    error, scale = (got.double() - want).norm().item(), want.norm().item()
    assert error <= NORM_TOLERANCE[dtype] * max(scale, 1e-3), (what, error, scale)


def slots(num_tokens, top_k, num_slots, seed, dropped=0.1, hot=None):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    slot_TK = torch.randint(num_slots, (num_tokens, top_k), device="cuda", generator=generator)
    if hot is not None:
        slot_TK.fill_(hot)
    return slot_TK.masked_fill_(torch.rand(slot_TK.shape, device="cuda", generator=generator) < dropped, -1)


@pytest.mark.parametrize("num_tokens, top_k, num_slots", [
    (0, 2, 4), (1, 1, 1), (511, 1, 7), (8192, 2, 32), (32768, 8, 128), (65536, 8, 256), (10000, 3, 1000), (77, 4, 3000),
    (77, 4, MAX_KERNEL_SLOTS), (77, 4, 3072), (300, 2, 5000),
])  # fmt: skip
def test_plan_equals_the_sort(num_tokens, top_k, num_slots):
    for seed, hot, dropped in ((0, None, 0.1), (1, num_slots - 1, 0.0), (2, 0, 1.0)):
        slot_TK = slots(num_tokens, top_k, num_slots, seed, dropped, hot)
        kept = int((slot_TK >= 0).sum())
        count_S = count_slots(slot_TK, num_slots)
        assert torch.equal(count_S, plan_reference(slot_TK, num_slots, 0, kept)[0])
        assert torch.equal(ends_of(count_S), count_S.cumsum(0, dtype=torch.int32))
        can_be_early = torch.cuda.get_device_capability() >= (9, 0)
        for num_rows, early in itertools.product({kept, slot_TK.numel() + 5, kept // 2}, {False, can_be_early}):
            # an early plan reads what the kernel before it writes
            asked_TK = slot_TK + 0
            plan, want = make_plan(asked_TK, num_slots, num_rows, early), plan_reference(slot_TK, num_slots, 0, num_rows)
            assert torch.equal(plan.count_S, want[0]) and torch.equal(plan.copy_of_row_R, want[1])
            assert torch.equal(plan.row_of_copy_TK.clamp(max=num_rows), want[2].clamp(max=num_rows))
        for capacity in (1, 300) if num_slots <= 256 else (2,):
            plan = make_padded_plan(slot_TK, num_slots, capacity)
            want = plan_reference(slot_TK, num_slots, capacity, num_slots * capacity)
            for mine, theirs in zip((plan.count_S, plan.copy_of_row_R, plan.row_of_copy_TK), want, strict=True):
                assert torch.equal(mine, theirs)


def plans_of(slot_TK, num_slots):
    kept = int((slot_TK >= 0).sum())
    exact, loose = make_plan(slot_TK, num_slots, kept), make_plan(slot_TK, num_slots, kept + 9)
    return exact, loose, make_padded_plan(slot_TK, num_slots, 11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, width, top_k, num_slots", SHAPES)
def test_permute_and_combine(num_tokens, width, top_k, num_slots, dtype):
    slot_TK = slots(num_tokens, top_k, num_slots, 3)
    torch.manual_seed(0)
    for plan in plans_of(slot_TK, num_slots):
        used_R = plan.copy_of_row_R >= 0
        index = (plan.copy_of_row_R, plan.row_of_copy_TK)
        x = torch.randn(num_tokens, width, device="cuda", dtype=dtype, requires_grad=True)
        rows = permute(x, plan)
        want = permute_reference(x.detach(), *index, plan.padded)
        assert torch.equal(rows if plan.padded else rows[used_R], want if plan.padded else want[used_R])
        grad = torch.randn_like(rows).masked_fill_(~used_R.unsqueeze(1), float("nan"))
        rows.backward(grad)
        close(x.grad, gather_sum_reference(grad.double().nan_to_num(), index[1]), dtype, "gradient of permute")

        free = torch.randn_like(rows).masked_fill_(~used_R.unsqueeze(1), float("nan")).requires_grad_()
        weight = torch.rand(num_tokens, top_k, device="cuda", requires_grad=True)
        y = combine(free, weight, plan)
        wide, wide_weight = free.detach().double().nan_to_num(), weight.detach().double()
        close(y, gather_sum_reference(wide, index[1], wide_weight), dtype, "combine")
        grad = torch.randn_like(y)
        y.backward(grad)
        want_rows, want_weight = combine_backward_reference(grad.double(), wide, wide_weight, *index, plan.padded, True)
        close(weight.grad, want_weight, torch.float32, "gradient of weights")
        filled = torch.ones_like(used_R) if plan.padded else used_R
        close(free.grad[filled], want_rows[filled], dtype, "gradient of rows")
        y = combine(free.detach().requires_grad_(), weight.detach(), plan)
        y.backward(grad)


def test_rows_without_a_copy_are_not_written():
    """Buffers of freed memory that held a mark keep it behind the last row."""
    slot_TK = slots(64, 2, 8, 5)
    kept = int((slot_TK >= 0).sum())
    plan = make_plan(slot_TK, 8, kept + 40)
    grad, rows = torch.randn(64, 256, device="cuda"), torch.randn(kept + 40, 256, device="cuda")
    weight, index = torch.rand(64, 2, device="cuda"), (plan.copy_of_row_R, plan.row_of_copy_TK)
    for run in (
        lambda: permute(grad, plan),
        lambda: torch.ops.smartmoe.combine_backward(grad, rows, weight, *index, False, True)[0],
    ):
        mark = torch.full((kept + 40, 256), 77.0, device="cuda")
        address = mark.data_ptr()
        del mark
        out = run()
        assert out.data_ptr() == address and (out[kept:] == 77).all() and not (out[:kept] == 77).all(1).any()


def ffn_float64(rows, counts, w1, b1, w2, b2, activation):
    parts = []
    for slot, part in enumerate(rows.split(counts)):
        hidden = part @ w1[slot] + (0 if b1 is None else b1[slot])
        if activation == "gelu":
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        else:
            hidden = activate(hidden, activation)
        parts.append(hidden @ w2[slot] + (0 if b2 is None else b2[slot]))
    return torch.cat(parts)


# rows of each slot, width, ffn
FFN_CASES = [
    ([3, 0, 5], 16, 24), ([0, 0, 0], 16, 24), ([0, 9, 0], 16, 24), ([300, 0, 77, 64, 1], 256, 384),
    ([32, 33, 31], 64, 768), ([130, 0, 257], 136, 520),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_ffn_and_its_gradients_against_float64(bias, activation, dtype):
    """The rows behind the last counted one hold NaN in the input and in the gradient."""
    torch.manual_seed(1)
    for counts, width, ffn in FFN_CASES:
        num_rows, slots_, wide = sum(counts), len(counts), ffn * (2 if activation == "swiglu" else 1)
        shapes = [(slots_, width, wide), (slots_, wide), (slots_, ffn, width), (slots_, width)]
        weights = [torch.randn(s, device="cuda").div(s[-2] ** 0.5 if len(s) == 3 else 1).to(dtype) for s in shapes]
        weights = [w if bias or w.dim() == 3 else None for w in weights]
        x, grad = (torch.randn(num_rows, width, device="cuda").to(dtype) for _ in range(2))
        mine = [None if w is None else w.clone().requires_grad_() for w in (x, *weights)]
        wide_ = [None if w is None else w.double().requires_grad_() for w in (x, *weights)]
        want = ffn_float64(wide_[0], counts, *wide_[1:], activation)
        want.backward(grad.double())
        for tail in (0, 45):
            padding = torch.full((tail, width), float("nan"), device="cuda", dtype=dtype)
            rows = torch.cat([x, padding]).requires_grad_()
            y = expert_ffn(rows, torch.tensor(counts, device="cuda"), *mine[1:], activation=activation, impl="grouped")
            y.backward(torch.cat([grad, padding]))
            pairs = [(y[:num_rows].detach(), want.detach()), (rows.grad[:num_rows], wide_[0].grad)]
            pairs += [(m.grad, w.grad) for m, w in zip(mine[1:], wide_[1:], strict=True) if m is not None]
            for idx, (got, wanted) in enumerate(pairs):
                close_in_norm(got, wanted, dtype, (counts, tail, idx))
            for m in mine[1:]:
                if m is not None:
                    m.grad = None


# slots, mean rows, width, ffn: many tiles a block; sizes that no tile divides, rows left over for one warpgroup or the other;
# few tiles, which all come in halves; slots of several bands of tiles
PRODUCT_SIZES = [(16, 1024, 1536, 3072), (5, 700, 328, 1032), (64, 130, 256, 768), (130, 20, 72, 40), (3, 5000, 328, 1032)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("sizes", PRODUCT_SIZES, ids=str)
def test_products_end_and_are_right(sizes, activation, bias):
    """Counts of all remainders, so that warpgroups without rows stand beside busy ones; rows behind the last hold NaN."""
    num_slots, mean, width, ffn = sizes
    torch.manual_seed(2)
    wide = ffn * (2 if activation == "swiglu" else 1)
    count = (torch.rand(num_slots) * 2 * mean).long()
    count[1] = 0
    num_rows, end = int(count.sum()), count.cumsum(0).int().cuda()
    rows, hidden = (torch.randn(num_rows + 77, size, device="cuda").bfloat16() for size in (width, wide))
    rows[num_rows:], hidden[num_rows:] = float("nan"), float("nan")
    first = (torch.randn(num_slots, width, wide, device="cuda") / width**0.5).bfloat16()
    second = (torch.randn(num_slots, ffn, width, device="cuda") / width**0.5).bfloat16()
    b1 = torch.randn(num_slots, wide, device="cuda").bfloat16() if bias else None
    if extension.products_for(rows, first, b1) is None:
        pytest.skip("the extension was not built for 9.0a, or this is another GPU")
    kernels, zero, slot_R = extension._C, torch.zeros(num_slots, wide, device="cuda"), torch.arange(num_slots).cuda()
    slot_R = slot_R.repeat_interleave(count.cuda())
    bias_RW = (zero if b1 is None else b1.float())[slot_R]
    want, want_act, parts = torch.empty(num_rows, wide, device="cuda"), torch.empty(num_rows, ffn, device="cuda"), []
    for slot, (start, stop) in enumerate(zip([0, *end.tolist()], end.tolist(), strict=False)):
        want[start:stop] = rows[start:stop].float() @ first[slot].float()
        want_act[start:stop] = rows[start:stop].float() @ second[slot].float().T
        parts.append(rows[start:stop].float().T @ hidden[start:stop].float())
    weights = kernels.multiply_slots(rows, hidden, end, None, False, None)
    close_in_norm(weights, torch.stack(parts).double(), torch.bfloat16, "weights")
    turned = first.transpose(1, 2).contiguous()
    for _ in range(10):
        plain = kernels.multiply_rows(rows, first, None, end, False)
        product, act = kernels.multiply_activate(rows, first, b1, end, activation)
        assert torch.equal(product[:num_rows], plain[:num_rows])
        halves = torch.full_like(product, torch.nan), torch.full_like(act, torch.nan)
        for slots in ((2, num_slots), (0, 2)):
            kernels.multiply_activate_into(rows, first, b1, end, activation, *slots, *halves)
            known = slice(int(end[1]) if slots[0] else 0, num_rows)
            assert torch.equal(halves[0][known], product[known]) and torch.equal(halves[1][known], act[known])
            assert halves[0][: known.start].isnan().all() and halves[0][num_rows:].isnan().all()
        assert torch.equal(kernels.multiply_rows(rows, turned, None, end, True)[:num_rows], plain[:num_rows])
        place = hidden.clone()
        grad, again, grad_b1 = kernels.multiply_slope(rows, second, b1, end, place, activation, True, None, False)
        assert grad.data_ptr() == place.data_ptr() and grad[num_rows:].isnan().all()
    close_in_norm(plain[:num_rows], want.double(), torch.bfloat16, "rows")
    biased = kernels.multiply_rows(rows, first, b1, end, False)[:num_rows]
    assert torch.equal(biased, (plain[:num_rows].float() + bias_RW).bfloat16() if bias else plain[:num_rows])
    activated = activate(plain[:num_rows].double() + bias_RW, activation)
    close_in_norm(act[:num_rows], activated, torch.bfloat16, "activation")
    argument = (hidden[:num_rows].double() + bias_RW).requires_grad_()
    value = activate(argument, activation)
    value.backward(want_act.double())
    close_in_norm(grad[:num_rows], argument.grad, torch.bfloat16, "gradient of hidden")
    close_in_norm(again[:num_rows], value.detach(), torch.bfloat16, "activation of hidden")
    if bias:
        sums = torch.zeros(num_slots, wide, device="cuda", dtype=torch.double).index_add_(0, slot_R, argument.grad)
        close_in_norm(grad_b1, sums, torch.bfloat16, "gradient of the bias")
        for _ in range(3):
            *_, again_b1 = kernels.multiply_slope(rows, second, b1, end, hidden, activation, False, None, False)
            assert torch.equal(again_b1, grad_b1)


# slots, mean rows, rows and columns of a slot's result: all of a tile's edges; the trainer's, many tiles a block; two bands;
# many tiles that take no time
TOTAL_SIZES = [(5, 700, 328, 1032), (64, 130, 256, 768), (130, 20, 72, 40), (16, 1024, 1536, 3072), (3, 100, 128, 136),
               (3, 300, 3400, 264), (40, 20, 328, 1544)]  # fmt: skip


@pytest.mark.parametrize("sizes", TOTAL_SIZES, ids=str)
def test_products_of_slots_are_written_or_added_in_float32(sizes):
    """Of all slots, of some, of none; the first time over NaN; empty slots; the same bits again."""
    num_slots, mean, height, width = sizes
    torch.manual_seed(3)
    count = (torch.rand(num_slots) * 2 * mean).long()
    count[1] = 0
    end = count.cumsum(0).int().cuda()
    if extension.products_for(torch.empty(1, 8, device="cuda", dtype=torch.bfloat16)) is None:
        pytest.skip("the extension was not built for 9.0a, or this is another GPU")
    parts, inputs = [], []
    for _ in range(3):
        inputs.append([torch.randn(int(count.sum()) + 77, size, device="cuda").bfloat16() for size in (height, width)])
        rows, grad = inputs[-1]
        bounds = zip([0, *end.tolist()], end.tolist(), strict=False)
        parts.append(torch.stack([rows[a:b].float().T @ grad[a:b].float() for a, b in bounds]))
        for tensor in inputs[-1]:
            tensor[int(count.sum()) :] = float("nan")
    for num_totals in {num_slots, num_slots - 2, 1}:
        seen = []
        for _ in range(2):
            total = torch.full((num_totals, height, width), float("nan"), device="cuda")
            for turn, (rows, grad) in enumerate(inputs):
                rest = extension._C.multiply_slots(rows, grad, end, total, turn == 0, None)
                assert rest.shape == (num_slots - num_totals, height, width)
                close_in_norm(rest, parts[turn][num_totals:].double(), torch.bfloat16, "rest")
            seen.append(total)
        assert torch.equal(*seen)
        want = sum(part[:num_totals].double() for part in parts)
        assert (total.double() - want).norm() <= 1e-4 * want.norm() and not total[1:2].any()
    count[-2] = 0
    args = *inputs[0], count.cumsum(0).int().cuda(), None, False
    held = torch.tensor([-1, 3], device="cuda", dtype=torch.int32)  # of the last two slots the first is not in use
    every, some = extension._C.multiply_slots(*args, None), extension._C.multiply_slots(*args, held)
    assert torch.equal(every[:-2], some[:-2]) and torch.equal(every[-1], some[-1])


def test_products_are_a_threads_first_use_of_cuda():
    """As of autograd's, where a backward pass begins with one and its memory was used before."""
    if extension.products_for(torch.empty(1, 8, device="cuda", dtype=torch.bfloat16)) is None:
        pytest.skip("the extension was not built for 9.0a, or this is another GPU")
    rows, weight = torch.randn(300, 64, device="cuda").bfloat16(), torch.randn(2, 64, 64, device="cuda").bfloat16()
    end = torch.tensor([100, 300], device="cuda", dtype=torch.int32)
    for product in (
        lambda: extension._C.multiply_rows(rows, weight, None, end, False),
        lambda: extension._C.multiply_slots(rows, rows, end, None, False, None),
    ):
        want = product().clone()
        with ThreadPoolExecutor(1) as thread:
            assert torch.equal(thread.submit(product).result(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_slots", [1, 31, 33, 300])
def test_sums_of_rows_are_written_or_added_in_float32(num_slots, dtype):
    count = torch.randint(200, (num_slots,), generator=torch.Generator().manual_seed(num_slots))
    count[num_slots // 2 :: 3] = 0
    num_rows, end = int(count.sum()), count.cumsum(0).int().cuda()
    rows = torch.randn(num_rows + 77, 1540, device="cuda").to(dtype)
    rows[num_rows:] = float("nan")
    slot_R = torch.repeat_interleave(count.cuda())
    want = torch.zeros(num_slots, 1540, device="cuda", dtype=torch.double).index_add_(0, slot_R, rows[:num_rows].double())
    alone = extension._C.sum_slots(rows, end, None, False)
    assert alone.dtype == dtype
    close(alone, want, dtype, "sums")
    for num_totals in {0, 1, num_slots - 1, num_slots}:
        total = torch.full((num_totals, 1540), torch.nan, device="cuda")
        for times in (1, 2):
            rest = extension._C.sum_slots(rows, end, total, times == 1)
            assert torch.equal(rest, alone[num_totals:])
            close(total, times * want[:num_totals], torch.float32, "added sums")


def test_tiles_in_halves_have_the_same_bits():
    """Where one slot has most rows, its last tiles come in halves; alone it has other ones, or none."""
    if extension.products_for(torch.empty(1, 8, device="cuda", dtype=torch.bfloat16)) is None:
        pytest.skip("the extension was not built for 9.0a, or this is another GPU")
    torch.manual_seed(4)
    num_rows, height, width = 6550, 1536, 3072
    rows, grad = (torch.randn(num_rows + 1575, size, device="cuda").bfloat16() for size in (height, width))
    want = rows[:num_rows].float().T @ grad[:num_rows].float()
    seen = []
    for others in ([105] * 15, [], [1575], [7] * 100):
        end = torch.tensor([num_rows, *others], device="cuda").cumsum(0).int()
        seen.append(extension._C.multiply_slots(rows, grad, end, None, False, None)[0])
        total = torch.ones(1, height, width, device="cuda")
        extension._C.multiply_slots(rows, grad, end, total, False, None)
        close_in_norm(total[0] - 1, want.double(), torch.bfloat16, f"sums beside {others}")
    assert all(torch.equal(other, seen[0]) for other in seen)
    close_in_norm(seen[0], want.double(), torch.bfloat16, "weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_pass_is_refused_where_the_first_used_the_memory_again(dtype):
    weights = [torch.randn(2, 16, 16, device="cuda", dtype=dtype).requires_grad_() for _ in range(2)]
    rows, count = torch.randn(8, 16, device="cuda", dtype=dtype, requires_grad=True), torch.tensor([5, 3], device="cuda")
    y = expert_ffn(rows, count, weights[0], None, weights[1], None, activation="gelu", impl="grouped").sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_plain_form_works_on_a_gpu_too(monkeypatch):
    """The layer without the extension, rows to spare, against the layer with it."""
    torch.manual_seed(0)
    slot_TK, seen = slots(300, 3, 5, 11), []
    inputs = [torch.randn(300, 64, device="cuda"), torch.rand(300, 3, device="cuda")]
    shapes = [(5, 64, 128), (5, 128), (5, 128, 64), (5, 64)]
    inputs += [torch.randn(s, device="cuda") / 8 for s in shapes]
    for module in (extension._C, None):
        monkeypatch.setattr(extension, "_C", module)
        leaves = [t.clone().requires_grad_() for t in inputs]
        plan = make_plan(slot_TK, 5, 900)
        rows = expert_ffn(permute(leaves[0], plan), plan.count_S, *leaves[2:], activation="gelu", impl="grouped")
        y = combine(rows, leaves[1], plan)
        y.square().sum().backward()
        seen.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for idx, (first, second) in enumerate(zip(*seen, strict=True)):
        close_in_norm(first, second.double(), torch.float32, idx)


def test_two_runs_give_the_same_bits():
    slot_TK, torch_dtype = slots(4096, 4, 16, 7), torch.bfloat16
    plan = make_plan(slot_TK, 16, int((slot_TK >= 0).sum()))
    torch.manual_seed(0)
    x = torch.randn(4096, 512, device="cuda", dtype=torch_dtype)
    shapes = [(16, 512, 1024), (16, 1024), (16, 1024, 512), (16, 512)]
    weights = [torch.randn(s, device="cuda", dtype=torch_dtype) / 16 for s in shapes]
    weight_TK, grad = torch.rand(4096, 4, device="cuda"), torch.randn_like(x)
    seen = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight_TK, *weights)]
        rows = expert_ffn(permute(leaves[0], plan), plan.count_S, *leaves[2:], activation="gelu", impl="grouped")
        y = combine(rows, leaves[1], plan)
        y.backward(grad)
        seen.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first, second)


def test_no_host_synchronisation_and_a_graph_replays_new_routing():
    torch.manual_seed(0)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    shapes = [(8, 256, 512), (8, 512), (8, 512, 256), (8, 256)]
    weights = [(torch.randn(s, device="cuda") / 16).to(torch.bfloat16).requires_grad_() for s in shapes]
    weight_TK, slot_TK = torch.rand(512, 2, device="cuda", requires_grad=True), slots(512, 2, 8, 0)

    def step():
        plan = make_plan(slot_TK, 8, 1024)
        rows = expert_ffn(permute(x, plan), plan.count_S, *weights, activation="gelu", impl="grouped")
        y = combine(rows, weight_TK, plan)
        return (y, *torch.autograd.grad(y.float().square().sum(), (x, weight_TK, *weights)))

    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("grouped products stay on the device on compute capability 9 and 10")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    slot_TK.copy_(slots(512, 2, 8, 1, hot=3))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
