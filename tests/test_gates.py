"""Gates: the experts they choose, their losses and capacities, and that none of it depends on how tokens are
spread."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from smartmoe import gates
from smartmoe.config import GateConfig, ModelConfig
from smartmoe.gates import build_gate, scale_counts
from smartmoe.ops.capacity import capacity_limit
from smartmoe.ops.hashing import normal, uniform
from tests import oracle
from tests.dist import spawn

SEQ_LEN, WIDTH, NUM_SAMPLES, FIRST_SAMPLE = 8, 16, 8, 24
TOP_K = {"switch": (1,), "gshard": (2,), "naive": (1, 2, 3)}
LAYOUTS = {4: ((4, 1), (2, 2), (1, 4)), 2: ((2, 1), (1, 2))}
# FasterGate looks at where it runs; everything else must not depend on the plan.
PLAN_FREE = [
    (kind, top_k, capacity)
    for kind in ("naive", "noisy", "switch", "gshard", "swipe", "zero")
    for top_k in TOP_K.get(kind, (2,))
    for capacity in (None, 0.6, 1.0)
]


class FakeGroup:
    """A group that only knows its size: any communication over it fails."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size


def make_gate(kind: str, top_k: int, capacity=None, *, num_experts=5, layer_idx=3, group=None, device="cpu", **options):
    model = ModelConfig(
        hidden_size=WIDTH, num_experts=num_experts, top_k=top_k, seq_len=SEQ_LEN, num_layers=4, ffn_size=32
    )
    extra = {"global_batch_size": options.pop("global_batch_size", NUM_SAMPLES)}
    config = GateConfig(kind=kind, capacity=capacity, **options)
    gate = build_gate(model, config, layer_idx=layer_idx, seed=7, stage_group=group, device=device, **extra)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():  # large enough that experts get unequal shares
        for param in gate.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.4)
    return gate


def make_tokens(dp: int = 1, tp: int = 1, rank: int = 0):
    """x [B, T, D] and ids [B, T] of one rank of a (dp, tp) stage; all together are one micro-batch."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NUM_SAMPLES, SEQ_LEN, WIDTH, generator=generator)
    ids = FIRST_SAMPLE * SEQ_LEN + torch.arange(NUM_SAMPLES * SEQ_LEN).view(NUM_SAMPLES, SEQ_LEN)
    dp_rank, tp_rank = divmod(rank, tp)
    mine = slice(dp_rank * NUM_SAMPLES // dp, (dp_rank + 1) * NUM_SAMPLES // dp)
    part = slice(tp_rank * SEQ_LEN // tp, (tp_rank + 1) * SEQ_LEN // tp)
    return x[mine, part].contiguous(), ids[mine, part].contiguous()


def run_gate(gate, x, ids, device="cpu", count_segments=True):
    """Everything a gate gives, and the gradients of (balance loss + a fixed mix of the weights)."""
    x = x.flatten(0, 1).to(device).requires_grad_()
    flat = ids.flatten().to(device)
    routing = gate(x, flat, num_segments=ids.shape[0] if count_segments else None)
    mix = uniform(99, flat, routing.weight_TK.shape[1])
    objective = routing.balance_loss + (routing.weight_TK * mix).sum()
    params = [*gate.parameters(), x]
    if objective.requires_grad:
        grads = torch.autograd.grad(objective, params, allow_unused=True)
    else:
        grads = [None] * len(params)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    return {
        "ids": flat.cpu(),
        "experts": routing.expert_idx_TK.cpu(),
        "weights": routing.weight_TK.detach().cpu(),
        "loss": routing.balance_loss.detach().cpu(),
        "params": [g.cpu() for g in grads[:-1]],
        "x": grads[-1].cpu(),
        "max_copies": routing.max_copies,
    }


def run_layouts(world_rank: int, num_ranks: int, device_type: str):
    device = torch.device(device_type, world_rank) if device_type == "cuda" else torch.device("cpu")
    results = {}
    for dp, tp in LAYOUTS[num_ranks]:
        tokens = make_tokens(dp, tp, world_rank)
        for kind, top_k, capacity in PLAN_FREE:
            gate = make_gate(kind, top_k, capacity, group=dist.group.WORLD, device=device)
            for count_segments in (True, False):
                result = run_gate(gate, *tokens, device, count_segments)
                results[dp, tp, kind, top_k, capacity, count_segments] = result
    return results


def _check_layouts(results_W):
    for key in results_W[0]:
        dp, tp, kind, top_k, capacity, _ = key
        whole = run_gate(make_gate(kind, top_k, capacity), *make_tokens())
        parts = [results[key] for results in results_W]
        order = torch.argsort(torch.cat([part["ids"] for part in parts]))
        label = f"{kind} k={top_k} capacity={capacity} dp{dp} tp{tp}"
        experts = torch.cat([part["experts"] for part in parts])[order]
        assert torch.equal(experts, whole["experts"]), f"{label}: other experts or other dropped copies"
        for name in ("weights", "x"):
            joined = torch.cat([part[name] for part in parts])[order]
            oracle.assert_close(joined, whole[name], torch.float32, f"{label}: {name}")
        oracle.assert_close(sum(part["loss"] for part in parts), whole["loss"], torch.float32, f"{label}: loss")
        for index, want in enumerate(whole["params"]):
            got = sum(part["params"][index] for part in parts)
            oracle.assert_close(got, want, torch.float32, f"{label}: gradient of parameter {index}")


def test_global_scope_equals_one_process_under_every_layout():
    _check_layouts(spawn(run_layouts, 4, 4, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_global_scope_on_gpus(num_ranks):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    _check_layouts(spawn(run_layouts, num_ranks, num_ranks, "cuda", backend="nccl"))


@pytest.mark.parametrize("kind, top_k, capacity", PLAN_FREE)
def test_local_scope_is_this_rank_alone_and_never_communicates(kind, top_k, capacity):
    tokens = make_tokens(2, 2, 3)
    local = run_gate(make_gate(kind, top_k, capacity, scope="local", group=FakeGroup(4)), *tokens)
    alone = run_gate(make_gate(kind, top_k, capacity), *tokens)
    assert torch.equal(local["experts"], alone["experts"])
    assert torch.allclose(local["loss"] * 4, alone["loss"])
    if capacity is not None:
        assert local["max_copies"] >= max((local["experts"] == e).sum() for e in range(5))


@pytest.mark.parametrize("kind, top_k, capacity", [case for case in PLAN_FREE if case[2] and case[0] != "gshard"])
def test_capacity_admits_in_the_order_of_k_then_token(kind, top_k, capacity):
    shuffled = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(1))
    x, ids = (t[shuffled] for t in make_tokens())
    free = run_gate(make_gate(kind, top_k), x, ids)
    limited = run_gate(make_gate(kind, top_k, capacity), x, ids)
    limit = capacity_limit(capacity, ids.numel(), top_k, 5)
    keep = oracle.admitted_copies(free["experts"], ids.flatten(), limit)
    assert torch.equal(limited["experts"], torch.where(keep, free["experts"], -1))
    assert torch.equal(limited["weights"], torch.where(keep, free["weights"], 0))
    assert kind == "swipe" or not keep.all()


def test_naive_is_top_k_with_a_softmax_over_the_chosen():
    gate, (x, ids) = make_gate("naive", 3), make_tokens()
    result = run_gate(gate, x, ids)
    logits = x.flatten(0, 1).double() @ gate.weight_ED.double().t() + gate.bias_E.double()
    assert torch.equal(result["experts"], logits.argsort(1, descending=True)[:, :3])
    want = oracle.naive_weights(
        x.flatten(0, 1).double(), gate.weight_ED.double(), gate.bias_E.double(), result["experts"]
    )
    oracle.assert_close(result["weights"], want.detach(), torch.float32)
    assert result["loss"] == 0


def _fractions(expert_idx_T, num_experts=5):
    return torch.stack([(expert_idx_T == e).double().mean() for e in range(num_experts)])


def test_gshard_loss_takes_first_choices_and_mean_probabilities():
    gate, (x, ids) = make_gate("gshard", 2, 0.6), make_tokens()
    logits = x.flatten(0, 1).double() @ gate.weight_ED.double().t() + gate.bias_E.double()
    want = 5 * (_fractions(logits.argmax(1)) * logits.softmax(1).mean(0)).sum()
    assert torch.allclose(run_gate(gate, x, ids)["loss"].double(), want)


def test_gshard_keeps_the_second_expert_when_twice_its_weight_beats_the_dice():
    gate, (x, ids) = make_gate("gshard", 2), make_tokens()
    result = run_gate(gate, x, ids)
    naive = run_gate(make_gate("naive", 2), x, ids)
    keep = 2 * naive["weights"][:, 1] > uniform(gate.key, ids.flatten(), 1)[:, 0]
    assert 0 < keep.sum() < keep.numel()
    assert torch.equal(result["experts"][:, 1], torch.where(keep, naive["experts"][:, 1], -1))
    assert torch.equal(result["experts"][:, 0], naive["experts"][:, 0])
    assert torch.equal(result["weights"], torch.where(result["experts"] >= 0, naive["weights"], 0))


def test_switch_takes_one_expert_by_its_probability_and_counts_kept_tokens():
    gate, (x, ids) = make_gate("switch", 1, 0.6), make_tokens()
    jitter = 0.1 * (2 * uniform(gate.key, ids.flatten(), 5).double() - 1)
    logits = x.flatten(0, 1).double() @ gate.weight_ED.double().t() + gate.bias_E.double() + jitter
    result, prob = run_gate(gate, x, ids), logits.softmax(1).detach()
    kept = result["experts"][:, 0] >= 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(result["experts"][kept, 0], prob.argmax(1)[kept])
    oracle.assert_close(result["weights"][kept, 0], prob.amax(1)[kept], torch.float32)
    want = 5 * (_fractions(result["experts"][kept, 0]) * prob.sum(0) / kept.sum()).sum()
    assert torch.allclose(result["loss"].double(), want)
    assert torch.equal(
        make_gate("switch", 1).eval()(x.flatten(0, 1), ids.flatten()).expert_idx_TK[:, 0], _plain_top1(x)
    )


def _plain_top1(x):
    gate = make_gate("naive", 1)
    return gate(x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1])).expert_idx_TK[:, 0]


def test_noisy_loss_is_the_variation_of_importance_and_of_expected_load():
    gate, (x, ids) = make_gate("noisy", 2), make_tokens()
    result = run_gate(gate, x, ids)
    x64 = x.flatten(0, 1).double()
    clean = x64 @ gate.weight_ED.double().t()
    scale = torch.log1p(torch.exp(x64 @ gate.noise_weight_ED.double().t())) + 1e-2
    noisy = clean + normal(gate.key, ids.flatten(), 5).double() * scale
    top = noisy.argsort(1, descending=True)
    assert torch.equal(result["experts"], top[:, :2])
    importance, load = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for t in range(x64.shape[0]):
        weight = noisy[t, top[t, :2]].softmax(0)
        for k in range(2):
            importance[top[t, k]] += weight[k].detach()
        for e in range(5):
            others = noisy[t, [other for other in range(5) if other != e]].sort(descending=True).values
            load[e] += 0.5 * (1 + math.erf((clean[t, e] - others[1]).item() / scale[t, e].item() / math.sqrt(2)))
    want = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    assert torch.allclose(result["loss"].double(), want, rtol=1e-4)


def test_swipe_levels_experts_and_moves_only_what_must_move():
    x, ids = make_tokens()
    naive, swipe = run_gate(make_gate("naive", 2), x, ids), run_gate(make_gate("swipe", 2), x, ids)
    limit = capacity_limit(1.0, ids.numel(), 2, 5)
    assert max((naive["experts"] == e).sum() for e in range(5)) > limit
    free, want = [limit] * 5, naive["experts"].clone()
    for k in range(2):
        waiting = []
        for t in range(ids.numel()):
            if free[want[t, k]]:
                free[want[t, k]] -= 1
            else:
                waiting.append(t)
        for t in waiting:
            want[t, k] = next(e for e in range(5) if free[e])
            free[want[t, k]] -= 1
    assert torch.equal(swipe["experts"], want)
    level = make_gate("swipe", 2).eval()(x.flatten(0, 1), ids.flatten()).expert_idx_TK
    assert torch.equal(level, naive["experts"]), "nothing is moved outside training"


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 1.0])
def test_faster_lets_only_the_best_tokens_leave_the_node(fraction):
    x, ids = make_tokens()
    gate = make_gate("faster", 2, outgoing_fraction=fraction, num_experts=8)
    naive = run_gate(make_gate("naive", 2, num_experts=8), x, ids)
    gate.set_placement(np.array([3, 2, 1, 0, 3, 2, 1, 0]), [0, 0, 1, 1], ep_rank=1)
    far = torch.tensor([True, True, False, False] * 2)
    result, first = run_gate(gate, x, ids), naive["experts"][:, 0]
    allowance, leaving = int(fraction * ids.numel()), far[first].sum()
    if leaving < allowance:
        assert torch.equal(result["experts"], naive["experts"])
        return
    assert far[result["experts"]].sum() == allowance
    logits = x.flatten(0, 1) @ gate.weight_ED.t() + gate.bias_E
    best = logits.amax(1).masked_fill(~far[first], -1e9).topk(allowance).indices
    assert torch.equal(result["experts"][best, 1], first[best])
    near = logits.masked_fill(far, -1e9)
    assert torch.equal(result["experts"][:, 0], near.argmax(1))
    assert torch.allclose(result["weights"].sum(1), torch.ones(ids.numel()))


def test_faster_drops_choices_that_a_node_cannot_offer():
    x, ids = make_tokens()
    gate = make_gate("faster", 2, outgoing_fraction=0.0, num_experts=4)
    gate.set_placement(np.array([0, 1, 1, 1]), [0, 1], ep_rank=0)
    result = run_gate(gate, x, ids)
    assert result["experts"].tolist() == [[0, -1]] * ids.numel()
    assert not any(torch.isnan(grad).any() for grad in result["params"])
    gate.set_placement(np.array([1, 1, 1, 1]), [0, 1], ep_rank=0)
    result = run_gate(gate, x, ids)
    assert (result["experts"] == -1).all() and not torch.isnan(result["weights"]).any()
    assert not any(torch.isnan(grad).any() for grad in result["params"])


def write_trace(path, counts):
    np.savez(path, counts=np.asarray(counts, dtype=np.int32), iteration=np.arange(len(counts)))
    return str(path)


def test_trace_gives_experts_their_shares_and_tokens_different_experts(tmp_path):
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 60, (3, 2, 4, 2, 5)) * generator.integers(0, 2, (3, 1, 4, 1, 5))
    counts[..., 0] += 1
    trace = write_trace(tmp_path / "t.npz", counts)
    for layer_idx in (1, 6):
        gate = make_gate("trace", 2, trace=trace, layer_idx=layer_idx)
        for iteration in range(4):
            ids = iteration * NUM_SAMPLES * SEQ_LEN + torch.arange(NUM_SAMPLES * SEQ_LEN)
            experts = gate(torch.randn(len(ids), WIDTH), ids).expert_idx_TK
            want = scale_counts(counts[iteration % 3, :, layer_idx % 4].sum((0, 1)), 2 * len(ids))
            assert torch.bincount(experts.flatten(), minlength=5).tolist() == want.tolist()
            twice = (experts[:, 0] == experts[:, 1]).sum()
            assert twice == max(0, want.max() - len(ids))
            sample = torch.bincount(experts.view(NUM_SAMPLES, -1)[3], minlength=5) * NUM_SAMPLES
            assert (sample - torch.from_numpy(want)).abs().max() <= 3 * NUM_SAMPLES, (
                "a sample has nearly the same shares"
            )
            part = gate(torch.randn(5, WIDTH), ids[10:15]).expert_idx_TK
            assert torch.equal(part, experts[10:15]), "only the token's id decides"


def test_trace_may_be_a_class_of_skew():
    gate = make_gate("trace", 2, trace="synthetic:one-hot,iterations=3,share=0.5", layer_idx=1)
    ids = torch.arange(NUM_SAMPLES * SEQ_LEN)
    load = torch.bincount(gate(torch.randn(len(ids), WIDTH), ids).expert_idx_TK.flatten(), minlength=5)
    assert load.max() / load.sum() == pytest.approx(0.5, abs=0.03) and len(load) == 5
    with pytest.raises(ValueError, match="synthetic:odd.*zipf-mild"):
        make_gate("trace", 2, trace="synthetic:odd")


def test_trace_says_what_does_not_fit(tmp_path):
    trace = write_trace(tmp_path / "t.npz", np.ones((1, 1, 1, 1, 4)))
    with pytest.raises(ValueError, match="4 experts, the model has 5"):
        make_gate("trace", 2, trace=trace)
    with pytest.raises(ValueError, match="global_batch_size"):
        make_gate("trace", 2, trace=trace, num_experts=4, global_batch_size=None)
    np.savez(tmp_path / "other.npz", other=np.ones(3))
    with pytest.raises(ValueError, match="counts"):
        make_gate("trace", 2, trace=str(tmp_path / "other.npz"))


@pytest.mark.parametrize(
    "count, total, want", [([1, 1, 1], 10, [4, 3, 3]), ([0, 0], 5, [3, 2]), ([7, 0, 3], 0, [0, 0, 0])]
)
def test_scale_counts_by_largest_remainder(count, total, want):
    assert scale_counts(np.array(count), total).tolist() == want


@pytest.mark.parametrize("kind", ["naive", "switch", "gshard", "noisy", "swipe"])
def test_a_rank_without_samples_routes_nothing_by_its_own_capacity(kind):
    top_k, (x, ids) = TOP_K.get(kind, (2,))[0], (part[:0] for part in make_tokens())
    routing = run_gate(make_gate(kind, top_k, capacity=1.0, scope="local", group=FakeGroup(2)), x, ids)
    assert routing["experts"].shape == (0, top_k) and math.isfinite(routing["loss"])
    if kind == "naive":
        with pytest.raises(ValueError, match="this rank has none: give it some, or take gate.scope"):
            run_gate(make_gate(kind, top_k, capacity=1.0, group=FakeGroup(2)), x, ids)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_the_slope_of_the_variation_is_that_of_autograd(num_experts):
    stat = torch.rand(3, num_experts, dtype=torch.float64).requires_grad_()
    stat.data[2] = 0
    (want,) = torch.autograd.grad(gates._cv_squared(stat).sum(), stat)
    torch.testing.assert_close(gates._cv_squared_slope(stat.detach()), want)


def test_a_recomputed_gate_runs_once_in_forward_and_once_in_backward(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    gate, (x, ids) = make_gate("noisy", 2, group=FakeGroup(2)), make_tokens()
    x, calls = x.flatten(0, 1).requires_grad_(), []

    def block(x):
        calls.append(1)
        return gate(x, ids.flatten()).balance_loss

    loss = checkpoint(block, x, use_reentrant=False)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2 and x.grad.any()


@pytest.mark.parametrize("kind", ["noisy", "switch", "gshard"])
def test_dice_depend_on_seed_layer_and_token_only(kind):
    top_k, (x, ids) = TOP_K.get(kind, (2,))[0], make_tokens()
    first, again = (run_gate(make_gate(kind, top_k), x, ids) for _ in range(2))
    assert torch.equal(first["experts"], again["experts"]) and torch.equal(first["weights"], again["weights"])
    shuffled = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(2))
    other = run_gate(make_gate(kind, top_k), x[shuffled], ids[shuffled])
    assert torch.equal(other["experts"][torch.argsort(other["ids"])], first["experts"])
    other_layer = run_gate(make_gate(kind, top_k, layer_idx=4), x, ids)
    assert not torch.equal(other_layer["weights"], first["weights"])


@pytest.mark.parametrize("kind", ["naive", "noisy", "switch", "gshard", "swipe", "faster", "zero"])
def test_no_tokens_one_expert_and_low_precision(kind):
    top_k = 1 if kind == "switch" else 2
    gate = make_gate(kind, top_k, 1.0)
    empty = gate(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64))
    assert empty.expert_idx_TK.shape == (0, top_k) and not torch.isnan(empty.balance_loss)
    routing = gate(torch.randn(16, WIDTH).bfloat16(), torch.arange(16))
    assert routing.weight_TK.dtype == routing.balance_loss.dtype == torch.float32
    assert all(param.dtype == torch.float32 and param.parallel == "dense" for param in gate.parameters())
    if kind not in ("gshard", "faster"):
        single = make_gate(kind, 1, num_experts=1)(torch.randn(4, WIDTH), torch.arange(4))
        assert single.expert_idx_TK.tolist() == [[0]] * 4 and not torch.isnan(single.balance_loss)


def test_unknown_kind_and_wrong_top_k_are_refused():
    with pytest.raises(ValueError, match="not one of naive"):
        make_gate("other", 2)
    with pytest.raises(ValueError, match="top_k = 1"):
        make_gate("switch", 2)
    with pytest.raises(ValueError, match="top_k = 2"):
        make_gate("gshard", 3)
