"""Triton kernels of `smartmoe.ops.token_loss`: one token a block, its logits in turns of BLOCK_V."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def loss_forward_kernel(logits_SV, target_S, loss_S, log_sum_S, V, BLOCK_V: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    # each lane keeps its own maximum and sum, so that a turn has no reduction
    most = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        value = tl.load(logits_SV + s * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, value)
        # a lane that has seen nothing yet has -inf - -inf
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(most - higher) + tl.exp(value - higher))
        most = higher
    highest = tl.max(most)
    log_sum = highest + tl.log(tl.sum(tl.where(most == float("-inf"), 0.0, total * tl.exp(most - highest))))
    chosen = tl.load(logits_SV + s * V + tl.load(target_S + s)).to(tl.float32)
    tl.store(loss_S + s, log_sum - chosen)
    tl.store(log_sum_S + s, log_sum)


@triton.jit
def loss_backward_kernel(logits_SV, target_S, log_sum_S, grad, V, BLOCK_V: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    log_sum, target, slope = tl.load(log_sum_S + s), tl.load(target_S + s), tl.load(grad)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        value = tl.load(logits_SV + s * V + v, mask=v < V, other=0.0).to(tl.float32)
        share = tl.exp(value - log_sum) - tl.where(v == target, 1.0, 0.0)
        tl.store(logits_SV + s * V + v, share * slope, mask=v < V)


def forward(logits_SV, target_S) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [S], logarithm of the sum of exponentials [S]), float32."""
    num_tokens, vocab = logits_SV.shape
    loss_S, log_sum_S = logits_SV.new_empty(2, num_tokens, dtype=torch.float32)
    loss_forward_kernel[(num_tokens,)](logits_SV, target_S, loss_S, log_sum_S, vocab, BLOCK_V=_block(vocab), num_warps=8)
    return loss_S, log_sum_S


def backward_(logits_SV, target_S, log_sum_S, grad) -> None:
    """Overwrite the logits with their gradients. grad: 0-dim float32, of the sum of the losses."""
    num_tokens, vocab = logits_SV.shape
    loss_backward_kernel[(num_tokens,)](logits_SV, target_S, log_sum_S, grad, vocab, BLOCK_V=_block(vocab), num_warps=8)


def _block(vocab: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(vocab))
