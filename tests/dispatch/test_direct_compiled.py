"""The direct dispatcher inside torch.compile: one graph, the same results, room that grows between steps."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from smartmoe.dispatch import direct_ops
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.dispatch.transport import CollectiveTransport
from smartmoe.ops.plan import slots_of
from tests import oracle
from tests.dispatch import cases
from tests.dispatch.test_direct import SLOTS, TOP_K, WIDTH
from tests.dist import gpu_backend, gpu_of, spawn

TOKENS = 24


def _inputs(num_ranks, seed, device, kind="even"):
    generator = torch.Generator().manual_seed(seed)
    slot = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % (num_ranks * SLOTS)
    if kind == "one rank":
        slot = slot % SLOTS
    slot[seed % TOKENS] = -1
    x, grad = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    weight = torch.rand(slot.shape, generator=generator)
    return [tensor.to(device) for tensor in (x, slot, weight, grad)]


def _step(dispatcher, forward, x, slot, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = forward(x, slot, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


def _compiled(world_rank, num_ranks, device_type, backend):
    """Steps of a compiled layer and of a plain one, with a routing that does not fit in between."""
    device = gpu_of(world_rank) if device_type == "cuda" else torch.device("cpu")
    dispatcher = DirectDispatcher(dist.group.WORLD if num_ranks > 1 else None, SLOTS, row_factor=1.0)
    dispatcher.num_careful = 1

    def forward(x, slot, weight):
        rows, handle = dispatcher.dispatch(x * 2, slot, weight)
        scale = 1 + torch.arange(rows.shape[0], device=rows.device) % 3
        return dispatcher.combine(rows.sin() * scale[:, None] + rows, handle).cos()

    torch._dynamo.reset()
    compiled, seen = torch.compile(forward, fullgraph=True, backend=backend), []
    for seed, kind in enumerate(["even", "one rank", "one rank"]):
        inputs = _inputs(num_ranks, 10 * seed + world_rank, device, kind)
        if seed == 0:
            _step(dispatcher, forward, *inputs)
        got = _step(dispatcher, compiled, *inputs)
        needed = dispatcher.overflow()
        seen.append(needed)
        if needed:
            assert got[0].isnan().all()
            continue
        want = _step(dispatcher, forward, *inputs)
        for mine, wanted, name in zip(got, want, ("y", "x", "weight"), strict=True):
            oracle.assert_close(mine.cpu(), wanted.cpu(), torch.float32, f"seed {seed}, {name}")
    return seen


def _check_overflows(seen_W, num_ranks):
    for seen in seen_W:
        assert [needed > 0 for needed in seen] == [False, num_ranks > 1, False]


def test_one_process_keeps_one_graph():
    _check_overflows([_compiled(0, 1, "cpu", "aot_eager")], 1)


def test_gloo_keeps_one_graph_whose_room_grows():
    _check_overflows(spawn(_compiled, 2, 2, "cpu", "aot_eager"), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gpus_keep_one_graph_whose_room_grows(num_ranks):
    backend = gpu_backend(num_ranks, may_share=True)
    _check_overflows(
        spawn(_compiled, num_ranks, num_ranks, "cuda", "inductor", backend=backend, timeout_s=200), num_ranks
    )


def test_what_a_compiled_call_has_no_buffers_for_is_said():
    dispatcher = DirectDispatcher(None, SLOTS)
    x, slot, weight, _ = _inputs(1, 0, "cpu")

    def forward(x, slot, weight):
        return dispatcher.combine(*dispatcher.dispatch(x, slot, weight))

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="first call.* is inside torch.compile: call it once without"):
        compiled(x, slot, weight)
    forward(x[:5], slot[:5], weight[:5])
    compiled(x[:5], slot[:5], weight[:5])
    with pytest.raises(Exception, match="6 tokens, but its buffers were made for 5"):
        compiled(x[:6], slot[:6], weight[:6])


def test_operations_are_what_they_say():
    dispatcher = DirectDispatcher(None, SLOTS)
    x, slot, weight, grad = _inputs(1, 0, "cpu")
    slot[slot < 0] = 0  # a row that nothing stands in is NaN, which no comparison likes
    # a whole step before: what one operation returns of the weights' gradients another has sent
    _step(dispatcher, lambda *args: dispatcher.combine(*dispatcher.dispatch(*args)), x, slot, weight, grad)
    number, sizes = dispatcher._number, (dispatcher._num_rows, TOKENS, SLOTS)
    x.requires_grad_(), weight.requires_grad_()
    operations = torch.ops.smartmoe
    opcheck(operations.direct_dispatch.default, (x, slot, weight, number, *sizes))
    rows, *plan = (tensor.detach() for tensor in direct_ops.dispatch(x, slot, weight, number, *sizes))
    opcheck(operations.direct_combine.default, (rows.clone().requires_grad_(), slot, *plan, number))
    opcheck(operations.direct_weigh.default, (grad, rows, slot, *plan, number))
    opcheck(operations.direct_return.default, (rows, slot, *plan, number))


def test_sizes_in_a_graph_are_those_of_its_arguments():
    """A graph that one program has left on disk is taken by the next whose operations and arguments are the same."""
    dispatcher = DirectDispatcher(None, SLOTS)
    x, slot, weight, _ = _inputs(1, 0, "cpu")
    dispatcher.dispatch(x, slot, weight)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, slot, weight)]
        found = direct_ops.dispatch(*fakes, dispatcher._number, 50, 4 * TOKENS, 3)
    copies = (4 * TOKENS, TOP_K)
    assert [tuple(tensor.shape) for tensor in found] == [(50, WIDTH), copies, (50,), copies, (3,), (2,)]


class _Late(CollectiveTransport):
    """Has the numbers of a plan when `bring` has run, as the kernels have."""

    def bound(self, *args):
        self._numbers = [(torch.full_like(number, -7), number) for number in super().bound(*args)]
        return [empty for empty, _ in self._numbers]

    def bring(self, *args):
        for empty, number in self._numbers:
            empty.copy_(number)
        return super().bring(*args)


def test_the_numbers_of_a_plan_are_read_behind_the_rows():
    dispatcher = DirectDispatcher(None, SLOTS)
    x, slot, weight, _ = _inputs(1, 0, "cpu")
    dispatcher.dispatch(x, slot, weight)
    dispatcher.transport = _Late(None, SLOTS, TOKENS)
    room = dispatcher._num_rows, TOKENS, SLOTS
    *_, count, sizes = direct_ops.dispatch(x, slot, weight, dispatcher._number, *room)
    num_copies = int((slot >= 0).sum())
    assert count.sum() == num_copies and sizes.tolist() == [num_copies, num_copies]


def _layer(world_rank, num_ranks):
    """Experts in between, in bfloat16, against the same without compiling."""
    device = gpu_of(world_rank)
    case = cases.Case("compiled", (32,) * num_ranks, 4 * num_ranks, 2)
    x, expert_idx, weight, grad = (tensor.to(device) for tensor in case.inputs(world_rank))
    weights = oracle.slots_of_rank(case.weights(), case.placement(), world_rank, torch.bfloat16, device)
    experts = cases.StackedExperts(weights, case.activation, "grouped")
    slot_of_expert = torch.from_numpy(case.placement().primary_slot_E).to(device)
    dispatcher = DirectDispatcher(dist.group.WORLD if num_ranks > 1 else None, case.placement().slots_per_rank)

    def forward(x, weight):
        slot_TK = slots_of(expert_idx, slot_of_expert[:, None])
        return dispatcher(x, oracle.make_routing(expert_idx, weight), slot_TK, experts)

    results = []
    for call in (forward, torch.compile(forward, fullgraph=True)):
        inputs = x.bfloat16().requires_grad_(), weight.float().requires_grad_()
        y = call(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, (*inputs, *weights), grad.bfloat16())])
    dispatcher.check()
    for got, want in zip(results[1], results[0], strict=True):
        oracle.assert_close(got.float().cpu(), want.float().cpu(), torch.bfloat16, "compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_layer_with_experts_keeps_one_graph(num_ranks):
    backend = gpu_backend(num_ranks, may_share=True)
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped GEMM keeps counts on the device from compute capability 9.0")
    spawn(_layer, num_ranks, num_ranks, backend=backend, timeout_s=200)
