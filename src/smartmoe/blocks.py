"""What the blocks of every model share: norms, residual sums, a dense MLP or an MoE layer, recomputation, and initial values.

Layer 5. Shapes: B samples, T tokens of a sample on this rank, D model dim.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from smartmoe.dispatch.direct import same_room
from smartmoe.ops.residual_norm import residual_norm


class DenseMLP(nn.Module):
    """Two-matrix MLP of the blocks that have no experts, with the GELU (tanh form, as GPT-2) that experts have. bias: whether
    the first product has one; the second has none."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool = False):
        super().__init__()
        self.up = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block: `attention`, then `moe`, or where that is None the dense `mlp`. attention and mlp take and
    give [B, T, D]; moe(x_BTD, token_id_BT) gives (y_BTD, its balance loss).

    What goes in and comes out is x and an update, whose sum is meant: the norm behind makes it in its own pass. update_BTD
    None: there is none. Returns (x_BTD, update_BTD, balance loss)."""

    def __init__(self, hidden_size: int, attention: nn.Module, moe: nn.Module | None, mlp: nn.Module | None):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.moe = moe
        self.mlp = mlp

    def forward(
        self, x_BTD: torch.Tensor, update_BTD: torch.Tensor | None, token_id_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_BTD, h_BTD = residual_norm(x_BTD, update_BTD, self.attention_norm)
        x_BTD, h_BTD = residual_norm(x_BTD, self.attention(h_BTD), self.mlp_norm)
        if self.moe is None:
            return x_BTD, self.mlp(h_BTD), h_BTD.new_zeros((), dtype=torch.float32)
        return x_BTD, *self.moe(h_BTD, token_id_BT)


def run_block(
    block: Block, x_BTD: torch.Tensor, update_BTD: torch.Tensor | None, token_id_BT: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(x [B, T, D], update [B, T, D] or None, balance loss [] float32) of a block: see Block. recompute: keep nothing of it,
    and compute it again in backward; then updates are added at once, so that one tensor is kept and not two."""
    if not recompute:
        return block(x_BTD, update_BTD, token_id_BT)
    # Every rank must repeat the same collectives, so the recomputation is never cut short.
    with set_checkpoint_early_stop(False):
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": same_room}
        x_BTD, update_BTD, balance_loss = checkpoint(block, add(x_BTD, update_BTD), None, token_id_BT, **options)
    return add(x_BTD, update_BTD), None, balance_loss


def add(x_BTD: torch.Tensor, update_BTD: torch.Tensor | None) -> torch.Tensor:
    """What a block gives, for those who do not go on with a norm."""
    return x_BTD if update_BTD is None else x_BTD + update_BTD


@torch.no_grad()
def init_weights(module: nn.Module, seed: int, num_layers: int) -> None:
    """Initialise everything but the MoE layers, each parameter from (seed, its name) alone: the same values on every rank
    and under every plan. Normal with std 0.02, output projections scaled by 1/sqrt(2 * num_layers) as in GPT-2; biases
    are 0."""
    drawn = []
    for name, param in module.named_parameters():
        if ".moe." in name:
            continue
        if "norm" in name or name.endswith("bias"):
            param.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            drawn.append((name, param))

    def draw(named: tuple[str, nn.Parameter]) -> None:
        name, param = named
        std = 0.02 / math.sqrt(2 * num_layers) if name.endswith(("out.weight", "down.weight")) else 0.02
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        values = torch.empty(param.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        with torch.no_grad():  # which is a thread's own
            param.copy_(values)

    # a thread draws no more than some 100 million a second
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(draw, drawn))
