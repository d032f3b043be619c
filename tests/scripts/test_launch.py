import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import launch
import pytest
import runner
from grid import Machine
from processes import is_alive, wait_for
from slurm import Site
from worlds import Worlds

from smartmoe import hosts, record
from smartmoe.config import ClusterSpec

HERE = Path(__file__).resolve().parent
CLUSTER = 'device = "cpu"\nranks_per_node = 4\n'


def grid(seed, timeout_s=60, **more):
    lines = [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    head = ["[[grid]]", 'cluster = "cpu"', 'model = "tiny"', f'panel = "seed {seed}"', 'group = "g"']
    body = [f"timeout_s = {timeout_s}", f"workload = {{ seed = {seed} }}", 'gates = [{ kind = "naive" }]']
    return "\n".join([*head, *body, "[[grid.systems]]", 'system = "fastmoe"', *lines])


@pytest.fixture
def setup(tmp_path):
    configs = tmp_path / "configs"
    for name in ("experiments", "clusters"):
        (configs / name).mkdir(parents=True)
    (configs / "models.toml").write_text("[tiny]\n")
    (configs / "clusters" / "cpu.toml").write_text(CLUSTER)

    def declare(*grids):
        (configs / "experiments" / "fig8.toml").write_text("\n".join(['figure = "fig8"', *grids]))
        return ["--configs", str(configs), "--out", str(tmp_path / "out"), "--cluster", "cpu"]

    return declare


def start(arguments, **kwargs):
    command = [sys.executable, str(HERE / "launch_fake.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def run(arguments):
    child = start(arguments)
    text, _ = child.communicate(timeout=120)
    return child.returncode, text


def runs_of(tmp_path):
    found = [json.loads(path.read_text()) for path in tmp_path.glob("out/logs/**/run.json")]
    return {run["config"]["workload"]["seed"]: run for run in found}


def folder_of(tmp_path, seed):
    paths = [path.parent for path in tmp_path.glob("out/logs/**/run.json")]
    return next(
        path for path in paths if json.loads((path / "run.json").read_text())["config"]["workload"]["seed"] == seed
    )


def test_every_way_to_end_has_its_status_and_none_stops_the_others(setup, tmp_path):
    seeds = {2: 60, 3: 60, 5: 60, 6: 60, 8: 60, 7: 2, 1: 60}
    code, text = run(setup(*(grid(seed, timeout_s) for seed, timeout_s in seeds.items())))
    found = runs_of(tmp_path)
    assert code == 1, text
    assert {seed: run["status"] for seed, run in found.items()} == {
        1: "ok", 2: "failed", 3: "failed", 5: "oom", 6: "failed", 7: "timeout", 8: "failed",
    }  # fmt: skip
    # "out of memory" in a message is no oom: only the exception's own word counts
    assert found[2]["message"] == "rank 2: ValueError: out of memory, it says"
    assert found[3]["message"] == "killed by signal 9 (SIGKILL)"
    assert "exit code 7" in found[6]["message"] and "RuntimeError: something odd" in found[6]["message"]
    assert "within 2 s (iteration 1 was the last)" in found[7]["message"]
    assert "signal 9 (SIGKILL)" in found[8]["message"]
    assert found[1]["message"] == "" and found[1]["started"] and found[1]["ended"]
    assert "6 of 7 runs did not end well" in text and "[7/7]" in text
    # a timed-out run's children are gone too, even those in a session of their own that ignore SIGTERM
    pid = int((folder_of(tmp_path, 7) / "child.pid").read_text())
    assert not is_alive(pid)
    assert (folder_of(tmp_path, 1) / "env.txt").read_text() == "1"
    assert found[1]["provenance"]["num_ranks"] == 4 and found[1]["provenance"]["entry"] == "train"


def test_resume_skips_what_is_done_and_sets_failed_attempts_aside(setup, tmp_path):
    assert run(setup(grid(1), grid(2)))[0] == 1
    code, text = run(setup(grid(1), grid(2)))
    assert code == 2 and "--resume" in text
    before = runs_of(tmp_path)[1]
    code, text = run([*setup(grid(1), grid(2)), "--resume"])
    assert code == 1 and "1 of 2 runs are done already" in text
    assert runs_of(tmp_path)[1] == before
    aside = folder_of(tmp_path, 2) / "attempt1"
    assert {path.name for path in aside.iterdir()} == {"error.json", "metrics.jsonl", "console.log"}
    assert len((folder_of(tmp_path, 2) / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_keeps_its_bars_when_another_figure_is_asked_for_next(setup, tmp_path):
    """Figures done one after another into one run-set share runs: the later one must not take them from the earlier."""
    arguments = setup(grid(1), grid(2))
    (tmp_path / "configs" / "experiments" / "fig10.toml").write_text('figure = "fig10"\n' + grid(1) + "\n" + grid(2))
    figures = lambda: {seed: sorted(bar["figure"] for bar in run["bars"]) for seed, run in runs_of(tmp_path).items()}  # noqa: E731
    assert run([*arguments, "--figures", "8"])[0] == 1  # the second fails and is done again
    assert figures() == {1: ["fig8"], 2: ["fig8"]}
    for _ in range(2):
        run([*arguments, "--figures", "10", "--resume"])
        assert figures() == {1: ["fig10", "fig8"], 2: ["fig10", "fig8"]}


def test_resume_runs_again_what_has_another_config(setup, tmp_path):
    assert run(setup(grid(1)))[0] == 0
    code, text = run([*setup(grid(1).replace("seed = 1 }", "seed = 1, iterations = 30 }")), "--resume"])
    assert code == 0 and "done already" not in text
    assert runs_of(tmp_path)[1]["config"]["workload"]["iterations"] == 30


def test_resume_after_kill_9_of_the_launcher(setup, tmp_path):
    child = start(setup(grid(1), grid(4), grid(2)))
    wait_for(lambda: list(tmp_path.glob("out/logs/**/fake.pid")))
    pid = int((folder_of(tmp_path, 4) / "fake.pid").read_text())
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert {seed: run["status"] for seed, run in runs_of(tmp_path).items()} == {1: "ok", 4: "running", 2: "pending"}
    wait_for(lambda: not is_alive(pid))  # the run does not outlive its launcher
    arguments = [*setup(grid(1), grid(4, timeout_s=1), grid(2)), "--resume"]
    code, text = run(arguments)
    assert code == 1 and "1 of 3 runs are done already" in text
    assert {seed: run["status"] for seed, run in runs_of(tmp_path).items()} == {1: "ok", 4: "timeout", 2: "failed"}


def test_a_run_that_goes_on_has_not_finished_yet(setup, tmp_path):
    """Its launcher was killed after the run had ended and before it took notice."""
    assert run(setup(grid(1)))[0] == 0
    folder = folder_of(tmp_path, 1)
    record.set_status(folder, "running")
    (folder / "checkpoints" / "iter_0000001").mkdir(parents=True)
    for name in ("checkpoints/iter_0000001/meta.json", "finished.json"):
        (folder / name).write_text("{}")
    (again,) = launch.Configs(tmp_path / "configs").expand(["fig8"], "cpu", ClusterSpec(name="cpu", ranks_per_node=4))
    launcher = runner.Launcher(root=tmp_path / "out" / "logs", provenance={}, env={}, cwd=tmp_path)
    assert launcher.can_resume(again)
    launcher.declare(again)
    assert not (folder / "finished.json").exists() and (folder / "metrics.jsonl").exists()


def test_an_interruption_while_a_run_starts_ends_it(setup, tmp_path, monkeypatch):
    setup(grid(1))
    (one,) = launch.Configs(tmp_path / "configs").expand(["fig8"], "cpu", ClusterSpec(name="cpu", ranks_per_node=4))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    launcher = runner.Launcher(root=tmp_path, provenance={}, env={**os.environ}, cwd=tmp_path, command=lambda *_: sleep)
    launcher.declare(one)
    worlds, set_status = Worlds(launcher, [one], Machine(), [], 2), record.set_status
    (world,) = worlds.waiting

    def interrupted(run_dir, status, message=""):
        if status == "running":
            raise runner.Interrupted
        return set_status(run_dir, status, message)

    monkeypatch.setattr(record, "set_status", interrupted)
    with pytest.raises(runner.Interrupted):
        worlds.do_all()
    gone = world.child.poll() is not None
    world.child.kill()
    assert gone and record.read_run(tmp_path / one.folder)["message"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_run_and_leaves_it_for_resume(setup, tmp_path, number):
    child = start([*setup(grid(7), grid(1)), "--figures", "8", "--only", "fastmoe|padded"])
    wait_for(lambda: list(tmp_path.glob("out/logs/**/fake.pid")))
    pids = [int((folder_of(tmp_path, 7) / name).read_text()) for name in ("fake.pid", "child.pid")]
    child.send_signal(number)
    text, _ = child.communicate(timeout=30)
    assert child.returncode == 128 + number and "Traceback" not in text
    again = shlex.split(next(line for line in text.splitlines() if line.startswith("interrupted; go on with "))[24:])
    assert again[:5] == ["./RUNME-b.sh", "--cluster", "cpu", "--resume", str(tmp_path / "out")]
    assert again[-4:] == ["--figures", "8", "--only", "fastmoe|padded"], "not with more than was asked for"
    found = runs_of(tmp_path)
    assert (found[7]["status"], found[7]["message"], found[1]["status"]) == ("failed", "interrupted", "pending")
    assert not any(is_alive(pid) for pid in pids)


def test_stop_waits_until_what_it_killed_is_gone(monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    parent = "import subprocess as s, sys; child = s.Popen([sys.executable, '-c', sys.argv[1]]); print(child.pid); child.wait()"
    child = subprocess.Popen([sys.executable, "-uc", parent, code], stdout=subprocess.PIPE, text=True)
    pid = int(sorted(child.stdout.readline() for _ in range(2))[0])
    kill = os.kill
    monkeypatch.setattr(runner.os, "kill", lambda *one: threading.Timer(0.3, kill, one).start())  # one that ends slowly
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    runner.stop(child)
    assert not is_alive(pid)


def test_resume_alone_goes_on_with_what_was_asked_for(setup, tmp_path, capsys):
    arguments = setup(grid(1), grid(2).replace('"fastmoe"', '"padded"'))
    assert run([*arguments, "--figures", "8", "--only", "fastmoe"])[0] == 0
    alone = ["--out", str(tmp_path / "out"), "--resume"]
    code, text = run(alone)
    assert code == 0 and "1 of 1 runs are done already" in text and "--figures 8 --only fastmoe" in text
    assert list(runs_of(tmp_path)) == [1], "more than was asked for"
    assert launch.main([*alone, "--only", "padded", "--configs", arguments[1], "--dry-run", "--cluster", "cpu"]) == 0
    assert "fig8/padded" in capsys.readouterr().out, "what is asked for now counts"
    for damaged in ('{"arguments": [8]}', '{"arguments": "8"}', '{"arguments": ["--fig', "[]"):
        (tmp_path / "out" / launch.ASKED).write_text(damaged)
        assert launch.main(alone) == 2 and "asked.json: not what a launcher wrote" in capsys.readouterr().err


def test_two_launchers_do_not_share_a_run_set(setup, tmp_path):
    arguments = setup(grid(4))
    child = start(arguments)
    wait_for(lambda: list(tmp_path.glob("out/logs/**/fake.pid")))
    code, text = run([*arguments, "--resume"])
    assert code == 2 and "another launcher" in text
    child.terminate()
    child.communicate(timeout=30)


def test_a_file_system_without_locks_is_used_without(setup, monkeypatch):
    def no_lock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(launch.fcntl, "flock", no_lock)
    monkeypatch.setattr(launch, "interruptible", lambda work, words: 0)
    assert launch.main(setup(grid(4))) == 0


TRACED = """
[[grid]]
cluster = "cpu"
entry = "replay"
model = "tiny"
panel = "replay"
group = "g"
workload = { seed = 1, iterations = 21 }
gates = [{ kind = "naive" }]
[[grid.systems]]
system = "smartmoe"
plan = { dp = 4, ep = 4 }
trace_from = "fig8/fastmoe"
"""


def test_a_replay_is_skipped_when_its_trace_was_not_recorded(setup, tmp_path):
    code, text = run(setup(grid(2, record_trace=True), TRACED))
    assert code == 1, text
    found = {run["system"]: run for run in map(json.loads, (p.read_text() for p in tmp_path.glob("out/**/run.json")))}
    assert found["smartmoe"]["status"] == "skipped" and "did not end well" in found["smartmoe"]["message"]


def test_layers_are_timed_after_the_run_that_records_their_trace(setup, tmp_path):
    timed = TRACED.replace('"replay"', '"layer_accuracy"', 1)
    code, text = run(setup(timed.replace('"smartmoe"', '"smartmoe_static"'), grid(1, record_trace=True)))
    assert code == 2 and "names no run before it" in text
    code, text = run(setup(grid(1, record_trace=True), timed.replace('"smartmoe"', '"smartmoe_static"')))
    assert code == 0, text
    paths = {json.loads(p.read_text())["provenance"]["entry"]: p.parent for p in tmp_path.glob("out/logs/**/run.json")}
    assert set(paths) == {"train", "layer_accuracy"}
    found = json.loads((paths["layer_accuracy"] / "run.json").read_text())
    assert found["status"] == "ok"
    assert (paths["layer_accuracy"] / found["config"]["gate"]["trace"]).read_bytes() == b"trace"


def test_dry_run_prints_plans_and_minutes_and_writes_nothing(setup, tmp_path, capsys):
    arguments = setup(grid(1), grid(2))
    assert launch.main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("pp1 dp4 tp1 ep4") == 2 and "2 runs, about 1 minutes" in text
    assert not (tmp_path / "out").exists()


def test_runs_of_a_program_that_is_missing_are_skipped_and_said(setup, tmp_path, monkeypatch, capsys):
    missing = dataclasses.replace(hosts.HOSTS["deepspeed"], package="no_such_package")
    monkeypatch.setitem(hosts.HOSTS, "deepspeed", missing)
    monkeypatch.setattr(launch.data, "load_tokens", lambda *args, **kwargs: argparse.Namespace(num_tokens=0))
    monkeypatch.setattr(launch.Worlds, "do_all", lambda self: [])
    arguments = setup(grid(1), grid(2).replace('"fastmoe"', '"deepspeed"'))
    assert launch.main(arguments) == 0
    assert "skipped: 1 runs of deepspeed: the package no_such_package is not installed" in capsys.readouterr().out
    found = runs_of(tmp_path)
    assert found[1]["status"] == "pending" and found[2]["status"] == "skipped" and "pip install" in found[2]["message"]
    assert found[2]["provenance"]["entry"] == "deepspeed" and found[2]["provenance"]["no_such_package"] == "absent"
    assert launch.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "fig8/deepspeed/" in said and "\n1 runs, about" in said and "skipped: 1 runs" in said
    alone = setup(grid(2).replace('"fastmoe"', '"deepspeed"'))
    assert launch.main([*alone, "--resume"]) == 2 and "all runs are skipped" in capsys.readouterr().err
    container = Site(container=("apptainer",))
    runs = launch.Configs(tmp_path / "configs").expand(["fig8"], "cpu", ClusterSpec(ranks_per_node=4))
    assert launch.without_what_lacks(runs, container) == (runs, {}), "what a container has is not known here"


def test_only_some_runs_of_a_figure(setup, capsys):
    arguments = [*setup(grid(1), grid(2).replace('"fastmoe"', '"padded"')), "--dry-run", "--only"]
    assert launch.main([*arguments, "padded/.*inf"]) == 0
    said = capsys.readouterr().out
    assert "1 runs, about" in said and "fig8/padded" in said and "fig8/fastmoe" not in said
    assert launch.main([*arguments, "tutel"]) == 2 and "none of the 2 runs" in capsys.readouterr().err
    assert launch.main([*arguments, "(("]) == 2 and "not a regular expression" in capsys.readouterr().err


def test_bad_input_starts_nothing(setup, tmp_path, capsys):
    wrong_key, wrong_size = grid(2).replace("panel", "panle"), grid(2).replace("= 2 }", "= 2, micro_batch_size = 3 }")
    for grids, more, message in (
        ([grid(1)], ["--figures", "7"], "unknown figure fig7"),
        ([grid(1)], ["--cluster", "slurm"], "--cluster slurm: "),
        ([grid(1)], ["--max-jobs", "2"], "one run follows the other"),
        ([grid(1)], ["--data", "absent.txt"], "absent.txt: there is no such file"),
        ([grid(1)], ["--data", "absent.txt", "--dry-run"], "absent.txt: there is no such file"),
        ([grid(1), wrong_key], [], 'unknown key "panle"'),
        ([grid(1), wrong_size], [], "not a multiple"),
        ([grid(1)], ["--configs", str(tmp_path / "absent")], "models.toml"),
    ):
        assert launch.main([*setup(*grids), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for arguments in ([], ["--figures", " ", "--dry-run"], ["--max-jobs", "0", "--dry-run"]):
        with pytest.raises(SystemExit) as error:
            launch.main(["--cluster", "cpu", *arguments])
        assert error.value.code == 2


def test_no_gpu_is_said_plainly(setup, monkeypatch, capsys):
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    (Path(setup(grid(1))[1]) / "clusters" / "local.toml").write_text('device = "cuda"\n')
    assert launch.main([*setup(grid(1)), "--cluster", "local"]) == 2
    assert "needs CUDA GPUs" in capsys.readouterr().err
    assert launch.main([*setup(grid(1)), "--cluster", "auto", "--dry-run"]) == 0
    assert "running on: cpu" in capsys.readouterr().out


def test_resume_without_a_name_takes_the_newest_run_set_and_no_other_output(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "venv.sh").write_text("PY=echo\n")
    shutil.copy(HERE.parents[1] / "RUNME-b.sh", tmp_path)
    script = ["bash", str(tmp_path / "RUNME-b.sh"), "--resume", "--dry-run"]
    (tmp_path / "outputs_from_exec_alpa").mkdir()  # of Alpa's benchmark
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "to resume" in done.stderr
    named = [*script[:3], str(tmp_path / "outputs_from_exec_alpa")]
    done = subprocess.run(named, capture_output=True, text=True)
    assert done.returncode == 2 and "outputs_from_exec_alpa holds no logs/ of runs to resume" in done.stderr
    for day in ("20261121T000000Z", "20261122T000000Z"):
        (tmp_path / f"outputs_from_exec_{day}").mkdir()
    done = subprocess.run(script, capture_output=True, text=True)
    assert f"--out {tmp_path}/outputs_from_exec_20261122T000000Z --resume" in done.stdout


def test_environment_is_not_changed(setup):
    before = dict(os.environ)
    launch.main([*setup(grid(1)), "--dry-run"])
    assert dict(os.environ) == before
