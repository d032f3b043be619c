"""The comparison of losses: which modes must not differ in a bit, and that one which trains otherwise is found."""

import dataclasses
import json

import pytest
import torch

from smartmoe.bench import loss_parity
from smartmoe.bench.measure import World
from tests.dist import spawn

SHORT = ["--device", "cpu", "--iterations", "4", "--interval", "2"]


def forget_moments(trainer, iteration, args):
    """A move that leaves the moments where they were."""
    state_of = trainer.online._state_of
    trainer.online._state_of = lambda layer: state_of(layer)[::3]
    loss_parity.move_all(trainer, iteration, args)
    trainer.online._state_of = state_of


SPOILED = dataclasses.replace(loss_parity.MODES["moved"], before=forget_moments)


def run_small(world_rank):
    loss_parity.MODES["spoiled"] = SPOILED
    modes = ["again", "noise", "moved", "copied", "copied_early", "exact", "zero_moved", "spoiled"]
    args = loss_parity.parse_args([*SHORT, "--tolerance", "1e-6", "--dispatcher", "basic", "--modes", *modes])
    return loss_parity.run(args, World(torch.device("cpu")))


def test_two_ranks_keep_the_losses_and_a_spoiled_move_does_not():
    rows = {row["mode"]: row for row in spawn(run_small, 2)[0]}
    assert all(row["status"] == "ok" for row in rows.values())
    for mode in ("plain", "again", "moved", "zero_moved"):
        assert rows[mode]["worst"] == 0 and rows[mode]["equal_iterations"] == 4, mode
    for mode in ("noise", "copied", "exact"):
        assert rows[mode]["passed"], (mode, rows[mode]["worst"])
    assert rows["copied"]["replica_bytes"] > 0 and rows["exact"]["replica_bytes"] > 0
    assert rows["copied"]["loss"] == rows["copied_early"]["loss"]
    assert rows["moved"]["num_placements"] > 0 == rows["plain"]["num_placements"]
    spoiled = rows["spoiled"]
    assert not spoiled["passed"] and spoiled["equal_iterations"] == 3 and "BEYOND" in loss_parity.format_row(spoiled)


def test_alone_with_a_file_and_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loss_parity.MODES, "moved", SPOILED)
    out = tmp_path / "out.json"
    assert loss_parity.main([*SHORT, "--modes", "moved", "exact", "--tolerance", "1e-6", "--json", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped"] and "plan.ep = 1" in rows[2]["reason"]
    assert rows[0]["passed"] and not rows[1]["passed"] and "plain" in capsys.readouterr().out


def test_a_run_for_other_ranks_is_refused(tmp_path, capsys):
    path = tmp_path / "two.toml"
    path.write_text("[plan]\ndp = 2\nep = 2\n")
    assert loss_parity.main([*SHORT, str(path)]) == 2
    assert "its plan has 2 ranks, started are 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        loss_parity.main([*SHORT, str(tmp_path / "absent.toml")])


def test_without_a_reference_nothing_passes(tmp_path, monkeypatch):
    def train(*args):
        raise ValueError("not here")

    monkeypatch.setattr(loss_parity, "train", train)
    out = tmp_path / "out.json"
    assert loss_parity.main([*SHORT, "--modes", "again", "--json", str(out)]) == 1
    assert [(row["mode"], row["status"]) for row in json.loads(out.read_text())["rows"]] == [("plain", "skipped")]
