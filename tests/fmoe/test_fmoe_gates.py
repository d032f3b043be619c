"""FastMoE's gates against their definitions, written out token by token."""

import math
from functools import partial

import pytest
import torch

from fmoe import FMoE
from fmoe.gates import BaseGate, FasterGate, GShardGate, NaiveGate, NoisyGate, ZeroGate, gen_faster_gate
from fmoe.gates.base_gate import BaseGate as ByItsFile

D, L, W = 8, 3, 2
E = L * W


@pytest.fixture
def x_TD():
    torch.manual_seed(0)
    return torch.randn(20, D)


def test_a_base_gate_keeps_a_loss_until_it_is_fetched():
    assert ByItsFile is BaseGate
    gate = BaseGate(L, W)
    assert gate.tot_expert == E and not gate.has_loss and gate.get_loss() is None
    gate.set_loss(torch.tensor(2.0))
    assert gate.has_loss and gate.get_loss(clear=False) == 2 and gate.get_loss() == 2 and not gate.has_loss


@pytest.mark.parametrize("bias", [True, False])
def test_naive(x_TD, bias):
    gate = NaiveGate(D, L, W, top_k=3, gate_bias=bias)
    expert_idx_TK, score_TK, logits_TE = gate(x_TD, return_all_scores=True)
    assert (gate.gate.bias is not None) == bias and logits_TE.shape == (20, E)
    for chosen, scores, logits in zip(expert_idx_TK.tolist(), score_TK, logits_TE, strict=True):
        assert chosen == sorted(range(E), key=lambda e: -logits[e])[:3]
        torch.testing.assert_close(scores, logits[chosen].exp() / logits[chosen].exp().sum())
    assert gate.get_loss() == 0


def test_gate_bias_is_for_gates_that_have_one(x_TD):
    """As in FastMoE: a class that is no NaiveGate is not told."""
    assert FMoE(L, D, gate=NaiveGate, gate_bias=False).gate.gate.bias is None
    assert FMoE(L, D, gate=partial(GShardGate, random_routing=False), gate_bias=False).gate.gate.bias is None
    assert isinstance(FMoE(L, D, gate=NoisyGate, gate_bias=False).gate, NoisyGate)


def test_zero(x_TD):
    expert_idx_TK, score_TK = ZeroGate(D, L, W, top_k=2)(x_TD)
    assert expert_idx_TK.shape == (20, 2) and not expert_idx_TK.any() and (score_TK == 0.5).all()


def first_choice_loss(logits_TE):
    first, prob_TE = logits_TE.argmax(1).tolist(), logits_TE.softmax(1)
    return sum(first.count(e) / 20 * prob_TE[:, e].mean() for e in range(E)) / E * L**2


@pytest.mark.parametrize("training, limit", [(True, math.ceil(0.5 * 20) * 2 // E), (False, math.ceil(0.9 * 20) * 2 // E)])
def test_gshard_limits_this_workers_copies(x_TD, training, limit):
    gate = GShardGate(D, L, W, topk=2, capacity=(0.5, 0.9), random_routing=False).train(training)
    expert_idx_TK, score_TK = gate(x_TD)
    logits_TE, taken = gate.gate(x_TD), [0] * E
    for chosen, row in zip(logits_TE.topk(2).indices.tolist(), expert_idx_TK.tolist(), strict=True):
        for k in range(2):
            assert row[k] == (chosen[k] if taken[chosen[k]] < limit else -1)
            taken[chosen[k]] += 1
    assert max(taken) > limit
    torch.testing.assert_close(score_TK, logits_TE.topk(2).values.softmax(1))
    torch.testing.assert_close(gate.get_loss(), first_choice_loss(logits_TE))


def test_gshard_drops_second_choices_at_random(x_TD):
    gate = GShardGate(D, L, W, capacity=(9, 9))
    x_TD = x_TD.repeat(50, 1)
    expert_idx_TK, score_TK = gate(x_TD)
    assert (expert_idx_TK[:, 0] >= 0).all()
    assert abs((expert_idx_TK[:, 1] >= 0).float().mean() - (2 * score_TK[:, 1]).mean()) < 0.06  # 4 standard deviations


def test_noisy_starts_with_drawn_weights():
    """At zero all tokens of an evaluation go to the same experts."""
    torch.manual_seed(0)
    gate = NoisyGate(100, L, W)
    for weight in (gate.w_gate, gate.w_noise):
        assert 0.95 < weight.abs().max() * math.sqrt(E) <= 1 and abs(weight.mean()) < 0.1


def test_noisy_without_noise_is_naive(x_TD):
    gate = NoisyGate(D, L, W, top_k=2)
    torch.nn.init.normal_(gate.w_gate)
    gate.eval()
    logits_TE = x_TD @ gate.w_gate
    expert_idx_TK, score_TK = gate(x_TD)
    assert torch.equal(expert_idx_TK, logits_TE.topk(2).indices)
    importance_E, load_E = torch.zeros(E), torch.zeros(E)
    for chosen, scores in zip(expert_idx_TK.tolist(), score_TK.tolist(), strict=True):
        for expert, score in zip(chosen, scores, strict=True):
            importance_E[expert] += score
            load_E[expert] += 1
    want = sum(v.var() / v.mean() ** 2 for v in (importance_E, load_E))
    torch.testing.assert_close(gate.get_loss(), want)


def test_noisy_expects_the_load_that_noise_gives(x_TD, monkeypatch):
    """The share of draws in which an expert is among the first, all else as it fell, is the load in its loss."""
    gate = NoisyGate(D, L, W, top_k=2)
    torch.nn.init.normal_(gate.w_gate)
    torch.nn.init.normal_(gate.w_noise)
    loads = []
    monkeypatch.setattr("fmoe.gates.noisy_gate._cv_squared", lambda value_E: loads.append(value_E) or value_E.sum())
    torch.manual_seed(1)
    gate(x_TD)
    torch.manual_seed(1)
    clean_TE, width_TE = x_TD @ gate.w_gate, torch.nn.functional.softplus(x_TD @ gate.w_noise) + 0.01
    noisy_TE = clean_TE + torch.randn_like(clean_TE) * width_TE
    load_E = torch.zeros(E)
    for e in range(E):
        others_TX = torch.cat([noisy_TE[:, :e], noisy_TE[:, e + 1 :]], 1)
        bar_T = others_TX.topk(2).values[:, 1]
        load_E[e] = torch.distributions.Normal(clean_TE[:, e], width_TE[:, e]).cdf(bar_T).neg().add(1).sum()
    torch.testing.assert_close(loads[1], load_E)
    loads[1].sum().backward()
    assert gate.w_noise.grad.abs().sum() > 0


@pytest.mark.parametrize("fraction", [0.9, 0.2, 0.0])
def test_faster_limits_who_leaves_the_node(x_TD, fraction, monkeypatch):
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "1")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", str(fraction))
    gate = gen_faster_gate(rank=1)(D, L, W)
    assert isinstance(gate, FasterGate) and gate.node_rank == 1
    logits_TE, near = gate.gate(x_TD), range(L, E)
    expert_idx_TK, score_TK = gate(x_TD)
    order = [sorted(range(E), key=lambda e, row=row: -row[e]) for row in logits_TE.tolist()]
    leaving = [t for t in range(20) if order[t][0] not in near]
    assert 4 < len(leaving) < 18
    may = sorted(leaving, key=lambda t: -logits_TE[t, order[t][0]])[: int(20 * fraction)]
    for t, row in enumerate(expert_idx_TK.tolist()):
        if len(leaving) < int(20 * fraction):
            assert row == order[t][:2]
        else:
            stay = [e for e in order[t] if e in near]
            assert row == [stay[0], order[t][0] if t in may else stay[1]]
    torch.testing.assert_close(score_TK, logits_TE.gather(1, expert_idx_TK).softmax(1))
    torch.testing.assert_close(gate.get_loss(), first_choice_loss(logits_TE))
    with pytest.raises(ValueError, match="top_k must be 2"):
        gen_faster_gate(0)(D, L, W, top_k=1)
