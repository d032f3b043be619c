import json

import numpy as np
import pytest

from smartmoe.bench import solvers as bench
from smartmoe.trace import synthetic


@pytest.fixture
def trace(tmp_path):
    sizes = {"num_iterations": 12, "num_ranks": 4, "num_layers": 2, "num_micro_batches": 2, "num_experts": 8}
    strong = synthetic("zipf-strong", **sizes, num_copies=500)
    strong.save(tmp_path / "trace.npz")
    return strong, tmp_path / "trace.npz"


def test_regroup_adds_neighbours(trace):
    count_ILSE = bench.regroup(trace[0], 2)
    assert count_ILSE.shape == (12, 2, 2, 8)
    assert (count_ILSE[3, 1, 0] == trace[0].counts[3, :2, 1].sum(axis=(0, 1))).all()
    with pytest.raises(ValueError, match="4 ranks of the trace do not divide over 3"):
        bench.regroup(trace[0], 3)


def test_a_plan_is_judged_by_the_next_record(trace):
    count_ILSE = np.zeros((3, 1, 2, 4), np.int64)
    count_ILSE[:2, 0, :, 0] = 100  # balanced by a copy in the next record, useless in the one after
    count_ILSE[2, 0, :, 1] = 100
    row = bench.follow(count_ILSE, np.array([1, 11, 21]), 2, 1, "newest", 1)
    assert row["mean"] == 1.5 and row["copies"] == 1 and row["early"] == 1.5 and row["late"] is None
    assert bench.follow(count_ILSE, np.array([1, 11, 21]), 2, 0, "newest", 1)["mean"] == 2


def test_the_table_and_the_file(trace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bench, "cases", lambda cases=bench.cases: [case for case in cases() if case[3] <= 8 and case[2] == 32]
    )
    path = tmp_path / "out" / "rows.json"
    argv = ["--trace", str(trace[1]), "--ranks", "2", "4", "--slots", "0", "1", "--repeats", "1", "--json", str(path)]
    assert bench.main([*argv, "--modes", *bench.MODES]) == 0
    data, text = json.loads(path.read_text()), capsys.readouterr().out
    assert len(data["balance"]) == 12 and len(data["times"]) == 5 and "near hosts first" in text
    by_slots = {(row["num_ranks"], row["num_slots"], row["plan"]): row["mean"] for row in data["balance"]}
    assert all(by_slots[ranks, 1, "newest"] < by_slots[ranks, 0, "newest"] for ranks in (2, 4))
    assert bench.main([*argv[:2], "--ranks", "3"]) == 2 and "do not divide" in capsys.readouterr().err
    assert (
        bench.main(["--repeats", "0"]) == 2
        and bench.main(["--trace", str(tmp_path / "none.npz"), "--repeats", "1"]) == 2
    )
