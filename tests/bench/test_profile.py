import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smartmoe.bench import measure, profile_cluster, profiler
from smartmoe.bench import profile_parts as parts
from smartmoe.bench.busy import BusyWork, speedup_of_waiting
from smartmoe.config import ClusterSpec, ParallelPlan, RunConfig, slowed
from smartmoe.ops import expert_ffn
from smartmoe.ops.activation import activate_rows_backward
from smartmoe.planner import inputs
from smartmoe.planner.primitives import EXCHANGES, KINDS, Point, Primitives, Profile
from tests.dist import spawn

TINY = ["--device", "cpu", "--shapes", "16,32,2,4,2,32,300", "--tokens", "16", "64", "128", "--seconds", "0.001"]


SLOW = 0.002  # GB/s


def _run(_world_rank, path, slow):
    world = measure.start_world("cpu")
    profile_cluster.run(profile_cluster.parse_args([*TINY, "--out", str(path)]), world)
    few = [*TINY[:4], "--tokens", "16", "--seconds", "0.001"]
    args = profile_cluster.parse_args([*few, "--slow-links", str(SLOW), "--out", str(slow)])
    profile_cluster.run(args, world)
    _leave_out_what_is_too_large(world)
    _end_where_others_wait(world)


def _leave_out_what_is_too_large(world):
    """Too large for one rank, when it is built or when it first runs: the ranks go on together."""

    def full(*_):
        if world.ep_rank:
            raise torch.OutOfMemoryError
        return lambda mark: None

    def grown(mark):
        full()

    for rounds in (0, 2):
        timer = profiler.Profiler(world, "float32", 0.001)
        builds = {"launch": lambda: lambda mark: None, "optimizer": full, "by_sample": lambda: grown}
        sizes = {"ranks": 1 + rounds}  # alone, and together
        timer.run([profiler.Case(name, sizes, build, False, False) for name, build in builds.items()], rounds)
        assert list(timer.points) == ["launch"]


def _end_where_others_wait(world):
    """Too large for one rank when others are on their way into an exchange with it: that rank says so, and would leave."""
    measure.PATIENCE_S = 1.0

    def exchange(mark):
        if world.ep_rank:
            raise torch.OutOfMemoryError
        torch.distributed.barrier()

    timer = profiler.Profiler(world, "float32", 0.001)
    cases = [profiler.Case("direct", {"ranks": 2}, lambda: exchange, True, False)]
    if world.ep_rank:
        says = "rank 1: out of memory in a first run of direct with {'ranks': 2}, .* others wait .* --tokens"
        with pytest.raises(measure.LeftAloneError, match=says):
            timer.run(cases, 0)
        torch.distributed.barrier()  # here it lets the others go
    else:
        timer.run(cases, 0)
    assert not timer.points


def test_a_rank_that_is_left_alone_ends_its_process(monkeypatch, capsys):
    """Others wait in an exchange, and only the launcher can end them, which it does when one process ends."""

    def lost(*_):
        raise measure.LeftAloneError("no memory")

    ended = []
    monkeypatch.setattr(profile_cluster, "run", lost)
    monkeypatch.setattr(profile_cluster.os, "_exit", ended.append)
    profile_cluster.run_or_leave(None, None)
    assert ended == [1] and capsys.readouterr().err == "no memory\n"


def test_two_ranks_profile_every_primitive(tmp_path):
    path = tmp_path / "profile.json"
    spawn(_run, 2, path, tmp_path / "slow.json")
    profile = Profile.load(path)
    assert set(profile.points) == set(KINDS)
    assert profile.facts["rank_pace"] == [1.0, 1.0]  # cores are shared
    assert profile.facts["ranks"] == 2 and profile.facts["torch"] and profile.dtype == "float32"
    assert any(p.held_out for points in profile.points.values() for p in points)
    exchange = profile.points["all_to_all"]
    assert len({p.sizes["intra_bytes"] for p in exchange}) > 5 and all(p.sizes["inter_bytes"] == 0 for p in exchange)
    primitives = Primitives.fit(profile)
    for name, kind in KINDS.items():
        assert primitives.ms(name, **dict.fromkeys(kind.sizes, 64)) > 0
    assert "held-out sizes" in profile_cluster.format_errors(profile, 1.0)
    assert json.loads(path.read_text())["facts"]["seconds"] > 0
    slow = Profile.load(tmp_path / "slow.json")
    for name in EXCHANGES:
        for point in slow.points[name]:
            assert point.device_ms["p10"] >= point.sizes["intra_bytes"] / SLOW / 1e6, (name, point)
    assert all(point.sizes["ranks"] == 1 for point in slow.points["direct_forward"])  # nothing slows stores down
    run = RunConfig(cluster=ClusterSpec(ranks_per_node=2), plan=ParallelPlan(dp=2))
    for found, cluster in ((profile, slowed(run.cluster, SLOW)), (slow, run.cluster)):
        with pytest.raises(
            ValueError, match="p.json was measured with links .*, this is about links .* smartmoe profile"
        ):
            inputs.check_links(found, cluster, "p.json")
    inputs.check_links(slow, slowed(run.cluster, SLOW), "p.json")


def test_rows_of_an_exchange_and_sizes_between():
    assert profile_cluster.parts.share_rows(100, 4, 1.0).tolist() == [25] * 4
    assert profile_cluster.parts.share_rows(100, 2, 1.5).tolist() == [75, 25]
    assert profile_cluster.parts.share_rows(100, 2, 0.0).tolist() == [0, 100]
    assert profile_cluster.token_grid([64, 128, 256]) == [(64, False), (128, False), (256, False), (96, True)]


def test_times_of_one_chip_become_those_of_the_slowest():
    timer = profiler.Profiler.__new__(profiler.Profiler)
    world = SimpleNamespace(num_ranks=2, share=lambda word: [word, word + 0.1])
    timer._has_one_clock, timer.site = False, SimpleNamespace(world=world)
    timer._busy = SimpleNamespace(wait_speedup=lambda: 0.2)
    point = Point({}, dict.fromkeys(("median", "p10", "p90"), 3.0), {})
    timer.points = {name: [point] * 4 for name in ("experts_forward", "experts_backward")}
    # the second and the third have the same rows, each on its own rank while the other has few
    timed = [(10, None, [0.8, 1.0]), (30, 0, [2.4, 0.1]), (30, 1, [0.1, 3.0]), (20, None, [1.6, 2.0])]
    timer._experts = [
        profiler.Timed(_case(rows, busiest), place, None, np.array(times_W))
        for place, (rows, busiest, times_W) in enumerate(timed)
    ]
    assert timer.settle() == {"rank_pace": [0.8, 1.0], "wait_speedup": 0.25}
    for found in timer.points.values():
        assert [point.device_ms["median"] for point in found] == pytest.approx([3.0, 3.0 / 0.8, 3.0, 3.0])
    for some in (timer._experts[1:3], timer._experts[::3]):  # either kind tells
        assert profiler.rank_pace(some, 2)[0] == pytest.approx([0.8, 1.0])


def _case(rows, busiest, is_held_out=False):
    return profile_cluster.both_ways("experts", {"rows": rows}, is_held_out, None, busiest)


def test_held_out_sizes_tell_nothing_of_the_chips():
    alike = [profiler.Timed(_case(rows, None), 0, None, np.array([0.8, 1.0]) * rows) for rows in (10, 20)]
    held = [profiler.Timed(_case(15, None, is_held_out=True), 0, None, np.array([30.0, 15.0]))] * 9
    assert profiler.rank_pace([*held, *alike], 2)[0] == pytest.approx([0.8, 1.0])


def test_a_piece_that_does_not_fit_twice_is_left_out():
    """The host's time of a piece with a backward part is what a second one adds."""

    def step(mark, copies=1):
        if copies == 2:
            raise torch.OutOfMemoryError

    timer = profiler.Profiler.__new__(profiler.Profiler)
    world = SimpleNamespace(device=torch.device("cuda"), synchronize=lambda: None, share=lambda word: [word], largest=float)
    timer.site, timer.seconds, timer._has_host = SimpleNamespace(world=world), 0.001, set()
    assert timer._prepare(profiler.Case("experts", {}, lambda: step, True, False)) is None

    def wait(fits):
        if not fits:
            raise measure.LeftAloneError("another rank is stuck")
        return [fits]

    world.share, world.ep_rank = wait, 1
    with pytest.raises(measure.LeftAloneError, match="rank 1: out of memory .* direct with {'ranks': 2}"):
        timer._prepare(profiler.Case("direct", {"ranks": 2}, lambda: step, True, False))


def test_a_chip_that_waits_is_faster():
    """Each of two ranks is hot in its rounds: all of its pieces are faster by what it waits there."""
    size, pace, speedup, hot_ms, wait = 10.0, np.array([0.9, 1.0]), 0.4, 30.0, 0.0
    for _ in range(50):  # what the cold rank waits, in the mean, follows from its times, and these from it
        clock = {0: pace * np.exp(-speedup * np.array([0.0, wait])), 1: pace * np.exp(-speedup * np.array([wait, 0.0]))}
        timed = [profiler.Timed(_case(10, None), 0, turn, size * clock[turn]) for turn in (0, 1)]
        for turn in (0, 1):
            cold_ms = np.where(np.arange(2) == turn, hot_ms * clock[turn], 1.0)
            timed.append(profiler.Timed(_case(30, turn), 1 + turn, turn, cold_ms))
        waits = [np.mean([1 - t.times_W / t.times_W.max() for t in timed if t.turn == turn], axis=0) for turn in (0, 1)]
        wait = np.mean([waits[0][1], waits[1][0]])
    pace_W, found, _ = profiler.rank_pace(timed, 2)
    assert pace_W == pytest.approx(pace, rel=0.02) and found == pytest.approx(speedup, rel=0.1)
    timer = profiler.Profiler.__new__(profiler.Profiler)
    world = SimpleNamespace(num_ranks=2, share=lambda word: [word, word + 0.1])
    timer._has_one_clock, timer.site = False, SimpleNamespace(world=world)
    timer._busy = SimpleNamespace(wait_speedup=lambda: 0.2)
    points = [hot_ms * clock[turn][turn] for turn in (0, 1)]
    points = [Point({}, {"median": ms}, {}) for ms in (size, *points)]
    timer.points, timer._experts = {name: list(points) for name in ("experts_forward", "experts_backward")}, timed
    timer.settle()  # both hot points are one again
    assert [p.device_ms["median"] for p in timer.points["experts_forward"][1:]] == pytest.approx([30.0, 30.0], rel=0.02)


def test_waiting_between_turns_of_work_tells_the_speedup():
    """A quarter of the time is waiting, and work is faster by 0.05 as a logarithm: 0.2 for all of the time. No slower clock."""
    alone, waiting = np.array([[3.0, 0.0], [3.0, 0.0], [9.0, 0.0]]), np.array([[3.0, 1.0], [3.0, 1.0], [1.0, 9.0]])
    assert speedup_of_waiting(alone * np.exp(0.05), waiting) == pytest.approx(0.2)
    assert speedup_of_waiting(alone * np.exp(-0.05), waiting) == 0.0


class _Event:
    """An event of a GPU whose clock is `now`, in ms."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = self.now

    def elapsed_time(self, then):
        return then.at - self.at


def test_turns_of_work_with_waits_and_without_tell_the_speedup(monkeypatch):
    """Played on a GPU that is not there: its power is limited from 250 ms on, and waiting leaves 0.2."""
    busy, waits = BusyWork(measure.World(torch.device("cpu")), torch.float32), []
    assert busy.wait_speedup() == 0.0
    busy.unit_ms = 0.4

    def unit():
        hot = np.exp(0.2 * (1.0 - 0.5 * bool(waits)))  # waits are as long as the work: half of the time
        _Event.now += 0.4 * (hot if _Event.now > 250 else 1.0)

    def sleep(cycles):
        waits.append(cycles)
        _Event.now += waited

    waited = 6 * 0.4 * np.exp(0.1)  # 2 ms of work are six units
    for name, value in (("Event", _Event), ("_sleep", sleep), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(busy, "_unit", unit)
    assert busy.wait_speedup() == pytest.approx(0.2, rel=1e-6)
    assert all(isinstance(cycles, int) for cycles in waits) and len(waits) > 100 and _Event.now < 1500


def test_the_hosts_time_is_what_a_further_piece_adds(monkeypatch):
    timer, clock = profiler.Profiler(measure.World(torch.device("cpu")), "float32", 0.001), [0.0]

    def step(mark, copies=1):
        clock[0] += 0.001 * copies
        mark()
        clock[0] += 0.02 + 0.003 * copies  # something wakes up first

    with monkeypatch.context() as patch:
        patch.setattr(profiler.time, "perf_counter", lambda: clock[0])
        found = timer._launch_ms(step, lambda: None, True, 8)
    assert np.median(found, axis=0) == pytest.approx([1.0, 3.0])
    # all pieces know how to come twice: the second adds about as much as the first
    for piece in (parts.linear(timer.site, 8, 8, 8), parts.gate(timer.site, 8, 8, 4, 2, limited=False)):
        found = timer._launch_ms(piece, lambda: None, True, 4)
        assert found.shape[1] == 2 and (found > 0).all()


class _LossInPlace(torch.autograd.Function):
    """As on a GPU: gradients overwrite the logits."""

    @staticmethod
    def forward(ctx, logits_SV, target_S):
        ctx.save_for_backward(logits_SV)
        return logits_SV.sum()

    @staticmethod
    def backward(ctx, grad):
        (logits_SV,) = ctx.saved_tensors
        return logits_SV.mul_(0.5), None


def test_losses_that_come_twice_do_not_share_logits(monkeypatch):
    monkeypatch.setattr(parts, "summed_cross_entropy", _LossInPlace.apply)
    timer = profiler.Profiler(measure.World(torch.device("cpu")), "float32", 0.001)
    assert (timer._launch_ms(parts.loss(timer.site, 8, 8), lambda: None, True, 4) > 0).all()


PIECES = {
    "linear": (8, 8, 8), "attention": (2, 2, 8, 4), "experts": ([3, 0, 5], 16, 32),
    "gate": (8, 8, 4, 2, True), "route": (8, 16, 8), "direct": (8, 2, 8, None, 0.0), "norm": (8, 8),
    "embedding": (8, 8, 32), "loss": (8, 32),
}  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_comes_twice(piece, monkeypatch):
    """With experts in the form of a GPU, whose backward pass takes the memory of what forward kept."""

    def in_place(hidden_RF, *args):
        found = activate_rows_backward(hidden_RF, *args)
        hidden_RF.zero_()
        return found

    monkeypatch.setattr(expert_ffn, "activate_rows_backward", in_place)
    monkeypatch.setattr(parts, "expert_ffn", lambda *args, activation, impl: expert_ffn.fused_ffn(*args, activation))
    site = parts.Site(measure.World(torch.device("cpu")), torch.float32)
    if piece == "experts":
        counts_L, width, ffn = PIECES[piece]
        weights, rows, grad = parts.expert_weights(site, len(counts_L), width, ffn, "gelu"), *torch.randn(2, 8, width)
        step = parts.experts(rows, grad, counts_L, weights, "gelu", "grouped")
    else:
        step = getattr(parts, piece)(site, *PIECES[piece])
    for copies in (2, 1, 2):
        step(lambda: None, copies=copies)


def test_ranks_that_wait_for_a_core_count_as_long_as_the_last_one_takes():
    marks_WIM = np.array([[[0.0, 1.0, 3.0]], [[1.0, 2.5, 3.5]]])  # the second rank got a core when the first was done
    assert profiler.slowest_parts(marks_WIM, one_clock=True).tolist() == [[2.5, 1.0]]
    assert profiler.slowest_parts(marks_WIM, one_clock=False).tolist() == [[1.5, 2.0]]
