"""Exchanges take at least their bytes over the rate; results stay what they are."""

import dataclasses
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from smartmoe import config, dispatch, mesh, migrate, replicas
from smartmoe import slow_links as slow_links_module
from smartmoe.config import ParallelPlan, RunConfig
from smartmoe.data import load_tokens
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.mesh import build_mesh
from smartmoe.ops.all_to_all import exchange_rows
from smartmoe.slow_links import slow_links
from smartmoe.trainer import Trainer
from tests.dist import gpu_backend, gpu_of, spawn

RATE = 0.02  # GB/s: 2 MB take 100 ms
WIDE = 250_000  # a row of a million bytes


def _timed(call):
    """(the fewest ms of some times, result): other work on the machine only adds."""
    took = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append((time.perf_counter() - start) * 1e3)
    return min(took), result


def _exchanges(rank, device=None):
    """name -> (ms that it must take at least, ms that it took, result) of every kind of exchange."""
    rows = torch.full((3, WIDE), float(rank), device=device)
    sent, came = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])
    whole, part, one = rows.new_empty(2, WIDE), rows.new_empty(1, WIDE), rows[:1].clone()
    peer, got = 1 - rank, torch.empty_like(one)

    def messages():
        ops = [dist.P2POp(dist.isend, one, peer), dist.P2POp(dist.irecv, got, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return got[0, 0].item()

    def pipeline():  # its messages of one direction take another way through torch
        op = dist.P2POp(dist.isend, one, peer) if rank == 0 else dist.P2POp(dist.irecv, got, peer)
        for work in schedules._batch_p2p([op]):
            work.wait()

    def in_turn():
        works = [dist.all_reduce(one.clone(), async_op=True) for _ in range(2)]
        for work in works:
            work.wait()

    def overlapped():
        work = dist.all_reduce(one.clone(), async_op=True)
        time.sleep(0.04)
        work.wait()

    cases = {
        "all_to_all": (100.0, lambda: exchange_rows(rows, sent, came, dist.group.WORLD)[:, 0].tolist()),
        "all_reduce": (50.0, lambda: (dist.all_reduce(one.clone()), None)[1]),
        "all_gather": (50.0, lambda: (mesh.all_gather(whole, one, dist.group.WORLD), whole[:, 0].tolist())[1]),
        "reduce_scatter": (50.0, lambda: (mesh.reduce_scatter(part, rows[:2], dist.group.WORLD), part[0, 0].item())[1]),
        "messages": (50.0, messages),
        "pipeline": (50.0 * rank, pipeline),
        "in turn": (100.0, in_turn),
        "overlapped": (50.0, overlapped),
    }
    for _, call in cases.values():
        call()  # connections
    with slow_links(RATE):
        found = {name: (least, *_timed(call)) for name, (least, call) in cases.items()}
    found["as they are"] = (0.0, *_timed(cases["all_to_all"][1]))
    return found


def _check(results):
    for rank, found in enumerate(results):
        for name, (least, took, _) in found.items():
            assert least <= took < least + 25, (rank, name, took)
        assert found["all_to_all"][2] == ([0.0, 1.0] if rank == 0 else [0.0, 0.0, 1.0, 1.0])
        assert found["all_gather"][2] == [0.0, 1.0] and found["reduce_scatter"][2] == 1.0
        assert found["messages"][2] == 1.0 - rank


RUN = RunConfig(
    model=config.ModelConfig(num_layers=2, seq_len=16, hidden_size=32, ffn_size=32, num_experts=4, vocab_size=300),
    workload=config.Workload(global_batch_size=8, micro_batch_size=2, iterations=3, warmup_iterations=0),
    cluster=config.ClusterSpec(ranks_per_node=2),
)  # fmt: skip
# Plan -> (GB/s, the least ms of what is on the way in any case: messages of 4 kB, of which stage 1 takes 4 and stage 0 one
# more; 2 kB for each half of a slice's 2 collectives, forward and backward, of 2 layers and 4 micro-batches; gradients).
PLANS = {
    ParallelPlan(pp=2): (2e-3, 5 * 2.04), ParallelPlan(tp=2): (2e-3, 2 * 4 * 2 * 4 * 1.02),
    ParallelPlan(dp=2): (2e-3, 40.0), ParallelPlan(dp=2, ep=2): (2e-3, 40.0),
}  # fmt: skip


def _all(rank):
    found, steps = _exchanges(rank), []
    tokens = load_tokens((), 300)
    for plan, (slow, _) in PLANS.items():
        for rate in (0.0, slow):
            run = dataclasses.replace(RUN, plan=plan, cluster=config.slowed(RUN.cluster, rate))
            trainer = Trainer(config.check(run), build_mesh(plan, torch.device("cpu")), tokens)
            trainer.run_iteration()
            with slow_links(rate):
                steps.append([trainer.run_iteration() for _ in range(2)])
    return found, [([step.lm_loss for step in each], min(step.step_ms for step in each)) for each in steps]


def test_every_exchange_takes_its_bytes_over_the_rate_and_training_stays_the_same():
    results = spawn(_all, 2)
    _check([found for found, _ in results])
    steps = results[0][1]
    for place, (plan, (_, least_ms)) in enumerate(PLANS.items()):
        (loss, _), (slowed_loss, slow) = steps[2 * place : 2 * place + 2]
        assert slowed_loss == loss and slow >= least_ms, (plan, slow)


def test_what_no_exchange_slows_down_is_refused_or_avoided(monkeypatch):
    slow = config.slowed(RUN.cluster, 2.0)
    assert slow.intra_node_gbytes_per_s == 1.0 and slow.name.endswith("links slowed to 2 GB/s")
    run = dataclasses.replace(RUN, plan=ParallelPlan(dp=2, ep=2), cluster=slow)
    with pytest.raises(ValueError, match="stores into the memory of other GPUs"):
        config.check(dataclasses.replace(run, layer=config.LayerConfig(dispatcher="direct")))
    auto = config.check(dataclasses.replace(run, layer=config.LayerConfig(dispatcher="auto")))
    monkeypatch.setattr(dispatch, "why_unavailable", lambda *args, **more: None)  # as if over NVLink
    assert type(dispatch.build_dispatcher(auto.layer, None, slots_per_rank=2, cluster=slow)) is BasicDispatcher
    assert type(dispatch.build_dispatcher(auto.layer, None, slots_per_rank=2, cluster=RUN.cluster)) is DirectDispatcher
    backwards = dataclasses.replace(slow, slow_links_gbytes_per_s=-1.0)
    with pytest.raises(ValueError, match="must be positive, or 0"):
        config.check(dataclasses.replace(run, cluster=backwards))


def test_experts_go_the_slow_way_too(monkeypatch):
    """As if two GPUs reached each other's memory: copies of experts, and those that move."""
    for module in (replicas, migrate):
        monkeypatch.setattr(module, "why_unavailable", lambda *args, **more: None)
        monkeypatch.setattr(module, "group_size", lambda group: 2)
    monkeypatch.setattr(migrate, "_is_gpu", lambda device: True)
    monkeypatch.setattr(migrate, "_PeerMemory", lambda *args: "memory")
    monkeypatch.setattr(migrate, "_Collective", lambda *args: "exchange")
    online = config.OnlineConfig(replicate="exact", replica_slots=1)
    run = dataclasses.replace(RUN, layer=config.LayerConfig(dispatcher="auto"), online=online)
    for rate, mechanism, way in ((0.0, "SymmetricReplication", "memory"), (2.0, "ExactReplication", "exchange")):
        run = dataclasses.replace(run, cluster=config.slowed(RUN.cluster, rate))
        assert type(replicas.build_replication(run, None)).__name__ == mechanism
        with slow_links(rate):
            assert migrate.Staging().exchange(None, torch.device("cpu")) == way


class _Exchange:
    """Stands for the work of a collective, which follows what the training stream was given so far. A delay that follows no
    work begins, and may end, while that stream is still busy."""

    def __init__(self):
        self._done = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


@pytest.mark.gpu
def test_the_device_waits_beside_the_training_stream_and_the_host_does_not():
    gpu_backend(1)
    torch.cuda.set_device(0)
    for seconds in (0.001, 0.02):
        slow_links_module._HeldOnDevice([], "link", 1e-6, ()).wait()  # kernels are loaded at their first launch
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda._sleep(50_000_000)  # the host gets ahead: none of its time lies between the marks
        start = time.perf_counter()
        marks[0].record()
        held = slow_links_module._HeldOnDevice([_Exchange()], "link", seconds, ())
        torch.zeros(1, device="cuda")
        marks[1].record()  # work that does not need the exchange
        held.wait()
        marks[2].record()
        assert time.perf_counter() - start < 0.01
        torch.cuda.synchronize()
        assert marks[0].elapsed_time(marks[1]) < 0.5
        assert 1e3 * seconds <= marks[0].elapsed_time(marks[2]) < 1e3 * seconds + 0.5


@pytest.mark.gpu
def test_on_gpus_nobody_waits_but_the_device():
    _check(spawn(_on_gpu, 2, backend=gpu_backend(2)))


def _on_gpu(rank):
    return _exchanges(rank, gpu_of(rank))
