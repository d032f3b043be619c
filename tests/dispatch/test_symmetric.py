"""What the transport of the direct dispatcher launches, with kernels that do nothing: no GPU."""

from types import SimpleNamespace

import pytest
import torch

from smartmoe import dispatch
from smartmoe.dispatch import symmetric
from smartmoe.dispatch.transport import CollectiveTransport, make_local_plan
from smartmoe.ops.plan import make_plan


def test_rows_reach_the_kernel_aligned(monkeypatch):
    """A view may begin anywhere; the kernel reads 16 bytes at once from it as from the buffers of other ranks."""
    seen = []
    kernel = {(1,): lambda own_TD, *args, **more: seen.append(own_TD)}
    monkeypatch.setattr(dispatch, "direct_kernels", SimpleNamespace(spread_kernel=kernel), raising=False)
    monkeypatch.setattr(symmetric, "why_unavailable", lambda group: None)
    monkeypatch.setattr(symmetric.SymmetricTransport, "_follow", lambda self: None)
    x_TD = torch.arange(2 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 16)
    slot_TK = torch.zeros(2, 1, dtype=torch.int64)
    transport = symmetric.SymmetricTransport(None, 1, 2, x_TD, 1)
    transport.max_blocks = 1
    plan = make_local_plan(CollectiveTransport(None, 1, 2), slot_TK, torch.ones(2, 1), 2)
    transport.bring(x_TD, slot_TK, plan)
    assert seen[0].data_ptr() % 16 == 0 and seen[0].equal(x_TD)
    transport.bring(seen[0], slot_TK, plan)
    assert seen[1] is seen[0]


def test_pushes_are_ahead_by_fewer_tokens_where_each_has_more_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "direct_kernels", None, raising=False)
    monkeypatch.setattr(symmetric, "why_unavailable", lambda group: None)
    monkeypatch.setattr(symmetric, "group_size", lambda group: 2)
    monkeypatch.setattr(symmetric, "group_rank", lambda group: 0)
    monkeypatch.setattr(symmetric, "_allocate", lambda *_: (None, [0, 0]))
    x_TD = torch.zeros(1, 2048, dtype=torch.bfloat16)
    transports = [symmetric.SymmetricTransport(None, 4, 1 << 16, x_TD, top_k) for top_k in (1, 2, 8)]
    assert [transport._lag * transport.block_tokens * 4096 >> 20 for transport in transports] == [6, 4, 2]
    ahead, behind, share = transports[0]._mixed_order(24 << 20, 1, 2)
    assert [turns * transports[0].block_tokens * 4096 >> 20 for turns in (ahead, behind)] == [24, 2]
    assert share / 2**31 == pytest.approx((256 - 24) / (256 - 24 + 2 * (256 - 2)), rel=1e-6)


def test_tokens_leave_early_only_right_behind_what_makes_their_plan(monkeypatch):
    """What is launched between the two, a copy of the tokens or a meeting, may not be complete when an early kernel begins. And
    who was sent tokens of a call without an answer may not have read its announcement yet."""
    seen = []

    class Kernels:
        def __getattr__(self, name):
            return {(1,): lambda *args, **more: seen.append((name.removesuffix("_kernel"), more))}

    monkeypatch.setattr(dispatch, "direct_kernels", Kernels(), raising=False)
    monkeypatch.setattr(symmetric, "why_unavailable", lambda group: None)
    monkeypatch.setattr(symmetric, "group_size", lambda group: 2)
    monkeypatch.setattr(symmetric, "group_rank", lambda group: 0)
    monkeypatch.setattr(symmetric, "_allocate", lambda *_: (None, [0, 0]))
    monkeypatch.setattr(symmetric, "_can_begin_early", lambda device: True)
    monkeypatch.setattr(symmetric.SymmetricTransport, "_follow", lambda self: None)
    planned = []

    def plan_of(*args, early):
        planned.append(early)
        return make_plan(*args, early)

    monkeypatch.setattr("smartmoe.dispatch.transport.make_plan", plan_of)
    odd_TD = torch.zeros(2 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 16)
    x_TD, slot_TK, weight_TK = odd_TD.clone(), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)

    def transport_of(early_bytes):
        monkeypatch.setattr(symmetric, "_EARLY_BYTES", early_bytes)
        transport = symmetric.SymmetricTransport(None, 1, 2, x_TD, 1)
        transport.max_blocks = 1
        return transport

    def launched(transport, tokens_TD=x_TD, between=lambda plan: None):
        """The kernels of a call, whether its last begins early by its own account and by its launch; its plan and rows."""
        seen.clear()
        local_NK, weight_NK = transport.announce(slot_TK, weight_TK)
        plan = make_local_plan(transport, local_NK.fill_(-1), weight_NK, 4)
        assert planned.pop() is True and seen[-1][1]["EARLY"] == transport.begins_early
        between(plan)
        rows_RD = transport.bring(tokens_TD, slot_TK, plan)
        how = seen[-1][1]
        return [name for name, _ in seen], how["EARLY"], how.get("launch_pdl", False), plan, rows_RD

    large, small = transport_of(2 * 16 * 2), transport_of(2 * 16 * 2 + 1)
    *first, plan, rows_RD = launched(large)
    assert first == [["announce", "spread"], True, True]
    assert launched(large)[:3] == (["meet", "announce", "spread"], True, True)
    large.sum_back(rows_RD, plan, slot_TK)
    assert seen[-1][1]["MIXED"]
    assert launched(large, odd_TD)[:3] == (["announce", "spread"], False, False)
    large.sum_back(rows_RD, plan, slot_TK)
    large.weigh(x_TD, slot_TK, rows_RD, plan)
    assert not seen[-1][1]["EARLY"] and "launch_pdl" not in seen[-1][1], "no plan was made"
    large.sum_back(rows_RD, plan, slot_TK)
    weigh = launched(large, between=lambda _: large.weigh(x_TD, slot_TK, rows_RD, plan))
    assert weigh[:3] == (["announce", "spread", "meet", "spread"], False, False)
    assert launched(small)[:3] == (["announce", "spread"], False, False)
    assert launched(small)[:3] == (["announce", "meet", "spread"], False, False)
    small.sum_back(rows_RD, plan, slot_TK)
    assert not seen[-1][1]["MIXED"]
