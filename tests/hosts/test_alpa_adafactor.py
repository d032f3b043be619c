"""The artifact's Adafactor: without momentum it is torch's, and the first moment is an average of its updates."""

import pytest
import torch

from smartmoe.hosts.deepspeed_alpa.adafactor import MomentumAdafactor

TOLERANCE = 2e-6
SHAPES = ((7,), (5, 8), (3, 4, 6), (1,))


def steps(make, num=6):
    """Parameters after each step under the same gradients, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer, history = make(params), [[param.detach().clone() for param in params]]
    for _ in range(num):
        for scale, param in zip((1e-3, 1.0, 30.0, 1.0), params, strict=True):
            param.grad = scale * torch.randn(param.shape, generator=generator)
        optimizer.step()
        history.append([param.detach().clone() for param in params])
    return history


def test_without_momentum_it_is_torchs():
    ours = steps(lambda params: MomentumAdafactor(params, beta1=0.0, weight_decay=0.0))
    theirs = steps(lambda params: torch.optim.Adafactor(params, lr=1e-2, weight_decay=0.0))
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a - b).abs().max() <= TOLERANCE


def test_the_first_moment_averages_updates():
    plain = steps(lambda params: MomentumAdafactor(params, beta1=0.0, weight_decay=0.0), num=1)
    momentum = steps(lambda params: MomentumAdafactor(params, beta1=0.9, weight_decay=0.0), num=1)
    for start, after, slow in zip(plain[0], plain[1], momentum[1], strict=True):
        torch.testing.assert_close(start - slow, 0.1 * (start - after), rtol=1e-3, atol=1e-7)


def test_weight_decay_follows_the_relative_step():
    """p shrinks by decay * max(1e-3, RMS(p)) * min(1e-2, 1 / sqrt(t)) when gradients are zero."""
    param = torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = MomentumAdafactor([param], weight_decay=0.5)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert param.tolist() == pytest.approx([2.0 * (1 - 0.5 * 2.0 * 1e-2)] * 4)
    assert set(optimizer.state[param]) == {"step", "first", "second"}
