"""What `smartmoe report` says of runs: the numbers by hand, the words for each way to end, and what it does with bad input."""

import dataclasses
import fcntl
import json
import shlex
from pathlib import Path

import pytest

from plotting import runset
from plotting.files import Folder
from plotting.runs import read_runs
from smartmoe import cli, record, report, run_numbers
from smartmoe.config import GateConfig, ModelConfig, OnlineConfig, ParallelPlan, RunConfig, Workload, to_dict
from smartmoe.models import flops_per_sample

LOGS = Path(__file__).resolve().parents[1] / "logs"
CONFIG = RunConfig(
    model=ModelConfig(seq_len=32),
    plan=ParallelPlan(dp=2, ep=2),
    workload=Workload(global_batch_size=8, iterations=6, warmup_iterations=2),
    online=OnlineConfig(policy="auto", replicate="history", replica_slots=1),
)
TIMES = [900.0, 800.0, 10.0, 20.0, 30.0, 40.0]


def make(folder, config=CONFIG, *, status="ok", message="", times=TIMES, events=(), checkpoints=(), change=(), **facts):
    """A run directory as the trainer leaves it; `change`: keys of every metrics line that are others."""
    facts = {"entry": "train", "num_ranks": 2, "device": "a CPU", **facts}
    record.create_run(folder, "run", to_dict(config), [], provenance=facts)
    writer = record.RunWriter(folder)
    for at, step_ms in enumerate(times, 1):
        line = {"iteration": at, "step_ms": step_ms, "lm_loss": 8.0 - at, "load_max_over_mean": 2 - at / 10, "skipped": False}
        writer.metric({**line, "peak_memory_bytes": 10**9 * (4 - abs(at - 3)), **dict(change)})
    for event in events:
        writer.event({"num_moved": 0, "num_copies": 0, "cost_ms": 0.0, "reason": "so", **event})
    writer.close()
    for at in checkpoints:
        Path(folder, f"checkpoints/iter_{at:07d}").mkdir(parents=True)
        Path(folder, f"checkpoints/iter_{at:07d}/meta.json").write_text("{}")
    if status != "pending":
        record.set_status(folder, status, message)
    return folder


def page(folder) -> str:
    return report.text([run_numbers.read(folder)])


def with_(config=CONFIG, **tables) -> RunConfig:
    return dataclasses.replace(config, **{
        key: dataclasses.replace(getattr(config, key), **values) for key, values in tables.items()
    })  # fmt: skip


def test_the_numbers_are_those_of_the_lines_after_warm_up(tmp_path):
    events = [
        {"iteration": 2, "layer": 0, "kind": "keep", "num_copies": 1},
        {"iteration": 2, "layer": 1, "kind": "both", "num_moved": 3, "num_copies": 2, "cost_ms": 1.5},
        {"iteration": 4, "layer": 0, "kind": "rollback", "num_moved": 1, "cost_ms": 0.25, "reason": "it was slower"},
        {"iteration": 4, "layer": 1, "kind": "keep", "num_copies": 2, "reason": "nothing better"},
    ]
    run = run_numbers.read(make(tmp_path / "run", events=events, checkpoints=[2, 4]) / "run.json")
    assert run["step_ms"] == {"median": 25.0, "p10": 13.0, "p90": 37.0} and (run["counted"], run["warmup"]) == (4, 2)
    assert run["tokens_per_s"] == 8 * 32 / 0.025
    assert run["tflops_per_rank"] == pytest.approx(flops_per_sample(CONFIG.model) * 8 / 2 / 0.025 / 1e12, rel=1e-3)
    assert (run["loss_first"], run["loss_last"], run["ends"]) == (7.0, pytest.approx(3.0), 3)
    assert (run["load_first"], run["load_last"]) == (1.8, 1.5) and run["peak_memory_bytes"] == 4 * 10**9
    assert (run["iterations"], run["planned"], run["last_checkpoint"], run["go_on"]) == (6, 6, 4, "")
    online = run["online"]
    assert online["kinds"] == {"keep": 2, "both": 1, "rollback": 1} and (online["decisions"], online["layers"]) == (4, 2)
    assert (online["experts_moved"], online["move_ms"], online["copies"]) == (4, 1.75, 2)
    text = report.text([run])
    for words in (
        "smartmoe, pp1 dp2 tp1 ep2 expert-dp1, 2 ranks on a CPU, float32",
        "custom: 4 layers of width 64, 8 experts, top-2, no capacity; 8 samples of 32 tokens an iteration",
        "ok, 6 of 6 iterations, newest checkpoint 4\n",
        "25.0 (13.0 - 37.0) ms, median (p10 - p90) of 4 iterations after 2 of warm-up",
        "10,240 tokens/s, ",
        "7.0000 -> 3.0000 (first iteration -> mean of the last 3)",
        "1.80 -> 1.50 fullest rank over the mean (median",
        "4.0 GB at most",
        'auto, copies "history" in 1 slot a rank: 4 decisions about 2 layers: 2 keep, 1 both, 1 rollback',
        "4 experts moved, which took 1.8 ms; 2 copies in force",
        "last: keep (iteration 4, layer 1): nothing better",
        "last change: rollback (iteration 4, layer 0): it was slower",
    ):
        assert words in text, words
    assert "note" not in text and "skipped" not in text
    for ended, words in (("10:00", ", newest"), ("10:01", " in 60 s"), ("10:30", " in 30 min"), ("13:00", " in 3.0 h")):
        span = {"started": "2026-11-22T10:00:00Z", "ended": f"2026-11-22T{ended}:00Z"}
        assert f"6 of 6 iterations{words}" in report.text([{**run, **span}])
    assert "smartmoe (simulated), " in report.text([{**run, "source": "simulated"}])
    lines = Path(run["path"], "metrics.jsonl").read_text().splitlines()
    Path(run["path"], "metrics.jsonl").write_text("\n".join(reversed(lines)))
    assert {**run_numbers.read(run["path"]), "silent_s": 0} == {**run, "silent_s": 0}
    kept = page(make(tmp_path / "kept", with_(online={"replicate": "exact"}), events=events[:1]))
    assert "last: keep" in kept and "last change" not in kept and "no expert moved\n" in kept
    assert "last change" not in page(make(tmp_path / "changed", events=events[:3]))


@pytest.mark.parametrize("under", ["cpu-20261122/fig8", "hosts-20261122", "simulated-20261122/fig10"])
def test_step_times_are_those_of_the_figures(under):
    runs = read_runs(Folder(LOGS / under, []))
    assert len(runs) >= 3
    for run in runs:
        bar = runset._run_bar(run.slots[0], run, {})
        step = run_numbers.read(run.path)["step_ms"]
        assert (step["p10"], step["median"], step["p90"]) == pytest.approx((bar.low, bar.value, bar.high), abs=1e-4)


def test_every_run_of_the_repository_has_a_page_and_the_rate_that_it_wrote():
    runs = [run_numbers.read(path) for path in sorted(LOGS.rglob("run.json"))]
    assert len(runs) > 200 and not [run for run in runs if run["notes"] or run["model"] is None]
    assert all(report.text([run]).count("\n") >= 3 for run in runs) and report.text(runs).count("\n") > len(runs)
    rated = 0
    for run in runs:
        text = Path(run["path"], "metrics.jsonl").read_text() if run["counted"] else "{}"
        last = json.loads(text.splitlines()[-1])
        if "tflops_per_rank" in last:
            rated, ms = rated + 1, run["step_ms"]["median"]
            assert run["tflops_per_rank"] * ms == pytest.approx(last["tflops_per_rank"] * last["step_ms"], rel=2e-3)
            assert run["tokens_per_s"] * ms == pytest.approx(last["tokens_per_s"] * last["step_ms"], rel=2e-3)
    assert rated > 50
    uncounted = [run for run in runs if run["system"] == "megatron"]
    assert uncounted and all(run["load_first"] is None for run in uncounted if "ep2" in run["plan"])


# ----------------------------------------------------------------------------------------------------- how a run ended


def test_a_stopped_run_says_what_goes_on_with_it(tmp_path):
    command = ["smartmoe", "train", "my run.toml", "--ranks", "2"]
    stopped = make(tmp_path / "a", status="failed", message="interrupted", times=TIMES[:4], checkpoints=[2], command=command)
    again = shlex.join([*command, "--out", str(stopped), "--resume"])
    lines = [line.strip() for line in page(stopped).splitlines()]
    assert lines[3:6] == [
        "status  failed, 4 of 6 iterations, newest checkpoint 2",
        "interrupted",
        f"from checkpoint iter_0000002 it goes on with: {again}",
    ]
    older = page(make(tmp_path / "b", status="oom", checkpoints=[2]))
    assert f"smartmoe train CONFIG.toml --ranks 2 --out {tmp_path}/b --resume" in older
    assert "no checkpoint (workload.checkpoint_interval)" in page(make(tmp_path / "c", status="timeout", command=command))
    host = make(tmp_path / "d", status="failed", entry="deepspeed", command=command)
    assert "writes no checkpoints: start it with another --out" in page(host)
    assert "--resume" not in page(make(tmp_path / "e", status="skipped", message="no GPU")) + page(make(tmp_path / "f"))
    assert "checkpoint" not in page(make(tmp_path / "g", status="failed", entry="replay"))  # its own program goes on with it
    launched = make(tmp_path / "set/logs/x", status="failed", checkpoints=[2])
    (tmp_path / "set/asked.json").write_text("{}")
    assert f"its run-set goes on with: ./RUNME-b.sh --resume {tmp_path}/set" in page(launched)


def test_a_run_at_work_says_where_it_is_and_a_killed_one_that_it_is_none(tmp_path):
    folder = make(tmp_path, status="running", times=[9e5] * 3, checkpoints=[2])
    assert run_numbers.read(folder)["at_work"] is None and "running, 3 of 6" in page(folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = page(folder)
        assert "running, 3 of 6 iterations, newest checkpoint 2, the last 0 s ago, 45 min left at this pace\n" in text
    text = page(folder)
    assert "killed?, 3 of 6" in text and "if it ran here, it was killed\n" in text
    assert "from checkpoint iter_0000002 it goes on" in text
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the report holds nothing


def test_a_run_without_iterations_is_reported_as_far_as_it_goes(tmp_path):
    text = page(make(tmp_path / "new", status="pending", times=()))
    assert "pending, 0 of 6 iterations" in text and "step" not in text and "loss" not in text and "(train)" not in text
    assert "no decision yet" in text
    warming = page(make(tmp_path / "warming", status="running", times=TIMES[:2]))
    assert "nothing yet: the first 2 iterations are warm-up" in warming and "tokens/s" not in warming
    (tmp_path / "new/metrics.jsonl").write_text("")
    assert "0 of 6" in page(tmp_path / "new")
    same = "the same in all: system smartmoe, plan pp1 dp2 tp1 ep2 expert-dp1, ranks 2, status pending, iterations 0 of 6\n"
    assert same in report.text([run_numbers.read(tmp_path / "new")] * 2)


def test_bad_lines_are_left_out_and_said(tmp_path):
    folder = make(tmp_path, events=[{"iteration": 2, "layer": 0, "kind": "keep"}])
    whole = run_numbers.read(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"iteration": true}\n{"iteration": 6, "step_ms": -1}\n{"iteration": 7, "step_ms": 41.')
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b"\xff\x00")
    run = run_numbers.read(folder)
    assert [note[:50] for note in run["notes"]] == [
        "metrics.jsonl: 3 of 10 lines cannot be read, left ",
        "metrics.jsonl: 1 of 7 repeat an iteration or have ",
        "events.jsonl: 1 of 2 lines cannot be read, left ou",
    ]
    assert {**run, "notes": [], "silent_s": 0} == {**whole, "silent_s": 0} and "note" in report.text([run])


def test_losses_that_are_no_numbers_and_skipped_updates_are_said(tmp_path):
    text = page(make(tmp_path / "a", change={"lm_loss": None}))
    assert "no number -> no number" in text and "6 losses are no finite numbers, the first is that of iteration 1" in text
    table = report.text([run_numbers.read(tmp_path / "a"), run_numbers.read(make(tmp_path / "c"))])
    assert "no number -> no number" in table and "\na: 6 losses are no finite numbers" in table
    text = (tmp_path / "c/metrics.jsonl").read_text()
    for loss in ("NaN", "-Infinity", "1e999", "1" + "0" * 400, '"low"'):
        (tmp_path / "c/metrics.jsonl").write_text(text.replace("7.0", loss).replace("5.0", loss))
        assert "no number -> 3.0000" in page(tmp_path / "c") and "2 losses are no finite" in page(tmp_path / "c"), loss
    folder = make(tmp_path / "b", change={"skipped": True, "lm_loss": None})
    assert "skipped 6 updates" in page(folder) and "no finite" not in page(folder) and "10,240 tokens/s" in page(folder)


def test_what_a_host_does_not_say_is_left_out(tmp_path):
    folder = make(tmp_path, change={"load_max_over_mean": 1.0, "peak_memory_bytes": "much"}, entry=None, device=None)
    run = record.read_run(folder)
    text = page(folder)
    assert "load" not in text and "memory" not in text and "on a device not said" in text
    del run["provenance"], run["config"]["plan"], run["config"]["online"]
    run["config"]["model"]["colour"] = "red"
    record.write_json(folder / "run.json", run)
    numbers = run_numbers.read(folder)
    assert numbers["step_ms"]["median"] == 25.0 and numbers["tokens_per_s"] is None and numbers["load_last"] == 1.0
    text = report.text([numbers])
    assert "plan not said, ? ranks on a device" in text and 'config.model: unknown key "colour"' in text
    record.write_json(folder / "run.json", {**run, "config": None})
    assert run_numbers.read(folder)["step_ms"]["median"] == 35.0 and "0 of warm-up" in page(folder)


def test_what_is_no_training_is_named_and_has_no_rate(tmp_path):
    folder = make(tmp_path / "a", entry="replay")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"iteration": line["iteration"] * 100, "step_ms": line["step_ms"]}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    run = run_numbers.read(folder)
    assert (run["tokens_per_s"], run["trains"]) == (None, False)
    assert "smartmoe (replay), " in report.text([run]) and "ok, 600 iterations" in report.text([run])
    assert "not recorded" not in page(folder)
    exact = with_(online={"replicate": "exact"})
    assert "fullest rank over the mean, before exact copies" in page(make(tmp_path / "b", exact))
    assert "static: experts keep their owners" in page(make(tmp_path / "c", RunConfig()))


# -------------------------------------------------------------------------------------------------------- several runs


def test_several_runs_are_a_table_with_the_fastest_marked(tmp_path):
    paths = [
        make(tmp_path / "x/slow"),
        make(tmp_path / "x/fast", dataclasses.replace(CONFIG, system="fastmoe"), times=[ms / 2 for ms in TIMES]),
        make(tmp_path / "new", status="failed", message="rank 1: no", times=()),
    ]
    lines = report.text([run_numbers.read(path) for path in paths]).splitlines()
    assert lines[0] == f"runs in {tmp_path}" and [line.split()[0] for line in lines[2:5]] == ["x/slow", "*", "new"]
    assert lines[3].split()[1:] == [
        "x/fast", "fastmoe", "ok", "6", "of", "6", "12.5", "(6.50", "-", "18.5)", "20,480",
        f"{run_numbers.read(paths[1])['tflops_per_rank']:.3g}", "1.80", "->", "1.50", "7.000", "->", "3.000", "4.0",
    ]  # fmt: skip
    assert lines[5] == "the same in all: plan pp1 dp2 tp1 ep2 expert-dp1, ranks 2"
    assert lines[6].startswith("* the fastest") and "a CPU" in lines[6]
    assert lines[7].startswith("new: failed, 0 of 6 iterations; rank 1: no; ")


@pytest.mark.parametrize(
    ("other", "facts", "what"),
    [
        (with_(model={"num_layers": 5}), {}, "model"),
        (with_(workload={"micro_batch_size": 1}), {}, "batch"),
        (with_(workload={"dtype": "bfloat16"}), {}, "dtype"),
        (dataclasses.replace(CONFIG, gate=GateConfig(capacity=1.2)), {}, "capacity"),
        (CONFIG, {"device": "a GPU"}, "device"),
        (CONFIG, {"num_ranks": 4}, "number of ranks"),
    ],
)
def test_runs_that_did_other_work_are_not_compared(tmp_path, other, facts, what):
    runs = [run_numbers.read(path) for path in (make(tmp_path / "a"), make(tmp_path / "b", other, times=TIMES[::-1], **facts))]
    text = report.text(runs)
    assert f"cannot be compared, so none is marked: they differ in {what}.\n" in text + "\n" and "*" not in text
    for key, value in (("source", "simulated"), ("trains", False)):
        assert "they differ in" in report.text([runs[0], {**runs[0], key: value}])
    assert "they differ" not in report.text([runs[0], runs[0]])


def test_runs_that_do_not_say_what_they_did_are_not_compared(tmp_path):
    runs = [run_numbers.read(make(tmp_path / name, device=None)) for name in "ab"]
    assert "none is marked: none says its device.\n" in report.text(runs) + "\n" and "*" not in report.text(runs)
    runs = [{**run, "device": "a CPU", "batch": [8, None], "model": None} for run in runs]
    assert "none is marked: none says its model, batch." in report.text(runs)
    assert "none is marked" not in report.text(runs[:1] + [{**runs[0], "counted": 0}])


def test_settings_of_another_program_that_are_no_numbers_are_not_known(tmp_path):
    folder = make(tmp_path, times=TIMES[:4], status="failed")
    run = record.read_run(folder)
    whole = run_numbers.read(folder)
    for key, name in (("iterations", "planned"), ("warmup_iterations", "warmup"), ("global_batch_size", "tokens_per_s")):
        work = {**run["config"]["workload"], key: "6"}
        record.write_json(folder / "run.json", {**run, "config": {**run["config"], "workload": work}})
        numbers = run_numbers.read(folder)
        assert not numbers[name] and whole[name] and "failed, 4" in report.text([numbers]), key


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_writes_json_and_names_what_it_cannot_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("runs/a"), make("runs/b", status="failed", change={"lm_loss": None})
    assert cli.main(["report", "runs/a", "runs/b", "--json", "out.json"]) == 0
    shown, written = capsys.readouterr(), json.loads(Path("out.json").read_text())
    assert "runs in" in shown.out and not shown.err
    again = [{**run_numbers.read(f"runs/{name}"), "silent_s": 0} for name in "ab"]
    assert written["schema"] == 1 and [{**run, "silent_s": 0} for run in written["runs"]] == again
    for path, words in (
        ("absent", "absent: no such folder; smartmoe train --out DIR makes one"),
        ("runs", "runs: no run, it has no run.json; 2 are below it, for instance runs/a"),
        (".", ".: no run, it has no run.json; 4 are below it, for instance cut"),
        ("empty", "empty: no run, it has no run.json; smartmoe train"),
        ("cut", "cut/run.json: cannot read this file"),
        ("other", "other/run.json: not a run of schema 1"),
    ):
        for folder, text in (("empty", None), ("cut", '{"schema'), ("other", '{"schema": 7}')):
            Path(folder).mkdir(exist_ok=True)
            if text:
                Path(folder, "run.json").write_text(text)
        assert cli.main(["report", path, "--json", "none.json"]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"smartmoe: {words}") and said.err.count("\n") == 1 and not said.out
        assert cli.main(["report", path, "runs/a"]) == 2 and "6 of 6 iterations" in capsys.readouterr().out
    assert not Path("none.json").exists()
    assert cli.main(["report", "runs/a", "--json", "absent/out.json"]) == 2
    said = capsys.readouterr()
    assert "absent/out.json: cannot write this file" in said.err and not said.out
