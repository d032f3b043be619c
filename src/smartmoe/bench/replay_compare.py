"""One MoE layer replays a trace under several ways of placing experts, side by side: what each gains and costs.

Rank r of the world takes the counts of rank r of the trace (starting over where the trace has fewer), micro-batch m those of
micro-batch m, scaled to T tokens x K; tokens and weights are the same in all modes. A recorded iteration stands for as many
training iterations as the trace steps by. In one that is timed, each mode does one training step (forward and backward of
all micro-batches, and what online placement does after a step), all modes in random order, and that --repeat times; in the
others those modes that decide do one step, untimed. A decision falls due after the last step of a recorded iteration only:
it knows the iterations before, never the one it serves, except exact replication, which decides from each micro-batch's own
counts.

ms of an iteration = median of its steps + what the decisions since the iteration timed before took / the training
iterations since then + what placement does after every step ("control") / NUM_LAYERS, as it does that for all layers of a model
at once. Weight sends and gradient returns are inside every step. The slowest rank counts.
A GPU idles --lead-cycles before each step, so that the host is ahead of it as in training; "late" is the share of steps
that began before the host had launched all of them, because they wait for the host or because it was too slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from smartmoe.bench.measure import LeftAloneError, World, attempt, spread
from smartmoe.bench.replay_goals import format_verdict, judge, late_note
from smartmoe.bench.replay_players import MODES, Player, Step, Tokens
from smartmoe.bench.report import DTYPES, Report, dtype_of
from smartmoe.bench.shapes import Shape, parse_shape
from smartmoe.config import (
    ClusterSpec,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
    load,
)
from smartmoe.trace import ExpertTrace, read_trace

NUM_LEAD_IN = 20  # recorded iterations before the first timed one, in which decisions are taken
NUM_LAYERS = 24  # of the model of the published trace
NUM_SYNTHETIC = 20  # timed iterations of the cases that need no trace


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which recorded iterations are played (rows of the trace), and which of them are timed."""

    rows: tuple[int, ...]
    timed: frozenset[int]
    stride: int  # training iterations from one recorded iteration to the next

    @classmethod
    def of(cls, trace: ExpertTrace, every: int, iteration: int | None, limit: int | None) -> Schedule:
        """Every `every`-th recorded iteration, at most `limit`; or the one numbered `iteration`. Raises ValueError."""
        stride = int(np.median(np.diff(trace.iteration))) if len(trace.iteration) > 1 else 1
        timed = range(0, len(trace.iteration), every)[:limit]
        if iteration is not None:
            timed = np.flatnonzero(trace.iteration == iteration).tolist()
            if not timed:
                span = f"{trace.iteration[0]} .. {trace.iteration[-1]} in steps of {stride}"
                raise ValueError(f"--iteration {iteration}: the trace has {span}")
        return cls(rows=tuple(range(max(0, timed[0] - NUM_LEAD_IN), timed[-1] + 1)), timed=frozenset(timed), stride=stride)

    def online(self, online: OnlineConfig, repeat: int) -> OnlineConfig:
        """`online` with its interval in the numbers of steps. Raises ValueError when the trace steps by too much."""
        if online.policy == "static":
            return online
        if online.interval % self.stride:
            raise ValueError(f"the trace steps by {self.stride} iterations: no decisions every {online.interval}")
        if self._is_natural(repeat):
            return online
        return dataclasses.replace(online, interval=online.interval // self.stride * repeat)

    def numbers(self, row: int, iteration: int, repeat: int) -> list[int]:
        """Of the steps of a recorded iteration: training iterations where it stands for enough of them, else steps are
        counted. Decisions fall due at even numbers or multiples of `repeat`, and of these each row has one, its last."""
        if self._is_natural(repeat):
            last = -(-iteration // self.stride) * self.stride
            return [*range(last - self.stride + 1, last - self.stride + 2 * repeat - 2, 2), last]
        return [row * repeat + step + 1 for step in range(repeat)]

    def _is_natural(self, repeat: int) -> bool:
        return self.stride >= 2 * repeat and self.stride % 2 == 0


def play(players: dict[str, Player], schedule: Schedule, trace: ExpertTrace, args, say) -> dict:
    """Play the trace with all modes, this rank's times by mode. Collective."""
    tokens, world = next(iter(players.values())).tokens, next(iter(players.values())).world
    kept = ("step_ms", "control_ms", "decision_ms", "late", "load", "num_moved", "difference")
    seen = {name: {key: [] for key in kept} for name in players}
    deciding: dict[str, list[Step]] = {name: [] for name in players}  # steps with events since the last timed iteration
    start, order = time.perf_counter(), np.random.default_rng(args.seed)
    for row in schedule.rows:
        is_timed = row in schedule.timed
        numbers = schedule.numbers(row, int(trace.iteration[row]), args.repeat)
        tokens.set_iteration(trace.counts[row, :, args.layer], row)
        playing = {name: player for name, player in players.items() if is_timed or player.replayed.decides}
        loads = {name: player.load_max_over_mean() for name, player in playing.items() if is_timed}
        steps: dict[str, list[Step]] = {name: [] for name in playing}
        for number in numbers if is_timed else numbers[-1:]:
            for name in order.permutation(list(playing)):  # the same on all ranks; nobody always follows the same one
                steps[name].append(playing[name].step(number, args.lead_cycles if is_timed else 0))
        for name, done in steps.items():
            deciding[name] += [step for step in done if step.events]
        if not is_timed:
            continue  # without waiting for the device
        world.synchronize()
        for name, done in steps.items():
            _note(seen[name], done, deciding[name], loads[name])
            seen[name]["difference"].append(_difference(players[name], players.get("static")))
            deciding[name] = []
        medians = "  ".join(f"{name} {np.median(s['step_ms'][-1]):.2f}" for name, s in seen.items())
        say(f"iteration {trace.iteration[row]} ({time.perf_counter() - start:.0f} s): {medians} ms")
    return seen


def _note(series: dict, done: list[Step], deciding: list[Step], load: float) -> None:
    series["step_ms"].append([step.parts_ms()[0] for step in done])
    series["control_ms"].append([step.parts_ms()[1] for step in done if not step.events])
    series["decision_ms"].append([step.parts_ms()[1] for step in deciding])
    series["num_moved"].append(sum(event["num_moved"] for step in deciding for event in step.events))
    series["late"].append(float(np.mean([step.is_late for step in done])))
    series["load"].append(load)


def _difference(player: Player, reference: Player | None) -> float | None:
    """Largest relative distance (2-norm) of output and input gradient of the last step from those of `reference`."""
    if reference is None or player.mode.forced:
        return None
    pairs = zip(player.result, reference.result, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs)


def summarise(seen_W: list[dict], schedule: Schedule, trace: ExpertTrace) -> dict[str, dict]:
    """The numbers of each mode from every rank's times; ms, the slowest rank in each step."""
    timed = sorted(schedule.timed)
    # training iterations since the one timed before, in which the decisions fell
    gaps = np.diff([schedule.rows[0] - 1, *timed]) * schedule.stride
    rows = {}
    for name in seen_W[0]:
        step_IR = [np.max([seen[name]["step_ms"][i] for seen in seen_W], axis=0) for i in range(len(timed))]
        cost_I = [np.max([seen[name]["decision_ms"][i] for seen in seen_W], axis=0) for i in range(len(timed))]
        step_ms = np.array([np.median(steps) for steps in step_IR])
        control_IR = [np.max([seen[name]["control_ms"][i] for seen in seen_W], axis=0) for i in range(len(timed))]
        control_ms = float(np.median(np.concatenate(control_IR))) if any(map(len, control_IR)) else 0.0
        charged_ms = step_ms + np.array([cost.sum() for cost in cost_I]) / gaps + control_ms / NUM_LAYERS
        known = [d for seen in seen_W for d in seen[name]["difference"] if d is not None]
        rows[name] = {
            "ms": spread(charged_ms),
            "step_ms": spread(step_ms),
            "decision_ms": spread(np.concatenate(cost_I)) if any(map(len, cost_I)) else None,
            "control_ms": round(control_ms, 5),
            "num_decisions": sum(map(len, cost_I)),
            "num_moved": sum(seen_W[0][name]["num_moved"]),
            "load_max_over_mean": spread(seen_W[0][name]["load"]),
            "late": round(float(np.mean([seen[name]["late"] for seen in seen_W])), 3),
            "difference": max(known, default=None),
            "series": {
                "iteration": trace.iteration[timed].tolist(),
                "ms": np.round(charged_ms, 5).tolist(),
                "step_ms": np.round(step_ms, 5).tolist(),
                "load_max_over_mean": np.round(seen_W[0][name]["load"], 4).tolist(),
                "num_moved": seen_W[0][name]["num_moved"],
            },
        }
    for row in rows.values():
        ms_I = np.array(row["series"]["ms"])
        for forced in ("even", "uniform"):
            if forced in rows:
                share_I = np.array(rows[forced]["series"]["ms"]) / ms_I
                row[f"share_of_{forced}"] = {"mean": round(float(share_I.mean()), 4), **spread(share_I)}
        for other in ("static", "shadowing"):
            if other in rows:
                row[f"speedup_over_{other}"] = spread(np.array(rows[other]["series"]["ms"]) / ms_I)
    return rows


COLUMNS = (
    "shape          case             mode        median ms (p10 - p90)  of even groups (p10)  of uniform  over static  "
    "max/mean (p90)   decision ms    n  moved  late  diff"
)


def format_row(row: dict) -> str:
    start = f"{row['shape']:14.14s} {row['case']:16.16s} {row['mode']:10.10s}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    ms, load, decision = row["ms"], row["load_max_over_mean"], row["decision_ms"]
    even, uniform, speedup = (row.get(key) for key in ("share_of_even", "share_of_uniform", "speedup_over_static"))
    return (
        f"{start} {ms['median']:9.3f} ({ms['p10']:.3f} - {ms['p90']:.3f})".ljust(68)
        + (f"{even['median']:12.1%} ({even['p10']:5.1%})" if even else " " * 20)
        + (f"{uniform['median']:12.1%}" if uniform else " " * 12)
        + (f"{speedup['median']:13.3f}" if speedup else " " * 13)
        + f"  {load['median']:7.3f} ({load['p90']:.3f})"
        + (f"{decision['median']:14.3f}" if decision else " " * 13 + "-")
        + f" {row['num_decisions']:4d} {row['num_moved']:6d} {row['late']:5.0%}  "
        + ("-" if row["difference"] is None else f"{row['difference']:.0e}")
    )


# ------------------------------------------------------------------------------------------------------------ cases


CASES = {
    "trace": "the trace of --trace",
    "even": "every expert gets as many tokens: what it costs to have a mode switched on",
    "uniform": "the same with routing drawn uniformly at random",
    "hot80": "top-1 routing with 80 % of the tokens on one expert",
}


def shape_of(text: str) -> Shape:
    """A shape as `parse_shape` knows it, or the MoE layer and the micro-batch of a run's .toml. Raises ValueError."""
    if not text.endswith(".toml"):
        return parse_shape(text)
    config = load(text)
    model = config.model
    return Shape(name=Path(text).stem, num_tokens=config.workload.micro_batch_size * model.seq_len,
                 width=model.hidden_size, ffn=model.ffn_size, num_experts=model.num_experts, top_k=model.top_k,
                 activation=model.activation)  # fmt: skip


def compare(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has. Collective."""
    named = ("seed", "note", "trace", "layer", "iteration", "every", "limit", "repeat", "micro_batches", "dispatcher",
             "replica_slots", "lead_cycles")  # fmt: skip
    settings = {"dtype": dtype_of(args), "how": __doc__, **{name: getattr(args, name) for name in named}}
    report = Report("replay", world, args.json, settings, ("shape", "case", "mode"))
    report.say(f"{world.num_ranks} x {report.data['provenance']['device']}, {dtype_of(args)}, dispatcher "
               f"{args.dispatcher}. Slowest rank; with the cost of decisions and moves.\n{COLUMNS}")  # fmt: skip
    try:
        for case in args.cases:
            for shape in args.shapes:
                _run_case(args, case, shape, world, report)
    except LeftAloneError as error:
        report.give_up(error)
    verdicts = judge(report.data["rows"])
    report.note("goals", verdicts)
    report.say("\n".join([*map(format_verdict, verdicts), late_note(report.data["rows"])]))
    return report.data


def _run_case(args, case: str, shape: Shape, world: World, report: Report) -> None:
    if case == "hot80":
        shape = dataclasses.replace(shape, top_k=1)
    opened: list = []
    status, reason, _ = attempt(world, lambda: opened.append(_open(args, case, shape)))
    outcomes = dict.fromkeys(args.modes, (status, reason))
    rows: dict[str, dict] = {}
    if status == "ok":
        trace, schedule = opened[0]
        outcomes, rows = _measure(args, trace, schedule, shape, world, report)
    for name, (status, reason) in outcomes.items():
        row = {"shape": shape.name, "case": _label(args, case), "mode": name, "about": MODES[name].about,
               "sizes": asdict(shape), "status": status, "reason": reason, **rows.get(name, {})}  # fmt: skip
        report.begin(row)
        report.end(row, format_row(row))


def _measure(args, trace, schedule, shape, world, report) -> tuple[dict[str, tuple[str, str]], dict[str, dict]]:
    """(status and reason of each mode, numbers of those that are ok). A mode that cannot be made is left out."""
    tokens = Tokens(shape, world, DTYPES[dtype_of(args)], args.seed, args.micro_batches)
    tokens.set_iteration(trace.counts[schedule.rows[0], :, args.layer], schedule.rows[0])
    outcomes, players, seen = {}, {}, []
    for name in args.modes:
        made = attempt(world, lambda name=name: players.update({name: _player(args, name, schedule, tokens)}))
        outcomes[name] = made[:2]
        if made[0] != "ok":
            players.pop(name, None)
    if not players:
        return outcomes, {}
    played = attempt(world, lambda: seen.append(play(players, schedule, trace, args, report.say)))
    if played[0] != "ok":
        return {name: played[:2] if name in players else outcome for name, outcome in outcomes.items()}, {}
    return outcomes, summarise(world.share(seen[0]), schedule, trace)


def _label(args, case: str) -> str:
    if case != "trace":
        return case
    return f"it {args.iteration} L{args.layer}" if args.iteration is not None else f"L{args.layer}"


def _open(args, case: str, shape: Shape) -> tuple[ExpertTrace, Schedule]:
    if case == "even":
        counts = np.ones((NUM_SYNTHETIC, 1, args.layer + 1, 1, shape.num_experts), np.int32)
        trace = ExpertTrace(counts, np.arange(1, NUM_SYNTHETIC + 1))
        return trace, Schedule.of(trace, 1, None, args.limit)
    source = {"uniform": "synthetic:uniform", "hot80": "synthetic:one-hot,share=0.8"}.get(case, args.trace)
    if source is None:
        raise ValueError("give --trace FILE, or --cases even uniform hot80, which need none")
    num_rows = NUM_SYNTHETIC * args.every
    copies = shape.num_tokens * shape.top_k
    trace = read_trace(source, experts=shape.num_experts, iterations=num_rows, layers=args.layer + 1, copies=copies)
    num_layers, num_experts = trace.counts.shape[2], trace.counts.shape[4]
    if num_experts != shape.num_experts or not 0 <= args.layer < num_layers:
        raise ValueError(f"{source} has {num_experts} experts and layers 0 .. {num_layers - 1}; asked for are "
                         f"{shape.num_experts} experts and layer {args.layer}")  # fmt: skip
    iteration = args.iteration if case == "trace" else None
    return trace, Schedule.of(trace, args.every, iteration, args.limit)


def _player(args, name: str, schedule: Schedule, tokens: Tokens) -> Player:
    """Made and warmed up."""
    mode, shape, world = MODES[name], tokens.shape, tokens.world
    online = dataclasses.replace(mode.online, replica_slots=args.replica_slots if mode.online.replicate != "never" else 0)
    # what the shadowing rule is told of the cluster: of this GPU, or of a CPU, as in scripts/clusters
    speeds = {"intra_node_gbytes_per_s": 350.0, "tflops": 700.0} if world.device.type == "cuda" else {}
    config = check(RunConfig(
        model=ModelConfig(hidden_size=shape.width, ffn_size=shape.ffn, num_heads=1, seq_len=shape.num_tokens,
                          num_experts=shape.num_experts, top_k=shape.top_k, activation=shape.activation,
                          expert_bias=False),
        layer=mode.layer or LayerConfig(dispatcher=args.dispatcher, row_factor=float(world.num_ranks)),
        online=online,
        workload=Workload(global_batch_size=world.num_ranks * args.micro_batches, micro_batch_size=1, seed=args.seed,
                          dtype=dtype_of(args)),
        plan=ParallelPlan(dp=world.num_ranks, ep=world.num_ranks),
        cluster=ClusterSpec(device=world.device.type, ranks_per_node=world.num_ranks, memory_gbytes=1e3, **speeds),
    ), name)  # fmt: skip
    return Player(mode, config, schedule.online(online, args.repeat), tokens)
