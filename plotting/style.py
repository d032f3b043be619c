"""The one style table of all figures: sizes, fonts, colours, labels, marks; and how a figure is saved.

Colours are Okabe and Ito's, which stay apart under the common kinds of colour blindness. Text is drawn as it is: names
from logs are never parsed as mathtext or TeX.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from plotting.files import clean  # noqa: E402
from plotting.model import StatusMark  # noqa: E402

COLUMN_INCH = 3.35
WIDE_INCH = 7.0
PNG_DPI = 220
CHARS_AN_INCH = 16  # of a title
NOTE_SIZE = 5.6
LABEL_SIZE = 6.0
MARK_COLOUR = "#8B0000"
GREY = "#767676"
TEXT_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.2}  # keeps labels apart from lines

matplotlib.rcParams.update(
    {
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": "DejaVu Sans",
        "font.size": 7,
        "axes.labelsize": 7,
        "axes.titlesize": 7.5,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.use_mathtext": False,
        "axes.formatter.useoffset": False,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.fontsize": 6.5,
        "legend.frameon": False,
        "legend.handlelength": 1.2,
        "legend.columnspacing": 1.2,
        "lines.linewidth": 0.9,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "figure.constrained_layout.use": True,
    }
)

# series: label, fill colour
SERIES = {
    "fastmoe": ("FastMoE", "#BDBDBD"),
    "tutel": ("Tutel", "#CC79A7"),
    "padded": ("padded, DeepSpeed's way", "#F0D9A0"),
    "deepspeed": ("DeepSpeed", "#E69F00"),
    "deepspeed_artifact": ("DeepSpeed, artifact's model", "#8C6100"),
    "megatron": ("Megatron-LM", "#117733"),
    "fastermoe": ("FasterMoE", "#56B4E9"),
    "alpa": ("Alpa's plan", "#009E73"),
    "smartmoe_static": ("SmartMoE (plan only)", "#0072B2"),
    "smartmoe": ("SmartMoE", "#D55E00"),
    "static": ("static", "#767676"),
    "every_100": ("adaptive, every 100", "#0072B2"),
    "every_10": ("adaptive, every 10", "#D55E00"),
    "dynamic": ("adaptive", "#D55E00"),
    "history": ("copies from history", "#009E73"),
    "exact": ("exact copies", "#CC79A7"),
    "both": ("moved and copied", "#E69F00"),
}
OTHER_COLOURS = ("#F0E442", "#44AA99", "#999933", "#882255")
MAX_MARKS = 7

STATUS_TEXT = {"oom": "OOM"}  # every other status is written as it is

# finding code: symbol on the bar, footnote
SYMBOLS = {
    "identical-logs": ("†", "the same log under two systems"),
    "gate-mismatch": ("‡", "ran another gate than its name says"),
    "other-model": ("§", "trained another model"),
}
QUOTED = ("*", "the paper's label: the log just ends, without an out-of-memory message")


def label(series: str) -> str:
    return SERIES[series][0] if series in SERIES else shown(series, 24)


def colour(series: str) -> str:
    """The fill of a series; a name that is not in the table gets a colour by its letters, the same in every figure."""
    if series in SERIES:
        return SERIES[series][1]
    return OTHER_COLOURS[sum(series.encode("utf-8", "replace")) % len(OTHER_COLOURS)]


def shown(text: str, limit: int = 40) -> str:
    """Text from a log as drawn: printable, short; a leading '_' would hide it from a legend."""
    text = clean(text, limit)
    return f" {text}" if text.startswith("_") else text


def panel(name: str, group_of: str = "capacity", limit: int = 60) -> str:
    """The name of a panel as its title: a group in it, "4/+inf", in words. `group_of`: what its second number is."""
    name = shown(name, limit)
    found = re.fullmatch(r"(.*?),? *(?<![\d/])(\d{1,6})[/-](\+?inf|[0-9.]{1,9})(?:, (.*))?", name)
    if not found:
        return name
    place, ranks, value, more = found.groups()
    words = [place, "" if re.search(rf"\b{ranks} (ranks?|GPUs?)\b", place) else f"{ranks} GPUs"]
    words += ["no capacity" if "inf" in value else f"{group_of} {value}", more]
    return ", ".join(filter(None, words))


def in_width(parts: list[str], width: float) -> str:
    """A title of several parts: in one line where a figure of `width` inches has room for it, else in several."""
    parts = [part for part in parts if part]
    line = "  ".join(parts)
    return line if len(line) <= CHARS_AN_INCH * width else "\n".join(parts)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    return figure


def add_legend(figure: Figure, handles: list, labels: list[str]) -> None:
    """A legend above the axes, in as many columns as the width of the figure holds."""
    widths = [0.32 + 0.052 * len(text) for text in labels]
    for num_rows in range(1, len(labels) + 1):  # a column is as wide as its longest label
        num_columns = -(-len(labels) // num_rows)
        if sum(max(column) for column in _columns(widths, num_columns)) <= figure.get_figwidth():
            break
    figure.legend(handles, labels, loc="outside upper center", ncols=num_columns, borderaxespad=0.1, labelspacing=0.25)


def _columns(entries: list, num: int) -> list[list]:
    """`entries` as a legend fills `num` columns: downwards, the first ones longer."""
    short, longer = divmod(len(entries), num)
    sizes = [short + (column < longer) for column in range(num)]
    return [entries[sum(sizes[:column]) : sum(sizes[: column + 1])] for column in range(num) if sizes[column]]


def series_patch(series: str) -> Patch:
    return Patch(facecolor=colour(series), edgecolor="black", linewidth=0.4)


def add_notes(figure: Figure, lines: list[str], width: float) -> None:
    """Small print under the figure: the source of its numbers first, then footnotes."""
    per_line = int(width * 22)
    wrapped = [part for line in lines for part in _wrap(line, per_line)]
    figure.supxlabel("\n".join(wrapped), x=0.01, ha="left", fontsize=NOTE_SIZE, color="#444444", linespacing=1.15)


def _wrap(line: str, width: int) -> list[str]:
    parts, current = [], ""
    for word in line.split(" "):
        if current and len(current) + 1 + len(word) > width:
            parts.append(current)
            current = word
        else:
            current = f"{current} {word}".strip()
    return [*parts, current]


def light_grid(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)


def write_marks(axes: Axes, marks: list[StatusMark]) -> None:
    """Runs without data, as text in axes of their own."""
    axes.set_axis_off()
    lines = [" ".join(filter(None, (shown(m.panel, 20), label(m.series)))) + f": {m.status}" for m in marks]
    if len(lines) > MAX_MARKS:
        lines = [*lines[:MAX_MARKS], f"and {len(lines) - MAX_MARKS} more"]
    text = axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", transform=axes.transAxes, fontsize=7)
    text.set_color(MARK_COLOUR)
    text.set_in_layout(False)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.pdf (vector, TrueType fonts) and stem.png; the same rows give the same bytes."""
    pdf, png = stem.with_name(stem.name + ".pdf"), stem.with_name(stem.name + ".png")
    with warnings.catch_warnings():
        for message in ("Glyph .* missing from", "constrained_layout not applied"):  # odd or very long names from logs
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        figure.savefig(pdf, metadata={"CreationDate": None, "Creator": "SmartMoE plotting", "Producer": "matplotlib"})
        figure.savefig(png, dpi=PNG_DPI, metadata={"Software": None})
    return [pdf, png]
