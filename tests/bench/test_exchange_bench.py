import json

import numpy as np
import pytest

from smartmoe.bench import exchange, measure
from tests.dist import spawn

CPU = ["--device", "cpu", "--warmup", "1", "--iterations", "2", "--sizes", "30x8"]


def _run(_world_rank, argv):
    args = exchange.parse_args([*CPU, *argv])
    return exchange.run(args, measure.start_world(args.device))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_mechanism_brings_rows_there_and_back(tmp_path, num_ranks):
    path = tmp_path / "out.json"
    mechanisms = ["collective", "basic", "overlapped", "padded"]
    rows = spawn(_run, num_ranks, ["--json", str(path), "--mechanisms", *mechanisms])[0]["rows"]
    assert json.loads(path.read_text())["rows"] == rows
    assert [(r["share"], r["mechanism"]) for r in rows] == [(s, m) for s in ("even", "all") for m in mechanisms]
    for row in rows:
        assert row["status"] == "ok", row
        stay = 30 // num_ranks if row["share"] == "even" else 0
        assert row["off_rank_bytes"] == (30 - stay) * 8 * 4
        assert ("dispatch_us" in row) == (row["mechanism"] != "overlapped")
        assert row["round_trip_us"]["median"] > 0 and row["round_trip_gbytes_per_s"] >= 0


def test_rows_that_do_not_come_back_are_a_failed_row(monkeypatch, capsys):
    bench = exchange.Bench((4, 8), "even", measure.World(exchange.torch.device("cpu")), exchange.torch.float32, 0)
    monkeypatch.setattr(bench, "_dispatcher", lambda name: lambda mark: bench.x_TD + 1)
    with pytest.raises(RuntimeError, match="4 rows did not come back"):
        bench.measure("basic", measure.Timing())
    rows = _run(0, ["--mechanisms", "basic", "--share", "all"])["rows"]
    assert rows[0]["status"] == "skipped" and "two ranks" in capsys.readouterr().out


def test_destinations_are_even_or_elsewhere():
    assert np.bincount(exchange.destinations(10, 4, 1, "even", 0)).tolist() == [3, 3, 2, 2]
    assert np.bincount(exchange.destinations(9, 4, 1, "all", 0)).tolist() == [3, 0, 3, 3]
    with pytest.raises(ValueError, match="one rank"):
        exchange.destinations(4, 1, 0, "all", 0)
    for text in ("4", "4x", "0x4", "4x4x4"):
        with pytest.raises(ValueError, match="ROWSxWIDTH"):
            exchange.parse_size(text)
