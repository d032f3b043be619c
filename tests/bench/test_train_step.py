"""The benchmark of whole iterations: its count of FLOPs, its rows, and how a profile is summed up."""

import json

import pytest

from smartmoe.bench import kernel_times, measure, train_step
from smartmoe.bench.kernel_times import Kernel
from smartmoe.config import ModelConfig
from smartmoe.gpt import flops_per_token
from smartmoe.planner import inputs

MODELS = "[small]\nnum_layers = 2\nseq_len = 16\nhidden_size = 32\nffn_size = 32\nnum_experts = 4\nvocab_size = 300\n"


def test_flops_are_those_of_the_matrices_and_of_causal_attention():
    model = ModelConfig(num_layers=16, hidden_size=1536, ffn_size=3072, num_experts=32, seq_len=1024, vocab_size=8192)
    forward = 16 * (8 * 1536**2 + 2 * 1024 * 1536 + 2 * 4 * 1536 * 3072 + 2 * 1536 * 32) + 2 * 1536 * 8192
    assert flops_per_token(model) == 3 * forward
    mixed = ModelConfig(num_layers=2, hidden_size=4, ffn_size=8, num_experts=3, top_k=1, seq_len=2, vocab_size=300,
                        moe_every=2, activation="swiglu")  # fmt: skip
    dense, moe = 2 * (4 * 16 + 2 * 32), 2 * (4 * 16 + 3 * 32 + 12)
    assert flops_per_token(mixed) == 3 * (dense + moe + 2 * 4 * 300 + 2 * 2 * 2 * 4)


def test_systems_run_side_by_side_on_the_same_model(tmp_path, capsys):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "models.toml").write_text(MODELS)
    (tmp_path / "clusters" / "cpu.toml").write_text('device = "cpu"\n')
    file = tmp_path / "rows.json"
    argv = ["--device", "cpu", "--model", "small", "--configs", str(tmp_path), "--synthetic", "--micro-batch", "1"]
    argv += ["--batch", "2", "--warmup", "1", "--iterations", "2", "--json", str(file)]
    assert train_step.main([*argv, "--systems", "fastmoe", "smartmoe_static:direct+zero3", "smartmoe:basic"]) == 0
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[1]["layer"]["dispatcher"] == "direct" and rows[2]["layer"]["dispatcher"] == "basic"
    assert rows[0]["online"]["policy"] == "static" and rows[2]["online"]["policy"] == "auto"
    for row in rows:
        assert len(row["each_max_over_mean"]) == len(row["num_moved"]) == 3 and row["max_over_mean"] >= 1
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and len(row["loss"]) == 3
        rate = report["settings"]["flops_per_token"] * row["tokens_per_s"] / 1e12
        assert row["tflops_per_gpu"] == pytest.approx(rate, abs=1e-3)
    assert "smartmoe_static:direct+zero3" in capsys.readouterr().out
    skewed = ["--trace", "synthetic:zipf-strong", "--policy", "greedy", "--interval", "1", "--profile", "smartmoe"]
    assert train_step.main([*argv, *skewed, "--systems", "smartmoe"]) == 0
    assert json.loads(file.read_text())["settings"]["gate"]["kind"] == "trace"
    assert train_step.main([*argv, "--systems", "smartmoe:drect"]) == 2
    assert 'dispatcher "drect" is not one of' in capsys.readouterr().err
    assert train_step.main([*argv, "--systems", "smartmoe+zero4"]) == 2
    assert '"+zero4" is neither "+plain"' in capsys.readouterr().err
    args = train_step.parse_args([*argv, "--plan", "pp1-dp2-ep1"])
    base = inputs.read_model(args.model, args.configs)
    assert train_step.config_of(args, base, "smartmoe_static+plain+zero3", 2).workload.zero == 3


def test_out_of_memory_is_a_row(capsys):
    row = {"system": "a", "status": "oom", "reason": "rank 0: out"}
    assert train_step.format_row(row, 5).split() == ["a", "oom:", "rank", "0:", "out"]
    assert measure.spread([1.0, 3.0])["median"] == 2.0


def test_a_profile_counts_overlapping_kernels_once_in_busy_time():
    kernels = [
        Kernel("nvjet_sm90_tst", 0.0, 10e3),
        Kernel("ncclDevKernel_SendRecv", 5e3, 12e3),
        Kernel("void smartmoe::permute_kernel<T>", 20e3, 21e3),
        Kernel("nvjet_sm90_tst", 21e3, 25e3),
    ]
    found = kernel_times.breakdown(reversed(kernels), wall_us=30e3)
    assert (found["busy_ms"], found["idle_ms"], found["num_kernels"]) == (17.0, 13.0, 4)
    assert found["by_kind_ms"] == {"dense GEMM": 14.0, "exchange": 7.0, "expert rows": 1.0}
    assert found["by_kernel"][0] == {"name": "nvjet_sm90_tst", "ms": 14.0, "calls": 2}
    text = kernel_times.format_breakdown(found | {"ranges_ms": {"passes": 3.0}}, top=1)
    assert "idle 13.0" in text and text.count("nvjet") == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96>>", "attention"),
        ("smartmoe::grouped_gemm_kernel<256, 128>(CUtensorMap)", "expert GEMM"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("sum_kernel", "exchange"),
        ("return_kernel", "exchange"),
        ("update_kernel", "optimizer"),
        ("accumulate_kernel", "gradient sums"),
        ("norm_backward_kernel", "norm"),
        ("loss_forward_kernel", "softmax, loss"),
        ("Memset (Device)", "copy, fill"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kernel_times.kind_of(name) == kind
