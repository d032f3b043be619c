"""What is written: files, values.json, index.html, exit codes, and names from logs that try to be something else."""

import ast
import html.parser
import json
import os
import subprocess
import sys
from datetime import datetime

import pytest

from plotting import __main__ as entry
from plotting import bars, fig13, load, report, style
from plotting.files import clean, file_stem
from plotting.model import Bar, BarFigure, Curve, CurvePanel, PanelFigure

HOSTILE = "<script>alert(1)</script>\"'&$(touch x)`touch y`$x^2$\n\x1b[31m\u202e_{}"


def draw(*arguments):
    return entry.main([str(a) for a in arguments])


def values(out):
    return json.loads((out / "values.json").read_text())


def fill(run_set, name="", **fields):
    run_set.add(f"a{name}", [run_set.bar("fastmoe")], ms=100, **fields)
    run_set.add(f"b{name}", [run_set.bar("smartmoe")], ms=50, **fields)
    return run_set


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


# --------------------------------------------------------------------------------------------------------- whole output


@pytest.fixture(scope="module")
def published_out(tmp_path_factory, repository):
    out = tmp_path_factory.mktemp("published")
    assert draw("--logs", repository / "logs" / "published", "--out", out) == 0
    return out


def test_published_output_is_complete(published_out):
    expected = {f"fig{n}.{kind}" for n in range(8, 14) for kind in ("pdf", "png")} | {"values.json", "index.html"}
    assert {p.name for p in published_out.iterdir()} == expected
    for n in range(8, 14):
        pdf = (published_out / f"fig{n}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"CreationDate" not in pdf
        assert (published_out / f"fig{n}.png").read_bytes().startswith(b"\x89PNG")


def test_every_value_has_status_source_and_file(published_out):
    (data,) = values(published_out)["datasets"]
    assert [*data["figures"], "losses"] == list(entry.DRAW)  # which nobody published
    sources = set()
    for figure in data["figures"].values():
        assert figure["files"] and figure["values"]
        for row in figure["values"]:
            assert row["status"] and row["file"] and row["source"]
            sources.add(row["source"])
    assert sources == {"published", "quoted"} and values(published_out)["warnings"]


def test_page_is_self_contained(published_out):
    page = Page((published_out / "index.html").read_text())
    assert page.tags.count("img") == 6 and not {"script", "link", "iframe", "object"} & set(page.tags)
    links = [value for key, value in page.attributes if key in ("src", "href")]
    assert len(links) == 6 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "byte-identical logs" in page.text and "published" in page.text


def test_output_is_deterministic(run_set, tmp_path):
    fill(run_set)
    for name in ("one", "two"):
        assert draw("--logs", run_set.root, "--out", tmp_path / name) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_default_draws_published_and_every_run_set(run_set, repository, tmp_path, monkeypatch):
    fill(run_set)
    logs = tmp_path / "repo" / "logs"
    (logs / "published").mkdir(parents=True)
    for name in ("published.toml", "fig12.csv"):  # one figure is enough here
        (logs / "published" / name).write_bytes((repository / "logs" / "published" / name).read_bytes())
    run_set.root.rename(logs / "my run-set")
    monkeypatch.setattr(entry, "REPOSITORY", tmp_path / "repo")
    assert draw() == draw() == 0
    first, second = sorted((tmp_path / "repo").glob("outputs_from_log_*"))
    datetime.strptime(first.name.removeprefix("outputs_from_log_"), "%Y%m%dT%H%M%SZ")
    assert {p.name for p in second.glob("*.pdf")} == {"fig12.pdf", "fig8.my_run-set.pdf"}
    kinds = [(d["name"], d["kind"]) for d in values(first)["datasets"]]
    assert kinds == [("", "published"), ("my_run-set", "measured")]
    assert "Swin" in values(first)["datasets"][1]["waits_for"]["fig9"]


# ------------------------------------------------------------------------------------------------ arguments, exit codes


def test_the_terminal_gets_a_line_for_each_kind_of_warning_and_the_page_all(run_set, tmp_path, capsys):
    logs = []
    for name in ("one", "two"):
        root = type(run_set)(tmp_path / name)
        for group in ("4/1.2", "4/2.4", "4/4.8"):
            for series in ("fastmoe", "smartmoe"):  # each with the times of the other
                root.add(f"{series}-{group[2:]}", [root.bar(series, group)], ms=100)
        logs.append(root.root)
    assert draw("--logs", *logs, "--out", tmp_path / "o") == 0
    told, page = capsys.readouterr().err.splitlines(), (tmp_path / "o" / "index.html").read_text()
    same = [line for line in told if "identical-logs" in line]
    assert len(same) == 2 and all("2 more of this kind in index.html" in line for line in same)
    assert page.count("byte-identical") == 6
    assert [line for line in told if line.startswith("no data: two")] == [
        "no data: two: fig9, fig10, fig11, fig12, fig13; index.html says what they wait for"
    ]


def test_titles_and_labels_stay_inside_a_narrow_figure():
    name, facts = "pinky, 64 GPUs", "mean 1.052, whole iterations 1.032  (simulated)"
    assert style.in_width([name, facts], style.COLUMN_INCH) == f"{name}\n{facts}"
    assert style.in_width([name, facts], style.WIDE_INCH) == f"{name}  {facts}"
    assert style.in_width(["", "(published)"], style.COLUMN_INCH) == "(published)"


def test_logs_given_are_drawn_alone(run_set, tmp_path, capsys):
    fill(run_set)
    assert draw("--logs", run_set.root, "--out", tmp_path / "o") == 0
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"fig8.pdf", "fig8.png", "values.json", "index.html"}
    assert "fig9 waits for" in capsys.readouterr().err


def test_several_logs_are_named_after_their_directories(run_set, tmp_path):
    fill(run_set)
    other = tmp_path / "deeper" / run_set.root.name
    other.parent.mkdir()
    fill(type(run_set)(other))
    assert draw("--logs", run_set.root, other, "--out", tmp_path / "o") == 0
    assert {p.name for p in (tmp_path / "o").glob("*.pdf")} == {"fig8.cpu-smoke.pdf", "fig8.cpu-smoke-2.pdf"}


def test_an_output_directory_inside_the_logs_does_not_matter(run_set):
    fill(run_set)
    assert (
        draw("--logs", run_set.root, "--out", run_set.root) == draw("--logs", run_set.root, "--out", run_set.root) == 0
    )


def test_nothing_drawn_is_1(run_set, tmp_path, capsys):
    run_set.add("a", [run_set.bar("fastmoe")], status="failed", message="boom")
    assert draw("--logs", run_set.root, "--out", tmp_path / "o") == 1
    assert "nothing could be drawn" in capsys.readouterr().err and "boom" in (tmp_path / "o" / "index.html").read_text()
    (tmp_path / "empty").mkdir()
    assert draw("--logs", tmp_path / "empty", "--out", tmp_path / "p") == 1


def test_bad_usage_is_2(tmp_path, capsys):
    assert draw("--logs", tmp_path / "missing", "--out", tmp_path / "o") == 2
    (tmp_path / "file").write_text("")
    assert draw("--logs", tmp_path / "file", "--out", tmp_path / "o") == 2
    assert draw("--logs", tmp_path, "--out", tmp_path / "file") == 2
    assert str(tmp_path / "missing") in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        draw("--nonsense")
    assert error.value.code == 2


def test_shell_entry(repository, run_set, tmp_path):
    """RUNME-a.sh with this interpreter's environment, from another directory, with a relative path."""
    if not os.access(os.path.join(sys.prefix, "bin", "python"), os.X_OK) or sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment to run in")
    fill(run_set)
    script = str(repository / "RUNME-a.sh")
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    run = lambda *a: subprocess.run([script, *a], cwd=tmp_path, env=environment, capture_output=True, text=True)  # noqa: E731
    done = run("--logs", run_set.root.name, "--out", "drawn")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn" / "fig8.pdf").is_file()
    assert run("--logs", "nowhere").returncode == 2 and "--logs DIR" in run("--help").stdout


# -------------------------------------------------------------------------------------------------------- hostile names


def test_names_from_logs_are_text(run_set, tmp_path, capsys):
    name = HOSTILE.replace("/", "")
    run_set.root = tmp_path / name
    odd = run_set.bar(HOSTILE, HOSTILE, "fig8", HOSTILE)
    reference = run_set.bar("fastmoe", HOSTILE, "fig8", HOSTILE)
    run_set.add(name, [odd], ms=10, run_id=HOSTILE, system=HOSTILE, provenance={"device": HOSTILE})
    run_set.add("f", [reference], ms=10.5)
    run_set.add("g", [run_set.bar("x" + HOSTILE, HOSTILE, "fig8", HOSTILE)], status="failed", message=HOSTILE)
    for series in ("static", HOSTILE):
        run_set.add(f"t{len(series)}", [run_set.bar(series, HOSTILE, "fig13", HOSTILE)], ms=10)
        run_set.add(f"s{len(series)}", [run_set.bar(series, HOSTILE, "fig12", HOSTILE)], status="oom", message=HOSTILE)
    out = tmp_path / "o"
    assert draw("--logs", run_set.root, "--out", out) == 0
    text = (out / "index.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and "alert(1)" in page.text
    assert all(key != "onerror" for key, _ in page.attributes)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + text and "\u202e" not in captured.err + text
    assert not (tmp_path / "x").exists() and values(out)["datasets"][0]["figures"]["fig8"]["values"]


def test_mathtext_is_off(tmp_path):
    """An unknown command between dollars would raise if it were parsed."""
    name = "$\\undefined{$"
    bar = Bar("fig8", name, name, "fastmoe", 1.0, "ms", "ok", "measured", "f")
    style.save(bars.draw(BarFigure("fig8", {name: {name: {"fastmoe": bar}}}), name), tmp_path / "x")
    assert (tmp_path / "x.png").is_file()


def test_many_extremes_draw(run_set, tmp_path, monkeypatch):
    """Very large, very small and very many."""
    run_set.add("a", [run_set.bar("fastmoe")], ms=1e11)
    run_set.add("b", [run_set.bar("smartmoe")], ms=1e-3)
    monkeypatch.setattr(entry, "MAX_PANELS", 2)
    for i in range(5):
        run_set.add(f"p{i}", [run_set.bar("static", f"g{i}", "fig13")], ms=10)
    assert draw("--logs", run_set.root, "--out", tmp_path / "o") == 0
    assert "too-many-panels" in {w["code"] for w in values(tmp_path / "o")["warnings"]}
    assert len(values(tmp_path / "o")["datasets"][0]["figures"]["fig13"]["values"]) == 5


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("a b/../c", "a_b_.._c"),
        ("..", "run-set"),
        ("", "run-set"),
        ("-rf", "rf"),
        ("$(x)", "x"),
        ("h200-x4", "h200-x4"),
    ],
)
def test_file_stems(text, stem):
    assert file_stem(text) == stem


def test_clean_text():
    assert clean("a\nb\x00c\ud800") == "a?b?c?" and clean("x" * 300, 10) == "xxxxxxx..." and clean(None) == "None"


# ------------------------------------------------------------------------------------------------------------ structure


def test_series_have_labels_and_different_colours():
    colours = [
        style.colour(s) for s in ("fastmoe", "tutel", "deepspeed", "fastermoe", "alpa", "smartmoe_static", "smartmoe")
    ]
    assert len(set(colours)) == len(colours)
    assert style.label("unknown$") == "unknown$" and style.colour("unknown") == style.colour("unknown")


def test_marks_are_told_apart():
    quoted = Bar("fig8", "", "g", "deepspeed", None, "s", "incomplete", "quoted", "f", quoted="OOM")
    assert bars._mark(quoted) == "“OOM”* incomplete"
    assert bars._mark(Bar("fig8", "", "g", "x", None, "ms", "oom", "measured", "f")) == "OOM"
    assert bars._mark(Bar("fig8", "", "g", "x", 12.345, "ms", "ok", "measured", "f")) == "12.35 ms"


def test_plotting_imports_neither_the_library_nor_torch(repository):
    for path in (repository / "plotting").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"smartmoe", "torch", "fmoe", "pickle"}, path.name


def test_values_have_no_nan(run_set, tmp_path):
    """A panel whose points do not vary has no R2: null, not NaN."""
    path = run_set.add("a", [run_set.bar("accuracy", "4-2", "fig11")])
    run_set.lines(path / "predictions.jsonl", [{"predicted_ms": 1.0, "measured_ms": 1.0}] * 3)
    (panel,) = report.values_of(load.load_directory(run_set.root).figures["fig11"])
    assert panel["r2"] is None and panel["mape_pct"] == 0
    assert draw("--logs", run_set.root, "--out", tmp_path / "o") == 0


def test_panels_are_named_in_words():
    assert style.panel("CPU, 4 ranks 4/+inf") == "CPU, 4 ranks, no capacity"
    assert style.panel("CPU, 4 ranks 4/1.2, experts moved") == "CPU, 4 ranks, capacity 1.2, experts moved"
    assert style.panel("8-4", "micro-batch") == "8 GPUs, micro-batch 4"
    assert style.panel("inky 16/8", "micro-batch") == "inky, 16 GPUs, micro-batch 8"
    assert style.panel("pinky, 64 GPUs") == "pinky, 64 GPUs" and style.panel("1/2/3") == "1/2/3"


def test_a_legend_takes_as_few_lines_as_its_own_labels_need():
    paper = ["FastMoE", "Alpa's plan", "SmartMoE (plan only)"]
    for labels, num_rows in ((paper, 1), (["x" * 60] * 3, 3), (["x" * 40, "x" * 40, "y", "y"], 2)):
        figure = style.new_figure(style.COLUMN_INCH, 2)
        style.add_legend(figure, [style.series_patch(label) for label in labels], labels)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert len({round(text.get_window_extent().y0) for text in legend.get_texts()}) == num_rows, labels


def test_long_curves_are_drawn_as_running_medians():
    times = [1.0] * 500
    times[250] = 2.5
    curve = Curve("static", list(range(1, 501)), times, [], "measured", "f", 1.0)
    figure = fig13.draw(PanelFigure("fig13", [CurvePanel("2 GPUs 2/+inf", [curve])]), "source")
    axes = figure.axes[0]
    faint, line = axes.lines[:2]
    assert max(faint.get_ydata()) == 2.5 and max(line.get_ydata()) == 1 and len(line.get_ydata()) == 500
    assert "running median" in figure._supxlabel.get_text() and axes.get_title() == "2 GPUs, no capacity  (measured)"


def test_a_full_disk_is_said_in_a_line(run_set, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    fill(run_set)
    monkeypatch.setattr(style, "save", full)
    assert draw("--logs", run_set.root, "--out", tmp_path / "out") == 2
    assert "out: No space left on device; what is there is not whole" in capsys.readouterr().err
