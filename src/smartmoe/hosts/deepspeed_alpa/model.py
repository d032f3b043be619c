"""The GShard/GSPMD MoE transformer of the benchmark: a causal, pre-norm language model with experts in every other layer,
MLPs of width 8H and output logits tied to the embedding.

Shapes: B samples, T tokens of a sample, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from smartmoe.config import ModelConfig
from smartmoe.graphs import Tape
from smartmoe.hosts.deepspeed.moe import Expert
from smartmoe.hosts.deepspeed_alpa.capture import CapturedBlock, capture_blocks, noise_of, tape_for
from smartmoe.layer import INIT_STD
from smartmoe.ops.hashing import make_key
from smartmoe.ops.residual_norm import residual_norm
from smartmoe.ops.token_loss import summed_cross_entropy


class Attention(nn.Module):
    """Causal self-attention with biases, and dropout of its probabilities."""

    def __init__(self, model: ModelConfig, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = model.num_heads, dropout
        self.qkv = nn.Linear(model.hidden_size, 3 * model.hidden_size)
        self.out = nn.Linear(model.hidden_size, model.hidden_size)

    def forward(self, x_BTD):
        batch, tokens, width = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y_BHTd = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y_BHTd.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention, then an MLP or the MoE layer `moe`; dropout of both results."""

    def __init__(self, model: ModelConfig, moe: nn.Module | None, dropout: float):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(model.hidden_size), Attention(model, dropout)
        self.mlp_norm, self.dropout = nn.LayerNorm(model.hidden_size), nn.Dropout(dropout)
        self.moe = moe
        self.mlp = Expert(model.hidden_size, model.ffn_size, model.activation) if moe is None else None

    def forward(self, x_BTD, token_id_BT):
        update_BTD = self.dropout(self.attention(self.attention_norm(x_BTD)))
        x_BTD, h_BTD = residual_norm(x_BTD, update_BTD, self.mlp_norm)
        if self.moe is None:
            return x_BTD + self.dropout(self.mlp(h_BTD)), x_BTD.new_zeros((), dtype=torch.float32)
        y_BTD, balance_loss = self.moe(h_BTD, token_id_BT)
        return x_BTD + self.dropout(y_BTD), balance_loss


class MoETransformer(nn.Module):
    """The whole model; `make_moe(layer_idx)` builds the MoE layers, which are the odd ones (from 0).

    balance_weight: of the balance loss in the loss; the artifact computes it and leaves it out (0).
    """

    def __init__(
        self,
        model: ModelConfig,
        make_moe: Callable[[int], nn.Module],
        *,
        dropout: float = 0.1,
        balance_weight: float = 0.0,
        recompute: bool = True,
        seed: int = 1234,
    ):
        super().__init__()
        self.seq_len, self.balance_weight, self.recompute = model.seq_len, balance_weight, recompute
        self.captured: list[CapturedBlock] = []
        self._tape: Tape | None = None
        self.token_embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.position_embedding = nn.Embedding(model.seq_len, model.hidden_size)
        self.blocks = nn.ModuleList(
            Block(model, make_moe(idx) if idx % 2 else None, dropout) for idx in range(model.num_layers)
        )
        self.final_norm = nn.LayerNorm(model.hidden_size)
        self.dropout = nn.Dropout(dropout)
        _init_dense(self, seed)

    def forward(self, token_BT: torch.Tensor, target_BT: torch.Tensor, token_id_BT: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch: mean cross-entropy, plus the balance loss times its weight. 0-dim float32.

        token_BT, target_BT: [B, T] int64, the tokens and the next ones; token_id_BT: [B, T] int64, sample * T + position.
        Collective over the expert groups.
        """
        x_BTD = self._embed(token_BT, token_id_BT)
        balance_loss = x_BTD.new_zeros((), dtype=torch.float32)
        for block in self.captured if self.captured and self.training else self.blocks:
            if self.recompute and self.training and not self.captured:
                # every rank must repeat the same collectives, so recomputation is never cut short
                with set_checkpoint_early_stop(False):
                    x_BTD, block_loss = checkpoint(block, x_BTD, token_id_BT, use_reentrant=False)
            else:
                x_BTD, block_loss = block(x_BTD, token_id_BT)
            balance_loss = balance_loss + block_loss
        logits_SV = F.linear(self.final_norm(x_BTD), self.token_embedding.weight).flatten(0, 1)
        loss = summed_cross_entropy(logits_SV, target_BT.flatten()) / logits_SV.shape[0]
        return loss + self.balance_weight * balance_loss if self.balance_weight else loss

    def _embed(self, token_BT, token_id_BT):
        return self.dropout(self.token_embedding(token_BT) + self.position_embedding(token_id_BT % self.seq_len))

    def capture(self, token_BT: torch.Tensor, token_id_BT: torch.Tensor) -> None:
        """Train from CUDA graphs of the blocks from now on (`capture`), for micro-batches of these shapes. Parameters must be
        in their final dtype and place. Collective over the expert groups."""
        noise = noise_of(token_BT.device)
        before = noise.get()
        with torch.no_grad():
            x_BTD = self._embed(token_BT, token_id_BT)
        noise.set(before)
        self._tape = tape_for(x_BTD.device)
        self.captured = capture_blocks(self.blocks, x_BTD, token_id_BT, self._tape, needs_loss=bool(self.balance_weight))

    def release(self) -> None:
        """Let go of what was captured, if anything: process groups wait for graphs that hold their collectives."""
        if self._tape is not None:
            self._tape.clear()
            self.captured, self._tape = [], None


@torch.no_grad()
def _init_dense(module: MoETransformer, seed: int) -> None:
    """Normal(0, 0.02) weights from (seed, name) alone, zero biases, norms 1: the same in both back ends."""
    for name, param in module.named_parameters():
        if ".moe." in name:
            continue
        if name.endswith("bias"):
            param.zero_()
        elif "norm" not in name:
            generator = torch.Generator().manual_seed(make_key(seed, name))
            param.copy_(torch.empty(param.shape).normal_(0.0, INIT_STD, generator=generator))
