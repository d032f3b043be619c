"""The benchmark's command line, the commands that it starts, and what it writes: without torch or DeepSpeed."""

import ast
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from smartmoe.hosts.deepspeed_alpa import launch, options, report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "alpa" / "run_deepspeed_benchmark.sh"


def commands(*words, environ=None):
    args, _ = options.parse(list(words))
    return launch.commands(args, environ or {})


def refuse(capsys, *words) -> str:
    with pytest.raises(SystemExit) as exit_:
        options.parse(list(words))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_usage_names_the_numbers_of_gpus(capsys):
    for words in ([], ["3"], ["x"]):
        error = refuse(capsys, *words)
        assert error.startswith("usage: run_deepspeed_benchmark.sh 1|2|4|8|16|32|64 [options]")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("ZeRO-3 does not work", ["4", "--zero", "3"]),
        ("--zero 4 is not 0, 1 or 2", ["4", "--zero", "4"]),
        ("ep = 3 does not divide the 4 ranks", ["4", "--ep", "3"]),
        ("suite tiny has no case for 8", ["8", "--suite", "tiny"]),
        ("do not fill nodes of 3", ["4", "--gpus-per-node", "3"]),
        ("--iterations", ["4", "--iterations", "0"]),
        ("--dropout", ["4", "--dropout", "1"]),
        ("leave --no-recompute out", ["4", "--capture", "both", "--no-recompute"]),
        ("take --dispatcher direct or padded", ["4", "--capture", "smartmoe", "--dispatcher", "basic"]),
        ("experts in fp32 are computed one by one", ["2", "--capture", "smartmoe", "--precision", "fp32"]),
        ("experts in fp16 are computed one by one", ["2", "--capture", "both", "--precision", "fp16"]),
    ],
)
def test_bad_usage_is_said(capsys, problem, words):
    assert problem in refuse(capsys, *words)


def test_both_back_ends_run_unless_one_is_named():
    both = commands("2")
    assert [command[command.index("--backend") + 1] for command in both] == ["deepspeed", "smartmoe"]
    assert len(commands("2", "--backend", "smartmoe")) == 1


def test_what_is_captured_is_among_what_runs():
    with pytest.raises(ValueError, match="take --capture both"):
        commands("2", "--backend", "deepspeed", "--capture", "smartmoe")
    assert len(commands("2", "--backend", "deepspeed", "--capture", "both")) == 1
    for command in commands("2", "--capture", "smartmoe"):  # a rank reads the words that its back end is started with
        options.parse(command[command.index(launch.ENTRY) + 1 :])


def test_a_rank_gets_every_option():
    words = ["2", "--suite", "paper", "--model", "1.3B", "--ep", "1", "--zero", "1", "--precision", "fp16"]
    words += ["--second", "argmax", "--no-recompute", "--data", "a.txt", "b.txt", "--balance-weight", "0.01"]
    args, case = options.parse(words)
    rank_args, rank_case = options.parse(options.rank_arguments(args, "smartmoe"))
    assert rank_case == case and rank_args.backend == "smartmoe"
    ignored = ("backend", "launcher", "hostfile", "master_port")
    assert {k: v for k, v in vars(rank_args).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored
    }


def test_precision_follows_the_suite():
    assert options.parse(["2"])[0].precision == "bf16"
    assert options.parse(["2", "--suite", "tiny"])[0].precision == "fp32"


def test_torchrun_on_one_node_and_on_several(tmp_path):
    (one,) = commands("8", "--backend", "deepspeed")
    assert "--standalone" in one and "--nproc-per-node=8" in one
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n7 slots=8 # first\n\nn9 slots=8\n")
    (two,) = commands("16", "--backend", "deepspeed", "--hostfile", str(hostfile), "--master-port", "1234")
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=n7:1234"} <= set(two)


def test_deepspeed_launcher(tmp_path, monkeypatch):
    (one,) = commands("4", "--backend", "deepspeed", "--launcher", "deepspeed")
    assert {"--num_gpus=4", "--no_local_rank", "--module"} <= set(one) and not any("hostfile" in word for word in one)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="2 nodes need hostfile_2node: write it with get_hostfiles.py"):
        commands("16", "--launcher", "deepspeed")
    Path("hostfile_2node").write_text("n1 slots=8\n")
    with pytest.raises(ValueError, match="has 1 hosts, 2 nodes are needed"):
        commands("16", "--launcher", "deepspeed")
    Path("hostfile_2node").write_text("n1 slots=8\nn2 slots=8\n")
    (two,) = commands("16", "--backend", "deepspeed", "--launcher", "deepspeed")
    assert {"--hostfile=hostfile_2node", "--num_nodes=2", "--num_gpus=8"} <= set(two)


def test_slurm_inside_a_job_only(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="salloc or sbatch first"):
        commands("16", "--launcher", "slurm")
    fake = tmp_path / "scontrol"
    fake.write_text(
        "#!/bin/sh\n"
        "[ \"$2 $3\" = 'hostnames n[3-4]' ] && printf 'n3\\nn4\\n'\n"
        "[ \"$2 $3\" = 'node n3' ] && echo '   NodeAddr=10.0.0.3 NodeHostName=n3'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_JOB_NODELIST": "n[3-4]"}
    (two,) = commands("16", "--backend", "deepspeed", "--launcher", "slurm", environ=job)
    assert two[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert {"--nnodes=2", "--master-addr=10.0.0.3", "--master-port=29500"} <= set(two)
    # the words of one task, as srun starts it on the second node
    at = two.index("bash")
    told = subprocess.run(
        [*two[at : at + 4], "env"], env={**os.environ, "SLURM_NODEID": "1"}, capture_output=True, text=True, check=True
    )
    assert "PET_NODE_RANK=1" in told.stdout.splitlines()
    with pytest.raises(ValueError, match="4 nodes are needed, the job has 2"):
        commands("32", "--launcher", "slurm", environ=job)


def test_the_script_shows_case_and_commands_in_a_dry_run(tmp_path):
    done = subprocess.run([SCRIPT, "8", "--dry-run"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2.4B: 2.3830 B parameters") and "dp 8, ep 2, expert-dp 4" in lines[1]
    assert [shlex.split(line)[1:3] for line in lines[3:]] == [["-m", "torch.distributed.run"]] * 2
    assert list(tmp_path.iterdir()) == []
    wrong = subprocess.run([SCRIPT, "5"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: ")


def test_a_missing_package_is_said(monkeypatch, capsys):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert launch.main(["1", "--suite", "tiny"]) == 2
    assert "pip install" in capsys.readouterr().err


def make_result(num_gpus=8, backend="deepspeed", seconds=(3.0, 1.0, 2.0)):
    args, case = options.parse([str(num_gpus)])
    model = {"name": case.model.name}
    return {
        "backend": backend, "case": {"num_gpus": num_gpus, "ep": case.ep, "model": model}, "options": vars(args),
        "device": "a\tGPU", "summary": report.summarise(case, list(seconds)), "seconds": list(seconds),
        "captured": False, "losses": [9.0, 8.0], "peak_memory_bytes": [1, 2**30], "versions": {"deepspeed": "0.19.8"},
    }  # fmt: skip


def test_the_table_has_the_artifacts_columns_and_not_its_faults(tmp_path):
    results = [make_result(), make_result(32, "smartmoe", [0.5])]
    results[1]["options"]["hostfile"] = None
    for result in results:
        path = report.write(result, tmp_path)
        assert json.loads(path.read_text())["seconds"] == result["seconds"]
    rows = [line.split("\t") for line in (tmp_path / options.TSV_NAME).read_text().splitlines()]
    assert [row[:6] for row in rows] == [
        ["e2e", "a GPU", "1", "8", "moe", "deepspeed"],
        ["e2e", "a GPU", "4", "8", "moe", "smartmoe"],
    ]
    value = ast.literal_eval(rows[0][6])
    assert value["param_count"] == value["parameter_count"] == pytest.approx(2.383, abs=1e-4)
    # 6.682 PFLOP with the group that DeepSpeed has, in 2 s on 8 GPUs
    assert value["tflops"] == pytest.approx(6682 / 2 / 8, abs=0.1) and value["seconds"] == 2.0
    assert value["tflops_alpa"] == pytest.approx(4993 / 2 / 8, abs=0.1)
    assert value["tokens_per_s"] == 1_048_576 / 2 and float(rows[0][7]) > 0


def test_comparison_needs_both():
    assert report.compare([make_result()]) == ""
    assert report.compare([make_result(), make_result(backend="smartmoe", seconds=[1.0])]).endswith("2.000")
