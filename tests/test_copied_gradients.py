"""Gradients of one batch at the same weights, with copies of experts that stay for a step and without. A factor, or a part
that is missed or taken twice, in the sums or in the norm, is a slope off 1 here; losses of runs hide it in their noise."""

import dataclasses

import numpy as np
import pytest
import torch
from dist import spawn
from parity import GATES, MODEL, WORKLOAD, make_config, make_trainer
from test_parity import random_replicas

from smartmoe.config import LayerConfig, OnlineConfig, ParallelPlan
from smartmoe.optimizer import layer_of
from smartmoe.placement import Replicas

SMALL = dataclasses.replace(MODEL, num_layers=2)
SEEDS = range(2)
NUM_MICRO_BATCHES = 4
# Of an expert's gradient: how far copies may take it, |slope - 1| of its projection on the one without copies, the same on
# average of all; |ratio - 1| of the norms of all gradients. In bfloat16 products round what they give, and a copy's gradient
# is rounded once more for the journey; neither has a bias. Last: how far gradients may differ that no copy has a part in.
TOLERANCE = {"float32": (1e-5, 1e-5, 1e-6, 1e-6, 1e-5), "bfloat16": (1e-2, 8e-3, 5e-4, 3e-4, 2e-2)}


def gradients(trainer, batch):
    """(losses, norm, gradient by name) of `batch` at the weights of now, as a step takes them; nothing is updated."""
    trainer.send_replicas()
    losses = trainer.runner.run(*batch)
    trainer._return_replica_grads()
    trainer.optimizer.buffers.reduce()
    norm = trainer.optimizer.grad_norm()
    found = {ref.name: ref.grad.double() for ref in trainer.optimizer.buffers.refs}
    trainer.optimizer.buffers.zero()
    return losses.tolist(), norm, found


def copy_at_random(trainer, rng):
    for layer in trainer.layers.values():
        layer.set_replicas(random_replicas(layer.placement, layer.experts.num_replicas, rng, layer.placement.num_ranks))


def compare(trainer, rng):
    """Of `trainer`'s next batch: (difference over size, slope - 1) of each expert of this rank that has copies; difference
    over size of every other gradient; ratios - 1 of the norms and of the losses of this rank."""
    copy_at_random(trainer, rng)
    batch = trainer.batch(trainer.iteration)
    copied = {layer.layer_idx: set(layer.replicas.expert_of_replica) for layer in trainer.layers.values()}
    losses, norm, found = gradients(trainer, batch)
    for layer in trainer.layers.values():
        layer.set_replicas(Replicas.none(layer.placement, layer.experts.num_replicas))
    plain_losses, plain_norm, plain = gradients(trainer, batch)
    with_copies, others = [], []
    for ref in trainer.optimizer.buffers.refs:
        pairs = [(None, found[ref.name], plain[ref.name])]
        if ref.kind == "expert":
            placement = trainer.layers[layer_of(ref.name)].placement
            pairs = zip(placement.experts_of_rank(trainer.mesh.ep_rank), found[ref.name], plain[ref.name], strict=True)
        for expert, mine, want in pairs:
            size = want.norm().item()
            if not size:  # an expert without tokens
                assert not mine.any()
                continue
            off = (mine - want).norm().item() / size
            if ref.kind == "expert" and expert in copied[layer_of(ref.name)]:
                with_copies.append((off, (mine * want).sum().item() / size**2 - 1))
            else:
                others.append(off)
    ratios = [norm / plain_norm - 1, losses[0] / plain_losses[0] - 1]
    return with_copies, others, ratios


def compare_all(world_rank, device, layer):
    """By dtype, what `compare` gives of all seeds."""
    results = {}
    for dtype in TOLERANCE:
        parts = []
        for seed in SEEDS:
            workload = dataclasses.replace(WORKLOAD, dtype=dtype, seed=seed, clip_grad=0.1)
            config = make_config(
                ParallelPlan(dp=2, ep=2), NUM_MICRO_BATCHES, model=SMALL, gate=GATES["dropless"], workload=workload,
                layer=layer, online=OnlineConfig(replicate="history", replica_slots=2),
            )  # fmt: skip
            trainer, rng = make_trainer(config, device.format(world_rank)), np.random.default_rng(seed)
            for _ in range(4 if "cuda" in device else 1):  # a GPU's passes come from graphs then
                copy_at_random(trainer, rng)
                assert trainer.run_iteration().optimizer.grad_norm > 0.1, "nothing is clipped"
            parts.append(compare(trainer, rng))
            trainer.close()
        results[dtype] = [np.concatenate([np.array(part[i]) for part in parts]) for i in range(3)]
    return results


def check(results_W):
    for dtype, (off_most, slope_most, mean_most, ratio_most, other_most) in TOLERANCE.items():
        copied, others, ratios = (np.concatenate([results[dtype][i] for results in results_W]) for i in range(3))
        off, slope = copied.T
        assert len(off) > 20 and off.max() > 0, f"{dtype}: copies got no tokens"
        assert off.max() < off_most and others.max() < other_most, (dtype, off.max(), others.max())
        assert np.abs(slope).max() < slope_most, (dtype, np.abs(slope).max())
        assert abs(slope.mean()) < mean_most, (dtype, slope.mean())
        assert np.abs(ratios).max() < ratio_most, (dtype, ratios)


def test_copies_change_gradients_by_unbiased_rounding_alone():
    check(spawn(compare_all, 2, "cpu", LayerConfig()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_copies_change_gradients_on_two_gpus_by_unbiased_rounding_alone():
    check(spawn(compare_all, 2, "cuda:{}", LayerConfig(dispatcher="direct", row_factor=2.0), backend="nccl"))
