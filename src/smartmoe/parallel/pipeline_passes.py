"""What may be recorded of a micro-batch: its passes as calls that read and write tensors that keep their place.

Where there is one stage that is one call, forward and backward together. In a pipeline forward and backward of several
micro-batches interleave on a stage: each chunk has two calls for every micro-batch that can be in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Pass(Protocol):
    """One micro-batch's way through a chunk. inputs: tensors in their places; parts: the calls, to be made in this order,
    each of which launches the same for all that stands in the inputs."""

    inputs: tuple[torch.Tensor, ...]
    parts: tuple[Callable[[], None], ...]


class Played(Protocol):
    """A recorded Pass."""

    work: Pass

    def launch(self, part_idx: int) -> None:
        """Run a part of it from its recording."""


class Player(Protocol):
    """Who may have recorded the passes of a micro-batch, see smartmoe.graphs."""

    def prepare(self, *sample: torch.Tensor) -> None:
        """An iteration begins, whose micro-batches have inputs like `sample`."""

    def pick(self, chunk: int, place: int) -> Played | None:
        """The recording for micro-batch `place` of the iteration on this rank's chunk, None = there is none."""


class Source(Protocol):
    """Where the passes of a chunk come from. num_slots: the most of them that are in flight at once: pass m may use what
    pass m - num_slots has used."""

    num_slots: int

    def make(self, *sample: torch.Tensor) -> Pass:
        """A pass with places of its own, for micro-batches whose tokens, ids and targets, [B, T] int64, are like `sample`."""


class WholePass:
    """Forward and backward together: run(*inputs)."""

    def __init__(self, run: Callable[..., None], sample: Sequence[torch.Tensor]):
        self.inputs = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in sample)
        self.parts = (lambda: run(*self.inputs),)


class WholeSource:
    """Passes of the only chunk there is: one at a time."""

    num_slots = 1

    def __init__(self, run: Callable[..., None]):
        self._run = run

    def make(self, *sample: torch.Tensor) -> WholePass:
        return WholePass(self._run, sample)


class ChunkPass:
    """Forward, then backward through a chunk of a pipeline.

    run(*inputs) gives the outputs; the first num_activations inputs have gradients. output_grads: places for the gradients of
    the outputs, none = the first output is what is differentiated. After the first part `outputs` is there, after the second
    `input_grads`, those of the activations.
    """

    def __init__(self, run: Callable, inputs: Sequence[torch.Tensor], num_activations: int, output_grads):
        self.inputs, self._num_activations, self.output_grads = tuple(inputs), num_activations, tuple(output_grads)
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.input_grads: tuple[torch.Tensor, ...] = ()
        self.parts = (self._forward, self._backward)
        self._run, self._leaves, self._roots = run, (), ()

    def _forward(self) -> None:
        self._leaves = tuple(tensor.detach().requires_grad_() for tensor in self.inputs[: self._num_activations])
        self._roots = self._run(*self._leaves, *self.inputs[self._num_activations :])
        self.outputs = tuple(root.detach() for root in self._roots)

    def _backward(self) -> None:
        leaves, roots = self._leaves, self._roots[: len(self.output_grads) or 1]
        self._leaves = self._roots = ()  # nothing of the graph outlives its backward pass
        torch.autograd.backward(roots, self.output_grads or None)
        self.input_grads = tuple(leaf.grad for leaf in leaves)


class ChunkSource:
    """Passes of one chunk of a pipeline.

    run(*activations, token_id, target) with the first chunk's tokens, or activations and balance loss: its outputs.
    activations: what a later chunk receives, given as tensors of that shape and dtype; is_first, is_last: whether the chunk
    is. num_slots: see Source.
    """

    def __init__(self, run: Callable, activations: Sequence[torch.Tensor], is_first: bool, is_last: bool, num_slots: int):
        self._run, self._activations, self.num_slots = run, tuple(activations), num_slots
        self._is_first, self._is_last = is_first, is_last

    def make(self, token: torch.Tensor, *others: torch.Tensor) -> ChunkPass:
        received = [] if self._is_first else self._places(token.device)
        given = [torch.empty_like(t).copy_(t) for t in ((token, *others) if self._is_first else others)]
        grads = [] if self._is_last else self._places(token.device)
        return ChunkPass(self._run, [*received, *given], len(received), grads)

    def _places(self, device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(like.shape, dtype=like.dtype, device=device) for like in self._activations]


class PlayChunk(torch.autograd.Function):
    """A recorded pass of a chunk as a function of (played, anchor, *inputs); its backward pass is the recorded one. anchor:
    any tensor that requires a gradient, as tokens do not."""

    @staticmethod
    def forward(ctx, played: Played, anchor, *inputs):
        ctx.played, ctx.num_inputs = played, len(inputs)
        ctx.set_materialize_grads(False)
        fill(played.work.inputs, inputs)
        played.launch(0)
        return tuple(output.detach() for output in played.work.outputs)

    @staticmethod
    def backward(ctx, *grads):
        work = ctx.played.work
        fill(work.output_grads, grads[: len(work.output_grads)])
        ctx.played.launch(1)
        # copies, as whoever gets them may keep them, or add to them
        found = [grad.clone() for grad in work.input_grads]
        return None, None, *found, *[None] * (ctx.num_inputs - len(found))


def fill(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy each value to its place."""
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
