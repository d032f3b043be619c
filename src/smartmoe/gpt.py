"""A GPT with MoE layers for one device. It knows nothing of torch.distributed: parallelism is applied from outside.

Shapes: B samples, T tokens of a sample on this rank, D model dim, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.blocks import Block, DenseMLP, add, run_block
from smartmoe.config import ModelConfig
from smartmoe.ops.dense_linear import DenseLinear
from smartmoe.ops.residual_norm import residual_norm
from smartmoe.ops.token_loss import summed_cross_entropy
from smartmoe.swin_sizes import has_experts


class Attention(nn.Module):
    """Causal multi-head self-attention without biases. Heads are the leading factor of both weights, so that slicing
    `qkv` by rows and `out` by columns gives whole heads to each tensor-parallel rank."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.head_dim = model.hidden_size // model.num_heads
        self.qkv = DenseLinear(model.hidden_size, 3 * model.hidden_size)
        self.out = DenseLinear(model.hidden_size, model.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.out(attend(self.qkv(x_BTD), self.head_dim))


def attend(qkv_BTX: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Causal attention between the two products: [B, T, H * 3 * head_dim], by head q, k and v, -> [B, T, H * head_dim]."""
    batch, tokens, _ = qkv_BTX.shape
    # unbind and not indexing: its backward writes the three gradients side by side once, instead of adding three arrays of
    # the size of qkv
    q, k, v = (part.transpose(1, 2) for part in qkv_BTX.view(batch, tokens, -1, 3, head_dim).unbind(3))
    y_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y_BHTd.transpose(1, 2).reshape(batch, tokens, -1)


class GPT(nn.Module):
    """The blocks `layer_idxs` of a GPT, with the embedding when they begin with the first and the head when they end
    with the last; all blocks make the whole model.

    `make_moe(layer_idx)` builds the MoE layer of a block. Input and output embeddings are not tied.
    """

    def __init__(
        self,
        model: ModelConfig,
        make_moe: Callable[[int], nn.Module],
        layer_idxs: Iterable[int] | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        layer_idxs = list(range(model.num_layers) if layer_idxs is None else layer_idxs)
        self.seq_len = model.seq_len
        self.recompute = recompute
        self.is_first = layer_idxs[0] == 0
        self.is_last = layer_idxs[-1] == model.num_layers - 1
        if self.is_first:
            self.token_embedding = nn.Embedding(model.vocab_size, model.hidden_size)
            self.position_embedding = nn.Embedding(model.seq_len, model.hidden_size)
        self.blocks, width = nn.ModuleDict(), model.hidden_size
        for idx in layer_idxs:
            moe = make_moe(idx) if has_experts(model, idx) else None
            mlp = DenseMLP(width, model.ffn_size) if moe is None else None
            self.blocks[str(idx)] = Block(width, Attention(model), moe, mlp)
        if self.is_last:
            self.final_norm = nn.LayerNorm(model.hidden_size)
            self.head = DenseLinear(model.hidden_size, model.vocab_size)

    def forward(
        self,
        x: torch.Tensor,
        balance_loss: torch.Tensor | None = None,
        *,
        token_id_BT: torch.Tensor,
        target_BT: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run these blocks.

        x: [B, T] int64 tokens for the first stage, [B, T, D] activations for a later one.
        balance_loss: [1] float32, the sum over earlier stages; None for the first.
        token_id_BT: [B, T] int64, global token ids (sample * seq_len + position), of the same positions in all samples.
        target_BT: [B, T] int64, the next tokens; read by the last stage only.
        Returns (activations [B, T, D], balance loss [1]), or from the last stage (cross-entropy summed over the tokens
        [1] float32, balance loss [1]).
        """
        update = None
        if self.is_first:
            # backward sorts these numbers: they have few digits, and all samples the positions of one
            x = self.token_embedding(x.int())
            update = self.position_embedding((token_id_BT[:1] % self.seq_len).int()).expand_as(x)
            balance_loss = x.new_zeros(1, dtype=torch.float32).requires_grad_()
        for block in self.blocks.values():
            x, update, block_loss = run_block(block, x, update, token_id_BT, self.recompute and self.training)
            balance_loss = balance_loss + block_loss
        if not self.is_last:
            return add(x, update), balance_loss
        logits_SV = self.head(residual_norm(x, update, self.final_norm)[1]).flatten(0, 1)
        return summed_cross_entropy(logits_SV, target_BT.flatten()).view(1), balance_loss


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of one token, forward and backward: 6 per parameter of the dense matrices, the output projection, the
    router and top_k experts, and three times causal attention, half of 4 * seq_len * hidden_size a layer. What is
    computed again to save memory does not count."""
    hidden, ffn = model.hidden_size, model.ffn_size
    num_moe = sum(has_experts(model, layer) for layer in range(model.num_layers))
    weights = model.num_layers * 4 * hidden**2 + hidden * model.vocab_size
    expert = hidden * ffn * (3 if model.activation == "swiglu" else 2)
    weights += num_moe * (model.top_k * expert + hidden * model.num_experts)
    weights += (model.num_layers - num_moe) * 2 * hidden * ffn
    return 6.0 * weights + 3 * model.num_layers * 2 * model.seq_len * hidden
