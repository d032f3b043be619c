"""Bad input: a finding with file and line, never an exception or a silent hole, and the other bars are drawn."""

import json
import os
from pathlib import Path

import pytest

from plotting import load, published
from plotting.files import Folder

OK = [{"iteration": i, "step_ms": 10.0} for i in range(1, 6)]
NAME = (
    "GPT-L4-H64-4MoE_gshard1.2_EP+DP_t1_p1_d4_ep4_dp1_totalE4_localE1_gbs16_mbs2_smart_OFF_smartGP0_shadowOFF_"
    "newshadowOFF_dynamicOFF_freq0_2023-01-01T00:00:00+0800.log"
)


def found(data):
    return {(f.code, w) for f in data.findings for w in f.where}


# ---------------------------------------------------------------------------------------------- metrics.jsonl of a run


@pytest.mark.parametrize(
    ("lines", "code", "where", "value"),
    [
        ([*OK, '{"iteration": 6, "step_ms": 1'], "malformed", "b/metrics.jsonl:6", 10.0),
        ([*OK[:4], '{"iteration": 5, "step_ms": NaN}'], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"iteration": 5, "step_ms": "fast"}], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"iteration": 5, "step_ms": -1}], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"iteration": 5, "step_ms": True}], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], '{"iteration": 5, "step_ms": 1e999}'], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], '{"iteration": 5, "step_ms": %s}' % ("9" * 400)], "bad-time", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"step_ms": 10.0}], "malformed", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"iteration": 0, "step_ms": 10.0}], "malformed", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], "[1, 2]"], "malformed", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], "[" * 100_000], "malformed", "b/metrics.jsonl:5", 10.0),
        ([*OK[:3], OK[4]], "gap", "b/metrics.jsonl:4", 10.0),
        ([*OK, OK[4]], "repeated-iteration", "b/metrics.jsonl:6", 10.0),
        ([*OK[:4], {"iteration": 5, "step_ms": 10.0, "lm_loss": float("nan")}], "bad-loss", "b/metrics.jsonl:5", 10.0),
        ([*OK[:4], {"iteration": 5, "step_ms": 10.0, "skipped": True}], "skipped-iterations", "b/metrics.jsonl", 10.0),
        (OK[:3], "short-run", "b/metrics.jsonl", 10.0),
        ([], "empty", "b/metrics.jsonl", None),
        (["", " "], "empty", "b/metrics.jsonl", None),
        (["\x00\x01\x02rubbish"], "binary", "b/metrics.jsonl", None),
        (["null"], "no-data", "b/metrics.jsonl", None),
        (None, "missing-file", "b/metrics.jsonl", None),
        (OK[:1], "short-run", "b/metrics.jsonl", None),  # all of it is warm-up
    ],
)
def test_bad_metrics(run_set, lines, code, where, value):
    run_set.add("a", [run_set.bar("fastmoe")], ms=20.0)
    run_set.add("b", [run_set.bar("smartmoe")], ms=lines, num=5)
    data = load.load_directory(run_set.root)
    assert (code, where) in found(data)
    drawn = data.figures["fig8"].panels[""]["4/1.2"]
    assert drawn["smartmoe"].value == value and drawn["fastmoe"].speedup == 1
    if value is None:
        assert drawn["smartmoe"].status == "no data"


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("{", "malformed", "b/run.json:1"),
        ('{"schema": 1,\n "status": oops}', "malformed", "b/run.json:2"),
        ("[]", "malformed", "b/run.json:1"),
        ("", "empty", "b/run.json"),
        ("[" * 100_000, "malformed", "b/run.json:1"),
        ("\x00\xff", "binary", "b/run.json"),
        ('{"schema": 2}', "malformed", "b/run.json"),
        ('{"schema": 1}', "no-bars", "b/run.json"),
        (
            '{"schema": 1, "status": "ok", "source": "measured", "bars": [{"figure": "fig99", "series": "x"}]}',
            "malformed",
            "b/run.json",
        ),
        ('{"schema": 1, "status": "ok", "source": "measured", "bars": [3, null]}', "malformed", "b/run.json"),
        ('{"schema": 1, "status": "ok", "source": "measured", "bars": {"figure": "fig8"}}', "no-bars", "b/run.json"),
    ],
)
def test_bad_run_json(run_set, text, code, where):
    run_set.add("a", [run_set.bar("fastmoe")], ms=20.0)
    (run_set.root / "b").mkdir()
    (run_set.root / "b" / "run.json").write_text(text)
    data = load.load_directory(run_set.root)
    assert (code, where) in found(data)
    assert list(data.figures["fig8"].panels[""]["4/1.2"]) == ["fastmoe"]


@pytest.mark.parametrize(
    "fields",
    [{"status": "perfect"}, {"source": "guessed"}, {"source": None}, {"status": ["ok"]}, {"source": {}}],
)
def test_unknown_status_or_source_counts_as_failed(run_set, fields):
    run_set.add("b", [run_set.bar("smartmoe")], ms=20.0, **fields)
    data = load.load_directory(run_set.root)
    assert ("malformed", "b/run.json") in found(data)
    assert data.figures["fig8"].panels[""]["4/1.2"]["smartmoe"].status == "failed"


@pytest.mark.parametrize(
    "fields",
    [
        {"config": None},
        {"config": {"workload": 3}},
        {"config": {"workload": {"warmup_iterations": "two"}, "gate": {"capacity": "x"}}},
        {"provenance": []},
        {"provenance": {"num_ranks": "four", "device": ["a"]}},
        {"message": {"a": 1}, "run_id": 7, "system": None, "ended": 3},
    ],
)
def test_odd_run_json_fields_do_no_harm(run_set, fields):
    run_set.add("b", [run_set.bar("fastmoe")], ms=20.0, **fields)
    data = load.load_directory(run_set.root)
    assert data.figures["fig8"].panels[""]["4/1.2"]["fastmoe"].value is not None


@pytest.mark.parametrize("name", ["spans.jsonl", "events.jsonl", "predictions.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", "{", '{"iteration": 1}\n', "\x00", '{"iteration": "x", "layer": 0}\n', "[]\n"])
def test_bad_files_of_figures_11_to_13(run_set, name, text):
    for series, figure in (("static", "fig12"), ("dynamic", "fig12"), ("static", "fig13"), ("accuracy", "fig11")):
        path = run_set.add(f"{figure}-{series}", [run_set.bar(series, "", figure)], ms=OK)
        (path / name).write_text(text)
    data = load.load_directory(run_set.root)
    assert {"fig11", "fig12", "fig13"} <= data.figures.keys()
    assert any(name in place for _, place in found(data)) or (name, text) == ("events.jsonl", "")
    for figure in ("fig11", "fig12"):
        assert data.figures[figure].panels == [] and data.figures[figure].marks and figure in data.waits


# ----------------------------------------------------------------------------------------------------------- raw logs


def megatron(num=5, total=5):
    return [
        f" iteration {i:8d}/{total:8d} | consumed samples: {i} | elapsed time per iteration (ms): {1000 + i}.5 | "
        f"lm loss: 1.0E+00 | number of skipped iterations:   0 | number of nan iterations:   0 |"
        for i in range(1, num + 1)
    ]


def raw(tmp_path, text, name=NAME, system="fastmoe"):
    folder = tmp_path / "fig8" / "c" / "4gpus" / system
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text("\n".join(text) + "\n")
    return load.load_directory(tmp_path)


def the_bar(data, series="fastmoe"):
    return data.figures["fig8"].panels["c"]["4/1.2"][series]


def test_raw_log_is_summed(tmp_path):
    data = raw(tmp_path, ["noise", *megatron(), "more noise"])
    assert the_bar(data).value == pytest.approx(5.0175) and the_bar(data).status == "ok"


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        (lambda t: [*t[:2], t[2][:60], *t[3:]], "cut-line", 3),  # before the time
        (lambda t: [*t[:2], t[2][: t[2].index("1003.5") + 2], *t[3:]], "cut-line", 3),  # inside the time: "10"
        (lambda t: [*t[:2], t[2].replace("1003.5", "nan"), *t[3:]], "bad-time", 3),
        (lambda t: [*t[:2], t[2].replace("1003.5", "0.0"), *t[3:]], "bad-time", 3),
        (lambda t: [*t[:2], t[2].replace("1003.5", "12:30"), *t[3:]], "bad-time", 3),
    ],
)
def test_a_cut_or_bad_iteration_line_makes_the_run_incomplete(tmp_path, change, code, line):
    data = raw(tmp_path, change(megatron()))
    place = f"fig8/c/4gpus/fastmoe/{NAME}:{line}"
    assert (code, place) in found(data)
    assert the_bar(data).status == "incomplete" and the_bar(data).value is None


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [
        (megatron(3), "incomplete", "incomplete"),
        ([*megatron()[:2], *megatron()[3:]], "incomplete", "incomplete"),  # one iteration is not there
        (["no iterations at all"], "incomplete", "incomplete"),
        ([" iteration 1/ 999999999 | elapsed time per iteration (ms): 5.0 |"], "incomplete", "incomplete"),
        (b"", "empty", "unreadable"),
        (b"\x7fELF\0\0\0", "binary", "unreadable"),
        (b"\xff\xfe\xfa" * 50, "incomplete", "incomplete"),
        ([*megatron(), megatron()[-1]], "repeated-iteration", "ok"),
    ],
)
def test_truncated_empty_and_binary_raw_logs(tmp_path, text, code, status):
    data = raw(tmp_path, text)
    assert code in {c for c, _ in found(data)} and the_bar(data).status == status


def test_out_of_memory_in_the_log_is_oom(tmp_path):
    data = raw(tmp_path, [*megatron(2), "RuntimeError: CUDA out of memory. Tried to allocate"])
    assert the_bar(data).status == "oom"
    assert ["and an out-of-memory message" in f.message for f in data.findings if f.code == "incomplete"] == [True]


def test_two_raw_logs_for_one_bar(tmp_path):
    raw(tmp_path, megatron())
    later = NAME.replace("2023-01-01", "2023-01-02")
    data = raw(tmp_path, megatron(2), later)
    assert the_bar(data).status == "ok"  # the complete one, although it is older
    assert "two-runs" in {c for c, _ in found(data)}


def test_unknown_files_are_told(tmp_path):
    data = raw(tmp_path, megatron(), "unknown-name.log")
    assert ("unrecognised", "fig8/c/4gpus/fastmoe/unknown-name.log") in found(data) and data.figures == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fig11/perf_model_1nodes_mbs4.log", "24.7\n"),
        ("fig11/perf_model_1nodes_mbs4.log", '24.7\n{"real": [1, 2], "est": [1]}\n'),
        ("fig11/perf_model_1nodes_mbs4.log", '24.7\n{"real": [1, NaN], "est": [1, 2]}\n'),
        ("fig11/perf_model_1nodes_mbs4.log", '24.7\n{"real": [1, 2], "es'),
        ("fig13/freq10", '{"FastMoE": [1, 2]}'),
        ("fig13/freq10", '{"FastMoE": [1, 2], "SmartMoE": [1, "x"]}'),
        ("fig13/freq10", "[" * 100_000),
        ("fig12/x_dynamicON.prof/0.profiler", '{"type":"time"\n'),
    ],
)
def test_bad_raw_files_of_figures_11_to_13(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    data = load.load_directory(tmp_path)
    assert data.findings and data.figures == {} and len(data.waits) == 6


def test_bad_table_rows_are_named(repository, tmp_path):
    for path in (repository / "logs" / "published").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / "bars.csv").read_text().split("\n")
    lines[3] = lines[3].replace(",ok,", ",ok,many", 1)
    lines[4] = "half a row"
    (tmp_path / "bars.csv").write_text("\n".join(lines))
    layers = (tmp_path / "fig12.csv").read_text()
    (tmp_path / "fig12.csv").write_text(layers[: layers.rindex(",")])
    (tmp_path / "fig13.csv").unlink()
    data = load.load_directory(tmp_path)
    assert {("malformed", "bars.csv:4"), ("malformed", "bars.csv:5"), ("unreadable", "fig13.csv")} <= found(data)
    assert ("malformed", "fig12.csv:17") in found(data)
    assert "fig13" in data.waits and "fig8" in data.figures


# -------------------------------------------------------------------------------------------------------- file system


def test_links_that_lead_outside_are_refused(run_set, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"iteration": 1, "step_ms": 1}\n')
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text("{}")
    path = run_set.add("a", [run_set.bar("fastmoe")], num=1, warmup=0)
    (path / "metrics.jsonl").symlink_to(secret)
    (run_set.root / "linked").symlink_to(outside)
    data = load.load_directory(run_set.root)
    assert {("link-refused", "a/metrics.jsonl"), ("link-refused", "linked")} <= found(data)
    assert data.figures["fig8"].panels[""]["4/1.2"]["fastmoe"].value is None


def test_a_link_in_place_of_a_run_set_is_refused(tmp_path, run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=10)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "x").symlink_to(run_set.root)
    datasets = load.load_default(logs)
    assert [d.figures for d in datasets] == [{}] and datasets[0].findings[0].code == "link-refused"


def test_a_pipe_is_not_opened(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=10)
    path = run_set.add("b", [run_set.bar("smartmoe")])
    os.mkfifo(path / "metrics.jsonl")
    data = load.load_directory(run_set.root)
    assert ("unreadable", "b/metrics.jsonl") in found(data)


def test_a_file_without_read_permission(run_set, monkeypatch):
    run_set.add("a", [run_set.bar("fastmoe")], ms=10)
    locked = run_set.add("b", [run_set.bar("smartmoe")], ms=10) / "metrics.jsonl"
    real = Path.read_bytes

    def read_bytes(self):
        if self.name == locked.name and self.parent.name == "b":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    data = load.load_directory(run_set.root)
    (finding,) = [f for f in data.findings if f.code == "unreadable"]
    assert finding.where == ["b/metrics.jsonl"] and "Permission denied" in finding.message
    assert data.figures["fig8"].panels[""]["4/1.2"]["smartmoe"].status == "no data"


def test_a_huge_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("plotting.files.MAX_BYTES", 10)
    data = raw(tmp_path, megatron())
    assert "unreadable" in {c for c, _ in found(data)} and the_bar(data).status == "unreadable"


def test_no_log_at_all(tmp_path):
    data = load.load_directory(tmp_path)
    assert [f.code for f in data.findings] == ["nothing"]
    assert not published.read_raw(Folder(tmp_path, []))


def test_json_numbers_keep_their_type(run_set):
    """An iteration such as 2.0 counts, "2" does not."""
    lines = [{"iteration": 1.0, "step_ms": 10}, {"iteration": "2", "step_ms": 10}]
    run_set.add("a", [run_set.bar("fastmoe")], ms=[json.dumps(x) for x in lines], num=2, warmup=0)
    data = load.load_directory(run_set.root)
    assert ("malformed", "a/metrics.jsonl:2") in found(data)
    assert data.figures["fig8"].panels[""]["4/1.2"]["fastmoe"].num_samples == 1
