"""scripts/venv.sh where nothing may be made or installed: a Python that is named, or that has all that is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def root(tmp_path):
    """A checkout that has nothing but the set-up, and a folder `bin` for commands."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("venv.sh", "lacking.py"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    return tmp_path


def source(root: Path, kind: str, **environ: str) -> tuple[int, list[str], str]:
    """Exit code, [PY, PYTHONPATH] and stderr of sourcing venv.sh."""
    env = {"PATH": f"{root}/bin:/usr/bin:/bin", "HOME": str(root), **environ}
    script = f'set -euo pipefail; . scripts/venv.sh {kind}; echo "$PY"; echo "${{PYTHONPATH:-}}"'
    done = subprocess.run(["bash", "-c", script], cwd=root, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines(), done.stderr


def command(root: Path, name: str, text: str) -> Path:
    path = root / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_named_python_is_used_as_it_is(root):
    code, lines, _ = source(root, "train", PY=sys.executable, PYTHONPATH="/else")
    assert (code, lines) == (0, [sys.executable, f"{root}/src:/else"])
    assert not (root / ".venv").exists()


def test_a_complete_python3_without_environment_needs_no_name(root):
    path = command(root, "python3", f'exec {sys.executable} "$@"')
    assert source(root, "plot")[:2] == (0, [str(path), f"{root}/src"])
    assert not (root / ".venv").exists()


def test_what_a_named_python_lacks_is_said_and_nothing_is_installed(root):
    command(root, "bare", f'exec {sys.executable} -S -I "$@"')  # without site-packages
    code, _, err = source(root, "train", PY="bare")
    assert code == 2 and "PY=bare lacks numpy>=1.26 matplotlib>=3.8 torch==2.13.0 tokenizers" in err
    code, _, err = source(root, "plot", PY="no-such-python")
    assert code == 2 and "PY=no-such-python: there is no such command" in err


def test_the_environment_of_an_earlier_call_is_no_named_python(root):
    """A shell that has sourced venv.sh has PY; a set that needs more must be completed, not refused."""
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$1" in -m) echo "pip $*" >&2;; *) exec {sys.executable} -S -I "$@";; esac\n')
    python.chmod(0o755)
    env = {**os.environ, "PY": str(python), "VIRTUAL_ENV": str(root / ".venv")}
    words = ["bash", "-c", '. scripts/venv.sh plot; echo "$PY"']
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == str(python)
    assert "installing numpy>=1.26 matplotlib>=3.8" in done.stderr and "pip -m pip install" in done.stderr
