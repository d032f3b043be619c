import dataclasses

import numpy as np
import pytest
import torch

from smartmoe import gpt
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
)
from smartmoe.gpt import GPT
from smartmoe.layer import MoELayer
from smartmoe.ops import expert_ffn
from smartmoe.planner import loads, memory
from smartmoe.planner.cost_model import CostModel
from smartmoe.planner.parameters import Parameters
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
    "settings, recompute",
    [
        ({}, False),
        (dict(dtype="float32"), False),
        (dict(kind="gshard", capacity=1.2), False),
        (dict(impl="loop"), False),
        (dict(moe_every=2), False),
        (dict(dispatcher="direct"), False),
        (dict(activation="swiglu"), False),
        ({}, True),
    ],
)
def test_activations_are_what_autograd_keeps(monkeypatch, settings, recompute):
    monkeypatch.setattr(expert_ffn, "_grouped", expert_ffn.fused_ffn)  # as on a GPU
    monkeypatch.setattr(gpt, "summed_cross_entropy", _LossOfLogits.apply)
    config = _config(**settings)
    kept, num_parameters = _saved(config, recompute)
    plan, cost = ParallelPlan(recompute=recompute), _cost(config)
    assert cost.parameters(plan)[0].total == num_parameters
    assert cost.memory(plan, 4).activations == pytest.approx(kept, rel=0.06)


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
    gradients = 2 * dense + 4 * expert + 4 * (dense + expert)
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
    assert captured.activations == pytest.approx(plain.activations + 2 * plain.transient) and captured.transient == 0
    assert captured.buffers - plain.buffers == 3 * 4 * SIZES["seq_len"] * SIZES["hidden_size"] * 2


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
