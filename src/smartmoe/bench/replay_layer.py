"""One MoE layer with what an optimizer keeps beside it, and training steps on it: what every replay consists of."""

from __future__ import annotations

import numpy as np
import torch

from smartmoe.config import OnlineConfig
from smartmoe.layer import MoELayer
from smartmoe.load_map import planned_load
from smartmoe.online import OnlinePlacement, guessed_sizes
from smartmoe.parallel.data import GradientBuffers
from smartmoe.replicas import HistoryReplication, return_all, send_all


class ReplayedLayer:
    """`layer` as a trainer treats it, but for the optimizer's arithmetic.

    A step is begin_step, work for each micro-batch, end_step, after_step. What moves with an expert is complete: weights, fp32
    masters (of 16-bit weights) and two moments. Replicas that stay for a step get their weights from begin_step on, and
    end_step returns what gradients have gathered. Gradients of several micro-batches are summed in float32, by the products
    that can (parallel.data).
    """

    def __init__(self, layer: MoELayer, ep_group, stage_group, online: OnlineConfig, num_micro_batches: int = 1):
        self.layer, self.online_config, self._num_micro_batches = layer, online, num_micro_batches
        self._ep_group, self._stage_group = ep_group, stage_group
        weights = list(layer.experts.parameters())
        extra = 2 if weights[0].dtype == torch.float32 else 3
        self.state = [w.data for w in weights]
        if online.policy != "static" and online.migrate:
            self.state += [torch.zeros_like(w, dtype=torch.float32) for w in weights for _ in range(extra)]
        named_params = list(layer.experts.named_parameters())
        self._buffers = GradientBuffers(named_params, {}) if num_micro_batches > 1 else None
        self._history = [layer.replication] if isinstance(layer.replication, HistoryReplication) else []
        sums = [ref.grad for ref in self._buffers.refs] if self._buffers else None
        self._owned_grads = [sums or [torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in self._history]
        self._online: OnlinePlacement | None = None

    @property
    def decides(self) -> bool:
        """Whether something is decided between iterations."""
        return self.online_config.policy != "static"

    def start_deciding(self) -> None:
        """From now on placement acts after steps, where anything is decided then. Before, steps warm up."""
        if not self.decides:
            return  # it would only report the load, and make the host wait for it
        self._online = OnlinePlacement(
            [self.layer], self.online_config, ep_group=self._ep_group, stage_group=self._stage_group,
            state_of=lambda _: self.state,
            sizes=[guessed_sizes(self.layer, self.online_config, self.state, self._num_micro_batches)],
        )  # fmt: skip

    def begin_step(self) -> None:
        """Collective over the expert group."""
        if self._history:
            send_all(self._history, self._ep_group)

    def work(self, x_BTD: torch.Tensor, token_id_BT: torch.Tensor, grad_BTD: torch.Tensor):
        """Forward and backward of one micro-batch: (output, gradient of the input). Collective over the expert group."""
        x_BTD = x_BTD.detach().requires_grad_()
        y_BTD, _ = self.layer(x_BTD, token_id_BT)
        y_BTD.backward(grad_BTD)
        return y_BTD.detach(), x_BTD.grad

    def prepare(self, number: int) -> None:
        """What placement can think about while the device works on the step of this number."""
        if self._online:
            self._online.prepare(number)

    def end_step(self) -> None:
        """Return replicas' gradients. Collective over the expert group."""
        if self._buffers:
            self._buffers.complete()
        if self._history:
            return_all(self._history, self._owned_grads, self._ep_group)

    def drop_gradients(self) -> None:
        for param in self.layer.parameters():
            param.grad = None
        if self._buffers:
            self._buffers.zero()

    def after_step(self, number: int) -> list[dict]:
        """What placement does after the step of this number (from 1); returns its events. Collective over the stage."""
        return self._online.after_step(number) if self._online else []

    def rank_load(self, count_MSE: np.ndarray) -> np.ndarray:
        """[W] token copies that each rank computes, as planned, when the sources hold these [M, W, E]."""
        layer = self.layer
        return planned_load(count_MSE, layer.placement, layer.replicas, getattr(layer.replication, "copy_cost", None))
