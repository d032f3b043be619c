"""The blocks that all models share, against the formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.blocks import Block, DenseMLP, add, run_block

WIDTH, FFN = 8, 12


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD, token_id_BT):
        y_BTD = self.weight(x_BTD) * token_id_BT.unsqueeze(2)
        return y_BTD, y_BTD.float().square().sum()


def _expected(params, x, token_id, has_experts):
    def norm(y, name):
        mean, var = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt() * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = x + norm(x, "attention_norm") @ params["attention.weight"].T
    h = norm(x, "mlp_norm")
    if has_experts:
        y = (h @ params["moe.weight.weight"].T) * token_id.unsqueeze(2)
        return x + y, y.square().sum()
    up = h @ params["mlp.up.weight"].T + params["mlp.up.bias"]
    return x + F.gelu(up, approximate="tanh") @ params["mlp.down.weight"].T, x.new_zeros(())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("has_experts", [False, True])
@pytest.mark.parametrize("has_update", [False, True])
def test_a_block_is_its_formula(has_update, has_experts, recompute):
    torch.manual_seed(0)
    mlp = None if has_experts else DenseMLP(WIDTH, FFN, bias=True)
    block = Block(WIDTH, nn.Linear(WIDTH, WIDTH, bias=False), _Experts() if has_experts else None, mlp)
    for param in block.parameters():  # norms that are not the identity, each its own
        nn.init.normal_(param, std=0.5)
    x, token_id, grad = torch.randn(2, 3, WIDTH, requires_grad=True), torch.arange(6).view(2, 3), torch.randn(2, 3, WIDTH)
    update = torch.randn(2, 3, WIDTH, requires_grad=True) if has_update else None
    y, more, balance_loss = run_block(block, x, update, token_id, recompute)
    assert (more is None) == recompute, "one tensor is kept for a block that is computed again"
    y = add(y, more)
    inputs, names = [x] if update is None else [x, update], [name for name, _ in block.named_parameters()]
    found = list(torch.autograd.grad((y * grad).sum() + balance_loss, [*inputs, *block.parameters()]))
    if has_update:
        torch.testing.assert_close(found.pop(1), found[0], rtol=0, atol=0)
        x = x + update

    params = {name: param.detach().double().requires_grad_() for name, param in block.named_parameters()}
    x = x.detach().double().requires_grad_()
    expected_y, expected_loss = _expected(params, x, token_id, has_experts)
    expected = torch.autograd.grad((expected_y * grad).sum() + expected_loss, [x, *params.values()])
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(balance_loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    for name, ours, theirs in zip(["x", *names], found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
