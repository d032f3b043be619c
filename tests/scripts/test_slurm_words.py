"""What Slurm's words are taken for, where there is no Slurm: sizes, limits, ends of jobs."""

import dataclasses
from pathlib import Path

import launch
import pytest
import slurm
import slurm_launch
from grid import Configs

from smartmoe import record
from smartmoe.config import ClusterSpec

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_gpus_and_limits_are_read_as_slurm_prints_them():
    gres = {"(null)": 0, "gpu:4": 4, "gpu:v100:8(S:0-1)": 8, "nvme:2,gpu:a:2,gpu:b:1(IDX:0)": 3, "gpu": 1}
    assert {text: slurm.gpus_of(text) for text in gres} == gres
    limits = {"infinite": float("inf"), "30:00": 30, "2:00:00": 120, "1-00:00:00": 1440, "n/a": float("inf")}
    assert {text: slurm._limit_minutes(text) for text in limits} == limits


ENDINGS = [  # status and message in run.json, Slurm's state and reason, what it comes to, words of the message
    (("running", ""), "TIMEOUT", "TimeLimit", "timeout", "reached its time limit"),
    (("running", ""), "NODE_FAIL", "NodeDown", "failed", "lost a node"),
    (("running", ""), "OUT_OF_MEMORY", "OutOfMemory", "oom", "ran out of the host memory"),
    (("failed", "told to stop"), "PREEMPTED", "None", "failed", "was preempted"),
    (("failed", "told to stop"), "CANCELLED", "None", "failed", "was cancelled"),
    (("pending", ""), "CANCELLED", "DependencyNeverSatisfied", "skipped", "needs the trace"),
    (("pending", ""), "CANCELLED", "None", "failed", "was cancelled"),
    (("timeout", "near its time limit"), "FAILED", "NonZeroExitCode", "timeout", "near its time limit"),
    (("failed", "rank 2: ValueError: x"), "FAILED", "NonZeroExitCode", "failed", "rank 2: ValueError: x"),
    (("oom", "rank 1: OutOfMemoryError"), "FAILED", "NonZeroExitCode", "oom", "rank 1"),
    (("pending", ""), "FAILED", "NonZeroExitCode", "failed", "before it could say why (Slurm: FAILED, exit code 1:0)"),
    (("ok", ""), "NODE_FAIL", "NodeDown", "ok", ""),
    (("running", ""), "", "", "failed", "Slurm knows nothing of it"),
]


@pytest.mark.parametrize("run,state,reason,status,words", ENDINGS)
def test_the_end_of_a_run_is_slurms_word_where_the_run_could_not_speak(run, state, reason, status, words):
    found = slurm.judge({"status": run[0], "message": run[1]}, "7", state, reason, "1:0")
    assert found[0] == status and words in found[1]


def test_a_status_never_comes_from_a_line_count(tmp_path):
    record.create_run(tmp_path, "run", {"system": "fastmoe"}, [])
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 99, "step_ms": 1.0}\n' * 99)
    assert slurm.judge(record.read_run(tmp_path), "7", "COMPLETED", "None", "0:0")[0] == "failed"


def test_accounting_is_asked_when_the_controller_has_forgotten(monkeypatch):
    def ask(*command, **_):
        if command[0] == "scontrol":
            raise ValueError("slurm_load_jobs error: Invalid job id specified")
        return "CANCELLED by 1000|None|0:0\n"

    monkeypatch.setattr(slurm, "ask", ask)
    assert slurm.state_of("7") == ("CANCELLED", "None", "0:0")
    monkeypatch.setattr(slurm, "ask", lambda *command, **_: "")
    assert slurm.state_of("7") == ("", "", "")


def test_nodes_that_cannot_be_reached_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "why_not", lambda: "")
    nodes = "n1|idle|gpu:8|64|none\nn2|down*|gpu:8|64|Not responding\nn3|drained|gpu:8|64|disk\nn4|mixed|gpu:4|64|none\n"
    answers = {"%R|%a|%P|%l": "batch|up|batch*|1-00:00:00\n", "%N|%T|%G|%c|%E": nodes}
    monkeypatch.setattr(slurm, "ask", lambda *command, **_: answers.get(command[-1], ""))
    cluster = ClusterSpec(name="x", device="cuda", num_nodes=2, ranks_per_node=8)
    with pytest.raises(ValueError, match="2 nodes with 8 GPUs and 8 CPUs each, but partition batch has 1") as error:
        slurm.preflight(slurm.Site(), cluster, 600)
    assert "n2 cannot be reached (Not responding); n3 is drained (disk); n4 has 4 GPUs" in str(error.value)
    slurm.preflight(slurm.Site(), dataclasses.replace(cluster, num_nodes=1), 600)


def test_without_slurm_nothing_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    assert launch.main(["--cluster", "slurm", "--figures", "8", "--out", str(out)]) == 2
    assert "sbatch not found" in capsys.readouterr().err and not out.exists()
    assert launch.main(["--cluster", "slurm", "--figures", "8", "--dry-run"]) == 0
    assert "--gres=gpu:8" in capsys.readouterr().out
    assert launch.main(["--cluster", "nosuch", "--dry-run"]) == 2
    assert "cpu, " in capsys.readouterr().err


def test_auto_takes_slurm_where_it_answers(monkeypatch, capsys):
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    monkeypatch.setattr(slurm, "why_not", lambda: "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launch.main(["--dry-run", "--figures", "8"]) == 0
    assert "running on: slurm" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch.main(["--dry-run", "--figures", "8"]) == 0
    text = capsys.readouterr().out
    assert "inside job 7" in text and "running on: cpu" in text


def test_a_site_reaches_the_job_by_quoted_words_only(tmp_path):
    site = slurm.Site(setup=("module load x",), container=("apptainer", "exec"), python="/opt/a b/python")
    slurm_launch.write_site(tmp_path, site)
    lines = (tmp_path / "site.sh").read_text().splitlines()
    assert lines[1] == "module load x" and lines[2].startswith("PY=")
    assert slurm.recall(tmp_path)["container"] == ["apptainer", "exec"]
    assert slurm.recall(tmp_path)["python"] == "/opt/a b/python"


def test_every_declared_cluster_has_a_valid_site():
    assert set(Configs(SCRIPTS).sites) >= {"cpu", "local", "slurm", "v100x16"}
