import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smartmoe import trace as tr
from smartmoe.bench import measure, replay, replay_compare
from smartmoe.bench.replay_compare import MODES, Schedule, Tokens, shape_of, summarise
from smartmoe.bench.replay_goals import EXACT, HISTORY
from smartmoe.bench.routing import capped
from smartmoe.online import is_due
from smartmoe.solvers import solve_replicas
from tests.dist import spawn

SIZE = "64,16,16,8,2"


def trace_of(iterations):
    counts = np.zeros((len(iterations), 2, 1, 2, 8), np.int32)
    counts += np.arange(1, 9, dtype=np.int32)
    return tr.ExpertTrace(counts, np.array(iterations))


def test_a_schedule_plays_what_decisions_need_and_times_the_rest():
    trace = trace_of(range(1, 400, 10))
    every = Schedule.of(trace, 4, None, None)
    assert every.stride == 10 and every.rows == tuple(range(37)) and sorted(every.timed) == list(range(0, 40, 4))
    one = Schedule.of(trace, 1, 301, None)
    assert one.timed == {30} and one.rows == tuple(range(10, 31))  # 20 before it, nothing after
    assert sorted(Schedule.of(trace, 1, None, 3).timed) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 .. 391 in steps of 10"):
        Schedule.of(trace, 1, 302, None)
    with pytest.raises(ValueError, match="steps by 20"):
        Schedule.of(trace_of([1, 21, 41]), 1, None, None).online(MODES["every_10"].online, 5)
    assert every.online(MODES["static"].online, 5) == MODES["static"].online


def test_decisions_fall_due_after_the_last_step_of_a_recorded_iteration_only():
    sparse, dense = (Schedule.of(trace_of(range(1, 100 * stride, stride)), 1, None, None) for stride in (10, 1))
    assert sparse.numbers(0, 1, 5) == [1, 3, 5, 7, 10] and sparse.numbers(99, 991, 3) == [991, 993, 1000]
    assert dense.numbers(0, 1, 5) == [1, 2, 3, 4, 5] and dense.numbers(9, 10, 5) == [46, 47, 48, 49, 50]
    for schedule, due_rows in ((sparse, {"every_10": 100, "every_100": 10, "history": 100}), (dense, {"every_10": 10})):
        numbers = [schedule.numbers(row, 1 + row * schedule.stride, 5) for row in range(100)]
        flat = sum(numbers, [])
        assert flat == sorted(set(flat))
        for mode, num_due in due_rows.items():
            online = dataclasses.replace(schedule.online(MODES[mode].online, 5))
            due = [[is_due(online, number) for number in row] for row in numbers]
            assert not any(any(row[:-1]) for row in due), mode
            assert sum(row[-1] for row in due) == num_due, mode


def test_costs_are_charged_to_the_iterations_they_serve_and_the_slowest_rank_counts():
    trace = trace_of([1, 11, 21, 31])
    schedule = Schedule.of(trace, 2, None, None)  # times iterations 1 and 21

    def seen(step, cost, control=0.0):
        return {"step_ms": step, "control_ms": [[control], [control]], "decision_ms": cost, "load": [1.5, 1.0],
                "num_moved": [0, 3], "late": [0.0, 0.5], "difference": [None, 1e-7]}  # fmt: skip

    balanced = seen([[1.0, 1.0], [2.0, 2.0]], [[], []])
    static, mode = seen([[2.0, 2.0], [4.0, 4.0]], [[], []]), seen([[2.0, 1.0], [2.0, 2.0]], [[], [8.0]])
    fast = {"even": balanced, "uniform": seen([[1.5, 1.5], [2.0, 2.0]], [[], []]), "static": static, "m": mode}
    slow = {**fast, "m": seen([[1.0, 3.0], [2.0, 2.0]], [[], [10.0]])}
    rows = summarise([fast, {**slow, "static": seen([[2.0, 2.0], [4.0, 4.0]], [[], []], 48.0)}], schedule, trace)
    assert rows["static"]["series"]["ms"] == [4.0, 6.0] and rows["static"]["control_ms"] == 48.0
    rows = summarise([fast, slow], schedule, trace)
    moved = rows["m"]
    assert moved["series"]["step_ms"] == [2.5, 2.0]  # median of max(2, 1) and max(1, 3)
    assert moved["series"]["ms"] == [2.5, 2.5]  # 10 ms for the 20 iterations of training since iteration 1
    assert moved["share_of_even"]["mean"] == pytest.approx((1 / 2.5 + 2 / 2.5) / 2)
    assert moved["share_of_uniform"]["mean"] == pytest.approx((1.5 / 2.5 + 2 / 2.5) / 2)
    assert moved["speedup_over_static"]["median"] == pytest.approx((2 / 2.5 + 4 / 2.5) / 2)
    assert moved["num_decisions"] == 1 and moved["num_moved"] == 3 and moved["difference"] == 1e-7
    assert json.dumps(rows)
    for row in rows.values():
        replay_compare.format_row({"shape": "S", "case": "c", "mode": "m", "status": "ok", **row})


def test_ranks_and_micro_batches_take_their_own_counts_and_start_over():
    world = SimpleNamespace(num_ranks=4, ep_rank=3, device=torch.device("cpu"))
    tokens = Tokens(shape_of(SIZE), world, torch.float32, 1, 3)
    counts_RME = np.random.default_rng(0).integers(1, 50, (2, 2, 8))
    tokens.set_iteration(counts_RME, 0)
    uniform = {}
    for forced in (None, "even", "uniform"):
        count_MSE = tokens.count_MSE(forced)
        assert count_MSE.shape == (3, 4, 8) and (count_MSE.sum(2) == 128).all()
        for micro in range(3):
            drawn_TK = tokens.routing(micro, forced).expert_idx_TK
            assert (drawn_TK[:, 0] != drawn_TK[:, 1]).all()
            got = np.bincount(drawn_TK.flatten().numpy(), minlength=8)
            assert got.tolist() == count_MSE[micro, 3].tolist()
            if forced is None:
                assert got.tolist() == capped(counts_RME[1, micro % 2], 64, 2).tolist()
            elif forced == "even":
                assert got.tolist() == [16] * 8
            else:
                uniform[micro] = drawn_TK
    # chance decides: other counts in each micro-batch, on each rank and in each iteration
    assert len(np.unique(tokens.count_MSE("uniform").reshape(12, 8), axis=0)) == 12
    tokens.set_iteration(counts_RME, 1)
    assert all((tokens.routing(micro, "uniform").expert_idx_TK != uniform[micro]).any() for micro in range(3))


def _world(world_rank, json_path):
    args = replay.parse_args(
        ["--device", "cpu", "--dispatcher", "basic", "--shapes", SIZE, "--trace", "synthetic:zipf-strong,seed=3,ranks=2",
         "--limit", "12", "--repeat", "2", "--layer", "1", "--micro-batches", "2", "--replica-slots", "1",
         "--json", json_path]
    )  # fmt: skip
    world = measure.World(torch.device("cpu"))
    data = replay_compare.compare(args, world)
    wrong = replay.parse_args(["--device", "cpu", "--shapes", SIZE, "--trace", "synthetic:uniform,experts=4"])
    data["wrong"] = replay_compare.compare(wrong, world)["rows"]
    hot = replay.parse_args(["--device", "cpu", "--shapes", SIZE, "--cases", "hot80", "uniform", "even", "--limit", "1",
                             "--modes", "even", "static", "exact", "--dispatcher", "basic"])  # fmt: skip
    data["hot"] = replay_compare.compare(hot, world)["rows"]
    return data


def test_every_mode_plays_the_same_tokens(tmp_path):
    path = tmp_path / "out.json"
    data = spawn(_world, 2, str(path))[0]
    rows = {row["mode"]: row for row in data["rows"]}
    assert list(rows) == list(MODES) and {row["status"] for row in rows.values()} == {"ok"}, data["rows"]
    load = {mode: row["series"]["load_max_over_mean"] for mode, row in rows.items()}
    assert load["even"] == [1.0] * 12 and min(load["static"]) > 1.05
    assert 1.0 < np.mean(load["uniform"]) < np.mean(load["static"])
    # what is learned in the first ten iterations serves the eleventh, not the tenth
    assert load["every_10"][:10] == load["static"][:10] and load["every_10"][10] < load["static"][10]
    assert load["every_100"] == load["static"]
    assert np.mean(load["exact"]) < np.mean(load["static"]) and max(load["exact"]) < 1.1
    assert rows["every_10"]["num_decisions"] == 1 and rows["every_10"]["num_moved"] > 0
    assert rows["every_10"]["decision_ms"]["median"] > 0 and rows["static"]["num_decisions"] == 0
    # moved and copied experts give the same answers
    assert all(row["difference"] < 1e-5 for mode, row in rows.items() if mode not in ("even", "uniform"))
    assert rows["static"]["share_of_even"]["mean"] > 0 and rows["static"]["share_of_uniform"]["mean"] > 0
    assert rows["static"]["speedup_over_static"]["median"] == 1.0
    saved = json.loads(path.read_text())
    assert saved["kind"] == "replay" and saved["settings"]["micro_batches"] == 2 and len(saved["rows"]) == len(MODES)
    told = {(verdict["mode"], verdict["what"]) for verdict in saved["goals"]}
    assert told == {(m, w) for m in (*EXACT, *HISTORY) for w in ("of even groups", "of uniform", "times shadowing")}
    assert rows["shadowing"]["speedup_over_shadowing"]["median"] == 1.0

    assert {row["status"] for row in data["wrong"]} == {"skipped"} and "4 experts" in data["wrong"][0]["reason"]
    hot = {(row["case"], row["mode"]): row for row in data["hot"]}
    assert hot["hot80", "static"]["sizes"]["top_k"] == 1 and hot["uniform", "static"]["sizes"]["top_k"] == 2
    assert hot["hot80", "static"]["load_max_over_mean"]["median"] > 1.6
    assert hot["hot80", "exact"]["load_max_over_mean"]["median"] < 1.1
    assert hot["even", "static"]["load_max_over_mean"]["median"] == 1.0
    assert 1.0 < hot["uniform", "static"]["load_max_over_mean"]["median"] < 1.2


def test_a_shape_may_be_that_of_a_run(tmp_path):
    (tmp_path / "run.toml").write_text("[model]\nhidden_size = 32\nffn_size = 48\nseq_len = 16\nnum_experts = 4\n"
                                       "[workload]\nmicro_batch_size = 3\n")  # fmt: skip
    shape = shape_of(str(tmp_path / "run.toml"))
    assert (shape.num_tokens, shape.width, shape.ffn, shape.num_experts, shape.top_k) == (48, 32, 48, 4, 2)
    assert replay.parse_args(["--shapes", str(tmp_path / "run.toml")]).shapes == [shape]
    with pytest.raises(SystemExit):
        replay.parse_args(["--shapes", "S99"])


def _sums(world_rank):
    """{mode: gradients that steps of two micro-batches leave}, and by autograd alone."""
    args = replay.parse_args(["--device", "cpu", "--dispatcher", "basic", "--shapes", SIZE, "--micro-batches", "2",
                              "--trace", "synthetic:zipf-strong,seed=3,ranks=2"])  # fmt: skip
    world, found = measure.World(torch.device("cpu")), {}
    trace, schedule = replay_compare._open(args, "trace", args.shapes[0])
    tokens = Tokens(args.shapes[0], world, torch.float32, args.seed, 2)
    tokens.set_iteration(trace.counts[-1, :, 0], 0)
    for name in ("static", "history", "exact"):
        player = replay_compare._player(args, name, schedule, tokens)
        if name == "history":
            layer = player.replayed.layer
            layer.set_replicas(solve_replicas(tokens.count_MSE().sum(0), layer.placement, args.replica_slots))
            assert layer.replicas.num_copies
        for number in (1, 2):
            player.step(number)
        found[name] = [ref.grad.clone() for ref in player.replayed._buffers.refs]
    one = Tokens(args.shapes[0], world, torch.float32, args.seed, 1)
    player = replay_compare._player(args, "static", schedule, one)
    for micro in range(2):
        player.replayed.layer.gate.routing = tokens.routing(micro)
        player.replayed.work(tokens.x_BTD, tokens.token_id_BT + micro * 64, tokens.grad_BTD)
    return found, [param.grad for param in player.replayed.layer.experts.parameters()]


def test_several_micro_batches_are_summed_in_float32_and_anew_in_every_step():
    for found, own in spawn(_sums, 2):
        for mode, sums in found.items():
            for total, grad in zip(sums, own, strict=True):
                assert total.dtype == torch.float32
                assert (total - grad).norm() <= 1e-5 * grad.norm(), mode
