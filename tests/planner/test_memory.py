import dataclasses
import itertools

import numpy as np
import pytest
import torch

from smartmoe import gates, gpt
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    expert_numel,
)
from smartmoe.gpt import GPT
from smartmoe.layer import MoELayer
from smartmoe.ops import expert_ffn, wide_linear
from smartmoe.planner import loads, memory
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.parameters import Parameters, block_parameters, chunk_layers, has_experts, hidden_width
from smartmoe.planner.schedule import most_in_flight, num_in_flight
from smartmoe.planner.sharding import kept_bytes, pass_bytes

SIZES = dict(num_layers=4, hidden_size=64, ffn_size=128, num_heads=4, seq_len=128, vocab_size=300, num_experts=8)


def _config(dtype="bfloat16", kind="naive", capacity=None, dispatcher="basic", impl="grouped", **model):
    return RunConfig(
        model=ModelConfig(**{**SIZES, **model}),
        gate=GateConfig(kind=kind, capacity=capacity),
        layer=LayerConfig(dispatcher=dispatcher, experts=impl),
        workload=Workload(dtype=dtype, global_batch_size=16, micro_batch_size=4),
        cluster=ClusterSpec(ranks_per_node=1),
    )


def _cost(config):
    return CostModel(config, config.cluster, None, loads.uniform(config.model))


class _LossOfLogits(torch.autograd.Function):
    """What the loss keeps on a GPU: the logits in their own type, and a number a token."""

    @staticmethod
    def forward(ctx, logits_SV, target_S):
        ctx.save_for_backward(logits_SV, target_S, logits_SV[:, 0].float())
        return logits_SV.float().sum()


def _saved(config, recompute):
    """(bytes that autograd keeps after the forward pass of the whole model, number of its parameters)."""
    dtype = getattr(torch, config.workload.dtype)
    model = GPT(config.model, lambda idx: MoELayer(config, layer_idx=idx, dtype=dtype), recompute=recompute)
    for name, param in model.named_parameters():
        if ".moe." not in name:
            param.data = param.data.to(dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = config.workload.micro_batch_size
    token = torch.randint(config.model.vocab_size, (batch, config.model.seq_len))
    token_id = torch.arange(token.numel()).view(token.shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(token, token_id_BT=token_id, target_BT=token)
    del out
    return sum(num for place, num in saved.items() if place not in own), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "settings, recompute, device",
    [
        ({}, False, "cpu"),
        (dict(dtype="float32"), False, "cpu"),
        (dict(kind="gshard", capacity=1.2), False, "cpu"),
        (dict(impl="loop"), False, "cpu"),
        (dict(moe_every=2), False, "cpu"),
        (dict(dispatcher="direct"), False, "cpu"),
        (dict(activation="swiglu"), False, "cpu"),
        ({}, True, "cpu"),
        ({}, False, "cuda"),
    ],
)
def test_activations_are_what_autograd_keeps(monkeypatch, settings, recompute, device):
    monkeypatch.setattr(expert_ffn, "_grouped", expert_ffn.fused_ffn)  # as on a GPU
    monkeypatch.setattr(gpt, "summed_cross_entropy", _LossOfLogits.apply)
    if device == "cuda":
        monkeypatch.setattr(gates, "wide_linear", wide_linear._SplitLinear.apply)
    config = _config(**settings)
    kept, num_parameters = _saved(config, recompute)
    plan, cluster = ParallelPlan(recompute=recompute), ClusterSpec(device=device)
    cost = CostModel(config, cluster, None, loads.uniform(config.model))
    assert cost.parameters(plan)[0].total == num_parameters
    assert cost.memory(plan, 4).activations == pytest.approx(kept, rel=0.02 if device == "cuda" else 0.06)


def test_state_of_a_parameter_takes_18_bytes_in_16_bit_and_16_in_float32():
    for dtype, each in (("bfloat16", 18), ("float32", 16)):
        cost, plan = _cost(_config(dtype)), ParallelPlan()
        memory, held = cost.memory(plan, 4), cost.parameters(plan)[0]
        state = memory.weights + memory.masters + memory.moments + memory.gradients
        assert state == pytest.approx(each * (held.total - held.router) + 16 * held.router)


def test_plans_move_memory_the_way_they_should():
    cost = _cost(_config())
    whole = cost.memory(ParallelPlan(), 4)
    assert cost.memory(ParallelPlan(recompute=True), 4).activations < 0.5 * whole.activations
    assert cost.memory(ParallelPlan(), 2).activations == pytest.approx(whole.activations / 2, rel=0.01)
    experts = [sum(p.expert for p in cost.parameters(ParallelPlan(dp=4, ep=ep))) for ep in (1, 2, 4)]
    assert experts[0] == 2 * experts[1] == 4 * experts[2]
    sliced = cost.parameters(ParallelPlan(tp=2, ep=1))[0]
    assert sliced.tensor == 4 * 4 * 64 * 64 / 2 and whole.buffers == 0
    first = cost.memory(ParallelPlan(pp=2), 4)
    assert first.buffers > 0 and first.pp_stage == 0, "two micro-batches in flight at the first stage"
    assert first.weights < whole.weights
    more = CostModel(
        _config(), ClusterSpec(ranks_per_node=4), None, loads.zipf(_config().model, GateConfig(kind="naive"))
    )
    assert more.memory(ParallelPlan(dp=4, ep=4), 4).activations > cost.memory(ParallelPlan(dp=4, ep=4), 4).activations


def test_zero_shares_out_masters_and_moments():
    config, plan = _config(), ParallelPlan(dp=4, ep=2)
    sharing = dataclasses.replace(config, workload=dataclasses.replace(config.workload, zero=1))
    held = _cost(config).parameters(plan)[0]
    without, with_it = _cost(config).memory(plan, 4), _cost(sharing).memory(plan, 4)
    assert with_it.moments == pytest.approx(8 * (held.dense / 4 + held.expert / 2))
    assert with_it.masters == pytest.approx(with_it.moments / 2)
    assert (with_it.weights, with_it.gradients) == (without.weights, without.gradients)
    alone = [_cost(each).memory(ParallelPlan(), 4) for each in (config, sharing)]
    assert alone[0] == alone[1]


def test_stages_of_zero_keep_rows_and_need_room_for_a_block():
    config, plan = _config(), ParallelPlan(dp=4, ep=2)
    held, found = _cost(config).parameters(plan)[0], {}
    for zero in (1, 2, 3):
        for replicate in ("never", "history", "exact"):
            online = OnlineConfig(replicate=replicate, replica_slots=int(replicate != "never"))
            work = dataclasses.replace(config.workload, zero=zero)
            memory = _cost(dataclasses.replace(config, workload=work, online=online)).memory(plan, 4)
            assert (memory.weights, memory.gradients) == kept_bytes(held, plan, 2, zero, replicate), (zero, replicate)
            found[zero, replicate] = memory.transient
    dense, expert = 4 * 64 + 4 * 64**2 + 8 * 65, 4 * (2 * 64 * 128 + 128 + 64)  # of a block
    gradients = 4 * (dense + expert) + 4 * (dense + expert)
    assert found[2, "never"] - found[1, "never"] == gradients
    assert found[3, "never"] - found[1, "never"] == gradients + 2 * 2 * (dense + expert)
    assert found[3, "exact"] - found[1, "exact"] == gradients + 2 * 2 * dense


def test_captured_passes_of_a_pipeline_have_rooms_of_their_own():
    """A micro-batch in flight keeps what its passes need for a moment, too, and a place for what comes in and goes out."""
    found = {}
    for way in ("auto", "never"):
        config = _config(dispatcher="direct")
        work = dataclasses.replace(config.workload, cuda_graph=way)
        cluster = ClusterSpec(ranks_per_node=2, device="cuda")
        config = dataclasses.replace(config, workload=work, cluster=cluster)
        found[way] = _cost(config).memory(ParallelPlan(pp=2), 4)
    captured, plain = found["auto"], found["never"]
    assert captured.pp_stage == plain.pp_stage == 0  # which holds two micro-batches of the four
    gaps = 2 * 2 * 4 * SIZES["seq_len"] * SIZES["hidden_size"]  # bf16, the rows of top-2
    assert captured.activations == pytest.approx(plain.activations + 2 * (plain.transient + gaps)) and captured.transient == 0
    assert captured.buffers - plain.buffers == 3 * 4 * SIZES["seq_len"] * SIZES["hidden_size"] * 2


def _of_stage(pp_stage, cost, plan, micro_batch, rows_SLW):
    """One stage, chunk by chunk as a rank fills up."""
    setting, n, model = cost.setting(plan, micro_batch), cost.num_micro_batches(plan, micro_batch), cost.config.model
    zero, bytes_, num_chunks = cost.config.workload.zero, setting.dtype_bytes, plan.pp * plan.vpp
    chunks, layers = range(pp_stage, num_chunks, plan.pp), chunk_layers(model.num_layers, num_chunks)
    moe_layers = [layer for layer in range(model.num_layers) if has_experts(model, layer)]
    if setting.layer.dispatcher == "direct":
        rows_SLW = np.minimum(setting.layer.row_factor * rows_SLW.max(-1, keepdims=True), setting.ep * setting.copies)
    mine = sum((cost.parameters(plan)[chunk] for chunk in chunks), Parameters())
    replicate = "never" if not setting.replica_slots else "exact" if setting.is_exact else "history"
    kinds = {has_experts(model, layer) for layer in range(model.num_layers)}
    units = [block_parameters(model, plan, kind) for kind in kinds]
    if pp_stage in (0, plan.pp - 1):
        table = model.vocab_size * model.hidden_size
        units.append(Parameters(dense=table, largest=table, tensors=1))
    fixed, per_row = memory._saved_by_block(setting, plan, micro_batch)
    dense_fixed = memory._saved_by_dense_block(setting, plan, micro_batch)
    loss_saved, loss_moment = memory._head(setting)
    one, fullest = bytes_ * setting.tokens * model.hidden_size, rows_SLW.max()
    is_grouped, has_rooms = setting.layer.experts == "grouped", cost.is_captured(plan, micro_batch) and plan.pp > 1
    num_wide = 2 if has_rooms or not is_grouped else 1
    transient = bytes_ * fullest * (hidden_width(model) * (1 if is_grouped else 3) + num_wide * model.hidden_size)
    transient += bytes_ * (mine.largest if is_grouped else max(mine.largest, mine.largest_expert))
    if plan.recompute:
        transient += max(fixed + fullest * per_row, dense_fixed if len(kinds) > 1 else 0)
    at_head = max(transient - loss_saved, loss_moment)
    activations = buffers = 0.0
    flights_of = most_in_flight if has_rooms else num_in_flight
    for chunk, flights in zip(chunks, flights_of(pp_stage, plan.pp, plan.vpp, n), strict=True):
        is_last, num_ways = chunk == num_chunks - 1, (chunk > 0) + (chunk < num_chunks - 1)
        moe = [place for place, layer in enumerate(moe_layers) if layer in layers[chunk]]
        saved = len(layers[chunk]) * one
        if not plan.recompute:
            rows = rows_SLW[:, moe].sum(1).max()
            saved = len(moe) * fixed + (len(layers[chunk]) - len(moe)) * dense_fixed + rows * per_row
        saved += loss_saved if is_last else 0
        if plan.pp > 1:
            saved += one * (not is_last) - one * (chunk > 0)
            buffers += n * one * num_ways
        if has_rooms:
            saved += at_head if is_last else transient
            buffers += min(flights + 1, n) * one * num_ways
        activations += flights * saved
    transient = 0.0 if has_rooms else at_head if pp_stage == plan.pp - 1 else transient
    copied = setting.replica_slots * mine.expert / (model.num_experts // plan.ep)
    in_layer = setting.replica_slots * expert_numel(model) if copied else 0.0
    if setting.is_exact:
        transient += bytes_ * in_layer * (plan.ep + 1)
    else:
        transient = max(transient, 4 * (max(2 * copied, plan.ep * in_layer) + copied) - activations)
    if zero and plan.stage_size > 1:
        transient = max(transient, 4 * max(mine.largest, mine.largest_expert) - activations)
    transient += max(pass_bytes(unit, plan, bytes_, zero, replicate) for unit in units)
    weights, gradients = kept_bytes(mine, plan, bytes_, zero, replicate)
    masters, moments = memory.optimizer_bytes(mine, plan, bytes_, zero)
    buffers += copied * (bytes_ if setting.is_exact else bytes_ + 4)
    return weights, masters, moments, gradients, activations, buffers, transient


@pytest.mark.parametrize("dispatcher, zero, replicate", [
    ("basic", 0, "never"), ("direct", 1, "never"), ("direct", 1, "history"), ("basic", 2, "history"), ("basic", 3, "exact"),
])  # fmt: skip
def test_the_fullest_stage_is_found_among_all(dispatcher, zero, replicate):
    """Every stage by itself, for pipelines of unequal chunks with and without experts, captured and not."""
    found = set()
    for moe_every, experts, vocab in ((1, "grouped", 300), (3, "loop", 20_000)):
        config = _config(num_layers=11, dispatcher=dispatcher, impl=experts, moe_every=moe_every, vocab_size=vocab)
        online = OnlineConfig(replicate=replicate, replica_slots=int(replicate != "never"))
        work = dataclasses.replace(config.workload, zero=zero, global_batch_size=48)
        config = dataclasses.replace(config, online=online, workload=work)
        cluster = ClusterSpec(device="cuda", ranks_per_node=8)
        chosen = loads.zipf(config.model, GateConfig(kind="naive"), 3)
        cost = CostModel(config, cluster, None, chosen)
        for (pp, vpp), ep, micro_batch, recompute in itertools.product(
            ((1, 1), (2, 1), (4, 1), (2, 3), (4, 2)), (1, 2), (1, 4), (False, True)
        ):
            plan = ParallelPlan(pp=pp, vpp=vpp, dp=2, ep=ep, recompute=recompute)
            each = [_of_stage(s, cost, plan, micro_batch, cost.rows(plan, micro_batch)) for s in range(pp)]
            told = cost.memory(plan, micro_batch)
            found.add((told.pp_stage > 0, pp > 1 and cost.is_captured(plan, micro_batch)))
            assert told.pp_stage == int(np.argmax([sum(parts) for parts in each])), plan
            parts = [getattr(told, field.name) for field in dataclasses.fields(told)][:7]
            assert parts == pytest.approx(each[told.pp_stage], rel=1e-9), plan
    assert {is_later for is_later, _ in found} == {False, True}, "the first stage is not always the fullest"
    assert any(is_captured for _, is_captured in found) == (dispatcher == "direct")


@pytest.mark.parametrize("pp_stage", [0, 2])
def test_both_ends_of_a_pipeline_need_room_for_their_table(pp_stage):
    """ZeRO-2, three stages of which the first or the last is the fullest: what a pass takes of its largest unit."""
    model = ModelConfig(num_layers=6, hidden_size=64, ffn_size=64, num_heads=2, seq_len=64, vocab_size=400_000, num_experts=4)
    plan, held = ParallelPlan(pp=3, dp=2, ep=2), [Parameters()] * 3
    held[pp_stage] = Parameters(dense=1e9)
    setting = CostModel(RunConfig(model=model), ClusterSpec(), None, loads.uniform(model)).setting(plan, 1)
    rows = memory.most_rows(setting, np.ones((1, 6, 2)), 3)
    found = memory.estimate(plan, setting, 1, 6, rows, memory.held(plan, setting, held, zero=2))
    table = 400_000 * 64
    assert found.pp_stage == pp_stage
    assert found.transient >= pass_bytes(Parameters(dense=table, largest=table, tensors=1), plan, setting.dtype_bytes, 2)


def test_parameters_add_up_but_for_the_largest():
    assert Parameters(1, 2, 3, 4, 5, 6, 7, 8) + Parameters(8, 7, 6, 5, 4, 3, 2, 1) == Parameters(9, 9, 9, 9, 5, 6, 9, 9)
    assert Parameters() + Parameters(1, 2, 3, 4, 5, 6, 7, 8) == Parameters(1, 2, 3, 4, 5, 6, 7, 8)
