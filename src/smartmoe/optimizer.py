"""AdamW on fp32 masters, with gradient norm, clipping and overflow decisions that are the same on every rank.

The gradient norm is summed in an order that depends neither on where experts live nor on the rank that computes it: one
entry per logical expert and layer, one per tensor slice, one per stage. So a migration does not change a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from smartmoe.config import Workload
from smartmoe.mesh import Mesh
from smartmoe.parallel.data import KINDS, GradientBuffers, ParamRef, Share
from smartmoe.placement import Placement


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did: global gradient norm before clipping, whether the step was skipped for overflow."""

    grad_norm: float
    skipped: bool
    loss_scale: float
    lr: float


class MixedAdamW:
    """torch.optim.AdamW over fp32 masters of one rank's shares of its parameters (parallel.data.Share).

    A master shares the parameter's storage when that is fp32 already and the share is all of it. placement_of(name) gives
    the current Placement of the layer that an expert parameter belongs to. num_layers and num_experts are the model's, over
    all stages.
    """

    def __init__(
        self,
        buffers: GradientBuffers,
        workload: Workload,
        mesh: Mesh,
        num_layers: int,
        num_experts: int,
        placement_of: Callable[[str], Placement],
    ):
        self.buffers = buffers
        self.workload = workload
        self.mesh = mesh
        self._num_layers, self._num_experts = num_layers, num_experts
        self._placement_of = placement_of
        self.loss_scale = workload.initial_loss_scale if workload.dtype == "float16" else 1.0
        self.good_steps = 0
        self.masters = [_master(share) for share in buffers.shares]
        decayed = [m for m, ref in zip(self.masters, buffers.refs, strict=True) if _is_matrix(ref)]
        others = [m for m, ref in zip(self.masters, buffers.refs, strict=True) if not _is_matrix(ref)]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": workload.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=workload.lr,
            betas=(workload.adam_beta1, workload.adam_beta2),
            eps=workload.adam_eps,
            fused=True,
        )
        for master, share in zip(self.masters, buffers.shares, strict=True):
            master.grad = share.grad
            # State exists from the start, so that a migration or a checkpoint before the first step sees all of it.
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def state_tensors(self, ref_idx: int) -> dict[str, torch.Tensor]:
        """fp32 master and both moments of parameter `ref_idx`, each shaped like this rank's share of it."""
        master = self.masters[ref_idx]
        state = self.adamw.state[master]
        return {"master": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def scalars(self) -> dict[str, float]:
        """What a checkpoint keeps beside the tensors."""
        steps = int(next(iter(self.adamw.state.values()))["step"])
        return {"optimizer_steps": steps, "loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def set_scalars(self, saved: dict[str, float]) -> None:
        """Take back what `scalars` gave. Raises KeyError when one is missing."""
        for state in self.adamw.state.values():
            state["step"].fill_(saved["optimizer_steps"])
        self.loss_scale, self.good_steps = float(saved["loss_scale"]), int(saved["good_steps"])

    @torch.no_grad()
    def refresh_params(self) -> None:
        """Write the masters into the compute-precision parameters. Collective where those are shared by several."""
        self.buffers.publish(self.masters)

    @torch.no_grad()
    def step(self, iteration: int) -> StepResult:
        """Reduce gradients, clip by the global norm and update; skip the update on every rank when the norm is not finite.

        iteration: from 0, sets the learning rate. Collective over all groups; synchronises with the host once.
        """
        self.buffers.reduce()
        if self.loss_scale != 1.0:
            self.buffers.scale(1.0 / self.loss_scale)
        norm = self.grad_norm()
        lr, scale_used = learning_rate(self.workload, iteration), self.loss_scale
        skipped = not math.isfinite(norm)
        self._adjust_loss_scale(skipped)
        if not skipped:
            if 0 < self.workload.clip_grad < norm:
                self.buffers.scale(self.workload.clip_grad / (norm + 1e-6))
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.refresh_params()
        self.buffers.zero()
        return StepResult(norm, skipped, scale_used, lr)

    def _adjust_loss_scale(self, overflow: bool) -> None:
        if self.workload.dtype != "float16":
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps == 1000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradients. Collective over the world; synchronises with the host."""
        plan, mesh = self.mesh.plan, self.mesh
        # Entries: one per stage and share (dense), per stage, tensor slice and share, per layer, logical expert and share.
        # Each is written by exactly one rank, so summing over ranks is exact and the order of the final sum is fixed.
        shares_of = {ref.kind: share.num for ref, share in zip(self.buffers.refs, self.buffers.shares, strict=True)}
        num_dense, num_tensor, num_expert = (shares_of.get(kind, 1) for kind in KINDS)
        first_tensor = plan.pp * num_dense
        first_expert = first_tensor + plan.pp * plan.tp * num_tensor
        num_entries = first_expert + self._num_layers * self._num_experts * num_expert
        parts = torch.zeros(num_entries, dtype=torch.float64, device=mesh.device)
        for ref, share in zip(self.buffers.refs, self.buffers.shares, strict=True):
            if share.idx is None or not share.grad.numel():
                continue
            if ref.kind == "dense":
                parts[mesh.pp_stage * num_dense + share.idx] += _square_sum(share.grad)
            elif ref.kind == "tensor":
                slice_idx = mesh.pp_stage * plan.tp + mesh.tp_rank
                parts[first_tensor + slice_idx * num_tensor + share.idx] += _square_sum(share.grad)
            else:
                placement = self._placement_of(ref.name)
                slots = range(mesh.ep_rank * placement.slots_per_rank, (mesh.ep_rank + 1) * placement.slots_per_rank)
                hosted = torch.tensor([placement.expert_of_slot[slot] for slot in slots], device=mesh.device)
                # An empty slot (-1) has no gradient: its zero may go to any entry of the layer.
                expert = layer_of(ref.name) * self._num_experts + hosted.clamp(min=0)
                entry = first_expert + expert * num_expert + share.idx
                parts.index_add_(0, entry, _square_sum(share.grad.flatten(1), dim=1))
        if mesh.world_group is not None:
            dist.all_reduce(parts, group=mesh.world_group)
        return math.sqrt(total) if math.isfinite(total := parts.sum().item()) else math.nan


def learning_rate(workload: Workload, iteration: int) -> float:
    """Linear warm-up, then cosine decay from `lr` to `min_lr` at the last iteration; `iteration` counts from 0."""
    if iteration < workload.lr_warmup_iterations:
        return workload.lr * (iteration + 1) / workload.lr_warmup_iterations
    span = max(1, workload.iterations - workload.lr_warmup_iterations)
    progress = min(1.0, (iteration - workload.lr_warmup_iterations) / span)
    return workload.min_lr + 0.5 * (workload.lr - workload.min_lr) * (1 + math.cos(math.pi * progress))


def layer_of(name: str) -> int:
    """Layer index of a parameter called `blocks.<layer>.<...>`."""
    return int(name.split("blocks.")[1].split(".")[0])


def _square_sum(grad: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(grad, dim=dim, dtype=torch.float64).square()


def _master(share: Share) -> torch.Tensor:
    is_whole = share.num == 1 and share.value.dtype == torch.float32
    if is_whole:
        return share.value
    return share.value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _is_matrix(ref: ParamRef) -> bool:
    return ref.local.dim() - (ref.kind == "expert") >= 2
