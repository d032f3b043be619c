"""Runs that share the GPUs of a machine: several in one world, worlds side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launch
import pytest

HERE = Path(__file__).resolve().parent
CLUSTER = 'device = "cuda"\nranks_per_node = 1\n[machine]\nruns_per_world = 3\ncores_per_rank = 2\n'


@pytest.fixture
def do(tmp_path):
    configs = tmp_path / "configs"
    for name in ("experiments", "clusters"):
        (configs / name).mkdir(parents=True)
    (configs / "models.toml").write_text("[tiny]\n")
    (configs / "clusters" / "local.toml").write_text(CLUSTER)

    def do(seeds, *more, gpus=4, cores=8):
        """What happens to runs that do as their seeds say: (exit code, what is said, (seed, ranks) -> run.json and folder)."""
        grids = [
            '[[grid]]\ncluster = "local"\nmodel = "tiny"\npanel = "{ranks}"\nsamples_per_rank = 2\n'
            f'group = "{seed}"\nworkload = {{ seed = {seed}, micro_batch_size = 1 }}\n'
            'gates = [{ kind = "naive" }]\n[[grid.systems]]\nsystem = "fastmoe"'
            for seed in seeds
        ]
        (configs / "experiments" / "fig8.toml").write_text("\n".join(['figure = "fig8"', *grids]))
        words = ["--configs", str(configs), "--out", str(tmp_path / "out"), "--cluster", "local", *more]
        done = subprocess.run(
            [sys.executable, str(HERE / "launch_fake.py"), *words], capture_output=True, text=True, timeout=100,
            env={**os.environ, "FAKE_GPUS": str(gpus), "FAKE_CORES": str(cores), "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        runs = {}
        for path in tmp_path.glob("out/logs/**/run.json"):
            run = json.loads(path.read_text())
            runs[run["config"]["workload"]["seed"], run["provenance"]["num_ranks"]] = run, path.parent
        return done.returncode, done.stdout + done.stderr, runs

    return do


def said_by(runs, name):
    return {key: (folder / name).read_text() for key, (_, folder) in runs.items() if (folder / name).exists()}


def test_runs_of_one_size_share_a_world_and_small_worlds_the_machine(do):
    code, text, runs = do([1, 9, 5], "--gpus", "1 2")
    assert code == 1, text
    assert "6 runs in 2 worlds, side by side on 4 GPUs as long as each rank has 2 of the 8 cores" in text
    assert {key: run["status"] for key, (run, _) in runs.items()} == {
        (seed, ranks): status for ranks in (1, 2) for seed, status in ((1, "ok"), (9, "ok"), (5, "oom"))
    }
    # seeds 9 wait until both are there: the two worlds ran at the same time, on GPUs of their own
    gpus, world = said_by(runs, "gpus.txt"), said_by(runs, "world.txt")
    assert gpus[9, 2] == "0,1" and gpus[9, 1] == "2"
    assert world[1, 1] == world[9, 1] != world[1, 2] == world[9, 2]
    assert {runs[1, ranks][0]["config"]["workload"]["global_batch_size"] for ranks in (1, 2)} == {2, 4}
    assert not list(runs[1, 1][1].parents[2].glob("world*.log")) and not said_by(runs, "finished.json")


def test_what_follows_a_run_that_fails_is_done_in_another_world(do):
    code, text, runs = do([1, 8, 1001, 2, 3, 1002], gpus=1)
    statuses = {seed: run["status"] for (seed, _), (run, _) in runs.items()}
    assert code == 1 and statuses == {1: "ok", 8: "failed", 1001: "ok", 2: "failed", 3: "failed", 1002: "ok"}, text
    messages = {seed: run["message"] for (seed, _), (run, _) in runs.items()}
    assert "signal 9 (SIGKILL)" in messages[8] and "killed by signal 9" in messages[3] and "ValueError" in messages[2]
    world = said_by(runs, "world.txt")
    assert world[1, 1] == world[8, 1] != world[1001, 1]
    again = do([1, 8, 1001, 2, 3, 1002], "--resume", gpus=1)
    assert "3 of 6 runs are done already" in again[1] and again[2][8, 1][0]["status"] == "failed"


def test_the_log_of_a_killed_launcher_tells_nothing(do, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "world1.log").write_text("  exitcode  : -9 (pid: 77)\n")
    code, text, runs = do([1003, 1], gpus=1)
    assert code == 1 and runs[1003, 1][0]["message"] == "exit code 7; see console.log", text


def test_worlds_that_lack_cores_wait_for_one_another(do):
    code, text, runs = do([9], "--gpus", "1 2", cores=4)
    assert code == 0, text
    waited = {key: (folder / "waits").exists() for key, (_, folder) in runs.items()}
    gpus = said_by(runs, "gpus.txt")
    assert gpus[9, 2] == "0,1" and gpus[9, 1] == "0" and waited[9, 2]


def test_sizes_that_do_not_fit_start_nothing(do, monkeypatch, capsys):
    for words in ("3 5", "2 2", "1 01", "two", " "):
        code, text, runs = do([1], "--gpus", words)
        assert code == 2 and "needs different numbers from 1 to 4" in text and not runs
    monkeypatch.setattr(launch, "count_gpus", lambda: 3)
    for words in ([], ["--gpus", "3 2"]):  # by which nothing of the figures divides
        assert launch.main(["--cluster", "local", *words, "--dry-run"]) == 2
        assert '--gpus "1 2"' in capsys.readouterr().err
    assert launch.main(["--cluster", "cpu", "--gpus", "2", "--dry-run"]) == 2
    assert "about the GPUs of this machine" in capsys.readouterr().err
