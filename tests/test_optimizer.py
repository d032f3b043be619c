"""Gradient norms, clipping, overflow and the learning rate: the same on every rank, and as one process has them."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import spawn
from parity import GATES, WORKLOAD, make_config, make_trainer

from smartmoe import optimizer
from smartmoe.config import ParallelPlan, Workload
from smartmoe.optimizer import layer_of, learning_rate
from smartmoe.parallel import data
from smartmoe.placement import Placement


def test_the_memory_of_a_trainer_that_nobody_has_any_more_is_free():
    trainer = make_trainer(make_config(ParallelPlan()))
    trainer.run_iteration()
    kept = [weakref.ref(thing) for thing in (trainer, trainer.optimizer.buffers, trainer.optimizer.masters[0])]
    del trainer
    gc.collect()
    assert [thing() for thing in kept] == [None] * 3


# dense gradients of several, with experts of one rank, of several, and both cut
SHARED = [(ParallelPlan(dp=4, ep=4), 0), (ParallelPlan(dp=2, tp=2, ep=2), 0), (ParallelPlan(pp=2, dp=2, ep=1), 0),
          (ParallelPlan(dp=4, ep=4), 2)]  # fmt: skip


def _norms(world_rank, cases):
    found = []
    for plan, zero in cases:
        work = dataclasses.replace(WORKLOAD, zero=zero)
        trainer = make_trainer(make_config(plan, gate=GATES["capacity"], workload=work))
        found.append([trainer.run_iteration().optimizer.grad_norm for _ in range(3)])
    return found


def test_the_gradient_norm_is_that_of_one_process():
    (alone,) = _norms(0, [(ParallelPlan(), 0)])
    for found in spawn(_norms, 4, SHARED):
        for norms in found:
            np.testing.assert_allclose(norms, alone, rtol=1e-5)


def test_the_norm_is_that_of_all_gradients():
    trainer = make_trainer(make_config())
    for ref in trainer.optimizer.buffers.refs:
        ref.grad.normal_()
    flat = torch.cat([ref.grad.flatten() for ref in trainer.optimizer.buffers.refs]).double()
    assert trainer.optimizer.grad_norm() == pytest.approx(flat.norm().item(), rel=1e-12)


def test_the_norm_of_what_nobody_shares_may_be_begun_before():
    trainer = make_trainer(make_config())
    refs, norm = trainer.optimizer.buffers.refs, trainer.optimizer._norm
    for ref in refs:
        ref.grad.normal_()
    wanted = trainer.optimizer.grad_norm()
    norm._own = [place for place in norm._own if place % 3]  # as if others had the rest
    norm.begin()
    for place, grad in enumerate(norm._views):
        if place % 3:
            grad.zero_()  # it has been seen
    assert trainer.optimizer.grad_norm() == wanted
    assert trainer.optimizer.grad_norm() < wanted, "nothing is kept for the next step"


def test_a_gpu_updates_the_largest_first_and_each_with_its_decay(monkeypatch):
    trainer = make_trainer(make_config())
    masters = [id(master) for master in trainer.optimizer.masters]
    found = []
    monkeypatch.setattr(optimizer, "can_fuse", lambda master: True)
    monkeypatch.setattr(optimizer, "adamw_", lambda master, *others: found.append((id(master), master.numel(), others[-1])))
    trainer.run_iteration()
    sizes = [numel for _, numel, _ in found]
    assert sizes == sorted(sizes, reverse=True) and sorted(key for key, _, _ in found) == sorted(masters)
    decay_of = {key: how.weight_decay for key, _, how in found}
    for key, ref in zip(masters, trainer.optimizer.buffers.refs, strict=True):
        is_vector = ref.local.dim() - (ref.kind == "expert") < 2
        assert decay_of[key] == (0.0 if is_vector else WORKLOAD.weight_decay), ref.name
    assert len(set(decay_of.values())) == 2


def test_reductions_follow_one_another_and_norms_are_taken_beside_the_last(monkeypatch):
    """Two groups at once would be two communicators of NCCL at once, and more than the link where slow ones are stood in for:
    dp4-ep2 took the 342 ms of its dense gradients' bytes alone, with those of experts they are 409."""
    calls = []

    def all_reduce(flat, group, async_op):
        calls.append(f"start {group}")
        return SimpleNamespace(wait=lambda: calls.append(f"wait {group}"))

    monkeypatch.setattr(data, "group_rank", lambda group: 0)
    monkeypatch.setattr(data, "dist", SimpleNamespace(all_reduce=all_reduce))
    params = {kind: torch.nn.Parameter(torch.zeros(2, 2)) for kind in data.KINDS}
    for kind, param in params.items():
        param.parallel = kind
    buffers = data.GradientBuffers(list(params.items()), {kind: kind for kind in data.KINDS})
    buffers.reduce(lambda: calls.append("norms"))
    assert calls == ["start dense", "wait dense", "start tensor", "wait tensor", "start expert", "norms", "wait expert"]
    calls.clear()
    data.GradientBuffers(list(params.items()), {}).reduce(lambda: calls.append("norms"))
    assert calls == ["norms"]


def test_the_norm_does_not_depend_on_where_experts_live():
    trainer = make_trainer(make_config())
    refs = trainer.optimizer.buffers.refs
    for ref in refs:
        ref.grad.normal_()
    plain = {ref.name: ref.grad.clone() for ref in refs}
    norms = set()
    for seed in range(30):
        order = np.random.default_rng(seed).permutation(8)
        for layer in trainer.layers.values():
            layer.set_placement(Placement(1, tuple(order.tolist())))
        for ref in refs:
            if ref.kind == "expert":
                ref.grad.copy_(plain[ref.name][torch.from_numpy(order)])
        norms.add(trainer.optimizer.grad_norm())
    assert len(norms) == 1


def test_small_gradients_of_several_types_are_summed_in_float32(monkeypatch):
    """And together: torch would add those of another type than the sum's one by one."""
    added, add = [], torch._foreach_add_

    def note(totals, parts):
        added.append({part.dtype for part in parts})
        add(totals, parts)

    monkeypatch.setattr(torch, "_foreach_add_", note)
    draw, types = torch.Generator().manual_seed(0), [torch.bfloat16, torch.float32, torch.bfloat16]
    params = [torch.nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in types]
    buffers = data.GradientBuffers([(str(idx), param) for idx, param in enumerate(params)], {})
    buffers._flat["dense"].fill_(torch.nan)  # nobody may read what was there
    wanted = [torch.zeros(5) for _ in params]
    for _ in range(3):
        for param, total in zip(params, wanted, strict=True):
            part = torch.randn(5, generator=draw).to(param.dtype)
            (param * part).sum().backward()
            total += part.float()
    buffers.complete()
    assert added == 2 * [{torch.float32}, {torch.float32}]
    for ref, total in zip(buffers.refs, wanted, strict=True):
        assert torch.equal(ref.grad, total)


def test_small_gradients_may_wait(monkeypatch):
    def masters():
        trainer = make_trainer(make_config())
        for _ in range(2):
            trainer.run_iteration()
        return trainer.optimizer.masters

    wanted = masters()
    for many in (1, 7):
        monkeypatch.setattr(data, "MANY", many)
        assert all(torch.equal(a, b) for a, b in zip(masters(), wanted, strict=True)), many
    monkeypatch.setattr(data, "SMALL", 0)
    assert all(torch.equal(a, b) for a, b in zip(masters(), wanted, strict=True))


def _overflow_once(buffers):
    """Let the next backward passes end in an infinite gradient."""
    expert, complete = next(ref for ref in buffers.refs if ref.kind == "expert"), buffers.complete

    def overflow():
        complete()
        expert.grad.view(-1)[0] = torch.inf
        buffers.complete = complete

    buffers.complete = overflow


def _overflow_on_one_rank(world_rank, plan):
    workload = dataclasses.replace(WORKLOAD, dtype="float16", initial_loss_scale=1024.0)
    trainer = make_trainer(make_config(plan, workload=workload))
    results = []
    for iteration in range(4):
        if iteration == 2 and world_rank == 1:
            _overflow_once(trainer.optimizer.buffers)
        results.append(trainer.run_iteration().optimizer)
    dense = [ref.local.float().sum().item() for ref in trainer.optimizer.buffers.refs if ref.kind == "dense"]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dense)
    return [(r.skipped, r.loss_scale) for r in results], trainer.optimizer.scalars(), everyone


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    for results, scalars, everyone in spawn(_overflow_on_one_rank, 2, ParallelPlan(dp=2, ep=2)):
        assert results == [(False, 1024.0), (False, 1024.0), (True, 1024.0), (False, 512.0)]
        assert scalars["optimizer_steps"] == 3 and scalars["loss_scale"] == 512.0
        assert everyone[0] == everyone[1], "dense replicas drifted apart"


def test_clipping_bounds_the_update_and_zero_turns_it_off():
    def first_update(clip):
        workload = dataclasses.replace(WORKLOAD, clip_grad=clip, weight_decay=0.0, adam_eps=1.0, iterations=1)
        trainer = make_trainer(make_config(workload=dataclasses.replace(workload, warmup_iterations=0)))
        before = [ref.local.clone() for ref in trainer.optimizer.buffers.refs]
        norm = trainer.run_iteration().optimizer.grad_norm
        moved = [
            (ref.local - old).abs().max().item()
            for ref, old in zip(trainer.optimizer.buffers.refs, before, strict=True)
        ]
        return norm, max(moved)

    norm, free = first_update(0.0)
    norm_again, clipped = first_update(norm / 10)
    assert norm == norm_again and clipped < free / 5


def test_the_learning_rate_warms_up_and_decays_to_its_end():
    work = Workload(lr=1.0, min_lr=0.1, lr_warmup_iterations=4, iterations=24)
    rates = [learning_rate(work, i) for i in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[24] == pytest.approx(0.1) and all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_the_layer_of_a_parameter():
    assert layer_of("blocks.13.moe.experts.w1_LDF") == 13
