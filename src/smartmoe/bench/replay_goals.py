"""What a replay is to show: its rows against goals, each a share, a speed-up or a cost that the rows have measured.

A goal counts for the machine that it was set for (two H200, bfloat16); elsewhere the line only says what was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_LATE = 0.1
EXACT, HISTORY = ("exact", "both_exact"), ("history", "both")


@dataclass(frozen=True)
class Goal:
    """`value` of the rows of some modes in one kind of case ("trace", "iteration", "even", "uniform", "hot80") shall be at
    least or, where `at_most`, at most `goal`."""

    what: str
    case: str
    modes: tuple[str, ...]
    value: Callable[[dict], float | None]
    goal: float
    at_most: bool = False

    def is_met(self, found: float) -> bool:
        return found <= self.goal if self.at_most else found >= self.goal


def _median(key: str) -> Callable[[dict], float | None]:
    return lambda row: row[key]["median"] if key in row else None


def _cost(row: dict) -> float | None:
    """What having a mode switched on adds to the time of the static layer."""
    return 1 / row["speedup_over_static"]["median"] - 1 if "speedup_over_static" in row else None


GOALS = (
    *(
        Goal(what, case, modes, _median(key), goal)
        # the anchor's "force-balanced" is uniform random routing; even groups are faster still: whole tiles
        for what, key in (("of even groups", "share_of_even"), ("of uniform", "share_of_uniform"))
        for case, modes, goal in (("trace", EXACT, 0.97), ("trace", HISTORY, 0.95), ("hot80", EXACT + HISTORY, 0.93))
    ),
    Goal("times static", "iteration", EXACT + HISTORY, _median("speedup_over_static"), 1.30),
    Goal("times shadowing", "trace", EXACT + HISTORY, _median("speedup_over_shadowing"), 1.20),
    Goal("times shadowing", "iteration", EXACT + HISTORY, _median("speedup_over_shadowing"), 1.20),
    Goal("cost when balanced", "even", EXACT + HISTORY, _cost, 0.01, at_most=True),
    Goal("cost when balanced", "uniform", EXACT + HISTORY, _cost, 0.01, at_most=True),
)


def kind_of(row: dict) -> str:
    """Which kind of case a row of bench.replay_compare belongs to."""
    if row["case"] in ("even", "uniform", "hot80"):
        return row["case"]
    return "iteration" if row["case"].startswith("it ") else "trace"


def judge(rows: list[dict]) -> list[dict]:
    """One entry for every row and goal that belong together: shape, case, mode, what, found, goal, met."""
    return [
        {
            **{key: row[key] for key in ("shape", "case", "mode")},
            "what": goal.what,
            "found": round(found, 4),
            "goal": goal.goal,
            "met": goal.is_met(found),
        }
        for row in rows
        for goal in GOALS
        if row["status"] == "ok" and goal.case == kind_of(row) and row["mode"] in goal.modes
        if (found := goal.value(row)) is not None
    ]


def format_verdict(verdict: dict) -> str:
    """One line of the table of goals."""
    number = "{:.3f}" if verdict["what"].startswith("times") else "{:.1%}"
    found, goal = number.format(verdict["found"]), number.format(verdict["goal"])
    start = f"{verdict['shape']:14.14s} {verdict['case']:16.16s} {verdict['mode']:10.10s} {verdict['what']:20s}"
    return f"{start} {found:>8s}  goal {goal:>6s}  {'met' if verdict['met'] else 'missed'}"


def late_note(rows: list[dict]) -> str:
    """What to do where many steps began before the host had launched them, whose times are then partly the host's; ""."""
    late = sorted({row["mode"] for row in rows if row["status"] == "ok" and row["late"] > MAX_LATE})
    if not late:
        return ""
    return (
        f"in {', '.join(late)} the host was behind in more than {MAX_LATE:.0%} of the steps, so that its time is in them: "
        "raise --lead-cycles; where that does not help, the mode itself waits for the host"
    )
