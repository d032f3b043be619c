"""Parsers for the raw logs of the ATC'23 artifact: iteration logs, Swin logs, profiler files, figure 11 and 13 files.

Fields are found by their label, never by their column. A parser returns what the text says; `published.py` decides
what it means for a figure. Formats: logs/README.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from plotting.files import ANSI, Folder, LogFile, number, parse_json, positive

ITERATION = re.compile(r"(?:^|\s)iteration\s+(\d{1,9})/\s*(\d{1,9})\s*\|")
LABELLED = re.compile(r"^\s*(.+?):\s*(\S+)\s*$")
ELAPSED = "elapsed time per iteration (ms)"
ARGUMENT = re.compile(r"^\s+(\w+) \.{3,} (\S+)\s*$")
NUMBERS = {"world_size": "num_gpus", "top_k": "top_k", "topk": "top_k", "expert_interval": "moe_every"}
BALANCE = re.compile(r"--balance-strategy[ =](\w+)")
WORLD = (
    re.compile(r"using world size:\s*(\d{1,9})"),
    re.compile(r"RANK and WORLD_SIZE in environ:\s*\d{1,9}/(\d{1,9})"),
    re.compile(r"^\s+world_size \.{3,} (\d{1,9})"),
)
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|OUT_OF_MEMORY|oom-kill", re.IGNORECASE)
SWIN_STEP = re.compile(r"Train: \[\d{1,9}/\d{1,9}\]\[(\d{1,9})/(\d{1,9})\].*?\btime ([0-9.]+|nan|inf) \(")
SWIN_EPOCH = re.compile(r"EPOCH (\d{1,9}) training takes (?:(\d{1,9}) days?, )?(\d{1,9}):(\d\d):(\d\d)\b")
SWIN_CAPACITY = re.compile(r"^\s+CAPACITY_FACTOR: ([0-9.]+)\s*$")

MEGATRON_NAME = re.compile(
    r"^(?P<model>.+?)-(?P<experts>\d{1,9})MoE_(?P<gate>[a-z]+)(?P<cap>[0-9.]+)_.*?_t(?P<t>\d{1,9})_p(?P<p>\d{1,9})_d(?P<d>\d{1,9})"
    r"_ep(?P<ep>\d{1,9})_dp(?P<dp>\d{1,9})_.*?_gbs(?P<gbs>\d{1,9})_mbs(?P<mbs>\d{1,9})_.*?_dynamic(?P<dynamic>ON|OFF)_freq(?P<freq>\d{1,9})"
)
DEEPSPEED_NAME = re.compile(
    r"^gpt-(?P<model>.+?)-lr-.*-gbs-(?P<gbs>\d{1,9})-mbs-(?P<mbs>\d{1,9})-gpus-(?P<gpus>\d{1,9})-.*-cap-(?P<cap>[0-9.]+)-drop-(?P<drop>true|false)"
)
TUTEL_NAME = re.compile(r"^(?P<gate>gshard|naive)(?P<cap>[0-9.]*)_(?P<model>.+?)_tutel_lbs(?P<mbs>\d{1,9})_")


@dataclass
class NameFacts:
    """What a file name of the artifact claims."""

    kind: str  # "megatron", "deepspeed" or "tutel"
    model: str
    capacity: str  # "1.2" .. or "+inf"
    gate: str
    micro_batch: int
    num_gpus: int | None = None
    dynamic: bool | None = None
    plan: str = ""


def parse_name(name: str) -> NameFacts | None:
    """The facts in an artifact file name, or None for any other name."""
    if m := MEGATRON_NAME.match(name):
        capacity = m["cap"] if m["gate"] == "gshard" else "+inf"  # the number after "naive" means nothing
        plan = f"t{m['t']} p{m['p']} d{m['d']} ep{m['ep']} dp{m['dp']}"
        gpus = int(m["t"]) * int(m["p"]) * int(m["d"])
        return NameFacts("megatron", m["model"], capacity, m["gate"], int(m["mbs"]), gpus, m["dynamic"] == "ON", plan)
    if m := DEEPSPEED_NAME.match(name):
        drops = m["drop"] == "true"
        gate, capacity = ("gshard", m["cap"]) if drops else ("naive", "+inf")
        return NameFacts("deepspeed", m["model"], capacity, gate, int(m["mbs"]), int(m["gpus"]))
    if m := TUTEL_NAME.match(name):
        capacity = m["cap"] if m["gate"] == "gshard" else "+inf"
        return NameFacts("tutel", m["model"], capacity, m["gate"], int(m["mbs"]))
    return None


@dataclass
class TrainingLog:
    """An iteration or Swin log: times by iteration, and what the run said about itself."""

    times_ms: dict[int, float] = field(default_factory=dict)
    num_declared: int = 0
    num_skipped: int = 0
    epoch_s: float | None = None  # Swin only
    num_gpus: int | None = None
    gate: str | None = None
    dynamic: bool | None = None
    top_k: int | None = None
    moe_every: int | None = None
    out_of_memory: bool = False
    num_bad: int = 0  # lines that hold an iteration but no usable time

    @property
    def is_complete(self) -> bool:
        return 0 < self.num_declared == sum(1 <= i <= self.num_declared for i in self.times_ms)


def parse_training_log(log: LogFile, folder: Folder, figures: tuple[str, ...]) -> TrainingLog:
    """Read a Megatron, DeepSpeed or Swin log; cut lines, NaN times and repeats become findings with their line."""
    result = TrainingLog()
    gates: set[str] = set()
    capacity_gates: set[str] = set()
    for line_number, raw in enumerate(log.lines, start=1):
        line = ANSI.sub("", raw) if "\x1b" in raw else raw
        place = f"{log.where}:{line_number}"
        if (m := ITERATION.search(line)) or (ELAPSED in line and "iteration" in line):
            _iteration_line(line, m, result, folder, place, figures)
        elif "Train: [" in line:
            _swin_line(line, result, folder, place, figures)
        else:
            _fact_line(line, result, gates, capacity_gates)
    told = gates or capacity_gates  # a capacity in the configuration only counts where no gate argument is echoed
    if len(told) == 1:
        result.gate = told.pop()
    return result


def _iteration_line(line: str, m: re.Match | None, result: TrainingLog, folder: Folder, place: str, figures) -> None:
    if m is None:
        result.num_bad += 1
        folder.report(
            "cut-line", "an iteration line without its iteration number; it is left out", place, figures=figures
        )
        return
    iteration, declared = int(m[1]), int(m[2])
    result.num_declared = max(result.num_declared, declared)
    segments = line[m.end() :].split("|")
    # Only text before a closing '|' is whole: "29" may be what is left of "2955.3".
    fields = {f[1]: f[2] for f in (LABELLED.match(s) for s in segments[:-1]) if f}
    time_ms = positive(fields.get(ELAPSED))
    if time_ms is None:
        result.num_bad += 1
        seen = (
            f'time "{fields[ELAPSED]}" is not a positive number'
            if ELAPSED in fields
            else "the line is cut before its time"
        )
        code = "bad-time" if ELAPSED in fields else "cut-line"
        folder.report(code, f"iteration {iteration}: {seen}; it is left out", place, figures=figures)
        return
    if "number of nan iterations" not in fields:
        folder.report("cut-line", f"iteration {iteration}: the line is cut after its time", place, figures=figures)
    if iteration in result.times_ms:
        folder.report(
            "repeated-iteration", f"iteration {iteration} is there twice; the later one counts", place, figures=figures
        )
    if fields.get("number of skipped iterations", "0") != "0":
        result.num_skipped += 1
    result.times_ms[iteration] = time_ms


def _swin_line(line: str, result: TrainingLog, folder: Folder, place: str, figures) -> None:
    m = SWIN_STEP.search(line)
    time_s = positive(m[3]) if m else None
    if time_s is None:
        result.num_bad += 1
        folder.report(
            "cut-line", "a training step line that is cut or has no time; it is left out", place, figures=figures
        )
        return
    result.times_ms[int(m[1])] = time_s * 1000


def _fact_line(line: str, result: TrainingLog, gates: set[str], capacity_gates: set[str]) -> None:
    if m := SWIN_EPOCH.search(line):
        days, hours, minutes, seconds = (int(g or 0) for g in m.groups()[1:])
        if int(m[1]) == 0:
            result.epoch_s = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif m := SWIN_CAPACITY.match(line):
        capacity_gates.add("gshard" if number(m[1]) else "naive")
    elif m := ARGUMENT.match(line):
        if m[1] == "balance_strategy":
            gates.add(m[2])
        elif m[1] == "dynamic_placement":
            result.dynamic = m[2] == "True"
        elif m[1] == "moe_token_dropping" and m[2] == "False":
            gates.add("naive")
        elif m[1] in NUMBERS and m[2].isdigit():
            setattr(result, NUMBERS[m[1]], int(m[2][:9]))
    else:
        for m in BALANCE.finditer(line):
            gates.add(m[1])
        for pattern in WORLD:
            if result.num_gpus is None and (m := pattern.search(line)):
                result.num_gpus = int(m[1])
    if OUT_OF_MEMORY.search(line):
        result.out_of_memory = True


MOE_TIMER = re.compile(r"^MoE_L(\d{1,9})_(fwd|bwd)$")


@dataclass
class Profile:
    """A .profiler file: sums over iterations in ms by local layer and direction, and the iterations seen."""

    rank: int
    stage: int
    data_rank: int
    total_ms: dict[tuple[int, str], float]
    iterations: set[int]

    @property
    def num_layers(self) -> int:
        return len({layer for layer, _ in self.total_ms})


def parse_profile(log: LogFile, folder: Folder) -> Profile | None:
    """Read one rank's profiler file. Its `max` and `min` are swapped in the artifact; only `total` is used."""
    profile = None
    for line_number, line in enumerate(log.lines, start=1):
        place = f"{log.where}:{line_number}"
        try:
            record = parse_json(line)
            iteration, ids = record["iteration"], [int(record[k]) for k in ("rank", "pp_rank", "dp_rank")]
            timers = {MOE_TIMER.match(k): v for k, v in record["perf"].items()}
            totals = {(int(k[1]), k[2]): float(number(v["total"])) for k, v in timers.items() if k}
        except (ValueError, KeyError, TypeError, AttributeError):
            folder.report(
                "malformed", "a profiler line that is cut or malformed; it is left out", place, figures=("fig12",)
            )
            continue
        if profile is None:
            profile = Profile(*ids, total_ms={}, iterations=set())
        if not isinstance(iteration, int) or iteration < 1:  # -1 is the set-up
            continue
        profile.iterations.add(iteration)
        for key, value in totals.items():
            profile.total_ms[key] = profile.total_ms.get(key, 0.0) + value
    return profile


def parse_estimates(log: LogFile, folder: Folder) -> tuple[float, list[float], list[float]] | None:
    """A figure 11 file: (naive estimate, measured, predicted) in ms. Line 1: naive estimate, line 2: points."""
    try:
        naive = positive(log.lines[0])
        points = parse_json(log.lines[1])
        real, estimate = ([positive(v) for v in points[key]] for key in ("real", "est"))
    except (ValueError, KeyError, TypeError, IndexError):
        folder.report(
            "malformed",
            "expected a number, then an object with the lists real and est",
            f"{log.where}:2",
            figures=("fig11",),
        )
        return None
    if naive is None or len(real) != len(estimate) or not real or None in real or None in estimate:
        folder.report(
            "bad-time",
            "real and est must be equally long lists of positive numbers",
            f"{log.where}:2",
            figures=("fig11",),
        )
        return None
    return naive, real, estimate


def parse_replay(log: LogFile, folder: Folder) -> tuple[list[float], list[float]] | None:
    """A figure 13 file: (static, dynamic) times in ms; sample i belongs to trace iteration 1 + 10 i."""
    try:
        record = parse_json(log.lines[0])
        static, dynamic = ([positive(v) for v in record[key]] for key in ("FastMoE", "SmartMoE"))
    except (ValueError, KeyError, TypeError):
        folder.report(
            "malformed", "expected one object with the lists FastMoE and SmartMoE", f"{log.where}:1", figures=("fig13",)
        )
        return None
    if len(static) != len(dynamic) or len(static) < 2 or None in static or None in dynamic:
        folder.report(
            "bad-time",
            "FastMoE and SmartMoE must be equally long lists of positive numbers",
            f"{log.where}:1",
            figures=("fig13",),
        )
        return None
    return static, dynamic


def parse_changes(log: LogFile, folder: Folder) -> list[int]:
    """A list of iterations, one a line."""
    changes = []
    for line_number, line in enumerate(log.lines, start=1):
        if re.fullmatch(r"[0-9]{1,9}", line.strip()):
            changes.append(int(line))
        else:
            folder.report(
                "malformed", "expected one iteration number", f"{log.where}:{line_number}", figures=("fig13",)
            )
    return changes
