"""Load of experts and ranks over time: loads.jsonl of a run, with the changes of placement from its events."""

from __future__ import annotations

import numpy as np

from plotting.files import number, whole
from plotting.model import LoadMap
from plotting.runs import Run, read_events

MAX_CELLS = 20_000_000


def read_loads(run: Run, series: str, figures: tuple[str, ...]) -> list[LoadMap]:
    """One map for each layer in loads.jsonl, by layer; none when the run has no such file.

    Lines that do not fit are left out with a finding.
    """
    path, folder = run.file("loads.jsonl"), run.folder
    if not path.exists():
        return []
    where = folder.name(path)
    rows: dict[int, dict[int, tuple[list, list]]] = {}
    num_cells = 0
    for line_number, row in folder.read_json_lines(path):
        layer, iteration = whole(row.get("layer")), whole(row.get("iteration"))
        loads = [_loads(row.get(key)) for key in ("expert_load", "rank_load")]
        first = next(iter(rows.get(layer, {}).values()), loads)
        num_cells += len(loads[0] or [])
        fits = None not in (layer, iteration, *loads) and [*map(len, first)] == [*map(len, loads)]
        if fits and num_cells <= MAX_CELLS:
            rows.setdefault(layer, {})[iteration] = tuple(loads)
        else:
            message = "a line without layer, iteration and loads as in the lines before; it is left out"
            folder.report("malformed", message, f"{where}:{line_number}", figures=figures)
    events = read_events(run)
    return [
        LoadMap(
            series, layer, sorted(found), *(np.array([found[i][part] for i in sorted(found)]) for part in (0, 1)),
            _changes(events, layer), run.source, where,
        )
        for layer, found in sorted(rows.items())
    ]  # fmt: skip


def _loads(values: object) -> list[float] | None:
    """A list of loads, not negative, or None."""
    if not isinstance(values, list) or not values:
        return None
    loads = [number(value) for value in values]
    return None if any(load is None or load < 0 for load in loads) else loads


def _changes(events: list[tuple[int, str, int | None]], layer: int) -> dict[str, list[int]]:
    """Iterations of each kind of change of a layer; an event that names no layer concerns all."""
    mine = [(iteration, kind) for iteration, kind, of_layer in events if of_layer in (None, layer)]
    return {kind: sorted({i for i, k in mine if k == kind}) for kind in sorted({k for _, k in mine})}
