"""The GPT on one device against its formula, token by token, in float64."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.config import ModelConfig
from smartmoe.gpt import GPT

MODEL = ModelConfig(num_layers=2, hidden_size=8, ffn_size=12, num_heads=2, seq_len=5, vocab_size=11, num_experts=2)


class _Experts(nn.Module):
    """Stands for an MoE layer: its output depends on the token's number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(8, 8, bias=False)

    def forward(self, x_BTD, token_id_BT):
        y_BTD = self.weight(x_BTD) * (1 + token_id_BT % 3).unsqueeze(2)
        return y_BTD, y_BTD.float().square().mean()


def _expected(p, token_BT, token_id_BT, target_BT):
    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x_BTD = p["token_embedding.weight"][token_BT] + p["position_embedding.weight"][token_id_BT % 5]
    balance_loss = 0.0
    for layer in ("blocks.0", "blocks.1"):
        h_BTD, y_BTD = norm(x_BTD, f"{layer}.attention_norm"), torch.zeros_like(x_BTD)
        for head in range(2):  # rows of qkv: by head, then q, k, v
            q, k, v = p[f"{layer}.attention.qkv.weight"][12 * head : 12 * (head + 1)].split(4)
            for t in range(5):  # a token sees itself and those before it
                seen = h_BTD[:, : t + 1]
                score_BU = torch.einsum("bd,bud->bu", h_BTD[:, t] @ q.T, seen @ k.T) / math.sqrt(4)
                value_BX = torch.einsum("bu,bux->bx", score_BU.softmax(-1), seen @ v.T)
                out_DX = p[f"{layer}.attention.out.weight"][:, 4 * head : 4 * (head + 1)]
                y_BTD[:, t] += value_BX @ out_DX.T
        x_BTD = x_BTD + y_BTD
        moe_BTD = norm(x_BTD, f"{layer}.mlp_norm") @ p[f"{layer}.moe.weight.weight"].T * (1 + token_id_BT % 3).unsqueeze(2)
        x_BTD, balance_loss = x_BTD + moe_BTD, balance_loss + moe_BTD.square().mean()
    logits_BTV = norm(x_BTD, "final_norm") @ p["head.weight"].T
    return -logits_BTV.log_softmax(-1).gather(2, target_BT.unsqueeze(2)).sum(), balance_loss


def test_a_gpt_is_its_formula():
    torch.manual_seed(0)
    model = GPT(MODEL, lambda layer_idx: _Experts())
    for param in model.parameters():
        nn.init.normal_(param, std=0.4)
    token_BT, target_BT = torch.randint(11, (2, 3, 5)).unbind(0)
    token_id_BT = torch.tensor([[4], [0], [7]]) * 5 + torch.arange(5)
    loss, balance_loss = model(token_BT, token_id_BT=token_id_BT, target_BT=target_BT)
    found = torch.autograd.grad((loss + 3 * balance_loss).sum(), list(model.parameters()))

    params = {name: param.detach().double().requires_grad_() for name, param in model.named_parameters()}
    expected_loss, expected_balance = _expected(params, token_BT, token_id_BT, target_BT)
    expected = torch.autograd.grad(expected_loss + 3 * expected_balance, list(params.values()))
    torch.testing.assert_close(loss[0].double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(balance_loss[0].double(), expected_balance, rtol=1e-5, atol=1e-5)
    for name, ours, theirs in zip(params, found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
