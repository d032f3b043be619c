"""The benchmark of products: every product is the one it is named after, rows are the fullest rank's, floors by hand."""

import json

import pytest
import torch

from smartmoe.bench import gemm, routing
from smartmoe.bench.shapes import parse_shape

SHAPE = "40,16,24,6,2,"


def bench_of(activation, num_ranks=3):
    spec = routing.parse("zipf=1.5")
    return gemm.Bench(parse_shape(SHAPE + activation), spec, num_ranks, torch.device("cpu"), torch.float32, 1)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_products_are_those_of_a_layer_s_forward_and_backward(activation):
    bench = bench_of(activation)
    ends = bench.end_L.tolist()
    for slot, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = slice(start, end)
        rows, hidden, act, grad = (t[part] for t in (bench.rows_RD, bench.hidden_RW, bench.act_RF, bench.grad_RD))
        first, second = bench.w1_LDW[slot], bench.w2_LFD[slot]
        for product, want in (
            ("first", rows @ first), ("second", act @ second), ("back_second", grad @ second.T),
            ("back_first", hidden @ first.T),
        ):  # fmt: skip
            torch.testing.assert_close(bench.call(product, "torch")()[part], want)
        torch.testing.assert_close(bench.call("weight_second", "torch")()[slot], act.T @ grad)
        torch.testing.assert_close(bench.call("weight_first", "torch")()[slot], rows.T @ hidden)
        add = bench.call("weight_first+sum", "torch")
        add()
        torch.testing.assert_close(add()[slot], 2 * rows.T @ hidden)
        torch.testing.assert_close(bench.call("first+act", "torch")()[0][part], rows @ first)
        assert bench.call("back_second+act", "torch")()[0].shape == bench.hidden_RW.shape


def test_the_fullest_rank_is_measured_against_the_larger_floor():
    alone, bench = bench_of("gelu", num_ranks=1), bench_of("gelu")
    assert alone.num_rows == 80 and 80 < bench.num_rows < 240 and bench.facts["num_slots"] == 2
    with pytest.raises(ValueError, match="cannot be spread evenly over 4 ranks"):
        bench_of("gelu", num_ranks=4)
    # 80 rows of 16 and of 24, six matrices, 4 bytes a number; the activation writes 80 x 24 more, or twice that
    num_bytes = 4 * (80 * 40 + 6 * 16 * 24)
    assert alone.floor_ms("first", 700, 1e-3) == pytest.approx(num_bytes / 1e6)
    assert alone.floor_ms("first+act", 700, 1e-3) == pytest.approx((num_bytes + 4 * 80 * 24) / 1e6)
    assert alone.floor_ms("back_second+act", 700, 1e-3) == pytest.approx((num_bytes + 8 * 80 * 24) / 1e6)
    num_bytes += 4 * 6 * 16 * 24  # read as well
    assert alone.floor_ms("weight_first+sum", 700, 1e-3) == pytest.approx(num_bytes / 1e6)
    assert alone.floor_ms("first", 1e-3, 1e9) == pytest.approx(2 * 80 * 16 * 24 / 1e6)


def test_a_run_writes_its_rows_and_says_what_is_not_there(tmp_path, capsys):
    path = tmp_path / "out.json"
    args = ["--device", "cpu", "--shapes", SHAPE + "gelu", "--warmup", "1", "--iterations", "2", "--json", str(path)]
    assert gemm.main([*args, "--products", "first", "weight_second"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["product"], row["status"]) for row in rows] == [("first", "ok"), ("weight_second", "ok")]
    assert rows[0]["torch_ms"]["median"] > 0 and rows[0]["own_ms"] is None
    assert "no products for this GPU" in rows[0]["own_reason"] and "weight_second" in capsys.readouterr().out
    row = rows[0] | {"own_ms": rows[0]["torch_ms"], "own_tflops": 1.0, "own_over_torch": 0.5, "floor_ms": 0.25}
    assert gemm.format_row(row | {"difference": 0.001}).endswith("    0.500   0.2500 1e-03")
