"""scripts/measure_node.py with tables of small commands in place of its own, and its own table read for errors."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import launch
import measure_node
import node_parts
import pytest
from processes import is_alive, wait_for

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TABLE = SCRIPTS / "measure_node.toml"


@pytest.fixture
def site(tmp_path):
    """Declares a table: site(name=(minutes, program, {keys})) -> the arguments of measure_node. A program is Python, run in
    the run-set's folder, where note(word) adds a word to `notes`."""

    def declare(**parts):
        (tmp_path / "set").mkdir(exist_ok=True)
        text = ""
        for name, (minutes, program, keys) in parts.items():
            script = tmp_path / f"{name}.py"
            script.write_text(
                "import os, sys, time\nfrom pathlib import Path\nos.chdir(sys.argv[1])\n"
                "def note(word):\n    with open('notes', 'a') as file: file.write(word + '\\n')\n" + program
            )
            lines = {"name": name.replace("_", "-"), "about": name, "minutes": minutes, "command": ["false"], **keys}
            lines.setdefault("cpu", ["{python} " + shlex.quote(str(script)) + " {set}"])
            text += "[[part]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        (tmp_path / "table.toml").write_text(text)
        return ["--cluster", "cpu", "--table", str(tmp_path / "table.toml"), "--out", str(tmp_path / "set")]

    return declare


def start(arguments):
    command = [sys.executable, str(SCRIPTS / "measure_node.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(arguments):
    child = start(arguments)
    text, _ = child.communicate(timeout=60)
    return child.returncode, text


def notes(tmp_path):
    return (tmp_path / "set" / "notes").read_text().split()


def test_a_failing_part_stops_no_other_and_is_tried_again(site, tmp_path):
    fails_once = "note('b'); sys.exit(0 if Path('mended').exists() else 7)"
    partly = (1, "note('d'); sys.exit(1)", {"some_may_fail": True})
    arguments = site(a=(1, "note('a')", {}), b=(1, fails_once, {}), c=(1, "note('c')", {}), d=partly)
    code, text = run(arguments)
    assert (code, notes(tmp_path)) == (1, ["a", "b", "c", "d"]), text
    assert "about 4 minutes to do" in text and "3 done, 1 failed" in text and "b: failed: exit code 7" in text
    assert "[1/4] a after " in text and (tmp_path / "set" / "b" / "console.log").exists()
    (tmp_path / "set" / "mended").touch()
    code, text = run(arguments)
    assert (code, notes(tmp_path)) == (0, ["a", "b", "c", "d", "b"]), text
    assert run(arguments)[0] == 0 and len(notes(tmp_path)) == 5
    summary = json.loads((tmp_path / "set" / "summary.json").read_text())
    assert {name: row["state"] for name, row in summary["parts"].items()} == dict.fromkeys("abcd", "done")
    assert summary["provenance"]["num_ranks"] == 4 and summary["parts"]["d"]["why"] == "exit code 1"


def test_after_kill_9_a_second_call_goes_on_with_the_part_in_the_middle(site, tmp_path):
    sleeps = "note('b'); Path('pid').write_text(str(os.getpid())); time.sleep(0 if Path('go').exists() else 60)"
    arguments = site(a=(1, "note('a')", {}), b=(1, sleeps, {}), c=(1, "note('c')", {}))
    child = start(arguments)
    wait_for(lambda: (tmp_path / "set" / "pid").exists() and (tmp_path / "set" / "pid").read_text())
    code, text = run(arguments)
    assert code == 2 and "another call is at work here" in text
    child.kill()
    child.communicate()
    part = int((tmp_path / "set" / "pid").read_text())
    wait_for(lambda: not is_alive(part))  # its command ends with it
    (tmp_path / "set" / "b" / "left").touch()
    (tmp_path / "set" / "go").touch()
    code, text = run(arguments)
    assert (code, notes(tmp_path)) == (0, ["a", "b", "b", "c"]), text
    assert not (tmp_path / "set" / "b" / "left").exists()  # a part that cannot go on begins anew


def test_time_over_cuts_what_can_go_on_and_leaves_the_rest(site, tmp_path):
    counts = "note('a')\nif len(Path('notes').read_text().split()) < 2: time.sleep(60)"
    arguments = site(a=(0.05, counts, {"resumable": True}), b=(5, "note('b')", {}), c=(0.01, "note('c')", {}))
    code, text = run([*arguments, "--minutes", "0.08"])
    assert (code, notes(tmp_path)) == (3, ["a"]), text
    assert "the next call goes on with it" in text and "1 cut, 2 to do" in text
    (tmp_path / "set" / "a" / "left").touch()
    code, text = run([*arguments, "--minutes", "0.2"])  # c is short enough, b is not
    assert (code, notes(tmp_path)) == (3, ["a", "a", "c"]), text
    assert (tmp_path / "set" / "a" / "left").exists()  # a part that goes on keeps its folder
    code, text = run(arguments)
    assert (code, notes(tmp_path)) == (0, ["a", "a", "c", "b"]), text


def test_a_request_to_stop_ends_the_command_and_is_no_failure(site, tmp_path):
    arguments = site(a=(1, "Path('pid').write_text(str(os.getpid())); time.sleep(60)", {}), b=(1, "note('b')", {}))
    child = start(arguments)
    wait_for(lambda: (tmp_path / "set" / "pid").exists() and (tmp_path / "set" / "pid").read_text())
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=30)
    assert child.returncode == 143 and "1 cut, 1 to do" in text and not (tmp_path / "set" / "notes").exists()
    assert not is_alive(int((tmp_path / "set" / "pid").read_text()))


def test_what_cannot_run_is_skipped_with_its_reason(site, tmp_path):
    arguments = site(
        module=(1, "note('x')", {"needs": ["module:no_such_module"]}),
        command=(1, "note('x')", {"needs": ["command:no-such-command"]}),
        trace=(1, "note('x')", {"needs": ["trace"]}),
        many=(1, "note('x')", {"min_gpus": 5}),
        gpus=(1, "", {"cpu": []}),
        first=(1, "sys.exit(1)", {}),
        second=(1, "note('x')", {"needs": ["part:first"]}),
        last=(1, "note('last')", {"needs": ["file:README.md", "module:json", "command:sh"]}),
    )
    code, text = run(arguments)
    assert (code, notes(tmp_path)) == (1, ["last"]), text
    for words in ("Python package no_such_module", "command no-such-command", "--trace FILE", "needs 5 GPUs", "needs GPUs",
                  "second: skipped: needs part first"):  # fmt: skip
        assert words in text
    (tmp_path / "trace.npz").touch()
    code, text = run([*arguments, "--trace", str(tmp_path / "trace.npz"), "--only", "trace", "--list"])
    assert code == 0 and "trace     1 min  to do" in text and "first" not in text


def test_on_gpus_a_part_sees_as_many_as_it_is_for(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_node, "count_gpus", lambda: 4)
    monkeypatch.setattr(measure_node, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(measure_node, "build_extension", lambda node: "the extension is there")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    note = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], '{gpus} {cluster}', file=open('{set}/notes', 'a'))"
    show = [f'{{python}} -c "{note}"']
    arguments = site(a=(1, "", {"command": show, "sizes": "each"}), b=(1, "", {"command": show, "sizes": "one"}))[2:]
    handler = signal.getsignal(signal.SIGTERM)
    assert measure_node.main(arguments) == 0 and signal.getsignal(signal.SIGTERM) is handler
    lines = (tmp_path / "set" / "notes").read_text().splitlines()
    assert lines == ["4,5,6,7 4 local", "4,5 2 local", "4 1 local"]
    assert "[3/3] b after " in (text := capsys.readouterr().out) and "4 GPUs" in text and "the extension is there" in text
    assert json.loads((tmp_path / "set" / "node.json").read_text()) == {"device": "NVIDIA H200", "gpus": 4}


def test_a_run_set_is_not_continued_on_another_kind_of_machine(site, tmp_path):
    arguments = site(a=(1, "note('a')", {}))
    (tmp_path / "set" / "node.json").write_text('{"device": "NVIDIA H200", "gpus": 4}')
    code, text = run(arguments)
    assert code == 2 and "was begun on {'device': 'NVIDIA H200', 'gpus': 4}" in text


@pytest.mark.parametrize(
    "part, words",
    [
        ({"minutes": 7.5}, "at most 7 unless resumable"),  # --minutes 8 would never start it
        ({"sizes": "some"}, 'sizes = "some"'),
        ({"name": "A part"}, 'name = "A part"'),
        ({"needs": ["modul:json"]}, 'needs = "modul:json"'),
        ({"command": ["{gpu}"]}, "unknown {word}"),
        ({"cpu": ["'open"]}, "open quote"),
        ({"comand": ["x"]}, "comand"),
    ],
)
def test_a_bad_table_is_refused(site, capsys, part, words):
    assert measure_node.main(site(a=(1, "", part))) == 2
    assert words in capsys.readouterr().err


def test_bad_arguments_are_refused(site, capsys):
    arguments = site(abc=(1, "", {}))
    assert measure_node.main([*arguments, "--only", "abd"]) == 2 and "did you mean abc?" in capsys.readouterr().err
    assert measure_node.main([*arguments, "--trace", "nowhere.npz"]) == 2 and "nowhere.npz" in capsys.readouterr().err
    assert measure_node.main([*arguments, "--list", "--only", "a"]) == 0
    with pytest.raises(SystemExit):
        measure_node.main([*arguments, "--minutes", "0"])


def own_parts(gpus, trace=None):
    node = node_parts.Node("local", gpus, Path("/set"), trace)
    return node_parts.expand(node_parts.read_parts(TABLE), node)


def test_each_size_has_its_parts():
    names = {gpus: [part.name for part in own_parts(gpus) if part.name.startswith("alpa-x")] for gpus in (1, 2, 4)}
    assert names == {1: ["alpa-x1"], 2: ["alpa-x2", "alpa-x1"], 4: ["alpa-x4", "alpa-x2"]}
    captured = [part for part in own_parts(2) if part.name.endswith("captured")]
    assert all("--capture both" in " ".join(part.commands()[0]) for part in captured) and len(captured) == 2
    sizes = {gpus: next(part for part in own_parts(gpus) if part.name == "fig8").commands()[0] for gpus in (1, 2, 4, 6)}
    assert {gpus: words[words.index("--gpus") + 1] for gpus, words in sizes.items()} == {
        1: "1", 2: "1 2", 4: "1 2 4", 6: "1 2 4"
    }  # fmt: skip
    assert [part.gpus for part in own_parts(4) if part.name == "record"] == [1]
    assert node_parts.chosen(own_parts(4), ["layer"])[-1].name == "layer"
    assert [part.name for part in node_parts.chosen(own_parts(4), ["fig1"])] == ["fig10", "fig12", "fig13", "fig11"]
    assert measure_node.short_name("NVIDIA H200") == "h200" and measure_node.short_name("Tesla V100-SXM2-32GB") == "v100"


def test_every_test_for_gpus_is_in_some_part():
    commands = [command for part in own_parts(4) for command in part.commands() if "pytest" in command]
    covered = [SCRIPTS.parent / word for command in commands for word in command if word.startswith("tests/")]
    marked = [path for path in sorted((SCRIPTS.parent / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    here = Path(__file__).resolve()
    left_out = [path for path in marked if path != here and not {path, *path.parents} & set(covered)]
    assert len(marked) > 15 and not left_out


def test_every_command_of_the_table_is_one_that_its_program_takes(monkeypatch):
    """What runs on GPUs alone is at least spelt right: modules exist, options are parsed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = set()
    for cluster in ("local", "cpu"):
        node = node_parts.Node(cluster, 4, Path("/set"), Path("/trace.npz"))
        parts = node_parts.expand(node_parts.read_parts(TABLE), node)
        for command in [command for part in parts for command in part.commands()]:
            words = command[1:] if command[0] == sys.executable else command
            if words[:2] == ["-m", "torch.distributed.run"]:
                words = words[words.index("4") + 1 :]
            if words[0] == "-m" and words[1].startswith("smartmoe.bench."):
                importlib.import_module(words[1]).parse_args([word.replace("=/trace.npz:", "=/t.npz:") for word in words[2:]])
            elif words[0] == "scripts/launch.py":
                args = launch.parse_arguments(words[1:])
                assert args.resume and args.cluster == cluster
            elif words[0] == "-m":
                assert importlib.util.find_spec(words[1])
                files = [word for word in words[2:] if word.startswith(("tests/", "moe_trace/"))]
                assert all((SCRIPTS.parent / file).exists() for file in files), files
            else:
                assert os.access(SCRIPTS.parent / words[0], os.X_OK)
            seen.add(words[1])
    assert {"smartmoe.bench.layer", "smartmoe.bench.replay", "pytest", "--cluster"} <= seen
