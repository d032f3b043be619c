"""Fixtures of the plotting tests: the published reference data (when present) and a writer of run directories."""

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = (REPOSITORY / ".." / "shared" / "published").resolve()


@pytest.fixture(scope="session")
def repository():
    return REPOSITORY


@pytest.fixture(scope="session")
def raw_logs():
    """The artifact's raw logs; they are not part of this repository."""
    path = SHARED / "smartmoe-ae-logs"
    if not path.is_dir():
        pytest.skip("the artifact's raw logs are not beside this repository (../shared/published)")
    return path


@pytest.fixture(scope="session")
def paper():
    path = SHARED / "paper_figures.json"
    if not path.is_file():
        pytest.skip("paper_figures.json is not beside this repository (../shared/published)")
    return json.loads(path.read_text())


class RunSet:
    """Writes run directories below a root."""

    def __init__(self, root: Path):
        self.root = root

    def add(self, name, bars, *, ms=None, num=10, warmup=2, status="ok", capacity=1.2, policy="greedy", **fields):
        """A run directory; `ms` is a step time or a list of metrics lines (dicts, or text as it is)."""
        path = self.root / name
        path.mkdir(parents=True)
        record = {
            "schema": 1,
            "run_id": name,
            "status": status,
            "message": "",
            "source": "measured",
            "system": bars[0]["series"] if bars else "x",
            "bars": bars,
            "config": {
                "model": {"num_layers": 4},
                "gate": {"kind": "gshard", "capacity": capacity},
                "online": {"policy": policy},
                "workload": {
                    "iterations": num,
                    "warmup_iterations": warmup,
                    "global_batch_size": 16,
                    "micro_batch_size": 2,
                },
            },
            "provenance": {"created": "2026-01-01T00:00:00Z", "device": "cpu", "num_ranks": 4},
            "started": "2026-01-01T00:00:01Z",
            "ended": "2026-01-01T00:00:02Z",
        }
        record.update(fields)
        (path / "run.json").write_text(json.dumps(record))
        if isinstance(ms, int | float):
            lines = [{"iteration": i, "step_ms": ms * (5 if i <= warmup else 1) + i / 100} for i in range(1, num + 1)]
        else:
            lines = ms
        if lines is not None:
            self.lines(path / "metrics.jsonl", lines)
        return path

    @staticmethod
    def bar(series, group="4/1.2", figure="fig8", panel=""):
        """An entry of run.json's `bars`."""
        return {"figure": figure, "panel": panel, "group": group, "series": series}

    @staticmethod
    def lines(path: Path, lines):
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.fixture
def run_set(tmp_path):
    root = tmp_path / "cpu-smoke"
    root.mkdir()
    return RunSet(root)
