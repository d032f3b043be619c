"""The whole layer, gate to combine: against the oracle, under every placement, with recomputation, from any world."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from smartmoe import layer as layer_module
from smartmoe.config import ClusterSpec, GateConfig, LayerConfig, ModelConfig, OnlineConfig, RunConfig, Workload
from smartmoe.layer import MoELayer
from smartmoe.placement import Placement, Replicas
from tests import oracle
from tests.dist import spawn

SEQ_LEN, LAYER_IDX = 6, 2
MODEL = ModelConfig(hidden_size=16, ffn_size=24, num_experts=6, top_k=2, seq_len=SEQ_LEN, num_layers=4)
MECHANISMS = {
    "basic": LayerConfig(),
    "loop": LayerConfig(experts="loop"),
    "padded": LayerConfig(dispatcher="padded"),
    "tutel": LayerConfig(dispatcher="pipelined", experts="batched"),
    "overlapped": LayerConfig(dispatcher="overlapped", overlap_groups=3),
    "shadowing": LayerConfig(dispatcher="overlapped", shadowing=True),
}
# Links so fast and processors so slow that shadowing pays even here.
CLUSTER = ClusterSpec(ranks_per_node=8, intra_node_gbytes_per_s=1e9, tflops=1e-9)
SHUFFLED = {
    1: (4, 2, 0, 1, 5, 3),
    2: (4, 2, 0, 1, 5, 3),
    3: (4, -1, 2, 0, 1, 5, 3, -1, -1),
    4: (-1, 3, 0, 5, -1, 4, 2, 1),
}


def make_config(mechanism="basic", model=MODEL, **changes) -> RunConfig:
    return RunConfig(model=model, layer=MECHANISMS[mechanism], cluster=CLUSTER, workload=Workload(seed=5), **changes)


def make_layer(config, num_ranks=1, shuffled=False, dtype=torch.float32, device="cpu"):
    """A layer over the whole world, with a router strong enough to route unevenly."""
    group = dist.group.WORLD if num_ranks > 1 else None
    placement = Placement(num_ranks, SHUFFLED[num_ranks]) if shuffled else None
    layer = MoELayer(
        config,
        layer_idx=LAYER_IDX,
        placement=placement,
        ep_group=group,
        stage_group=group,
        dtype=dtype,
        device=device,
    )
    with torch.no_grad():
        layer.gate.weight_ED.mul_(20)
        for weight in layer.experts.weights():
            if weight is not None and weight.dim() == 3:
                weight.mul_(10)
    return layer


def make_tokens(rank: int, num_samples: int = 2):
    generator = torch.Generator().manual_seed(rank)
    x = oracle.rounded(torch.randn(num_samples, SEQ_LEN, MODEL.hidden_size, generator=generator))
    grad = oracle.rounded(torch.randn(x.shape, generator=generator))
    ids = (rank * num_samples * SEQ_LEN + torch.arange(num_samples * SEQ_LEN)).view(num_samples, SEQ_LEN)
    return x, grad, ids


def run_layer(layer, rank, recompute=False):
    """Output and gradients of one micro-batch; expert gradients by logical expert."""
    dtype = layer.experts.w1_LDF.dtype
    device = layer.experts.w1_LDF.device
    x, grad, ids = (t.to(device) for t in make_tokens(rank))
    x = x.to(dtype).requires_grad_()
    routings = []
    layer.observers.append(lambda layer_idx, routing, token_id_BT: routings.append((layer_idx, routing, token_id_BT)))
    if recompute:
        y, balance_loss = checkpoint(layer, x, ids, use_reentrant=False)
    else:
        y, balance_loss = layer(x, ids)
    ((y * grad.to(dtype)).sum() + balance_loss).backward()
    slots = dict(enumerate(layer.placement.experts_of_rank(layer.ep_group.rank() if layer.ep_group else 0)))
    names = ("w1_LDF", "b1_LF", "w2_LFD", "b2_LD")
    params = {name: getattr(layer.experts, name) for name in names if getattr(layer.experts, name) is not None}
    return {
        "y": y.detach().cpu(),
        "x": x.grad.cpu(),
        "gate": [None if p.grad is None else p.grad.cpu() for p in layer.gate.parameters()],
        "loss": balance_loss.detach().cpu(),
        "experts": {(e, name): p.grad[s].cpu() for name, p in params.items() for s, e in slots.items() if e >= 0},
        "weights": {(e, name): p.detach()[s].cpu() for name, p in params.items() for s, e in slots.items() if e >= 0},
        "choice": routings[0][1].expert_idx_TK.cpu(),
        "num_observed": len(routings),
        "layer_idx": routings[0][0],
        "ids": routings[0][2].cpu(),
    }


def run_mechanisms(world_rank, num_ranks, device_type, dtype):
    device = torch.device(device_type, world_rank) if device_type == "cuda" else torch.device("cpu")
    results = {}
    for mechanism in MECHANISMS:
        for shuffled in (False, True) if num_ranks != 4 else (True,):  # 6 experts do not divide by 4
            layer = make_layer(make_config(mechanism), num_ranks, shuffled, dtype, device)
            results[mechanism, shuffled] = run_layer(layer, world_rank)
            if shuffled:
                layer = make_layer(make_config(mechanism), num_ranks, shuffled, dtype, device)
                results[mechanism, "recomputed"] = run_layer(layer, world_rank, recompute=True)
    return results


def expected(results_W, dtype):
    """The oracle on the tokens of all ranks with the weights that the layers started from."""
    held = {key: weight for results in results_W for key, weight in results["weights"].items()}
    names = ("w1_LDF", "b1_LF", "w2_LFD", "b2_LD")
    weights = [torch.stack([held[e, name].double() for e in range(6)]).requires_grad_() for name in names]
    gate = make_layer(make_config()).gate
    router = [p.detach().double().requires_grad_() for p in gate.parameters()]
    answers = []
    for rank, results in enumerate(results_W):
        x, grad, _ = make_tokens(rank)
        x = x.flatten(0, 1).requires_grad_()
        chosen = (x @ router[0].t() + router[1]).argsort(1, descending=True)[:, :2]
        if dtype == torch.float32:
            assert torch.equal(chosen, results["choice"])
        weight = oracle.naive_weights(x, *router, results["choice"])
        y = oracle.moe(x, results["choice"], weight, weights)
        (y * grad.flatten(0, 1)).sum().backward()
        answers.append({"y": y.detach(), "x": x.grad})
    experts = {(e, name): w.grad[e] for name, w in zip(names, weights, strict=True) for e in range(6)}
    return answers, experts, [p.grad for p in router]


def check_mechanisms(results_W, dtype):
    answers, experts, router = expected([results["basic", True] for results in results_W], dtype)
    for key in results_W[0]:
        mine_W = [results[key] for results in results_W]
        for mine, results in zip(mine_W, results_W, strict=True):
            assert torch.equal(mine["choice"], results["basic", True]["choice"])
        for rank, (mine, want) in enumerate(zip(mine_W, answers, strict=True)):
            for name in ("y", "x"):
                oracle.assert_close(mine[name].flatten(0, 1), want[name], dtype, f"{key} rank {rank} {name}")
            for param, grad in mine["experts"].items():
                oracle.assert_close(grad, experts[param], dtype, f"{key} {param}")
        for index, want in enumerate(router):
            oracle.assert_close(sum(mine["gate"][index] for mine in mine_W), want, dtype, f"{key} router {index}")
        assert set().union(*(mine["experts"] for mine in mine_W)) == set(experts)


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_every_mechanism_equals_the_oracle(num_ranks):
    arguments = (num_ranks, "cpu", torch.float32)
    results_W = [run_mechanisms(0, *arguments)] if num_ranks == 1 else spawn(run_mechanisms, num_ranks, *arguments)
    check_mechanisms(results_W, torch.float32)
    for results in results_W:
        for mechanism in ("basic", "loop", "padded"):
            for key in (False, "recomputed"):
                if (mechanism, key) in results:
                    _assert_same_bits(results[mechanism, key], results[mechanism, True], ("y", "x"))
    for mechanism in ("basic", "loop", "padded"):
        if (mechanism, False) in results_W[0]:
            _assert_same_expert_bits(results_W, mechanism)


def _assert_same_bits(first, second, names):
    for name in names:
        assert torch.equal(first[name], second[name]), name


def _assert_same_expert_bits(results_W, mechanism):
    """The gradient of a logical expert is the same, bit for bit, wherever it lives: migration changes nothing."""
    plain, moved = ({k: g for r in results_W for k, g in r[mechanism, s]["experts"].items()} for s in (False, True))
    assert plain.keys() == moved.keys()
    for key in plain:
        assert torch.equal(plain[key], moved[key]), f"{mechanism} {key}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_mechanism_on_gpus(num_ranks, dtype):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    results_W = spawn(run_mechanisms, num_ranks, num_ranks, "cuda", dtype, backend="nccl")
    check_mechanisms(results_W, dtype)
    if num_ranks != 4:
        for mechanism in ("basic", "loop", "padded"):
            _assert_same_expert_bits(results_W, mechanism)


def _initial(world_rank, num_ranks):
    layers = [make_layer(make_config(), num_ranks, shuffled) for shuffled in (False, True)]
    return [run_layer(layer, world_rank)["weights"] for layer in layers], layers[0].gate.state_dict()


def test_initial_weights_depend_on_the_logical_expert_only():
    alone, gate = _initial(0, 1)
    assert alone[0].keys() == alone[1].keys()
    assert not torch.equal(alone[0][0, "w1_LDF"], alone[0][1, "w1_LDF"])
    for weights, gate_state in spawn(_initial, 3, 3):
        for held in weights:
            for key, weight in held.items():
                assert torch.equal(weight, alone[0][key]), key
        for name, value in gate_state.items():
            assert torch.equal(value, gate[name])


def test_threads_draw_the_same_values_and_no_more_than_they_are(monkeypatch):
    shape, keys, drawn = (5, 7), list(range(9)), []
    alone = list(layer_module._normal_values(keys, shape, 0.1))
    monkeypatch.setattr(layer_module, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(layer_module.os, "cpu_count", lambda: 2)
    make_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda: drawn.append(0) or make_generator())
    values = layer_module._normal_values(keys, shape, 0.1)
    first = next(values)
    time.sleep(0.05)
    assert len(drawn) <= 2
    assert all(torch.equal(one, other) for one, other in zip([first, *values], alone, strict=True))


def test_initial_scale_follows_gpt():
    model = dataclasses.replace(MODEL, hidden_size=64, ffn_size=128, num_layers=8)
    layer = MoELayer(make_config(model=model), layer_idx=0)
    assert abs(layer.experts.w1_LDF.std() - 0.02) < 1e-3
    assert abs(layer.experts.w2_LFD.std() - 0.02 / 4) < 2e-4
    assert layer.experts.b1_LF.abs().max() == layer.experts.b2_LD.abs().max() == 0
    other = MoELayer(make_config(model=model), layer_idx=1)
    assert not torch.equal(layer.experts.w1_LDF, other.experts.w1_LDF)
    assert not torch.equal(layer.gate.weight_ED, other.gate.weight_ED)


def test_parameters_say_how_they_are_shared_and_of_which_dtype():
    layer = make_layer(make_config(), dtype=torch.bfloat16)
    for name, param in layer.named_parameters():
        is_gate = name.startswith("gate.")
        assert param.parallel == ("dense" if is_gate else "expert")
        assert param.dtype == (torch.float32 if is_gate else torch.bfloat16)
    x, _, ids = make_tokens(0)
    y, balance_loss = layer(x.bfloat16(), ids)
    assert y.dtype == torch.bfloat16 and balance_loss.dtype == torch.float32 and balance_loss.dim() == 0


def test_swiglu_without_biases():
    model = dataclasses.replace(MODEL, activation="swiglu", expert_bias=False)
    layer = make_layer(make_config(model=model))
    assert layer.experts.b1_LF is None and layer.experts.w1_LDF.shape == (6, 16, 48)
    x, _, ids = make_tokens(0)
    y, _ = layer(x.float(), ids)
    weights = [None if w is None else w.detach().double() for w in layer.experts.weights()]
    routing = layer.gate(x.float().flatten(0, 1), ids.flatten())
    want = oracle.moe(x.flatten(0, 1), routing.expert_idx_TK, routing.weight_TK.double(), weights, "swiglu")
    oracle.assert_close(y.detach().flatten(0, 1), want.detach(), torch.float32)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_capacity_drops_copies_in_every_mechanism(mechanism, scope):
    layer = make_layer(make_config(mechanism, gate=GateConfig(kind="naive", capacity=0.5, scope=scope)))
    result = run_layer(layer, 0)
    assert (result["choice"] == -1).any()
    plain = run_layer(make_layer(make_config(gate=GateConfig(kind="naive", capacity=0.5))), 0)
    oracle.assert_close(result["y"], plain["y"], torch.float32)
    oracle.assert_close(result["x"], plain["x"], torch.float32)


def test_it_goes_on_with_the_tokens_that_its_gate_gives():
    """Through them a gate gets the gradient that its own is added to."""
    layer = make_layer(make_config())
    x, _, ids = make_tokens(0)
    plain, gate = layer(x.float(), ids)[0], layer.gate.forward
    layer.gate.forward = lambda x_TD, *args, **more: dataclasses.replace(gate(x_TD, *args, **more), x_TD=x_TD.flip(1))
    changed = layer(x.float(), ids)[0]
    layer.gate.forward = lambda x_TD, *args, **more: dataclasses.replace(gate(x_TD, *args, **more), x_TD=None)
    assert torch.equal(layer(x.float(), ids)[0], plain) and not torch.allclose(changed, plain)


def test_a_loss_belongs_to_who_asked_for_it():
    """Who adds to it in place, as training loops do, changes no other pass."""
    layer = make_layer(make_config())
    x, _, ids = make_tokens(0)
    for _ in range(2):
        y, loss = layer(x.float(), ids)
        other = layer(x.float(), ids)[1]
        loss += y.square().mean()
        loss.backward()
        assert other == 0


def test_observers_see_every_forward_and_recomputation():
    result = run_layer(make_layer(make_config()), 0)
    assert (result["num_observed"], result["layer_idx"]) == (1, LAYER_IDX)
    assert torch.equal(result["ids"], make_tokens(0)[2])
    assert run_layer(make_layer(make_config()), 0, recompute=True)["num_observed"] == 2


def test_set_placement_changes_the_route_and_refuses_other_sizes():
    layer = make_layer(make_config())
    moved = Placement(1, SHUFFLED[1])
    layer.set_placement(moved)
    assert layer.placement is moved
    assert layer.slot_of_expert_E.tolist() == [2, 3, 1, 5, 0, 4]
    assert np.array_equal(layer.slot_of_expert_E, moved.primary_slot_E)
    for wrong in (Placement.identity(5, 1), Placement.identity(6, 2), Placement(1, (*SHUFFLED[1], -1))):
        with pytest.raises(ValueError, match="does not fit"):
            layer.set_placement(wrong)
    with pytest.raises(ValueError, match="does not fit"):
        MoELayer(make_config(), layer_idx=0, placement=Placement.identity(6, 2))


def test_a_state_dict_brings_the_placement_of_its_weights():
    moved, restored = make_layer(make_config()), make_layer(make_config())
    moved.set_placement(Placement(1, SHUFFLED[1]))
    state = moved.state_dict()
    assert set(state) == {
        *("gate.weight_ED", "gate.bias_E"),
        *("experts.w1_LDF", "experts.b1_LF", "experts.w2_LFD", "experts.b2_LD"),
        "_extra_state",
    }
    restored.load_state_dict(state)
    x, _, ids = make_tokens(0)
    assert restored.placement == moved.placement
    assert torch.equal(restored(x.float(), ids)[0], moved(x.float(), ids)[0])
    with pytest.raises(ValueError, match="does not fit"):
        restored.load_state_dict(state | {"_extra_state": Placement.identity(6, 2).to_dict()})
    nested = torch.nn.Sequential(torch.nn.Identity(), restored)
    of_old = {f"1.{name}": value for name, value in state.items() if name != "_extra_state"}
    nested.load_state_dict(of_old)  # as in Megatron's checkpoints: the placement stays
    assert restored.placement == moved.placement
    del of_old["1.gate.bias_E"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1.gate.bias_E\"\."):
        nested.load_state_dict(of_old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(MODEL, top_k=7)}, "model.top_k = 7 is more than model.num_experts = 6"),
        ({"model": dataclasses.replace(MODEL, ffn_size=0)}, "model.ffn_size = 0 must be at least 1"),
        ({"gate": GateConfig(capacity=-1.0)}, "gate.capacity = -1.0 must be positive"),
        ({"gate": GateConfig(kind="trace")}, "needs gate.trace"),
        ({"online": OnlineConfig(replicate="exact")}, "online.replicate = \"exact\" does not go with online.replica_slots = 0"),
        ({"online": OnlineConfig(replicate="histry", replica_slots=1)}, "online.replicate = \"histry\" is not one of"),
    ],
)
def test_a_layer_refuses_a_wrong_config_with_the_key(changes, message):
    with pytest.raises(ValueError, match=f"layer 0: .*{message}"):
        MoELayer(dataclasses.replace(make_config(), **changes), layer_idx=0)


def test_a_layer_refuses_tokens_of_another_shape_or_dtype():
    layer = make_layer(make_config())
    x_BTD, ids_BT = make_tokens(0)[0].float(), make_tokens(0)[2]
    for wrong in (x_BTD.flatten(0, 1), x_BTD[..., :-1], x_BTD.bfloat16()):
        with pytest.raises(ValueError, match=r"its experts take torch.float32 \[samples, tokens of each, 16\]"):
            layer(wrong, ids_BT)
    for wrong in (ids_BT[:1], ids_BT.flatten(), ids_BT.float()):
        with pytest.raises(ValueError, match="token_id_BT is .* it must be int64"):
            layer(x_BTD, wrong)


def test_replica_slots_lie_behind_the_parameters_and_stay_there():
    online = OnlineConfig(replicate="history", replica_slots=2)
    layer = MoELayer(make_config(online=online), layer_idx=0)
    plain = MoELayer(make_config(), layer_idx=0)
    assert set(layer.state_dict()) == set(plain.state_dict()) and plain.experts.storages == ()
    for param, storage in zip(layer.experts.weights(), layer.experts.storages, strict=True):
        assert param.data_ptr() == storage.data_ptr() and len(param) + 2 == len(storage) and not storage[-2:].any()
    with pytest.raises(ValueError, match="stay as they were made"):
        layer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="without assign=True"):
        layer.load_state_dict(layer.state_dict(), assign=True)
    other = [param.detach() + 1 for param in layer.experts.weights()]
    for param, values in zip(layer.experts.weights(), other, strict=True):
        param.data = values
    layer.experts.follow_parameters()
    for storage, values in zip(layer.experts.storages, other, strict=True):
        assert torch.equal(storage[:-2], values) and not storage[-2:].any()
    for wrong in (Replicas.none(layer.placement, 1), Replicas.none(Placement.identity(5, 1), 2)):
        with pytest.raises(ValueError, match="replicas"):
            layer.set_replicas(wrong)
    with pytest.raises(ValueError, match="history"):
        plain.set_replicas(Replicas.none(plain.placement, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["naive", "switch", "gshard", "noisy", "swipe", "faster"])
def test_fixed_capacity_never_waits_for_the_gpu(kind):
    """Gate, padded exchange, grouped experts and combine, both ways, without one synchronisation with the host."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = dataclasses.replace(MODEL, top_k=1 if kind == "switch" else 2)
    config = make_config("padded", model, gate=GateConfig(kind=kind, capacity=1.0, scope="local"))
    layer = MoELayer(config, layer_idx=0, dtype=torch.bfloat16, device="cuda")
    x, grad, ids = (t.cuda() for t in make_tokens(0))
    x, grad = x.bfloat16().requires_grad_(), grad.bfloat16()
    layer(x, ids)[0].backward(grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, balance_loss = layer(x, ids)
        ((y * grad).sum() + balance_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
