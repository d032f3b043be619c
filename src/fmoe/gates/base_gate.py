"""What every gate is."""

from __future__ import annotations

from torch import nn


class BaseGate(nn.Module):
    """A module that is called with the layer's input [T, D] and returns (experts [T, K] int64, scores [T, K]).

    tot_expert: experts of all workers; an expert's number is worker * num_expert + its place there, -1 drops the copy.
    """

    def __init__(self, num_expert: int, world_size: int):
        super().__init__()
        self.num_expert, self.world_size, self.tot_expert = num_expert, world_size, num_expert * world_size
        self.loss = None

    def set_loss(self, loss) -> None:
        """Leave the balance loss of this pass for the training loop."""
        self.loss = loss

    def get_loss(self, clear: bool = True):
        """The balance loss of the last pass, None where there is none; it is forgotten with `clear`."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None
