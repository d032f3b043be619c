"""How a piece of a training step is timed, alone or among others, and what its times say of each rank's chip."""

from __future__ import annotations

import dataclasses
import functools
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from smartmoe.bench.busy import WARM_MS, BusyWork, lead_ms
from smartmoe.bench.measure import LeftAloneError, World, spread
from smartmoe.bench.profile_parts import Site
from smartmoe.planner.primitives import Point

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HOST_RUNS = (4, 8)  # the fewest and the most of a piece for its host's time, of which the first is left out
_HOST_SECONDS = 0.02
_MOST_FOR_HOST = 5e-3  # seconds of a piece: what takes longer has launches like those of smaller sizes
# Pieces that make the host wait for the device: it cannot get ahead, and their device time holds their launches.
WAITING = ("optimizer", "optimizer_launches", "experts_loop")
_LEAST_HOST_MS = 2e-3
_TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    """One measurement: the primitive (two, _forward and _backward, when `has_backward`), its sizes, and how to run it.
    busiest: the rank that has the most to do, None = all have the same."""

    name: str
    sizes: dict[str, float]
    build: Callable[[], object]
    has_backward: bool
    is_held_out: bool
    busiest: int | None = None


@dataclass
class _Ready:
    """A case that has run: step and reset of its piece, ms of other work before each run, how often to run it, [iterations,
    parts] ms of the host that launches it (None: not measured), and the marks of its runs."""

    case: Case
    step: Callable
    reset: Callable
    lead: float
    num: int
    host_IP: np.ndarray | None
    runs: list[list] = field(default_factory=list)
    turns: list[int | None] = field(default_factory=list)  # the rank that was hot around each run


class Profiler:
    """Runs cases and keeps their points. Collective: all ranks have the same cases."""

    def __init__(self, world: World, dtype: str, seconds_per_case: float):
        self.site, self.dtype, self.seconds = Site(world, DTYPES[dtype]), dtype, seconds_per_case
        self.points: dict[str, list[Point]] = {}
        self._experts: list[Timed] = []
        self._wait_speedup = 0.0
        self._tell_at = time.monotonic() + _TELL_SECONDS
        self._has_host: set[str] = set()  # names of cases
        self._has_one_clock = world.device.type == "cpu" and len(set(world.share(platform.node()))) == 1
        self._busy = BusyWork(world, self.site.dtype)

    def run(self, cases: list[Case], rounds: int) -> None:
        """Measure cases, in an order of chance: what drifts with time is no rule of sizes. Each for the seconds of a case, all
        runs in a row; or, with rounds > 0, all cases ready at once and one run of each in every round, without a pause and
        behind equally much other work: all meet the same clock, as the layers of a step do. Rounds are of one hot rank each,
        in turn, so that it is seen how much faster a chip is that often waits."""
        draw = np.random.default_rng(0)
        order = [cases[place] for place in draw.permutation(len(cases))]
        if not rounds:
            for place, case in enumerate(order):
                self._tell(f"{place} of {len(order)} pieces")
                self._run_alone(case)
            return
        ready = [found for found in map(self._prepare, order) if found]
        leads = [each.lead for each in ready if each.lead]
        for each in ready:
            each.lead = float(np.mean(leads)) if each.lead else 0.0
        hot = sorted({each.case.busiest for each in ready} - {None}) or [None]
        for number in range(rounds * len(hot)):
            self._tell(f"{number} of {rounds * len(hot)} rounds")
            turn = hot[number % len(hot)]
            those = [each for each in ready if each.case.busiest in (None, turn)]
            self._run_once([those[place] for place in draw.permutation(len(those))], turn)
        for each in ready:
            self._keep(each)

    def _tell(self, words: str) -> None:
        """Say how far it is, now and then, from rank 0."""
        if time.monotonic() > self._tell_at and self.site.world.ep_rank == 0:
            print(f"profiling: {words}", file=sys.stderr, flush=True)
            self._tell_at = time.monotonic() + _TELL_SECONDS

    def _run_alone(self, case: Case) -> None:
        ready = self._prepare(case)
        if ready:
            self._run_once([ready] * ready.num)
            self._keep(ready)

    def _prepare(self, case: Case) -> _Ready | None:
        """Build a case and find how long to be busy before it; None on all ranks when it is out of memory on any. Raises
        LeftAloneError on a rank that is, in a piece in which it should have met others that now wait for it."""
        world = self.site.world
        built, is_alone = [], case.sizes.get("ranks", 1) == 1

        def build():
            made = case.build()
            built.extend(made if isinstance(made, tuple) else (made, lambda: None))

        def first():
            built[0](lambda: None)

        # a piece in which ranks meet begins when all have built it
        for calls in ((build, first),) if is_alone else ((build,), (first,)):
            if not self._fits(case, calls):
                return None
        step, reset = built
        reset()
        step(lambda: None)
        reset()
        world.synchronize()
        start = time.perf_counter()
        step(lambda: None)
        launched = time.perf_counter() - start
        world.synchronize()
        took = world.largest(time.perf_counter() - start)
        reset()
        num, num_parts = int(np.clip(self.seconds / max(took, 1e-6), 5, 25)), 1 + case.has_backward
        if world.device.type != "cuda":
            lead, host_IP = 0.0, np.zeros((1, num_parts))
        elif case.name in WAITING:
            lead, host_IP = 0.0, np.full((1, num_parts), _LEAST_HOST_MS)
        else:
            lead, host_IP = lead_ms(1e3 * launched, 1e3 * took), None
            if took < _MOST_FOR_HOST or case.name not in self._has_host:
                if case.has_backward:  # _launch_ms runs it twice at once
                    if not self._fits(case, (lambda: step(lambda: None, copies=2),)):
                        return None
                    reset()
                host_IP = self._launch_ms(step, reset, case.has_backward, int(np.clip(_HOST_SECONDS / took, *_HOST_RUNS)))
                self._has_host |= set() if case.is_held_out else {case.name}
        return _Ready(case, step, reset, lead, num, host_IP)

    def _fits(self, case: Case, calls: Iterable[Callable]) -> bool:
        """Call them in turn: whether there was memory for it on all ranks. A rank that went on alone would wait for those that
        did not. Raises LeftAloneError where there was not, and others say nothing: they wait in the piece for this rank."""
        try:
            for call in calls:
                call()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        try:
            return all(self.site.world.share(fits))
        except LeftAloneError as error:
            if fits:
                raise
            raise LeftAloneError(
                f"rank {self.site.world.ep_rank}: out of memory in a first run of {case.name} with {case.sizes}, in which "
                f"ranks meet, and others wait for it there: profile fewer --tokens or smaller --shapes, or free its memory"
            ) from error

    def _run_once(self, order: list[_Ready], turn: int | None = None) -> None:
        """Each of them in turn, as often as it is named. turn: the hot rank of these."""
        self._busy.launch(WARM_MS)
        for ready in order:
            ready.runs.append(self._once(ready.step, ready.reset, ready.lead)[0])
            ready.turns.append(turn)
        self.site.world.synchronize()

    def _keep(self, ready: _Ready) -> None:
        """Make points of what was measured."""
        case, marks_IM = ready.case, [[self._passed(run[0], mark) for mark in run] for run in ready.runs]
        words = self.site.world.share({"marks": marks_IM, "host": None if ready.host_IP is None else ready.host_IP.tolist()})
        marks_WIM = np.array([w["marks"] for w in words])
        device_IP = slowest_parts(marks_WIM, self._has_one_clock)
        if ready.host_IP is not None:
            host_WIP = np.array([w["host"] for w in words])
            host_IP = host_WIP[np.median(host_WIP, axis=1).sum(1).argmax()]
        if case.name == "experts":
            took_WI, turns = marks_WIM[:, :, -1] - marks_WIM[:, :, 0], np.array(ready.turns, dtype=object)
            for turn in dict.fromkeys(ready.turns):
                times_W = np.median(took_WI[:, turns == turn], axis=1)
                self._experts.append(Timed(case, len(self.points.get("experts_forward", [])), turn, times_W))
        names = [f"{case.name}_forward", f"{case.name}_backward"] if case.has_backward else [case.name]
        for part, name in enumerate(names):
            host = {} if ready.host_IP is None else spread(host_IP[:, part])
            device = {key: max(value, 1e-5) for key, value in spread(device_IP[:, part]).items()}
            self.points.setdefault(name, []).append(Point(case.sizes, device, host, case.is_held_out))

    def settle(self) -> dict:
        """Bring times of experts to those that the slowest rank has when it never waits. Returns the facts "rank_pace", for
        each rank its time over the slowest's for the same products, and "wait_speedup" (see rank_pace; in rounds from their
        waiting, else from work that waits in turns). Collective."""
        num_ranks = self.site.world.num_ranks
        if self._has_one_clock or not self._experts:
            return {"rank_pace": [1.0] * num_ranks, "wait_speedup": 0.0}
        pace_W, speedup, pace_of_turn = rank_pace(self._experts, num_ranks)
        if len(pace_of_turn) == 1:  # all waited equally little: it says nothing
            speedup = float(np.mean(self.site.world.share(self._busy.wait_speedup())))
        seen: dict[int, list[float]] = {}
        for timed in self._experts:
            pace_of_run_W, busiest = pace_of_turn[timed.turn], timed.case.busiest
            seen.setdefault(timed.place, []).append(pace_of_run_W.max() if busiest is None else pace_of_run_W[busiest])
        for name in ("experts_forward", "experts_backward"):
            for place, paces in seen.items():
                point = self.points[name][place]
                slowest = {key: ms / float(np.mean(paces)) for key, ms in point.device_ms.items()}
                self.points[name][place] = dataclasses.replace(point, device_ms=slowest)
        return {"rank_pace": pace_W.round(4).tolist(), "wait_speedup": round(speedup, 4)}

    def _launch_ms(self, step, reset, has_backward: bool, num_runs: int) -> np.ndarray:
        """[runs, parts] ms of the host. It launches onto an idle device, as one that is behind does: launches behind much other
        work take it longer. Of a piece with a backward part it is what a second one adds: a step has many in a row, and what
        wakes up at the first, such as the thread of backward passes, does so once for all of them."""
        found = []
        for each in (functools.partial(step, copies=copies) for copies in (1, 2)) if has_backward else (step,):
            runs = []
            for _ in range(num_runs):
                self.site.world.synchronize()
                runs.append(self._once(each, reset, 0.0)[1])
            # the marks' own time on the host is between the two that they note
            found.append(1e3 * np.diff(np.array(runs), axis=1)[1:, 1::2])
        if has_backward:
            return np.maximum(found[1] - np.median(found[0], axis=0), _LEAST_HOST_MS)
        return found[0]

    def _once(self, step, reset, lead):
        world, device, host = self.site.world, [], []
        is_cuda = world.device.type == "cuda"

        def mark():
            host.append(time.perf_counter())
            if is_cuda:
                device.append(torch.cuda.Event(enable_timing=True))
                device[-1].record()
            else:
                device.append(host[-1])
            host.append(time.perf_counter())

        if lead:  # the host gets ahead, so that no launch is in the device's time
            self._busy.launch(lead)
        world.align()
        mark()
        step(mark)
        mark()
        reset()
        return device, host

    @staticmethod
    def _passed(first, mark) -> float:
        if isinstance(mark, float):
            return mark * 1e3
        return 0.0 if mark is first else first.elapsed_time(mark)


@dataclass(frozen=True)
class Timed:
    """Experts of one case in rounds of one hot rank: the place of its points, the hot rank, and the ms of each rank."""

    case: Case
    place: int
    turn: int | None
    times_W: np.ndarray


def rank_pace(timed: list[Timed], num_ranks: int) -> tuple[np.ndarray, float, dict]:
    """([ranks] time of each rank over that of the slowest for the same products; by how much, as a logarithm, a rank that
    waited for others all of the time would be faster than one that never does; by hot rank, [ranks] time of each over that of
    the slowest when it never waits).

    A chip at its limit of power has what is left of it by waiting for its next products: which one that is depends on the loads
    of the last tenth of a second, not on its own. Least squares of logarithms of the times of those ranks that had a case's
    sizes to do (all, or the busiest one), held-out ones excepted: an unknown for each size, one for each rank, and one for the
    mean share of time that the rank waited in these rounds.
    """
    wait = {}
    for turn in dict.fromkeys(row.turn for row in timed):
        those = [row.times_W for row in timed if row.turn == turn]
        wait[turn] = np.mean([1 - times_W / times_W.max() for times_W in those], axis=0)
    idx_of_size, seen = {}, []
    for row in (row for row in timed if not row.case.is_held_out):
        size_idx = idx_of_size.setdefault(tuple(sorted(row.case.sizes.items())), len(idx_of_size))
        ranks = range(num_ranks) if row.case.busiest is None else (row.case.busiest,)
        seen += [(size_idx, rank, wait[row.turn][rank], np.log(row.times_W[rank])) for rank in ranks]
    num_sizes = len(idx_of_size)
    matrix = np.zeros((len(seen), num_sizes + num_ranks + 1))
    for place, (size_idx, rank, waited, _) in enumerate(seen):
        matrix[place, [size_idx, num_sizes + rank]] = 1.0
        matrix[place, -1] = -waited if len(wait) > 1 else 0.0
    found = np.linalg.lstsq(matrix, np.array([row[-1] for row in seen]), rcond=None)[0]
    pace_W, speedup = np.exp(found[num_sizes:-1]), max(float(found[-1]), 0.0)
    pace_W /= pace_W.max()
    return pace_W, speedup, {turn: pace_W * np.exp(-speedup * wait_W) for turn, wait_W in wait.items()}


def slowest_parts(marks_WIM: np.ndarray, one_clock: bool) -> np.ndarray:
    """[iterations, parts] ms of the slowest rank, of the times at which each rank passed its marks.

    With one clock for all ranks a part ends when the last rank has ended it, and the first begins when the first rank does:
    ranks that wait for a core, because there are fewer cores than ranks, wait in a training step as well.
    """
    if not one_clock:
        return np.diff(marks_WIM, axis=2).max(0)
    ends_IM = marks_WIM.max(0)
    ends_IM[:, 0] = marks_WIM[:, :, 0].min(0)
    return np.diff(ends_IM, axis=1)
