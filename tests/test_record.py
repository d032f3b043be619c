import json
import math

import pytest

from smartmoe import config, record

BAR = {"figure": "fig8", "panel": "cpu", "group": "4/1.2", "series": "fastmoe"}


def make(tmp_path, **kwargs):
    return record.create_run(tmp_path / "run", "run", config.to_dict(config.RunConfig()), [BAR], **kwargs)


def test_status_is_stamped_and_replaces_the_file_as_a_whole(tmp_path):
    assert make(tmp_path, provenance={"num_ranks": 4})["status"] == "pending"
    run = record.set_status(tmp_path / "run", "running")
    assert run["started"] and run["ended"] is None
    run = record.set_status(tmp_path / "run", "failed", "rank 1: no")
    assert run == record.read_run(tmp_path / "run")
    assert run["message"] == "rank 1: no" and run["ended"] and run["provenance"]["num_ranks"] == 4
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert config.from_dict(config.RunConfig, run["config"]) == config.RunConfig()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    make(tmp_path)
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(TypeError):
        record.write_json(tmp_path / "run" / "run.json", {"bad": object()})
    assert (tmp_path / "run" / "run.json").read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', "\x00\xff"])
def test_malformed_run_json_names_the_file(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json"):
        record.read_run(tmp_path)


def test_unknown_status_source_and_bar_are_errors(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="done"):
        record.set_status(tmp_path / "run", "done")
    with pytest.raises(ValueError, match="guessed"):
        make(tmp_path, source="guessed")
    with pytest.raises(ValueError, match="series"):
        record.create_run(tmp_path / "x", "x", {"system": "fastmoe"}, [{"figure": "fig8"}])


@pytest.mark.parametrize("text", ["../../etc", "a b;rm -rf $HOME", ".hidden", "", "x" * 300, "é/ü", "a\nb", "-rf"])
def test_run_ids_of_hostile_text_are_one_plain_path_component(tmp_path, text):
    name = record.safe_run_id(text)
    assert name and name == record.safe_run_id(name) and len(name) <= 100
    assert "/" not in name and name[0] not in ".-" and name.isascii() and not set(name) & set(" $;\n*?")
    assert record.safe_run_id(text + "!") != name


def test_run_id_keeps_plain_parts_readable():
    assert record.safe_run_id("fastmoe", "gshard1.2", 4) == "fastmoe-gshard1.2-4"


def test_create_run_refuses_an_unsafe_id(tmp_path):
    with pytest.raises(ValueError, match="safe_run_id"):
        record.create_run(tmp_path / "x", "../x", {"system": "fastmoe"}, [])


def test_lines_are_readable_while_the_run_goes_on_and_strict_json(tmp_path):
    writer = record.RunWriter(tmp_path)
    writer.metric({"iteration": 1, "lm_loss": math.nan})
    writer.span({"iteration": 1, "layer": 0})
    writer.log("hello")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"iteration": 1, "lm_loss": None}
    assert not (tmp_path / "events.jsonl").exists()
    writer.close()


def test_a_resumed_writer_keeps_lines_up_to_the_checkpoint(tmp_path):
    writer = record.RunWriter(tmp_path)
    for iteration in range(1, 6):
        writer.metric({"iteration": iteration})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lm_')  # cut by a kill
    resumed = record.RunWriter(tmp_path, keep_through=3)
    resumed.metric({"iteration": 4})
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]
    record.RunWriter(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


METRIC = {
    "iteration": 7, "step_ms": 12.345, "lm_loss": 6.5, "balance_loss": 0.25, "grad_norm": 1.5, "loss_scale": 1.0,
    "learning_rate": 1e-3, "skipped": False, "consumed_samples": 112,
}  # fmt: skip


def fields(line):
    assert line.startswith(" iteration ") and line.endswith("|")
    return dict(part.strip().rsplit(":", 1) for part in line.split("|")[1:-1])


def test_iteration_line_has_megatron_labels():
    line = record.iteration_line(METRIC, num_iterations=20, global_batch_size=16)
    assert line.startswith(" iteration        7/      20 | consumed samples:          112 |")
    found = fields(line)
    assert found["elapsed time per iteration (ms)"].strip() == "12.3"
    assert found["lm loss"].strip() == "6.500000E+00" and found["number of skipped iterations"].strip() == "0"


def test_iteration_line_of_a_skipped_step_has_no_loss():
    found = fields(record.iteration_line({**METRIC, "skipped": True}, num_iterations=20, global_batch_size=16))
    assert "lm loss" not in found and "grad norm" not in found and found["number of skipped iterations"].strip() == "1"
    found = fields(record.iteration_line({**METRIC, "lm_loss": math.nan}, num_iterations=20, global_batch_size=16))
    assert found["number of nan iterations"].strip() == "1"


def test_provenance_names_versions_and_takes_more_facts():
    facts = record.provenance(num_ranks=4, device="x")
    assert facts["device"] == "x" and facts["num_ranks"] == 4 and facts["num_cores"] >= 1
    assert facts["numpy"] != "absent" and facts["created"].endswith("Z")
