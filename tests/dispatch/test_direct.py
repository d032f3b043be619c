"""The direct dispatcher: its arithmetic on gloo worlds through the plain transport, its kernels on GPUs."""

import logging
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from smartmoe import dispatch
from smartmoe.bench import routing
from smartmoe.bench.layer import Bench
from smartmoe.bench.measure import World
from smartmoe.bench.shapes import parse_shape
from smartmoe.config import LayerConfig, ModelConfig, RunConfig, check
from smartmoe.dispatch import symmetric
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher, same_room
from smartmoe.dispatch.transport import CollectiveTransport, make_local_plan
from smartmoe.gpt import GPT
from smartmoe.layer import MoELayer
from smartmoe.ops.plan import slots_of
from tests import oracle
from tests.dispatch import cases
from tests.dist import gpu_backend, gpu_of, spawn

WIDTH, TOKENS, TOP_K, SLOTS = 64, 48, 3, 4
# tokens leave when their plan is there, or before; one rank sends none
BOTH_WAYS = pytest.mark.parametrize("num_ranks,early", [(1, False), (2, False), (4, False), (2, True), (4, True)])


def _group(num_ranks):
    return dist.group.WORLD if num_ranks > 1 else None


def _device(device_type, rank):
    return gpu_of(rank) if device_type == "cuda" else torch.device("cpu")


class _Scaled:
    """Experts that multiply by 1 + their rank, and spoil every row that they must leave alone."""

    def __init__(self, ep_rank):
        self.ep_rank = ep_rank

    def __call__(self, rows_RD, count_L):
        tail_R = torch.arange(rows_RD.shape[0], device=rows_RD.device) >= count_L.sum()
        return (rows_RD * (1 + self.ep_rank)).masked_fill(tail_R.unsqueeze(1), torch.nan)


def _routed(num_ranks, seed, device, kind="random", num_tokens=TOKENS):
    """x, slots, weights and the gradient of y of one rank, and what the output and the gradients must be."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, TOP_K)
    slot = torch.randint(0, num_ranks * SLOTS, shape, generator=generator)
    if kind == "skewed":
        slot = (slot * torch.rand(shape, generator=generator) ** 4).long()
    elif kind == "hot":
        slot[:] = int(slot.reshape(-1)[0]) if num_tokens else 0
    elif kind == "one rank":
        slot = slot % SLOTS + SLOTS * (num_ranks - 1)
    elif kind == "drops":
        slot[torch.rand(shape, generator=generator) < 0.5] = -1
    elif kind == "nothing":
        slot[:] = -1
    x, grad = (torch.randn(num_tokens, WIDTH, generator=generator) for _ in range(2))
    weight = torch.rand(shape, generator=generator)
    return [tensor.to(device) for tensor in (x, slot, weight, grad)]


def _wanted(x, slot, weight, grad):
    scale = torch.where(slot >= 0, 1 + slot // SLOTS, 0).double()
    total = (weight.double() * scale).sum(1, keepdim=True)
    return x.double() * total, grad.double() * total, scale * (x.double() * grad.double()).sum(1, keepdim=True)


def _exchange(dispatcher, x, slot, weight, grad, ep_rank):
    """(y, gradient of x, gradient of the weights)."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    rows, handle = dispatcher.dispatch(x, slot, weight)
    assert handle.count_L.sum() <= rows.shape[0], "experts would read behind the rows"
    y = dispatcher.combine(_Scaled(ep_rank)(rows, handle.count_L), handle)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


def _check_exchange(got, want, what):
    for mine, wanted, name in zip(got, want, ("y", "x", "weight"), strict=True):
        oracle.assert_close(mine, wanted.cpu(), torch.float32, f"{what}, {name}")


# Through the experts, against the oracle.


def _carry_table(world_rank, num_ranks, device_type, dtype, impls):
    group, device = _group(num_ranks), _device(device_type, world_rank)
    answers = {}
    for case in cases.cases(num_ranks):
        for impl in impls:
            dispatcher = DirectDispatcher(group, case.placement().slots_per_rank, row_factor=num_ranks)
            answers[case.name, impl] = cases.carry(case, dispatcher, impl, world_rank, dtype, device)
            dispatcher.check()
    return answers


def _compare_table(answers_W, num_ranks, dtype):
    by_name = {case.name: case for case in cases.cases(num_ranks)}
    for name, impl in answers_W[0]:
        # float16 holds what bfloat16 holds here, and more
        tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16
        cases.compare(by_name[name], [answers[name, impl] for answers in answers_W], f"direct, {impl}", tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_process_gives_the_oracles_answer(dtype):
    _compare_table([_carry_table(0, 1, "cpu", dtype, ("grouped", "loop"))], 1, dtype)


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_gloo_gives_the_oracles_answer(num_ranks):
    answers_W = spawn(_carry_table, num_ranks, num_ranks, "cpu", torch.float32, ("grouped", "loop"))
    _compare_table(answers_W, num_ranks, torch.float32)


def _carry_tables(world_rank, num_ranks, dtypes, early):
    _begin_early(early)
    return [_carry_table(world_rank, num_ranks, "cuda", dtype, ("grouped", "loop")) for dtype in dtypes]


@pytest.mark.gpu
@BOTH_WAYS
def test_gpus_give_the_oracles_answer(num_ranks, early):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tables_W = spawn(_carry_tables, num_ranks, num_ranks, dtypes, early, backend=_gpus(num_ranks), timeout_s=240)
    for dtype, answers_W in zip(dtypes, zip(*tables_W, strict=True), strict=True):
        _compare_table(answers_W, num_ranks, dtype)


# What the dispatcher says of itself.


def _hasty(num_ranks):
    """A dispatcher that asks only in its first call what a routing needs, and makes room for no more."""
    dispatcher = DirectDispatcher(_group(num_ranks), SLOTS, row_factor=1.0)
    dispatcher.num_careful = 1
    return dispatcher


def _overflow(world_rank, num_ranks, device_type):
    """A routing that needs more rows than any before it: what comes of it, with and without someone who asks."""
    device = _device(device_type, world_rank)
    dispatcher = _hasty(num_ranks)
    routed = {kind: _routed(num_ranks, world_rank, device, kind) for kind in ("random", "one rank", "nothing")}

    def call(kind):
        results = _exchange(dispatcher, *routed[kind], world_rank)
        dispatcher.transport.wait()
        return results

    def told(ask):
        try:
            return ask()
        except ValueError as error:
            return str(error)

    call("random")
    roomy = dispatcher._num_rows
    seen = {"y": call("one rank")[0], "check": told(dispatcher.check), "again": told(dispatcher.check)}
    assert roomy < dispatcher._num_rows == num_ranks * TOKENS * TOP_K
    _check_exchange(call("one rank"), _wanted(*routed["one rank"]), "with the room that it needed")
    seen["nothing"] = call("nothing")[0]
    # a call tells the host behind it; the next one hears
    dispatcher = _hasty(num_ranks)
    call("random"), call("one rank")
    seen["next call"] = told(lambda: call("nothing"))
    call("one rank")
    # whoever asks is not interrupted, and the room grows all the same
    dispatcher = _hasty(num_ranks)
    dispatcher.waits_to_be_asked = True
    call("random"), call("one rank"), call("nothing")
    seen["asked"] = dispatcher.overflow(), dispatcher.overflow()
    _check_exchange(call("one rank"), _wanted(*routed["one rank"]), "after the question")
    return seen


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_too_many_rows_poison_the_output_of_every_rank_are_told_and_then_fit(device_type):
    num_ranks = 2 if device_type == "cuda" else 3
    backend = _gpus(num_ranks) if device_type == "cuda" else "gloo"
    for seen in spawn(_overflow, num_ranks, num_ranks, device_type, backend=backend):
        check_overflow(seen, num_ranks)


def check_overflow(seen, num_ranks):
    needed = num_ranks * TOKENS * TOP_K
    assert torch.isnan(seen["y"]).all() and not seen["nothing"].any()
    for words in (seen["check"], seen["next call"]):
        assert f"needed {needed} rows" in words and "layer.row_factor = 1.0" in words and "basic" in words
    assert seen["again"] is None and seen["asked"] == (needed, 0)


def _odd(world_rank, num_ranks, device_type, early=False):
    """A routing with weights that are not numbers, as behind a layer that ran out of room: NaN comes out where it belongs
    and nothing is learnt from it."""
    _begin_early(early)
    device = _device(device_type, world_rank)
    dispatcher = _hasty(num_ranks)
    x, slot, weight, grad = _routed(num_ranks, world_rank, device)
    _exchange(dispatcher, x, slot, weight, grad, world_rank)
    room = dispatcher._num_rows
    results = []
    for kind, row in (("one rank", slice(None)), ("random", slice(0, 1))):
        x, slot, weight, grad = _routed(num_ranks, world_rank, device, kind)
        weight[row] = torch.nan
        results.append([tensor.cpu() for tensor in _exchange(dispatcher, x, slot, weight, grad, world_rank)])
        dispatcher.check()
    assert dispatcher._num_rows == room, "garbage made room"
    full, one = results
    assert full[0].isnan().all() and full[1].isnan().any()
    assert one[0].isnan().all(1).tolist() == [True] + [False] * (TOKENS - 1)
    good = _routed(num_ranks, world_rank, device)
    _check_exchange(_exchange(dispatcher, *good, world_rank), _wanted(*good), "afterwards")


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_routing_without_numbers_asks_for_no_room(device_type):
    num_ranks = 2 if device_type == "cuda" else 3
    backend = _gpus(num_ranks) if device_type == "cuda" else "gloo"
    for early in (False, True) if device_type == "cuda" else (False,):
        spawn(_odd, num_ranks, num_ranks, device_type, early, backend=backend)


def _careful(world_rank, num_ranks):
    dispatcher = DirectDispatcher(_group(num_ranks), SLOTS, row_factor=1.0)
    dispatcher.num_careful = 3
    for kind in ("random", "one rank"):
        routed = _routed(num_ranks, world_rank, "cpu", kind)
        _check_exchange(_exchange(dispatcher, *routed, world_rank), _wanted(*routed), kind)
        assert dispatcher.overflow() == 0
    return [dispatcher._is_careful(routed[0])] + [
        dispatcher._is_careful(routed[0]) for dispatcher._num_calls in (3, 4)
    ]


def test_the_first_calls_ask_before_they_make_room():
    assert spawn(_careful, 2, 2) == [[True, True, False]] * 2


def _repeated(world_rank, num_ranks):
    """Passes that are repeated in their backward passes when the room has grown since."""
    routed = {kind: _routed(num_ranks, world_rank, "cpu", kind) for kind in ("random", "one rank")}

    def forward(dispatcher, kind, **options):
        x, slot, weight, _ = routed[kind]
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()

        def layer(x, weight):
            rows, handle = dispatcher.dispatch(x, slot, weight)
            return dispatcher.combine(_Scaled(world_rank)(rows, handle.count_L), handle)

        return kind, inputs, checkpoint(layer, *inputs, use_reentrant=False, **options)

    def check_backward(kind, inputs, y):
        got = (y.detach(), *torch.autograd.grad(y, inputs, routed[kind][3]))
        _check_exchange(got, _wanted(*routed[kind]), f"repeated, {kind}")

    # the host has heard since that some call needed more
    dispatcher = DirectDispatcher(_group(num_ranks), SLOTS)
    passed = forward(dispatcher, "random")
    dispatcher._most_needed = num_ranks * TOKENS * TOP_K
    check_backward(*passed)
    # another pass asked for more before the first one came back
    dispatcher = DirectDispatcher(_group(num_ranks), SLOTS)
    passed = [forward(dispatcher, kind, context_fn=same_room) for kind in ("random", "one rank")]
    assert dispatcher._num_rows == num_ranks * TOKENS * TOP_K
    for each in passed:
        check_backward(*each)
    # and in a model, as a pipeline does
    config = RunConfig(
        model=ModelConfig(num_layers=2, hidden_size=16, ffn_size=16, num_heads=2, num_experts=4, vocab_size=8, seq_len=8),
        layer=LayerConfig(dispatcher="direct"),
    )
    group = _group(num_ranks)
    model = GPT(config.model, lambda idx: MoELayer(config, layer_idx=idx, ep_group=group), recompute=True)
    ids = torch.arange(16).view(2, 8) + 16 * world_rank
    passed = []
    for _ in range(2):
        passed.append(model(ids % 8, token_id_BT=ids, target_BT=ids % 8)[0].sum())
        for block in model.blocks.values():
            if block.moe is not None:
                block.moe.dispatcher._most_needed = num_ranks * 32
    for loss in passed:
        loss.backward()


def test_a_repeated_pass_has_the_rows_that_it_had():
    spawn(_repeated, 2, 2)


def test_room_follows_the_routing_in_steps_and_never_shrinks(caplog):
    dispatcher = DirectDispatcher(None, SLOTS, row_factor=1.125)
    dispatcher.num_ranks = 4  # of which this one speaks for the fullest
    dispatcher._even_share, dispatcher.told = 160, CollectiveTransport(None, SLOTS, 1).new_told()
    rooms = []
    with caplog.at_level(logging.INFO, logger="smartmoe.dispatch.direct"):
        for needed in (100, 160, 165, 200, 170, 1000):
            dispatcher.told.on_host[1] = needed
            dispatcher._make_room()
            rooms.append(dispatcher._num_rows)
    assert rooms == [180, 180, 186, 225, 225, 640]
    assert caplog.records[0].getMessage().endswith("room for 186 rows from now on, 1.16 of an even share")


def test_a_batch_larger_than_the_first_is_refused():
    dispatcher = DirectDispatcher(None, SLOTS)
    x, slot, weight, _ = _routed(1, 0, "cpu")
    dispatcher.dispatch(x[:5], slot[:5], weight[:5])
    dispatcher.dispatch(x[:3], slot[:3], weight[:3])
    with pytest.raises(ValueError, match="6 tokens, but its buffers were made for 5"):
        dispatcher.dispatch(x[:6], slot[:6], weight[:6])
    roomy = DirectDispatcher(None, SLOTS, max_tokens=9)
    roomy.dispatch(x[:5], slot[:5], weight[:5])
    roomy.dispatch(x[:9], slot[:9], weight[:9])


def test_the_plan_keeps_what_fits_and_counts_what_does_not():
    local = torch.tensor([[1, -1], [0, 1], [1, 0], [-1, -1]])
    weight = torch.rand(4, 2)
    transport = CollectiveTransport(None, slots_per_rank=3, capacity=4)
    plan = make_local_plan(transport, local, weight, row_bound=3)
    assert plan.copy_R.tolist() == [2, 5, 0]
    assert plan.row_NK.clamp(max=3).tolist() == [[2, 3], [0, 3], [3, 1], [3, 3]]
    assert int(plan.row_NK[0, 1]) >= 3
    assert plan.count_L.tolist() == [2, 1, 0] and int(plan.num_rows) == 3 and int(plan.num_needed) == 5
    weight[3, 1] = torch.nan
    odd = make_local_plan(transport, local, weight, row_bound=3)
    assert torch.equal(odd.copy_R, plan.copy_R) and int(odd.num_needed) == -5


def test_auto_is_basic_without_gpus_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("smartmoe.dispatch.symmetric._REASONS", {})
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="smartmoe.dispatch"):
        built = [dispatch.build_dispatcher(LayerConfig(dispatcher="auto"), None, slots_per_rank=2) for _ in range(3)]
    assert all(isinstance(dispatcher, BasicDispatcher) for dispatcher in built)
    assert [record.getMessage() for record in caplog.records] == ["layer.dispatcher = auto: basic: no CUDA device"]


def test_direct_is_built_by_name_with_its_bound():
    dispatcher = dispatch.build_dispatcher(LayerConfig(dispatcher="direct", row_factor=3.0), None, slots_per_rank=2)
    assert isinstance(dispatcher, DirectDispatcher) and dispatcher.row_factor == 3.0
    with pytest.raises(ValueError, match="row_factor"):
        check(RunConfig(model=ModelConfig(), layer=LayerConfig(row_factor=0.5)))


# Repeated calls: order of the exchange, memory that is reused.


def _begin_early(early):
    """Let tokens leave before their plan is there however few they are, where kernels can begin early."""
    symmetric._EARLY_BYTES, symmetric._EARLY_TOP_K = (0, 99) if early else (1 << 40, 1)


def _in_three_turns():
    """Let the kernels divide the few tokens of these tests into three turns, and read one turn behind the pushes; where they
    begin early, two turns behind at first."""
    symmetric._TILE_ELEMENTS = TOKENS // 3 * WIDTH
    symmetric._LAG_BYTES, symmetric._LEAST_LAG_BYTES = 0, 4 * symmetric._TILE_ELEMENTS
    symmetric._AHEAD_BYTES = symmetric._SUMS_AHEAD_BYTES = 8 * symmetric._TILE_ELEMENTS
    symmetric._BEHIND_BYTES = 4 * symmetric._TILE_ELEMENTS


def _steady(world_rank, num_ranks, device_type, turns, early=False):
    """Random routings of every kind twice over, with calls left half done between them."""
    _in_three_turns(), _begin_early(early)
    device = _device(device_type, world_rank)
    dispatcher = DirectDispatcher(_group(num_ranks), SLOTS, row_factor=num_ranks, max_tokens=TOKENS)
    kinds = ("random", "skewed", "hot", "one rank", "drops", "nothing")
    for turn in turns:
        num_tokens = (TOKENS, 0, 7, TOKENS - 1)[(turn + world_rank) % 4] if turn % 3 else TOKENS
        routed = _routed(num_ranks, 1000 * world_rank + turn, device, kinds[turn % len(kinds)], num_tokens)
        first = _exchange(dispatcher, *routed, world_rank)
        dispatcher.transport.max_blocks = 1 + (turn + world_rank) % 9  # of a launch: any number will do
        if turn % 5 == 0:
            dispatcher.dispatch(*routed[:3])
        again = _exchange(dispatcher, *routed, world_rank)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"turn {turn} differs when repeated"
        _check_exchange(first, _wanted(*routed), f"turn {turn}")
    dispatcher.check()


def test_gloo_exchanges_repeat():
    spawn(_steady, 3, 3, "cpu", range(24))


@pytest.mark.gpu
@BOTH_WAYS
def test_a_thousand_routings_repeat_on_gpus(num_ranks, early):
    backend = _gpus(num_ranks)
    num_rounds = 1000 if backend == "nccl" else 100
    spawn(_steady, num_ranks, num_ranks, "cuda", range(num_rounds), early, backend=backend, timeout_s=150)


def _interleave(world_rank, num_ranks, device_type, early=False):
    """Two layers, forward of both before backward of both, with and without recomputation."""
    _in_three_turns(), _begin_early(early)
    device = _device(device_type, world_rank)
    layers = [DirectDispatcher(_group(num_ranks), SLOTS, row_factor=num_ranks) for _ in range(2)]
    routed = [_routed(num_ranks, 10 * layer + world_rank, device, "skewed") for layer in range(2)]

    def run(layer, x, weight):
        rows, handle = layers[layer].dispatch(x, routed[layer][1], weight)
        return layers[layer].combine(_Scaled(world_rank)(rows, handle.count_L), handle)

    results = []
    for recompute in (False, True):
        inputs = [(x.clone().requires_grad_(), weight.clone().requires_grad_()) for x, _, weight, _ in routed]
        call = (lambda *args: checkpoint(run, *args, use_reentrant=False)) if recompute else run
        outputs = [call(layer, *inputs[layer]) for layer in range(2)]
        flat = [tensor for pair in inputs for tensor in pair]
        results.append([*outputs, *torch.autograd.grad(outputs, flat, [r[3] for r in routed])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "recomputation changes the result"
    for layer in range(2):
        got = [results[0][i].detach() for i in (layer, 2 + 2 * layer, 3 + 2 * layer)]
        _check_exchange(got, _wanted(*routed[layer]), f"layer {layer}")


def test_gloo_layers_interleave():
    spawn(_interleave, 3, 3, "cpu")


@pytest.mark.gpu
@BOTH_WAYS
def test_layers_interleave_on_gpus(num_ranks, early):
    backend = _gpus(num_ranks)
    spawn(_interleave, num_ranks, num_ranks, "cuda", early, backend=backend, timeout_s=120)


# Memory.


def _peaks(world_rank, num_ranks):
    """Peak bytes of one step: (direct with what peers store into, plain torch; 0 where that cannot be run)."""
    bench = Bench(parse_shape("4096,512,1024,16,4"), World(gpu_of(world_rank)), torch.bfloat16, 0, False, 1.125)
    bench.set_routing(routing.parse("balanced"))
    peaks = []
    for name in ("direct", "torch") if num_ranks == 1 else ("direct",):
        forward = bench._forward_of(name, "grouped")
        for _ in range(2):
            bench._drop_gradients()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            bench._step(forward, lambda: None)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before + getattr(bench.dispatcher, "shared_bytes", 0))
    return (*peaks, 0)[:2]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_peak_memory_is_that_of_the_rows_in_use(num_ranks):
    shape = parse_shape("4096,512,1024,16,4")
    rows, weights = shape.num_tokens * shape.top_k, 2 * 16 // num_ranks * 2 * 512 * 1024  # bytes
    # rows, hidden, gradients of the two, and a seventh for room; gradients of the weights; tokens in, out and from peers
    most = 2 * rows * (512 + 1024 + 512 + 1024) * 8 // 7 + weights + 2 * shape.num_tokens * 512 * 2 * (2 + num_ranks)
    for mine, plain in spawn(_peaks, num_ranks, num_ranks, backend=_gpus(num_ranks), timeout_s=120):
        assert mine < most and (num_ranks > 1 or mine < plain), (mine, plain, most)


# No host in between.


def _captured(world_rank, num_ranks, early):
    """Forward and backward without a host synchronisation, then from a CUDA graph with other routings."""
    _begin_early(early)
    device = gpu_of(world_rank)
    case = cases.Case("graph", (32,) * num_ranks, 4 * num_ranks, 2)
    weights = oracle.slots_of_rank(case.weights(), case.placement(), world_rank, torch.bfloat16, device)
    experts = cases.StackedExperts(weights, case.activation, "grouped")
    slot_of_expert = torch.from_numpy(case.placement().primary_slot_E).to(device)
    dispatcher = DirectDispatcher(_group(num_ranks), case.placement().slots_per_rank, row_factor=num_ranks)
    batches = []
    for seed in range(4):
        x, expert_idx, weight, grad = cases.Case("graph", case.num_tokens_W, 4 * num_ranks, 2, seed=seed).inputs(world_rank)
        if seed == 2:
            expert_idx = expert_idx * 0 + 1
        batches.append([x.bfloat16(), expert_idx, weight.float(), grad.bfloat16()])
        batches[-1] = [tensor.to(device) for tensor in batches[-1]]
    x, expert_idx, weight, grad = (tensor.clone() for tensor in batches[0])
    x.requires_grad_(), weight.requires_grad_()

    def step():
        y = dispatcher(x, oracle.make_routing(expert_idx, weight), slots_of(expert_idx, slot_of_expert[:, None]), experts)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, *weights), grad))

    def load(batch):
        with torch.no_grad():
            for static, new in zip((x, expert_idx, weight, grad), batch, strict=True):
                static.copy_(new)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    wanted = []
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches:
        load(batch)
        wanted.append([tensor.clone() for tensor in step()])
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()
    for batch, want in zip(batches * 3, wanted * 3, strict=True):
        load(batch)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True)), "a replay differs from a call"
        step()  # calls between replays
    dispatcher.check()
    return True


@pytest.mark.gpu
@BOTH_WAYS
def test_no_host_synchronisation_and_replays_of_a_graph(num_ranks, early):
    backend = _gpus(num_ranks)
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped GEMM keeps counts on the device from compute capability 9.0")
    assert all(spawn(_captured, num_ranks, num_ranks, early, backend=backend, timeout_s=120))


def _stay_away(world_rank):
    from smartmoe.dispatch import direct_kernels

    # some eight seconds instead of ten minutes; a rank may be a few behind another that has compiled kernels
    direct_kernels.MOST_POLLS = type(direct_kernels.MOST_POLLS)(1 << 24)
    device = gpu_of(world_rank)
    dispatcher = DirectDispatcher(dist.group.WORLD, SLOTS, row_factor=2)
    batch = _routed(2, 0, device)
    _exchange(dispatcher, *batch, world_rank)
    torch.cuda.synchronize()
    if world_rank == 1:
        time.sleep(40)
        os._exit(0)
    _exchange(dispatcher, *batch, world_rank)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_who_waits_for_a_rank_that_stays_away_gets_an_error(capfd):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    with pytest.raises(AssertionError, match=r"rank 0 of 2:(.|\n)*(CUDA error|Triton Error \[CUDA\])"):
        # fresh, as else what ranks print goes to where it went when the first test of all started some
        spawn(_stay_away, 2, backend=gpu_backend(2), timeout_s=90, fresh=True)
    assert "a peer did not come" in capfd.readouterr().out


def _gpus(num_ranks):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    return gpu_backend(num_ranks, may_share=True)
