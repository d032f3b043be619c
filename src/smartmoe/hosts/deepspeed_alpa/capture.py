"""Blocks of the model as CUDA graphs: one of a block's forward pass, one of that pass again and its backward pass.

With micro-batches of a few thousand tokens the host cannot launch kernels as fast as an H200 runs them. A captured block costs
the host some twenty launches instead of hundreds. DeepSpeed's engine notices nothing: it sees gradients of parameters come out
of autograd as ever, with its hooks, reductions and optimizer outside of the graphs.

Shapes: B samples, T tokens of a sample, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from smartmoe.graphs import CudaTape, Tape

WARMUP = 2


class CapturedBlock:
    """A block, called as block(x_BTD, token_id_BT) -> (y_BTD, 0-dim balance loss), that keeps nothing but its input for the
    backward pass and computes the rest again there, with the same random numbers: what torch.utils.checkpoint does, from two
    CUDA graphs. On a CPU the same steps are called instead of replayed.

    Parameters must stay where they are in memory. All calls have the shapes of `x_BTD` and `token_id_BT`, on one stream, and
    replays of several blocks that share `tape` never overlap. The block must not make the host wait (data-dependent sizes).
    Building it is collective where the block is, and runs it on x_BTD; random numbers are as if it had not. needs_loss: the
    balance loss is part of what is differentiated.
    """

    def __init__(self, block: nn.Module, x_BTD: torch.Tensor, token_id_BT: torch.Tensor, tape: Tape, *, needs_loss: bool):
        named = {name: param for name, param in block.named_parameters() if param.requires_grad}
        self._block, self._names, self._params = block, list(named), list(named.values())
        self._x, self._token_id = x_BTD.detach().clone().requires_grad_(), token_id_BT.clone()
        self._noise = noise_of(x_BTD.device)
        before = self._noise.get()
        with torch.no_grad():
            y_BTD, loss = block(self._x, self._token_id)
        self._grad_y = torch.zeros_like(y_BTD)
        self._grad_loss = torch.ones_like(loss) if needs_loss else None
        _warm_up(self._run_backward, x_BTD.device)
        # replays write where these results of the recorded calls are
        self._results: tuple[torch.Tensor, torch.Tensor] | None = None
        self._grads: list[torch.Tensor | None] | None = None
        self._replay_forward = tape.record(self._run_forward)
        self._replay_backward = tape.record(self._run_backward)
        self._noise.set(before)

    def __call__(self, x_BTD: torch.Tensor, token_id_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _Replay.apply(self, x_BTD, token_id_BT, *self._params)

    def forward(self, x_BTD, token_id_BT) -> tuple[torch.Tensor, torch.Tensor]:
        """Without a gradient. Results are copies: the next replay may use the memory of this one's."""
        self._x.data.copy_(x_BTD), self._token_id.copy_(token_id_BT)
        self._replay_forward()
        y_BTD, loss = self._results
        return y_BTD.clone(), loss.clone()

    def backward(self, x_BTD, token_id_BT, noise, grad_BTD, grad_loss) -> list[torch.Tensor | None]:
        """Gradients of x_BTD and of the parameters; noise: of the generator before the forward pass."""
        self._x.data.copy_(x_BTD), self._token_id.copy_(token_id_BT), self._grad_y.copy_(grad_BTD)
        if self._grad_loss is not None:
            self._grad_loss.copy_(grad_loss)
        now = self._noise.get()
        self._noise.set(noise)
        self._replay_backward()
        self._noise.set(now)
        return [None if grad is None else grad.clone() for grad in self._grads]

    @torch.no_grad()
    def _run_forward(self) -> None:
        self._results = self._block(self._x, self._token_id)

    @torch.enable_grad()
    def _run_backward(self) -> None:
        # The engine keeps autograd's nodes of the parameters, which belong to another stream than the one that is captured:
        # gradients are taken of other tensors in the same memory.
        aliases = [param.detach().requires_grad_() for param in self._params]
        named = dict(zip(self._names, aliases, strict=True))
        y_BTD, loss = functional_call(self._block, named, (self._x, self._token_id))
        ends, grads = [y_BTD], [self._grad_y]
        if self._grad_loss is not None and loss.requires_grad:
            ends.append(loss), grads.append(self._grad_loss)
        self._grads = torch.autograd.grad(ends, [self._x, *aliases], grads, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured, x_BTD, token_id_BT, *params):
        ctx.captured, ctx.noise = captured, captured._noise.get()
        ctx.save_for_backward(x_BTD, token_id_BT)
        return captured.forward(x_BTD, token_id_BT)

    @staticmethod
    def backward(ctx, grad_BTD, grad_loss):
        grad_x, *grads = ctx.captured.backward(*ctx.saved_tensors, ctx.noise, grad_BTD, grad_loss)
        return None, grad_x, None, *grads


def tape_for(device: torch.device) -> Tape:
    """A tape of CUDA graphs, on a CPU of calls."""
    return CudaTape(device) if device.type == "cuda" else _Calls()


def capture_blocks(
    blocks: Sequence[nn.Module], x_BTD, token_id_BT, tape: Tape, *, needs_loss: bool
) -> list[CapturedBlock]:
    """Every block captured on `tape`, on inputs like x_BTD: [B, T, D] in the blocks' dtype, and token_id_BT: [B, T] int64.
    Their graphs share memory. Clear the tape before the process groups end, which wait for graphs that hold their
    collectives. Collective where the blocks are."""
    return [CapturedBlock(block, x_BTD, token_id_BT, tape, needs_loss=needs_loss) for block in blocks]


class _Calls:
    """A Tape for CPUs, which plays a call by calling again."""

    num_bytes = 0

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        return call

    def clear(self) -> None:
        """Nothing is kept."""


def _warm_up(call: Callable, device: torch.device) -> None:
    """Run `call` as it will be captured: kernels are compiled and chosen, workspaces made."""
    if device.type != "cuda":
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)


class Noise:
    """Where a device's random numbers stand: `get` and `set` of the default generator, without waiting for the device."""

    def __init__(self, generator: torch.Generator):
        is_cuda = generator.device.type == "cuda"
        self.get = generator.get_offset if is_cuda else generator.get_state
        self.set = generator.set_offset if is_cuda else generator.set_state


def noise_of(device: torch.device) -> Noise:
    """Of the generator that operations on `device` draw from."""
    if device.type != "cuda":
        return Noise(torch.default_generator)
    idx = torch.cuda.current_device() if device.index is None else device.index
    return Noise(torch.cuda.default_generators[idx])
