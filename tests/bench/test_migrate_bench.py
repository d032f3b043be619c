import json

import pytest

from smartmoe.bench import measure, migrate
from tests.dist import spawn

CPU = ["--device", "cpu", "--warmup", "1", "--iterations", "2", "--shapes", "1,16,24,2,1"]
EXPERT_BYTES = 2 * 16 * 24 * 4 * 3  # two weights with two moments each, fp32


def _run(_world_rank, argv):
    args = migrate.parse_args([*CPU, *argv])
    return migrate.run(args, measure.start_world(args.device))


def test_swaps_and_moves_are_timed_against_a_bare_message(tmp_path, capsys):
    path = tmp_path / "out.json"
    rows = spawn(_run, 2, ["--json", str(path), "--experts", "1", "3", "--staging", "1"])[0]["rows"]
    assert json.loads(path.read_text())["rows"] == rows
    assert [(row["kind"], row["experts"]) for row in rows] == [(k, n) for k in ("swap", "move") for n in (1, 3)]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["num_bytes"] == row["experts"] * EXPERT_BYTES and row["staging_bytes"] == 1 << 20
        assert row["ms"]["median"] > 0 and row["bare_ms"]["median"] > 0
        assert len(migrate.format_row(row)) < 120


def test_experts_that_do_not_arrive_are_a_failed_row(monkeypatch, capsys):
    assert _run(0, ["--experts", "1"])["rows"][0]["reason"].endswith("start it with torchrun")
    world = measure.World(migrate.torch.device("cpu"))
    monkeypatch.setattr(world, "num_ranks", 2)
    bench = migrate.Bench(migrate.parse_args(CPU).shapes[0], "swap", 2, world, migrate.torch.float32, migrate.Staging())
    monkeypatch.setattr(migrate, "migrate", lambda *_: 0)
    with pytest.raises(RuntimeError, match="slot 0 does not hold the state of expert 2"):
        bench.measure(measure.Timing(warmup=0, iterations=1))


def test_placements_of_more_pairs():
    old, new = migrate.placements("move", 2, 4)
    assert old.expert_of_slot == (0, 1, -1, -1, -1, 2, 3, 4, -1, -1, -1, 5)
    assert new.expert_of_slot == (-1, -1, -1, 0, 1, 2, -1, -1, -1, 3, 4, 5)
    with pytest.raises(ValueError, match="even number"):
        migrate.placements("swap", 2, 3)
