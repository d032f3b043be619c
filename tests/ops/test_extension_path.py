"""Which path a GPU takes, chosen from its capability alone; and that operations are one node of a compiled graph."""

import pytest
import torch

from smartmoe.ops import expert_ffn as ffn
from smartmoe.ops import extension
from smartmoe.ops.extension import choose_path
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import make_padded_plan, make_plan
from tests import oracle

CASES = [
    # capability, dtype, extension -> products, kernels
    ((7, 0), torch.float16, True, "loop", "extension"),
    ((7, 0), torch.float16, False, "loop", "torch"),
    ((7, 5), torch.float32, True, "loop", "extension"),
    ((8, 0), torch.bfloat16, True, "loop", "extension"),
    ((9, 0), torch.bfloat16, True, "grouped", "extension"),
    ((9, 0), torch.bfloat16, False, "grouped", "torch"),
    ((9, 0), torch.float16, True, "loop", "extension"),
    ((9, 0), torch.float64, True, "loop", "torch"),
    ((10, 0), torch.bfloat16, True, "grouped", "extension"),
    ((12, 0), torch.bfloat16, True, "loop", "extension"),
    ((6, 1), torch.float16, True, "loop", "torch"),
    (None, torch.float32, False, "grouped", "torch"),
]


@pytest.mark.parametrize("capability, dtype, extension, gemm, kernels", CASES)
def test_path_by_capability(capability, dtype, extension, gemm, kernels):
    path = choose_path(capability, dtype, extension)
    assert (path.gemm, path.kernels) == (gemm, kernels)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_bfloat16_is_refused_where_there_is_none(capability):
    with pytest.raises(ValueError, match="float16"):
        choose_path(capability, torch.bfloat16, True)


class BuiltForOthers:
    """An extension without code for this device, as torch reports it."""

    @staticmethod
    def count_slots(slot_TK, num_slots):
        raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("module, kernels, said", [
    (None, "torch", "twice as long"),
    (BuiltForOthers, "torch", "TORCH_CUDA_ARCH_LIST=7.0"),
])  # fmt: skip
def test_the_choice_is_said_once(module, kernels, said, monkeypatch, caplog):
    """A V100 that is not there."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(extension, "_C", module)
    v100 = torch.device("cuda", 7)
    with caplog.at_level("INFO", logger=extension.__name__):
        for _ in range(2):
            path = extension._path_of(v100, torch.float16)
    extension._path_of.cache_clear()
    extension._runs_on.cache_clear()
    assert (path.gemm, path.kernels) == ("loop", kernels)
    assert len(caplog.records) == 2 and said in caplog.text and "compute capability 7.0, float16: loop" in caplog.text


def _leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("gemm", ["grouped", "loop"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_the_operation_of_a_gpu_equals_the_composition_and_leaves_the_tail_alone(activation, bias, gemm, monkeypatch):
    """Its formulas, on a CPU: rows behind the last counted one hold NaN, in the rows and in the gradient."""
    path = choose_path((9, 0), torch.bfloat16 if gemm == "grouped" else torch.float32, False)
    monkeypatch.setattr(ffn, "path_for", lambda tensor: path)
    for counts in ([3, 0, 5], [0, 0, 0], [0, 9, 0], [1, 1, 1]):
        num_rows = sum(counts)
        weights = [w if w is None else w.float() for w in oracle.make_weights(3, 16, 24, activation, bias)]
        x, grad, tail = torch.randn(num_rows, 16), torch.randn(num_rows, 16), torch.full((4, 16), float("nan"))
        (want_x, *want_w), (got_x, *got_w) = _leaves([x, *weights]), _leaves([torch.cat([x, tail]), *weights])
        count_L = torch.tensor(counts)
        want = ffn.expert_ffn(want_x, count_L, *want_w, activation=activation, impl="grouped")
        got = ffn.fused_ffn(got_x, count_L, *got_w, activation)
        want.backward(grad)
        got.backward(torch.cat([grad, tail]))
        oracle.assert_close(got[:num_rows].detach(), want.detach(), torch.float32, "rows")
        oracle.assert_close(got_x.grad[:num_rows], want_x.grad, torch.float32, "gradient of rows")
        for mine, theirs in zip(got_w, want_w, strict=True):
            if mine is not None:
                oracle.assert_close(mine.grad, theirs.grad, torch.float32, "gradient of weights")


def test_a_plan_with_too_many_or_too_few_rows():
    slot_TK = torch.tensor([[2, -1], [0, 2], [-1, 0]])
    plan = make_plan(slot_TK, 3, 8)
    assert plan.copy_of_row_R.tolist() == [2, 5, 0, 3, -1, -1, -1, -1]
    assert plan.row_of_copy_TK.tolist() == [[2, 8], [0, 3], [8, 1]]
    assert plan.count_S.tolist() == [2, 0, 2]
    plan = make_plan(slot_TK, 3, 3)
    assert plan.copy_of_row_R.tolist() == [2, 5, 0]
    assert [row if row < 3 else 3 for row in plan.row_of_copy_TK.flatten().tolist()] == [2, 3, 0, 3, 3, 1]


def test_rows_behind_the_last_copy_are_used_by_nobody():
    slot_TK = torch.tensor([[2, -1], [0, 2], [-1, 0]])
    plan, weight = make_plan(slot_TK, 3, 8), torch.rand(3, 2)
    x, weight = _leaves([torch.randn(3, 4), weight])
    rows = permute(x, plan).clone()
    rows[4:] = float("nan")
    combine(rows, weight, plan).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()
    assert torch.allclose(x.grad, (weight * (slot_TK >= 0)).sum(1, keepdim=True).expand(3, 4))


def test_registered_operations_pass_torchs_own_checks():
    slot_TK = torch.tensor([[2, 0], [1, 2], [0, -1]])
    for plan in (make_plan(slot_TK, 3, 5), make_padded_plan(slot_TK, 3, 2)):
        index = (plan.copy_of_row_R, plan.row_of_copy_TK)
        x, rows, weight = torch.randn(3, 4), torch.randn(plan.num_rows, 4), torch.rand(3, 2)
        cases = [
            (torch.ops.smartmoe.permute, (x.requires_grad_(), *index, plan.padded)),
            (torch.ops.smartmoe.combine, (rows.requires_grad_(), weight.requires_grad_(), *index, plan.padded)),
            (torch.ops.smartmoe.combine_backward, (x.detach(), rows.detach(), weight.detach(), *index, plan.padded, True)),
            (torch.ops.smartmoe.gather_sum, (rows.detach(), index[1], None)),
        ]
        for op, args in cases:
            torch.library.opcheck(op.default, args)
    torch.library.opcheck(torch.ops.smartmoe.count_slots.default, (slot_TK, 3))
    torch.library.opcheck(torch.ops.smartmoe.ends_of.default, (torch.tensor([2, 0, 3]),))
    torch.library.opcheck(torch.ops.smartmoe.routing_plan.default, (slot_TK, 3, 0, 5, False))
    w1, b1, w2, b2 = _leaves([w.float() for w in oracle.make_weights(3, 16, 24)])
    rows, hidden, end_L = torch.randn(8, 16), torch.randn(8, 24), torch.tensor([3, 3, 8], dtype=torch.int32)
    act = torch.randn(8, 24)
    for biases in ((b1, b2), (None, None)):
        args = (hidden.requires_grad_(), act, end_L, biases[0], w2, biases[1], "gelu")
        torch.library.opcheck(torch.ops.smartmoe.activated_matmul.default, args)
    # of the two results only the first is differentiated, so that torch's check of all gradients has nothing to compare
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (rows.requires_grad_(), end_L, w1, None, "gelu")
    torch.library.opcheck(torch.ops.smartmoe.matmul_activate.default, args, test_utils=checks)


def test_a_compiled_graph_goes_through_in_one_piece():
    slot_TK, weight = torch.tensor([[2, 0], [1, 2], [0, 1]]), torch.rand(3, 2)
    count_L = torch.tensor([2, 2, 2])
    weights = [w.float() for w in oracle.make_weights(3, 16, 24)]

    def layer(x, weight, *weights):
        plan = make_plan(slot_TK, 3, 6)
        out = ffn.fused_ffn(permute(x, plan), count_L, *weights, "gelu")
        return combine(out, weight, plan)

    x, grad = torch.randn(3, 16), torch.randn(3, 16)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = _leaves([x, weight, *weights])
        y = function(*leaves)
        y.backward(grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)
