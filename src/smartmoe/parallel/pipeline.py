"""Pipeline parallelism: which blocks a stage has, and one step of all micro-batches through the stages.

The schedules are PyTorch's own (`torch.distributed.pipelining`): 1F1B, and interleaved 1F1B when a rank has several
chunks of the model. One stage is a plain loop over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from smartmoe.mesh import Mesh


class Player(Protocol):
    """Who may have recorded the passes of a micro-batch, see smartmoe.graphs."""

    def prepare(self, *sample: torch.Tensor) -> None:
        """An iteration begins, whose micro-batches have inputs like `sample`."""

    def play(self, place: int, *inputs: torch.Tensor) -> bool:
        """Run the passes of micro-batch `place`; False = they are not recorded and have not run."""


def chunk_layers(num_layers: int, num_chunks: int) -> list[range]:
    """Contiguous layers of each model chunk in order; the first chunks get one more where it does not divide."""
    base, extra = divmod(num_layers, num_chunks)
    starts = [chunk * base + min(chunk, extra) for chunk in range(num_chunks + 1)]
    return [range(starts[chunk], starts[chunk + 1]) for chunk in range(num_chunks)]


def chunks_of_stage(pp_stage: int, pp: int, vpp: int) -> list[int]:
    """Model chunks of a pipeline rank: every pp-th, so that interleaving passes through all ranks `vpp` times."""
    return [pp_stage + turn * pp for turn in range(vpp)]


class MicroBatchRunner:
    """Forward and backward of all micro-batches of an iteration on this rank's model chunks.

    chunks: this rank's modules in order. loss_fn(cross-entropy sum [1], balance loss [1]) gives the scalar to
    differentiate. activation_shape: (samples per micro-batch, tokens of a sample on this rank, D), with `dtype` what
    stages exchange. player: asked before each pass where there is one stage, None = passes run as they are.
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
        self._schedule = None
        if mesh.plan.pp > 1:
            self._schedule = self._build_schedule(mesh, activation_shape, dtype)

    def _build_schedule(self, mesh: Mesh, activation_shape: tuple[int, int, int], dtype: torch.dtype):
        plan = mesh.plan
        stages = []
        for chunk, stage_idx in zip(self.chunks, chunks_of_stage(mesh.pp_stage, plan.pp, plan.vpp), strict=True):
            # Shapes are stated, so that no stage has to run once on dummies to find them.
            tokens = torch.empty(activation_shape[:2], dtype=torch.int64, device="meta")
            hidden = torch.empty(activation_shape, dtype=dtype, device="meta", requires_grad=True)
            scalar = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
            stages.append(
                PipelineStage(
                    chunk,
                    stage_idx,
                    plan.pp * plan.vpp,
                    mesh.device,
                    input_args=(tokens,) if stage_idx == 0 else (hidden, scalar),
                    output_args=(scalar, scalar) if stage_idx == plan.pp * plan.vpp - 1 else (hidden, scalar),
                    group=mesh.pp_group,
                )
            )
        if plan.vpp == 1:
            return Schedule1F1B(stages[0], self.num_micro_batches, loss_fn=self._loss, scale_grads=False)
        return ScheduleInterleaved1F1B(stages, self.num_micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        self._totals += torch.cat(output).detach()
        return self._loss_fn(*output)

    def one_pass(self, token: torch.Tensor, token_id: torch.Tensor, target: torch.Tensor) -> None:
        """Forward and backward of one micro-batch, [B, T] int64 each, where there is one stage; the losses are added to
        those of the iteration. Collective over the stage."""
        self._loss(self.chunks[0](token, token_id_BT=token_id, target_BT=target), target).backward()

    def run(self, token: torch.Tensor, token_id: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Run forward and backward of one iteration; gradients go to the parameters' hooks.

        token, token_id, target: [num_micro_batches * B, T] int64. Collective over the pipeline and the stage.
        Returns [2] float32: cross-entropy sum and balance loss sum over the micro-batches, zero where this rank does not
        hold the last stage.
        """
        self._totals.zero_()
        kwargs = {"token_id_BT": token_id, "target_BT": target}
        if self._schedule is None:
            pieces = (tensor.chunk(self.num_micro_batches) for tensor in (token, token_id, target))
            micro_batches = list(zip(*pieces, strict=True))
            if self.player is not None:
                self.player.prepare(*micro_batches[0])
            for place, inputs in enumerate(micro_batches):
                if self.player is None or not self.player.play(place, *inputs):
                    self.one_pass(*inputs)
        else:
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
