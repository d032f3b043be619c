"""Random numbers by hash: fixed for all time, evenly spread, and unrelated between tokens, columns and keys."""

import pytest
import torch

from smartmoe.ops.hashing import make_key, normal, uniform


def test_values_are_pinned():
    """A change here changes every run that noise or jitter touches."""
    assert make_key(1234, 0, "gate") == make_key(1234, 0, "gate") != make_key(1234, 1, "gate")
    assert make_key("a", "b") != make_key("ab")
    values = uniform(42, torch.tensor([0, 1, 2**40]), 2)
    want = [_splitmix_uniform(42, token, column) for token in (0, 1, 2**40) for column in (1, 2)]
    assert values.flatten().tolist() == want


def splitmix(z):
    """SplitMix64's finaliser with Python's unbounded integers."""
    mask = (1 << 64) - 1
    z &= mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _splitmix_uniform(key, token, column):
    bits = splitmix(splitmix(token + key) + column * 0x9E3779B97F4A7C15)
    return ((bits >> 41) + 0.5) * 2.0**-23


def test_uniform_is_uniform_and_independent():
    u = uniform(make_key("test"), torch.arange(1 << 16), 4).double()
    assert 0 < u.min() and u.max() < 1
    shares = torch.histc(u, 64, 0, 1) / u.numel() * 64
    assert (shares - 1).abs().max() < 0.08
    centred = u - 0.5
    lagged = (centred[1:] * centred[:-1]).mean().abs() * 12
    across = (centred[:, 0] * centred[:, 1]).mean().abs() * 12
    other = ((uniform(make_key("other"), torch.arange(1 << 16), 4).double() - 0.5) * centred).mean().abs() * 12
    assert max(lagged, across, other) < 0.015


def test_normal_has_its_moments():
    z = normal(make_key("test"), torch.arange(1 << 16), 2).double()
    assert torch.isfinite(z).all()
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.15


@pytest.mark.gpu
def test_a_gpu_throws_the_same_dice():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ids = torch.randint(0, 2**50, (1000,))
    assert torch.equal(uniform(3, ids, 5), uniform(3, ids.cuda(), 5).cpu())
