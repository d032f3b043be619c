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

WARMUP = 2


class CapturedBlock:
    """A block, called as block(x_BTD, token_id_BT) -> (y_BTD, 0-dim balance loss), that keeps nothing but its input for the
    backward pass and computes the rest again there, with the same random numbers: what torch.utils.checkpoint does, from two
    CUDA graphs. On a CPU the same steps are called instead of replayed.

    Parameters must stay where they are in memory. All calls have the shapes of `x_BTD` and `token_id_BT`, on one stream, and
    replays of several blocks that share `pool` never overlap. The block must not make the host wait (data-dependent sizes).
    Building it is collective where the block is, and runs it on x_BTD; random numbers are as if it had not. needs_loss: the
    balance loss is part of what is differentiated.
    """

    def __init__(self, block: nn.Module, x_BTD: torch.Tensor, token_id_BT: torch.Tensor, *, needs_loss: bool, pool=None):
        self._block, self._params = block, [param for param in block.parameters() if param.requires_grad]
        self._x, self._token_id = x_BTD.detach().clone().requires_grad_(), token_id_BT.clone()
        self._noise = noise_of(x_BTD.device)
        before = self._noise.get()
        with torch.no_grad():
            y_BTD, loss = block(self._x, self._token_id)
        self._grad_y = torch.zeros_like(y_BTD)
        self._grad_loss = torch.ones_like(loss) if needs_loss else None
        _warm_up(self._run_backward, x_BTD.device)
        self._replay_forward, (self._y, self._loss) = record(self._run_forward, x_BTD.device, pool)
        self._replay_backward, self._grads = record(self._run_backward, x_BTD.device, pool)
        self._noise.set(before)

    def __call__(self, x_BTD: torch.Tensor, token_id_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _Replay.apply(self, x_BTD, token_id_BT, *self._params)

    def forward(self, x_BTD, token_id_BT) -> tuple[torch.Tensor, torch.Tensor]:
        """Without a gradient. Results are copies: the next replay may use the memory of this one's."""
        self._x.data.copy_(x_BTD), self._token_id.copy_(token_id_BT)
        self._replay_forward()
        return self._y.clone(), self._loss.clone()

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
    def _run_forward(self):
        return self._block(self._x, self._token_id)

    @torch.enable_grad()
    def _run_backward(self):
        y_BTD, loss = self._block(self._x, self._token_id)
        ends, grads = [y_BTD], [self._grad_y]
        if self._grad_loss is not None and loss.requires_grad:
            ends.append(loss), grads.append(self._grad_loss)
        return torch.autograd.grad(ends, [self._x, *self._params], grads, allow_unused=True)


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


def capture_blocks(blocks: Sequence[nn.Module], x_BTD, token_id_BT, *, needs_loss: bool) -> list[CapturedBlock]:
    """Every block captured, on inputs like x_BTD: [B, T, D] in the blocks' dtype, and token_id_BT: [B, T] int64. Their graphs
    share memory. Collective where the blocks are."""
    pool = torch.cuda.graph_pool_handle() if x_BTD.is_cuda else None
    return [CapturedBlock(block, x_BTD, token_id_BT, needs_loss=needs_loss, pool=pool) for block in blocks]


def record(call: Callable, device: torch.device, pool) -> tuple[Callable[[], None], Sequence[torch.Tensor | None]]:
    """(replay, results): what repeats `call`, and where its results then lie. `call` must have run before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's watchdog) may ask the device meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = call()
        return graph.replay, results
    results = [None if result is None else result.detach().clone() for result in call()]

    def replay() -> None:
        for kept, new in zip(results, call(), strict=True):
            if kept is not None:
                kept.copy_(new.detach())

    return replay, results


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
