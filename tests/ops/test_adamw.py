"""AdamW with scaling and conversion in one pass against torch's AdamW, and accumulation of gradients in float32."""

import pytest
import torch

from smartmoe.ops.adamw import Hyperparameters, accumulate_, adamw_
from smartmoe.ops.extension import have_triton

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and have_triton()), reason="needs a GPU and Triton")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [1, 1000, 1 << 20])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_adamw(dtype, numel, decay):
    draw = torch.Generator("cuda").manual_seed(0)
    master = torch.randn(numel, device="cuda", generator=draw)
    wanted = master.clone()
    torch_adamw = torch.optim.AdamW([wanted], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    moments, weight = torch.zeros(2, numel, device="cuda"), None
    if dtype is not None:
        weight = torch.empty(numel, device="cuda", dtype=dtype)
    for step in range(1, 5):
        grad = torch.randn(numel, device="cuda", generator=draw)
        kept = grad.clone()
        wanted.grad = grad * 0.37
        torch_adamw.step()
        adamw_(master, grad, *moments, weight, 0.37, Hyperparameters(1e-2, 0.9, 0.95, 1e-8, decay, step))
        assert torch.equal(grad, kept)
        torch.testing.assert_close(master, wanted, rtol=1e-5, atol=1e-6)
        if weight is not None:
            assert torch.equal(weight, master.to(dtype))
    state = torch_adamw.state[wanted]
    torch.testing.assert_close(moments[0], state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments[1], state["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 1000), (0, 4), (40, 4099)], ids=str)
def test_the_first_part_replaces_and_others_add(device, dtype, shape):
    parts = torch.randn(3, *shape, device=device).to(dtype)
    total = torch.full(shape, torch.nan, device=device)
    for place, part in enumerate(parts):
        accumulate_(total, part, is_first=place == 0)
    assert torch.equal(total, parts[0].float() + parts[1] + parts[2])
