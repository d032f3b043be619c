"""Copies of hot experts inside Megatron-LM, whose buffers may own the memory of weights and gradients.

SmartMoE's layer computes owned experts and copies in one storage. With Megatron's distributed optimizer the parameters live
elsewhere: then the storage's owned part follows them after every step, which costs one more copy of the rank's experts in
their dtype; without it they are the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from smartmoe.layer import MoELayer
from smartmoe.replicas import CollectiveReplication, HistoryReplication, return_all, send_all


class Copies:
    """Keeps the copies of `layers` current, and brings their gradients to Megatron's. Without copies all does nothing.

    ep_group: of the layers, the same for all.
    """

    def __init__(self, layers: Sequence[MoELayer], ep_group):
        self._layers = [layer for layer in layers if layer.replication is not None]
        self._held = [layer for layer in self._layers if isinstance(layer.replication, HistoryReplication)]
        self._ep_group = ep_group
        self._num_bytes = 0

    def refresh(self) -> None:
        """After weights or placements changed: fill the storages, and send the copies that stay for whole steps.
        Collective over ep_group."""
        for layer in self._layers:
            layer.experts.follow_parameters()
        if self._held:
            self._num_bytes += send_all([layer.replication for layer in self._held], self._ep_group)

    def return_grads(self) -> None:
        """Add the gradients of copies to Megatron's `main_grad` of the owners, before it reduces them. Collective over
        ep_group."""
        if self._held:
            owned = [[p.main_grad for p in layer.experts.weights() if p is not None] for layer in self._held]
            self._num_bytes += return_all([layer.replication for layer in self._held], owned, self._ep_group)

    def take_bytes(self) -> int:
        """Sent by this rank for copies since the last call, weights and gradients, as far as the host knows it: see
        smartmoe.trainer.IterationResult."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        for layer in self._layers:
            if isinstance(layer.replication, CollectiveReplication):
                num_bytes += layer.replication.num_bytes
                layer.replication.num_bytes = 0
        return num_bytes

    def return_before(self, finalize):
        """Megatron's function that finishes gradients, with `return_grads` in front."""

        def finalize_with_copies(*args, **kwargs):
            self.return_grads()
            return finalize(*args, **kwargs)

        return finalize_with_copies if self._held else finalize
