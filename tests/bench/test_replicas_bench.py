"""The benchmark of exact replication: what a row says, and that it says why nothing can be measured."""

import json

import pytest

from smartmoe.bench import replicas


def test_a_row_has_the_slowest_rank_and_the_loads_of_all():
    facts = {"before_W": [3, 1], "after_W": [2, 2], "replicas": [-1, 0]}
    row = replicas.make_row([facts, facts], [{"times": [[1.0, 2.0], [2.0, 2.0]]}, {"times": [[2.0, 3.0], [1.0, 1.0]]}])
    assert row["max_over_mean_static"] == 1.5 and row["max_over_mean_exact"] == 1.0
    assert row["total_ms"] == {"median": 4.5, "p10": 4.1, "p90": 4.9}
    line = replicas.format_row(row | {"shape": "S", "routing": "R", "case": "exact", "graph": True, "status": "ok"})
    assert "graph   4.5000 (4.1000 - 4.9000)  max/mean 1.500 -> 1.000  [-1, 0]" in line


def test_one_rank_says_that_there_is_nothing_to_replicate(tmp_path, capsys):
    path = tmp_path / "out.json"
    args = ["--device", "cpu", "--shapes", "16,16,16,4,2", "--routing", "balanced", "--json", str(path)]
    assert replicas.main([*args, "--cases", "static", "plan"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["status"]) for row in rows] == [("static", "skipped"), ("plan", "skipped")]
    assert "one rank has nothing to replicate" in rows[0]["reason"] and rows[0]["reason"] in capsys.readouterr().out


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        replicas.parse_args(["--cases", "everything"])
    assert "weights stay" in capsys.readouterr().err
