"""The slot of each copy: a fixed hash, the shares that the table gives, dropped copies dropped, one kernel on a GPU."""

import pytest
import torch

from smartmoe.ops.hashing import buckets
from smartmoe.ops.plan import slots_of, slots_reference
from tests.ops.test_hashing import splitmix


def test_buckets_are_pinned():
    """A change here sends the copies of replicated experts elsewhere."""
    ids = torch.tensor([0, 1, 2**40])
    want = [[splitmix(token + column * 0x9E3779B97F4A7C15) % 256 for column in (1, 2)] for token in ids.tolist()]
    assert buckets(ids, 2, 256).tolist() == want


@pytest.mark.parametrize("stride", [1, 256, 4096])
def test_hosts_get_their_shares(stride):
    """Also of ids that lie on a grid, as the first tokens of all samples do."""
    table_EB = torch.tensor([[0] * 64 + [1] * 192, [2] * 256])
    ids = torch.arange(40_000) * stride
    expert_TK = torch.tensor([0, 1]).expand(40_000, 2)
    slot_TK = slots_of(expert_TK, table_EB, ids)
    assert abs((slot_TK[:, 0] == 0).double().mean() - 0.25) < 0.01
    assert (slot_TK[:, 1] == 2).all()
    both = slots_of(torch.zeros_like(expert_TK), table_EB, ids) == 0
    assert abs((both[:, 0] & both[:, 1]).double().mean() - 0.25**2) < 0.01, "the copies of a token are unrelated"


def test_dropped_copies_stay_dropped_and_one_column_needs_no_ids():
    expert_TK = torch.tensor([[0, -1], [2, 1]])
    assert slots_of(expert_TK, torch.tensor([[5], [3], [4]])).tolist() == [[5, -1], [4, 3]]
    table_EB = torch.tensor([[5], [3], [4]]).repeat(1, 256)
    assert slots_of(expert_TK, table_EB, torch.tensor([7, 9])).tolist() == [[5, -1], [4, 3]]
    assert slots_of(expert_TK[:0], table_EB, torch.tensor([], dtype=torch.int64)).shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_buckets", [1, 256])
@pytest.mark.parametrize("num_tokens, top_k", [(0, 2), (1, 1), (8191, 2), (513, 8)])
def test_the_kernel_equals_the_plain_form(num_tokens, top_k, num_buckets):
    expert_TK = torch.randint(-1, 32, (num_tokens, top_k), device="cuda")
    table_EB = torch.randint(0, 80, (32, num_buckets), device="cuda")
    ids = torch.randint(0, 2**45, (num_tokens,), device="cuda")
    want = slots_reference(expert_TK, table_EB, ids)
    assert torch.equal(slots_of(expert_TK, table_EB, ids), want)
    assert torch.equal(slots_reference(expert_TK.cpu(), table_EB.cpu(), ids.cpu()), want.cpu())
