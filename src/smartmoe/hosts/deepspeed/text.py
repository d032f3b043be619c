"""Micro-batches of text as tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from smartmoe.data import TokenDataset


def micro_batch(tokens: TokenDataset, samples: Iterable[int], seq_len: int, device: torch.device):
    """(token_BT, target_BT, token_id_BT) of the samples with these numbers, all [B, T] int64 on `device`: the tokens, the next
    ones, and sample * T + position."""
    sample_B = np.array(list(samples))
    window = torch.from_numpy(np.stack([tokens.sample(int(idx), seq_len) for idx in sample_B])).to(device)
    token_id = torch.from_numpy(sample_B).to(device).unsqueeze(1) * seq_len + torch.arange(seq_len, device=device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous(), token_id
