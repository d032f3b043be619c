"""What Megatron's loop is fed with: real text as SmartMoE's own trainer reads it, or Megatron's indexed datasets."""

from __future__ import annotations

import torch
from megatron.training import get_args
from torch.utils.data import Dataset

from smartmoe.data import TokenDataset, load_tokens


class TextSamples(Dataset):
    """Samples first, first + 1 .. of a TokenDataset in the form of Megatron's GPTDataset; the same order as in SmartMoE's
    trainer, whatever the plan."""

    def __init__(self, tokens: TokenDataset, seq_len: int, num_samples: int, first: int = 0):
        self._tokens, self._seq_len, self._num_samples, self._first = tokens, seq_len, num_samples, first

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self._tokens.sample(self._first + int(idx), self._seq_len))
        return {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": torch.ones(self._seq_len),
            "position_ids": torch.arange(self._seq_len),
        }


def datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None):
    """Megatron's (train, validation, test) datasets of num_samples each; one that is asked for nothing is None.

    Text (--smartmoe-text) gives validation and test samples from behind those of training.
    """
    args = get_args()
    if args.smartmoe_text is None:
        return _indexed(num_samples, vp_stage)
    tokens = load_tokens(args.smartmoe_text, args.padded_vocab_size, args.smartmoe_cache, seed=args.seed)
    starts = (0, num_samples[0], num_samples[0] + num_samples[1])
    return tuple(
        TextSamples(tokens, args.seq_length, count, first) if count else None
        for count, first in zip(num_samples, starts, strict=True)
    )


datasets.is_distributed = True  # every rank reads its own samples: nothing is broadcast


def _indexed(num_samples, vp_stage):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(
        kind, num_samples, lambda: is_first_or_last_pipeline_stage(vp_stage), config
    )
    return builder.build()
