import json

from smartmoe.bench import measure
from smartmoe.bench.report import Report

KEYS = ("size",)


def rows_of(path, sizes, calls):
    """Measure rows of these sizes into `path`, noting in `calls` which cases ran."""
    report = Report("test", measure.start_world("cpu"), path, {}, KEYS)
    for size in sizes:

        def case(size=size) -> dict:
            calls.append(size)
            if size < 0:
                raise ValueError("no such size")
            return {"doubled": 2 * size}

        report.measure({"size": size}, case, lambda results: results[0], lambda row: f"{row['size']} {row['status']}")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_a_row_has_its_result_or_its_reason_and_is_measured_once(tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "rows.json", []
    good = {"size": 2, "status": "ok", "reason": "", "doubled": 4}
    bad = {"size": -1, "status": "skipped", "reason": "rank 0: no such size"}
    assert rows_of(path, [2, -1], calls) == [good, bad]
    assert capsys.readouterr().out.splitlines() == ["2 ok", "-1 skipped"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert rows_of(path, [2, -1, 3], calls)[:2] == [good, bad]
    assert calls == [2, -1, 3]
