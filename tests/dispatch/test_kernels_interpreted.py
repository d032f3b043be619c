"""The kernels of the direct exchange on a CPU: Triton's interpreter, ranks that reach each other's memory through files.

Slow, and without the memory model of a GPU; what it holds is the arithmetic of several ranks, without any GPU.
"""

import contextlib
import importlib.util
import itertools
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
