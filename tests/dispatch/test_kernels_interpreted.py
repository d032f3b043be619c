"""The kernels of the direct exchange on a CPU: Triton's interpreter, ranks that reach each other's memory through files.

Slow, and without the memory model of a GPU; what it holds is the arithmetic of several ranks, without any GPU.
"""

import contextlib
import importlib.util
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from smartmoe.dispatch import direct, symmetric, symmetric_replicas
from smartmoe.dispatch.transport import Told
from tests.dispatch import test_direct
from tests.dist import spawn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton")
_MAPPED = []


class _Transport(symmetric.SymmetricTransport):
    def new_told(self):
        return Told(torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def _in_files(folder):
    """An allocator as symmetric._allocate."""
    numbers = itertools.count()

    def allocate(num_bytes, device, group):
        number, num_ranks, mine = next(numbers), dist.get_world_size(group), dist.get_rank(group)
        paths = [Path(folder, f"{number}-{rank}") for rank in range(num_ranks)]
        paths[mine].write_bytes(bytes(num_bytes))
        dist.barrier(group)
        buffers = [torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]
        _MAPPED.extend(buffers)
        return buffers[mine], [buffer.data_ptr() for buffer in buffers]

    return allocate


def _let_scalars_be_indices():
    """The interpreter of Triton 3.6 holds scalars as arrays of one element, of which NumPy 2.4 makes no int."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def interpret(folder) -> dict:
    """Let this rank's kernels run in the interpreter and buffers be files of `folder`; returns the transports made since."""
    _let_scalars_be_indices()
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda stream: None, device=None)
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.Stream = lambda device, priority: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    symmetric.why_unavailable = lambda group: None
    symmetric._allocate = symmetric_replicas._allocate = _in_files(folder)
    symmetric_replicas._MOST_PLANNERS = 1  # of blocks that run one after another none can wait for another
    transports = {}

    def shared_transport(group, slots_per_rank, capacity, x_TD, top_k):
        key = slots_per_rank, capacity, x_TD.shape[1], top_k
        if key not in transports:
            transports[key] = _Transport(group, slots_per_rank, capacity, x_TD, top_k)
        return transports[key]

    direct._shared_transport = shared_transport
    return transports


def _interpreted(world_rank, num_ranks, folder):
    transports = interpret(folder)
    test_direct._steady(world_rank, num_ranks, "cpu", (0, 1, 4))
    test_direct._interleave(world_rank, num_ranks, "cpu")
    test_direct._odd(world_rank, num_ranks, "cpu")
    assert transports, "the plain transport was tested"
    return test_direct._overflow(world_rank, num_ranks, "cpu")


@pytest.mark.parametrize("num_ranks", [3])
def test_kernels_give_the_right_answers_in_the_interpreter(num_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    for seen in spawn(_interpreted, num_ranks, num_ranks, str(tmp_path), fresh=True):
        test_direct.check_overflow(seen, num_ranks)


def _begun_early(world_rank, num_ranks, folder):
    import triton.language as tl

    transports = interpret(folder)
    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda: None
    symmetric._can_begin_early = lambda device: True
    test_direct._steady(world_rank, num_ranks, "cpu", (0, 4), early=True)
    assert all(transport.begins_early for transport in transports.values())


def test_kernels_that_begin_early_give_the_right_answers_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spawn(_begun_early, 3, 3, str(tmp_path), fresh=True)


def _late_words():
    """Announcements of the call before lie where those of the other rank come a little later, in odd and in even calls."""
    from smartmoe.dispatch.direct_kernels import announce_kernel

    room, slots_per_rank, mine = 3, 3, ([2, -1, 4], [1.0, 2.0, 3.0])
    theirs_by_call = {
        1: ([0, 5, 1], [0.5, -1.0, 2.0]),
        2: ([3, -1, 0], [0.25, 0.0, 8.0]),
        3: ([1, 1, 7], [1.0, 2.0, -3.0]),
    }
    buffer, other = torch.zeros(2, 2 * room, dtype=torch.int64)
    peers = torch.tensor([buffer.data_ptr(), other.data_ptr()])
    state, odd = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def words(call, slots, weights):
        bits = torch.tensor(weights).view(torch.int32).long()
        return (bits << 32) | ((torch.tensor(slots) + 1) * 2 + call % 2)

    for call, theirs in theirs_by_call.items():
        local, weight = torch.empty(2 * room, dtype=torch.int64), torch.empty(2 * room)
        dtype = torch.bfloat16 if call == 2 else torch.float32  # what others than our gates may have
        late = threading.Timer(0.1, buffer[room:].copy_, [words(call, *theirs)])
        late.start()
        announce_kernel[(1,)](
            torch.tensor(mine[0]), torch.tensor(mine[1], dtype=dtype), local, weight, odd, peers, state, 0, room, room,
            slots_per_rank, 0, W=2, BLOCK=4, EARLY=False,
        )  # fmt: skip
        late.join()
        assert local.tolist() == [slot if slot < slots_per_rank else -1 for slot in mine[0] + theirs[0]], call
        assert weight.tolist() == mine[1] + theirs[1] and torch.equal(other[:room], words(call, *mine)), call


def _late_needs():
    """A block that begins with the second turn, whose rows are there: what the other rank needed comes with its first."""
    from smartmoe.dispatch.direct_kernels import sum_kernel

    room, call, num_turns = 4, 7, 2
    for needed, fits in ((room, True), (-9, False)):
        buffer, other = torch.zeros(2, 64, dtype=torch.uint8)
        needed_W, flags = buffer[32:40].view(torch.int32), buffer[48:].view(torch.int32).view(2, num_turns)
        peers = torch.tensor([buffer.data_ptr(), other.data_ptr()])
        flags[1, 0], flags[1, 1], needed_W[1] = call - 1, call, room
        state = torch.tensor([0, call - 1, 3], dtype=torch.int32)  # the last piece
        row_NK = torch.tensor([0, 1, 2, 3, room, room, room, room]).view(-1, 1)
        rows, y, weight = torch.ones(room, 2), torch.zeros(room, 2), torch.ones(2 * room, 1)
        slot, used = torch.zeros(room, 1, dtype=torch.int64), torch.tensor([room], dtype=torch.int32)
        told, most = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

        def tell(needed_W=needed_W, flags=flags, needed=needed):
            needed_W[1] = needed
            flags[1, 0] = call

        late = threading.Timer(0.1, tell)
        late.start()
        sum_kernel[(1,)](
            rows, row_NK, weight, y, y, slot, used, used, told, most, peers, state, 0, room, room, 1, room, 2, 1, 0, 0, 0, 0,
            32, 48, K=1, W=2, WEIGHTED=True, GRADS=False, MIXED=False, K_PAD=1, W_PAD=2, BLOCK_T=2, BLOCK_D=2,
        )  # fmt: skip
        late.join()
        assert state[1] == call and not y[:2].any() and (y[2:] == 1).all() == fits and y[2:].isnan().all() != fits


def _edges():
    """Turns that end beyond the tokens, a dropped copy, one row too few: what lies behind each region stays as it is, and is
    not read. The other rank's part is there already."""
    from smartmoe.dispatch.direct_kernels import spread_kernel, sum_kernel

    room, width, used, nan = 3, 2, 4, torch.nan
    offset = {"tokens": 0, "sums": 32, "grads": 64, "needed": 80, "flags": 96}  # numbers or so behind each
    buffers = torch.full((2, 32), nan)
    mine, theirs = buffers
    mine.view(torch.int32)[24:28] = 9  # whatever is waited for has come
    theirs.view(torch.int32)[24:28] = 0
    mine[:6] = torch.arange(7.0, 13.0)
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [nan, nan]])[:room]
    slot = torch.tensor([[0], [0], [-1]])
    row_NK = torch.tensor([0, 1, 99, 2, 3, used, 0, 0])[: 2 * room].view(-1, 1)
    weight_NK = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, nan, nan])[: 2 * room].view(-1, 1)
    rows, weighed = torch.full((2, used + 1, width), nan)
    wanted, count = torch.tensor([[used + 1], [-7]])
    num_rows, num_needed, odd, state, told = torch.zeros(5, 3, dtype=torch.int32)
    odd[0] = -7
    peers = torch.tensor([mine.data_ptr(), theirs.data_ptr()])
    blocks = {"K": 1, "W": 2, "K_PAD": 1, "W_PAD": 2, "BLOCK_T": 2, "BLOCK_D": 2}

    def spread(weigh):
        spread_kernel[(1,)](
            own, slot, rows, weighed if weigh else rows, row_NK, weight_NK, wanted, count, num_rows, num_needed, odd, told,
            peers, state, 0, room, room, 1, used, width, 1, 1, 0, offset["tokens"], offset["grads"], offset["flags"],
            WEIGH=weigh, BOUND=not weigh, EARLY=False, L_PAD=1, BLOCK_W=2, **blocks,
        )  # fmt: skip

    spread(weigh=False)
    assert (count[0], num_rows[0], num_needed[0]) == (used, used, used + 1)
    tokens = torch.cat([own[:2], mine[:4].view(2, width)])
    assert rows[:used].equal(tokens) and rows[used:].isnan().all()
    spread(weigh=True)
    assert weighed[:used].equal(tokens * weight_NK[[0, 1, 3, 4]]) and weighed[used:].isnan().all()
    dots = tokens.square().sum(1).tolist()
    for buffer, dot in zip(buffers, (dots[:2], dots[2:]), strict=True):
        assert buffer[16:18].tolist() == dot and buffer[18:20].isnan().all()
    y, grad = torch.full((2, 2 * room), nan)
    sum_kernel[(1,)](
        rows, row_NK, weight_NK, y, grad, slot, num_rows, num_needed, told, told, peers, state, 0, room, room, 1, used, width,
        1, 0, 0, offset["sums"], offset["grads"], offset["needed"], offset["flags"], WEIGHTED=False, GRADS=True, MIXED=False,
        **blocks,
    )  # fmt: skip
    assert y.tolist() == [*own[:2].flatten().tolist(), 0, 0] and grad[:room].tolist() == [*dots[:2], 0]
    assert theirs[8:12].equal(mine[:4]) and theirs[12:16].isnan().all() and grad[room:].isnan().all()
    assert theirs[24:].view(torch.int32)[:2].tolist() == [3, 3] and state.tolist() == [0, 3, 0]


def _check_order(num_turns, pushes, reads, lag, behind, share, mixed):
    """Every push and every read comes once, those of one kind in turn, and no read before all pushes of its turn."""
    from tests.dispatch.order_kernel import order_kernel

    num_pieces = num_turns * (pushes + reads)
    is_push, turn, part = torch.zeros(3, num_pieces, dtype=torch.int32)
    order_kernel[(1,)](
        is_push, turn, part, num_turns, lag, behind, share, PUSHES=pushes, READS=reads, MIXED=mixed,
        BLOCK=1 << (num_pieces - 1).bit_length(),
    )  # fmt: skip
    case, is_push = (num_turns, pushes, reads, lag, behind, mixed), is_push.bool()
    for chosen, many in ((is_push, pushes), (~is_push, reads)):
        number = turn[chosen] * many + part[chosen]
        assert number.equal(torch.arange(num_turns * many, dtype=torch.int32)), case
    assert (is_push.cumsum(0)[~is_push] >= (turn[~is_push] + 1) * pushes).all(), case
    assert is_push[: lag * pushes].all() and not is_push[-behind * reads :].any(), case


def _orders(_):
    _let_scalars_be_indices()
    kinds = [(1, num_ranks) for num_ranks in (2, 3, 4, 8)] + [(num_ranks - 1, 1) for num_ranks in (2, 3, 4, 8)]
    for num_turns in (1, 2, 3, 7, 20):
        for lag in {1, 2, 5, num_turns} & set(range(1, num_turns + 1)):
            for pushes, reads in [*kinds, (0, 1)]:
                _check_order(num_turns, pushes, reads, lag, lag, 0, mixed=False)
    one = SimpleNamespace(block_tokens=1, width=1, dtype=torch.int8)
    one._turns_of = lambda num_bytes: symmetric.SymmetricTransport._turns_of(one, num_bytes)
    for one._num_turns in (1, 2, 3, 7, 20, 12288):
        for ahead, symmetric._BEHIND_BYTES in ((1, 1), (2, 1), (5, 2), (5, 5), (3072, 256)):
            for pushes, reads in kinds:
                order = symmetric.SymmetricTransport._mixed_order(one, ahead, pushes, reads)
                _check_order(one._num_turns, pushes, reads, *order, mixed=True)


def _alone(_):
    _let_scalars_be_indices()
    _late_words()
    _late_needs()
    _edges()


def test_pieces_come_in_an_order_in_which_no_two_ranks_can_wait_for_each_other(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spawn(_orders, 1, fresh=True)


def test_what_comes_late_is_waited_for_and_edges_are_kept(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spawn(_alone, 1, fresh=True)
