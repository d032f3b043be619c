"""Every dispatcher, with every implementation of the experts, gives what the oracle gives: output and all
gradients."""

import pytest
import torch
import torch.distributed as dist

from tests.dispatch import cases
from tests.dist import spawn

BATCHED = ("padded", "pipelined 4", "two steps", "weights travel")  # that give every slot equally many rows


def _run_all(world_rank: int, num_ranks: int, device_type: str, dtype: torch.dtype, impls: tuple[str, ...]):
    """{(case, dispatcher, impl): answer} of this rank."""
    group = dist.group.WORLD if num_ranks > 1 else None
    device = torch.device(device_type, world_rank) if device_type == "cuda" else torch.device("cpu")
    answers = {}
    for case in cases.cases(num_ranks):
        for name, dispatcher in cases.dispatchers(group, case.placement().slots_per_rank).items():
            blocks = ("batched",) if name in BATCHED else ()
            for impl in (*impls, *blocks):
                answers[case.name, name, impl] = cases.carry(case, dispatcher, impl, world_rank, dtype, device)
    return answers


def _check(answers_W: list[dict], num_ranks: int, dtype: torch.dtype):
    by_name = {case.name: case for case in cases.cases(num_ranks)}
    assert len(answers_W[0]) >= len(by_name) * 6
    for key in answers_W[0]:
        cases.compare(by_name[key[0]], [answers[key] for answers in answers_W], f"{key[1]}, {key[2]}", dtype)
        assert not any(torch.isnan(answers[key]["y"]).any() for answers in answers_W)
    return answers_W


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_process(dtype):
    _check([_run_all(0, 1, "cpu", dtype, ("grouped", "loop"))], 1, dtype)


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_gloo(num_ranks):
    answers_W = spawn(_run_all, num_ranks, num_ranks, "cpu", torch.float32, ("grouped", "loop"))
    _check(answers_W, num_ranks, torch.float32)
    for answers in answers_W:
        for case in cases.cases(num_ranks):
            same = [answers[case.name, name, "loop"]["y"] for name in ("basic", "overlapped 1", "padded")]
            assert torch.equal(same[0], same[1]), f"{case.name}: one step is not the plain exchange, bit for bit"


def test_gloo_bfloat16():
    _check(spawn(_run_all, 3, 3, "cpu", torch.bfloat16, ("grouped",)), 3, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_nccl(num_ranks, dtype):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    _check(spawn(_run_all, num_ranks, num_ranks, "cuda", dtype, ("grouped", "loop"), backend="nccl"), num_ranks, dtype)
