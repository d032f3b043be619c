"""Measured run-sets: medians after warm-up, statuses, references, comparisons, figures 11-13 of our own runs."""

import json

import pytest

from plotting import __main__ as entry
from plotting import load, report


def read(run_set):
    return load.load_directory(run_set.root)


def codes(data):
    return [finding.code for finding in data.findings]


def group(data, figure="fig8", panel="", name="4/1.2"):
    return data.figures[figure].panels[panel][name]


def test_median_leaves_out_the_warm_up(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("smartmoe")], ms=50)
    drawn = group(read(run_set))
    assert drawn["fastmoe"].value == pytest.approx(100.065) and drawn["fastmoe"].num_samples == 8
    assert drawn["fastmoe"].low == pytest.approx(100.037) and drawn["fastmoe"].high == pytest.approx(100.093)
    assert drawn["smartmoe"].speedup == pytest.approx(100.065 / 50.065) and drawn["fastmoe"].speedup == 1
    assert drawn["smartmoe"].speedup_low < drawn["smartmoe"].speedup < drawn["smartmoe"].speedup_high
    assert (drawn["smartmoe"].source, drawn["smartmoe"].status, drawn["smartmoe"].file) == (
        "measured",
        "ok",
        "b/metrics.jsonl",
    )


def test_a_clean_run_set_has_no_findings(run_set):
    for ms, series in enumerate(("fastmoe", "deepspeed", "fastermoe"), start=10):
        run_set.add(series, [run_set.bar(series)], ms=ms)
    assert read(run_set).findings == []


def test_directory_names_are_not_trusted(run_set):
    run_set.add("fig9/tutel/x", [run_set.bar("fastmoe")], ms=100)
    data = read(run_set)
    assert "fig9" not in data.figures and list(group(data)) == ["fastmoe"]


@pytest.mark.parametrize("status", ["failed", "oom", "timeout", "running", "pending", "skipped"])
def test_a_run_without_end_is_a_mark(run_set, status):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("smartmoe")], ms=50, status=status, message="why it ended")
    drawn = group(read(run_set))
    assert (drawn["smartmoe"].value, drawn["smartmoe"].status, drawn["smartmoe"].detail) == (
        None,
        status,
        "why it ended",
    )
    assert drawn["fastmoe"].speedup == 1


def test_a_failed_reference_is_named_and_times_stay(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], status="oom", message="rank 1")
    run_set.add("b", [run_set.bar("smartmoe")], ms=50)
    run_set.add("c", [run_set.bar("smartmoe", group="4/2.4")], ms=50, capacity=2.4)
    data = read(run_set)
    drawn = group(data)
    assert drawn["smartmoe"].speedup is None and drawn["smartmoe"].value == pytest.approx(50.065)
    messages = [f.message for f in data.findings if f.code == "no-reference"]
    assert "fastmoe is oom" in messages[0] and "was not run" in messages[1]


def test_one_run_serves_several_figures(run_set):
    run_set.add("a", [run_set.bar("fastmoe"), run_set.bar("fastmoe", figure="fig10")], ms=100)
    data = read(run_set)
    assert group(data)["fastmoe"].value == group(data, "fig10")["fastmoe"].value


def repeat(number, entry="train"):
    return {"provenance": {"device": "cpu", "num_ranks": 4, "repeat": number, "entry": entry}}


def test_repeats_are_one_bar_from_the_fastest_to_the_slowest(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    for number, ms in enumerate((60, 40, 50), start=1):
        run_set.add(f"b{number}", [run_set.bar("smartmoe")], ms=ms, **repeat(number))
    data = read(run_set)
    bar = group(data)["smartmoe"]
    assert (bar.low, bar.value, bar.high) == pytest.approx((40.065, 50.065, 60.065)) and bar.num_samples == 24
    assert bar.file == "b3/metrics.jsonl" and "median of 3 runs with medians of 60.06, 40.06, 50.06 ms" in bar.detail
    assert data.findings == [] and bar.speedup_low == pytest.approx(100.065 / 60.065)


def test_a_repeat_that_failed_is_told_and_the_others_are_drawn(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b1", [run_set.bar("smartmoe")], ms=60, status="oom", **repeat(1))
    run_set.add("b2", [run_set.bar("smartmoe")], ms=40, **repeat(2))
    run_set.add("b2-again", [run_set.bar("smartmoe")], ms=45, ended="2027-01-01T00:00:00Z", **repeat(2))
    data = read(run_set)
    assert group(data)["smartmoe"].value == pytest.approx(45.065) and codes(data) == ["two-runs", "lost-repeat"]
    assert "1 of 2 repeats gave no time" in data.findings[1].message


def test_padded_runs_from_before_the_package_could_run_are_named_so(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("deepspeed")], ms=50, **repeat(1))
    run_set.add("c", [run_set.bar("deepspeed", group="4/2.4")], ms=50, **repeat(1, entry="deepspeed"))
    data = read(run_set)
    assert list(group(data)) == ["fastmoe", "padded"] and list(group(data, name="4/2.4")) == ["deepspeed"]


def test_two_runs_for_one_bar_take_the_latest_ok(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100, ended="2026-01-02T00:00:00Z")
    run_set.add("b", [run_set.bar("fastmoe")], ms=90, ended="2026-01-03T00:00:00Z")
    run_set.add("c", [run_set.bar("fastmoe")], status="failed", ended="2026-01-04T00:00:00Z")
    data = read(run_set)
    assert group(data)["fastmoe"].value == pytest.approx(90.065)
    (finding,) = [f for f in data.findings if f.code == "two-runs"]
    assert finding.where == ["a/run.json", "b/run.json", "c/run.json"] and "the latest ok run, b" in finding.message


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("gate-mismatch", {"capacity": 2.4}),
        ("gate-mismatch", {"capacity": None}),
        ("dynamic-off", {"policy": "static"}),
        ("name-gpus", {"provenance": {"num_ranks": 8, "device": "cpu"}}),
        ("mixed-devices", {"provenance": {"num_ranks": 4, "device": "other"}}),
        ("mixed-sources", {"source": "simulated"}),
    ],
)
def test_facts_against_labels(run_set, code, change):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("smartmoe")], ms=50, **change)
    data = read(run_set)
    assert codes(data) == [code] and code in group(data)["smartmoe"].notes


def test_identical_times_of_two_systems_are_told(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("fastermoe")], ms=100)
    data = read(run_set)
    assert codes(data) == ["identical-logs"] and "fastermoe and fastmoe" in data.findings[0].message


def test_different_models_and_batches_are_told(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    path = run_set.add("b", [run_set.bar("smartmoe")], ms=50)
    record = json.loads((path / "run.json").read_text())
    record["config"]["model"]["num_layers"] = 2
    record["config"]["workload"]["micro_batch_size"] = 1
    (path / "run.json").write_text(json.dumps(record))
    data = read(run_set)
    assert codes(data) == ["other-model", "other-batch"]
    assert group(data)["smartmoe"].notes == ["other-model", "other-batch"] and not group(data)["fastmoe"].notes
    assert "smartmoe ran with other models than fastmoe" in data.findings[0].message


def test_a_system_of_ones_own_that_does_not_say_its_model_is_marked_alone(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    path = run_set.add("b", [run_set.bar("mine")], ms=50)
    record = json.loads((path / "run.json").read_text())
    del record["config"]["model"]
    (path / "run.json").write_text(json.dumps(record))
    data = read(run_set)
    assert "mine ran with other models than fastmoe; mine does not say with which" in data.findings[0].message
    assert group(data)["mine"].notes == ["other-model"] and not group(data)["fastmoe"].notes


def test_a_figure_names_the_devices_of_its_own_runs_and_repeats_where_there_are_some(run_set, tmp_path):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    run_set.add("b", [run_set.bar("fastmoe", figure="fig10")], ms=50, provenance={"num_ranks": 4, "device": "other"})
    data = read(run_set)
    assert "other" in data.title and "other" in data.sources["fig10"] and "other" not in data.sources["fig8"]
    assert {bar.num_runs for bar in data.figures["fig8"].bars()} == {1}


# -------------------------------------------------------------------------------------------------- figures 11, 12, 13


def spans(scale, num=6, layers=2, ranks=2, warmup_scale=100.0):
    return [
        {
            "iteration": i,
            "rank": r,
            "layer": k,
            "forward_ms": scale * (warmup_scale if i <= 2 else 1),
            "backward_ms": 3 * scale * (1 + k),
        }
        for i in range(1, num + 1)
        for r in range(ranks)
        for k in range(layers)
    ]


def test_figure_12_is_forward_and_backward_over_all_ranks(run_set):
    for series, scale in (("static", 2.0), ("dynamic", 1.0)):
        path = run_set.add(series, [run_set.bar(series, "", "fig12")])
        run_set.lines(path / "spans.jsonl", spans(scale))
    (panel,) = read(run_set).figures["fig12"].panels
    assert panel.headline == "total" and [r.layer for r in panel.rows] == [0, 1]
    assert (panel.rows[0].static_forward, panel.rows[1].static_backward) == (2.0, 12.0)
    assert panel.rows[0].total_speedup == panel.rows[0].backward_speedup == pytest.approx(2)
    assert panel.rows[0].speedup_low == pytest.approx(2)


def test_figure_12_pays_for_moves(run_set):
    for series, scale, ms in (("static", 2.0, 30), ("dynamic", 1.0, 20)):
        path = run_set.add(series, [run_set.bar(series, "", "fig12")], ms=ms)
        run_set.lines(path / "spans.jsonl", spans(scale))
    run_set.lines(path / "events.jsonl", [{"iteration": 4, "layer": 1, "kind": "migrate", "cost_ms": 8.0}])
    (panel,) = read(run_set).figures["fig12"].panels
    assert [row.dynamic_forward for row in panel.rows] == [1.0, 3.0], "8 ms in one of the four iterations that count"
    assert panel.rows[1].total_speedup == pytest.approx(14 / 9) and panel.rows[1].backward_speedup == pytest.approx(2)
    assert panel.step_speedup == pytest.approx(1.5, rel=0.05)


def test_figure_12_needs_both_placements(run_set):
    path = run_set.add("static", [run_set.bar("static", "", "fig12")])
    run_set.lines(path / "spans.jsonl", spans(2.0))
    run_set.add("dynamic", [run_set.bar("dynamic", "", "fig12")], status="failed", message="bug")
    data = read(run_set)
    figure = data.figures["fig12"]
    assert figure.panels == [] and [(m.series, m.status, m.detail) for m in figure.marks] == [
        ("dynamic", "failed", "bug")
    ]
    assert "fig12" in data.waits


def test_figure_13_reads_replays_and_changes(run_set):
    events = [
        {"iteration": 11, "kind": "migrate"},
        {"iteration": 21, "kind": "keep"},
        {"iteration": 31, "kind": "replicate"},
    ]
    for series, ms in (("static", 20.0), ("every_10", 10.0)):
        lines = [{"iteration": 1 + 10 * i, "step_ms": ms + (100 if i == 0 else 0)} for i in range(5)]
        path = run_set.add(series, [run_set.bar(series, "layer 6", "fig13")], ms=lines, warmup=1)
        if series != "static":
            run_set.lines(path / "events.jsonl", events)
    data = read(run_set)
    (panel,) = data.figures["fig13"].panels
    assert [c.series for c in panel.curves] == ["static", "every_10"] and panel.name == "layer 6"
    assert panel.curves[1].changes == [11, 31] and panel.curves[1].mean_ms == 10.0
    assert report.values_of(data.figures["fig13"])[1]["speedup"] == 2.0
    assert data.findings == []  # a trace steps by ten: no gap


def test_figure_11_reads_predictions(run_set):
    points = [
        {"iteration": i, "layer": 0, "predicted_ms": 1.1 * i, "measured_ms": 1.0 * i, "naive_ms": 5.0}
        for i in range(1, 9)
    ]
    path = run_set.add("a", [run_set.bar("accuracy", "4-2", "fig11")])
    run_set.lines(path / "predictions.jsonl", points)
    (panel,) = read(run_set).figures["fig11"].panels
    assert panel.stats["mape_pct"] == pytest.approx(10) and panel.stats["num_points"] == 8


def test_figures_without_data_wait(run_set):
    run_set.add("a", [run_set.bar("fastmoe")], ms=100)
    waits = read(run_set).waits
    assert set(waits) == {"fig9", "fig10", "fig11", "fig12", "fig13"}
    assert "Swin" in waits["fig9"] and "predictions.jsonl" in waits["fig11"]


def test_losses_are_laid_over_each_other(run_set):
    """The program's own loss first; a run without a loss is a mark; a skipped step has none."""
    for series, factor in (("smartmoe", 1.02), ("megatron", 1.0)):
        lines = [{"iteration": i, "step_ms": 5.0, "lm_loss": factor * (9.0 - i / 10), "skipped": i == 3} for i in range(1, 13)]
        run_set.add(series, [run_set.bar(series, "", "losses", "one model")], ms=lines, num=12)
    run_set.add("fastmoe", [run_set.bar("fastmoe", "", "losses", "one model")], ms=5.0)
    (data,) = load.load_directories([run_set.root])
    (panel,) = data.figures["losses"].panels
    assert [curve.series for curve in panel.curves] == ["megatron", "smartmoe"] and panel.name == "one model"
    assert panel.curves[0].iterations == [1, 2, *range(4, 13)]
    assert [mark.series for mark in data.figures["losses"].marks] == ["fastmoe"]
    assert "losses" not in data.waits
    out = run_set.root / "out"
    assert entry.main(["--logs", str(run_set.root), "--out", str(out)]) == 0 and (out / "losses.pdf").exists()
    values = json.loads((out / "values.json").read_text())["datasets"][0]["figures"]["losses"]["values"]
    (row,) = [value for value in values if value["series"] == "smartmoe"]
    assert row["compared_with"] == "megatron" and row["most_apart"] == pytest.approx(0.02)
    assert row["last_loss"] == pytest.approx(1.02 * (9.0 - 7.5 / 10), rel=0.01)
