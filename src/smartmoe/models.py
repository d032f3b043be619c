"""What a run's ModelConfig says is trained: a GPT on text or a Swin transformer on images, and its FLOPs.

Layer 5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from smartmoe import gpt, swin
from smartmoe.config import ModelConfig
from smartmoe.images import ImageDataset


def build_chunk(
    model: ModelConfig, make_moe: Callable[[int], nn.Module], layer_idxs: range, recompute: bool = False
) -> gpt.GPT | swin.Swin:
    """The blocks `layer_idxs` of the model, all of them of a Swin transformer; see GPT and Swin."""
    if model.swin is None:
        return gpt.GPT(model, make_moe, layer_idxs, recompute)
    assert len(layer_idxs) == model.num_layers, "config.check lets no Swin transformer be cut"
    return swin.Swin(model, make_moe, recompute)


def flops_per_sample(model: ModelConfig) -> float:
    """Model FLOPs of one sample, forward and backward."""
    if model.swin is None:
        return gpt.flops_per_token(model) * model.seq_len
    return swin.flops_per_sample(model)


def read_batch(
    images: ImageDataset, sample_B: np.ndarray, model: ModelConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images [B, 3, image_size, image_size] float32 in -1 .. 1, ids of the first stage's patches [B, T] int64, labels [B, 1]
    int64) of the samples with these numbers, on `device`, where the images are resized (bilinear) and made three channels."""
    pairs = [images.sample(int(idx)) for idx in sample_B]
    image_BRC = send(torch.from_numpy(np.stack([image for image, _ in pairs])), device)
    size = (model.swin.image_size, model.swin.image_size)
    x = F.interpolate(image_BRC.unsqueeze(1).float(), size, mode="bilinear", align_corners=False)
    token_id_BT = torch.from_numpy(sample_B)[:, None] * model.seq_len + torch.arange(model.seq_len)[None]
    target_B1 = torch.tensor([[label] for _, label in pairs])
    x = (x / 127.5 - 1).expand(-1, swin.NUM_CHANNELS, -1, -1).contiguous()
    return x, send(token_id_BT, device), send(target_B1, device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`: on a GPU behind all that was launched on the current stream, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
