import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from smartmoe import online as on
from smartmoe.config import GateConfig, LayerConfig, ModelConfig, OnlineConfig, ParallelPlan, RunConfig, Workload
from smartmoe.layer import MoELayer
from smartmoe.mesh import build_mesh
from smartmoe.placement import EMPTY, Placement, max_over_mean, num_moves
from tests.dist import spawn

# (experts, spare slots a rank, replicas)
SHAPES = [(1, 0, 0), (4, 0, 0), (5, 0, 0), (12, 0, 0), (7, 1, 0), (6, 2, 3), (12, 1, 4)]
COLLECTIVES = ("all_to_all_single", "all_to_all", "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor",
               "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "reduce_scatter_tensor")  # fmt: skip


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


def run_migrations(rank, world_size, calls, device="cpu"):
    """Twenty successive random migrations of two layers for each shape. Returns how many of them crossed ranks."""
    group = dist.group.WORLD if world_size > 1 else None
    crossed = 0
    for shape_idx, (num_experts, spare, replicas) in enumerate(SHAPES):
        rng = np.random.default_rng(shape_idx)
        now = [random_placement(rng, world_size, num_experts, spare, replicas) for _ in range(2)]
        states = [State(rng, num_experts, now[0].slots_per_rank, device) for _ in now]
        for step in range(20):
            for state, placement in zip(states, now, strict=True):
                state.fill(placement.experts_of_rank(rank), step)
            new = [random_placement(rng, world_size, num_experts, spare, replicas) for _ in now]
            if step % 4 == 3:  # one layer stays
                new[0] = now[0]
            if step % 4 == 1:  # only slots inside the ranks change
                new = [shuffled_inside(rng, placement) for placement in now]
            before = len(calls)
            sent = on.migrate([(s.tensors, a, b) for s, a, b in zip(states, now, new, strict=True)], group)
            moving = sum(num_moves(a, b) for a, b in zip(now, new, strict=True))
            assert calls[before:] == (["all_to_all_single"] if moving else []), calls[before:]
            crossed += bool(moving)
            row_bytes = sum(truth.shape[1] for truth in states[0].truth)
            total = torch.tensor(sent, device=device)
            if group is not None:
                dist.all_reduce(total)
            assert total == moving * row_bytes
            now = new
            for state, placement in zip(states, now, strict=True):
                state.check(placement.experts_of_rank(rank))
    return crossed


def run_world(world_rank, world_size):
    """All cases of one world in one go: starting a world takes longer than what it does here."""
    calls: list[str] = []
    count_collectives(calls)
    migrations = run_migrations(world_rank, world_size, calls)
    online = [run_online(world_rank, *case, calls) for case in ONLINE_CASES if case[0] == world_size]
    real = [run_real_layer(world_rank, gate, capacity) for gate, capacity in REAL_GATES] if world_size == 2 else []
    return {"migrations": migrations, "online": online, "real": real}


@pytest.fixture(scope="module")
def world():
    return functools.cache(lambda world_size: spawn(run_world, world_size, world_size))


def test_migrate_alone_permutes_locally():
    assert run_migrations(0, 1, []) == 0


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_migrate_moves_every_byte_in_one_collective(world, world_size):
    crossed = [result["migrations"] for result in world(world_size)]
    assert len(set(crossed)) == 1 and crossed[0] > 60


def run_on_gpu(world_rank, world_size):
    """Migrations over NCCL, and a recorder that is not allowed to wait for the device."""
    calls: list[str] = []
    count_collectives(calls)
    recorder = on.LoadRecorder([0], 4)
    idx, token_id = torch.tensor([[0, 1], [1, -1]], device="cuda"), ids(0).cuda()
    torch.cuda.set_sync_debug_mode("error")
    recorder(0, SimpleNamespace(expert_idx_TK=idx), token_id)
    torch.cuda.set_sync_debug_mode("default")
    assert recorder.take().tolist() == [[[1, 2, 0, 0]]]
    return run_migrations(world_rank, world_size, calls, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_migrate_over_nccl():
    world_size = min(4, torch.cuda.device_count())
    crossed = spawn(run_on_gpu, world_size, world_size, backend="nccl")
    assert len(set(crossed)) == 1 and crossed[0] > 60


def test_cycles_and_swaps_inside_a_rank():
    old, new = Placement(1, (0, 1, 2, 3, EMPTY)), Placement(1, (1, 2, 0, EMPTY, 3))
    tensor = torch.arange(10.0).view(5, 2)
    assert on.migrate([([tensor], old, new)], None) == 0
    assert tensor.tolist() == [[2, 3], [4, 5], [0, 1], [6, 7], [6, 7]]


def test_nothing_to_do_moves_nothing():
    placement = Placement.identity(4, 1)
    assert on.migrate([([torch.zeros(4)], placement, placement)], None) == 0
    assert on.migrate([], None) == 0


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
        on.migrate([([good], Placement.identity(4, 1), Placement(1, (3, 2, 1, 0))), entry], None)
    assert good.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- recorder


def routing(idx):
    return SimpleNamespace(expert_idx_TK=torch.tensor(idx))


def ids(first, shape=(1, 2)):
    return torch.arange(first, first + shape[0] * shape[1]).view(shape)


def test_recorder_counts_once_and_never_dropped_copies():
    recorder = on.LoadRecorder([3, 7], 4)
    seen = [
        (3, [[0, 1], [1, -1]], 64),
        (7, [[-1, -1], [-1, -1]], 64),
        (3, [[2, 2], [3, 3]], 0),  # micro-batches in any order
        (7, [[0, 1], [2, 3]], 0),
        (7, [[-1, -1], [-1, -1]], 64),  # recomputed in backward
        (3, [[0, 1], [1, -1]], 64),
    ]
    for layer_idx, idx, first in seen:
        recorder(layer_idx, routing(idx), ids(first))
    recorder(3, routing(np.zeros((0, 2), np.int64)), torch.zeros(0, 2, dtype=torch.int64))  # a rank without tokens
    assert recorder.take().tolist() == [[[0, 0, 2, 2], [1, 2, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    assert recorder.take().shape == (2, 0, 4)


def test_recording_never_asks_the_device(monkeypatch):
    recorder = on.LoadRecorder([0], 4)
    args = (0, routing([[0, 1], [1, -1]]), ids(0))

    def refuse(*_args, **_kwargs):
        raise AssertionError("host sync")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__", "nonzero", "unique"):
            patch.setattr(torch.Tensor, name, refuse)
        recorder(*args)
    assert recorder.take().tolist() == [[[1, 2, 0, 0]]]


# -------------------------------------------------------------------------------------------------- online placement


class FakeLayer:
    """What OnlinePlacement needs of a layer: routing given from outside, one weight and its state by slot."""

    def __init__(self, layer_idx, num_experts, num_ranks, ep_rank):
        self.layer_idx, self.observers = layer_idx, []
        self.placement = Placement.identity(num_experts, num_ranks)
        self._ep_rank = ep_rank
        hosted = torch.tensor(self.placement.experts_of_rank(ep_rank))
        self.state = [hosted + 100.0 * layer_idx, (hosted * 7).to(torch.bfloat16)[:, None]]

    def set_placement(self, placement):
        self.placement = placement

    def see(self, expert_idx_TK, token_id_BT):
        for observer in self.observers:
            observer(self.layer_idx, SimpleNamespace(expert_idx_TK=expert_idx_TK), token_id_BT)

    def check(self):
        for slot, expert in enumerate(self.placement.experts_of_rank(self._ep_rank)):
            if expert != EMPTY:
                assert self.state[0][slot] == expert + 100.0 * self.layer_idx and self.state[1][slot] == expert * 7


def run_online(world_rank, world_size, ep, policy, num_experts, recompute, calls):
    """Three layers and two micro-batches, with a load that changes every five iterations."""
    plan = ParallelPlan(dp=world_size, ep=ep)
    mesh = build_mesh(plan, torch.device("cpu"))
    layers = [FakeLayer(idx, num_experts, ep, mesh.ep_rank) for idx in (1, 3, 5)]
    placer = on.OnlinePlacement(
        layers,
        OnlineConfig(policy=policy, interval=2, min_gain=0.05),
        ep_group=mesh.ep_group,
        stage_group=mesh.stage_group,
        state_of=lambda layer: layer.state,
    )
    log = []
    for iteration in range(1, 13):
        expected = np.zeros((3, num_experts))
        for place, layer in enumerate(layers):
            weight = np.roll(1.0 / np.arange(1, num_experts + 1), 3 * (iteration // 5) + place)
            for rank in range(world_size):  # every rank can tell what all others see
                rng = np.random.default_rng((iteration, place, rank))
                idx = rng.choice(num_experts, (2, 200, 2), p=weight / weight.sum())
                idx[rng.random(idx.shape) < 0.1] = -1
                expected[place] += np.bincount(idx[idx >= 0], minlength=num_experts)
                if rank == world_rank:
                    mine = torch.from_numpy(idx)
            first = iteration * 10_000 + world_rank * 200
            for micro in [0, 1] + ([1, 0] if recompute else []):
                layer.see(mine[micro], ids(first + micro * 4_000, (4, 50)))
        before, placements = len(calls), [layer.placement for layer in layers]
        events = placer.after_step(iteration)
        moved = any(event["num_moved"] for event in events)
        if world_size > 1:
            assert calls[before:] == ["all_reduce"] + ["all_to_all_single"] * moved
        balance = [max_over_mean(load_E, each) for load_E, each in zip(expected, placements, strict=True)]
        assert placer.load_max_over_mean() == pytest.approx(np.mean(balance))
        counts = placer.gather_counts()
        assert counts.shape == (world_size, 3, 2, num_experts) and counts.dtype == np.int32
        assert (counts.sum(axis=(0, 2)) == expected).all()
        for layer in layers:
            layer.check()
        for event in events:
            event.pop("cost_ms")
        log.append((events, [layer.placement.to_dict() for layer in layers]))
    return log


ONLINE_CASES = [
    (1, 1, "greedy", 4, False),
    (2, 2, "greedy", 8, True),
    (3, 3, "least_move", 7, False),
    (4, 2, "least_move", 8, True),
    (4, 4, "greedy", 10, False),
    (2, 2, "static", 8, False),
]


@pytest.mark.parametrize(("world_size", "ep", "policy", "num_experts", "recompute"), ONLINE_CASES)
def test_online_placement_follows_the_load(world, world_size, ep, policy, num_experts, recompute):
    case = (world_size, ep, policy, num_experts, recompute)
    if world_size == 1:
        logs = [run_online(0, *case, [])]
    else:
        place = [each for each in ONLINE_CASES if each[0] == world_size].index(case)
        logs = [result["online"][place] for result in world(world_size)]
    assert all(log == logs[0] for log in logs)
    events = [event for iteration_events, _ in logs[0] for event in iteration_events]
    if policy == "static":
        assert not events
        return
    assert [event["iteration"] for event in events] == [i for i in range(2, 13, 2) for _ in range(3)]
    assert [event["layer"] for event in events[:3]] == [1, 3, 5]
    for event in events:
        if event["kind"] == "migrate":
            assert event["max_over_mean_after"] < event["max_over_mean_before"] * 0.95 and "less" in event["reason"]
        else:
            assert event["num_moved"] == 0 and event["max_over_mean_after"] == event["max_over_mean_before"]
    kinds = {event["kind"] for event in events}
    assert kinds == ({"keep"} if ep == 1 else {"keep", "migrate"})


def test_min_gain_keeps_a_small_gain_from_moving():
    layer = FakeLayer(0, 4, 1, 0)
    layer.placement = Placement(2, (0, 1, 2, 3))
    config = OnlineConfig(policy="greedy", min_gain=0.2)
    online = on.OnlinePlacement([layer], config, ep_group=None, stage_group=None, state_of=lambda layer: layer.state)
    load_E = np.array([50, 50, 40, 20])  # 100 against 60; best is 90 against 70
    placement, reason = online._decide(load_E, layer.placement)
    assert placement is layer.placement and "min_gain is 20.0%" in reason
    assert online._decide(np.array([50, 50, 10, 0]), layer.placement)[0] != layer.placement
    assert online._decide(np.zeros(4), layer.placement)[1] == "the solver found nothing better"


def test_a_stage_without_moe_layers_has_nothing_to_do():
    config = OnlineConfig(policy="greedy", interval=1)
    online = on.OnlinePlacement([], config, ep_group=None, stage_group=None, state_of=None)
    assert online.after_step(1) == [] and online.load_max_over_mean() == 1.0
    assert online.gather_counts().shape == (1, 0, 0, 0)


# --------------------------------------------------------------------------------------------------- the real layer


REAL_GATES = [("naive", None), ("gshard", 1.0)]


def run_real_layer(world_rank, gate, capacity):
    """Number of token copies counted, after checking that a migration changes neither outputs nor counts."""
    config = RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=16, ffn_size=16, num_experts=6, top_k=2),
        gate=GateConfig(kind=gate, capacity=capacity),
        layer=LayerConfig(experts="loop"),
        workload=Workload(global_batch_size=4, micro_batch_size=2),
        plan=ParallelPlan(dp=2, ep=2),
    )
    mesh = build_mesh(config.plan, torch.device("cpu"))
    layer = MoELayer(config, layer_idx=0, ep_group=mesh.ep_group, stage_group=mesh.stage_group)
    recorder = on.LoadRecorder([0], 6)
    layer.observers.append(recorder)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(world_rank))
    x[..., 0] += 3.0  # skew, so that a capacity of 1 drops copies
    token_id = ids(world_rank * 16, (2, 8))
    y, _ = layer(x, token_id)
    counts = recorder.take()
    new = Placement(2, (5, 2, 0, 1, 4, 3))
    on.migrate([(list(layer.experts.parameters()), layer.placement, new)], mesh.ep_group)
    layer.set_placement(new)
    again, _ = layer(x, token_id)
    assert torch.equal(y, again) and np.array_equal(recorder.take(), counts)
    return int(counts.sum())


def test_the_real_layer_computes_the_same_after_a_migration(world):
    for naive, capped in (result["real"] for result in world(2)):
        assert naive == 32 and 0 < capped < 32
