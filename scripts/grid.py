"""From experiments/*.toml, models.toml and clusters/*.toml to a list of runs; every input is checked first."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from slurm import Site

from smartmoe import hosts, systems
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    from_dict,
    read_table,
    to_dict,
)
from smartmoe.record import safe_run_id

OWN_ENTRIES = {
    "train": "smartmoe.train",
    "replay": "smartmoe.bench.replay",
    "layer_accuracy": "smartmoe.bench.layer_accuracy",
}
ENTRIES = {**OWN_ENTRIES, **{name: host.module for name, host in hosts.HOSTS.items()}}
# Programs that do several runs in one process (smartmoe.sequence), by whether these may be of one world.
SHARING = {"train": "smartmoe", "replay": "smartmoe", **{name: name for name in hosts.HOSTS}}
TRAINING = ("train", *hosts.HOSTS)  # entries that read text


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The table [machine] of a cluster's file: how runs share this machine.

    runs_per_world: at most so many runs follow one another in one world of processes (1: each has its own). cores_per_rank:
    worlds run side by side on GPUs that are free as long as each rank has so many cores.
    """

    runs_per_world: int = 1
    cores_per_rank: int = 4


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One [[grid]] of an experiment: all its systems x all its gates, on one kind of cluster.

    `ranks` 0 fits any number of ranks from `min_ranks` on. `panel` and `group` are what the figure calls the bars; {ranks},
    {gpus} ("1 GPU", "2 GPUs") and {capacity} are filled in. `start_s` and `step_s` (seconds an iteration) are what --dry-run
    and the progress line estimate with. `repeats`: each run so many times, the later ones with the next seeds: the figure's
    error bars.
    `samples_per_rank`: the global batch is so many samples a rank, in place of workload.global_batch_size.
    A system with a host of its own (smartmoe.hosts) is trained by that.
    """

    cluster: str
    model: str
    panel: str
    group: str
    ranks: int = 0
    min_ranks: int = 1
    entry: str = "train"
    timeout_s: float = 900.0
    start_s: float = 10.0
    step_s: float = 1.0
    repeats: int = 1
    samples_per_rank: int = 0
    record_spans: bool = False
    workload: Workload = field(default_factory=Workload)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system of a grid. `series` is its name in the figure (default: the system's); `gates` picks some of the
    grid's gates by capacity (default: all), `min_ranks` and `max_ranks` (0: no limit) clusters by size, for plans that are
    best there; `trace_from` = "figN/series" replays the trace which that run records.
    Beside these a row may have the tables plan (dp = 0: all ranks that are left, ep = 0: a whole stage) and online.
    """

    system: str
    series: str = ""
    gates: tuple[str, ...] = ()
    min_ranks: int = 1
    max_ranks: int = 0
    record_trace: bool = False
    trace_from: str = ""
    step_s: float = 0.0


@dataclass
class Run:
    """One run to do, for all the bars it serves; `home` is the first figure that declares it."""

    run_id: str
    home: str
    entry: str
    config: RunConfig
    bars: list[dict]
    timeout_s: float
    start_s: float
    step_s: float
    needs: Run | None = None  # the run that records the trace this one replays
    repeat: int = 1  # which of the grid's repeats this is

    @property
    def folder(self) -> Path:
        """Where the run lives inside a run-set."""
        return Path(self.home, self.config.system, self.run_id)

    @property
    def key(self) -> str:
        """Equal for runs that would do exactly the same."""
        return json.dumps([self.entry, self.repeat, to_dict(self.config)], sort_keys=True)

    @property
    def estimate_s(self) -> float:
        return self.start_s + self.step_s * self.config.workload.iterations


@dataclass
class Experiment:
    """One figure's file. `waits_for` says why a figure cannot be run yet."""

    figure: str
    about: str
    waits_for: str
    grids: list[tuple[Grid, list[GateConfig], list[dict]]]
    path: Path


class Configs:
    """All declarations under one folder (scripts/ as a rule), parsed and checked for form."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "models.toml"
        tables = read_table(path).items()
        self.models = {
            name: from_dict(ModelConfig, {"name": name, **table}, f"{path}: [{name}]") for name, table in tables
        }
        files = sorted(folder.glob("clusters/*.toml"))
        self.clusters = {path.stem: _cluster(path) for path in files}
        self.machines = {path.stem: _machine(path) for path in files}
        self.sites = {path.stem: from_dict(Site, read_table(path).get("slurm", {}), f"{path}: slurm") for path in files}
        self.experiments = {}
        for path in sorted(folder.glob("experiments/*.toml")):
            experiment = _experiment(path)
            self.experiments[experiment.figure] = experiment
        if not self.experiments:
            raise ValueError(f"{folder}/experiments: no experiment files (*.toml) here")

    def expand_sizes(self, figures: list[str], kind: str, clusters: list[ClusterSpec]) -> tuple[list[Run], dict[str, str]]:
        """The runs of `figures` on each of `clusters`, which differ in size, and why figures are left out on all of them."""
        runs, reasons = [], {}
        for cluster in clusters:
            left_out = self.left_out(figures, kind, cluster)
            runs += self.expand([figure for figure in figures if figure not in left_out], kind, cluster)
            reasons = {figure: why for figure, why in left_out.items() if cluster is clusters[0] or figure in reasons}
        folders = [run.folder for run in runs]
        for folder in folders:
            assert folders.count(folder) == 1, f"{folder}: two runs of different sizes"
        return runs, reasons

    def select(self, names: list[str]) -> list[str]:
        """Figures by number or name in drawing order; all when `names` is empty. ValueError for an unknown one."""
        known = sorted(self.experiments, key=lambda figure: (len(figure), figure))
        wanted = {name if name.startswith("fig") else f"fig{name}" for name in names}
        if unknown := sorted(wanted - set(known)):
            numbers = " ".join(figure.removeprefix("fig") for figure in known)
            raise ValueError(f"unknown figure {', '.join(unknown)}; there are: {numbers}")
        return [figure for figure in known if not wanted or figure in wanted]

    def left_out(self, figures: list[str], kind: str, cluster: ClusterSpec) -> dict[str, str]:
        """The figures among `figures` that cannot be run on `cluster`, and what each waits for."""
        reasons = {}
        for figure in figures:
            experiment = self.experiments[figure]
            if experiment.waits_for:
                reasons[figure] = experiment.waits_for
            elif not _fitting(experiment, kind, cluster):
                reasons[figure] = f"{experiment.path} has no grid for cluster {kind} with {cluster.num_ranks} ranks"
        return reasons

    def expand(self, figures: list[str], kind: str, cluster: ClusterSpec) -> list[Run]:
        """Every run that `figures` need on `cluster` (declared as clusters/`kind`.toml), each once, a trace before its
        replays. Raises ValueError, naming the file, for anything that does not fit.

        All experiments are expanded, so that a run has the same home, and is found again, whichever figures are asked.
        """
        runs: dict[str, Run] = {}
        by_series: dict[str, Run] = {}
        for figure in sorted(self.select([]), key=self._replays):  # a trace may be recorded for a later figure
            experiment = self.experiments[figure]
            if experiment.waits_for:
                continue
            for number, grid, gates, rows in _fitting(experiment, kind, cluster):
                where = f"{experiment.path}: grid {number}"
                parsed = [_row(table, f"{where}, system {place}") for place, table in enumerate(rows, 1)]
                # all bars before a repeat, so that a run-set cut short has them all; gate by gate, so that systems that a
                # figure compares run close to one another
                for repeat, gate in itertools.product(range(1, grid.repeats + 1), gates):
                    for place, (row, parts) in enumerate(parsed, 1):
                        fits = row.min_ranks <= cluster.num_ranks <= (row.max_ranks or cluster.num_ranks)
                        if fits and gate in _gates_of(row, gates, f"{where}, system {place}"):
                            source = _source(row, by_series, where)
                            first = self._run(figure, grid, row, parts, gate, cluster, source, where)
                            run = _merge(runs, _as_repeat(first, repeat))
                            by_series[f"{figure}/{first.bars[0]['series']}"] = run
        _check_bars(list(runs.values()))
        for run in runs.values():
            run.bars = [bar for bar in run.bars if bar["figure"] in figures]
        wanted = [run for run in runs.values() if run.bars]
        needed = {run.needs.key for run in wanted if run.needs}
        return [run for run in runs.values() if run.bars or run.key in needed]

    def _replays(self, figure: str) -> bool:
        return any("trace_from" in row for _, _, rows in self.experiments[figure].grids for row in rows)

    def _run(self, figure, grid, row, parts, gate, cluster, source, where) -> Run:
        label = capacity_label(gate)
        num_ranks, slow = cluster.num_ranks, cluster.slow_links_gbytes_per_s
        names = {"ranks": num_ranks, "capacity": label, "gpus": f"{num_ranks} GPU{'s' * (num_ranks > 1)}"}
        bar = {
            "figure": figure,
            "panel": _fill(grid.panel, names, where) + (f", links slowed to {slow:g} GB/s" if slow else ""),
            "group": _fill(grid.group, names, where),
            "series": row.series or row.system,
        }
        if grid.model not in self.models:
            raise ValueError(f'{where}: unknown model "{grid.model}"{_near(grid.model, self.models)}')
        if source is not None:
            here = Path(figure, row.system, "x")
            gate = dataclasses.replace(gate, kind="trace", trace=str(_relative(source.folder / "trace.npz", here)))
        workload = grid.workload
        if grid.samples_per_rank:
            workload = dataclasses.replace(workload, global_batch_size=grid.samples_per_rank * cluster.num_ranks)
        if "plan" in parts:
            parts = {**parts, "plan": _filled(parts["plan"], cluster)}
        try:
            config = systems.build(
                row.system, model=self.models[grid.model], gate=gate, workload=workload, cluster=cluster,
                record_trace=row.record_trace, record_spans=grid.record_spans, **parts,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        hosts.check(config, where)
        entry = systems.get(row.system).host or grid.entry
        step_s = row.step_s or grid.step_s
        run_id = safe_run_id(bar["series"], gate.kind, label.lstrip("+"), _short(config.plan))
        return Run(run_id, figure, entry, config, [bar], grid.timeout_s, grid.start_s, step_s, source)


def capacity_label(gate: GateConfig) -> str:
    """How figures write a capacity: "1.2", or "+inf" for none."""
    return "+inf" if gate.capacity is None else f"{gate.capacity:g}"


def _cluster(path: Path) -> ClusterSpec:
    """A cluster file; its [rates] are for the planner, its [slurm] and [machine] are for the launcher."""
    table = {key: value for key, value in read_table(path).items() if key not in ("rates", "slurm", "machine")}
    return from_dict(ClusterSpec, {"name": path.stem, **table}, str(path))


def _machine(path: Path) -> Machine:
    machine = from_dict(Machine, read_table(path).get("machine", {}), f"{path}: machine")
    if machine.runs_per_world < 1 or machine.cores_per_rank < 1:
        raise ValueError(f"{path}: machine: runs_per_world and cores_per_rank must be at least 1")
    return machine


def _experiment(path: Path) -> Experiment:
    table = dict(read_table(path))
    figure, about, waits_for = (table.pop(key, "") for key in ("figure", "about", "waits_for"))
    grids = table.pop("grid", [])
    if table:
        raise ValueError(f'{path}: unknown key "{next(iter(table))}"; known: figure, about, waits_for, [[grid]]')
    if not isinstance(figure, str) or figure != path.stem:
        raise ValueError(f'{path}: figure = "{figure}" must be the name of the file, "{path.stem}"')
    if not waits_for and not grids:
        raise ValueError(f'{path}: give a [[grid]], or waits_for = ".." when the figure cannot be run yet')
    parsed = []
    for number, grid in enumerate(_tables(grids, f"{path}: grid"), 1):
        where, grid = f"{path}: grid {number}", dict(grid)
        gates = [
            from_dict(GateConfig, gate, f"{where}: gates") for gate in _tables(grid.pop("gates", []), f"{where}: gates")
        ]
        rows = _tables(grid.pop("systems", []), f"{where}: systems")
        if not gates or not rows:
            raise ValueError(f"{where}: needs gates = [{{ kind = .. }}, ..] and at least one [[grid.systems]]")
        settings = from_dict(Grid, grid, where)
        if settings.entry not in OWN_ENTRIES:
            raise ValueError(f'{where}: entry = "{settings.entry}" is not one of {", ".join(OWN_ENTRIES)}')
        if settings.samples_per_rank < 0 or (settings.samples_per_rank and "global_batch_size" in grid.get("workload", {})):
            raise ValueError(f"{where}: samples_per_rank must be positive, and workload.global_batch_size left out with it")
        if settings.repeats < 1:
            raise ValueError(f"{where}: repeats = {settings.repeats} must be at least 1")
        for row_number, table in enumerate(rows, 1):
            _check_row(settings, table, f"{where}, system {row_number}")
        parsed.append((settings, gates, rows))
    return Experiment(figure, about, waits_for, parsed, path)


def _row(table: dict, where: str) -> tuple[Row, dict]:
    """A row and its plan and online settings, which are tables of their own."""
    table, parts = dict(table), {}
    for key, cls in (("plan", ParallelPlan), ("online", OnlineConfig)):
        if key in table:
            parts[key] = from_dict(cls, table.pop(key), f"{where}: {key}")
    if "system" not in table:
        raise ValueError(f'{where}: needs system = "NAME"; known: {", ".join(systems.SYSTEMS)}')
    row = from_dict(Row, table, where)
    try:
        systems.get(row.system)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return row, parts


def _check_row(grid: Grid, table: dict, where: str) -> None:
    row, _ = _row(table, where)
    if grid.entry != "train" and systems.get(row.system).host:
        raise ValueError(f'{where}: "{row.system}" is a program of its own, which has no entry "{grid.entry}"')
    if grid.repeats > 1 and (row.record_trace or row.trace_from or grid.entry != "train"):
        raise ValueError(f"{where}: repeats = {grid.repeats} is for runs that train, without traces: leave it out")


def _tables(value, where: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: expected a list of tables, got {value!r}")
    return value


def _fitting(experiment: Experiment, kind: str, cluster: ClusterSpec) -> list[tuple]:
    return [
        (number, *entry)
        for number, entry in enumerate(experiment.grids, 1)
        if entry[0].cluster == kind
        and entry[0].ranks in (0, cluster.num_ranks)
        and entry[0].min_ranks <= cluster.num_ranks
    ]


def _source(row: Row, by_series: dict[str, Run], where: str) -> Run | None:
    """The run whose recorded trace `row` replays; it must be declared earlier."""
    if not row.trace_from:
        return None
    source = by_series.get(row.trace_from)
    if source is None or not source.config.record_trace:
        raise ValueError(f'{where}: trace_from = "{row.trace_from}" names no run before it with record_trace = true')
    return source


def _gates_of(row: Row, gates: list[GateConfig], where: str) -> list[GateConfig]:
    labels = {capacity_label(gate): gate for gate in gates}
    if unknown := [label for label in row.gates if label not in labels]:
        raise ValueError(
            f"{where}: gates: no capacity {', '.join(unknown)} in this grid; there are: {', '.join(labels)}"
        )
    return [gate for label, gate in labels.items() if not row.gates or label in row.gates]


def _as_repeat(run: Run, repeat: int) -> Run:
    """Repeat number `repeat` of `run`, from 1: the same config with another seed, which initial weights and the order of the
    text follow from."""
    if repeat == 1:
        return run
    seed = run.config.workload.seed + repeat - 1
    config = dataclasses.replace(run.config, workload=dataclasses.replace(run.config.workload, seed=seed))
    return dataclasses.replace(run, run_id=safe_run_id(run.run_id, f"r{repeat}"), config=config, repeat=repeat)


def _merge(runs: dict[str, Run], run: Run) -> Run:
    """Add `run`, or its bars to the equal run that is there already."""
    known = runs.setdefault(run.key, run)
    if known is not run:
        known.bars += [bar for bar in run.bars if bar not in known.bars]
    return known


def _check_bars(runs: list[Run]) -> None:
    seen, folders = {}, {}
    for run in runs:
        for bar in run.bars:
            place = (*bar.values(), run.repeat)
            if place in seen:
                raise ValueError(f"two different runs serve the same bar {bar}: {seen[place]} and {run.run_id}")
            seen[place] = run.run_id
        folder, number = run.folder, folders.get(run.folder, 0) + 1
        folders[folder] = number
        if number > 1:
            run.run_id = safe_run_id(run.run_id, number)


def _filled(plan: ParallelPlan, cluster: ClusterSpec) -> ParallelPlan:
    """`plan` with dp = 0 as all ranks that pp and tp leave, and ep = 0 as all ranks of a stage."""
    if plan.dp == 0 and plan.pp > 0 and plan.tp > 0:
        plan = dataclasses.replace(plan, dp=cluster.num_ranks // (plan.pp * plan.tp))
    return dataclasses.replace(plan, ep=plan.stage_size) if plan.ep == 0 else plan


def _short(plan: ParallelPlan) -> str:
    sizes = [f"{key}{getattr(plan, key)}" for key in ("pp", "vpp", "dp", "tp", "ep") if getattr(plan, key) > 1]
    return "-".join(sizes + ["recompute"] * plan.recompute) or "single"


def _fill(text: str, names: dict, where: str) -> str:
    try:
        return text.format_map(names)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(f'{where}: "{text}": only {{ranks}}, {{gpus}} and {{capacity}} are filled in') from None


def _relative(path: Path, start: Path) -> Path:
    return Path(*[".."] * len(start.parts), path)


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"
