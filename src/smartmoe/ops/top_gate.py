"""A router's float32 linear map, the k largest of its outputs and their softmax, in one pass each way.

On CUDA with Triton, of bfloat16 activations: one kernel reads them and writes choices and weights. In backward one writes
their gradient, that of whatever else uses them added, one parts of the parameters' gradients, which a third sums
(ops.part_sums). As in `ops.wide_linear` float32 numbers are multiplied as bfloat16 parts. Elsewhere it is the composition that
autograd differentiates.

T tokens, D model width, E experts, K = top_k.
"""

from __future__ import annotations

import torch

from smartmoe.ops.extension import have_triton
from smartmoe.ops.grad_sink import sink_of
from smartmoe.ops.part_sums import sum_parts
from smartmoe.ops.wide_linear import wide_linear

_MOST_EXPERTS, _MOST_CHOICES = 64, 4  # more make tiles for which a block has no registers


def top_gate(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expert_idx_TK int64, weight_TK float32, x_TD) of logits x @ weight.T + bias: the experts of the top_k largest,
    descending, and the softmax over these. x_TD is the one given: who goes on with the one returned has gradients added in one
    pass.

    x_TD: [T, D] of any floating type; weight_ED and bias_E: float32; top_k <= E. A logit that is not a number counts as the
    largest. Of equal logits the kernel takes the first, torch whichever it finds. The parameters' gradients are summed in
    float32, in an order that depends on T alone.
    """
    fits = x_TD.dtype == torch.bfloat16 and weight_ED.shape[0] <= _MOST_EXPERTS and top_k <= _MOST_CHOICES
    if x_TD.is_cuda and x_TD.shape[0] and fits and have_triton() and not torch.compiler.is_compiling():
        return _TopGate.apply(x_TD, weight_ED, bias_E, top_k)
    top_TK, expert_idx_TK = wide_linear(x_TD, weight_ED, bias_E).topk(top_k, dim=-1)
    return expert_idx_TK, top_TK.softmax(-1), x_TD


class _TopGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED, bias_E, top_k):
        from smartmoe.ops import top_gate_kernels as kernels

        ctx.set_materialize_grads(False)
        ctx.sinks = sink_of(weight_ED), sink_of(bias_E)
        x_TD = x_TD.contiguous()
        expert_idx_TK, weight_TK, part_3ED = kernels.forward(x_TD, weight_ED, bias_E, top_k)
        ctx.save_for_backward(x_TD, weight_ED, bias_E, part_3ED, expert_idx_TK, weight_TK)
        ctx.mark_non_differentiable(expert_idx_TK)
        return expert_idx_TK, weight_TK, x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, _, grad_weight_TK, grad_x_TD):
        from smartmoe.ops import top_gate_kernels as kernels

        x_TD, weight_ED, bias_E, part_3ED, expert_idx_TK, weight_TK = ctx.saved_tensors
        if grad_weight_TK is None:
            return grad_x_TD, None, None, None
        grad, part_PN = kernels.backward(x_TD, part_3ED, expert_idx_TK, weight_TK, grad_weight_TK, grad_x_TD)
        return grad, *sum_parts(part_PN, (weight_ED, bias_E), ctx.sinks), None
