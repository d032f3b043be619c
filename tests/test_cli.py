import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from smartmoe import cli, config, hosts, record, trace

SRC = str(Path(__file__).resolve().parents[1] / "src")
TINY = """
[model]
num_layers = 2
hidden_size = 32
ffn_size = 32
seq_len = 32
vocab_size = 300
num_experts = 4
[workload]
iterations = 4
global_batch_size = 4
micro_batch_size = 1
warmup_iterations = 1
checkpoint_interval = 2
data = ["text.txt"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SRC)
    Path("run.toml").write_text(TINY)
    Path("text.txt").write_text("for x in range(10): print(x)\n" * 300)
    return tmp_path


def test_ranks_and_plan(folder):
    built = cli.read_config(Path("run.toml"), 2)
    assert built.plan == config.ParallelPlan(dp=2, ep=2) and built.cluster.num_ranks == 2
    Path("run.toml").write_text(TINY + "[plan]\npp = 2\ndp = 2\n")
    assert cli.read_config(Path("run.toml"), None).plan.world_size == 4
    with pytest.raises(ValueError, match="run.toml.*4 ranks, but cluster"):
        cli.read_config(Path("run.toml"), 3)


@pytest.mark.parametrize(("num_gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda"), (8, "cuda")])
def test_a_file_without_a_cluster_runs_on_the_gpus_that_are_there(folder, monkeypatch, num_gpus, device):
    monkeypatch.setattr(cli.shutil, "which", lambda name: "/bin/nvidia-smi" if num_gpus else None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    properties = lambda idx: types.SimpleNamespace(total_memory=(80 - idx) * 10**9)  # noqa: E731
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    cluster = cli.read_config(Path("run.toml"), 2).cluster
    assert (cluster.device, cluster.num_ranks) == (device, 2)
    assert cluster.memory_gbytes == (79 if device == "cuda" else config.ClusterSpec().memory_gbytes)
    Path("run.toml").write_text(TINY + '[cluster]\ndevice = "cpu"\nranks_per_node = 2\n')
    assert cli.read_config(Path("run.toml"), 2).cluster.device == "cpu"


def test_train_writes_a_run_and_goes_on_with_it(folder, capfd):
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out"]) == 0
    run = record.read_run("out")
    assert run["status"] == "ok" and run["provenance"]["num_ranks"] == 1
    first = Path("out/metrics.jsonl").read_text().splitlines()
    assert len(first) == 4 and "[4/4]" in capfd.readouterr().out
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out"]) == 2
    assert "--resume" in capfd.readouterr().err
    Path("run.toml").write_text(TINY.replace("iterations = 4", "iterations = 6"))
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out", "--resume"]) == 0
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[:4] == first
    capfd.readouterr()
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out", "--resume"]) == 0
    assert "out: all 6 iterations are done" in capfd.readouterr().out
    assert cli.main(["report", "out"]) == 0
    text = capfd.readouterr().out
    for words in ("pp1 dp1", "1 rank on", "ok, 6 of 6 iterations in", "newest checkpoint 6", "of 5 iterations after 1"):
        assert words in text
    assert text.index("tokens/s") < text.index("TFLOP/s a rank") < text.index("loss") < text.index("1.00 -> 1.00 fullest")
    Path("run.toml").write_text(TINY)
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out", "--resume"]) == 2
    assert "iter_0000006 has 6 iterations, workload.iterations = 4: ask for more" in capfd.readouterr().err
    assert record.read_run("out")["status"] == "ok"
    resume = ["train", "run.toml", "--ranks", "1", "--out", "out", "--resume"]
    Path("run.toml").write_text(TINY.replace("num_layers = 2", "num_layers = 3"))
    capfd.readouterr()
    assert cli.main(resume) == 2
    error = capfd.readouterr().err
    assert "iter_0000006: was written with model.num_layers = 2, not 3" in error and error.count("\n") == 1
    Path("run.toml").write_text(TINY)
    for part in Path("out/checkpoints").glob("*/*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    assert cli.main(resume) == 2
    error = capfd.readouterr().err
    assert "checkpoints is whole" in error and error.count("\n") == 1, "said before a rank starts"


RUN = """
import signal, sys, time
from pathlib import Path
from smartmoe import cli
child = "import os, pathlib, signal, sys, time\\n" \
    "asked = []\\n" \
    "def end(*_):\\n    asked.append(1)\\n    pathlib.Path('asked').touch()\\n" \
    "    while not os.path.exists('go'): time.sleep(0.02)\\n" \
    "    print('Traceback of torchrun', file=sys.stderr, flush=True)\\n    sys.exit(len(asked))\\n" \
    "signal.signal(signal.SIGTERM, end)\\nprint('a warning', file=sys.stderr, flush=True)\\n" \
    "pathlib.Path('part').write_text(str(os.getpid()))\\nos.rename('part', 'child.pid')\\ntime.sleep(300)"
with cli._take(Path("out")) as lock:
    print(cli._run([sys.executable, "-c", child], (lock.fileno(),)))
"""


def started_run():
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(Path("child.pid").exists)
    assert run.stderr.readline() == "a warning\n", "handed on at once"
    return run, int(Path("child.pid").read_text())


def wait_until(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_a_run_is_alone_in_its_folder_and_does_not_outlive_its_command(folder):
    run, pid = started_run()
    with pytest.raises(ValueError, match="out: a run is at work there"):
        cli._take(Path("out"))
    run.kill()
    run.wait()
    wait_until(Path("asked").exists)
    with pytest.raises(ValueError, match="out: a run is at work there, or just ending"):
        cli._take(Path("out"))
    Path("go").touch()
    wait_until(lambda: not is_running(pid))
    run.communicate()
    cli._take(Path("out")).close()
    for name in ("child.pid", "asked", "go"):
        os.unlink(name)
    run, pid = started_run()
    os.kill(pid, signal.SIGUSR1)
    run.send_signal(signal.SIGUSR1)
    wait_until(Path("asked").exists)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    Path("go").touch()
    out, err = run.communicate(timeout=30)
    assert out == "(1, True)\n", "asked once to end, by the first of three signals"
    assert err == "", "how torchrun ends is no news"
    assert not is_running(pid)


def test_a_file_system_without_locks_is_used_without(folder, monkeypatch):
    def no_lock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(cli.fcntl, "flock", no_lock)
    cli._take(Path("out")).close()


def test_what_goes_on_with_a_run_is_said(folder, monkeypatch, capsys):
    def interrupted(command, *_):
        Path("out here/checkpoints/iter_0000002").mkdir(parents=True, exist_ok=True)
        return -15, True

    monkeypatch.setattr(cli, "_run", interrupted)
    train = ["train", "run.toml", "--ranks", "1", "--out", "out here"]
    assert cli.main(train) == 130
    assert "interrupted; it has no checkpoint" in capsys.readouterr().err
    Path("out here/checkpoints/iter_0000002/meta.json").write_text("{}")
    monkeypatch.setattr("smartmoe.checkpoint.newest_good", lambda *_: None)
    assert cli.main([*train, "--resume"]) == 130
    again = "smartmoe train run.toml --ranks 1 --out 'out here' --resume"
    assert f"iter_0000002 it goes on with: {again}" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["report", "out here"]) == 0 and f"it goes on with: {again}\n" in capsys.readouterr().out
    Path("out here/run.json").write_text('{"schema": 0}')
    assert cli.main([*train, "--resume"]) == 2 and "not a run of schema 1" in capsys.readouterr().err


def test_what_torchrun_says_of_a_killed_rank_is_kept(folder, capfd):
    says = "import sys; print('x' * 300_000, file=sys.stderr); print('  exitcode  : -9 (pid: 1)', file=sys.stderr); sys.exit(1)"
    with Path("console.log").open("wb", buffering=0) as console:
        code, interrupted = cli._run([sys.executable, "-c", says], (), console)
    assert (code, interrupted) == (1, False) and "exitcode  : -9" in capfd.readouterr().err
    assert record.outcome(".", code) == ("failed", "a rank was killed by signal 9 (SIGKILL); see console.log")


def test_data_of_the_command_line_wins(folder):
    Path("other.txt").write_text("while True: pass\n" * 900)
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out", "--data", "other.txt"]) == 0
    assert record.read_run("out")["config"]["workload"]["data"] == ["other.txt"]


def test_a_run_that_fails_says_why(folder, capfd):
    Path("bad.bin").write_bytes(bytes(4000))
    Path("bad.idx").write_bytes(b"MMIDIDX")
    Path("run.toml").write_text(TINY.replace("text.txt", "bad"))
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out"]) == 2
    assert "bad.idx: not a Megatron index" in capfd.readouterr().err and not Path("out").exists()


def test_a_run_on_gpus_names_them_and_what_started_it(folder, monkeypatch):
    Path("run.toml").write_text(TINY + '[cluster]\ndevice = "cuda"\nranks_per_node = 1\n')
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(cli, "_run", lambda command, *_: (0, False))
    assert cli.main(["train", "run.toml", "--data", "text.txt", "--out", "out"]) == 0
    facts = record.read_run("out")["provenance"]
    assert facts["device"] == "a GPU" and facts["command"] == ["smartmoe", "train", "run.toml", "--data", "text.txt"]


def test_a_system_with_a_program_of_its_own_is_started_by_that(folder, monkeypatch, capsys):
    train = ["train", "run.toml", "--ranks", "2", "--out", "out"]
    host = hosts.HOSTS["deepspeed"]
    monkeypatch.setitem(hosts.HOSTS, "deepspeed", dataclasses.replace(host, package="no_such_package"))
    Path("run.toml").write_text('system = "deepspeed"\n' + TINY)
    assert cli.main(train) == 2 and "workload.checkpoint_interval" in capsys.readouterr().err
    Path("run.toml").write_text('system = "deepspeed"\n' + TINY.replace("checkpoint_interval = 2\n", ""))
    assert cli.main(train) == 2 and "no_such_package is not installed: pip install" in capsys.readouterr().err
    assert not Path("out").exists()
    monkeypatch.setitem(hosts.HOSTS, "deepspeed", dataclasses.replace(host, package="numpy"))
    assert cli.main([*train, "--resume"]) == 2 and "no checkpoints to resume from" in capsys.readouterr().err
    started = []
    monkeypatch.setattr(cli, "_run", lambda command, *_: started.append(command) or (0, False))
    assert cli.main(train) == 0 and started[0][-2:] == [host.module, "out"] and "2" in started[0]
    assert record.read_run("out")["provenance"]["entry"] == "deepspeed"
    monkeypatch.setattr(cli, "_run", lambda command, *_: (1, False))
    assert cli.main([*train[:-1], "other"]) == 1 and "start it with another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.toml"], "absent.toml: cannot read"),
        (["train", "run.toml", "--ranks", "3"], "plan.ep = 3 does not divide"),
        (["train", "run.toml", "--ranks", "0"], "at least 1"),
        (["train", "run.toml", "--resume"], "--resume needs --out"),
        (["trace", "show", "run.toml"], "run.toml: cannot read this trace: File is not a zip file; a trace is an .npz"),
        (["trace", "show", "text.csv"], "text.csv: not a valid trace: no column layer, expert in line 1, which has: iteration"),
        (["trace", "show", "folder"], "folder.png: cannot write this file: is a folder"),
        (["trace", "show", "absent.npz"], "absent.npz"),
        (["train", "run.toml", "--ranks", "1", "--out", "text.txt"], "--out text.txt: cannot write a run there: File exists"),
        (["train", "run.toml", "--ranks", "1", "--out", "text.txt/below"], "cannot write a run there: Not a directory"),
        (["train", "run.toml", "--ranks", "1", "--out", "absent", "--resume"], "absent holds no run to go on with"),
        (["train", "run.toml", "--ranks", "1", "--out", "out", "--data", "short.txt"], "too few for one sample"),
        (["trace", "save", "synthetic:one-hot", "absent/out.npz"], "absent is no folder that can be written to"),
        (["trace", "show", "synthetic:one-hot", "--out", "."], ".: cannot write this file: is a folder"),
        (["export", "absent", "absent/out.pt"], "absent/out.pt: cannot write this file"),
        (["profile", "--out", "absent/out.json"], "absent/out.json: cannot write this file"),
        (["profile", "--out", "out", "--device", "cuda", "--ranks", "999"], "--device cuda needs 999 GPUs here"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, capsys, arguments, message):
    Path("short.txt").write_text("short")
    Path("text.csv").write_text("iteration\n1\n")
    Path("folder.png").mkdir()
    assert cli.main(arguments) == 2
    assert not Path("out").exists()
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1 and text.startswith("smartmoe: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('system = "depspeed"\n' + TINY, 'run.toml: system = "depspeed": did you mean "deepspeed"?'),
        (TINY + '[gate]\nkind = "trace"\ntrace = "absent.npz"\n', "absent.npz: cannot read this trace"),
        (
            TINY + '[gate]\nkind = "trace"\ntrace = "synthetic:one-hot,experts=6"\n',
            "gate.trace synthetic:one-hot,experts=6 has 6 experts, model.num_experts is 4",
        ),
        (TINY + '[cluster]\ndevice = "cuda"\nranks_per_node = 1\n', 'cluster.device = "cuda" needs 1 GPUs here'),
        (TINY + "lr = nan\n", "run.toml: workload: lr: nan is no finite number"),
        (TINY + "[gate]\ncapacity = inf\n", "capacity: inf is no finite number; leave the key out for no limit"),
        (TINY + "lr = -1.0\n", "workload.lr = -1.0 must be at least 0"),
        (TINY + "adam_beta1 = 1.0\n", "workload.adam_beta1 = 1.0 must be in 0 .. 1, below 1"),
        (TINY + "adam_eps = 0.0\n", "workload.adam_eps = 0.0 must be positive"),
    ],
)
def test_what_a_rank_would_find_wrong_is_said_before_one_starts(folder, capsys, monkeypatch, text, message):
    Path("run.toml").write_text(text)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(["train", "run.toml", "--ranks", "1", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("out").exists()


def test_unknown_command_and_help(capsys):
    for arguments, code in ((["plan"], 2), (["--help"], 0), (["train", "--help"], 0), (["report", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
    assert "examples:" in capsys.readouterr().out


def test_trace_show_is_a_table_of_layers_and_a_picture(folder, capfd):
    made = trace.synthetic(
        "one-hot", num_iterations=3, num_ranks=2, num_layers=2, num_micro_batches=1, num_experts=8, num_copies=32,
        share=1.0,
    )  # fmt: skip
    made.save("t.npz")
    assert cli.main(["trace", "show", "t.npz"]) == 0
    text = capfd.readouterr().out
    row = text[text.index("layer  max") :].splitlines()[2]
    assert row.split() == ["1", "8.000", "7.000", "1.000", "1.000", "1.000"]
    assert "experts in order          2.000  recorded" in text and "exact copies              1.000  simulated" in text
    assert "3 iterations (1 .. 3), 2 ranks, 2 layers" in text and "kind: one-hot" in text
    assert Path("t.png").read_bytes().startswith(b"\x89PNG") and "t.png: load over time" in text
    assert cli.main(["trace", "show", "synthetic:bursty,iterations=4,copies=64,layers=2", "--text"]) == 0
    assert "4 iterations" in capfd.readouterr().out and len(list(Path().glob("*.png"))) == 1
    Path("one.csv").write_text("iteration,layer,expert\n1,0,0\n1,0,3\n")
    assert cli.main(["trace", "show", "one.csv", "--text"]) == 0
    assert "--ranks N shows them spread over N" in capfd.readouterr().out
    assert cli.main(["trace", "save", "synthetic:bursty,iterations=4", "saved.npz"]) == 0
    assert trace.ExpertTrace.load("saved.npz").meta["kind"] == "bursty"


def test_the_command_is_a_module_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smartmoe", "plan", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("smartmoe", run_name="__main__")
    assert end.value.code == 0 and "usage: smartmoe plan" in capsys.readouterr().out
