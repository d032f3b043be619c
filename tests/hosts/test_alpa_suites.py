"""The models, cases and formulas of Alpa's DeepSpeed benchmark. The numbers of this file are those of the artifact."""

import ast
from pathlib import Path

import pytest

from smartmoe.hosts.deepspeed_alpa import suites

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("__init__", "suites", "options", "launch", "report")
TORCH_FREE = (
    ROOT / "src" / "smartmoe" / "hosts" / "__init__.py",
    *(ROOT / "src" / "smartmoe" / "hosts" / "deepspeed_alpa" / f"{name}.py" for name in NAMES),
)

# model: H, L, E, billions of parameters, PFLOPs of an iteration with groups of 2048, 4096 and 8192 tokens
TABLE = {
    "380M": (768, 8, 8, "0.3835", "1.580", "1.791", "2.214"),
    "690M": (768, 8, 16, "0.6857", "1.580", "1.791", "2.214"),
    "1.3B": (768, 16, 16, "1.3468", "3.006", "3.428", "4.273"),
    "2.4B": (1024, 16, 16, "2.3830", "4.993", "5.556", "6.682"),
    "4.5B": (1024, 16, 32, "4.5316", "4.994", "5.557", "6.683"),
    "7.1B": (1280, 16, 32, "7.0696", "7.474", "8.177", "9.585"),
    "10B": (1536, 16, 32, "10.1696", "10.446", "11.291", "12.980"),
    "27B": (2048, 16, 48, "26.6481", "17.871", "18.997", "21.249"),
    "70B": (2048, 32, 64, "70.4152", "35.333", "37.586", "42.090"),
    "140B": (2048, 32, 128, "139.1536", "35.351", "37.603", "42.108"),
}
# suite, GPUs: model, micro-batches, micro-batch, ep, expert-dp, experts of a rank, gating group, capacity
CASES = {
    ("artifact", 1): ("380M", 128, 8, 1, 1, 8, 8192, 2048),
    ("artifact", 2): ("690M", 64, 8, 2, 1, 8, 8192, 1024),
    ("artifact", 4): ("1.3B", 32, 8, 4, 1, 4, 8192, 1024),
    ("artifact", 8): ("2.4B", 16, 8, 2, 4, 8, 8192, 1024),
    ("artifact", 16): ("4.5B", 8, 8, 8, 2, 4, 8192, 512),
    ("artifact", 32): ("10B", 8, 4, 8, 4, 4, 4096, 256),
    ("paper", 8): ("2.4B", 16, 8, 4, 2, 4, 8192, 1024),
    ("paper", 16): ("10B", 8, 8, 8, 2, 4, 8192, 512),
    ("paper", 32): ("27B", 8, 4, 8, 4, 6, 4096, 171),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_flops_are_those_of_the_artifact(name):
    hidden, layers, experts, billions, *pflops = TABLE[name]
    model = suites.MODELS[name]
    assert (model.hidden_size, model.num_layers, model.num_experts) == (hidden, layers, experts)
    assert (model.seq_len, model.vocab_size, model.num_heads, model.ffn_size) == (1024, 32000, 16, 8 * hidden)
    assert f"{suites.parameter_count(model) / 1e9:.4f}" == billions
    counted = [suites.iteration_flops(model, 1024, group) / 1e15 for group in (2048, 4096, 8192)]
    assert [f"{count:.3f}" for count in counted] == pflops


@pytest.mark.parametrize(("suite", "num_gpus"), CASES)
def test_cases_are_those_of_the_artifact(suite, num_gpus):
    case = suites.find_case(suite, num_gpus)
    got = (case.model.name, case.num_micro_batches, case.micro_batch_size, case.ep, case.expert_dp)
    assert (*got, case.experts_per_rank, case.group_size, case.capacity) == CASES[suite, num_gpus]
    assert case.tokens == 1_048_576


def test_every_case_of_every_suite_divides():
    for suite, cases in suites.SUITES.items():
        for num_gpus in cases:
            assert suites.find_case(suite, num_gpus).num_gpus == num_gpus
    assert set(suites.SUITES["artifact"]) == set(suites.SUITES["paper"]) == set(suites.NUM_GPUS)


def test_group_terms_are_the_shares_that_the_artifact_credits():
    """38% of the counted work of 380M is the group terms of 8192 tokens, and 26% of 10B's."""
    for name, group, share in (("380M", 8192, 0.38), ("1.3B", 8192, 0.40), ("10B", 8192, 0.26), ("27B", 4096, 0.12)):
        model = suites.MODELS[name]
        whole, without = (suites.iteration_flops(model, 1024, size) for size in (group, None))
        assert round(1 - without / whole, 2) == share


def test_useful_work_leaves_out_recomputation_and_groups():
    case = suites.find_case("artifact", 1)
    rates = suites.tflops(case, seconds=1.0)
    logits = 6 * case.tokens * 768 * 32000
    layers = suites.iteration_flops(case.model, 1024, None) - logits
    assert rates["useful"] == pytest.approx((layers * 3 / 4 + logits) / 1e12)
    assert rates["alpa"] == pytest.approx(1580, abs=0.5) and rates["artifact"] == pytest.approx(2214, abs=0.5)
    assert suites.tflops(suites.find_case("artifact", 4), 2.0)["alpa"] == pytest.approx(3006 / 2 / 4, abs=0.1)


def test_what_does_not_divide_or_does_not_exist_is_said():
    for problem, arguments in (
        ("ep = 3 does not divide the 8 ranks", dict(suite="artifact", num_gpus=8, ep=3)),
        ("ep = 3 does not divide the 16 experts of 2.4B", dict(suite="artifact", num_gpus=8, ep=3)),
        ("8 ranks x 3 micro-batches", dict(suite="artifact", num_gpus=8, num_micro_batches=3)),
        ("must be at least 1", dict(suite="artifact", num_gpus=8, ep=0)),
        ("only for 1, 2, 4", dict(suite="tiny", num_gpus=8)),
        ('did you mean "1.3B"', dict(suite="artifact", num_gpus=2, model="1.3b")),
        ("is not one of artifact", dict(suite="artefact", num_gpus=2)),
    ):
        with pytest.raises(ValueError, match=problem):
            suites.find_case(**arguments)
    assert suites.find_case("artifact", 2, model="1.3B").model.num_layers == 16


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: path.name)
def test_tables_launcher_and_reports_never_import_torch(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert not {name.split(".")[0] for name in names} & {"torch", "deepspeed"}
