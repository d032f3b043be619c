"""The Swin transformer: its parts against plain float64 maths, its training under plans against one process."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dist import spawn

from smartmoe import checkpoint, cli
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
    check,
    from_dict,
    read_table,
    replica_bytes,
    to_dict,
)
from smartmoe.images import why_no_images
from smartmoe.mesh import build_mesh
from smartmoe.models import flops_per_sample
from smartmoe.placement import Replicas
from smartmoe.run_log import _save_trace
from smartmoe.samples import load_data
from smartmoe.swin import PatchMerging, Swin, WindowAttention
from smartmoe.swin_sizes import SwinConfig, block_sizes, has_experts
from smartmoe.trace import ExpertTrace
from smartmoe.trainer import Trainer

MODEL = ModelConfig(
    name="swin-tiny", num_layers=4, hidden_size=16, ffn_size=32, num_heads=2, seq_len=16, num_experts=4, top_k=2,
    moe_every=2, swin=SwinConfig(image_size=16, patch_size=4, window_size=2, depths=(2, 2)),
)  # fmt: skip
NUM_STEPS = 4
TOLERANCE = 1e-5


def make_config(plan=None, model=MODEL, samples=8, **changes) -> RunConfig:
    plan = plan or ParallelPlan()
    work = Workload(
        global_batch_size=samples, micro_batch_size=samples // 2 // plan.dp, iterations=20, lr=3e-3, data=("synthetic",)
    )
    work = dataclasses.replace(work, **changes.pop("workload", {}))
    cluster = ClusterSpec(name="test", ranks_per_node=plan.world_size, intra_node_gbytes_per_s=1e6)  # a copy costs nothing
    gate = changes.pop("gate", GateConfig(kind="gshard", capacity=1.5))
    return check(RunConfig(model=model, gate=gate, workload=work, plan=plan, cluster=cluster, **changes))


def make_trainer(config) -> Trainer:
    return Trainer(config, build_mesh(config.plan, torch.device("cpu")), load_data(config))


# ------------------------------------------------------------------------------------------------ parts, in float64


def _reference_attention(layer: WindowAttention, x_BTD: torch.Tensor) -> torch.Tensor:
    """Attention among all patches of the image; those that do not see each other are masked."""
    side, window, heads = layer.side, layer.window, layer.num_heads
    place = torch.arange(side**2)
    at_T2 = torch.stack([place // side, place % side], 1)
    offset_TT2 = at_T2[:, None] - at_T2[None]
    window_T2 = (at_T2 - layer.shift) % side // window
    sees_TT = (window_T2[:, None] == window_T2[None]).all(-1) & (offset_TT2.abs() < window).all(-1)
    scaled = offset_TT2.double() * 8 / (window - 1)
    scaled = scaled.sign() * (scaled.abs() + 1).log() / math.log(8)
    hidden = (scaled @ layer.offset_up.weight.t() + layer.offset_up.bias).clamp(min=0)
    bias_HTT = (hidden @ layer.offset_heads.weight.t()).permute(2, 0, 1)
    qkv = (x_BTD @ layer.qkv.weight.t() + layer.qkv.bias).unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    score = qkv[0] @ qkv[1].transpose(2, 3) / math.sqrt(layer.head_dim) + bias_HTT
    score = score.masked_fill(~sees_TT, -math.inf)
    y = score.softmax(-1) @ qkv[2]
    return y.transpose(1, 2).flatten(2) @ layer.out.weight.t() + layer.out.bias


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("side", "window"), [(4, 2), (6, 3), (8, 4), (4, 4), (2, 4)])
def test_attention_of_windows_is_masked_attention_of_the_image(side, window, place):
    torch.manual_seed(0)
    sizes = dataclasses.replace(
        MODEL, seq_len=side**2, swin=dataclasses.replace(MODEL.swin, window_size=window), hidden_size=8
    )
    layer = WindowAttention(sizes, place).double()
    assert layer.shift == (window // 2 if place and side > window else 0)
    x_BTD = torch.randn(3, side**2, 8, dtype=torch.float64)
    results = []
    for forward in (layer, lambda x: _reference_attention(layer, x)):
        x = x_BTD.clone().requires_grad_()
        y = forward(x)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *layer.parameters()])
        results.append([y, *grads])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)  # offsets are float32


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "place"), [(48, 1), (48, 0), (12, 1), (6, 0)])
def test_attention_on_a_gpu_has_the_gradients_of_float64(side, place):
    """The bias's among them: not every kernel for attention gives any. Windows of 12, as in figure 9."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    swin = dataclasses.replace(MODEL.swin, window_size=12)
    sizes = dataclasses.replace(MODEL, seq_len=side**2, swin=swin, hidden_size=64)
    layer = WindowAttention(sizes, place).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    x_BTD, results = torch.randn(4, side**2, 64, device="cuda", dtype=torch.bfloat16), []
    for module, dtype in ((layer, torch.bfloat16), (exact, torch.float64)):
        x = x_BTD.to(dtype).requires_grad_()
        y = module(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])])
    for name, mine, wanted in zip(["y", "x", *dict(layer.named_parameters())], *results, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error < 0.02, f"{name}: {error:.4f}"


@pytest.mark.gpu
def test_a_graph_changes_no_bit():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a GPU on which passes are captured")
    losses, device = [], torch.device("cuda")
    for cuda_graph in ("auto", "never"):
        config = make_config(
            model=dataclasses.replace(MODEL, hidden_size=64, ffn_size=128),
            layer=LayerConfig(dispatcher="direct", row_factor=1.0), workload={"dtype": "bfloat16", "cuda_graph": cuda_graph},
        )  # fmt: skip
        config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, device="cuda"))
        trainer = Trainer(config, build_mesh(config.plan, device), load_data(config))
        losses.append([trainer.run_iteration().lm_loss for _ in range(8)])
        assert trainer.graphs.is_recorded == (cuda_graph == "auto"), trainer.graphs.reason
        trainer.close()
    assert losses[0] == losses[1]


def test_merging_joins_four_neighbours_columns_outside():
    torch.manual_seed(0)
    merge = PatchMerging(MODEL).double()
    x_BRCD = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    joined = torch.empty(2, 2, 2, 64, dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            four = [x_BRCD[:, 2 * row + dr, 2 * column + dc] for dc in (0, 1) for dr in (0, 1)]
            joined[:, row, column] = torch.cat(four, -1)
    normal = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = normal.flatten(1, 2) @ merge.reduce.weight.t()
    torch.testing.assert_close(merge(x_BRCD.flatten(1, 2)), wanted)


def test_patches_are_a_convolution_of_the_image():
    model = Swin(MODEL, lambda layer_idx: torch.nn.Identity()).double()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kernel = model.patch.weight.view(16, 3, 4, 4)
    wanted = torch.nn.functional.conv2d(image, kernel, model.patch.bias, stride=4).flatten(2).transpose(1, 2)
    wanted = torch.nn.functional.layer_norm(wanted, (16,))
    torch.testing.assert_close(model._patches(image), wanted)


def test_every_layer_counts_its_own_patches_in_the_whole_data():
    trainer, seen = make_trainer(make_config()), {}
    for idx, layer in trainer.layers.items():
        layer.observers.append(lambda idx, routing, token_id_BT: seen.setdefault(idx, []).append(token_id_BT))
    trainer.iteration = 3
    trainer.run_iteration()
    first = 3 * 8
    for idx, tokens in ((1, 16), (3, 4)):
        wanted = torch.arange(first * tokens, (first + 8) * tokens).view(8, tokens)
        assert torch.equal(torch.cat(seen[idx]), wanted)


def test_the_model_of_figure_9_has_the_parameters_of_the_published_run():
    """16gpus/tutel in the paper's logs: 109,374,161 on a GPU with one expert of each layer, 518,656,721 with all 16. Its
    experts have no second bias that learns, its routers none."""
    model = _published_model()
    dense = sum(p.numel() for p in _skeleton(model).parameters())
    moe = [block_sizes(model, idx) for idx in range(model.num_layers) if has_experts(model, idx)]
    routers = sum(sizes.hidden_size * sizes.num_experts for sizes in moe)
    expert = sum((2 * sizes.hidden_size + 1) * sizes.ffn_size for sizes in moe)
    assert [len(moe), dense + routers + expert, dense + routers + 16 * expert] == [10, 109_374_161, 518_656_721]


def _published_model() -> ModelConfig:
    table = read_table(Path(__file__).resolve().parents[1] / "scripts" / "models.toml")["swin-moe-b"]
    return from_dict(ModelConfig, {"name": "swin-moe-b", **table})


def _skeleton(model: ModelConfig) -> Swin:
    with torch.device("meta"):
        return Swin(model, lambda layer_idx: torch.nn.Identity())


def test_flops_count_every_matrix_and_attention():
    stage_0 = 16 * (2 * (4 * 16**2 + 2 * 4 * 16) + 2 * 16 * 32 + (2 * 2 * 16 * 32 + 16 * 4))
    stage_1 = 4 * (2 * (4 * 32**2 + 2 * 4 * 32) + 2 * 32 * 64 + (2 * 2 * 32 * 64 + 32 * 4) + 4 * 16 * 32)
    assert flops_per_sample(MODEL) == 6 * (stage_0 + stage_1 + 48 * 16 * 16 + 32 * 10)


def test_what_is_told_of_layers_is_of_those_with_experts(tmp_path):
    """Tokens of the first of them in a trace; of copies, room for the largest of them."""
    later = dataclasses.replace(MODEL, swin=dataclasses.replace(MODEL.swin, moe_from=1))
    path = tmp_path / "trace.npz"
    _save_trace(path, [(1, np.zeros((1, 1, 2, 4), int))], make_config(model=later))
    assert ExpertTrace.load(path).meta["tokens_per_micro_batch_and_rank"] == 4 * 4
    expert = 2 * 32 * 64 + 64 + 32  # of the second of two layers
    history, exact = (OnlineConfig(replicate=mode, replica_slots=1) for mode in ("history", "exact"))
    # weights and sums of either layer, and what is staged of them
    assert replica_bytes(make_config(BOTH, online=history)) == 4 * expert * (2 * 2 + (2 * 2 + 2))
    assert replica_bytes(make_config(BOTH, online=exact)) == 4 * expert * (2 + 2 + 1)


# ------------------------------------------------------------------------------------------------------------- plans


def _copy(trainer):
    """The first expert of each rank to the other one, which takes half of its tokens, for the steps to come."""
    share_EW = np.eye(2)[[0, 0, 1, 1]]
    share_EW[[0, 2]] = 0.5
    for layer in trainer.layers.values():
        layer.set_replicas(Replicas((2, 0), np.stack([share_EW] * 2)))


def _losses(config, folder=None, before=None):
    """Losses, with a checkpoint in `folder` after half of the steps; (experts moved, bytes sent for copies)."""
    trainer, losses, done = make_trainer(config), [], [0, 0]
    for step in range(NUM_STEPS):
        if before and step == 2:
            before(trainer)
        result = trainer.run_iteration()
        losses.append((result.lm_loss, result.balance_loss))
        done[0] += sum(event["num_moved"] for event in result.events)
        done[1] += result.replica_bytes
        if folder and step == NUM_STEPS // 2 - 1:
            trainer.save(folder)
    counts_RLME = trainer.online.gather_counts()
    copies_L = 4 * np.array([16, 4]) * config.model.top_k  # of a micro-batch, by layer
    copies_LM = counts_RLME.sum((0, 3))
    assert counts_RLME.shape[1:] == (2, 2, 4) and (copies_LM.T <= copies_L).all() and (copies_LM.T > copies_L / 2).all()
    return losses, done


BOTH = ParallelPlan(dp=2, ep=2)
CASES = {
    "expert parallel": (BOTH, {}),
    "recomputed, ZeRO-1": (dataclasses.replace(BOTH, recompute=True), {"workload": {"zero": 1}}),
    "recomputed, ZeRO-3": (ParallelPlan(dp=2, recompute=True), {"workload": {"zero": 3}}),
    "data parallel": (ParallelPlan(dp=2), {}),
    "moved by greedy": (BOTH, {"online": OnlineConfig(policy="greedy", interval=1)}),
    "moved by auto": (BOTH, {"online": OnlineConfig(policy="auto", interval=1, min_gain=0.0, horizon=10**6)}),
    "copies for each micro-batch": (BOTH, {"online": OnlineConfig(replicate="exact", replica_slots=1)}),
    "direct": (BOTH, {"layer": LayerConfig(dispatcher="direct")}),
}


def _run_cases(world_rank, folder):
    found = {name: _losses(make_config(plan, **changes)) for name, (plan, changes) in CASES.items()}
    copies = OnlineConfig(replicate="history", replica_slots=1)
    found["copies for steps"] = _losses(make_config(BOTH, online=copies), before=_copy)
    return found, _losses(make_config(BOTH), folder)[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin")
    return *spawn(_run_cases, 2, folder)[0], folder


def test_plans_mechanisms_and_dispatchers_follow_one_process(two_ranks):
    reference, found = np.array(_losses(make_config())[0]), two_ranks[0]
    assert np.ptp(reference[:, 0]) > 0.01
    for name, (curve, _) in found.items():
        np.testing.assert_allclose(np.array(curve), reference, rtol=TOLERANCE, err_msg=name)
    assert found["moved by greedy"][1][0] > 0
    assert found["copies for steps"][1][1] > 0 < found["copies for each micro-batch"][1][1]


def test_one_process_goes_on_where_two_ranks_stopped(two_ranks):
    _, saved, folder = two_ranks
    trainer = make_trainer(make_config())
    trainer.resume(checkpoint.latest(folder))
    assert trainer.iteration == NUM_STEPS // 2
    rest = [(result.lm_loss, result.balance_loss) for result in (trainer.run_iteration() for _ in range(NUM_STEPS // 2))]
    np.testing.assert_allclose(np.array(rest), np.array(saved[NUM_STEPS // 2 :]), rtol=TOLERANCE)
    other = make_trainer(make_config(model=dataclasses.replace(MODEL, swin=dataclasses.replace(MODEL.swin, num_classes=11))))
    with pytest.raises(ValueError, match="was written with model.swin"):
        other.resume(checkpoint.latest(folder))


LEARNER = dataclasses.replace(
    MODEL, hidden_size=32, ffn_size=64, seq_len=49, swin=SwinConfig(image_size=28, window_size=7, depths=(4,))
)


@pytest.mark.parametrize(("paths", "num_steps", "most"), [(("synthetic",), 15, 1.9), ((), 100, 1.75)])
def test_the_loss_falls(paths, num_steps, most):
    if reason := why_no_images(paths):
        pytest.skip(reason)
    config = make_config(model=LEARNER, samples=32, workload={"data": paths, "iterations": num_steps, "lr": 1e-2})
    trainer = make_trainer(config)
    losses = [trainer.run_iteration().lm_loss for _ in range(num_steps)]
    assert abs(losses[0] - math.log(10)) < 0.2
    assert np.mean(losses[-3:]) < most, losses


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 5}, "model.num_layers = 5 must be the blocks of all stages, 4"),
        ({"seq_len": 49}, "model.seq_len = 49 must be the patches of an image, 4 x 4 = 16"),
        ({"swin": {"image_size": 18}}, "model.swin.image_size = 18 must be a multiple of patch_size = 4 times 2"),
        ({"swin": {"window_size": 3}}, "window_size = 3 does not divide the 4 patches of stage 0's side"),
        ({"swin": {"depths": ()}}, "model.swin.depths = [] must have a number of blocks"),
        ({"swin": {"moe_from": 2}}, "model.swin.moe_from = 2 must be a stage, 0 .. 1"),
        ({"moe_every": 3}, "no stage from moe_from = 0 on has so many blocks"),
        ({"swin": {"num_classes": 0}}, "model.swin.num_classes = 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    changes = dict(changes)
    swin = dataclasses.replace(MODEL.swin, **changes.pop("swin", {}))
    with pytest.raises(ValueError) as error:
        make_config(model=dataclasses.replace(MODEL, swin=swin, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize("plan", [ParallelPlan(pp=2), ParallelPlan(tp=2), ParallelPlan(pp=2, vpp=2)])
def test_plans_that_cut_blocks_are_refused(plan):
    with pytest.raises(ValueError, match="must be 1: a Swin transformer is spread by dp and ep"):
        make_config(plan)


def test_the_planner_says_what_to_do_instead(capsys):
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    command = ["plan", "--model", "swin-moe-b", "--cluster", "cpu", "--gpus", "4", "--configs", str(scripts)]
    assert cli.main(command) == 2
    assert "swin-moe-b is a Swin transformer, which is not planned" in capsys.readouterr().err


def test_a_config_survives_its_file():
    config = make_config()
    table = to_dict(config)
    table["model"]["swin"]["depths"] = list(table["model"]["swin"]["depths"])
    assert from_dict(RunConfig, table) == config
    with pytest.raises(ValueError, match='swin: unknown key "depht"; did you mean "depths"'):
        from_dict(ModelConfig, {"swin": {"depht": [2]}})
    with pytest.raises(ValueError, match="swin: depths: expected a list of whole numbers"):
        from_dict(ModelConfig, {"swin": {"depths": [2, True]}})
