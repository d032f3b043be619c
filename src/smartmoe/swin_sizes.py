"""The sizes of a Swin transformer: hierarchical stages of blocks, some of them with experts.

Layer 0: imports nothing of the project and never imports torch. `model` is a config.ModelConfig, `plan` a ParallelPlan, which
hold what is here. What is said of blocks holds for a GPT, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """What makes a model a Swin transformer of images instead of a GPT (smartmoe.swin).

    A stage has `depths[stage]` blocks, each stage half the side and twice the width and heads of the one before. Attention is
    within windows of window_size x window_size patches, or of the whole image where that is smaller. Of the blocks of stage
    `moe_from` (counted from 0) and later every `moe_every`-th has an MoE layer. An image has `num_classes` possible labels.
    """

    image_size: int = 32
    patch_size: int = 4
    window_size: int = 4
    depths: tuple[int, ...] = (2, 2)
    moe_from: int = 0
    num_classes: int = 10


def stage_of(model, layer_idx: int) -> tuple[int, int]:
    """(stage, place in it) of a block of a Swin transformer, both from 0."""
    for stage, depth in enumerate(model.swin.depths):
        if layer_idx < depth:
            return stage, layer_idx
        layer_idx -= depth
    raise AssertionError("beyond the last block")


def has_experts(model, layer_idx: int) -> bool:
    """Whether block `layer_idx` has an MoE layer: the last block of every run of `moe_every`, in a Swin transformer of a stage,
    from stage `moe_from` on."""
    stage, place = (0, layer_idx) if model.swin is None else stage_of(model, layer_idx)
    if model.swin is not None and stage < model.swin.moe_from:
        return False
    return place % model.moe_every == model.moe_every - 1


def block_sizes(model, layer_idx: int):
    """`model` with the width, heads and tokens that block `layer_idx` works on; a GPT's are all alike."""
    if model.swin is None:
        return model
    stage, _ = stage_of(model, layer_idx)
    return dataclasses.replace(
        model,
        hidden_size=model.hidden_size << stage,
        ffn_size=model.ffn_size << stage,
        num_heads=model.num_heads << stage,
        seq_len=model.seq_len >> 2 * stage,
    )


def num_targets(model) -> int:
    """What a sample is asked for: each next token of a text, one label of an image."""
    return 1 if model.swin is not None else model.seq_len


def problems(model, plan) -> list[str]:
    """What does not fit in a Swin transformer or in the plan that it shall run under, and how to mend it; nothing for a GPT."""
    swin = model.swin
    if swin is None:
        return []
    if model.moe_every < 1:
        return [f"model.moe_every = {model.moe_every} must be at least 1"]
    sizes = ("image_size", "patch_size", "window_size", "num_classes")
    found = [f"model.swin.{key} = {getattr(swin, key)} must be at least 1" for key in sizes if getattr(swin, key) < 1]
    if not swin.depths or min(swin.depths) < 1:
        found.append(f"model.swin.depths = {list(swin.depths)} must have a number of blocks, at least 1, for each stage")
    if found:
        return found
    if sum(swin.depths) != model.num_layers:
        found.append(f"model.num_layers = {model.num_layers} must be the blocks of all stages, {sum(swin.depths)}")
    side, rest = divmod(swin.image_size, swin.patch_size)
    if rest or side % (1 << len(swin.depths) - 1):
        found.append(
            f"model.swin.image_size = {swin.image_size} must be a multiple of patch_size = {swin.patch_size} times "
            f"{1 << len(swin.depths) - 1}, as each of the {len(swin.depths)} stages after the first halves the side"
        )
        return found
    if model.seq_len != side**2:
        found.append(f"model.seq_len = {model.seq_len} must be the patches of an image, {side} x {side} = {side**2}")
    for stage in range(len(swin.depths)):
        if (side >> stage) % min(swin.window_size, side >> stage):
            found.append(
                f"model.swin.window_size = {swin.window_size} does not divide the {side >> stage} patches of stage "
                f"{stage}'s side: take a divisor, or change image_size"
            )
    if not 0 <= swin.moe_from < len(swin.depths):
        found.append(f"model.swin.moe_from = {swin.moe_from} must be a stage, 0 .. {len(swin.depths) - 1}")
    elif not any(has_experts(model, layer) for layer in range(sum(swin.depths))):
        found.append(f"model.moe_every = {model.moe_every}: no stage from moe_from = {swin.moe_from} on has so many blocks")
    for key in ("pp", "vpp", "tp"):
        if getattr(plan, key) != 1:
            found.append(
                f"plan.{key} = {getattr(plan, key)} must be 1: a Swin transformer is spread by dp and ep, its stages have "
                f"blocks of different sizes"
            )
    return found
