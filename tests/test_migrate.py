import functools
import itertools
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from smartmoe import migrate as migrate_module
from smartmoe.migrate import Staging, _rounds, migrate
from smartmoe.placement import EMPTY, Placement, num_moves
from tests.dist import spawn

# (experts, spare slots a rank, replicas)
SHAPES = [(1, 0, 0), (4, 0, 0), (5, 0, 0), (12, 0, 0), (7, 1, 0), (6, 2, 3), (12, 1, 4)]
COLLECTIVES = ("all_to_all_single", "all_to_all", "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor",
               "send", "recv", "batch_isend_irecv", "barrier", "reduce_scatter_tensor")  # fmt: skip


def random_placement(rng, num_ranks, num_experts, spare, replicas) -> Placement:
    """A random placement of ceil(E / W) + spare slots a rank, with at most `replicas` replicas and a random primary."""
    per_rank = -(-num_experts // num_ranks) + spare
    slots = np.full((num_ranks, per_rank), EMPTY)
    cells = [(rank, slot) for rank in range(num_ranks) for slot in range(per_rank)]
    for place, expert in zip(rng.permutation(len(cells)), range(num_experts), strict=False):
        slots[cells[place]] = expert
    for expert in rng.permutation(num_experts)[:replicas]:
        free = [cell for cell in cells if slots[cell] == EMPTY and expert not in slots[cell[0]]]
        if free:
            slots[free[rng.integers(len(free))]] = expert
    flat = slots.ravel().tolist()
    hosts = [[slot for slot, expert in enumerate(flat) if expert == e] for e in range(num_experts)]
    return Placement(num_ranks, tuple(flat), tuple(int(rng.choice(slots_of_e)) for slots_of_e in hosts))


def shuffled_inside(rng, placement) -> Placement:
    rows = [rng.permutation(placement.experts_of_rank(rank)).tolist() for rank in range(placement.num_ranks)]
    return Placement(placement.num_ranks, tuple(expert for row in rows for expert in row))


class State:
    """Tensors of many dtypes and strides, filled with random bytes (NaNs of every kind included), by logical expert."""

    KINDS = [
        (torch.float32, (3, 5)), (torch.bfloat16, (7,)), (torch.float64, ()), (torch.int64, (1,)), (torch.uint8, (3,)),
        (torch.float16, (2, 0)), (torch.float8_e4m3fn, (5,)), (torch.complex64, (2,)),
    ]  # fmt: skip

    def __init__(self, rng, num_experts, num_slots, device):
        self.truth = [self._bytes(rng, num_experts, kind) for kind in self.KINDS]
        self.tensors = [torch.zeros(num_slots, *shape, dtype=dtype, device=device) for dtype, shape in self.KINDS]
        # A parameter, a transposed one, every other column of one, and a slice at an odd offset.
        wide, line = torch.zeros(num_slots, 6, device=device), torch.zeros(4 * num_slots + 1, device=device)
        self.tensors[0] = torch.nn.Parameter(self.tensors[0])
        turned = torch.zeros(3, 2, num_slots, device=device).permute(2, 1, 0)
        extra = [turned, wide[:, ::2], line[1:].view(num_slots, 4)]
        self.tensors += extra
        self.truth += [self._bytes(rng, num_experts, (torch.float32, t.shape[1:])) for t in extra]

    @staticmethod
    def _bytes(rng, num_experts, kind):
        dtype, shape = kind
        size = torch.zeros(shape, dtype=dtype).nbytes
        return torch.from_numpy(rng.integers(0, 256, (num_experts, size), dtype=np.uint8))

    def fill(self, hosted, step):
        """What an optimizer step would do: change every hosted expert's state, the same way wherever it is."""
        for tensor, truth in zip(self.tensors, self.truth, strict=True):
            truth.bitwise_xor_(torch.arange(truth.numel(), dtype=torch.uint8).view(truth.shape) + step)
            for slot, expert in enumerate(hosted):
                if expert != EMPTY:
                    row = truth[expert].clone().view(tensor.dtype if truth.shape[1] else torch.uint8)
                    tensor.data[slot] = row.view(tensor.shape[1:])

    def check(self, hosted):
        for tensor, truth in zip(self.tensors, self.truth, strict=True):
            for slot, expert in enumerate(hosted):
                if expert != EMPTY:
                    got = tensor.detach()[slot].cpu().contiguous().view(-1).view(torch.uint8)
                    assert torch.equal(got, truth[expert]), (tensor.dtype, tensor.shape, slot, expert)


def count_collectives(calls):
    for name in COLLECTIVES:
        real = getattr(dist, name)

        def counted(*args, real=real, name=name, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        setattr(dist, name, counted)


def run_migrations(rank, world_size, calls, device="cpu", meets="all_to_all_single"):
    """Twelve successive random migrations of two layers for each shape. Returns how many of them crossed ranks.

    meets: the collective that each round calls; None = none that the host sees.
    """
    group = dist.group.WORLD if world_size > 1 else None
    crossed, most_rounds, small, large = 0, 0, Staging(1024), Staging(1 << 17)  # many rounds and one
    for shape_idx, (num_experts, spare, replicas) in enumerate(SHAPES):
        rng = np.random.default_rng(shape_idx)
        now = [random_placement(rng, world_size, num_experts, spare, replicas) for _ in range(2)]
        states = [State(rng, num_experts, now[0].slots_per_rank, device) for _ in now]
        for step in range(12):
            for state, placement in zip(states, now, strict=True):
                state.fill(placement.experts_of_rank(rank), step)
            new = [random_placement(rng, world_size, num_experts, spare, replicas) for _ in now]
            if step % 4 == 3:  # one layer stays
                new[0] = now[0]
            if step % 4 == 1:  # only slots inside the ranks change
                new = [shuffled_inside(rng, placement) for placement in now]
            before = len(calls)
            used = small if step % 3 == 2 else large
            sent = migrate([(s.tensors, a, b) for s, a, b in zip(states, now, new, strict=True)], group, used)
            moving = sum(num_moves(a, b) for a, b in zip(now, new, strict=True))
            rounds = calls[before:]
            assert set(rounds) <= {meets} and bool(rounds) == bool(moving and meets), rounds
            assert used is small or len(rounds) <= (2 if meets == "barrier" else 1)  # one more meeting at the end
            most_rounds = max(most_rounds, len(rounds))
            crossed += bool(moving)
            row_bytes = sum(truth.shape[1] for truth in states[0].truth)
            total = torch.tensor(sent, device=device)
            if group is not None:
                dist.all_reduce(total)
            assert total == moving * row_bytes
            now = new
            for state, placement in zip(states, now, strict=True):
                state.check(placement.experts_of_rank(rank))
    assert small.num_bytes <= 2048  # alone and together
    assert world_size == 1 or not meets or most_rounds > 2
    return crossed


def run_world(world_rank, world_size):
    calls: list[str] = []
    count_collectives(calls)
    by_collective = run_migrations(world_rank, world_size, calls)
    share_files(world_rank, world_size)
    return by_collective, run_migrations(world_rank, world_size, calls, meets="barrier")


def share_files(world_rank, world_size):
    """Let a file stand for the memory that GPUs share, so that the form for GPUs runs here."""
    folder, made, world_name = Path(tempfile.gettempdir()), itertools.count(), [uuid.uuid4().hex]
    dist.broadcast_object_list(world_name)

    def shared_halves(group, half_bytes, device):
        name = f"smartmoe-staging-{world_name[0]}-{next(made)}"
        parts = [
            torch.from_file(str(folder / f"{name}-{rank}"), shared=True, size=2 * half_bytes, dtype=torch.uint8)
            for rank in range(world_size)
        ]
        dist.group.WORLD.barrier().wait()
        (folder / f"{name}-{world_rank}").unlink()
        return [part.chunk(2) for part in parts], dist.barrier

    migrate_module.why_unavailable = lambda group: None
    migrate_module._shared_halves = shared_halves
    migrate_module._is_gpu = lambda device: True


@pytest.fixture(scope="module")
def world():
    return functools.cache(lambda world_size: spawn(run_world, world_size, world_size))


def test_migrate_alone_permutes_locally():
    assert run_migrations(0, 1, []) == 0


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_migrate_moves_every_byte(world, world_size):
    crossed = world(world_size)
    assert len(set(crossed)) == 1 and min(crossed[0]) > 40


def run_on_gpu(world_rank, world_size):
    calls: list[str] = []
    count_collectives(calls)
    near = migrate_module.why_unavailable(dist.group.WORLD) is None
    by_memory = run_migrations(world_rank, world_size, calls, "cuda", None) if near else 41
    migrate_module.why_unavailable = lambda group: "left out here"
    return min(by_memory, run_migrations(world_rank, world_size, calls, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_migrate_over_nccl():
    world_size = min(4, torch.cuda.device_count())
    crossed = spawn(run_on_gpu, world_size, world_size, backend="nccl")
    assert len(set(crossed)) == 1 and crossed[0] > 40


def test_cycles_and_swaps_inside_a_rank():
    old, new = Placement(1, (0, 1, 2, 3, EMPTY)), Placement(1, (1, 2, 0, EMPTY, 3))
    tensor = torch.arange(10.0).view(5, 2)
    assert migrate([([tensor], old, new)], None) == 0
    assert tensor.tolist() == [[2, 3], [4, 5], [0, 1], [6, 7], [6, 7]]


def test_nothing_to_do_moves_nothing():
    placement = Placement.identity(4, 1)
    assert migrate([([torch.zeros(4)], placement, placement)], None) == 0
    assert migrate([], None) == 0


TURNED = Placement(1, (1, 0, 2, 3))
SHARED = torch.zeros(4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (([torch.zeros(2)], Placement.identity(4, 2), Placement(2, (1, 0, 2, 3))), "2 ranks, but the group has 1"),
        (([torch.zeros(4)], Placement.identity(4, 1), Placement.identity(3, 1)), "num_slots changes"),
        (([torch.zeros(3, 4)], Placement.identity(4, 1), TURNED), "expected 4 slots in dim 0"),
        (([torch.zeros(())], Placement.identity(1, 1), Placement.identity(1, 1)), "expected 1 slots in dim 0"),
        (([], Placement.identity(4, 1), TURNED), "no tensors"),
        (([torch.zeros(4), torch.zeros(4, device="meta")], Placement.identity(4, 1), TURNED), "on meta"),
        (([SHARED, SHARED[:, None]], Placement.identity(4, 1), TURNED), "share memory"),
    ],
)
def test_entries_that_do_not_fit_are_refused_before_anything_moves(entry, message):
    good = torch.arange(4.0)
    with pytest.raises(ValueError, match=message):
        migrate([([good], Placement.identity(4, 1), Placement(1, (3, 2, 1, 0))), entry], None)
    assert good.tolist() == [0, 1, 2, 3]


def test_rounds_cover_every_byte_once_and_fit():
    rows, num_rows, half = [[1000, 0, 3], [64, 4096]], [3, 1], 600
    rounds = _rounds(rows, num_rows, half)
    seen = {}
    for pieces in rounds:
        assert 0 < sum(num_rows[p.layer] * p.width for p in pieces) <= half
        for piece in pieces:
            assert piece.start == seen.get((piece.layer, piece.tensor), 0) and piece.width > 0
            seen[piece.layer, piece.tensor] = piece.stop
    assert seen == {(0, 0): 1000, (0, 2): 3, (1, 0): 64, (1, 1): 4096}
    assert len(_rounds(rows, num_rows, 1 << 20)) == 1 and _rounds([[0]], [1], 16) == []


def test_a_swap_of_large_rows_takes_no_more_than_the_staging():
    old, new = Placement.identity(2, 1), Placement(1, (1, 0))
    staging, tensor = Staging(1 << 16), torch.arange(1 << 18).view(2, -1)
    want = tensor.flip(0).clone()
    migrate([([tensor], old, new)], None, staging)
    first = staging._alone._parts.data_ptr()
    assert torch.equal(tensor, want) and staging.num_bytes == 1 << 16
    migrate([([tensor], new, old)], None, staging)
    assert torch.equal(tensor, want.flip(0)) and staging._alone._parts.data_ptr() == first
