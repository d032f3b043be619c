"""The cross-entropy of the output projection's logits, in float32 without a float32 copy of them.

S tokens, V vocabulary. On CUDA with Triton forward reads the logits once and keeps one number a token, and backward
overwrites the logits with their gradients: 3 passes over [S, V] in the logits' own type instead of about 14 with a float32
copy, its logarithm and gradients of both. Elsewhere it is the composition that autograd differentiates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smartmoe.ops.extension import have_triton


def summed_cross_entropy(logits_SV: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of -log softmax(logits)[target]: 0-dim float32.

    logits_SV: [S, V] of any floating type, which nobody else may need: on CUDA backward takes their memory, and a second
    backward pass (retain_graph) is torch's error about a tensor modified in place. target_S: [S] int64 in 0 .. V - 1.
    The sum over tokens is in a fixed order.
    """
    if logits_SV.is_cuda and logits_SV.numel() and have_triton() and not torch.compiler.is_compiling():
        return _SummedCrossEntropy.apply(logits_SV.contiguous(), target_S)
    return F.cross_entropy(logits_SV.float(), target_S, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SV, target_S):
        from smartmoe.ops import token_loss_kernels as kernels

        loss_S, log_sum_S = kernels.forward(logits_SV, target_S)
        ctx.save_for_backward(logits_SV, target_S, log_sum_S)
        return loss_S.sum()

    @staticmethod
    def backward(ctx, grad):
        from smartmoe.ops import token_loss_kernels as kernels

        logits_SV, target_S, log_sum_S = ctx.saved_tensors
        kernels.backward_(logits_SV, target_S, log_sum_S, grad)
        torch.autograd.graph.increment_version(logits_SV)
        return logits_SV.detach(), None
