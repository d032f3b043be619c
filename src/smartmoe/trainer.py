"""One rank's part of a training run: build the model of a RunConfig on a mesh, and run iterations of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from smartmoe import checkpoint
from smartmoe.blocks import init_weights
from smartmoe.config import RunConfig, to_dict
from smartmoe.controller import Sizes
from smartmoe.data import TokenDataset
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.graphs import CudaTape, PassGraphs, why_not
from smartmoe.images import ImageDataset
from smartmoe.layer import MoELayer
from smartmoe.mesh import Mesh, second_expert_group
from smartmoe.models import build_chunk, read_batch, send
from smartmoe.online import OnlinePlacement, bytes_of_replica, free_device_bytes, gathers_gradients
from smartmoe.optimizer import MixedAdamW, StepResult, layer_of
from smartmoe.parallel.data import KINDS
from smartmoe.parallel.pipeline import MicroBatchRunner, chunk_layers, chunks_of_stage
from smartmoe.parallel.tensor import apply_tensor_parallel
from smartmoe.parallel.zero_passes import make_buffers
from smartmoe.placement import Placement
from smartmoe.replicas import CollectiveReplication, EarlyReturn, HistoryReplication, return_all, send_all
from smartmoe.swin_sizes import block_sizes, num_targets


def _is_direct(layer: MoELayer) -> bool:
    return isinstance(layer.dispatcher, DirectDispatcher)


def wait_for(device: torch.device) -> None:
    """Return when all that was launched on the current stream is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True)
class IterationResult:
    """What one iteration gave, the same on every rank. step_ms is the slowest rank's, from when all have their batch until the
    update is done, experts are placed and, on a GPU, the next batch is read. Losses are means over the global batch;
    replica_bytes is the most that a rank sent of weights and gradients of replicas, as far as the host knows it: by
    collectives, and where kernels carry replicas that stay for whole steps, their weights alone. peak_memory_bytes is the
    most that tensors and graphs took of a GPU, on the fullest, since its peak was last reset; 0 on CPUs."""

    iteration: int
    step_ms: float
    lm_loss: float
    balance_loss: float
    optimizer: StepResult
    load_max_over_mean: float
    replica_bytes: int
    events: list[dict]
    stop_requested: bool
    peak_memory_bytes: int = 0


class Trainer:
    """Model, data and optimizer of `config` on this rank of `mesh`. Building it is collective over the world."""

    def __init__(self, config: RunConfig, mesh: Mesh, data: TokenDataset | ImageDataset):
        self.config, self.mesh, self.data = config, mesh, data
        self.iteration = 0
        self._reads_ahead = mesh.device.type == "cuda"  # a CPU has no time left over
        self._ahead: tuple[int, tuple[torch.Tensor, ...]] | None = None  # an iteration, from 0, and its batch
        model, plan, work = config.model, config.plan, config.workload
        self.dtype = getattr(torch, work.dtype)
        self.layers: dict[int, MoELayer] = {}
        self.chunks = self._build_chunks()
        named = [(name, p) for chunk in self.chunks for name, p in chunk.named_parameters()]
        groups = {"dense": mesh.stage_group, "tensor": mesh.dp_group, "expert": mesh.expert_dp_group}
        buffers = make_buffers(config, named, groups, self.chunks)
        if work.reduce_early and not work.zero:
            # gradients of replicas come to the owners' behind all passes
            kinds = [kind for kind in KINDS if kind != "expert" or config.online.replicate == "never"]
            buffers.reduce_early(config.num_micro_batches, kinds)
        self.optimizer = MixedAdamW(
            buffers,
            work,
            mesh,
            model.num_layers,
            model.num_experts,
            lambda name: self.layers[layer_of(name)].placement,
        )
        self._loss_scale = torch.ones((), device=mesh.device)  # a graph that was captured before reads it here
        self.runner = MicroBatchRunner(
            self.chunks,
            mesh,
            config.num_micro_batches,
            self._loss,
            (work.micro_batch_size, model.seq_len // plan.tp, model.hidden_size),
            self.dtype,
        )
        self._early = self._early_return()
        self.online = OnlinePlacement(
            list(self.layers.values()),
            config.online,
            ep_group=mesh.ep_group,
            stage_group=mesh.stage_group,
            state_of=self._expert_state,
            sizes=[self._sizes(layer) for layer in self.layers.values()],
            node_of_rank_W=self._nodes(),
            free_bytes=lambda: free_device_bytes(mesh.device, self.graphs.num_bytes),
        )
        reason = why_not(config, self.layers.values(), mesh.device)
        self.graphs = PassGraphs(
            self.runner.sources,
            buffers,
            list(self.layers.values()),
            self.online.watchers,
            num_passes=config.num_micro_batches,
            reason=reason,
            tape=None if reason else CudaTape(mesh.device),
            group=mesh.stage_group,
        )
        self.runner.player = self.graphs

    def _build_chunks(self) -> list[nn.Module]:
        config, mesh = self.config, self.mesh
        model, plan = config.model, config.plan
        ranges = chunk_layers(model.num_layers, plan.pp * plan.vpp)
        chunks = []
        for chunk_idx in chunks_of_stage(mesh.pp_stage, plan.pp, plan.vpp):
            chunk = build_chunk(model, self._make_moe, ranges[chunk_idx], recompute=plan.recompute)
            init_weights(chunk, config.workload.seed, model.num_layers)
            for name, param in chunk.named_parameters():
                if ".moe." not in name:  # MoE layers are made in their own precision, on the device
                    param.data = param.data.to(mesh.device, self.dtype)
            for buffer in chunk.buffers():
                buffer.data = buffer.data.to(mesh.device)
            apply_tensor_parallel(chunk.blocks, mesh.tp_group)
            chunks.append(chunk)
        return chunks

    def _make_moe(self, layer_idx: int) -> MoELayer:
        config, mesh = self.config, self.mesh
        layer = MoELayer(
            dataclasses.replace(config, model=block_sizes(config.model, layer_idx)),
            layer_idx=layer_idx,
            placement=Placement.identity(config.model.num_experts, config.plan.ep),
            ep_group=mesh.ep_group,
            stage_group=mesh.stage_group,
            dtype=self.dtype,
            device=mesh.device,
        )
        if _is_direct(layer):
            layer.dispatcher.waits_to_be_asked = True
        self.layers[layer_idx] = layer
        return layer

    def _loss(self, cross_entropy: torch.Tensor, balance_loss: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the loss; the sum over micro-batches and ranks is the loss of the global batch."""
        work = self.config.workload
        targets = work.global_batch_size * num_targets(self.config.model)
        weight = self.config.gate.balance_weight / self.config.num_micro_batches
        return (cross_entropy / targets + weight * balance_loss).sum() * self._loss_scale

    def _expert_state(self, layer: MoELayer) -> list[torch.Tensor]:
        """Everything that belongs to the experts of `layer`: weights, fp32 masters, both moments."""
        tensors = []
        for idx, ref in enumerate(self.optimizer.buffers.refs):
            if ref.kind == "expert" and layer_of(ref.name) == layer.layer_idx:
                state = list(self.optimizer.state_tensors(idx).values())
                is_master = state[0].data_ptr() == ref.local.data_ptr() or self.optimizer.buffers.is_away(idx)
                tensors += state if is_master else [ref.local, *state]
        return tensors

    def _sizes(self, layer: MoELayer) -> Sizes:
        """What online placement weighs for a layer, before it has measured how fast links are."""
        config = self.config
        model, cluster, element = block_sizes(config.model, layer.layer_idx), config.cluster, self.dtype.itemsize
        numel = sum(p.shape[1:].numel() for p in layer.experts.parameters())
        sharers = config.plan.expert_dp if config.workload.zero else 1
        masters_and_moments = 8 if self.dtype == torch.float32 and sharers == 1 else 12
        is_away = sharers > 1 and self.config.workload.zero == 3 and config.online.replicate == "never"
        num_micro_batches, is_gathered = config.num_micro_batches, gathers_gradients(layer)
        return Sizes(
            state_bytes=numel * element * (not is_away) + numel * masters_and_moments // sharers,
            replica_bytes=bytes_of_replica(config.online, numel, element, num_micro_batches, is_gathered),
            copy_bytes=4 * model.hidden_size * element,
            gbytes_per_s=cluster.intra_node_gbytes_per_s,
            node_gbytes_per_s=cluster.inter_node_gbytes_per_s,
        )

    def _nodes(self) -> tuple[int, ...] | None:
        """The node of each rank of this rank's expert group."""
        if self.mesh.ep_group is None:
            return None
        ranks = dist.get_process_group_ranks(self.mesh.ep_group)
        return tuple(rank // self.config.cluster.ranks_per_node for rank in ranks)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's (tokens, token ids, targets) of an iteration counted from 0, each [num_micro_batches * B, T] int64; of
        images see read_batch."""
        work, plan, seq_len = self.config.workload, self.config.plan, self.config.model.seq_len
        first = iteration * work.global_batch_size
        offsets = [
            (micro * plan.dp + self.mesh.dp_rank) * work.micro_batch_size + row
            for micro in range(self.config.num_micro_batches)
            for row in range(work.micro_batch_size)
        ]
        sample_B = np.array([first + offset for offset in offsets])
        if isinstance(self.data, ImageDataset):
            return read_batch(self.data, sample_B, self.config.model, self.mesh.device)
        tokens = torch.from_numpy(np.stack([self.data.sample(int(idx), seq_len) for idx in sample_B]))
        width = seq_len // plan.tp
        part = slice(self.mesh.tp_rank * width, (self.mesh.tp_rank + 1) * width)
        token_id = torch.from_numpy(sample_B)[:, None] * seq_len + torch.arange(seq_len)[None]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return tuple(send(t[:, part].contiguous(), self.mesh.device) for t in (inputs, token_id, targets))

    def _take_batch(self) -> tuple[torch.Tensor, ...]:
        """The batch of this iteration, read now unless it has been."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == self.iteration else self.batch(self.iteration)

    def _read_ahead(self) -> None:
        """Read the batch of the iteration that comes next, while a GPU works on the update, and send it there behind that.
        What is wrong with it is said when it is needed, and not in place of what this iteration gave."""
        if self._reads_ahead and self.iteration < self.config.workload.iterations:
            with contextlib.suppress(Exception):
                self._ahead = self.iteration, self.batch(self.iteration)

    def run_iteration(self, stop_requested: bool = False) -> IterationResult:
        """Train on the next global batch, then let online placement act. Collective over the world.

        stop_requested: this rank was asked to stop; the result says whether any rank was.
        """
        work, batch, good_steps = self.config.workload, self._take_batch(), self.optimizer.good_steps
        if self.mesh.world_group is not None:
            dist.barrier()
        start = time.perf_counter()
        result, losses, replica_bytes = self._step(batch)
        while result.skipped and self._ran_out_of_room():
            self.online.forget_passes()
            self.graphs.drop()
            self.optimizer.loss_scale, self.optimizer.good_steps = result.loss_scale, good_steps
            result, losses, more_bytes = self._step(batch)
            replica_bytes += more_bytes
        self.iteration += 1
        del batch  # so that there is never more than one
        self._read_ahead()
        with record_function("smartmoe placement"):
            events = self.online.after_step(self.iteration)
        wait_for(self.mesh.device)  # placement may not have, and the update may be on its way
        step_ms = (time.perf_counter() - start) * 1e3
        if self.mesh.world_group is not None:
            dist.all_reduce(losses)
        peak = self.graphs.peak_bytes()
        mine = [step_ms, self.online.load_max_over_mean(), replica_bytes, peak, stop_requested, self.graphs.is_outgrown()]
        worst = torch.tensor(list(map(float, mine)), dtype=torch.float64).to(self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        step_ms, load, replica_bytes, peak, stop, is_outgrown = worst.tolist()
        if is_outgrown:
            self.graphs.drop()
        targets = work.global_batch_size * num_targets(self.config.model)
        return IterationResult(
            iteration=self.iteration,
            step_ms=step_ms,
            lm_loss=losses[0].item() / targets,
            balance_loss=losses[1].item() / self.config.num_micro_batches,
            optimizer=result,
            load_max_over_mean=load,
            replica_bytes=int(replica_bytes),
            events=events,
            stop_requested=stop > 0,
            peak_memory_bytes=int(peak),
        )

    def _step(self, batch) -> tuple[StepResult, torch.Tensor, int]:
        """Passes and update: what the optimizer did, the losses, and the bytes that were sent for replicas."""
        with record_function("smartmoe passes"):
            replica_bytes = self.send_replicas()
            self._loss_scale.fill_(self.optimizer.loss_scale)
            losses = self.runner.run(*batch)
            replica_bytes += self._return_replica_grads()
        with record_function("smartmoe placement"):
            self.online.prepare(self.iteration + 1)
        with record_function("smartmoe optimizer"):
            return self.optimizer.step(self.iteration), losses, replica_bytes

    def send_replicas(self) -> int:
        """Fill the replica slots that stay for whole steps (online.replicate = "history") with the weights of now; returns
        bytes sent. `run_iteration` does so first. Collective over the expert group."""
        return send_all([layer.replication for layer in self._step_layers()], self.mesh.ep_group)

    def _step_layers(self) -> list[MoELayer]:
        return [layer for layer in self.layers.values() if isinstance(layer.replication, HistoryReplication)]

    def _owned_grads(self, layers: list[MoELayer]) -> list[list[torch.Tensor]]:
        grad_of = {id(ref.param): ref.grad for ref in self.optimizer.buffers.refs}
        return [[grad_of[id(p)] for p in layer.experts.weights() if p is not None] for layer in layers]

    def _early_return(self) -> EarlyReturn | None:
        if not self.config.online.return_early:
            return None
        layers, group = self._step_layers(), second_expert_group(self.mesh)
        replications, num_passes = [layer.replication for layer in layers], self.config.num_micro_batches
        return EarlyReturn(replications, self._owned_grads(layers), group, num_passes)

    def _return_replica_grads(self) -> int:
        """Add to the owners' gradients those that are still where the replicas are; returns the bytes sent for replicas
        since the passes began."""
        self.optimizer.buffers.complete()
        layers = self._step_layers()
        owned = self._owned_grads(layers)
        num_bytes = return_all([layer.replication for layer in layers], owned, self.mesh.ep_group, self._early)
        for layer in self.layers.values():
            if isinstance(layer.replication, CollectiveReplication):
                num_bytes += layer.replication.num_bytes
                layer.replication.num_bytes = 0
        return num_bytes

    def _ran_out_of_room(self) -> bool:
        """Whether the NaN that prevented a step comes from a direct dispatcher, of any rank, whose routing did not fit; it
        does now. Collective over the world.

        The host has just waited for the gradient norm and a skipped step launches no update: this wait is short.
        """
        found = [layer.dispatcher.overflow() for layer in self.layers.values() if _is_direct(layer)]
        needed = torch.tensor(max(found, default=0), device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(needed, op=dist.ReduceOp.MAX)
        return bool(needed)

    def close(self) -> None:
        """Let go of what must not outlive the process groups: a graph may hold their collectives. The trainer stays usable."""
        self.graphs.drop()

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the state after the last iteration. Collective over the world."""
        placements = {idx: layer.placement for idx, layer in self.layers.items()}
        facts = {
            "config": to_dict(self.config),
            "consumed_samples": self.iteration * self.config.workload.global_batch_size,
        }
        loads = self.online.saved_loads()
        return checkpoint.save(folder, self.iteration, self.optimizer, placements, facts, loads)

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint at `path`, written by any plan of the same model. Collective over the world.

        The saved placement is kept where it has this plan's number of ranks; otherwise experts start in plain order.
        Raises ValueError when the checkpoint is of another model or batch size, or damaged.
        """
        meta = checkpoint.read_meta_of(path, self.config)
        for idx, layer in self.layers.items():
            saved = meta["placements"].get(idx)
            if saved is not None and saved.num_ranks == self.config.plan.ep:
                layer.set_placement(saved)
        checkpoint.restore(path, self.optimizer, {idx: layer.placement for idx, layer in self.layers.items()})
        self.iteration = meta["iteration"]
        self.online.restore_loads(self.iteration, meta["loads"])
