"""Heat maps: loads.jsonl with the changes of placement, under figures 12 and 13."""

import json
import warnings

import pytest

from plotting import __main__ as entry
from plotting import heatmap, load


def loads(layers=2, iterations=6, step=1, ranks=2, experts=4):
    """Rank 0 of layer k gets 2 + k times as much as the others."""
    return [
        {"iteration": 1 + step * i, "layer": layer, "expert_load": [10 * (2 + layer), *[10] * (experts - 1)],
         "rank_load": [10 * (2 + layer) + i, *[10] * (ranks - 1)]}
        for i in range(iterations) for layer in range(layers)
    ]  # fmt: skip


def times(step=1):
    return [{"iteration": 1 + step * i, "step_ms": 10.0 + i} for i in range(6)]


def read(run_set):
    (data,) = load.load_directories([run_set.root])
    return data


def test_a_replay_brings_its_loads_and_changes(run_set):
    events = [{"iteration": 11, "kind": "migrate", "layer": 3}, {"iteration": 21, "kind": "keep", "layer": 3},
              {"iteration": 21, "kind": "migrate", "layer": 9}, {"iteration": 31, "kind": "replicate"}]  # fmt: skip
    for series in ("static", "every_10"):
        path = run_set.add(series, [run_set.bar(series, "", "fig13")], ms=times(10), warmup=0, num=6)
        run_set.lines(path / "loads.jsonl", [{**line, "layer": 3} for line in loads(layers=1, step=10)])
    run_set.lines(path / "events.jsonl", events)
    data = read(run_set)
    (panel,) = data.figures["fig13"].panels
    assert [load_map.series for load_map in panel.maps] == ["static", "every_10"] and data.findings == []
    static, moved = panel.maps
    assert moved.layer == 3 and moved.iterations == [1, 11, 21, 31, 41, 51] and moved.rank_load.shape == (6, 2)
    assert static.changes == {} and moved.changes == {"migrate": [11], "replicate": [31]}
    assert static.max_over_mean()[0] == pytest.approx(20 / 15)
    out = run_set.root / "out"
    assert entry.main(["--logs", str(run_set.root), "--out", str(out)]) == 0
    values = json.loads((out / "values.json").read_text())["datasets"][0]["figures"]["fig13"]["values"]
    (row,) = [v for v in values if v.get("map") and v["series"] == "every_10"]
    assert row["num_migrate"] == 1 and row["max_over_mean"] == pytest.approx(moved.max_over_mean().tolist())
    assert row["file"].endswith("loads.jsonl")


def test_figure_12_shows_the_layer_with_the_worst_balance(run_set):
    for series in ("static", "dynamic"):
        path = run_set.add(series, [run_set.bar(series, "", "fig12")])
        spans = [{"iteration": i, "rank": r, "layer": k, "forward_ms": 1.0, "backward_ms": 2.0}
                 for i in range(1, 7) for r in range(2) for k in range(2)]  # fmt: skip
        run_set.lines(path / "spans.jsonl", spans)
        run_set.lines(path / "loads.jsonl", loads())
    (panel,) = read(run_set).figures["fig12"].panels
    assert [(load_map.series, load_map.layer) for load_map in panel.maps] == [("static", 1), ("dynamic", 1)]
    assert entry.main(["--logs", str(run_set.root), "--out", str(run_set.root / "out")]) == 0


def test_figure_12_compares_every_series_with_the_static_run(run_set):
    for series, ms in (("static", 4.0), ("dynamic", 2.0), ("history", 1.0), ("both", None)):
        path = run_set.add(series, [run_set.bar(series, "", "fig12")], status="ok" if ms else "failed")
        if ms:
            spans = [{"iteration": i, "rank": 0, "layer": 0, "forward_ms": ms, "backward_ms": ms} for i in range(1, 7)]
            run_set.lines(path / "spans.jsonl", spans)
            run_set.lines(path / "loads.jsonl", loads(layers=1))
    figure = read(run_set).figures["fig12"]
    assert [panel.name for panel in figure.panels] == [", experts moved", ", experts copied"]
    assert [panel.rows[0].total_speedup for panel in figure.panels] == [2.0, 4.0]
    assert [mark.series for mark in figure.marks] == ["both"]
    assert [len(panel.maps) for panel in figure.panels] == [0, 3]


def test_the_layout_holds_with_maps(run_set):
    """matplotlib gives up on a layout with no more than a warning, and axes then overlap."""
    late = lambda lines: [{**line, "iteration": line["iteration"] + 1000} for line in lines]  # noqa: E731
    for series in ("static", "every_10"):
        path = run_set.add(series, [run_set.bar(series, "", "fig13")], ms=late(times()))
        run_set.lines(path / "loads.jsonl", late(loads(layers=1)))
    run_set.lines(path / "events.jsonl", [{"iteration": 1003, "kind": "replicate"}])
    figure = entry.DRAW["fig13"](read(run_set).figures["fig13"], "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(run_set.root / "a.png")


def test_lines_that_do_not_fit_are_told(run_set):
    good = loads(layers=1)
    bad = [{**good[1], "rank_load": [1, 2, 3]}, {**good[2], "expert_load": [1, -2, 3, 4]}, {**good[3], "layer": "x"},
           {**good[4], "rank_load": None}, {**good[5], "expert_load": []}, "no json"]  # fmt: skip
    path = run_set.add("a", [run_set.bar("static", "", "fig13")], ms=times())
    run_set.lines(path / "loads.jsonl", [good[0], *bad])
    data = read(run_set)
    (load_map,) = data.figures["fig13"].panels[0].maps
    assert load_map.iterations == [1]
    told = [f.where[0] for f in data.findings if f.code == "malformed"]
    assert told == [f"a/loads.jsonl:{number}" for number in (7, 2, 3, 4, 5, 6)]
    assert heatmap.span([load_map]) == (0.5, 1.5)


def test_no_load_at_all_is_balanced(run_set):
    path = run_set.add("a", [run_set.bar("static", "", "fig13")], ms=times())
    run_set.lines(path / "loads.jsonl", [{**line, "rank_load": [0, 0], "expert_load": [0] * 4} for line in loads(1)])
    assert read(run_set).figures["fig13"].panels[0].maps[0].max_over_mean().tolist() == [1.0] * 6
    assert entry.main(["--logs", str(run_set.root), "--out", str(run_set.root / "out")]) == 0
