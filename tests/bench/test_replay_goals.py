"""Which rows are held to which goals, and on which side of them they are."""

import pytest

from smartmoe.bench.replay_goals import format_verdict, judge, late_note


def row(mode, case="L6", status="ok", **medians):
    keys = {"even": "share_of_even", "uniform": "share_of_uniform"}
    keys |= {name: f"speedup_over_{name}" for name in ("static", "shadowing")}
    numbers = {keys[name]: {"median": value} for name, value in medians.items()}
    return {"shape": "S2", "case": case, "mode": mode, "status": status, **numbers}


def met(*rows):
    return {(v["case"], v["mode"], v["what"]): (v["found"], v["met"]) for v in judge(list(rows))}


def test_a_trace_is_held_to_its_shares_of_balanced_and_to_shadowing():
    found = met(
        row("exact", even=0.969, uniform=0.97, static=1.2, shadowing=1.25),
        row("history", even=0.95, static=1.2, shadowing=1.19),
        row("static", even=0.7, static=1.0, shadowing=1.0),
    )
    assert found == {
        ("L6", "exact", "of even groups"): (0.969, False),
        ("L6", "exact", "of uniform"): (0.97, True),
        ("L6", "exact", "times shadowing"): (1.25, True),
        ("L6", "history", "of even groups"): (0.95, True),
        ("L6", "history", "times shadowing"): (1.19, False),
    }


def test_one_iteration_is_held_to_what_it_gains_over_static():
    found = met(row("both", case="it 991 L6", even=0.5, static=1.31), row("exact", case="it 991 L6", static=1.29))
    assert found == {
        ("it 991 L6", "both", "times static"): (1.31, True),
        ("it 991 L6", "exact", "times static"): (1.29, False),
    }


def test_balanced_routing_is_held_to_what_a_mode_costs_and_a_hot_expert_to_its_share():
    found = met(
        row("history", case="even", even=0.9, static=1 / 1.009),
        row("exact", case="uniform", static=1 / 1.02),
        row("both", case="hot80", even=0.94, static=2.0),
        row("both_exact", case="hot80", uniform=0.9),
    )
    assert found["even", "history", "cost when balanced"] == (pytest.approx(0.009), True)
    assert found["uniform", "exact", "cost when balanced"] == (pytest.approx(0.02), False)
    assert found["hot80", "both", "of even groups"] == (0.94, True)
    assert found["hot80", "both_exact", "of uniform"] == (0.9, False) and len(found) == 4


def test_what_was_not_measured_has_no_verdict():
    assert judge([row("exact", status="failed", even=1.0), row("exact"), row("exact", case="uniform")]) == []


def test_a_verdict_is_a_line():
    share, times = judge([row("exact", even=0.9699, shadowing=1.2)])
    assert format_verdict(share).split() == "S2 L6 exact of even groups 97.0% goal 97.0% missed".split()
    assert format_verdict(times).split() == "S2 L6 exact times shadowing 1.200 goal 1.200 met".split()


def test_a_host_that_is_behind_is_said():
    def late(mode, share, status="ok"):
        return {"mode": mode, "status": status, **({"late": share} if status == "ok" else {})}

    assert late_note([late("exact", 0.1), late("both", 0.0), late("static", 0, "failed")]) == ""
    note = late_note([late("exact", 1.0), late("even", 0.2), late("exact", 0.5), late("both", 0.05)])
    assert note.startswith("in even, exact the host was behind") and "--lead-cycles" in note
