"""A Swin transformer with MoE layers for one device. It knows nothing of torch.distributed.

Blocks, windows and patch merging are those of Swin-MoE (Liu et al., "Swin Transformer", ICCV 2021; Hwang et al., "Tutel",
MLSys 2023, whose model it is): attention in windows that every second block shifts by half of one, biased by a small network of
the logarithm of how far apart two patches are (Swin V2). Without dropout and stochastic depth, so that every plan gives the
losses of one process; activations are those of GPT's blocks.

Shapes: B samples, T patches of a stage (side x side), D its width, W windows, P patches of a window, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from smartmoe.blocks import Block, DenseMLP, add, run_block
from smartmoe.config import ModelConfig
from smartmoe.ops.residual_norm import residual_norm
from smartmoe.ops.token_loss import summed_cross_entropy
from smartmoe.swin_sizes import block_sizes, has_experts, stage_of

NUM_CHANNELS = 3
_OFFSET_WIDTH = 512  # of the network that gives the bias of attention
_OFFSET_RANGE = 8.0


def into_windows(x_BTD: torch.Tensor, side: int, window: int) -> torch.Tensor:
    """[B, T, D], patches row by row, -> [B, W, P, D]."""
    num = side // window
    x = x_BTD.unflatten(1, (num, window, num, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def out_of_windows(x_BWPD: torch.Tensor, side: int, window: int) -> torch.Tensor:
    """The inverse of `into_windows`."""
    num = side // window
    x = x_BWPD.unflatten(2, (window, window)).unflatten(1, (num, num)).transpose(2, 3)
    return x.flatten(1, 4)


def offsets(window: int) -> torch.Tensor:
    """Every offset between two patches of a window, in rows and columns, as the network of the bias gets it:
    [(2 window - 1)^2, 2] float32, logarithmic, log 9 / log 8 at the largest."""
    step = torch.arange(1 - window, window, dtype=torch.float32) * (_OFFSET_RANGE / max(window - 1, 1))
    scaled = step.sign() * (step.abs() + 1).log2() / math.log2(_OFFSET_RANGE)
    return torch.cartesian_prod(scaled, scaled)


def of_pairs(bias_HOO: torch.Tensor) -> torch.Tensor:
    """Bias of each offset [H, 2 window - 1, 2 window - 1] -> of each pair of patches [H, P, P].

    By views and a copy, not by an index: its gradient is a sum in a fixed order."""
    window = (bias_HOO.shape[1] + 1) // 2
    return bias_HOO.unfold(1, window, 1).unfold(2, window, 1).flip(3, 4).flatten(3).flatten(1, 2)


def strangers(side: int, window: int, shift: int) -> torch.Tensor:
    """Which pairs of patches are together in a window only because the image was rolled by `shift`: [W, P, P] bool."""
    edge = torch.zeros(side, dtype=torch.int64)
    edge[side - window : side - shift], edge[side - shift :] = 1, 2
    region_TD = (edge[:, None] * 3 + edge[None]).flatten()[None, :, None]
    region_WP = into_windows(region_TD, side, window)[0, :, :, 0]
    return region_WP[:, :, None] != region_WP[:, None]


class WindowAttention(nn.Module):
    """Multi-head attention among the patches of each window, with a bias for where one is from the other."""

    def __init__(self, sizes: ModelConfig, place: int):
        super().__init__()
        self.side = math.isqrt(sizes.seq_len)
        self.window = min(sizes.swin.window_size, self.side)
        self.shift = self.window // 2 if place % 2 and self.window < self.side else 0
        self.num_heads, self.head_dim = sizes.num_heads, sizes.hidden_size // sizes.num_heads
        self.qkv = nn.Linear(sizes.hidden_size, 3 * sizes.hidden_size)
        self.out = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.offset_up = nn.Linear(2, _OFFSET_WIDTH)
        self.offset_heads = nn.Linear(_OFFSET_WIDTH, sizes.num_heads, bias=False)
        self.register_buffer("offset_N2", offsets(self.window), persistent=False)
        apart_WPP = strangers(self.side, self.window, self.shift) if self.shift else None
        self.register_buffer("apart_WPP", apart_WPP, persistent=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        shift, side, window = self.shift, self.side, self.window
        if shift:
            x_BTD = _roll(x_BTD, side, -shift)
        qkv = self.qkv(into_windows(x_BTD, side, window)).unflatten(3, (self.num_heads, 3, self.head_dim))
        # windows beside heads, so that one bias serves all samples
        q, k, v = (part.transpose(2, 3).flatten(1, 2) for part in qkv.unbind(4))
        y_BWPHd = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias()).unflatten(1, (-1, self.num_heads))
        y_BTD = self.out(out_of_windows(y_BWPHd.transpose(2, 3).flatten(3), side, window))
        return _roll(y_BTD, side, shift) if shift else y_BTD

    def _bias(self) -> torch.Tensor:
        """[1, W * H, P, P]."""
        weight, num_windows = self.offset_up.weight, (self.side // self.window) ** 2
        bias_NH = self.offset_heads(F.relu(self.offset_up(self.offset_N2.to(weight.dtype))))
        bias_HOO = bias_NH.t().unflatten(1, (2 * self.window - 1, -1))
        sums = torch.promote_types(weight.dtype, torch.float32)  # in which gradients of many pairs are added
        bias_WHPP = of_pairs(bias_HOO.to(sums)).to(weight.dtype).expand(num_windows, -1, -1, -1)
        if self.apart_WPP is not None:
            bias_WHPP = bias_WHPP.masked_fill(self.apart_WPP.unsqueeze(1), -math.inf)
        return bias_WHPP.flatten(0, 1).unsqueeze(0)


def _roll(x_BTD: torch.Tensor, side: int, shift: int) -> torch.Tensor:
    return x_BTD.unflatten(1, (side, side)).roll((shift, shift), (1, 2)).flatten(1, 2)


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the width."""

    def __init__(self, sizes: ModelConfig):
        super().__init__()
        self.side = math.isqrt(sizes.seq_len)
        self.norm = nn.LayerNorm(4 * sizes.hidden_size)
        self.reduce = nn.Linear(4 * sizes.hidden_size, 2 * sizes.hidden_size, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        half = self.side // 2
        x = x_BTD.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)  # of four patches columns outside, rows inside
        return self.reduce(residual_norm(x.flatten(3).flatten(1, 2), None, self.norm)[1])


class Swin(nn.Module):
    """A whole Swin transformer with its classification head. `make_moe(layer_idx)` builds the MoE layer of a block, which works
    on the sizes of that block (smartmoe.swin_sizes.block_sizes)."""

    def __init__(self, model: ModelConfig, make_moe: Callable[[int], nn.Module], recompute: bool = False):
        super().__init__()
        self.seq_len, self.patch_size, self.recompute = model.seq_len, model.swin.patch_size, recompute
        self.patch = nn.Linear(NUM_CHANNELS * model.swin.patch_size**2, model.hidden_size)
        self.patch_norm = nn.LayerNorm(model.hidden_size)
        self.blocks, self.merges = nn.ModuleDict(), nn.ModuleDict()
        for idx in range(model.num_layers):
            sizes, (stage, place) = block_sizes(model, idx), stage_of(model, idx)
            if place == 0 and stage > 0:
                self.merges[str(idx)] = PatchMerging(block_sizes(model, idx - 1))
            width = sizes.hidden_size
            moe = make_moe(idx) if has_experts(model, idx) else None
            mlp = DenseMLP(width, sizes.ffn_size, bias=True) if moe is None else None  # one bias, as in Swin-MoE
            self.blocks[str(idx)] = Block(width, WindowAttention(sizes, place), moe, mlp)
        self.final_norm = nn.LayerNorm(sizes.hidden_size)
        self.head = nn.Linear(sizes.hidden_size, model.swin.num_classes)

    def forward(
        self, x: torch.Tensor, *, token_id_BT: torch.Tensor, target_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model.

        x: [B, 3, image_size, image_size], any floating type.
        token_id_BT: [B, T] int64, global ids of the first stage's patches (sample * seq_len + position); those of later stages
        count that stage's patches in the same way.
        target_BT: [B, 1] int64 labels.
        Returns (cross-entropy summed over the samples [1] float32, balance loss [1] float32).
        """
        x, update = self._patches(x.to(self.patch.weight.dtype)), None
        balance_loss = x.new_zeros(1, dtype=torch.float32).requires_grad_()
        sample_B1 = token_id_BT[:, :1] // self.seq_len
        for idx, block in self.blocks.items():
            if idx in self.merges:
                x, update = self.merges[idx](add(x, update)), None
            token_id_BT = sample_B1 * x.shape[1] + torch.arange(x.shape[1], device=x.device)
            x, update, block_loss = run_block(block, x, update, token_id_BT, self.recompute and self.training)
            balance_loss = balance_loss + block_loss
        pooled_BD = residual_norm(x, update, self.final_norm)[1].mean(1)
        return summed_cross_entropy(self.head(pooled_BD), target_BT.flatten()).view(1), balance_loss

    def _patches(self, image_BCSS: torch.Tensor) -> torch.Tensor:
        """[B, T, D] of the first stage; a patch's numbers are ordered by (channel, row, column)."""
        side = math.isqrt(self.seq_len)
        x = image_BCSS.unflatten(3, (side, self.patch_size)).unflatten(2, (side, self.patch_size))
        patch_BTX = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return residual_norm(self.patch(patch_BTX), None, self.patch_norm)[1]


def flops_per_sample(model: ModelConfig) -> float:
    """Model FLOPs of one image, forward and backward: 6 for each parameter of a matrix that a patch meets, top_k experts
    among them, and three times attention, 4 * patches of a window * width for each patch of a block; the head once. What is
    computed again to save memory does not count, nor does the network of the bias."""
    swin, flops = model.swin, 0.0
    for idx in range(model.num_layers):
        sizes = block_sizes(model, idx)
        width, tokens = sizes.hidden_size, sizes.seq_len
        weights, matrix = 4 * width**2, width * sizes.ffn_size
        if has_experts(model, idx):
            weights += model.top_k * matrix * (3 if model.activation == "swiglu" else 2) + width * model.num_experts
        else:
            weights += 2 * matrix
        if stage_of(model, idx)[1] == 0 and idx > 0:
            weights += 2 * width * width  # merging: 4 * (width / 2) -> width
        window = min(swin.window_size**2, tokens)
        flops += tokens * (6.0 * weights + 12.0 * window * width)
    patch = NUM_CHANNELS * swin.patch_size**2 * model.hidden_size * model.seq_len
    return flops + 6.0 * (patch + width * swin.num_classes)
