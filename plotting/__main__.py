"""Draw figures 8-13 from logs: `python -m plotting [--logs DIR ...] [--out DIR]`, run from the repository root."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from plotting import fig8, fig9, fig10, fig11, fig12, fig13, load, losses, report, style
from plotting.model import BarFigure, Dataset, Finding, PanelFigure

REPOSITORY = Path(__file__).resolve().parents[1]
DRAW = {
    "fig8": fig8.draw,
    "fig9": fig9.draw,
    "fig10": fig10.draw,
    "fig11": fig11.draw,
    "fig12": fig12.draw,
    "fig13": fig13.draw,
    "losses": losses.draw,
}
MAX_PANELS = 24

HOW = {
    "published": {
        "fig8": "seconds of 200 iterations, first one included; one run each",
        "fig9": "seconds of one epoch (819,200 images); one run each",
        "fig10": "seconds of 200 iterations, first one included; one run each",
        "fig11": "49 trace iterations x 24 layers",
        "fig12": "sums over 200 iterations on one rank of each stage; bars: backward, as in the paper",
        "fig13": "minimum of 4 rounds; stars: placement changed",
    },
    "measured": {
        "fig8": "median step time after warm-up, error bars p10 to p90",
        "fig9": "median step time after warm-up, error bars p10 to p90",
        "fig10": "median step time after warm-up, error bars p10 to p90",
        "fig11": "one point for each layer and iteration",
        "fig12": "means over iterations after warm-up and all ranks, error bars p10 to p90 over iterations",
        "fig13": "stars: placement changed",
        "losses": "cross-entropy of each iteration, over all its tokens; below: over that of the first curve",
    },
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plotting",
        description="Draw figures 8-13 as PDF and PNG, with values.json (every number and its source) and index.html.",
        epilog="Exit codes: 0 drawn; 1 nothing could be drawn; 2 bad usage or missing directory. See logs/README.md.",
    )
    parser.add_argument(
        "--logs",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        help="draw from these directories only: measured run-sets (run.json inside), raw logs of the artifact "
        "or published tables, told apart by content. One directory gives fig8.pdf, several fig8.<directory>.pdf. "
        "Default: logs/published (fig8.pdf ...) and every run-set in logs/*/ (fig8.<run-set>.pdf ...)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="output directory, made when absent (default: outputs_from_log_<UTC time>)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        datasets = _load(arguments.logs)
        out = _make_out(arguments.out)
    except OSError as error:
        print(f"plotting: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        return _write(datasets, out)
    except OSError as error:  # a full disk, as a rule
        print(f"plotting: {out}: {error.strerror or error}; what is there is not whole", file=sys.stderr)
        return 2


def _write(datasets: list[Dataset], out: Path) -> int:
    """Figures, values.json and index.html; returns the exit code."""
    files, images = {}, {}
    for data in datasets:
        for figure in data.figures:
            drawn = _draw(data, figure, out)
            files[data.name, figure] = [path.name for path in drawn]
            images[data.name, figure] = drawn[1]
    _tell(datasets)
    report.write_values(out / "values.json", datasets, files)
    report.write_page(out / "index.html", datasets, images)
    num_values = sum(_num_values(f) for data in datasets for f in data.figures.values())
    print(f"{out}: {sum(map(len, files.values())) // 2} figures, values.json, index.html")
    if num_values == 0:
        print("plotting: nothing could be drawn: no log gave a number (see the warnings above)", file=sys.stderr)
    return 0 if num_values else 1


def _load(roots: list[Path] | None) -> list[Dataset]:
    for root in roots or [REPOSITORY / "logs"]:
        if not root.is_dir():
            raise NotADirectoryError(2, "not a directory; --logs needs a directory of logs", str(root))
    datasets = load.load_directories(roots) if roots else load.load_default(REPOSITORY / "logs")
    taken: set[str] = set()
    for data in datasets:
        if data.figures:
            data.name = load.unused(data.name, taken)
    return datasets


def _make_out(out: Path | None) -> Path:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    base = REPOSITORY / f"outputs_from_log_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            path = base.with_name(base.name + suffix)
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise FileExistsError(17, "too many output directories of this second", str(base))


def _draw(data: Dataset, figure: str, out: Path) -> list[Path]:
    rows = data.figures[figure]
    if len(rows.panels) > MAX_PANELS:
        message = f"{figure}: {len(rows.panels)} panels; the first {MAX_PANELS} are drawn, all are in values.json"
        data.findings.append(Finding("too-many-panels", message, [], (figure,)))
        keep = list(rows.panels)[:MAX_PANELS]
        rows = (
            BarFigure(figure, {k: rows.panels[k] for k in keep})
            if isinstance(rows, BarFigure)
            else PanelFigure(figure, keep, rows.marks)
        )
    how = HOW[data.kind][figure]
    if isinstance(rows, BarFigure) and any(bar.num_runs > 1 for bar in rows.bars()):
        how += ", of repeats the fastest and the slowest"
    axes = DRAW[figure](rows, f"{data.sources.get(figure, data.title)}: {how}")
    return style.save(axes, out / (f"{figure}.{data.name}" if data.name else figure))


def _num_values(figure: BarFigure | PanelFigure) -> int:
    return sum(bar.value is not None for bar in figure.bars()) if isinstance(figure, BarFigure) else len(figure.panels)


def _tell(datasets: list[Dataset]) -> None:
    """Warnings and missing figures on stderr: one line for each kind, the page has all."""
    for data in datasets:
        prefix = f"{data.name}: " if data.name else ""
        kinds: dict[str, list[Finding]] = {}
        for finding in data.findings:
            kinds.setdefault(finding.code, []).append(finding)
        for same in kinds.values():
            more = f"; {len(same) - 1} more of this kind in index.html" if len(same) > 1 else ""
            print(f"warning: {prefix}{report.finding_line(same[0])}{more}", file=sys.stderr)
        if len(datasets) > 1 and data.waits:  # of one set, a user's own as a rule, whole
            print(f"no data: {prefix}{', '.join(data.waits)}; index.html says what they wait for", file=sys.stderr)
            continue
        for figure, text in data.waits.items():
            print(f"no data: {prefix}{figure} waits for {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
