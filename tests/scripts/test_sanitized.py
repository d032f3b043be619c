"""What scripts/sanitize.sh records; on a GPU, where it can be run, also that it was run on the kernels as they are."""

import json

import pytest
import torch

from tests import sanitized


def test_a_change_of_code_is_seen_and_one_of_words_is_not(tmp_path):
    kernels, dispatch = tmp_path / "src/csrc/kernels", tmp_path / "src/smartmoe/dispatch"
    for folder in (kernels, dispatch):
        folder.mkdir(parents=True)
    (kernels / "a.cu").write_text("// one\nint a = 1; /* two\nlines */\n")
    (dispatch / "b_kernels.py").write_text('def b():\n    """One."""\n    return 1  # two\n')
    (dispatch / "other.py").write_text("1")
    record = {"sources": sanitized.digests(tmp_path)}
    assert sorted(record["sources"]) == ["src/csrc/kernels/a.cu", "src/smartmoe/dispatch/b_kernels.py"]
    (kernels / "a.cu").write_text("int  a = 1; // another\n")
    (dispatch / "b_kernels.py").write_text("def b():\n    return 1\n")
    (dispatch / "other.py").write_text("2")
    assert sanitized.changed(record, tmp_path) == []
    (kernels / "a.cu").write_text("int a = 2;")
    (dispatch / "b_kernels.py").write_text("def b():\n    return 2\n")
    (kernels / "new.cuh").write_text("")
    assert sanitized.changed(record, tmp_path) == [
        "src/csrc/kernels/a.cu", "src/csrc/kernels/new.cuh", "src/smartmoe/dispatch/b_kernels.py"
    ]  # fmt: skip
    (kernels / "a.cu").unlink()
    assert "src/csrc/kernels/a.cu" in sanitized.changed(record, tmp_path)


def test_only_all_tools_make_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitized, "RECORD", sanitized.ROOT / "tests" / "none.json")
    sanitized.main(["memcheck"])
    assert not sanitized.RECORD.exists() and "racecheck did not run" in capsys.readouterr().out
    monkeypatch.setattr(sanitized, "ROOT", tmp_path)
    monkeypatch.setattr(sanitized, "RECORD", tmp_path / "record.json")
    sanitized.main(["racecheck", "memcheck"])
    assert json.loads(sanitized.RECORD.read_text())["tools"] == ["memcheck", "racecheck"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, as scripts/sanitize.sh does")
def test_the_kernels_are_as_compute_sanitizer_found_them_clean():
    """It fails where one can mend it: on a GPU. Elsewhere a kernel may change without; the next run on a GPU says so."""
    changed = sanitized.changed(json.loads(sanitized.RECORD.read_text()))
    assert not changed, (
        f"{', '.join(changed)}: not as compute-sanitizer last found them clean: run scripts/sanitize.sh on a GPU and commit "
        "tests/sanitized.json"
    )
