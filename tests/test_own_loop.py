"""The layer in a loop of one's own: sums of gradients against one process, moves with moments, the README's example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import spawn
from torch import nn

from smartmoe import own_loop
from smartmoe.config import ModelConfig, OnlineConfig, RunConfig
from smartmoe.layer import MoELayer
from smartmoe.online import OnlinePlacement
from smartmoe.own_loop import expert_state, reduce_gradients, send_copies
from smartmoe.placement import Placement, Replicas

ROOT = Path(__file__).resolve().parents[1]
SIZES = ModelConfig(hidden_size=16, ffn_size=32, num_experts=8, top_k=2)
STEPS, SAMPLES, TOKENS = 6, 4, 8
CASES = {
    "plain": OnlineConfig(),
    "moves": OnlineConfig(policy="greedy", interval=2),
    "copies": OnlineConfig(policy="auto", replicate="history", replica_slots=1),
    "exact": OnlineConfig(replicate="exact", replica_slots=1),
    "elsewhere": OnlineConfig(replicate="exact", replica_slots=1),
    "loaded": OnlineConfig(),
    "frozen": OnlineConfig(policy="auto", replicate="history", replica_slots=1),
}


class Model(nn.Module):
    def __init__(self, config, group):
        super().__init__()
        self.moe = MoELayer(config, layer_idx=0, ep_group=group, stage_group=group)
        self.head = nn.Linear(16, 16)

    def forward(self, x_BTD, token_id_BT):
        y_BTD, balance_loss = self.moe(x_BTD, token_id_BT)
        return self.head(x_BTD + y_BTD), balance_loss


def train(rank: int, world_size: int, online: OnlineConfig, replicas=None, name: str = "") -> dict:
    """Losses, events and the final weights of STEPS steps; every rank takes its share of the same samples. name: "loaded" gives
    the model other parameters, "elsewhere" other memory, "frozen" leaves the experts' first weights as they are."""
    group = dist.group.WORLD if world_size > 1 else None
    torch.manual_seed(0)
    model = Model(RunConfig(model=SIZES, online=online), group)
    if name == "loaded":
        model.load_state_dict(model.state_dict(), assign=True)
    if name == "elsewhere":
        for param in model.parameters():
            param.data = param.data.clone()
    model.moe.experts.w1_LDF.requires_grad_(name != "frozen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    placement = OnlinePlacement(
        [model.moe], online, ep_group=group, stage_group=group, state_of=lambda layer: expert_state(layer, optimizer)
    )
    if replicas is not None:
        model.moe.set_replicas(replicas)
    losses, events = [], []
    for iteration in range(1, STEPS + 1):
        data = torch.Generator().manual_seed(iteration)
        x_BTD = torch.randn(SAMPLES, TOKENS, 16, generator=data) + 1
        sample_B = iteration * SAMPLES + torch.arange(SAMPLES)
        mine = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
        token_id_BT = sample_B[:, None] * TOKENS + torch.arange(TOKENS)
        send_copies(model)
        y_BTD, balance_loss = model(x_BTD[mine], token_id_BT[mine])
        loss = (y_BTD - x_BTD[mine].sin()).square().mean() / world_size + 0.01 * balance_loss
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients(model, group)
        optimizer.step()
        total = loss.detach()
        if group is not None:
            dist.all_reduce(total)
        losses.append(total.item())
        events += placement.after_step(iteration)
    owned = model.moe.placement.experts_of_rank(rank)
    weights = list(model.moe.experts.parameters())
    return {
        "losses": losses,
        "moved": sum(event["num_moved"] for event in events),
        "experts": {expert: [p[slot].detach().clone() for p in weights] for slot, expert in enumerate(owned)},
        "head": model.head.weight.detach(),
    }


def ranks_cases(rank: int) -> dict:
    share_SEW = np.zeros((2, 8, 2))
    share_SEW[:, :4, 0] = share_SEW[:, 4:, 1] = 1
    share_SEW[:, [0, 7]] = 0.5  # half of these two goes to the rank that does not own them
    replicas = Replicas((7, 0), share_SEW)
    set_by_hand = ("copies", "frozen")
    move_factored_moments(rank)
    return {name: train(rank, 2, online, replicas if name in set_by_hand else None, name) for name, online in CASES.items()}


def move_factored_moments(rank: int) -> None:
    """What Adafactor keeps of experts' matrices, and AdamW of their biases, arrives where the experts do."""
    group = dist.group.WORLD
    layer = Model(RunConfig(model=SIZES), group).moe
    optimizers = factored(layer)
    online = OnlineConfig(policy="greedy")
    groups = {"ep_group": group, "stage_group": group, "state_of": lambda layer: expert_state(layer, *optimizers)}
    placement = OnlinePlacement([layer], online, **groups)
    state = expert_state(layer, *optimizers)
    assert len(state) == 4 + 2 * 2 + 2 * 2 and len({tensor.data_ptr() for tensor in state}) == len(state)
    for tensor in state:
        for slot, expert in enumerate(layer.placement.experts_of_rank(rank)):
            tensor[slot].fill_(expert)
    placement.move([(layer, Placement(2, (6, 1, 2, 5, 0, 3, 4, 7)))])
    for tensor in state:
        assert [tensor[slot].unique().item() for slot in range(4)] == [[6, 1, 2, 5], [0, 3, 4, 7]][rank], tensor.shape


def factored(layer: MoELayer) -> list[torch.optim.Optimizer]:
    """Adafactor for matrices, AdamW for biases, after a step."""
    params = list(layer.experts.parameters())
    kinds = {3: torch.optim.Adafactor, 2: torch.optim.AdamW}
    optimizers = [kind(param for param in params if param.dim() == dim) for dim, kind in kinds.items()]
    for param in params:
        param.grad = torch.ones_like(param)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def test_state_that_experts_share_is_refused():
    layer = Model(RunConfig(model=SIZES), None).moe
    matrices, biases = factored(layer)
    everything = torch.optim.Adafactor(layer.experts.parameters())
    everything.step()
    with pytest.raises(ValueError, match=r"^layer 0: Adafactor's col_var of b1_LF has the shape \[1, 32\], .* \[8, 32\]: exp"):
        expert_state(layer, everything)
    state = biases.state[layer.experts.b2_LD]
    for fine in (3, torch.ones(()), torch.ones(1), torch.ones(8, 3), [0.9, torch.ones(1)]):
        state["more"] = fine
        expert_state(layer, matrices, biases)
    for bad in (torch.ones(16), torch.ones(2, 8), [torch.ones(8)], {"left": torch.ones(8, 8)}):
        state["more"] = bad
        with pytest.raises(ValueError, match="AdamW's more of b2_LD"):
            expert_state(layer, matrices, biases)
    del state["more"]
    square = Model(RunConfig(model=ModelConfig(hidden_size=8, ffn_size=32, num_experts=8, top_k=2)), None).moe
    optimizer = torch.optim.SGD(square.parameters())
    optimizer.state[square.experts.b2_LD]["mean"] = torch.ones(8)  # over experts, or for each of them?
    with pytest.raises(ValueError, match=r"SGD's mean of b2_LD has the shape \[8\], the parameter \[8, 8\]"):
        expert_state(square, optimizer)


@pytest.fixture(scope="module")
def worlds():
    return {name: train(0, 1, OnlineConfig(), name=name) for name in ("", "frozen")}, spawn(ranks_cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_follow_one_process(worlds, name):
    alone, ranks = worlds[0].get(name, worlds[0][""]), worlds[1]
    cases = [rank[name] for rank in ranks]
    for case in cases:
        torch.testing.assert_close(case["losses"], alone["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(case["head"], alone["head"], rtol=1e-4, atol=1e-6)
    owned = cases[0]["experts"] | cases[1]["experts"]
    assert set(owned) == set(range(8)) and len(cases[0]["experts"]) == len(cases[1]["experts"]) == 4
    for expert, weights in alone["experts"].items():
        for mine, want in zip(owned[expert], weights, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)
    assert (cases[0]["moved"] > 0) == (name == "moves")


def test_an_unused_parameter_gets_zeros_and_dtypes_travel_apart(monkeypatch):
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16)])
    model[0](torch.ones(2, 4)).sum().backward()
    reduce_gradients(model, None)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert not model[1].weight.grad.any() and model[0].weight.grad.eq(2).all()


class Group:
    def __init__(self, num_ranks):
        self.size = lambda: num_ranks


def test_groups_that_leave_ranks_out_are_refused():
    with pytest.raises(ValueError, match=r"layer 0: experts spread over 1 ranks \(ep_group\), each on 1 .* the 2 ranks of "):
        reduce_gradients(Model(RunConfig(model=SIZES), None), Group(2))


def test_copies_travel_in_the_group_of_their_layer(monkeypatch):
    model = nn.ModuleList([MoELayer(RunConfig(model=SIZES, online=CASES["copies"]), layer_idx=idx) for idx in range(3)])
    model[1].ep_group = group = Group(1)
    sent = []
    monkeypatch.setattr(own_loop, "send_all", lambda replications, group: sent.append((len(replications), group)) or 5)
    monkeypatch.setattr(own_loop, "return_all", lambda replications, sums, group: sent.append((len(replications), group)))
    assert send_copies(model) == 10 and sent == [(2, None), (1, group)]
    reduce_gradients(model, None)
    assert sent[2:] == [(2, None), (1, group)]


def test_the_example_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if "init_process_group" in block]
    if not examples:
        pytest.skip("README.md has no example of the layer in a model of one's own")
    (tmp_path / "own_model.py").write_text(examples[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "own_model.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    told = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, told
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0] and ", migrate:" in done.stdout, told
