"""The data that a run's config asks for: text for a GPT, images for a Swin transformer.

Layer 5; never imports torch.
"""

from __future__ import annotations

from pathlib import Path

from smartmoe.config import RunConfig
from smartmoe.data import CACHE_DIR, TokenDataset, load_tokens
from smartmoe.images import ImageDataset, load_images


def load_data(config: RunConfig, cache_dir: str | Path = CACHE_DIR) -> TokenDataset | ImageDataset:
    """The data that `config` trains on, see load_tokens and load_images; text is tokenised once, under `cache_dir`."""
    model, work = config.model, config.workload
    if model.swin is not None:
        return load_images(work.data, model.swin.num_classes, work.seed)
    return load_tokens(work.data, model.vocab_size, cache_dir, seed=work.seed)
