"""Alpa's benchmark with real DeepSpeed on CPU worlds of 1, 2 and 4 processes: ZeRO stages, expert groups and both back ends
compute the same. One world runs many cases, because starting one costs seconds."""

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from smartmoe import layer
from smartmoe.hosts.deepspeed_alpa import options
from tests.dist import spawn

deepspeed = pytest.importorskip("deepspeed", reason='needs the extra: pip install --no-build-isolation ".[deepspeed]"')
from deepspeed.accelerator import get_accelerator  # noqa: E402

from smartmoe.hosts.deepspeed import engine as host_engine  # noqa: E402
from smartmoe.hosts.deepspeed import moe as host_moe  # noqa: E402
from smartmoe.hosts.deepspeed_alpa import bench, engine, gumbel, moe  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CACHE, SCRIPT = ROOT / ".cache" / "smartmoe", ROOT / "scripts" / "alpa" / "run_deepspeed_benchmark.sh"
ITERATIONS = 2
TOLERANCE = 1e-5  # relative, fp32; 2e-7 was seen
BOTH = ("deepspeed", "smartmoe")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; `words` are further words of the command line. SGD, because losses then show gradients that are
    off by a factor, which Adam and Adafactor hide."""

    backend: str
    ep: int = 1
    zero: int = 0
    optimizer: str = "sgd"
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Curve:
    loss: list[float]
    expert_norm: list[float]  # of each logical expert of each layer


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a world of four reports beside its runs."""

    block_results: dict[str, list[torch.Tensor]]
    problems: dict[str, str]


def both(*args, **kwargs) -> list[Run]:
    return [Run(backend, *args, **kwargs) for backend in BOTH]


# The same losses and experts from all of these.
PARITY = {
    1: [*both(1, 0), *both(1, 2)],
    2: [*both(1, 0), *both(2, 1), *both(2, 2), *both(2, 2, words=("--capture", "both"))],
    4: [*both(1, 0), *both(1, 2), *both(2, 1), *both(2, 2), *both(4, 2)],
}
# The same from each pair. Without ZeRO, DeepSpeed clips by the mean of the ranks' gradient norms, which depends on where
# experts are: other losses than above, 1e-4 off here. Adafactor sees each rank's flat partition.
PAIRS = [
    *both(2, 0),
    *both(4, 0),
    *(run for optimizer in ("adamw", "adafactor", "adafactor-momentum") for run in both(4, 2, optimizer)),
    *both(2, 2, words=("--activation", "relu", "--second", "argmax", "--dropout", "0")),
]
NO_RECOMPUTE = both(2, 2, words=("--no-recompute",))
HALF = both(2, 2, "adafactor", words=("--precision", "bf16"))


def train(run: Run) -> Curve:
    """The losses of a run as a user would start it, and where its experts ended."""
    device = torch.device("cpu")
    words = [str(dist.get_world_size()), "--suite", "tiny", "--backend", run.backend, "--cache", str(CACHE)]
    words += ["--ep", str(run.ep), "--zero", str(run.zero), "--balance-weight", "0.01", *run.words]
    args, case = options.parse(words)
    args.optimizer = run.optimizer
    tokens = read_tokens()
    built = bench.build(args, case, device)
    losses = [bench.run_iteration(built, tokens, case, idx, device)[0] for idx in range(ITERATIONS)]
    assert bool(built.module.captured) == ("--capture" in run.words)
    built.module.release()
    assert not built.module.captured
    return Curve(losses, norms(built))


@functools.cache
def read_tokens():
    return bench._shared_tokens(*options.parse(["1", "--suite", "tiny", "--cache", str(CACHE)]))


def norms(built) -> list[float]:
    """The norm of the second weight of every expert, from all ranks in the order of logical experts."""
    mine = []
    for block in (module for module in built.module.modules() if isinstance(module, moe.MoE)):
        if isinstance(block, moe.SmartMoE):
            mine.append([weight.float().norm().item() for weight in block.layer.experts.w2_LFD])
        else:
            experts = block.deepspeed_moe.experts.deepspeed_experts
            mine.append([expert.down.weight.float().norm().item() for expert in experts])
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [norm for idx in range(len(mine)) for part in parts[: block.ep_size] for norm in part[idx]]


def world(rank: int, runs: list[Run]) -> tuple[dict[Run, Curve], Seen | None]:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    host_engine.init_world("gloo")
    # experts and routers that matter: with the usual 0.02 the loss hardly notices them
    layer.INIT_STD = host_moe.INIT_STD = 0.2
    engine.OPTIMIZERS["sgd"] = lambda groups: torch.optim.SGD(groups, lr=0.5)
    blocks = build_blocks() if dist.get_world_size() == 4 else {}
    seen = Seen(block_results(blocks), refusals(blocks)) if blocks else None
    half = get_accelerator().is_bf16_supported()
    return {run: train(run) for run in runs if half or run not in HALF}, seen


def build_blocks() -> dict[str, torch.nn.Module]:
    """The same layer in both back ends, experts over groups of two of the four ranks."""
    args, case = options.parse(["4", "--suite", "tiny", "--backend", "deepspeed", "--ep", "2"])
    config = moe.layer_config(case, dispatcher="auto", activation="gelu", seed=1, ranks_per_node=4)
    built = {kind: moe.build_moe(kind, config, 1, sample=True, device="cpu") for kind in BOTH}
    built["deepspeed"].set_deepspeed_parallelism()
    never_asks(moe.layer_config(case, dispatcher="direct", activation="gelu", seed=1, ranks_per_node=4))
    return built


def never_asks(config) -> None:
    """The direct exchange makes room without asking the host how much, as the capacity says."""
    block = moe.build_moe("smartmoe", config, 1, sample=True, device="cpu")

    def ask(*args):
        raise AssertionError("the host waited")

    block.layer.dispatcher._rows_needed = ask
    for _ in range(2):  # every token takes the same first expert
        block(torch.ones(3, 32, 32), torch.arange(96).view(3, 32))
    block.layer.dispatcher.check()


def block_results(blocks) -> dict[str, list[torch.Tensor]]:
    """Output, balance loss and gradients of input, router and first local expert, by back end, on tokens of this rank."""
    results = {}
    for kind, block in blocks.items():
        generator = torch.Generator().manual_seed(10 + dist.get_rank())
        x = torch.randn(3, 32, 32, generator=generator).requires_grad_()
        weight = torch.randn(3, 32, 32, generator=generator)
        torch.manual_seed(dist.get_rank())
        y, balance_loss = block(x, torch.arange(96).view(3, 32))
        ((y * weight).sum() + 7 * balance_loss).backward()
        if kind == "smartmoe":
            router, expert = block.layer.gate.weight_ED.grad, block.layer.experts.w1_LDF.grad[0].t()
        else:
            router = block.deepspeed_moe.gate.wg.weight.grad
            expert = block.deepspeed_moe.experts.deepspeed_experts[0].up.weight.grad
        results[kind] = [tensor.detach().clone() for tensor in (y, balance_loss, x.grad, router, expert)]
    return results


def refusals(blocks) -> dict[str, str]:
    """The messages of mistakes, by mistake."""
    _, case = options.parse(["4", "--suite", "tiny"])
    problems = {}

    def attempt(name, function, *arguments):
        try:
            function(*arguments)
            problems[name] = "accepted"
        except ValueError as error:
            problems[name] = str(error)

    attempt("zero 3", engine.engine_config, case, 3, "fp32")
    attempt("ep", host_moe.create_expert_groups, 3)
    for kind, block in blocks.items():
        attempt(f"captured {kind}", moe.check_waits_for_nothing, block)
        groups = host_engine.parameter_groups(block)
        attempt(f"plain {kind}", host_engine.make_engine, block, torch.optim.SGD(block.parameters(), lr=1.0), {})
        attempt(f"missing {kind}", host_engine.check_groups, block, groups[:1])
        attempt(f"twice {kind}", host_engine.check_groups, block, [*groups, groups[-1]])
        attempt(f"fine {kind}", host_engine.check_groups, block, groups)
        small = host_engine.parameter_groups(block, max_numel=100)
        attempt(f"small {kind}", host_engine.check_groups, block, small)
        assert all(group["params"] for group in small) and len(small) > len(groups)
    attempt("backend", lambda: moe.build_moe("tutel", None, 1, sample=True, device="cpu"))
    return problems


def test_nothing_of_the_engine_waits_for_the_gpu_between_micro_steps():
    """Its throughput timer would, before and after each: the host could not prepare the next one meanwhile."""
    _, case = options.parse(["1", "--suite", "tiny"])
    timers = deepspeed.runtime.config.get_timers_config(engine.engine_config(case, 2, "bf16"))
    assert not timers.enabled or not timers.synchronized


def test_what_cannot_be_captured_on_a_gpu_is_refused_before_it_is_taken():
    args, _ = options.parse(["2", "--suite", "tiny", "--backend", "smartmoe", "--capture", "smartmoe"])
    with pytest.raises(ValueError, match="9.0, float32 are computed one by one"):
        bench.check_capture(args, (9, 0))
    args.precision = "bf16"
    bench.check_capture(args, (9, 0))
    with pytest.raises(ValueError, match="8.0, bfloat16 are computed one by one"):
        bench.check_capture(args, (8, 0))
    args.backend = "deepspeed"  # of which nothing is captured
    bench.check_capture(args, (8, 0))


def test_a_measurement_lets_go_of_its_graphs(monkeypatch):
    """Process groups, which end behind it, wait for graphs that hold their collectives."""
    released = []
    built = SimpleNamespace(module=SimpleNamespace(release=lambda: released.append(True)))
    monkeypatch.setattr(bench, "build", lambda *_: built)
    monkeypatch.setattr(bench, "run_iteration", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(bench, "_shared_tokens", lambda *_: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bench.measure(*options.parse(["1", "--suite", "tiny", "--backend", "deepspeed"]), torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert released


def test_gumbel_noise_is_that_of_torchs_distribution_in_few_operations():
    like, one = torch.zeros(1000, 16), torch.ones(())
    torch.manual_seed(3)
    expected = torch.distributions.Gumbel(one - 1, one).rsample(like.shape)
    torch.manual_seed(3)
    with torch.profiler.profile() as profile:
        noise = gumbel.gumbel(like)
    assert torch.equal(noise, expected)
    computed = [event.name for event in profile.events() if event.name in ("aten::mul_", "aten::add_", "aten::log_")]
    assert len(computed) == 4


@pytest.fixture(scope="module")
def four():
    return spawn(world, 4, PARITY[4] + PAIRS + NO_RECOMPUTE + HALF)


def assert_same(curve: Curve, reference: Curve, label) -> None:
    assert curve.loss == pytest.approx(reference.loss, rel=TOLERANCE), label
    assert curve.expert_norm == pytest.approx(reference.expert_norm, rel=TOLERANCE), label


def test_four_processes_agree_whatever_ep_zero_and_back_end(four):
    curves, _ = four[0]
    reference = curves[Run("deepspeed")]
    assert reference.loss[-1] < reference.loss[0] - 0.03, "SGD with this rate learns within the run"
    for run in PARITY[4]:
        assert_same(curves[run], reference, run)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_and_two_processes_agree(num_ranks):
    (curves, _), *_ = spawn(world, num_ranks, PARITY[num_ranks])
    for run in PARITY[num_ranks]:
        assert_same(curves[run], curves[PARITY[num_ranks][0]], run)


def test_the_command_measures_and_writes(tmp_path):
    """As a user starts it, with one process and SmartMoE's layer."""
    words = [SCRIPT, "1", "--suite", "tiny", "--backend", "smartmoe", "--iterations", "2", "--warmup", "0"]
    environ = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--cache", CACHE, "--out", tmp_path], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert len(result["seconds"]) == len(result["losses"]) == 2 and result["versions"]["deepspeed"].startswith("0.19")
    assert (tmp_path / options.TSV_NAME).read_text().count("\n") == 1 and "tokens/s" in done.stdout


def test_every_rank_reports_the_same_losses(four):
    for curves, _ in four[1:]:
        for run, curve in curves.items():
            assert curve.loss == four[0][0][run].loss


def test_both_back_ends_agree_where_others_differ(four):
    curves, _ = four[0]
    for theirs, ours in zip(PAIRS[::2], PAIRS[1::2], strict=True):
        assert_same(curves[ours], curves[theirs], ours)
    assert curves[PAIRS[0]].loss == pytest.approx(curves[Run("deepspeed")].loss, rel=1e-3)


def test_recomputation_changes_nothing(four):
    curves, _ = four[0]
    for run in NO_RECOMPUTE:
        assert_same(curves[run], curves[Run(run.backend, 2, 2)], run)


def test_half_precision_trains(four):
    curves, _ = four[0]
    if HALF[0] not in curves:
        pytest.skip("DeepSpeed says that this CPU has no bfloat16")
    for run in HALF:
        assert curves[run].loss[0] == pytest.approx(curves[Run("deepspeed")].loss[0], rel=2e-3), run
        assert curves[run].loss[-1] < curves[run].loss[0], run


def test_one_layer_is_the_same_in_both_back_ends(four):
    for _, seen in four:
        for ours, theirs in zip(seen.block_results["smartmoe"], seen.block_results["deepspeed"], strict=True):
            assert theirs.abs().max() > 1e-3
            assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_mistakes_are_named(four):
    problems = four[0][1].problems
    assert "ZeRO-3 does not work" in problems["zero 3"]
    assert "ep = 3 does not divide the 4 ranks" in problems["ep"]
    assert "is not one of deepspeed, smartmoe" in problems["backend"]
    for kind in BOTH:
        assert "belongs to an expert, but its group" in problems[f"plain {kind}"]
        assert "in no group of the optimizer" in problems[f"missing {kind}"]
        assert "in several groups of the optimizer" in problems[f"twice {kind}"]
        assert problems[f"fine {kind}"] == problems[f"small {kind}"] == "accepted"
    assert "the host wait for sizes" in problems["captured smartmoe"] and problems["captured deepspeed"] == "accepted"
