"""Pipeline parallelism: which blocks a stage has, and one step of all micro-batches through the stages.

The schedules are PyTorch's own (`torch.distributed.pipelining`): 1F1B, and interleaved 1F1B when a rank has several
chunks of the model. One stage is a plain loop over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from smartmoe.mesh import Mesh
from smartmoe.parallel.pipeline_passes import ChunkSource, PlayChunk, Player, Source, WholeSource, fill
from smartmoe.planner.schedule import most_in_flight


def chunk_layers(num_layers: int, num_chunks: int) -> list[range]:
    """Contiguous layers of each model chunk in order; the first chunks get one more where it does not divide."""
    base, extra = divmod(num_layers, num_chunks)
    starts = [chunk * base + min(chunk, extra) for chunk in range(num_chunks + 1)]
    return [range(starts[chunk], starts[chunk + 1]) for chunk in range(num_chunks)]


def chunks_of_stage(pp_stage: int, pp: int, vpp: int) -> list[int]:
    """Model chunks of a pipeline rank: every pp-th, so that interleaving passes through all ranks `vpp` times."""
    return [pp_stage + turn * pp for turn in range(vpp)]


class _Stage(nn.Module):
    """A chunk as the schedule runs it, micro-batch after micro-batch of an iteration: from a recording where there is one.
    The last chunk's first output is the loss to differentiate, [1]."""

    def __init__(self, chunk: nn.Module, chunk_idx: int, loss_fn: Callable[[tuple], torch.Tensor]):
        super().__init__()
        self.chunk, self._chunk_idx, self._loss_fn = chunk, chunk_idx, loss_fn
        self._player, self._place, self._anchor = None, 0, torch.zeros(0, requires_grad=True)

    def begin(self, player: Player | None) -> None:
        """The micro-batches of an iteration follow."""
        self._player, self._place = player, 0

    def forward(self, *inputs: torch.Tensor, token_id_BT: torch.Tensor, target_BT: torch.Tensor):
        inputs = (*inputs, token_id_BT, target_BT)
        played = None if self._player is None else self._player.pick(self._chunk_idx, self._place)
        self._place += 1
        return self.run(*inputs) if played is None else PlayChunk.apply(played, self._anchor, *inputs)

    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's outputs from (tokens or activations and balance loss, token_id, target)."""
        *activations, token_id_BT, target_BT = inputs
        outputs = self.chunk(*activations, token_id_BT=token_id_BT, target_BT=target_BT)
        return (self._loss_fn(outputs).view(1), outputs[1]) if self.chunk.is_last else outputs


class MicroBatchRunner:
    """Forward and backward of all micro-batches of an iteration on this rank's model chunks.

    chunks: this rank's modules in order. loss_fn(cross-entropy sum [1], balance loss [1]) gives the scalar to
    differentiate. activation_shape: (samples per micro-batch, tokens of a sample on this rank, D), with `dtype` what
    stages exchange. player: asked before each pass, None = passes run as they are. sources: for it, one for each chunk.
    """

    player: Player | None = None

    def __init__(
        self,
        chunks: list[nn.Module],
        mesh: Mesh,
        num_micro_batches: int,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        activation_shape: tuple[int, int, int],
        dtype: torch.dtype,
    ):
        self.chunks = chunks
        self.num_micro_batches = num_micro_batches
        self._loss_fn = loss_fn
        self._totals = torch.zeros(2, device=mesh.device)
        self._schedule, self._stages = None, []
        self.sources: Sequence[Source] = (WholeSource(self.one_pass),)
        if mesh.plan.pp > 1:
            self._schedule = self._build_schedule(mesh, activation_shape, dtype)

    def _build_schedule(self, mesh: Mesh, activation_shape: tuple[int, int, int], dtype: torch.dtype):
        plan = mesh.plan
        # Shapes are stated, so that no stage has to run once on dummies to find them.
        tokens = torch.empty(activation_shape[:2], dtype=torch.int64, device="meta")
        hidden = torch.empty(activation_shape, dtype=dtype, device="meta", requires_grad=True)
        scalar = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        flights = most_in_flight(mesh.pp_stage, plan.pp, plan.vpp, self.num_micro_batches)
        self._stages = [_Stage(chunk, chunk_idx, self._loss) for chunk_idx, chunk in enumerate(self.chunks)]
        self.sources = [
            ChunkSource(stage.run, (hidden, scalar), stage.chunk.is_first, stage.chunk.is_last, num_slots)
            for stage, num_slots in zip(self._stages, flights, strict=True)
        ]
        stages = []
        for stage, stage_idx in zip(self._stages, chunks_of_stage(mesh.pp_stage, plan.pp, plan.vpp), strict=True):
            stages.append(
                PipelineStage(
                    stage,
                    stage_idx,
                    plan.pp * plan.vpp,
                    mesh.device,
                    input_args=(tokens,) if stage_idx == 0 else (hidden, scalar),
                    output_args=(scalar, scalar) if stage_idx == plan.pp * plan.vpp - 1 else (hidden, scalar),
                    group=mesh.pp_group,
                )
            )

        def loss_of(outputs, target):
            return outputs[0].view(())

        if plan.vpp == 1:
            return Schedule1F1B(stages[0], self.num_micro_batches, loss_fn=loss_of, scale_grads=False)
        return ScheduleInterleaved1F1B(stages, self.num_micro_batches, loss_fn=loss_of, scale_grads=False)

    def _loss(self, output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self._totals += torch.cat(output).detach()
        return self._loss_fn(*output)

    def one_pass(self, token: torch.Tensor, token_id: torch.Tensor, target: torch.Tensor) -> None:
        """Forward and backward of one micro-batch, [B, T] int64 each, where there is one stage; the losses are added to
        those of the iteration. Collective over the stage."""
        self._loss(self.chunks[0](token, token_id_BT=token_id, target_BT=target)).backward()

    def run(self, token: torch.Tensor, token_id: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Run forward and backward of one iteration; gradients go to the parameters' hooks.

        token, token_id, target: [num_micro_batches * B, T] int64. Collective over the pipeline and the stage.
        Returns [2] float32: cross-entropy sum and balance loss sum over the micro-batches, zero where this rank does not
        hold the last stage.
        """
        self._totals.zero_()
        kwargs = {"token_id_BT": token_id, "target_BT": target}
        pieces = (tensor.chunk(self.num_micro_batches) for tensor in (token, token_id, target))
        micro_batches = list(zip(*pieces, strict=True))
        if self.player is not None:
            self.player.prepare(*micro_batches[0])
        if self._schedule is None:
            for place, inputs in enumerate(micro_batches):
                played = None if self.player is None else self.player.pick(0, place)
                if played is None:
                    self.one_pass(*inputs)
                else:
                    fill(played.work.inputs, inputs)
                    played.launch(0)
        else:
            for stage in self._stages:
                stage.begin(self.player)
            args = (token,) if self.chunks[0].is_first else ()
            is_last = self.chunks[-1].is_last
            self._schedule.step(
                *args,
                target=target if is_last else None,
                losses=[] if is_last else None,
                return_outputs=False,
                **kwargs,
            )
        return self._totals.clone()
