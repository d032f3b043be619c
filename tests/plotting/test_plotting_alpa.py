"""The plot of Alpa's DeepSpeed benchmark: published bars, measured results, and files that are none."""

import json

import pytest

from plotting import alpa

PFLOPS = {  # as the artifact plots them
    "published deepspeed": (0.034, 0.066, 0.139, 0.320, 0.207, 0.122, None),
    "published alpa": (0.045, 0.086, 0.160, 0.366, 0.726, 1.243, 2.339),
}


def write_result(path, num_gpus=2, rate=100.0, backend="smartmoe", **changes):
    result = {
        "backend": backend, "case": {"num_gpus": num_gpus, "model": {"name": "690M"}}, "device": "some GPU",
        "options": {"zero": 2},
        "summary": {"tflops_per_gpu": {"artifact": rate, "alpa": rate / 2, "useful": rate / 4}}, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(result))


def test_published_bars_are_those_of_the_artifact():
    bars = {(bar.series, bar.num_gpus): bar.pflops for bar in alpa.read_published()}
    for series, values in PFLOPS.items():
        for num_gpus, value in zip(alpa.NUM_GPUS, values, strict=True):
            assert bars[series, num_gpus] == (None if value is None else pytest.approx(value, abs=5e-4))
    assert len(bars) == 14


def test_the_best_of_equal_runs_counts_in_the_chosen_way(tmp_path):
    for idx, rate in enumerate((100.0, 300.0, 200.0)):
        write_result(tmp_path / f"{idx}.json", rate=rate)
    for count, pflops in (("artifact", 0.6), ("alpa", 0.3), ("useful", 0.15)):
        bars, problems = alpa.read_results([tmp_path], count)
        assert [(bar.series, bar.num_gpus, bar.note) for bar in bars] == [("smartmoe", 2, "690M on some GPU, ZeRO-2")]
        assert bars[0].pflops == pytest.approx(pflops) and not problems


def test_bars_side_by_side_are_of_one_model(tmp_path):
    """The published one on so many GPUs where it was run."""
    for name, backend, num_gpus, rate in (
        ("690M", "smartmoe", 2, 100.0), ("1.3B", "smartmoe", 2, 300.0), ("1.3B", "deepspeed", 2, 50.0),
        ("10B", "smartmoe", 4, 1.0),
    ):  # fmt: skip
        model = {"case": {"num_gpus": num_gpus, "model": {"name": name}}}
        write_result(tmp_path / f"{name}-{backend}.json", rate=rate, backend=backend, **model)
    bars, problems = alpa.read_results([tmp_path], "artifact")
    assert {(bar.series, bar.num_gpus, bar.model) for bar in bars} == {("smartmoe", 2, "690M"), ("smartmoe", 4, "10B")}
    assert len(problems) == 2 and all("1.3B on 2 GPUs is not drawn beside 690M" in text for text in problems)


def test_captured_runs_have_bars_of_their_own(tmp_path):
    write_result(tmp_path / "calls.json", rate=100.0, captured=False)
    write_result(tmp_path / "graphs.json", rate=300.0, captured=True)
    bars, problems = alpa.read_results([tmp_path], "artifact")
    assert {bar.series: bar.pflops for bar in bars} == pytest.approx({"smartmoe": 0.2, "smartmoe captured": 0.6})
    assert not problems and alpa.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0


def test_what_is_no_result_is_named_and_left_out(tmp_path):
    write_result(tmp_path / "three.json", num_gpus=3)
    write_result(tmp_path / "other.json", backend="tutel")
    write_result(tmp_path / "negative.json", rate=-1.0)
    write_result(tmp_path / "nan.json", rate=float("nan"))
    write_result(tmp_path / "short.json", summary={})
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("not JSON")
    bars, problems = alpa.read_results([tmp_path], "artifact")
    assert bars == [] and len(problems) == 7
    assert all(any(f"{name}.json" in text for text in problems) for name in ("three", "other", "negative", "nan", "list"))


def test_it_draws_published_bars_alone_and_with_results(tmp_path, capsys):
    assert alpa.main(["--out", str(tmp_path / "empty")]) == 0
    write_result(tmp_path / "run.json")
    assert alpa.main([str(tmp_path / "run.json"), "--out", str(tmp_path / "full")]) == 0
    alone, full = ((tmp_path / name / "alpa.png").read_bytes() for name in ("empty", "full"))
    assert alone != full and (tmp_path / "full" / "alpa.pdf").stat().st_size > 1000
    assert alpa.main([str(tmp_path / "missing"), "--out", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_failed_and_unmeasured_bars_stay_empty():
    axes = alpa.draw(alpa.read_published(), "artifact").axes[0]
    assert len(axes.patches) == 13 and [text.get_text() for text in axes.texts].count("X") == 1
