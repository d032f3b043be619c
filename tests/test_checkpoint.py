"""Checkpoints: any plan reads what another wrote, a killed run loses nothing, a hostile file runs nothing."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dist import spawn, start_training, worker_pids
from parity import CACHE, LOSS_TOLERANCE, MODEL, WORKLOAD, make_config, make_trainer, run_curve

from smartmoe import checkpoint, cli, record
from smartmoe.config import GateConfig, OnlineConfig, ParallelPlan, to_dict
from smartmoe.placement import Placement

GATE = GateConfig(kind="gshard", capacity=1.5)


def _shuffled(plan):
    order = np.random.default_rng(3).permutation(MODEL.num_experts)
    return Placement(num_ranks=plan.ep, expert_of_slot=tuple(order.tolist()))


def _train_and_save(world_rank, plan, folder):
    trainer = make_trainer(make_config(plan, gate=GATE))
    trainer.online.move([(layer, _shuffled(plan)) for layer in trainer.layers.values()])
    for _ in range(5):
        trainer.run_iteration()
    trainer.save(Path(folder))


def _resume_and_train(world_rank, plan, folder):
    trainer = make_trainer(make_config(plan, gate=GATE))
    trainer.resume(checkpoint.latest(Path(folder)))
    return [layer.placement for layer in trainer.layers.values()], [trainer.run_iteration().lm_loss for _ in range(5)]


@pytest.fixture(scope="module")
def whole():
    return run_curve(make_config(gate=GATE)).loss


PLANS = [
    (4, ParallelPlan(pp=2, vpp=2, dp=2, ep=2), 2, ParallelPlan(dp=1, tp=2, ep=2)),
    (2, ParallelPlan(tp=2, ep=1), 4, ParallelPlan(dp=4, ep=4)),
    (2, ParallelPlan(dp=2, ep=2), 1, ParallelPlan()),
]


@pytest.mark.parametrize(
    "saving_world,saving,loading_world,loading", PLANS, ids=lambda v: getattr(v, "describe", str)()
)
def test_another_plan_continues_with_the_same_losses(tmp_path, whole, saving_world, saving, loading_world, loading):
    spawn(_train_and_save, saving_world, saving, str(tmp_path))
    placements, losses = spawn(_resume_and_train, loading_world, loading, str(tmp_path))[0]
    plain = Placement.identity(MODEL.num_experts, loading.ep)
    assert placements == [_shuffled(saving) if saving.ep == loading.ep else plain] * MODEL.num_layers
    np.testing.assert_allclose(losses, whole[5:], rtol=LOSS_TOLERANCE)


def _write_run(run_dir, plan):
    config = to_dict(make_config(plan, gate=GATE))
    config["workload"]["checkpoint_interval"] = 5
    config["workload"]["iterations"] = 10
    record.create_run(run_dir, "run", config, [])


def test_a_killed_rank_and_a_resume_on_another_plan_lose_nothing(tmp_path, whole):
    _write_run(tmp_path, ParallelPlan(dp=2, ep=2))
    process = start_training(tmp_path, 2, CACHE)
    saved = tmp_path / "checkpoints" / "iter_0000005"
    deadline = time.monotonic() + 240
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert saved.exists(), process.communicate(timeout=60)[0]
    os.kill(worker_pids(process)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert checkpoint.latest(tmp_path / "checkpoints") == saved
    # what a kill while writing, and a disk that forgets, would leave
    shutil.copytree(saved, saved.with_name(".iter_0000008.partial"))
    shutil.copytree(saved, saved.with_name("iter_0000007"))
    cut = next(saved.with_name("iter_0000007").glob("*.distcp"))
    cut.write_bytes(cut.read_bytes()[:-100])

    _write_run(tmp_path, ParallelPlan(pp=2))
    process = start_training(tmp_path, 2, CACHE, "--resume")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    said = f"checkpoint iter_0000007 is damaged and is not used: {cut.name} has {cut.stat().st_size} bytes instead of"
    for text in (output, (tmp_path / "train.log").read_text()):
        assert said in text and "resumed from checkpoint iter_0000005" in text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 11))
    np.testing.assert_allclose([line["lm_loss"] for line in lines], whole, rtol=LOSS_TOLERANCE)


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    trainer = make_trainer(make_config())
    path = trainer.save(tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="metadata"):
        trainer.resume(path)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["truncate_tensors", "truncate_meta", "no_metadata"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, damage):
    trainer = make_trainer(make_config())
    path = trainer.save(tmp_path)
    victim = {"truncate_tensors": next(path.glob("*.distcp")), "truncate_meta": path / "meta.json"}.get(damage)
    if victim is None:
        (path / ".metadata").unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(ValueError, match="iter_0000000"):
        trainer.resume(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = make_trainer(make_config()).save(tmp_path)
    other = make_config(model=dataclasses.replace(MODEL, ffn_size=96))
    with pytest.raises(ValueError, match="model.ffn_size = 64, not 96"):
        make_trainer(other).resume(path)


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    trainer = make_trainer(make_config())
    good = trainer.save(tmp_path)
    (tmp_path / ".iter_0000005.partial").mkdir()
    (tmp_path / "iter_0000007").mkdir()
    assert checkpoint.latest(tmp_path) == good
    with torch.no_grad():
        trainer.optimizer.masters[0].add_(1.0)
    trainer.resume(good)


def test_the_scale_of_the_loss_is_that_of_runs_in_float16(tmp_path):
    """A run in float16 that goes on from float32 would lose small gradients at its scale of 1."""
    shallow = dataclasses.replace(MODEL, num_layers=1)
    trainers = {
        dtype: make_trainer(make_config(model=shallow, workload=dataclasses.replace(WORKLOAD, dtype=dtype)))
        for dtype in ("float32", "float16")
    }
    single, half = trainers["float32"], trainers["float16"]
    half.optimizer.loss_scale, half.optimizer.good_steps = 256.0, 7
    paths = {dtype: trainer.save(tmp_path / dtype) for dtype, trainer in trainers.items()}
    single.resume(paths["float16"])
    assert (single.optimizer.loss_scale, single.optimizer.good_steps) == (1.0, 0)
    half.resume(paths["float16"])
    assert (half.optimizer.loss_scale, half.optimizer.good_steps) == (256.0, 7)
    half.optimizer.loss_scale, half.optimizer.good_steps = 512.0, 3
    half.resume(paths["float32"])
    assert (half.optimizer.loss_scale, half.optimizer.good_steps) == (512.0, 3)


def _spoil(path, damage):
    victim = next(path.glob("*.distcp"))
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "gone":
        (path / ".metadata").unlink()
    else:
        (path / "meta.json").write_text("{")
    return victim.name


def test_the_last_good_checkpoint_is_found_and_the_user_is_told(tmp_path):
    trainer = make_trainer(make_config())
    good = trainer.save(tmp_path)
    words = {"cut": "bytes instead of", "flipped": "have changed", "gone": ".metadata is missing", "meta": "meta.json"}
    for number, (damage, word) in enumerate(words.items(), start=1):
        newest = tmp_path / f"iter_{number:07d}"
        shutil.copytree(good, newest)
        told = []
        assert checkpoint.newest_good(tmp_path, told.append) == newest and not told
        _spoil(newest, damage)
        assert checkpoint.newest_good(tmp_path, told.append) == good
        assert told[0].startswith(f"checkpoint {newest.name} is damaged and is not used") and word in told[0]
        assert len(told) == number
    trainer.resume(good)
    _spoil(good, "cut")
    with pytest.raises(ValueError, match="none of its 5 checkpoints is whole"):
        checkpoint.newest_good(tmp_path, told.append)
    assert checkpoint.newest_good(tmp_path / "absent", told.append) is None


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path):
    trainer = make_trainer(make_config())
    first = trainer.save(tmp_path)
    with torch.no_grad():
        trainer.optimizer.masters[0].add_(1.0)
    assert trainer.save(tmp_path) == first == checkpoint.newest_good(tmp_path, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    want = trainer.optimizer.masters[0].clone()
    trainer.optimizer.masters[0].data.zero_()
    trainer.resume(first)
    assert torch.equal(trainer.optimizer.masters[0], want)


def _save_shuffled(world_rank, plan, folder):
    trainer = make_trainer(make_config(plan, online=OnlineConfig(policy="auto", interval=5)))
    for _ in range(3):
        trainer.run_iteration()
    trainer.online.move([(layer, _shuffled(plan)) for layer in trainer.layers.values()])
    path = trainer.save(Path(folder))
    return path, trainer.online.saved_loads()


PLAIN = """
import sys, torch
file = torch.load(sys.argv[1], weights_only=True)
assert not [name for name in sys.modules if name.startswith("smartmoe")]
torch.save({name: value.double().sum() for name, value in file["model"].items()}, sys.argv[2])
"""


def test_an_export_is_in_plain_order_and_needs_no_library(tmp_path, capsys):
    plan = ParallelPlan(pp=2, dp=2, ep=2)
    results = spawn(_save_shuffled, 4, plan, str(tmp_path / "checkpoints"))
    path, out = results[0][0], tmp_path / "model.pt"
    assert cli.main(["export", str(tmp_path), str(out), "--optimizer"]) == 0
    assert f"{MODEL.num_experts} experts" in capsys.readouterr().out
    file = torch.load(out, weights_only=True)
    alone = make_trainer(make_config(online=OnlineConfig(policy="auto")))
    alone.resume(path)  # one process, experts in plain order
    assert alone.online.saved_loads() == results[0][1] | results[2][1] and len(alone.online.saved_loads()) == 4
    assert file["iteration"] == 3 and file["config"]["model"]["num_experts"] == MODEL.num_experts
    for idx, ref in enumerate(alone.optimizer.buffers.refs):
        state = alone.optimizer.state_tensors(idx)
        for kind, there in (("master", "model"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            assert torch.equal(file[there][ref.name], state[kind]), (kind, ref.name)
    assert len(file["model"]) == len(alone.optimizer.buffers.refs)
    sums = tmp_path / "sums"
    subprocess.run([sys.executable, "-I", "-c", PLAIN, str(out), str(sums)], check=True, cwd=tmp_path)
    assert torch.load(sums).keys() == file["model"].keys()
    _spoil(path, "flipped")
    assert cli.main(["export", str(path), str(tmp_path / "other.pt")]) == 2 and "have changed" in capsys.readouterr().err
    assert not (tmp_path / "other.pt").exists()
    assert cli.main(["export", str(tmp_path / "absent"), str(out)]) == 2
