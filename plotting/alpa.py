"""Draw the DeepSpeed benchmark of Alpa's artifact: PFLOP/s over GPUs, published and measured bars side by side.

    python -m plotting.alpa [RESULTS ..] [--out DIR] [--count artifact|alpa|useful]

RESULTS are the JSON files of run_deepspeed_benchmark.sh, or folders of them. A bar that was not measured stays empty.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from plotting import style
from plotting.files import clean

PUBLISHED = Path(__file__).resolve().parents[1] / "logs" / "published" / "alpa_deepspeed.csv"
COUNTS = {
    "artifact": "groups of all tokens of a micro-batch, as the artifact counts DeepSpeed",
    "alpa": "groups of at most 2048 tokens, as Alpa counts itself",
    "useful": "without gating einsums and recomputation",
}
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64)
# series: label, colour, hatch
LOOK = {
    "published deepspeed": ("DeepSpeed of 2021 on V100, published", "#F3D9A4", "...."),
    "published alpa": ("Alpa on V100, published", "#A9D9C8", "...."),
    "deepspeed": ("DeepSpeed, measured", style.colour("deepspeed"), None),
    "deepspeed captured": ("DeepSpeed, blocks from CUDA graphs, measured", style.colour("deepspeed"), "////"),
    "smartmoe": ("DeepSpeed with SmartMoE's layer, measured", style.colour("smartmoe"), None),
    "smartmoe captured": ("SmartMoE's layer, blocks from CUDA graphs, measured", style.colour("smartmoe"), "////"),
}


@dataclass(frozen=True)
class Bar:
    """pflops: of all GPUs together, None = the run failed. note: what ran; model: its name."""

    series: str
    num_gpus: int
    pflops: float | None
    note: str
    model: str


def read_published(path: Path = PUBLISHED) -> list[Bar]:
    """The published bars; a run that failed has no value."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Bar(
                f"published {row['series']}",
                int(row["gpus"]),
                int(row["gpus"]) * float(row["tflops_per_gpu"]) / 1e3 if row["tflops_per_gpu"] else None,
                row["model"],
                row["model"],
            )
            for row in csv.DictReader(file)
        ]


def read_results(paths: list[Path], count: str) -> tuple[list[Bar], list[str]]:
    """The best run of each back end and number of GPUs, and what was left out and why: bars that stand side by side are of
    one model, the published one where that was run."""
    found: list[tuple[Path, Bar]] = []
    problems: list[str] = []
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    for file in files:
        try:
            bar = _read_result(file, count)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{file}: not a result of the benchmark: {error!r}")
            continue
        if bar.num_gpus not in NUM_GPUS or bar.series not in LOOK:
            problems.append(f"{file}: no place for {bar.series} on {bar.num_gpus} GPUs")
            continue
        found.append((file, bar))
    models = _one_model_each([bar for _, bar in found])
    best: dict[tuple[str, int], Bar] = {}
    for file, bar in found:
        key = (bar.series, bar.num_gpus)
        if bar.model != models[bar.num_gpus]:
            problems.append(f"{file}: {bar.model} on {bar.num_gpus} GPUs is not drawn beside {models[bar.num_gpus]}")
        elif key not in best or bar.pflops > best[key].pflops:
            best[key] = bar
    return list(best.values()), problems


def _one_model_each(bars: list[Bar]) -> dict[int, str]:
    """The model that is drawn for each number of GPUs."""
    published = {bar.num_gpus: bar.model for bar in read_published()}
    models = {num_gpus: sorted({bar.model for bar in bars if bar.num_gpus == num_gpus}) for num_gpus in published}
    return {
        num_gpus: published[num_gpus] if published[num_gpus] in names else names[0]
        for num_gpus, names in models.items()
        if names
    }


def _read_result(file: Path, count: str) -> Bar:
    result = json.loads(file.read_text(encoding="utf-8"))
    num_gpus, rate = int(result["case"]["num_gpus"]), float(result["summary"]["tflops_per_gpu"][count])
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{rate} TFLOP/s")
    model = clean(str(result["case"]["model"]["name"]), 20)
    note = f"{model} on {result['device']}, ZeRO-{result['options']['zero']}"
    series = clean(str(result["backend"]), 40) + " captured" * (result.get("captured") is True)
    return Bar(series, num_gpus, num_gpus * rate / 1e3, clean(note, 60), model)


def draw(bars: list[Bar], count: str) -> Figure:
    """One group of bars for each number of GPUs: published bars hatched, measured ones filled, failed ones an X."""
    figure = style.new_figure(style.WIDE_INCH, 2.6)
    present = {bar.series for bar in bars}
    look = {series: shown for series, shown in LOOK.items() if "captured" not in series or series in present}
    axes, width = figure.subplots(), 0.8 / len(look)
    measured = [bar for bar in bars if not bar.series.startswith("published")]
    tallest = max((bar.pflops or 0.0 for bar in bars), default=1.0)
    for bar in bars:
        x = NUM_GPUS.index(bar.num_gpus) + (list(look).index(bar.series) - (len(look) - 1) / 2) * width
        _, colour, hatch = look[bar.series]
        if bar.pflops is None:
            axes.text(x, tallest * 0.01, "X", ha="center", va="bottom", color=style.MARK_COLOUR)
        else:
            axes.bar(x, bar.pflops, width, color=colour, edgecolor="black", linewidth=0.4, hatch=hatch)
            text = f" {bar.pflops:.3f}" if bar.pflops >= 0.0005 else " < 0.001"
            axes.text(x, bar.pflops, text, ha="center", va="bottom", fontsize=style.NOTE_SIZE, rotation=90)
    models = {bar.num_gpus: bar.note for bar in bars if bar.series == "published deepspeed"}
    axes.set_xticks(range(len(NUM_GPUS)), [f"{num}\n{models.get(num, '')}" for num in NUM_GPUS])
    axes.set_xlim(-0.6, len(NUM_GPUS) - 0.4)
    axes.set_ylim(0, tallest * 1.2)
    axes.set_xlabel("GPUs, published model")
    axes.set_ylabel("PFLOP/s")
    style.light_grid(axes)
    patches = [Patch(facecolor=c, edgecolor="black", linewidth=0.4, hatch=hatch) for _, c, hatch in look.values()]
    style.add_legend(figure, patches, [label for label, _, _ in look.values()])
    lines = [
        f"Measured FLOPs: {COUNTS[count]}. Which group size the published bars used is not known; X: the run failed.",
        "Other hardware and models than published may stand beside the published bars: compare measured ones.",
    ]
    for text in sorted({f"{bar.num_gpus} GPUs {bar.series}: {bar.note}" for bar in measured}):
        lines.append(text)
    style.add_notes(figure, lines, style.WIDE_INCH)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plotting.alpa", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="JSON files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("outputs_from_exec_alpa"), metavar="DIR")
    parser.add_argument("--count", choices=COUNTS, default="artifact", help="how measured FLOPs count")
    args = parser.parse_args(argv)
    missing = [str(path) for path in args.results if not path.exists()]
    if missing:
        print(f"plotting.alpa: no such file or folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    measured, problems = read_results(args.results, args.count)
    for problem in problems:
        print(f"plotting.alpa: {clean(problem, 300)}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in style.save(draw([*read_published(), *measured], args.count), args.out / "alpa"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
