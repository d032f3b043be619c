"""Figure 8's model on real DeepSpeed, CPU worlds of 1 and 2 processes: the same losses as SmartMoE's trainer where nothing is
dropped, and as SmartMoE's layer with DeepSpeed's gate where a capacity drops. One world runs many cases, because starting one
costs seconds."""

import argparse
import dataclasses
import gc
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from smartmoe import gates, layer, record
from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, ParallelPlan, RunConfig, Workload, check, to_dict
from smartmoe.data import load_tokens
from smartmoe.gpt import GPT
from smartmoe.hosts.deepspeed.limits import PADDED
from smartmoe.mesh import build_mesh
from smartmoe.trainer import Trainer
from tests.dist import spawn

deepspeed = pytest.importorskip("deepspeed", reason='needs the extra: pip install --no-build-isolation ".[deepspeed]"')

from deepspeed.accelerator import get_accelerator  # noqa: E402

from smartmoe.hosts.deepspeed import engine, moe, pretrain_gpt  # noqa: E402
from smartmoe.hosts.deepspeed_alpa.gumbel import DeepSpeedGumbelGate  # noqa: E402
from smartmoe.hosts.deepspeed_alpa.moe import SmartMoE  # noqa: E402

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "smartmoe"
TOLERANCE = 1e-5  # relative, fp32
MODEL = ModelConfig(
    name="tiny", num_layers=2, hidden_size=32, ffn_size=64, num_heads=4, seq_len=32, vocab_size=320, num_experts=8
)
WORK = Workload(global_batch_size=16, micro_batch_size=2, iterations=5, warmup_iterations=0, lr=3e-3, seed=1)
DROPLESS, LIMITED = GateConfig(kind="naive"), GateConfig(kind="gshard", capacity=1.2, scope="local", balance_weight=0.1)


def config(dp=1, ep=1, zero=1, gate=DROPLESS, model=MODEL, **work) -> RunConfig:
    work = dataclasses.replace(WORK, zero=zero, **work)
    return RunConfig(
        system="deepspeed", model=model, gate=gate, layer=PADDED, workload=work, plan=ParallelPlan(dp=dp, ep=ep),
        cluster=ClusterSpec(ranks_per_node=dp),
    )  # fmt: skip


class WithOurLayer(pretrain_gpt.DeepSpeedTrainer):
    """DeepSpeed's engine with SmartMoE's layer, which routes as DeepSpeed's gate does."""

    def _make_moe(self, layer_idx):
        block = SmartMoE(self.config, layer_idx, sample=self.config.gate.kind == "gshard", device=self.device)
        block.register_buffer("count_E", torch.ones(MODEL.num_experts, dtype=torch.int64), persistent=False)
        assert isinstance(block.layer.gate, DeepSpeedGumbelGate)
        self.layers[layer_idx] = block
        return block


@dataclasses.dataclass(frozen=True)
class Curve:
    loss: list[float]
    balance_loss: list[float]
    grad_norm: list[float]
    load: list[float]
    loss_scale: list[float]
    skipped: list[bool]


def train(trainer) -> Curve:
    results = [trainer.run_iteration() for _ in range(trainer.config.workload.iterations)]
    return Curve(
        [result.lm_loss for result in results],
        [result.balance_loss for result in results],
        [result.optimizer.grad_norm for result in results],
        [result.load_max_over_mean for result in results],
        [result.optimizer.loss_scale for result in results],
        [result.optimizer.skipped for result in results],
    )


def ours(tokens) -> Curve:
    """SmartMoE's trainer in this process alone. Its router has a bias, which starts at zero, and DeepSpeed's has none: it is
    kept at zero."""
    run = check(config(zero=0))
    trainer = Trainer(run, build_mesh(run.plan, torch.device("cpu")), tokens)
    for block in trainer.layers.values():
        block.gate.bias_E.register_hook(torch.zeros_like)
    return train(trainer)


CASES = {
    1: {
        "zero 0": config(zero=0), "zero 1": config(), "zero 2": config(zero=2),
        "fp16": config(dtype="float16"), "overflow": config(dtype="float16", initial_loss_scale=2.0**30),
    },
    2: {
        "ep 1": config(2, 1), "ep 2": config(2, 2), "ep 2 zero 2": config(2, 2, 2),
        "capacity": config(2, 2, gate=LIMITED),
        "top-1": config(2, 2, gate=dataclasses.replace(LIMITED, kind="switch"), model=dataclasses.replace(MODEL, top_k=1)),
        "bf16": config(2, 2, dtype="bfloat16"),
    },
}  # fmt: skip


def world(rank: int, folder: str) -> dict[str, Curve]:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    engine.init_world("gloo")
    # experts and routers that matter: with 0.02 the loss hardly notices them
    gates.INIT_STD = layer.INIT_STD = moe.INIT_STD = 0.2
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but it computes
    tokens, cpu = load_tokens((), MODEL.vocab_size, CACHE, seed=WORK.seed), torch.device("cpu")
    cases = CASES[dist.get_world_size()]
    curves = {name: train(pretrain_gpt.DeepSpeedTrainer(run, tokens, cpu)) for name, run in cases.items()}
    if dist.get_world_size() == 1:
        return {**curves, "ours": ours(tokens)}
    curves["capacity, our layer"] = train(WithOurLayer(cases["capacity"], tokens, cpu))
    if rank == 0:
        record.create_run(folder, "ds", to_dict(cases["ep 2"]), [], provenance={})
    dist.barrier()
    before = num_models()
    pretrain_gpt._run(argparse.Namespace(run_dir=Path(folder), cache=CACHE))
    assert num_models() == before, "the model outlives its run: a shared world would run out of memory"
    return curves


def num_models() -> int:
    gc.collect()
    return sum(isinstance(one, GPT) for one in gc.get_objects())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return spawn(world, 1, str(tmp_path_factory.mktemp("one")))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return spawn(world, 2, str(folder / "run")), folder / "run"


def assert_same(curve: Curve, other: Curve, keys=("loss", "balance_loss", "grad_norm")) -> None:
    for key in keys:
        assert getattr(curve, key) == pytest.approx(getattr(other, key), rel=TOLERANCE), key


@pytest.mark.parametrize("case", ["zero 0", "zero 1", "zero 2"])
def test_one_process_of_deepspeed_trains_as_one_of_ours(one, case):
    """Without ZeRO DeepSpeed does not tell the norm of its fp32 gradients."""
    assert_same(one[case], one["ours"], ("loss",) if case == "zero 0" else ("loss", "balance_loss", "grad_norm"))
    assert one["ours"].loss[-1] < one["ours"].loss[0] - 0.1


@pytest.mark.parametrize("case", ["ep 1", "ep 2", "ep 2 zero 2"])
def test_two_processes_train_as_one_of_ours(one, two, case):
    assert_same(two[0][0][case], one["ours"])
    assert two[0][0][case].load == pytest.approx(two[0][1][case].load)


def test_fullest_rank_is_that_of_our_trainer(one, two):
    assert two[0][0]["ep 1"].load == pytest.approx([1.0] * WORK.iterations), "every rank computes its own tokens"
    assert all(1 < load < 2 for load in two[0][0]["ep 2"].load)


def test_a_capacity_drops_as_with_our_layer_and_deepspeeds_gate(two):
    """Capacity is per rank in both. SmartMoE's own gates limit over all ranks and do not renormalise: other losses."""
    theirs, mine = two[0][0]["capacity"], two[0][0]["capacity, our layer"]
    assert_same(theirs, mine)
    assert all(loss > 1 for loss in theirs.balance_loss), "GShard's balance loss, summed over the layers"


def test_losses_are_scaled_in_fp16(one):
    curve, overflow = one["fp16"], one["overflow"]
    assert curve.loss == pytest.approx(one["ours"].loss, rel=2e-3) and not any(curve.skipped)
    assert curve.loss_scale == [WORK.initial_loss_scale] * WORK.iterations
    assert all(overflow.skipped) and overflow.loss_scale == [2.0 ** (30 - idx) for idx in range(WORK.iterations)]


@pytest.mark.parametrize("case", ["top-1", "bf16"])
def test_other_settings_train(two, case):
    curve = two[0][0][case]
    assert curve.loss[-1] < curve.loss[0] - 0.1


def test_the_run_directory_has_what_the_figures_read(two):
    curves, folder = two
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] for line in lines] == pytest.approx(curves[0]["ep 2"].loss, rel=TOLERANCE)
    assert all(line["step_ms"] > 0 and line["load_max_over_mean"] >= 1 and not line["skipped"] for line in lines)
    assert "lm loss:" in (folder / "train.log").read_text()
