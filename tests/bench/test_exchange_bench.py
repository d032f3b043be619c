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
    mechanisms = [*exchange.MECHANISMS]
    rows = spawn(_run, num_ranks, ["--json", str(path), "--mechanisms", *mechanisms, "direct+graph"])[0]["rows"]
    assert json.loads(path.read_text())["rows"] == rows
    graphs = [rows.pop(len(mechanisms)), rows.pop()]
    assert all(row["status"] == "skipped" and "CUDA graphs need" in row["reason"] for row in graphs)
    assert [(r["share"], r["mechanism"]) for r in rows] == [(s, m) for s in ("even", "all") for m in mechanisms]
    for row in rows:
        assert row["status"] == "ok", row
        stay = 30 // num_ranks if row["share"] == "even" else 0
        assert row["off_rank_bytes"] == (30 - stay) * 8 * 4
        assert row["lead_cycles"] == 0 and row["num_late"] == 0
        assert ("dispatch_us" in row) == (row["mechanism"] != "overlapped")
        assert row["round_trip_us"]["median"] > 0 and row["round_trip_gbytes_per_s"] >= 0


def test_rows_that_do_not_come_back_are_a_failed_row(monkeypatch, capsys):
    bench = exchange.Bench((4, 8), "even", measure.World(exchange.torch.device("cpu")), exchange.torch.float32, 0)
    monkeypatch.setattr(bench, "_ways", lambda name: (None, lambda _: bench.x_TD + 1))
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


class _FakeGpu(measure.World):
    """A GPU whose host takes `launch_cycles` to launch a step."""

    def __init__(self, launch_cycles):
        super().__init__(exchange.torch.device("cuda", 0))
        self.launch_cycles, self.slept = launch_cycles, []

    def synchronize(self):
        pass

    def align(self):
        pass


def test_the_gpu_idles_until_all_launches_are_made_or_not_at_all(monkeypatch):
    class Event:
        def query(self):
            return world.slept[-1] < world.launch_cycles

    monkeypatch.setattr(measure, "now", lambda _: Event())
    monkeypatch.setattr(exchange.torch.cuda, "_sleep", lambda cycles: world.slept.append(cycles))
    world = _FakeGpu(3 * measure.FIRST_LEAD)
    assert measure.lead_for(world, lambda mark: None) == 8 * measure.FIRST_LEAD
    world = _FakeGpu(float("inf"))
    assert measure.lead_for(world, lambda mark: None) == 0 and world.slept[-1] == measure.LAST_LEAD
    row = {"times": [[1.0, 2.0]] * 3, "off_rank_bytes": 1, "lead_cycles": 7}
    row = exchange.make_row([row | {"is_late": [True, False, False]}, row | {"is_late": [True, False, True]}])
    assert (row["num_late"], row["num_iterations"]) == (2, 3)
