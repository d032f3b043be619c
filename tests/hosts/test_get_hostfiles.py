"""scripts/alpa/get_hostfiles.py: where nodes come from, their order, and that nothing is written before the count fits."""

import importlib.util
import socket
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "alpa" / "get_hostfiles.py"
SPEC = importlib.util.spec_from_file_location("get_hostfiles", SCRIPT)
hostfiles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hostfiles)
JOB = ("SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call the script in an empty folder: (exit status, written files, standard error)."""
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hostfiles, "gpus_here", lambda: 0)
    out = tmp_path / "out"

    def run(*arguments, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        status = hostfiles.main([*arguments, "--out", str(out)])
        files = {path.name: path.read_text() for path in sorted(out.glob("*"))} if out.exists() else {}
        return status, files, capsys.readouterr().err

    return run


def test_four_hosts_make_three_files_with_this_host_first(call):
    here = socket.gethostname()
    status, files, _ = call("--hosts", "a", "b", here, "c", "--slots", "8")
    assert status == 0 and sorted(files) == ["hostfile", "hostfile_2node", "hostfile_4node"]
    assert files["hostfile"] == f"{here} slots=8\n"
    assert files["hostfile_2node"] == f"{here} slots=8\na slots=8\n"
    assert files["hostfile_4node"] == f"{here} slots=8\na slots=8\nb slots=8\nc slots=8\n"


def test_too_few_nodes_write_nothing(call):
    status, files, error = call("--hosts", "a", "b", "c", "--slots", "8", "--nodes", "4")
    assert (status, files) == (2, {}) and "4 nodes are asked for, but only 3 are there" in error


def test_nodes_limit_the_files(call):
    assert sorted(call("--hosts", "a", "b", "c", "d", "--slots", "4", "--nodes", "2")[1]) == ["hostfile", "hostfile_2node"]


def test_a_slurm_job_says_its_nodes_and_gpus(call):
    status, files, _ = call(SLURM_JOB_NODELIST="gpu[08-10],login", SLURM_GPUS_ON_NODE="4")
    assert status == 0
    assert files["hostfile_4node"] == "gpu08 slots=4\ngpu09 slots=4\ngpu10 slots=4\nlogin slots=4\n"
    # hosts given by hand are not the job's: its number of GPUs is not theirs
    assert "give --slots" in call("--hosts", "a")[2]


def test_an_existing_hostfile_keeps_its_own_slots(call, tmp_path):
    source = tmp_path / "source"
    source.write_text("# cluster\n\nn1 slots=8\nn2   slots=4 # half of it\n")
    assert call("--from", str(source))[1]["hostfile_2node"] == "n1 slots=8\nn2 slots=4\n"
    assert call("--from", str(source), "--slots", "2")[1]["hostfile_2node"] == "n1 slots=2\nn2 slots=2\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("n1 slots=8\nn1 slots=8\n", "2: host n1 is there twice"),
        ("n1\n", "1: expected HOST slots=N"),
        ("n1 slots=0\n", "expected HOST slots=N"),
        ("# none\n", "names no host"),
        (None, "cannot read this hostfile"),
    ],
)
def test_a_bad_hostfile_is_named(call, tmp_path, text, problem):
    source = tmp_path / "source"
    if text is not None:
        source.write_text(text)
    status, files, error = call("--from", str(source))
    assert (status, files) == (2, {}) and problem in error and str(source) in error


def test_without_a_source_or_slots_it_says_what_to_give(call):
    assert "give --hosts" in call()[2]
    assert "give --slots" in call("--hosts", "a")[2]
    assert "must be at least 1" in call("--hosts", "a", "--slots", "0")[2]
    assert "host a is there twice" in call("--hosts", "a", "a", "--slots", "8")[2]


def test_slurm_notation():
    assert hostfiles.expand("a,b[1-3,07],c-[01-02]x") == "a b1 b2 b3 b07 c-01x c-02x".split()
    assert hostfiles.expand("r[1-2]n[8-9]") == ["r1n8", "r1n9", "r2n8", "r2n9"]
    for wrong in ("a[3-1]", "a[", "", "a[x]"):
        with pytest.raises(ValueError):
            hostfiles.expand(wrong)
