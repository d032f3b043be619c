"""The published numbers: raw logs give the paper's values, the committed tables give the raw logs' values."""

import dataclasses

import pytest

from plotting import judge, published, stats, tables
from plotting.files import Folder
from plotting.model import FIGURES, TITLES


def near(value):
    return pytest.approx(value, rel=1e-6)


@pytest.fixture(scope="module")
def raw(raw_logs):
    folder = Folder(raw_logs, [])
    rows = published.read_raw(folder)
    return rows, judge.to_dataset(rows, folder.findings, "", "published")


@pytest.fixture(scope="module")
def table(repository):
    folder = Folder(repository / "logs" / "published", [])
    rows = tables.read_tables(folder)
    return rows, judge.to_dataset(rows, folder.findings, "", "published")


@pytest.fixture(params=["raw", "table"], scope="module")
def both(request):
    """The rows and figures from either source."""
    return request.getfixturevalue(request.param)


def groups(data, figure):
    return {(panel, name): g for panel, gs in data.figures[figure].panels.items() for name, g in gs.items()}


def test_figure_8_equals_the_paper(both, paper):
    rows, data = both
    drawn = groups(data, "fig8")
    assert [k for k in drawn] == [(b["cluster"], b["xlabel"]) for b in paper["fig8"]["bars"]]
    by_file = {row.file: row for row in rows.bars}
    for reference in paper["fig8"]["bars"]:
        group = drawn[reference["cluster"], reference["xlabel"]]
        assert list(group) == ["fastmoe", "deepspeed", "fastermoe", "smartmoe"]
        for series, bar in group.items():
            expected = reference[series]
            row = by_file[bar.file]
            assert f"logs/{bar.file}" == expected["file"] and row.num_iterations == expected["n_iter"]
            if expected["plotted"] == "OOM":
                assert (bar.value, bar.speedup, bar.quoted, bar.status, bar.source) == (
                    None,
                    None,
                    "OOM",
                    "incomplete",
                    "quoted",
                )
                continue
            assert row.seconds == near(expected["total_s"]) and bar.value == near(float(expected["plotted"]))
            assert row.first_s * 1000 == near(expected["first_iter_ms"])
            assert row.median_s * 1000 == near(expected["median_ms"])
            assert bar.speedup == near(reference["speedup_over_fastmoe"][series])


def test_figure_9_equals_the_paper(both, paper):
    rows, data = both
    drawn = groups(data, "fig9")
    assert len(drawn) == 4
    for reference in paper["fig9"]["bars"]:
        capacity = "+inf" if reference["gate"] == "naive" else "4.8"
        group = drawn["", f"{reference['gpus']}/{capacity}"]
        assert list(group) == ["tutel", "fastmoe", "smartmoe"]
        for series, bar in group.items():
            assert bar.value == near(reference[series]["plotted_s"])
            assert bar.speedup == near(reference["speedup_over_tutel"][series])
            row = next(r for r in rows.bars if r.file == bar.file)
            assert row.num_iterations == reference[series]["train_lines"]
            if told := reference[series]["actual_balance_strategy"]:
                assert [row.gate_run] == told


def test_figure_10_equals_the_paper(both, paper):
    _, data = both
    drawn = groups(data, "fig10")
    assert len(drawn) == 4
    for reference in paper["fig10"]["bars"]:
        capacity = "+inf" if reference["gate"] == "naive" else "1.2"
        group = drawn["", f"{reference['gpus']}/{capacity}"]
        assert list(group) == ["fastmoe", "alpa", "smartmoe"]
        for series, bar in group.items():
            assert bar.value == near(reference[series]["plotted_s"]) and f"logs/{bar.file}" == reference[series]["file"]
            assert bar.speedup == near(reference["speedup_over_fastmoe"][series])


def test_figure_11_equals_the_paper(both, paper):
    _, data = both
    panels = data.figures["fig11"].panels
    assert [p.name for p in panels] == [p["panel"] for p in paper["fig11"]["panels"]]
    for panel, reference in zip(panels, paper["fig11"]["panels"], strict=True):
        assert panel.predicted_ms == near(reference["est"]) and panel.measured_ms == near(reference["real"])
        assert panel.naive_ms == near([reference["naive_est_ms"]])
        for ours, theirs in (
            ("r2", "r2_est_vs_real"),
            ("pearson_r2", "pearson_r2"),
            ("mape_pct", "mape_pct"),
            ("max_ape_pct", "max_ape_pct"),
            ("bias_ms", "mean_bias_ms"),
            ("naive_r2", "naive_r2"),
            ("naive_mape_pct", "naive_mape_pct"),
        ):
            assert panel.stats[ours] == near(reference[theirs]), ours


def test_figure_12_equals_the_paper(both, paper):
    _, data = both
    (panel,) = data.figures["fig12"].panels
    assert panel.headline == "backward" and len(panel.rows) == len(paper["fig12"]["layers"])
    for row, reference in zip(panel.rows, paper["fig12"]["layers"], strict=True):
        assert row.layer == reference["layer"]
        assert row.backward_speedup == near(reference["speedup_plotted"])
        assert row.forward_speedup == near(reference["fwd_speedup"])
        assert row.total_speedup == near(reference["fwdbwd_speedup"])
        for way in ("forward", "backward"):
            for side in ("static", "dynamic"):
                assert getattr(row, f"{side}_{way}") == near(reference[f"{side}_{way[0]}wd_s"])
    speedups = [row.backward_speedup for row in panel.rows]
    assert sum(speedups) / len(speedups) == near(paper["fig12"]["mean_speedup"])


def test_figure_13_equals_the_paper(both, paper):
    _, data = both
    (panel,) = data.figures["fig13"].panels
    curves = {c.series: c for c in panel.curves}
    assert [c.series for c in panel.curves if c.drawn] == ["static", "every_100", "every_10"]
    assert all(c.iterations == [1 + 10 * i for i in range(300)] for c in panel.curves)
    for interval, static in ((10, "static_10"), (100, "static")):
        reference = paper["fig13"]["series"][f"freq{interval}"]
        first_static, first_dynamic = reference["first_point_dropped"]
        assert curves[static].times_ms in ([first_static, *reference["static_ms"]], reference["static_ms"])
        assert curves[f"every_{interval}"].times_ms in (
            [first_dynamic, *reference["dynamic_ms"]],
            reference["dynamic_ms"],
        )
        assert curves[f"every_{interval}"].changes == reference["changed_iters"]
        assert len(curves[f"every_{interval}"].changes) == reference["n_changed"]
        assert curves[static].mean_ms == near(reference["mean_static"])
        assert curves[f"every_{interval}"].mean_ms == near(reference["mean_dynamic"])


def test_tables_equal_raw_logs(raw, table):
    """logs/published is what the raw logs say, row by row, and leads to the same findings."""
    (raw_rows, raw_data), (table_rows, table_data) = raw, table
    assert len(raw_rows.bars) == len(table_rows.bars) == 64
    by_file = {row.file: row for row in table_rows.bars}
    for row in raw_rows.bars:
        other = by_file[row.file]
        for name, value in dataclasses.asdict(row).items():
            assert getattr(other, name) == (near(value) if isinstance(value, float) else value), (row.file, name)
    for a, b in zip(raw_rows.scatter, table_rows.scatter, strict=True):
        assert (a.name, a.files) == (b.name, b.files) and a.predicted_ms == near(b.predicted_ms)
    for a, b in zip(raw_rows.layers.rows, table_rows.layers.rows, strict=True):
        assert dataclasses.astuple(a)[:5] == near(dataclasses.astuple(b)[:5])
    for a, b in zip(raw_rows.replays, table_rows.replays, strict=True):
        assert dataclasses.asdict(a) == dataclasses.asdict(b)
    key = lambda f: (f.code, f.message, tuple(f.where), f.figures)  # noqa: E731
    assert sorted(map(key, raw_data.findings)) == sorted(map(key, table_data.findings))


def test_tables_can_be_written_again(raw_logs, repository, tmp_path):
    """The committed tables are byte for byte what `python -m plotting.tables` writes."""
    assert tables.main([str(raw_logs), str(tmp_path)]) == 0
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (repository / "logs" / "published" / path.name).read_bytes(), path.name


def test_published_tables_give_every_figure(table):
    _, data = table
    assert list(data.figures) == list(FIGURES) == list(TITLES) and data.waits == {}


def test_warnings_say_what_the_logs_hide(table):
    """The list of findings: four copies and one, gates, incomplete runs, placement off, first iteration, names."""
    _, data = table
    by_code = {}
    for finding in data.findings:
        by_code.setdefault(finding.code, []).append(finding)
    copies = [(f.message.split(":")[0], f.figures) for f in by_code["identical-logs"]]
    pinky = [f"pinky {g}" for g in ("32/1.2", "32/+inf", "64/1.2", "64/+inf")]
    assert sorted(copies) == sorted([("16/1.2", ("fig10",)), *((p, ("fig8",)) for p in pinky)])
    assert sorted(f.message.split(":")[0] for f in by_code["gate-mismatch"]) == [
        "fig9 32/4.8 fastmoe",
        "fig9 32/4.8 smartmoe",
    ]
    assert len(by_code["incomplete"]) == 2
    assert all("no out-of-memory message" in f.message and "paper's label" in f.message for f in by_code["incomplete"])
    assert "3 of 200" in by_code["incomplete"][0].message and "0 of ?" in by_code["incomplete"][1].message
    assert [len(f.where) for f in by_code["dynamic-off"]] == [10, 4]
    assert "16 GPUs" not in by_code["name-gpus"][0].message and len(by_code["name-gpus"]) == 4
    assert len(by_code["first-iteration"]) == 1 and len(by_code["first-iteration"][0].where) == 50
    assert {"micro-batch", "other-model", "skipped-iterations", "backward-only", "replay-method"} < by_code.keys()


def test_notes_reach_the_bars(table):
    _, data = table
    pinky = groups(data, "fig8")["pinky", "32/1.2"]
    assert "identical-logs" in pinky["fastermoe"].notes and "identical-logs" in pinky["fastmoe"].notes
    assert "identical-logs" not in pinky["smartmoe"].notes and "other-model" in pinky["deepspeed"].notes
    assert "identical-logs" not in groups(data, "fig8")["inky", "16/1.2"]["smartmoe"].notes  # its copy is in figure 10
    assert "identical-logs" in groups(data, "fig10")["", "16/1.2"]["alpa"].notes


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["4/+inf", "16/1.2", "4/4.8", "4/1.2", "odd"], ["4/1.2", "4/4.8", "4/+inf", "16/1.2", "odd"]),
        (["8/2", "8/10"], ["8/2", "8/10"]),
    ],
)
def test_group_order(names, order):
    assert sorted(names, key=stats.group_key) == order
