"""The published rows as small CSV tables (logs/published), and how to write them from the artifact's raw logs.

python -m plotting.tables RAW_LOGS OUT_DIR
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import types
import typing
from pathlib import Path

from plotting import published
from plotting.files import Folder, positive, whole
from plotting.model import LayerPanel, LayerRow, ScatterPanel
from plotting.published import BarRow, Published, ReplayRow

MANIFEST = "published.toml"
LAYERS_PER_POINT_ITERATION = 24  # figure 11's points run over 24 layers of iterations 101, 201, ...
LAYER_COLUMNS = ("static_forward", "static_backward", "dynamic_forward", "dynamic_backward")


def is_tables(root: Path) -> bool:
    return (root / MANIFEST).is_file()


# ----------------------------------------------------------------------------------------------------------------- read


def read_tables(folder: Folder) -> Published:
    """Read bars.csv and fig11.csv .. fig13.csv; a missing or malformed table is a finding, its figure has no data."""
    rows = Published()
    rows.bars = _collect(folder, "bars.csv", _bar_row)
    points = _collect(folder, "fig11.csv", _point)
    for name, naive, file in _collect(folder, "fig11_panels.csv", _panel):
        mine = [p for p in points if p[0] == name]
        if mine:
            rows.scatter.append(
                ScatterPanel(name, [p[2] for p in mine], [p[1] for p in mine], [naive], "published", [file])
            )
    layers = _collect(folder, "fig12.csv", _layer)
    if layers:
        files = sorted({f for _, a, b in layers for f in (a, b)})
        rows.layers = LayerPanel("", [row for row, _, _ in layers], "backward", "s", "published", files)
    samples = _collect(folder, "fig13.csv", _sample)
    for interval in dict.fromkeys(s[0] for s in samples):
        mine = [s for s in samples if s[0] == interval]
        changes = [s[1] for s in mine if s[4]]
        rows.replays.append(ReplayRow(interval, [s[2] for s in mine], [s[3] for s in mine], changes, mine[0][5]))
    return rows


def _collect(folder: Folder, name: str, convert) -> list:
    log = folder.read(folder.root / name)
    result = []
    reader = csv.DictReader(io.StringIO("\n".join(log.lines)) if log else io.StringIO())
    try:
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError("it has not the columns of the header")
                result.append(convert(row))
            except (ValueError, KeyError, TypeError) as error:
                folder.report(
                    "malformed",
                    f"a table row that is not understood ({error}); it is left out",
                    f"{name}:{reader.line_num}",
                )
    except csv.Error as error:
        folder.report("malformed", f"not a CSV table: {error}", f"{name}:{reader.line_num}")
    return result


def _bar_row(row: dict) -> BarRow:
    hints = typing.get_type_hints(BarRow)
    return BarRow(**{name: _value(hints[name], row[name], name) for name in hints})


def _value(hint, text: str, name: str):
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text == "" and type(None) in kinds:
        return None
    if bool in kinds:
        if text not in ("true", "false"):
            raise ValueError(f"{name} must be true or false")
        return text == "true"
    if int in kinds:
        return int(text)
    return _time(text, name) if float in kinds else text


def _time(text: str, name: str) -> float:
    value = positive(text)
    if value is None:
        raise ValueError(f"{name} must be a positive number")
    return value


def _point(row: dict) -> tuple:
    return row["panel"], _time(row["measured_ms"], "measured_ms"), _time(row["predicted_ms"], "predicted_ms")


def _panel(row: dict) -> tuple:
    return row["panel"], _time(row["naive_ms"], "naive_ms"), row["file"]


def _layer(row: dict) -> tuple:
    times = [_time(row[f"{column}_s"], column) for column in LAYER_COLUMNS]
    return LayerRow(int(row["layer"]), *times), row["static_file"], row["dynamic_file"]


def _sample(row: dict) -> tuple:
    times = [_time(row[k], k) for k in ("static_ms", "dynamic_ms")]
    changed = whole(float(row["changed"]))
    return int(row["interval"]), int(row["iteration"]), *times, changed, row["file"]


# ---------------------------------------------------------------------------------------------------------------- write


def write_tables(rows: Published, out: Path) -> None:
    """Write the tables of `rows` into directory `out` (made when absent)."""
    out.mkdir(parents=True, exist_ok=True)
    fields = [f.name for f in dataclasses.fields(BarRow)]
    _write(out / "bars.csv", fields, ([_exact(getattr(row, name)) for name in fields] for row in rows.bars))
    _write(
        out / "fig11.csv",
        ["panel", "iteration", "layer", "measured_ms", "predicted_ms"],
        (
            [p.name, 101 + 100 * (i // LAYERS_PER_POINT_ITERATION), i % LAYERS_PER_POINT_ITERATION, _text(m), _text(e)]
            for p in rows.scatter
            for i, (m, e) in enumerate(zip(p.measured_ms, p.predicted_ms, strict=True))
        ),
    )
    _write(
        out / "fig11_panels.csv",
        ["panel", "naive_ms", "file"],
        ([p.name, _text(p.naive_ms[0]), p.files[0]] for p in rows.scatter),
    )
    if rows.layers:
        static = next(f for f in rows.layers.files if "dynamicOFF" in f)
        dynamic = next(f for f in rows.layers.files if "dynamicON" in f)
        header = ["layer", *[f"{column}_s" for column in LAYER_COLUMNS], "static_file", "dynamic_file"]
        _write(
            out / "fig12.csv",
            header,
            ([r.layer, *[_text(getattr(r, c)) for c in LAYER_COLUMNS], static, dynamic] for r in rows.layers.rows),
        )
    samples = (
        [r.interval, 1 + 10 * i, _text(a), _text(b), int(1 + 10 * i in r.changes), r.file]
        for r in rows.replays
        for i, (a, b) in enumerate(zip(r.static_ms, r.dynamic_ms, strict=True))
    )
    _write(out / "fig13.csv", ["interval", "iteration", "static_ms", "dynamic_ms", "changed", "file"], samples)


def _exact(value: object) -> str:
    """Every digit: a total that is a tie at the sixth digit must round as it does from the raw log."""
    return repr(value) if isinstance(value, float) else _text(value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def _write(path: Path, header: list[str], rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not Path(argv[0]).is_dir():
        print("usage: python -m plotting.tables RAW_LOGS OUT_DIR", file=sys.stderr)
        return 2
    folder = Folder(Path(argv[0]), [])
    rows = published.read_raw(folder)
    for finding in folder.findings:
        print(f"warning: {finding.message}: {', '.join(finding.where)}", file=sys.stderr)
    if not rows:
        print(f"{argv[0]}: no log of the artifact was recognised", file=sys.stderr)
        return 1
    write_tables(rows, Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
