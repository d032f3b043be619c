"""Exact replication on GPUs: the plan is the solver's, layers with it equal the oracle, and no host stands in between."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from smartmoe.config import GateConfig, LayerConfig, ModelConfig, OnlineConfig, RunConfig
from smartmoe.dispatch import symmetric
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.dispatch.symmetric_replicas import COPY_COST, SymmetricReplication
from smartmoe.held_experts import HeldExperts
from smartmoe.layer import MoELayer
from smartmoe.ops.expert_ffn import expert_ffn
from smartmoe.ops.plan import slots_of
from smartmoe.placement import Placement
from smartmoe.replicas import SymmetricHistory, return_all, send_all
from smartmoe.solvers.exact_step import solve_exact_step
from tests import oracle
from tests.dispatch import cases
from tests.dist import gpu_backend, gpu_of, spawn
from tests.test_replicas import everywhere, share_out

NUM_REPLICAS = 2
TOP_K = 2


class ReplicatedExperts:
    """Experts with given weights and room for replicas, as HeldExperts sees them; empty room holds NaN."""

    def __init__(self, replication, weights, activation: str, impl: str):
        self.activation, self.impl, self.storages, self._params = activation, impl, (), []
        for weight in weights:
            if weight is None:
                self._params.append(None)
                continue
            num_owned, *shape = weight.shape
            size = (num_owned + replication.num_replicas, *shape)
            storage = replication.allocate(size, dtype=weight.dtype, device=weight.device)
            storage[:num_owned].copy_(weight.detach())
            storage[num_owned:].fill_(torch.nan)
            self.storages += (storage,)
            self._params.append(nn.Parameter(storage[:num_owned]))
        replication.bind(self.storages)

    def weights(self):
        return tuple(self._params)

    def compute(self, rows, count_L, weights):
        return expert_ffn(rows, count_L, *weights, activation=self.activation, impl=self.impl)


class Layer:
    """One rank's part of a layer of `case` with exact replication, or `replication`: plan, weights, dispatch, experts,
    combine."""

    def __init__(self, case, ep_rank: int, dtype, impl: str = "grouped", copy_cost: int = 0, replication=None):
        device, placement = gpu_of(ep_rank), case.placement()
        self.replication = replication or SymmetricReplication(dist.group.WORLD, NUM_REPLICAS, copy_cost)
        weights = oracle.slots_of_rank(case.weights(), placement, ep_rank, dtype, device)
        self.experts = ReplicatedExperts(self.replication, weights, case.activation, impl)
        self.replication.set_placement(placement)
        slots_per_rank = placement.slots_per_rank + NUM_REPLICAS
        self.dispatcher = DirectDispatcher(
            dist.group.WORLD, slots_per_rank, case.num_ranks, max_tokens=max(case.num_tokens_W)
        )
        self.params = [weight for weight in self.experts.weights() if weight is not None]

    def __call__(self, x, expert_idx, weight, token_id):
        self.plan = self.replication.plan(expert_idx, token_id)
        experts = HeldExperts(self.experts, self.replication, self.plan)
        routing = oracle.make_routing(expert_idx, weight)
        return experts.finish(self.dispatcher(x, routing, self.plan.slot_TK, experts))


def load_batch(case, ep_rank: int, dtype):
    """(x, experts, combine weights, gradient of y, token ids) of one rank on its GPU."""
    x, expert_idx, weight, grad = case.inputs(ep_rank)
    token_id = torch.arange(len(x)) + 1000 * ep_rank
    batch = x.to(dtype), expert_idx, weight.float(), grad.to(dtype), token_id
    return [tensor.to(gpu_of(ep_rank)) for tensor in batch]


def inputs_of(batch):
    x, expert_idx, weight, _, token_id = batch
    return x.clone().requires_grad_(), expert_idx, weight.clone().requires_grad_(), token_id


# The plan.


def draw_experts(rng, kind: str, num_tokens: int, num_experts: int, crowd: np.ndarray) -> np.ndarray:
    """[T, K] experts of one rank; "crowded": only those of `crowd`, so that several must be copied."""
    if kind == "none":
        return np.full((num_tokens, TOP_K), -1)
    if kind == "crowded":
        return rng.choice(crowd, size=(num_tokens, TOP_K))
    if kind == "ties":
        return (np.arange(num_tokens * TOP_K) % num_experts).reshape(num_tokens, TOP_K)
    sharpness = {"even": 100.0, "skewed": 0.3, "hot": 0.02}[kind]
    expert_idx = rng.choice(num_experts, size=(num_tokens, TOP_K), p=rng.dirichlet(np.full(num_experts, sharpness)))
    expert_idx[rng.random(expert_idx.shape) < 0.05] = -1
    return expert_idx


def _plan(world_rank, num_ranks, turns):
    """Plans for routings that all ranks draw, against the solver in numpy and the table that it stands for; meanwhile the
    number of calls runs over."""
    device, num_different = gpu_of(world_rank), set()
    for num_owned, num_experts in ((1, num_ranks), (4, 4 * num_ranks - 1), (16, 16 * num_ranks), (40, 40 * num_ranks)):
        for num_replicas in (1, 2, 3):
            for copy_cost in (0, 20):
                replication = SymmetricReplication(dist.group.WORLD, num_replicas, copy_cost)
                size = (num_owned + num_replicas, 8)
                replication.bind([replication.allocate(size, dtype=torch.float32, device=device)])
                for turn in turns:
                    rng = np.random.default_rng([num_owned, num_replicas, copy_cost, turn])
                    slots = np.full(num_owned * num_ranks, -1)
                    slots[:num_experts] = np.arange(num_experts)
                    rng.shuffle(slots)
                    placement = Placement(num_ranks, tuple(slots.tolist()))
                    replication.set_placement(placement)
                    if turn == turns[0] and not copy_cost:  # nobody has planned with this board
                        replication._board.planned.fill_(-3 * replication._board.num_planners)
                    kind = ("even", "skewed", "hot", "crowded", "ties", "none")[turn % 6]
                    sizes, crowd = rng.integers(0, 3000, num_ranks), slots[:num_owned][slots[:num_owned] >= 0]
                    drawn = [draw_experts(rng, kind, num_tokens, num_experts, crowd) for num_tokens in sizes]
                    count_SE = np.stack([np.bincount(part[part >= 0], minlength=num_experts) for part in drawn])
                    want = solve_exact_step(count_SE, placement, num_replicas, copy_cost)
                    expert_idx = torch.from_numpy(drawn[world_rank]).to(device)
                    token_id = torch.from_numpy(rng.permutation(10**6)[: len(expert_idx)] + 10**12).to(device)
                    plan = replication.plan(expert_idx, token_id)
                    table = torch.from_numpy(want.bucket_slots(placement, world_rank)).to(device)
                    what = f"{num_owned} slots, {num_replicas} replicas, cost {copy_cost}, turn {turn}, {kind}"
                    assert plan.replica_N.tolist() == list(want.expert_of_replica), what
                    assert torch.equal(plan.slot_TK, slots_of(expert_idx, table, token_id)), what
                    num_different.add(want.expert_of_replica)
    return len(num_different)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_plan_is_the_solvers(num_ranks):
    backend = _gpus(num_ranks)
    num_different_W = spawn(_plan, num_ranks, num_ranks, range(18), backend=backend, timeout_s=240)
    assert min(num_different_W) > 100


# Whole layers.


def _carry_table(world_rank, num_ranks, dtype, impls):
    answers = {}
    for case in cases.cases(num_ranks):
        for impl in impls:
            layer = Layer(case, world_rank, dtype, impl)
            batch = load_batch(case, world_rank, dtype)
            repeats = []
            for _ in range(2):
                x, expert_idx, weight, token_id = inputs_of(batch)
                y = layer(x, expert_idx, weight, token_id)
                repeats.append((y.detach(), *torch.autograd.grad(y, (x, weight, *layer.params), batch[3])))
            assert all(torch.equal(a, b) for a, b in zip(*repeats, strict=True)), f"{case.name} differs when repeated"
            layer.dispatcher.check()
            y, x_grad, weight_grad, *grads = (tensor.cpu() for tensor in repeats[0])
            taken = iter(grads)
            answers[case.name, impl] = {
                "y": y,
                "x": x_grad,
                "weight": weight_grad,
                "experts": [None if weight is None else next(taken) for weight in layer.experts.weights()],
                "replicas": layer.plan.replica_N.tolist(),
            }
    return answers


def _carry_tables(world_rank, num_ranks, dtypes):
    return {dtype: _carry_table(world_rank, num_ranks, dtype, ("grouped", "loop")) for dtype in dtypes}


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layers_with_replicas_give_the_oracles_answer(num_ranks):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tables_W = spawn(_carry_tables, num_ranks, num_ranks, dtypes, backend=_gpus(num_ranks), timeout_s=240)
    by_name = {case.name: case for case in cases.cases(num_ranks)}
    for dtype, (name, impl) in [(each, key) for each in dtypes for key in tables_W[0][each]]:
        tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16
        answers = [tables[dtype][name, impl] for tables in tables_W]
        cases.compare(by_name[name], answers, f"replicas, {impl}", tolerance)
        assert all(answer["replicas"] == answers[0]["replicas"] for answer in answers)
        if name == "one hot expert":
            assert max(answers[0]["replicas"]) >= 0, "the hot expert has no replica"
        if name == "everything dropped":
            assert max(answers[0]["replicas"]) < 0


def copied_experts(layer, storage) -> dict[int, torch.Tensor]:
    """What the replica slots in use of this rank hold: by expert."""
    held = layer.plan.held_G.tolist()
    return {expert: storage[layer.replication.num_owned + i].clone() for i, expert in enumerate(held) if expert >= 0}


class Total:
    """A sink (ops.grad_sink) that sums in float32; what the first pass does not overwrite is not a number."""

    is_urgent, held_G, may_end_late = False, None, False

    def __init__(self, param):
        self.total, self.is_first = torch.full_like(param, torch.nan, dtype=torch.float32), True

    def take(self):
        is_first, self.is_first = self.is_first, False
        return self.total, is_first


def _carry_history(world_rank, num_ranks, dtype):
    """Copies for steps: the oracle's answer, the same from a second micro-batch, weights sent once and again when it is
    said that they have changed; two micro-batches into sums are twice one."""
    answers = {}
    for case in cases.cases(num_ranks):
        layer = Layer(case, world_rank, dtype, replication=SymmetricHistory(dist.group.WORLD, NUM_REPLICAS))
        replication, storage = layer.replication, layer.experts.storages[0]
        hot = 1 % case.num_experts
        batch, repeats = load_batch(case, world_rank, dtype), []

        def step():
            x, expert_idx, weight, token_id = inputs_of(batch)  # noqa: B023
            y = layer(x, expert_idx, weight, token_id)  # noqa: B023
            return (y.detach(), *torch.autograd.grad(y, (x, weight, *layer.params), batch[3]))  # noqa: B023

        step()  # without copies
        assert max(layer.plan.replica_N.tolist()) < 0 and storage[-NUM_REPLICAS:].isnan().all()
        wanted = everywhere(case.placement(), hot, NUM_REPLICAS)
        replication.set_replicas(share_out(case.placement(), wanted))
        num_sent = send_all([replication], dist.group.WORLD)
        repeats = [step(), step()]
        assert all(torch.equal(a, b) for a, b in zip(*repeats, strict=True)), f"{case.name} differs when repeated"
        assert return_all([replication], [None], dist.group.WORLD) == 0
        is_owner = case.placement().rank_of_expert()[hot] == world_rank
        assert num_sent == is_owner * (num_ranks - 1) * sum(each[0].nbytes for each in layer.experts.storages)
        matrices = [weight for weight in layer.experts.weights() if weight is not None and weight.dim() == 3]
        for weight in matrices:
            weight.grad_sink = Total(weight)
        for _ in range(2):
            layer(*inputs_of(batch)).backward(batch[3])
        grad_of = dict(zip(layer.params, repeats[0][3:], strict=True))
        for weight in matrices:
            total, once = weight.grad_sink.total, grad_of[weight].float()
            assert (total - 2 * once).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * once.norm(), case.name
            del weight.grad_sink
        before = copied_experts(layer, storage)
        with torch.no_grad():
            storage[: replication.num_owned] *= 2
        step()
        after = copied_experts(layer, storage)
        assert all(torch.equal(after[expert], before[expert]) for expert in before), "sent again without need"
        send_all([replication], dist.group.WORLD)
        step()
        after = copied_experts(layer, storage)
        assert before.keys() == after.keys() == ({hot} if not is_owner else set())
        assert all(torch.equal(after[expert], 2 * before[expert]) for expert in before), "copies of old weights"
        layer.dispatcher.check()
        y, x_grad, weight_grad, *grads = (tensor.cpu() for tensor in repeats[0])
        taken = iter(grads)
        parts = [None if weight is None else next(taken) for weight in layer.experts.weights()]
        answers[case.name] = {"y": y, "x": x_grad, "weight": weight_grad, "experts": parts}
    return answers


def _carry_histories(world_rank, num_ranks, dtypes):
    return {dtype: _carry_history(world_rank, num_ranks, dtype) for dtype in dtypes}


def compare_histories(tables_W, num_ranks, dtypes):
    """Against the oracle what `_carry_histories` gave, by rank."""
    for case in cases.cases(num_ranks):
        for dtype in dtypes:
            tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16
            cases.compare(case, [tables[dtype][case.name] for tables in tables_W], "copies for steps", tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_copies_for_steps_give_the_oracles_answer(num_ranks):
    dtypes = (torch.float32, torch.bfloat16)
    tables_W = spawn(_carry_histories, num_ranks, num_ranks, dtypes, backend=_gpus(num_ranks), timeout_s=240)
    compare_histories(tables_W, num_ranks, dtypes)


def _micro_batches(world_rank, num_ranks):
    """Two micro-batches with other hot experts of one owner, so that one overwrites the replica of the other: one after
    the other, both in flight, and recomputed."""
    sizes = (24,) * num_ranks
    case = cases.Case("hot", sizes, 4 * num_ranks, 2, kind="hot", seed=0)
    layer = Layer(case, world_rank, torch.bfloat16)
    hot = [expert for expert in case.placement().experts_of_rank(0) if expert >= 0][:2]
    batches = []
    for micro in range(2):
        batch = load_batch(dataclasses.replace(case, seed=micro), world_rank, torch.bfloat16)
        batch[1] = batch[1] * 0 + hot[micro]
        batches.append(batch)
    plans, results = [], []

    def forward(micro, recompute):
        args = inputs_of(batches[micro])
        y = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        plans.append(layer.plan.replica_N.tolist())
        return y, args

    def finish(micro, y, args):
        return (y.detach(), *torch.autograd.grad(y, (args[0], args[2], *layer.params), batches[micro][3]))

    for order in ("one by one", "both in flight", "recomputed"):
        recompute = order == "recomputed"
        if order == "one by one":
            results.append([finish(micro, *forward(micro, recompute)) for micro in range(2)])
        else:
            flying = [forward(micro, recompute) for micro in range(2)]
            results.append([finish(micro, *flying[micro]) for micro in range(2)])
    assert [max(plan) for plan in plans[:2]] == hot and plans[0].index(hot[0]) == plans[1].index(hot[1])
    for other in results[1:]:
        for micro in range(2):
            pairs = zip(results[0][micro], other[micro], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), f"micro-batch {micro} depends on what else is in flight"
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_micro_batches_in_flight_keep_their_weights(num_ranks):
    backend = _gpus(num_ranks)
    assert all(spawn(_micro_batches, num_ranks, num_ranks, backend=backend, timeout_s=120))


def _balanced(world_rank, num_ranks):
    """A routing that is not worth a copy leaves the replica slots alone."""
    case = cases.Case("hot", (32,) * num_ranks, 4 * num_ranks, 2, kind="hot")
    layer = Layer(case, world_rank, torch.bfloat16, copy_cost=10**6)
    x, expert_idx, weight, grad, token_id = load_batch(case, world_rank, torch.bfloat16)
    layer(x.requires_grad_(), expert_idx, weight.requires_grad_(), token_id).backward(grad)
    assert max(layer.plan.replica_N.tolist()) < 0
    assert all(storage[-NUM_REPLICAS:].isnan().all() for storage in layer.experts.storages)
    assert x.grad.isfinite().all() and all(param.grad.isfinite().all() for param in layer.params)
    return True


@pytest.mark.gpu
def test_nothing_is_sent_for_what_is_not_worth_it():
    backend = _gpus(2)
    assert all(spawn(_balanced, 2, 2, backend=backend, timeout_s=120))


def _captured(world_rank, num_ranks):
    """Forward and backward without a host synchronisation, then from a CUDA graph with other routings."""
    case = cases.Case("graph", (32,) * num_ranks, 4 * num_ranks, 2)
    layer = Layer(case, world_rank, torch.bfloat16)
    batches = []
    for seed in range(4):
        batch = load_batch(
            cases.Case("graph", case.num_tokens_W, 4 * num_ranks, 2, seed=seed), world_rank, torch.bfloat16
        )
        if seed >= 2:
            batch[1] = batch[1] * 0 + seed
        batches.append(batch)
    static = [tensor.clone() for tensor in batches[0]]
    x, expert_idx, weight, grad, token_id = static
    x.requires_grad_(), weight.requires_grad_()

    def step():
        y = layer(x, expert_idx, weight, token_id)
        return (y.detach(), *torch.autograd.grad(y, (x, weight, *layer.params), grad))

    def load(batch):
        with torch.no_grad():
            for old, new in zip(static, batch, strict=True):
                old.copy_(new)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    wanted, plans = [], []
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches:
        load(batch)
        wanted.append([tensor.clone() for tensor in step()])
        plans.append(layer.plan.replica_N)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len({tuple(plan.tolist()) for plan in plans}) > 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()
    for batch, want in zip(batches * 3, wanted * 3, strict=True):
        load(batch)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True)), "a replay differs from a call"
        step()  # calls between replays
    layer.dispatcher.check()
    return True


@pytest.mark.gpu
def test_no_host_synchronisation_and_replays_of_a_graph():
    backend = _gpus(2)
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped GEMM keeps counts on the device from compute capability 9.0")
    assert all(spawn(_captured, 2, 2, backend=backend, timeout_s=120))


def _moe_layer(world_rank, num_ranks):
    """A whole MoELayer whose gate sends everything to one expert, without replication and with both kinds."""
    device = gpu_of(world_rank)
    num_tokens = 4 * COPY_COST
    results = {}
    for mode, slots in (("never", 0), ("exact", 2), ("history", 2)):
        config = RunConfig(
            model=ModelConfig(hidden_size=64, ffn_size=128, num_experts=2 * num_ranks, seq_len=num_tokens),
            gate=GateConfig(kind="zero"),
            layer=LayerConfig(dispatcher="direct", row_factor=float(num_ranks)),
            online=OnlineConfig(replicate=mode, replica_slots=slots),
        )
        group = dist.group.WORLD
        layer = MoELayer(config, layer_idx=0, ep_group=group, stage_group=group, dtype=torch.bfloat16, device=device)
        generator = torch.Generator().manual_seed(world_rank)
        x, grad = (torch.randn(1, num_tokens, 64, generator=generator).to(device, torch.bfloat16) for _ in range(2))
        token_id = torch.arange(num_tokens, device=device)[None] + world_rank * num_tokens
        if mode == "history":
            assert isinstance(layer.replication, SymmetricHistory)
            layer.set_replicas(share_out(layer.placement, everywhere(layer.placement, 0, slots)))
            send_all([layer.replication], group)
        y, _ = layer(x.requires_grad_(), token_id)
        y.backward(grad)
        grads = [param.grad for param in layer.experts.parameters()]
        results[mode] = [tensor.detach().float().cpu() for tensor in (y, x.grad, *grads)]
        if mode == "exact":
            assert isinstance(layer.replication, SymmetricReplication)
            assert not isinstance(layer.replication, SymmetricHistory)
            used = layer.replication.plan(torch.zeros(num_tokens, 2, dtype=torch.int64, device=device), token_id[0])
            results["hosts"] = torch.bincount(used.slot_TK.flatten() // (2 + slots), minlength=num_ranks).tolist()
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_layer_replicates_on_the_device_where_it_can(num_ranks):
    backend = _gpus(num_ranks)
    for rank, results in enumerate(spawn(_moe_layer, num_ranks, num_ranks, backend=backend, timeout_s=120)):
        for mode in ("exact", "history"):
            for idx, (got, want) in enumerate(zip(results[mode], results["never"], strict=True)):
                oracle.assert_close(got, want, torch.bfloat16, f"{mode}, rank {rank}, tensor {idx}")
        assert min(results["hosts"]) > 0, "all tokens are for one expert, and some rank computes none of them"


# Without a GPU.


def test_a_slot_that_kernels_cannot_copy_is_refused():
    with pytest.raises(ValueError, match="12 bytes of a weight .* no multiple of 16"):
        SymmetricReplication(None, NUM_REPLICAS).allocate((6, 3), dtype=torch.float32, device="cpu")


def _gpus(num_ranks):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    return gpu_backend(num_ranks, may_share=True)


def test_memory_that_others_do_not_reach_is_refused(monkeypatch):
    """Also where no device is given: then a layer is built on the CPU."""
    monkeypatch.setattr(symmetric, "group_size", lambda group: 2)
    for device in (None, "cpu"):
        with pytest.raises(ValueError, match='asked for on cpu, and only GPUs have it.*device="cuda"'):
            SymmetricReplication(None, 1).allocate((2, 8), dtype=torch.bfloat16, device=device)
