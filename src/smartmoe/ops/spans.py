"""Lists of tensors that one launch of a kernel works through, cut into spans of so many numbers, none across tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spans:
    """N places with R tensors each, of as many numbers, on their device. address_RN: [R, N] int64, 0 = there is none; size_N:
    int64 numbers of each; first_N1: [N + 1] int32, the first span of each, and behind them all how many there are; place_P: [P]
    int32, the place of each span."""

    address_RN: torch.Tensor
    size_N: torch.Tensor
    first_N1: torch.Tensor
    place_P: torch.Tensor

    @staticmethod
    def of(tensors_RN: Sequence[Sequence[torch.Tensor | None]], span: int) -> Spans:
        """Of contiguous tensors that keep their place; those of the first row are all there, and at least one."""
        first = tensors_RN[0]
        size_N = torch.tensor([tensor.numel() for tensor in first])
        num_N = (size_N + span - 1) // span
        first_N1 = torch.cat([num_N.new_zeros(1), num_N.cumsum(0)]).int()
        place_P = torch.repeat_interleave(torch.arange(len(first), dtype=torch.int32), num_N)
        address_RN = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in tensors_RN])
        return Spans(*(table.to(first[0].device) for table in (address_RN, size_N, first_N1, place_P)))
