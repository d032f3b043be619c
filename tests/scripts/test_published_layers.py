"""The simulated figures 11 to 13 and what is said of them; the published trace is beside the repository, not in it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import published_layers as layers  # noqa: E402

from plotting.files import Folder  # noqa: E402
from plotting.runset import to_dataset  # noqa: E402

TRACE = ROOT / ".." / "shared" / "published" / "trace" / "moe_trace_it0001_2491.npz"


@pytest.mark.skipif(not TRACE.exists(), reason="the published trace (../shared) is not here")
def test_what_the_readme_says_is_what_comes_out(tmp_path, capsys):
    assert layers.main(["--trace", str(TRACE), "--out", str(tmp_path)]) == 0
    said = (ROOT / "logs" / "simulated-20261122" / "README.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in said, line
    figures = to_dataset(Folder(tmp_path, []), "set").figures
    assert [len(figures[name].panels) for name in ("fig11", "fig12", "fig13")] == [3, 1, 1]
    assert [curve.series for curve in figures["fig13"].panels[0].curves if curve.source == "simulated"]


def test_another_trace_is_refused(tmp_path, capsys):
    assert layers.main(["--trace", str(tmp_path / "no.npz")]) == 2
    assert "--trace" in capsys.readouterr().err


def test_the_committed_runs_are_drawn_as_simulated():
    figures = to_dataset(Folder(ROOT / "logs" / "simulated-20261122", []), "set").figures
    assert all(panel.source == "simulated" for name in ("fig11", "fig12") for panel in figures[name].panels)
    assert {curve.source for curve in figures["fig13"].panels[0].curves} == {"simulated"}
    assert len(figures["fig11"].panels) == 3 and len(figures["fig12"].panels[0].rows) == 16
