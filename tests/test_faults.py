"""What goes wrong around migrations and checkpoints: ranks that are killed, disks that are full. Nothing gets lost, nothing
is there twice, and training goes on with the same losses."""

import os
import resource
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import spawn
from parity import MODEL, make_config, make_trainer, run_curve

from smartmoe import checkpoint
from smartmoe import migrate as migrate_module
from smartmoe.config import GateConfig, OnlineConfig, ParallelPlan
from smartmoe.placement import Placement

GATE = GateConfig(kind="gshard", capacity=1.5)
PLAN = ParallelPlan(dp=2, ep=2)
SAVED, KILLED = 3, 4  # iterations done when the checkpoint is written, and when the second migration begins
WHEN = ("before", "during", "after")


def shuffled(seed, num_ranks=2):
    order = np.random.default_rng(seed).permutation(MODEL.num_experts)
    return Placement(num_ranks, tuple(order.tolist()))


def shuffle(trainer, seed):
    trainer.online.move([(layer, shuffled(seed + idx)) for idx, layer in trainer.layers.items()])


def expert_checksums(trainer) -> dict[tuple[str, str, int], int]:
    """(parameter, state, logical expert) -> checksum, of the experts that this rank has."""
    sums = {}
    for idx, ref in enumerate(trainer.optimizer.buffers.refs):
        if ref.kind != "expert":
            continue
        layer = trainer.layers[int(ref.name.split(".")[1])]
        tensors = {"weight": ref.local, **trainer.optimizer.state_tensors(idx)}
        for slot, expert in enumerate(layer.placement.experts_of_rank(trainer.mesh.ep_rank)):
            for kind, tensor in tensors.items():
                one = tensor[slot].detach().clone(memory_format=torch.contiguous_format)  # torch keeps what numpy has seen
                sums[ref.name, kind, expert] = zlib.crc32(one.numpy().tobytes())
    return sums


def merged(parts):
    """One dict of the ranks' checksums; no expert may be on two of them."""
    whole = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole |= part
    return whole


# ------------------------------------------------------------------------------------------------------------- kills


def train_until_killed(world_rank, folder, when):
    trainer = make_trainer(make_config(PLAN, gate=GATE))
    shuffle(trainer, 1)
    for iteration in range(1, KILLED + 1):
        trainer.run_iteration()
        if iteration == SAVED:
            trainer.save(Path(folder))
            parts = [None, None]
            dist.all_gather_object(parts, expert_checksums(trainer))
            torch.save(merged(parts), Path(folder, "checksums"))
    dist.barrier()
    die = world_rank == 1
    if die and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if die and when == "during":  # its experts have been sent or not, none of its slots is filled
        migrate_module._Collective.finish = lambda exchange: os.kill(os.getpid(), signal.SIGKILL)
    shuffle(trainer, 5)
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.run_iteration()
    raise SystemExit("the other rank should be dead")


def resume_all(world_rank, folders):
    results = []
    for folder in folders:
        trainer = make_trainer(make_config(PLAN, gate=GATE))
        trainer.resume(checkpoint.newest_good(Path(folder), pytest.fail))
        placements = [layer.placement for layer in trainer.layers.values()]
        sums = expert_checksums(trainer)
        losses = [trainer.run_iteration().lm_loss for _ in range(3)]
        results.append((placements, sums, losses))
    return results


@pytest.fixture(scope="module")
def whole():
    return run_curve(make_config(gate=GATE)).loss


def test_a_rank_killed_around_a_migration_loses_no_expert(tmp_path, whole):
    folders = {when: tmp_path / when for when in WHEN}
    for when, folder in folders.items():
        folder.mkdir()
        with pytest.raises(AssertionError) as failure:
            spawn(train_until_killed, 2, str(folder), when, timeout_s=60)
        assert "should be dead" not in str(failure.value)
        assert checkpoint.latest(folder).name == f"iter_{SAVED:07d}"
    results = spawn(resume_all, 2, [str(folder) for folder in folders.values()])
    for place, folder in enumerate(folders.values()):
        placements, _, losses = results[0][place]
        assert placements == [shuffled(1 + idx) for idx in range(MODEL.num_layers)]
        found = merged(rank[place][1] for rank in results)
        assert found == torch.load(folder / "checksums") and len(found) == MODEL.num_layers * MODEL.num_experts * 4 * 4
        assert losses == results[0][0][2]  # bit for bit the same after each of the kills
        np.testing.assert_allclose(losses, whole[SAVED : SAVED + 3], rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- a full disk


def fill_the_disk(world_rank, folder):
    trainer = make_trainer(make_config(PLAN, gate=GATE))
    folder, told = Path(folder), []
    good = trainer.save(folder)
    trainer.run_iteration()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world_rank == 1:  # what it writes from now on ends after 4 KiB, with an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        words = "iter_0000001: this checkpoint could not be written: rank 1: a file could not be written to its end"
        with pytest.raises(OSError, match=words) as failure:
            trainer.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.newest_good(folder, told.append) == good and not told
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == [good.name]
    dist.barrier()
    if world_rank == 0:  # the coordinator alone, at its last step
        write_json, checkpoint.record.write_json = checkpoint.record.write_json, _no_space
    with pytest.raises(OSError, match="No space left on device"):
        trainer.save(folder)
    if world_rank == 0:
        checkpoint.record.write_json = write_json
    assert checkpoint.newest_good(folder, told.append) == good and not told
    trainer.run_iteration()
    again = trainer.save(folder)
    assert checkpoint.newest_good(folder, told.append) == again and not told
    return str(failure.value)


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_a_checkpoint_and_nothing_else(tmp_path):
    messages = spawn(fill_the_disk, 2, str(tmp_path), timeout_s=120)
    assert messages[0] == messages[1]


# ------------------------------------------------------------------------------------------------------- many migrations


def train_with_and_without_moves(world_rank, num_moves):
    results = []
    for moves in (False, True):
        trainer = make_trainer(make_config(PLAN, gate=GATE))
        losses = []
        for step in range(num_moves):
            losses.append(trainer.run_iteration().lm_loss)
            if moves:
                shuffle(trainer, 100 + step)
        results.append((losses, expert_checksums(trainer)))
    return results, [train_with_auto(online, num_moves) for online in AUTO]


AUTO = [
    OnlineConfig(policy="auto", interval=5, min_gain=0.0),
    OnlineConfig(policy="auto", interval=5, min_gain=0.0, replicate="history", replica_slots=1),
]


def train_with_auto(online, num_iterations, device="cpu"):
    trainer = make_trainer(make_config(PLAN, gate=GATE, online=online), device)
    results = [trainer.run_iteration() for _ in range(num_iterations)]
    return [result.lm_loss for result in results], [event for result in results for event in result.events]


def test_twenty_migrations_and_auto_change_no_bit_of_any_expert():
    worlds = spawn(train_with_and_without_moves, 2, 20)
    results = [runs for runs, _ in worlds]
    (still, still_sums), (moved, moved_sums) = (
        (results[0][run][0], merged(rank[run][1] for rank in results)) for run in range(2)
    )
    assert still == moved and still_sums == moved_sums
    assert results[0][0][1].keys() != results[0][1][1].keys()  # they ended elsewhere
    auto = worlds[0][1]
    assert auto[0][0] == still
    np.testing.assert_allclose(auto[1][0], still, rtol=1e-5)
    for (_, events), (_, there) in zip(auto, worlds[1][1], strict=True):
        assert {event["kind"] for event in events} - {"keep"}, [event["reason"] for event in events]
        drop = {"cost_ms"}
        assert [{k: v for k, v in e.items() if k not in drop} for e in events] == [
            {k: v for k, v in e.items() if k not in drop} for e in there
        ]


def train_on_gpus(world_rank):
    torch.backends.cuda.matmul.allow_tf32 = False
    return [train_with_auto(online, 20, f"cuda:{world_rank}") for online in (OnlineConfig(), *AUTO)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_auto_on_two_gpus_keeps_the_losses_and_decides_alike():
    first, second = spawn(train_on_gpus, 2, backend="nccl")
    for (losses, events), (_, there) in zip(first, second, strict=True):
        np.testing.assert_allclose(losses, first[0][0], rtol=1e-4)
        assert [(e["iteration"], e["layer"], e["kind"], e["reason"]) for e in events] == [
            (e["iteration"], e["layer"], e["kind"], e["reason"]) for e in there
        ]
    assert all(events for _, events in first[1:])
