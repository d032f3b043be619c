import json

import numpy as np
import pytest
import torch

from smartmoe.bench import layer, measure, peers, report, routing, shapes
from smartmoe.trace import synthetic
from tests import oracle
from tests.dist import spawn

CPU = ["--device", "cpu", "--warmup", "1", "--iterations", "2"]


def load_of(expert_TK, num_experts):
    return np.bincount(expert_TK.ravel(), minlength=num_experts)


# ------------------------------------------------------------------------------------------------------------ routings


@pytest.mark.parametrize("text", ["balanced", "zipf", "zipf=1.5"])
def test_a_drawn_token_has_different_experts_and_equal_arguments_draw_equally(text):
    spec = routing.parse(text)
    expert_TK = routing.draw(spec, 500, 16, 3, ep_rank=1, seed=5)
    assert expert_TK.shape == (500, 3) and expert_TK.min() >= 0 and expert_TK.max() < 16
    assert all(len(set(row)) == 3 for row in expert_TK.tolist())
    assert (routing.draw(spec, 500, 16, 3, ep_rank=1, seed=5) == expert_TK).all()
    assert (routing.draw(spec, 500, 16, 3, ep_rank=0, seed=5) != expert_TK).any()


def test_the_same_experts_are_popular_on_all_ranks():
    spec = routing.parse("zipf=1.5")
    hottest = {int(load_of(routing.draw(spec, 400, 16, 2, rank, seed=3), 16).argmax()) for rank in range(3)}
    assert len(hottest) == 1
    balanced = load_of(routing.draw(routing.parse("balanced"), 4000, 16, 2, 0, seed=3), 16)
    assert balanced.max() < 1.2 * balanced.mean()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_trace_gives_every_expert_its_share(tmp_path, top_k):
    path = tmp_path / "trace.npz"
    trace = synthetic("zipf-strong", num_iterations=3, num_ranks=2, num_layers=2, num_micro_batches=2, num_experts=8,
                      num_copies=64, seed=2, exponent=0.2)  # fmt: skip
    trace.save(path)
    expert_TK = routing.draw(routing.parse(f"trace={path}:2:1"), 32 * top_k, 8, top_k, ep_rank=1, seed=0)
    want = trace.counts[1, 1, 1, 0] * (32 * top_k * top_k / 64)
    assert np.abs(load_of(expert_TK, 8) - want).max() <= 1
    assert all(len(set(row)) == top_k for row in expert_TK.tolist())


def test_an_expert_that_a_trace_overloads_gets_every_token_once():
    count = np.array([900, 50, 30, 20])
    capped = routing.capped(count, 100, 2)
    assert capped.tolist() == [100, 50, 30, 20] and capped.sum() == 200
    expert_TK = routing._spread(capped, 100, 2, np.random.default_rng(0))
    assert load_of(expert_TK, 4).tolist() == [100, 50, 30, 20]
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    assert routing.capped(count, 100, 4).tolist() == [100] * 4


def test_bad_names_say_what_exists(tmp_path):
    for text in ("even", "zipf=x", "zipf=-1", "trace=a.npz", "trace=a.npz:1:x"):
        with pytest.raises(ValueError, match="zipf"):
            routing.parse(text)
    for text in ("S9", "1,2,3,4", "8,8,8,2,4", "8,8,8,4,2,tanh", "0,8,8,4,2"):
        with pytest.raises(ValueError, match="shape"):
            shapes.parse_shape(text)
    path = tmp_path / "trace.npz"
    synthetic("zipf-strong", num_iterations=1, num_ranks=1, num_layers=1, num_micro_batches=1, num_experts=8,
              num_copies=8).save(path)  # fmt: skip
    for name, experts, match in ((f"{path}:1:0", 4, "8 experts"), (f"{path}:2:0", 8, "no iteration 2"),
                                 (f"{path}:1:1", 8, "layer 1")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            routing.draw(routing.parse(f"trace={name}"), 4, experts, 1, 0, 0)


# ------------------------------------------------------------------------------------------------------- the peer layer


def _peer(world_rank, num_ranks, activation, kind, bias):
    weights = oracle.make_weights(2 * num_ranks, 16, 24, activation, bias=bias)
    generator = torch.Generator().manual_seed(world_rank)
    x = oracle.rounded(torch.randn(7, 16, generator=generator))
    chosen = torch.rand(7, 2 * num_ranks, generator=generator).argsort(1)[:, :2]
    chosen = torch.tensor([[1, 0]]).repeat(7, 1) if kind == "few" else chosen
    combine = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    mine = [None if w is None else w[2 * world_rank : 2 * world_rank + 2].float().requires_grad_() for w in weights]

    class Experts:
        def __init__(self):
            self.activation, self.weights = activation, lambda: mine

    x32, combine32 = x.float().requires_grad_(), combine.float().requires_grad_()
    group = torch.distributed.group.WORLD if num_ranks > 1 else None
    y = peers.PlainTorch(group, 2 * num_ranks)(x32, oracle.make_routing(chosen, combine32), None, Experts())
    y.square().sum().backward()
    return [x, chosen, combine], [y.detach(), x32.grad, combine32.grad], [None if w is None else w.grad for w in mine]


@pytest.mark.parametrize(("activation", "kind", "bias"), [("gelu", "random", False), ("swiglu", "few", True)])
def test_the_plain_layer_computes_the_layer(activation, kind, bias):
    for num_ranks in (1, 2):
        args = (num_ranks, activation, kind, bias)
        parts = spawn(_peer, 2, *args) if num_ranks == 2 else [_peer(0, *args)]
        weights = [None if w is None else w.requires_grad_() for w in
                   oracle.make_weights(2 * num_ranks, 16, 24, activation, bias=bias)]  # fmt: skip
        for (x, chosen, combine), got, _ in parts:
            x.requires_grad_(), combine.requires_grad_()
            y = oracle.moe(x, chosen, combine, weights, activation)
            y.square().sum().backward()
            for mine, want in zip(got, (y.detach(), x.grad, combine.grad), strict=True):
                oracle.assert_close(mine, want, torch.float32)
        for idx, weight in enumerate(weights):
            if weight is not None:
                oracle.assert_close(torch.cat([grads[idx] for _, _, grads in parts]), weight.grad, torch.float32)


# ----------------------------------------------------------------------------------------------------------- the bench


def _run(_world_rank, argv):
    args = layer.parse_args([*CPU, *argv])
    return layer.run(args, measure.start_world(args.device))


def test_two_ranks_measure_every_dispatcher_and_the_file_says_so(tmp_path):
    path = tmp_path / "new" / "out.json"
    argv = ["--shapes", "32,16,24,4,2", "--experts", "grouped", "loop", "--routing", "balanced", "zipf=2"]
    argv += ["--json", str(path), "--ceiling-tflops", "0.5"]
    first, second = spawn(_run, 2, argv)
    assert [r["status"] for r in first["rows"]] == [r["status"] for r in second["rows"]]
    data = json.loads(path.read_text())
    assert data["rows"] == first["rows"] and data["provenance"]["num_ranks"] == 2
    rows = {(r["routing"], r["dispatcher"], r["experts"]): r for r in data["rows"]}
    assert len(rows) == len(data["rows"])
    for label in ("balanced", "zipf 2"):
        for key in [("torch", "grouped"), ("fastmoe", "loop"), ("basic", "grouped"), ("padded", "loop"),
                    ("tutel", "batched"),
                    ("overlapped", "grouped")]:  # fmt: skip
            row = rows[label, *key]
            assert row["status"] == "ok", row
            assert 0 < row["forward_ms"]["median"] and row["total_ms"]["p10"] <= row["total_ms"]["p90"]
            assert row["difference"] < 1e-5
            assert row["exchange_ms"]["median"] > 0 and row["exchange_gbytes_per_s"] > 0
        assert ("fastmoe", "grouped") not in {key[1:] for key in rows}
        assert rows[label, "direct+graph", "grouped"]["status"] == "skipped"
    row = rows["balanced", "basic", "grouped"]
    assert row["floor_ms"] == pytest.approx(3 * 2 * 2 * 16 * 24 * 64 / 0.5e12 * 1e3, abs=1e-4)
    assert row["off_rank_row_bytes"] <= row["off_rank_copy_bytes"] and row["memory_over_torch"] is None
    for name, key in (("basic", "off_rank_copy_bytes"), ("direct", "off_rank_row_bytes")):
        row = rows["balanced", name, "grouped"]
        crossed = 2 * row[key] / row["exchange_ms"]["median"] / 1e6
        assert row["exchange_gbytes_per_s"] == pytest.approx(crossed, abs=1e-6)
    assert rows["zipf 2", "basic", "grouped"]["rank_max_over_mean"] >= 1


def test_one_process_measures_experts_alone_and_bad_cases_are_rows(capsys):
    args = ["--shapes", "16,16,24,4,2", "--dispatchers", "basic", "torch", "--bias", "--routing", "balanced",
            "trace=absent.npz:1:1"]  # fmt: skip
    rows = _run(0, args)["rows"]
    reasons = {(r["routing"], r["dispatcher"]): (r["status"], r["reason"]) for r in rows}
    assert reasons["balanced", "basic"] == ("ok", "")
    assert reasons["balanced", "torch"] == ("ok", "") and rows[1]["difference"] < 1e-5
    assert "absent.npz" in reasons["it 1 L1", "basic"][1]
    assert "absent.npz" in capsys.readouterr().out

    alone = layer.parse_args([*CPU, "--shapes", "alone-S1", "--dispatchers", "torch"])
    assert layer._cases(alone, alone.shapes[0]) == [("experts", "grouped"), ("torch", "grouped")]
    shape = shapes._shape("tiny", 16, 16, 24, 4, 2, "swiglu", one_gpu=True)
    bench = layer.Bench(shape, measure.World(torch.device("cpu")), torch.float32, 1, False, 2.0)
    facts = bench.set_routing(routing.parse("zipf"))
    result = bench.measure("experts", "grouped", measure.Timing(warmup=1, iterations=2))
    row = layer.make_row(shape, [facts], [result], 0.0)
    assert layer.make_row(shape, [facts], [result], 700.0)["floor_fullest_rank_ms"] > 0
    assert row["floor_ms"] is None and row["exchange_ms"] is None and row["difference"] is None
    assert shape.flops(32) == 2 * 3 * 16 * 24 * 32


def _fail_together(_world_rank):
    world = measure.start_world("cpu")

    def boom():
        raise RuntimeError("out of luck")

    return [measure.attempt(world, boom), measure.attempt(world, lambda: {"rank": world.ep_rank})]


def test_a_case_that_fails_on_one_rank_or_all_is_named_and_the_next_one_runs():
    for failed, after in spawn(_fail_together, 2):
        assert failed == ("failed", "rank 0: RuntimeError: out of luck", [])
        assert after == ("ok", "", [{"rank": 0}, {"rank": 1}])


def _fail_alone(world_rank):
    measure.PATIENCE_S = 1.0
    world = measure.start_world("cpu")

    def case():
        if world_rank == 1:
            raise MemoryError("full")
        return {"largest": world.largest(1.0)}

    try:
        if world_rank == 0:  # stuck until the end of the test, as in a collective that nobody joins
            torch.distributed.barrier()
            return ""
        measure.attempt(world, case)
    except measure.LeftAloneError as error:
        torch.distributed.barrier()
        return str(error)


def test_a_rank_that_fails_alone_knows_its_reason():
    assert spawn(_fail_alone, 2)[1] == "rank 1: MemoryError: full"


def test_a_restarted_run_keeps_what_it_has(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    argv = ["--shapes", "8,16,8,2,1", "--dispatchers", "basic", "padded", "--json", str(path)]
    first = _run(0, argv)
    kept = dict(first["rows"][0], marker="kept")
    path.write_text(json.dumps(first | {"rows": [kept]}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    rows = _run(0, argv)["rows"]
    assert rows[0]["marker"] == "kept" and [r["dispatcher"] for r in rows] == ["basic", "padded"]
    path.write_text(json.dumps(first | {"rows": [dict(kept, status="running")]}))
    assert _run(0, argv)["rows"][0]["status"] == "failed"


def test_slowest_takes_every_iteration_and_part_from_its_slowest_rank():
    times = measure.slowest([[[1.0, 5.0], [2.0, 2.0]], [[3.0, 1.0], [1.0, 1.0]]])
    assert times.tolist() == [[3.0, 5.0, 6.0], [2.0, 2.0, 4.0]]
    assert measure.spread([1, 2, 3]) == {"median": 2.0, "p10": 1.2, "p90": 2.8}


def test_memory_beside_the_allocator_counts_from_the_first_use(monkeypatch):
    state = {"allocated": 100, "reserved": 150, "used": 200, "peak": 100}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: state.update(peak=state["allocated"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 - state["used"], 1000))
    meter = measure.MemoryMeter(measure.World(torch.device("cuda", 0)))
    state.update(used=270, allocated=110, peak=190)  # 70 beside the allocator, and results that stay
    meter.start_peak()
    state.update(peak=140, reserved=160, used=280)
    assert meter.read() == {"peak_bytes": 30, "outside_bytes": 70}


def test_bad_options_end_with_one_line(capsys):
    for argv, word in ((["--shapes", "S9"], "S9"), (["--routing", "odd"], "odd"), (["--iterations", "0"], "less than 1")):
        with pytest.raises(SystemExit) as stop:
            layer.parse_args(argv)
        assert stop.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        layer.main(["--help"])
    assert "qwen3-30b-a3b" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert layer.main(["--device", "cuda", "--shapes", "S1"]) == 2
    assert report.dtype_of(layer.parse_args(["--device", "cuda"])) == "bfloat16"


def test_memory_is_compared_with_the_plain_layer_on_the_same_routing():
    def row(name, routing, peak, shared=0):
        return {"shape": "S1", "routing": routing, "dispatcher": name, "status": "ok", "peak_bytes": peak,
                "shared_bytes": shared}  # fmt: skip

    before = [row("torch", "zipf", 1000), dict(row("torch", "balanced", 1), status="oom"), row("torch", "balanced", 200)]
    assert layer._memory_over_torch(row("direct", "balanced", 90, 50), before) == 0.7
    assert layer._memory_over_torch(row("torch", "a trace", 90), before) == 1.0
    assert layer._memory_over_torch(row("direct", "a trace", 90), before) is None
