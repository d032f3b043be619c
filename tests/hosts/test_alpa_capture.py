"""Captured blocks: the losses, gradients and random numbers of the same blocks called as they are."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartmoe.hosts.deepspeed_alpa.capture import capture_blocks, noise_of, tape_for
from tests.dist import gpu_backend, spawn

SHAPE = (2, 8, 16)
KEPT = []  # what lives until a process ends


class Block(nn.Module):
    """Random numbers, a parameter that is used twice, one that is never used, and a loss of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.3)
        self.never = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD, token_id_BT):
        h = self.dropout(torch.relu(self.up(x_BTD + token_id_BT.unsqueeze(-1) / 100)))
        return x_BTD + self.dropout(self.down(h)), h.float().square().mean()


def train(device, is_captured: bool, needs_loss: bool):
    """Two steps of two blocks: losses, final weights, and the next random number."""
    torch.manual_seed(3)
    blocks = nn.ModuleList(Block(SHAPE[-1]) for _ in range(2)).to(device)
    token_id_BT = torch.arange(SHAPE[0] * SHAPE[1], device=device).view(SHAPE[:2])
    torch.manual_seed(5)
    called = blocks
    if is_captured:
        tape = tape_for(torch.device(device))
        called = capture_blocks(blocks, torch.ones(SHAPE, device=device), token_id_BT, tape, needs_loss=needs_loss)
    losses = []
    for step in range(3):
        x = torch.linspace(-1, 1, blocks[0].never.numel() * 16, device=device).view(SHAPE).requires_grad_()
        total = 0.0
        y = x
        for block in called:
            y, loss = block(y, token_id_BT + step)
            total = total + 0.3 * loss if needs_loss else total
        total = total + y.float().square().mean()
        total.backward()
        losses += [total.item(), x.grad.float().norm().item()]
        with torch.no_grad():
            for param in blocks.parameters():
                if param.grad is not None:
                    param.sub_(param.grad, alpha=0.1)
                    param.grad = None
    assert blocks[0].never.grad is None
    return losses, [param.detach() for param in blocks.parameters()], torch.rand(4, device=device)


@pytest.mark.parametrize("needs_loss", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_captured_blocks_train_as_blocks_do(device, needs_loss):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    plain, captured = (train(torch.device(device), is_captured, needs_loss) for is_captured in (False, True))
    assert captured[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(captured[1], plain[1])
    assert torch.equal(captured[2], plain[2]), "as many random numbers were drawn"


class Exchanging(nn.Module):
    def forward(self, x_BTD, token_id_BT):
        y_BTD = x_BTD.clone()
        dist.all_reduce(y_BTD)
        return y_BTD, x_BTD.new_zeros(())


def world_with_captured_collectives(rank: int) -> float:
    """The groups end right after this, while the blocks are alive: they would wait for graphs without end."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    tape, x_BTD = tape_for(device), torch.full(SHAPE, rank + 1.0, device=device)
    blocks = capture_blocks([Exchanging()], x_BTD, torch.zeros(SHAPE[:2], device=device).long(), tape, needs_loss=False)
    with torch.no_grad():
        found = blocks[0](x_BTD, torch.zeros(SHAPE[:2], device=device).long())[0].mean().item()
    KEPT.extend(blocks)
    tape.clear()
    return found


@pytest.mark.gpu
def test_process_groups_end_after_the_tape_is_cleared():
    found = spawn(world_with_captured_collectives, 2, backend=gpu_backend(2), timeout_s=90.0)
    assert found == [3.0, 3.0]


def test_noise_goes_back():
    noise = noise_of(torch.device("cpu"))
    before = noise.get()
    first = torch.rand(3)
    noise.set(before)
    assert torch.equal(torch.rand(3), first)
