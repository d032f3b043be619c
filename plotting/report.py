"""What stands beside the figures: values.json with every plotted number, and a self-contained index.html.

Text from logs is escaped; the page runs no script and loads nothing.
"""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path

from plotting.files import clean
from plotting.model import (
    EXTRAS,
    TITLES,
    BarFigure,
    Curve,
    Dataset,
    Finding,
    LayerPanel,
    LoadMap,
    LossCurve,
    LossPanel,
    PanelFigure,
    ScatterPanel,
)

SOURCES = {
    "measured": "a run of this project on the device named; medians over the steps after warm-up, with p10 and p90",
    "simulated": "computed by the planner's simulator; hatched or dashed in the figures",
    "published": "the paper's own logs (ATC'23 artifact); single runs, first iteration included",
    "quoted": "a label of the paper that its log does not show",
}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1240px;
padding:1rem 1.2rem 4rem;color:#1c1c1c;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.6rem;border-bottom:1px solid #ccc}
h3{font-size:1.02rem;margin:1.9rem 0 .4rem}
img{max-width:100%;height:auto;display:block;margin:.4rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:12.5px;margin:.4rem 0}
th,td{border-bottom:1px solid #ddd;padding:.16rem .5rem;text-align:left;vertical-align:top;white-space:nowrap}
th{background:#f2f2f2}td.n{text-align:right;font-variant-numeric:tabular-nums}
td.long{white-space:normal;min-width:17rem;overflow-wrap:anywhere}td.file{font-size:11px;color:#555}.bad{color:#8b0000;font-weight:600}
.waits{background:#f7f3e8;padding:.4rem .7rem;border-left:3px solid #c9a227}
code{font-size:12px;background:#f2f2f2;padding:0 .2rem}
ul.w{padding-left:1.1rem}ul.w li{margin:.3rem 0}ul.w .f{font-size:11px;color:#555;overflow-wrap:anywhere}
summary{cursor:pointer}
"""
MAX_FILES_SHOWN = 4


# --------------------------------------------------------------------------------------------------------------- values


def values_of(figure: BarFigure | PanelFigure) -> list[dict]:
    """Every plotted number of a figure with its place, status, source kind and source file."""
    if isinstance(figure, BarFigure):
        return [_bar_value(bar) for bar in figure.bars()]
    rows: list[dict] = []
    for panel in figure.panels:
        if isinstance(panel, ScatterPanel):
            rows.append(_scatter_value(panel))
        elif isinstance(panel, LayerPanel):
            rows += _layer_values(panel) + [_map_value(panel.name, load_map) for load_map in panel.maps]
        elif isinstance(panel, LossPanel):
            rows += [_loss_value(panel.name, curve, panel.curves[0]) for curve in panel.curves]
        else:
            rows += [_curve_value(panel.name, curve, panel.curves) for curve in panel.curves]
            rows += [_map_value(panel.name, load_map) for load_map in panel.maps]
    for m in figure.marks:
        rows.append(
            {
                "panel": m.panel,
                "series": m.series,
                "status": m.status,
                "source": m.source,
                "detail": m.detail,
                "file": m.file,
            }
        )
    return rows


def _bar_value(bar) -> dict:
    row = {
        "panel": bar.panel,
        "group": bar.group,
        "series": bar.series,
        "speedup": bar.speedup,
        "speedup_p10": bar.speedup_low,
        "speedup_p90": bar.speedup_high,
        "time": bar.value,
        "time_p10": bar.low,
        "time_p90": bar.high,
        "unit": bar.unit,
        "status": bar.status,
        "quoted": bar.quoted,
        "source": bar.source,
        "num_samples": bar.num_samples,
        "notes": sorted(set(bar.notes)),
        "detail": bar.detail,
        "file": bar.file,
    }
    return row


def _scatter_value(panel: ScatterPanel) -> dict:
    stats = {k: None if math.isnan(v) else v for k, v in panel.stats.items()}
    points = {"predicted_ms": panel.predicted_ms, "measured_ms": panel.measured_ms, "naive_point_ms": panel.naive_ms}
    return {
        "panel": panel.name,
        **stats,
        "status": "ok",
        "source": panel.source,
        **points,
        "file": ", ".join(panel.files),
    }


def _layer_values(panel: LayerPanel) -> list[dict]:
    rows = []
    for row in panel.rows:
        times = {
            k: getattr(row, k) for k in ("static_forward", "static_backward", "dynamic_forward", "dynamic_backward")
        }
        ratios = {
            k: getattr(row, k)
            for k in ("backward_speedup", "forward_speedup", "total_speedup", "speedup_low", "speedup_high")
        }
        shared = {
            "unit": panel.unit,
            "plotted": panel.headline,
            "step_speedup": panel.step_speedup,
            "status": "ok",
            "source": panel.source,
            "file": ", ".join(panel.files),
        }
        rows.append({"panel": panel.name, "layer": row.layer, **ratios, **times, **shared})
    return rows


def _curve_value(panel: str, curve: Curve, curves: list[Curve]) -> dict:
    interval = curve.series.rpartition("_")[2]
    references = {c.series: c for c in curves}
    reference = references.get(f"static_{interval}") or references.get("static")
    speedup = reference.mean_ms / curve.mean_ms if reference else None
    return {
        "panel": panel,
        "series": curve.series,
        "mean_ms": curve.mean_ms,
        "speedup": speedup,
        "num_changes": len(curve.changes),
        "num_samples": len(curve.times_ms),
        "drawn": curve.drawn,
        "status": "ok",
        "source": curve.source,
        "iterations": curve.iterations,
        "times_ms": curve.times_ms,
        "changes": curve.changes,
        "file": curve.file,
    }


def _loss_value(panel: str, curve: LossCurve, reference: LossCurve) -> dict:
    """The mean of the last ten losses, and how far the curve is from the reference at most."""
    _, apart = curve.apart(reference)
    last = curve.losses[-10:]
    return {
        "panel": panel,
        "series": curve.series,
        "last_loss": sum(last) / len(last),
        "compared_with": reference.series,
        "most_apart": max(map(abs, apart), default=None),
        "num_samples": len(curve.losses),
        "status": "ok",
        "source": curve.source,
        "iterations": curve.iterations,
        "losses": curve.losses,
        "file": curve.file,
    }


def _map_value(panel: str, load_map: LoadMap) -> dict:
    """What a heat map shows, in one line: all its cells are in its file."""
    over_mean = load_map.max_over_mean()
    return {
        "panel": panel,
        "series": load_map.series,
        "layer": load_map.layer,
        "map": "load of experts and ranks",
        "fullest_over_mean_rank": float(over_mean.mean()),
        **{f"num_{kind}": len(at) for kind, at in load_map.changes.items()},
        "status": "ok",
        "source": load_map.source,
        "iterations": load_map.iterations,
        "max_over_mean": over_mean.tolist(),
        "file": load_map.file,
    }


def write_values(path: Path, datasets: list[Dataset], files: dict[tuple[str, str], list[str]]) -> None:
    """Write values.json; `files` names the drawn files by (data set, figure)."""
    blocks = []
    for data in datasets:
        figures = {
            f: {"title": (TITLES | EXTRAS)[f], "files": files.get((data.name, f), []), "values": values_of(v)}
            for f, v in data.figures.items()
        }
        blocks.append(
            {"name": data.name, "title": data.title, "kind": data.kind, "figures": figures, "waits_for": data.waits}
        )
    warnings = [_finding_value(data, f) for data in datasets for f in data.findings]
    text = json.dumps({"schema": 1, "datasets": blocks, "warnings": warnings}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finding_value(data: Dataset, finding: Finding) -> dict:
    return {
        "dataset": data.name,
        "code": finding.code,
        "message": finding.message,
        "where": finding.where,
        "figures": list(finding.figures),
    }


TERMINAL_PATH = 70


def finding_line(finding: Finding) -> str:
    """A finding as one line of printable text, for a terminal."""
    return clean(f"{finding.message}{_places(finding)} [{finding.code}]", 1200)


def _places(finding: Finding) -> str:
    if not finding.where:
        return ""
    shown = [_short(where, TERMINAL_PATH) for where in (finding.where if len(finding.where) <= 2 else finding.where[:1])]
    more = len(finding.where) - len(shown)
    return f" ({', '.join(shown)}{f', and {more} more' if more else ''})"


# ----------------------------------------------------------------------------------------------------------------- page


def write_page(path: Path, datasets: list[Dataset], images: dict[tuple[str, str], Path]) -> None:
    """Write index.html with the PNG of every figure inside."""
    body = [
        "<h1>SmartMoE: figures 8&ndash;13</h1>",
        "<p>Every number below comes from a log named beside it. What kind of source it is:</p><ul>",
        *[f"<li><b>{name}</b>: {_e(text)}</li>" for name, text in SOURCES.items()],
        "</ul>",
    ]
    for data in datasets:
        body += _dataset_block(data, images)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SmartMoE: figures 8-13</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
    )
    path.write_text(head + "\n".join(body) + "</body></html>\n", encoding="utf-8")


def _dataset_block(data: Dataset, images: dict[tuple[str, str], Path]) -> list[str]:
    parts = [f"<h2>{_e(data.title or 'not read')}</h2>"]
    if data.findings:
        many = " open" if len(data.findings) <= 30 else ""
        parts.append(f"<details{many}><summary>{len(data.findings)} warnings about these logs</summary><ul class=w>")
        parts += [f"<li>{_e(f.message)} <code>{_e(f.code)}</code>{_file_list(f.where)}</li>" for f in data.findings]
        parts.append("</ul></details>")
    for figure, title in (TITLES | EXTRAS).items():
        drawn = data.figures.get(figure)
        if drawn is None and figure not in data.waits:
            continue
        parts.append(f"<h3>{_e(title)}</h3>")
        if image := images.get((data.name, figure)):
            encoded = base64.b64encode(image.read_bytes()).decode("ascii")
            width = int.from_bytes(image.read_bytes()[16:20], "big") * 5 // 8
            parts.append(f'<img alt="{_e(title)}" width="{width}" src="data:image/png;base64,{encoded}">')
        if figure in data.waits:
            parts.append(f'<p class="waits">No data: this figure waits for {_e(data.waits[figure])}.</p>')
        if drawn is not None:
            parts.append(_table(values_of(drawn)))
    return parts


def _file_list(where: list[str]) -> str:
    if not where:
        return ""
    more = len(where) - MAX_FILES_SHOWN
    names = [_path(w, 110) for w in where[:MAX_FILES_SHOWN]]
    return f'<div class="f">{"<br>".join(names)}{f"<br>and {more} more (values.json)" if more > 0 else ""}</div>'


def _path(path: str, width: int) -> str:
    """A path with its middle left out when it is long; the whole one is its tooltip."""
    path = clean(path, 2000)
    return f'<span title="{_e(path)}">{_e(_short(path, width))}</span>'


def _short(path: str, width: int) -> str:
    return path if len(path) <= width else f"{path[: width // 2]} ... {path[-width // 2 :]}"


def _table(rows: list[dict]) -> str:
    """The scalars of the rows as a table without columns that are empty everywhere; no point lists."""
    columns = dict.fromkeys(k for row in rows for k, v in row.items() if not _is_points(v))
    columns = [c for c in columns if any(row.get(c) not in (None, "", []) for row in rows)]
    head = "".join(f"<th>{_e(c.replace('_', ' '))}</th>" for c in columns)
    lines = ["<tr>" + "".join(_cell(c, row.get(c)) for c in columns) + "</tr>" for row in rows]
    points = any(_is_points(v) for row in rows for v in row.values())
    note = "<p>All points are in values.json.</p>" if points else ""
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return f'<details open><summary>values</summary><div class="wide">{table}</div>{note}</details>'


def _is_points(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _cell(column: str, value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>' if abs(value) < 1000 else f'<td class="n">{value:.1f}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="n">{value}</td>'
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if column == "file":
        return f'<td class="file">{_path(text, 64)}</td>'
    kind = ' class="bad"' if column == "status" and value != "ok" else ' class="long"' if len(text) > 28 else ""
    return f"<td{kind}>{_e(text)}</td>"


def _e(text: object) -> str:
    return html.escape(clean(text, 2000), quote=True)
