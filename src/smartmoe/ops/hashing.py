"""Random numbers as a pure function of (key, token id): no generator state, so recomputation and every plan see the
same."""

from __future__ import annotations

import hashlib
import math

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def make_key(*parts: int | str) -> int:
    """Hash any names and numbers to a non-negative 63-bit key, equal in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts copy the sign bit: mask it away to get the logical shift that the mixing function needs
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def uniform(key: int, token_id_T: torch.Tensor, num: int) -> torch.Tensor:
    """`num` uniform numbers in the open interval (0, 1) for each token.

    key: from `make_key`; token_id_T: [T] int64. Returns [T, num] float32. Neither collective nor synchronising.
    Source: the finaliser of SplitMix64 (Steele et al., OOPSLA'14), applied to the token id and then to the column.
    """
    column = torch.arange(1, num + 1, device=token_id_T.device, dtype=torch.int64) * _GOLDEN
    bits = _mix(_mix(token_id_T + key).unsqueeze(1) + column)
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def buckets(token_id_T: torch.Tensor, num: int, num_buckets: int) -> torch.Tensor:
    """A bucket for each token and each of `num` columns: [T, num] int64 in 0 .. num_buckets - 1, a power of two.

    Bucket = SplitMix64's finaliser of (token id + (column + 1) * golden ratio), modulo num_buckets.
    """
    assert num_buckets > 0 and num_buckets & (num_buckets - 1) == 0, "buckets are taken from the low bits"
    column = torch.arange(1, num + 1, device=token_id_T.device, dtype=torch.int64) * _GOLDEN
    return _mix(token_id_T.unsqueeze(1) + column) & (num_buckets - 1)


def normal(key: int, token_id_T: torch.Tensor, num: int) -> torch.Tensor:
    """`num` standard normal numbers for each token: [T, num] float32, by the inverse of the normal distribution."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * uniform(key, token_id_T, num) - 1.0)
