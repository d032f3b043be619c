"""AdamW on fp32 masters, with gradient norm, clipping and overflow decisions that are the same on every rank.

The gradient norm is summed in an order that depends neither on where experts live nor on the rank that computes it: one
entry per logical expert and layer, one per tensor slice, one per stage. So a migration does not change a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from smartmoe.config import Workload
from smartmoe.mesh import Mesh
from smartmoe.ops.adamw import Hyperparameters, adamw_, can_fuse
from smartmoe.parallel.data import GradientBuffers, ParamRef, Share
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
        self._norm = GradientNorm(buffers, mesh, num_layers, num_experts, placement_of)
        self.loss_scale = workload.initial_loss_scale if workload.dtype == "float16" else 1.0
        self.good_steps = self.num_steps = 0
        self.masters = [_master(share) for share in buffers.shares]
        buffers.adopt(self.masters)
        self._decayed = [idx for idx, ref in enumerate(buffers.refs) if _is_matrix(ref)]
        self._others = [idx for idx, ref in enumerate(buffers.refs) if not _is_matrix(ref)]
        # the largest first: a GPU is busy with them while the host launches the others, one by one
        self._by_size = sorted(range(len(buffers.refs)), key=lambda idx: -self.masters[idx].numel())
        groups = ((self._decayed, workload.weight_decay), (self._others, 0.0))
        self.adamw = torch.optim.AdamW(
            [{"params": [self.masters[idx] for idx in members], "weight_decay": decay} for members, decay in groups],
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
        return {"optimizer_steps": self.num_steps, "loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def set_scalars(self, saved: dict[str, float], dtype: str) -> None:
        """Take back what `scalars` gave, the scale of the loss only from a run in this one's dtype: another run had none, or
        one that is not wanted here. Raises KeyError when one is missing.

        dtype: workload.dtype of the run that saved."""
        for state in self.adamw.state.values():
            state["step"].fill_(saved["optimizer_steps"])
        self.num_steps = int(saved["optimizer_steps"])
        if dtype == self.workload.dtype:
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
        self.buffers.reduce(self._norm.begin)
        norm, scale_used = self.grad_norm() / self.loss_scale, self.loss_scale
        lr, clip = learning_rate(self.workload, iteration), self.workload.clip_grad
        skipped = not math.isfinite(norm)
        self._adjust_loss_scale(skipped)
        if not skipped:
            self._update(lr, (clip / (norm + 1e-6) if 0 < clip < norm else 1.0) / scale_used)
        self.buffers.zero()
        return StepResult(norm, skipped, scale_used, lr)

    def _update(self, lr: float, grad_scale: float) -> None:
        """Update the masters from the gradients times grad_scale, and write them into the parameters."""
        self.num_steps += 1
        if not can_fuse(self.masters[0]):
            if grad_scale != 1.0:
                self.buffers.scale(grad_scale)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.refresh_params()
            return
        work, decayed = self.workload, set(self._decayed)
        with_ = Hyperparameters(lr, work.adam_beta1, work.adam_beta2, work.adam_eps, work.weight_decay, self.num_steps)
        without_decay = replace(with_, weight_decay=0.0)
        for idx in self._by_size:
            master, share, state = self.masters[idx], self.buffers.shares[idx], self.adamw.state[self.masters[idx]]
            is_apart = share.num == 1 and master.data_ptr() != share.value.data_ptr()
            weight = share.value if is_apart else None
            how = with_ if idx in decayed else without_decay
            adamw_(master, share.grad, state["exp_avg"], state["exp_avg_sq"], weight, grad_scale, how)
        self.buffers.publish(self.masters, only_cut=True)

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
        return self._norm.compute()


class GradientNorm:
    """The global L2 norm of reduced gradients, in float64, from a few launches however many parameters there are.

    Squares are summed into entries: one per stage and share (dense), per stage, tensor slice and share, per layer, logical
    expert and share. Each is written by exactly one rank, so summing over ranks is exact and the order of the final sum
    is fixed. An expert's entry is the sum over its tensors in their order, wherever the expert lives.
    """

    def __init__(self, buffers: GradientBuffers, mesh: Mesh, num_layers: int, num_experts: int, placement_of):
        plan, self._mesh, self._placement_of = mesh.plan, mesh, placement_of
        pairs = list(zip(buffers.refs, buffers.shares, strict=True))
        num_of = {ref.kind: share.num for ref, share in pairs}
        num_dense, num_tensor = num_of["dense"], num_of.get("tensor", 1)
        # not as this stage's experts are cut: it may have none, and the entries are the same on every rank
        self._num_shares = plan.expert_dp if num_dense > 1 else 1
        first_tensor = plan.pp * num_dense
        self._first_expert, self._num_experts = first_tensor + plan.pp * plan.tp * num_tensor, num_experts
        self._num_entries = self._first_expert + num_layers * num_experts * self._num_shares
        mine = [(ref, share) for ref, share in pairs if share.idx is not None and share.grad.numel()]
        self._views: list[torch.Tensor] = []
        self._own: list[int] = []  # views that no other rank adds to
        self._norms: dict[int, torch.Tensor] = {}  # of views, where `begin` found them
        self._sums: list[tuple[int, slice]] = []  # entry, views
        for kind, first, num, part in (
            ("dense", 0, num_dense, mesh.pp_stage),
            ("tensor", first_tensor, num_tensor, mesh.pp_stage * plan.tp + mesh.tp_rank),
        ):
            shares = [share for ref, share in mine if ref.kind == kind]
            if shares:
                start = len(self._views)
                self._views += [share.grad for share in shares]
                if not buffers.is_reduced(kind):
                    self._own += range(start, len(self._views))
                self._sums.append((first + part * num + shares[0].idx, slice(start, len(self._views))))
        self._num_whole = len(self._views)
        experts = [(ref, share) for ref, share in mine if ref.kind == "expert"]
        self._views += [grad for _, share in experts for grad in share.grad.unbind()]
        if not buffers.is_reduced("expert"):
            self._own += range(self._num_whole, len(self._views))
        self._names = list({layer_of(ref.name): ref.name for ref, _ in experts}.values())  # of one parameter a layer
        self._share_idx = experts[0][1].idx if experts else 0
        self._where: tuple[list[Placement], torch.Tensor] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Do what can be done while other gradients are still being reduced: the norms of those that no other rank shares, as
        they are now. `compute` goes on from there. Neither collective nor synchronising."""
        self._take_norms(self._own)

    def _take_norms(self, places: list[int]) -> None:
        norms = torch._foreach_norm([self._views[place] for place in places], 2, torch.float64) if places else []
        self._norms |= zip(places, norms, strict=True)

    @torch.no_grad()
    def compute(self) -> float:
        """Collective over the world; synchronises with the host. NaN where a gradient is not finite."""
        mesh = self._mesh
        # one entry more, for empty slots
        parts = torch.zeros(self._num_entries + 1, dtype=torch.float64, device=mesh.device)
        if self._views:
            self._take_norms([place for place in range(len(self._views)) if place not in self._norms])
            squares = torch.stack([self._norms[place] for place in range(len(self._views))]).square()
            self._norms.clear()
            for entry, views in self._sums:
                parts[entry] = squares[views].sum()
            if self._names:
                total_YL, *others = squares[self._num_whole :].view(len(self._names), -1, self._num_slots()).unbind(1)
                for square_YL in others:
                    total_YL = total_YL + square_YL
                parts.index_copy_(0, self._entries(), total_YL.flatten())
        parts = parts[:-1]
        if mesh.world_group is not None:
            dist.all_reduce(parts, group=mesh.world_group)
        return math.sqrt(total) if math.isfinite(total := parts.sum().item()) else math.nan

    def _num_slots(self) -> int:
        return self._placement_of(self._names[0]).slots_per_rank

    def _entries(self) -> torch.Tensor:
        """The entry of each layer's slots on this rank, on the device; made anew when experts have moved."""
        placements = [self._placement_of(name) for name in self._names]
        if self._where is None or self._where[0] != placements:
            entries = []
            for name, placement in zip(self._names, placements, strict=True):
                first_slot = self._mesh.ep_rank * placement.slots_per_rank
                for expert in placement.expert_of_slot[first_slot : first_slot + placement.slots_per_rank]:
                    place = (layer_of(name) * self._num_experts + expert) * self._num_shares + self._share_idx
                    entries.append(self._num_entries if expert < 0 else self._first_expert + place)
            self._where = placements, torch.tensor(entries, device=self._mesh.device)
        return self._where[1]


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


def _master(share: Share) -> torch.Tensor:
    is_whole = share.num == 1 and share.value.dtype == torch.float32
    if is_whole:
        return share.value
    return share.value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _is_matrix(ref: ParamRef) -> bool:
    return ref.local.dim() - (ref.kind == "expert") >= 2
