import heapq
import json

import numpy as np
import pytest
from scipy.optimize import nnls

from smartmoe.config import ClusterSpec
from smartmoe.planner import described
from smartmoe.planner.primitives import (
    KINDS,
    Curve,
    Point,
    Primitives,
    Profile,
    deep_rows,
    expert_sizes,
    fit_non_negative,
    held_out_errors,
)


def _profile(law, sizes, held=(), name="linear_forward"):
    points = [
        Point(s, {"median": law(**s), "p10": 0.0, "p90": 0.0}, {"median": 0.02, "p10": 0.0, "p90": 0.0}, s in held)
        for s in sizes
    ]
    return Profile({name: points}, "float32", {"num_ranks": 1})


def _law(tokens, inner, outer):
    """A product whose speed grows with the tokens: not linear in any amount."""
    return 0.01 + 2e-9 * tokens * inner * outer / (1 - np.exp(-tokens / 700))


GRID = [dict(tokens=t, inner=i, outer=2 * i) for t in (256, 512, 1024, 2048, 4096, 8192) for i in (512, 1024, 2048)]
HELD = [dict(tokens=t, inner=i, outer=2 * i) for t in (768, 3000) for i in (512, 1500)]


def test_measured_sizes_come_back_and_held_out_sizes_follow_their_neighbours():
    profile = _profile(_law, GRID + HELD, HELD)
    primitives = Primitives.fit(profile)
    for sizes in GRID:
        assert primitives.ms("linear_forward", **sizes) == pytest.approx(_law(**sizes), rel=1e-6)
    errors = held_out_errors(profile)
    assert errors["linear_forward"]["num"] == errors["all"]["num"] == 4
    assert 1e-4 < errors["all"]["median"] < 0.05, "predicted, not remembered"
    many = {key: np.array([[s[key] for s in HELD]] * 2) for key in ("tokens", "inner", "outer")}
    assert primitives.ms("linear_forward", **many).shape == (2, 4)
    far = primitives.ms("linear_forward", tokens=1e6, inner=4096, outer=4096)
    assert far == pytest.approx(2e-9 * 1e6 * 4096**2, rel=0.3), "outside the grid the physics goes on"
    assert primitives.host_ms("linear_forward", tokens=1, inner=1, outer=1) == pytest.approx(0.02)


def test_coefficients_are_never_negative_and_as_good_as_scipys():
    rng = np.random.default_rng(3)
    for _ in range(20):
        matrix, target = rng.normal(size=(12, 5)), rng.normal(size=12)
        found, (want, _) = fit_non_negative(matrix, target), nnls(matrix, target)
        assert found.min() >= 0
        assert np.linalg.norm(matrix @ found - target) == pytest.approx(np.linalg.norm(matrix @ want - target))


def test_the_slowest_rank_is_found_among_many():
    curve = Curve(np.array([0.1, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    primitives = Primitives({"experts_forward": curve}, {}, "described")
    rows = np.random.default_rng(0).integers(1, 9000, (3, 16))
    sizes = dict(rows=rows, padded_rows=rows, active=4, slots=4, width=64, ffn=128, deep_rows=rows)
    slowest = primitives.slowest_ms("experts_forward", **sizes)
    assert slowest == pytest.approx(primitives.ms("experts_forward", **sizes).max(-1))
    for ranks in (16, 3):  # chips of other speeds: the fullest is not always the slowest
        few = {key: value[:, :ranks] if isinstance(value, np.ndarray) else value for key, value in sizes.items()}
        pace = np.linspace(0.5, 1.0, ranks)
        slowest = primitives.slowest_ms("experts_forward", pace, **few)
        assert slowest == pytest.approx((primitives.ms("experts_forward", **few) * pace).max(-1))


def test_a_profile_survives_the_disk_and_damage_is_named(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(_profile(_law, GRID).to_dict()))
    again = Profile.load(path)
    assert Primitives.fit(again).ms("linear_forward", **GRID[0]) == pytest.approx(_law(**GRID[0]))
    good = json.loads(path.read_text())
    for change, message in (
        (lambda d: d.update(schema=3), "schema 3, .* reads schema 4: make a new one with: smartmoe profile"),
        (lambda d: d.pop("schema"), "schema None"),
        (lambda d: d.update(kind="trace"), "not a profile; make one"),
        (lambda d: d["points"].update(linaer_forward=[]) or d["points"]["linaer_forward"].extend([{}]), "did you mean"),
        (lambda d: d["points"]["linear_forward"][0]["sizes"].pop("tokens"), "sizes"),
        (lambda d: d["points"]["linear_forward"][0]["device_ms"].update(median=-1), "positive"),
        (lambda d: d["points"]["linear_forward"][0].update(colour=1), "damaged"),
        (lambda d: d.pop("points"), "damaged"),
    ):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            Profile.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        Profile.load(path)
    with pytest.raises(ValueError, match="profile the cluster again"):
        Primitives.fit(again).ms("optimizer", numel=1, tensors=1)


def test_a_described_cluster_has_every_primitive_and_keeps_its_peaks():
    cluster = ClusterSpec(
        name="c", device="cuda", tflops=100.0, intra_node_gbytes_per_s=100.0, inter_node_gbytes_per_s=10.0
    )
    primitives = described.describe(cluster, described.Rates(gemm_efficiency=0.5, link_efficiency=1.0), "bfloat16")
    for name, kind in KINDS.items():
        sizes = dict.fromkeys(kind.sizes, 4096)
        assert primitives.ms(name, **sizes) > 0 and primitives.host_ms(name, **sizes) >= 0, name
    took = primitives.ms("linear_forward", tokens=8192, inner=8192, outer=8192)
    assert took == pytest.approx(2 * 8192**3 / 50e12 * 1e3, rel=0.01)
    near, far = (
        primitives.ms("all_to_all", ranks=2, intra_bytes=a, inter_bytes=b) for a, b in ((1e8, 0.0), (0.0, 1e8))
    )
    assert near == pytest.approx(1.0, rel=0.03) and far == pytest.approx(10.0, rel=0.01)


def test_what_else_a_host_does_is_not_taken_for_launches():
    times = [0.02, 0.02, 0.021, 0.05, 0.02, 0.09]
    points = [
        Point({"tokens": 64.0 * k, "width": 32.0}, {"median": 1.0 + k}, {"median": ms}) for k, ms in enumerate(times, 1)
    ]
    primitives = Primitives.fit(Profile({"norm_forward": points}, "float32", {}))
    assert float(primitives.host_ms("norm_forward", tokens=64, width=32)) == pytest.approx(0.02, rel=1e-6)


def test_sizes_of_experts_are_those_of_their_rows():
    sizes = expert_sizes(np.array([[0, 1, 128, 300], [2, 2, 2, 2]]), 512, 1024, processors=0)
    assert sizes["rows"].tolist() == [429, 8] and sizes["padded_rows"].tolist() == [128 * 5, 128 * 4]
    assert sizes["active"].tolist() == [3, 4] and sizes["deep_rows"].tolist() == [429, 8]
    # the depth alone tells these points apart, as no other size does
    points = [
        Point({"rows": 1024.0, "padded_rows": 1024.0, "active": 4.0, "slots": 4.0, "width": 512.0, "ffn": 1024.0,
               "deep_rows": float(n)}, {"median": 0.5 + n * 1e-3}, {"median": 0.0})
        for n in (1256, 1300, 1500, 1800)
    ]  # fmt: skip
    known = {key: value for key, value in points[0].sizes.items() if key != "deep_rows"}
    primitives = Primitives.fit(Profile({"experts_backward": points}, "bfloat16", {}))
    assert float(primitives.ms("experts_backward", **known, deep_rows=1650)) == pytest.approx(2.15, rel=0.01)


@pytest.mark.parametrize("write_rows", [0, 400])
def test_a_hot_experts_last_tiles_are_waited_for_where_they_take_longer_than_what_others_write(write_rows):
    width, ffn, processors = 1536, 6144, 132
    draw, hot, even = np.random.default_rng(0), (0.65, 0.8, 0.96), (1 / 16, 1 / 8, 0.3)
    counts = np.array(
        [draw.multinomial(total, [share, *[(1 - share) / (num - 1)] * (num - 1), *[0.0] * (16 - num)])
         for total in (33000, 47000, 65000) for num in (16, 12, 7) for share in (hot if num != 12 else even)]
    )  # fmt: skip
    both = expert_sizes(counts, width, ffn, processors) | dict(slots=16, width=width, ffn=ffn)
    waits = np.maximum(both["deep_rows"], both["rows"] + write_rows * both["active"])
    real = 0.1 + 2.7e-5 * both["rows"] + 2.7e-5 * waits
    sizes = [{key: float(np.broadcast_to(value, len(real))[n]) for key, value in both.items()} for n in range(len(real))]
    known = [Point(s, {"median": ms}, {"median": 0.0}) for s, ms in zip(sizes[::2], real[::2], strict=True)]
    primitives = Primitives.fit(Profile({"experts_backward": known}, "bfloat16", {}))
    others = {key: np.array([s[key] for s in sizes[1::2]]) for key in sizes[0]}
    assert primitives.ms("experts_backward", **others) == pytest.approx(real[1::2], rel=1e-3)
    # of five ranks, the first: its experts are many, those of the others have deeper tiles
    ranks = dict(rows=47000, padded_rows=47000, slots=16, width=width, ffn=ffn)
    ranks |= dict(active=np.array([16, 2, 2, 2, 2]), deep_rows=np.array([47000, *[51000] * 4]))
    slowest = primitives.slowest_ms("experts_backward", **ranks)
    assert slowest == pytest.approx(primitives.ms("experts_backward", **ranks)[0 if write_rows else 1], rel=1e-12)


def test_points_that_are_met_as_they_are_choose_nothing():
    """A few, with more amounts than points: what is left of their errors is rounding, which may be less with another rule."""
    draw, num_met, kind = np.random.default_rng(0), 0, KINDS["experts_backward"]
    for num in [2, 3] * 40:
        counts = np.array([draw.multinomial(rows, draw.dirichlet(np.full(16, 1.0))) for rows in (33000, 47000, 65000)[:num]])
        both = expert_sizes(counts, 1536, 6144, 132) | dict(slots=16, width=1536, ffn=6144)
        times = draw.uniform(0.8, 1.2, num) * (0.1 + 2.7e-5 * both["rows"] + 2.7e-5 * both["deep_rows"])
        sizes = [{key: float(np.broadcast_to(value, num)[n]) for key, value in both.items()} for n in range(num)]
        known = [Point(s, {"median": ms}, {"median": 0.0}) for s, ms in zip(sizes, times, strict=True)]
        curve = Primitives.fit(Profile({"experts_backward": known}, "bfloat16", {}))._device["experts_backward"]
        plain = Curve.fit(np.stack(np.broadcast_arrays(*kind.amounts(**both)), 1), np.zeros((num, 0)), times)
        if np.abs(plain.log_ratio).max() < 1e-12:
            num_met += 1
            assert curve.write_rows == 0
    assert num_met > 5


def _longest_turn(count_L, tiles, processors):
    """List scheduling, step by step: the fullest expert's tiles first, each to whoever is free first."""
    free = [0.0] * processors
    for rows in sorted(count_L, reverse=True):
        for _ in range(tiles):
            heapq.heapreplace(free, free[0] + rows)
    return max(free)


def test_depth_is_what_the_busiest_processor_sums_up():
    width, ffn, processors = 1536, 6144, 132
    tiles = 12 * 12  # of 128 x 256 in each of the two matrices of 1536 x 3072
    draw = np.random.default_rng(0)
    counts = np.array([[60000, *[350] * 15], [30000, 20000, *[1000] * 14], *draw.multinomial(65536, [1 / 16] * 16, 3)])
    found, real = deep_rows(counts, width, ffn, processors), [_longest_turn(c, tiles, processors) for c in counts]
    # two turns of the first expert alone; even loads wait for little but a last turn that is half empty
    assert found[0] == 2 * 60000 * processors / tiles == pytest.approx(real[0] * processors / tiles)
    assert (found >= counts.sum(1)).all() and found[2:] == pytest.approx(65536 * 18 * processors / (16 * tiles), rel=0.06)
    assert np.all(found <= np.array(real) * processors / tiles * 1.0001) and found == pytest.approx(
        np.array(real) * processors / tiles, rel=0.12
    )
    assert deep_rows(counts, width, ffn, 0).tolist() == counts.sum(1).tolist()  # who knows


def test_sizes_without_a_hosts_time_take_no_part_in_it():
    points = [
        Point({"tokens": 64.0 * k, "width": 32.0}, {"median": 1.0 + k}, {"median": 0.02} if k < 3 else {}) for k in (1, 2, 3, 4)
    ]
    primitives = Primitives.fit(Profile({"norm_forward": points}, "float32", {}))
    assert float(primitives.host_ms("norm_forward", tokens=512, width=32)) == pytest.approx(0.02)
    assert float(primitives.ms("norm_forward", tokens=256, width=32)) == pytest.approx(5.0)
