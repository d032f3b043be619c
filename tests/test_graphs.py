"""Recorded passes: the losses, counts and gradients of passes that run as they are, whatever changes between iterations.

On a CPU a stand-in records by running and plays by running again with what Python saw forgotten, as a CUDA graph does.
"""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dist import gpu_backend, gpu_of, spawn
from parity import MODEL, WORKLOAD, make_config
from test_parity import REPLICATION, _shuffle_at

from smartmoe import train
from smartmoe.config import GateConfig, LayerConfig, OnlineConfig, ParallelPlan, RunConfig, Workload, check
from smartmoe.data import TokenDataset
from smartmoe.dispatch.symmetric_replicas import SymmetricReplication
from smartmoe.graphs import WARM_UP, PassGraphs, why_not
from smartmoe.mesh import build_mesh
from smartmoe.parallel.data import GradientBuffers
from smartmoe.parallel.early import EarlyReduction
from smartmoe.parallel.pipeline_passes import ChunkSource
from smartmoe.timing import LayerTimer
from smartmoe.trainer import Trainer

ITERATIONS = 11
SMALL = dataclasses.replace(MODEL, num_layers=2)
DIRECT = LayerConfig(dispatcher="direct", row_factor=2.0)
HISTORY = OnlineConfig(replicate="history", replica_slots=2)
TWO, PIPE = ParallelPlan(dp=2, ep=2), ParallelPlan(pp=2)
PIPES, CHUNKS = ParallelPlan(pp=2, dp=2, ep=2), ParallelPlan(pp=2, vpp=2)


def trainer_of(config, device="cpu") -> Trainer:
    text = np.random.default_rng(0).zipf(1.3, 1 << 14).clip(max=config.model.vocab_size - 1)
    tokens = TokenDataset([("zipf", text)], config.model.vocab_size, 1)
    return Trainer(config, build_mesh(config.plan, torch.device(device)), tokens)


class StandIn:
    """A Tape for CPUs. A recording takes back what the call did to gradients and losses; playing it makes the call with the
    host's side of the passes as it was when it was recorded, and leaves that side alone."""

    num_bytes = 0

    def __init__(self, trainer):
        self.trainer, self.buffers = trainer, trainer.optimizer.buffers
        self.replays = self.recordings = 0

    def record(self, call, room=None):
        sums = [share.grad for share in self.buffers.shares]
        tensors = [*self.buffers._flat.values(), *sums, self.trainer.runner._totals]
        for layer in self.trainer.layers.values():
            tensors += getattr(layer.replication, "grads", [])
        before, empty, early = [tensor.clone() for tensor in tensors], set(self.buffers._empty), self._early()
        call()
        self.recordings += 1
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        recorder = self.trainer.online.watchers[0]
        captured = list(recorder._seen)

        def replay():
            self.replays += 1
            host, reduced = self.buffers._empty, self._early()
            self.buffers._empty = set(empty)
            self._early(early)
            others = self.trainer.graphs._watchers
            for watcher in others:
                watcher.begin(repeats=False)
            with torch.enable_grad():  # wherever it is played
                call()
            fresh = [watcher.end() for watcher in others][0]
            for (_, rows), (_, now) in zip(captured, fresh, strict=True):
                rows.copy_(now)
            self.buffers._empty = host
            self._early(reduced)

        return replay

    def _early(self, state=None):
        """The host's side of early reduction; state: what it shall be."""
        early = self.buffers.early
        if early is None:
            return None
        if state is not None:
            early.num_started = state[0]
            for bucket, missing in zip(early._buckets, state[1], strict=True):
                bucket.missing = missing
        return early.num_started, [bucket.missing for bucket in early._buckets]

    def clear(self):
        pass


def record_on_cpu(trainer) -> StandIn:
    trainer.graphs.reason, trainer.graphs._tape = "", StandIn(trainer)
    return trainer.graphs._tape


def curve(trainer, before_iteration=None, iterations=ITERATIONS) -> list:
    """Losses, norms and counts of each iteration."""
    found = []
    for iteration in range(iterations):
        if before_iteration:
            before_iteration(trainer, iteration)
        result = trainer.run_iteration()
        counts = trainer.online.gather_counts()
        if trainer.config.gate.kind != "gshard":  # drops
            assert counts.sum() == np.prod(counts.shape[:3]) * _copies(trainer.config)
        found.append((result.lm_loss, result.balance_loss, result.optimizer.grad_norm, counts.tolist()))
    return found


def _copies(config) -> int:
    return config.workload.micro_batch_size * config.model.seq_len * config.model.top_k // config.plan.tp


def _come_and_go(trainer, iteration):
    """As REPLICATION["history"], the first ones after passes were recorded."""
    if iteration > 3:
        REPLICATION["history"](trainer, iteration)


CASES = {
    "experts move": (TWO, 3, {"online": OnlineConfig(policy="greedy", interval=3)}, _shuffle_at(7)),
    "one micro-batch": (TWO, 1, {}, _shuffle_at(7)),
    "copies that come and go": (TWO, 2, {"online": HISTORY}, _come_and_go),
    "reduced early": (
        ParallelPlan(dp=2, ep=1), 3, {"workload": dataclasses.replace(WORKLOAD, reduce_early=True)}, None,
    ),
    "recomputed, cut state": (
        dataclasses.replace(TWO, recompute=True), 2, {"workload": dataclasses.replace(WORKLOAD, zero=1)}, None,
    ),
    "cut weights": (ParallelPlan(dp=2, ep=1), 2, {"workload": dataclasses.replace(WORKLOAD, zero=3)}, None),
    "a router without gradients": (TWO, 2, {"gate": GateConfig(kind="zero")}, None),
    "a pipeline": (PIPE, 5, {"online": OnlineConfig(policy="greedy", interval=3)}, _shuffle_at(7)),
    "a pipeline that is never full": (dataclasses.replace(PIPE, recompute=True), 2, {}, None),
    "chunks in turn": (
        CHUNKS, 6,
        {"model": MODEL, "workload": dataclasses.replace(WORKLOAD, zero=1), "gate": GateConfig(kind="gshard")}, None,
    ),
}  # fmt: skip


# the first micro-batch, and one for each that can be in flight, in each chunk
PAIRS = {"a pipeline": (3, 2), "a pipeline that is never full": (2, 2), "chunks in turn": (8, 6)}


def _config(name) -> tuple[RunConfig, object]:
    plan, num_passes, changes, before = CASES[name]
    settings = {"model": SMALL, "layer": DIRECT, "gate": GateConfig(kind="naive")}
    return make_config(plan, num_passes, **settings | changes), before


def _with_and_without(world_rank):
    found = {}
    EarlyReduction.__init__.__defaults__ = (20_000,)  # bytes of a bucket: several for the small model
    for name in CASES:
        config, before = _config(name)
        plain = curve(trainer_of(config), before)
        trainer = trainer_of(config)
        tape = record_on_cpu(trainer)
        said = []
        trainer.graphs.tell = said.append
        reduced = _reduced_in_passes(trainer)
        timer = LayerTimer(trainer.layers, torch.device("cpu"))
        trainer.graphs.join(timer)
        recorded = curve(trainer, before)
        times = timer.take()
        num_timed = len(times) - len(trainer.layers)
        assert all(num_early == num_all > 1 for num_early, num_all in reduced[WARM_UP:]), reduced
        facts = (tape.recordings, tape.replays, config.num_micro_batches, said, trainer.graphs.reason, num_timed)
        found[name] = plain, recorded, facts
    found["outgrown"] = _outgrown(world_rank)
    found["no room"] = _no_room()
    found["in place"] = _places()
    found["auto"] = _auto()
    found["fails"] = _fails(world_rank)
    return found


def _reduced_in_passes(trainer) -> list[tuple[int, int]]:
    """Filled in every iteration that is yet to come: buckets whose reduction passes have started, and all."""
    found, early = [], trainer.optimizer.buffers.early
    if early is not None:
        finish = early.finish

        def noting():
            found.append((early.num_started, len(early._buckets)))
            finish()

        early.finish = noting
    return found


def _outgrown(world_rank):
    """Room that becomes tight, as one rank has heard: all drop the recording, an iteration runs as it is, another is
    recorded."""
    layer = LayerConfig(dispatcher="direct", row_factor=1.5)
    config = make_config(TWO, 2, model=SMALL, layer=layer, gate=GateConfig(kind="naive"))
    trainer = trainer_of(config)
    tape, dispatchers, states = record_on_cpu(trainer), [layer.dispatcher for layer in trainer.layers.values()], []
    for dispatcher in dispatchers:
        dispatcher.num_careful = 4
    for iteration in range(8):
        if iteration == 5 and world_rank == 1:  # as if routings had needed more
            dispatchers[-1].told.on_host[1] = int(dispatchers[-1].num_rows / 1.05)
        trainer.run_iteration()
        states.append((trainer.graphs.is_recorded, tape.recordings))
    return states


def _no_room():
    """Routings of a recorded pass that do not fit: the iteration is repeated as it is, and gives what it would have given."""
    losses = []
    for is_recorded in (False, True):
        layer = LayerConfig(dispatcher="direct", row_factor=1.0)
        trainer = trainer_of(make_config(TWO, 2, model=SMALL, layer=layer, gate=GateConfig(kind="naive")))
        if is_recorded:
            record_on_cpu(trainer)
        dispatchers, states = [layer.dispatcher for layer in trainer.layers.values()], []
        for dispatcher in dispatchers:
            dispatcher.num_careful = 4
        trainer.graphs.is_outgrown = lambda: False
        for iteration in range(5):
            if iteration == 3:
                for dispatcher in dispatchers:
                    dispatcher.told.on_host.zero_(), dispatcher.told.most.zero_()
                    dispatcher._most_needed = dispatcher._num_rows = 0
            losses.append(trainer.run_iteration().lm_loss)
            states.append(trainer.graphs.is_recorded)
    return losses, states, trainer.graphs._tape.recordings


def _places():
    """Memory that a graph reads: whether it stays in its place when experts move and copies come and go, and whether the
    scale of the loss is read there."""
    trainer = trainer_of(_config("copies that come and go")[0])
    found = []
    for iteration in range(8):
        REPLICATION["history"](trainer, iteration)
        places = [t.data_ptr() for ref in trainer.optimizer.buffers.refs for t in (ref.param, ref.grad)]
        for layer in trainer.layers.values():
            tables = (layer.slot_of_expert_E, layer.replication._table_EB, *layer.replication.grads)
            places += [t.data_ptr() for t in tables]
        found.append(places)
        trainer.run_iteration()
    trainer._loss_scale.fill_(8.0)
    ones = torch.ones(1)
    large = trainer._loss(ones, ones)
    trainer.optimizer.loss_scale = 2.0
    trainer.run_iteration()
    return found, (large / trainer._loss(ones, ones)).item()


def _auto():
    """What policy "auto" says after iteration 6, when only the third and fourth have been timed, which were played."""
    online = OnlineConfig(policy="auto", interval=10)
    trainer = trainer_of(make_config(TWO, 2, model=SMALL, layer=DIRECT, gate=GateConfig(kind="naive"), online=online))
    tape = record_on_cpu(trainer)
    events = [event for _ in range(6) for event in trainer.run_iteration().events]
    return [(event["iteration"], event["reason"]) for event in events], tape.replays


def _fails(world_rank):
    """A capture that fails on one rank: all ranks go on without, with the losses that they would have."""
    config, _ = _config("experts move")
    plain = curve(trainer_of(config))
    trainer = trainer_of(config)
    tape, said = record_on_cpu(trainer), []
    trainer.graphs.tell = said.append
    record = tape.record

    def failing(call, room):
        replay = record(call, room)
        if world_rank == 1 and tape.recordings == 2:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return replay

    tape.record = failing
    return plain == curve(trainer), trainer.graphs.reason, said, tape.replays


def test_recorded_passes_change_no_bit():
    for rank, found in enumerate(spawn(_with_and_without, 2)):
        states, (same, reason, said, replays) = found.pop("outgrown"), found.pop("fails")
        losses, were_recorded, num_recordings = found.pop("no room")
        assert losses[:5] == losses[5:] and were_recorded[2] and num_recordings > 2, were_recorded
        places, ratio = found.pop("in place")
        assert all(place == places[0] for place in places) and ratio == 4.0
        reasons, num_played = found.pop("auto")
        assert [(i, reason.startswith("no layer has been timed")) for i, reason in reasons] == [
            (i, i < 6) for i in (2, 2, 4, 4, 6, 6)
        ]
        assert num_played == 8
        for name, (plain, recorded, facts) in found.items():
            recordings, replays_of, num_passes, words, why, num_timed = facts
            assert recorded == plain, f"rank {rank}: {name}"
            pairs = PAIRS.get(name)  # of forward and backward, by rank
            num_parts = 1 if pairs is None else 2 * _config(name)[0].plan.vpp
            assert not why and replays_of == (ITERATIONS - WARM_UP) * num_passes * num_parts, name
            assert not num_timed and "captured in" in words[0], name
            times = 2 if name.startswith("copies") else 1  # without any; from then on with
            if name == "reduced early":  # the first micro-batch's, the last one's, and one between
                assert recordings == num_passes == 3
            else:
                assert recordings == (2 * pairs[rank] if pairs else min(num_passes, 2) * times), (name, recordings)
            assert len(words) == times, name
        assert states == [(False, 0)] * 2 + [(True, 2)] * 3 + [(False, 2)] * 2 + [(True, 4)], states
        assert same and replays == 0 and len(said) == 1 and "run without" in said[0]
        wanted = "RuntimeError: operation not permitted when stream is capturing" if rank else "another rank could not"
        assert reason == wanted


def _copies_of_one_stage(world_rank):
    """Copies that the first stage of a pipeline of expert groups has, and the second has not."""
    config = make_config(PIPES, 3, layer=DIRECT, gate=GateConfig(kind="naive"), online=HISTORY)

    def before(trainer, iteration):
        if trainer.mesh.pp_stage == 0:
            _come_and_go(trainer, iteration)

    plain = curve(trainer_of(config), before, iterations=6)
    trainer = trainer_of(config)
    tape = record_on_cpu(trainer)
    return plain, curve(trainer, before, iterations=6), tape.recordings


FOUR = {
    "tensor-parallel stages": (ParallelPlan(pp=2, tp=2, ep=2), 2, {"model": SMALL}),
    "chunks of expert groups, reduced early": (
        dataclasses.replace(CHUNKS, dp=2, ep=2), 4, {"workload": dataclasses.replace(WORKLOAD, reduce_early=True)},
    ),
}  # fmt: skip


def _four(world_rank):
    found = {"copies of one stage": _copies_of_one_stage(world_rank)}
    EarlyReduction.__init__.__defaults__ = (20_000,)
    for name, (plan, num_passes, changes) in FOUR.items():
        config = make_config(plan, num_passes, layer=DIRECT, gate=GateConfig(kind="naive"), **changes)
        plain, trainer = curve(trainer_of(config), iterations=WARM_UP + 1), trainer_of(config)
        tape, reduced = record_on_cpu(trainer), _reduced_in_passes(trainer)
        found[name] = plain, curve(trainer, iterations=WARM_UP + 1), tape.replays
        assert all(num_early == num_all > 1 for num_early, num_all in reduced[WARM_UP:]), reduced
    return found


def test_stages_record_each_by_itself():
    for rank, found in enumerate(spawn(_four, 4)):
        for name, (plain, recorded, num) in found.items():
            assert recorded == plain, f"rank {rank}: {name}"
            if name in FOUR:  # one iteration of forward and backward passes
                plan, num_passes, _ = FOUR[name]
                assert num == 2 * num_passes * plan.vpp, name
            else:
                assert num == (2 * 2 * 3 if rank < 2 else 2 * 2)  # pairs: twice those of two in flight; of one in flight


class _Rooms:
    """A Tape that notes what each recording shares memory with, and who had filled the slots for copies when it began."""

    num_bytes = num_cleared = 0

    def __init__(self, replication):
        self.replication, self.held = replication, []

    def record(self, call, room=None):
        self.held.append(self.replication._held)
        call()
        replay = lambda: None  # noqa: E731
        replay.room = room
        return replay

    def clear(self):
        self.num_cleared += 1


@pytest.mark.parametrize("reduces_early", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_micro_batches_in_flight_share_no_memory(num_slots, reduces_early):
    """What a CPU's stand-in cannot show: recordings of one room overwrite each other's memory."""
    linear, num_passes, replication = torch.nn.Linear(4, 4), 8, SymmetricReplication(None, 1)

    def run(x, token_id, target):
        replication._held = "this pass"
        return linear(x.float()).sum().view(1), torch.zeros(1)

    buffers = GradientBuffers(list(linear.named_parameters()), {})
    if reduces_early:
        buffers.reduce_early(num_passes)
    dispatcher = SimpleNamespace(transport=SimpleNamespace(is_open=False), is_settled=True, num_rows=8)
    layer = SimpleNamespace(observers=[], dispatcher=dispatcher, replication=replication)
    tape, sources = _Rooms(replication), [ChunkSource(run, (), True, True, num_slots) for _ in range(2)]
    settings = {"num_passes": num_passes, "reason": "", "tape": tape, "group": None}
    graphs = PassGraphs(sources, buffers, [layer], [], **settings)
    for _ in range(WARM_UP + 1):
        graphs.prepare(*torch.ones(3, 2, 4, dtype=torch.int64))
    assert graphs.is_recorded, graphs.reason
    rooms_of = []
    for chunk in range(2):
        plays = [graphs.pick(chunk, place) for place in range(num_passes)]
        rooms = [{replay.room for replay in play.replays} for play in plays]
        assert all(len(room) == 1 for room in rooms), "forward and backward"
        for first in range(num_passes - num_slots + 1):
            assert len(set().union(*rooms[first : first + num_slots])) == num_slots
            assert len({id(play) for play in plays[first : first + num_slots]}) == num_slots
        assert [play.fills for play in plays] == [[0, 1] if chunk == 1 and place == 0 else [] for place in range(8)]
        assert plays[0] not in plays[1:] and (not reduces_early or plays[-1] not in plays[:-1])
        rooms_of.append(set().union(*rooms))
    assert not rooms_of[0] & rooms_of[1]
    backward = tape.held[1::2]  # with copies of another micro-batch, where one can come between
    assert set(backward) == ({None} if num_slots > 1 else {"this pass"})
    graphs.drop()
    assert not graphs.is_recorded and tape.num_cleared == 1


# ------------------------------------------------------------------------------------------------------- where not


class _Layer:
    """What `why_not` looks at."""

    def __init__(self, layer):
        self.__dict__ |= {"layer_idx": 3, "dispatcher": layer.dispatcher, "replication": None, "experts": layer.experts}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"workload": Workload(cuda_graph="never")}, '"never"'),
        ({"online": dataclasses.replace(HISTORY, return_early=True)}, "return_early"),
        ({"plan": PIPE, "workload": Workload(zero=2)}, "plan.pp = 2 with workload.zero = 2"),
        ({"layer": LayerConfig()}, "layer 3: the host takes part in the exchange of BasicDispatcher"),
        ({"layer": LayerConfig(dispatcher="padded")}, "PaddedDispatcher"),
        ({"layer": LayerConfig(dispatcher="direct", experts="loop")}, "one by one"),
    ],
)
def test_where_nothing_is_recorded_it_is_said_why(changes, words):
    config = make_config(layer=changes.pop("layer", DIRECT), gate=GateConfig(kind="naive"))
    layers = [_Layer(layer) for layer in trainer_of(config).layers.values()]
    config = dataclasses.replace(config, **changes)
    assert words in why_not(config, layers, torch.device("cuda", 0))
    assert why_not(config, layers, torch.device("cpu"))


def test_a_cpu_runs_as_it_is_and_the_setting_is_checked():
    trainer = trainer_of(make_config(layer=DIRECT))
    assert isinstance(trainer.graphs, PassGraphs) and trainer.graphs.reason == "it runs on a CPU"
    assert trainer.graphs.peak_bytes() == 0 and trainer.graphs.pick(0, 0) is None
    with pytest.raises(ValueError, match='workload.cuda_graph = "always" is not one of auto, never'):
        check(RunConfig(workload=Workload(cuda_graph="always")))


def test_an_unknown_observer_keeps_passes_as_they_are():
    trainer = trainer_of(make_config(layer=DIRECT, gate=GateConfig(kind="naive")))
    record_on_cpu(trainer)
    calls = []
    next(iter(trainer.layers.values())).observers.append(lambda *args: calls.append(args))
    for _ in range(4):
        trainer.run_iteration()
    assert len(calls) == 4 * trainer.config.num_micro_batches and "layer 0 has an observer" in trainer.graphs.reason


def test_the_training_log_says_that_a_gpu_runs_without(tmp_path, monkeypatch):
    config = make_config(layer=DIRECT, workload=dataclasses.replace(WORKLOAD, iterations=3, warmup_iterations=0))
    trainer = trainer_of(config)
    record_on_cpu(trainer)
    train.train(trainer, tmp_path)
    assert "CUDA graph: the passes of a micro-batch were captured" in (tmp_path / "train.log").read_text()
    assert len([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]) == 3


# ------------------------------------------------------------------------------------------------------------ GPUs

GPU_MODEL = dataclasses.replace(MODEL, hidden_size=128, ffn_size=256, seq_len=64)
EXACT = OnlineConfig(replicate="exact", replica_slots=2)
ASKS = "a hook that asks the device"


def _ask(trainer, iteration):
    """The host waits in the passes of the last rank, so that it cannot capture them."""
    if iteration == 0 and trainer.mesh.world_rank == trainer.config.plan.world_size - 1:
        layer = list(trainer.layers.values())[1]
        layer.gate.register_forward_hook(lambda gate, args, routing: (routing.weight_TK.sum().item(), None)[1])


def _ask_with_copies(trainer, iteration):
    """The same where copies of experts have been sent in what was captured and did not run."""
    _ask(trainer, iteration)
    REPLICATION["history"](trainer, iteration)


def _grow(trainer, iteration):
    """Routings that seem to need more rows, after passes were recorded."""
    for layer in trainer.layers.values():
        dispatcher = layer.dispatcher
        dispatcher.num_careful = 4
        if iteration == 9:
            dispatcher.told.most.fill_(int(dispatcher.num_rows / 1.05))


GPU_CASES = {
    ASKS: ({}, _ask),
    "experts move": ({"online": OnlineConfig(policy="greedy", interval=4)}, _shuffle_at(9)),
    "recomputed": ({"recompute": True}, None),
    "history copies": ({"online": HISTORY}, _come_and_go),
    "history copies that ask": ({"online": HISTORY}, _ask_with_copies),
    "exact copies": ({"online": EXACT}, _shuffle_at(9)),
    "capacity": ({"gate": GateConfig(kind="gshard", capacity=1.5)}, None),
    "reduced early": ({"ep": 1, "workload": {"reduce_early": True}}, None),
    "policy auto": ({"online": OnlineConfig(policy="auto", interval=100)}, None),
}
GPU_PIPELINES = {
    "a pipeline": ({"plan": PIPE, "num_passes": 5}, _shuffle_at(9)),
    "a pipeline that is never full": ({"plan": PIPE, "num_passes": 2, "recompute": True}, None),
    "a pipeline that asks": ({"plan": PIPE}, _ask),
    "chunks in turn": ({"plan": CHUNKS, "num_passes": 6, "workload": {"zero": 1}}, None),
    "chunks recomputed": ({"plan": CHUNKS, "num_passes": 4, "recompute": True}, _shuffle_at(9)),
    "capacity in a pipeline": ({"plan": PIPE, "gate": GateConfig(kind="gshard", capacity=1.5)}, None),
    "tensor-parallel stages": ({"plan": ParallelPlan(pp=2, tp=2, ep=2), "num_passes": 4}, _shuffle_at(9)),
    "stages of expert groups": ({"plan": PIPES, "num_passes": 5}, _shuffle_at(9)),
    "their chunks": ({"plan": dataclasses.replace(CHUNKS, dp=2, ep=2), "num_passes": 4}, _shuffle_at(9)),
    "room that grows": ({"plan": PIPES, "row_factor": 1.5}, _grow),
    "history copies in a pipeline": ({"plan": PIPES, "online": HISTORY}, _come_and_go),
    "exact copies in a pipeline": ({"plan": PIPES, "online": EXACT}, _shuffle_at(9)),
    "exact copies of chunks": (
        {"plan": dataclasses.replace(CHUNKS, dp=2, ep=2), "num_passes": 4, "online": EXACT}, None,
    ),
    "weights gathered in a pipeline": ({"plan": PIPES, "workload": {"zero": 3}}, None),
    "reduced early in a pipeline": (
        {"plan": dataclasses.replace(CHUNKS, dp=2), "num_passes": 4, "workload": {"reduce_early": True}}, None,
    ),
}  # fmt: skip
GPU_CASES |= GPU_PIPELINES


def gpu_curves(world_rank, num_ranks, name, iterations=20):
    """(plain, recorded) curves, and what was said. One process a GPU."""
    changes, before = copy.deepcopy(GPU_CASES[name][0]), GPU_CASES[name][1]
    plan = changes.pop("plan", ParallelPlan(dp=num_ranks, ep=changes.pop("ep", num_ranks)))
    plan = dataclasses.replace(plan, recompute=changes.pop("recompute", False))
    layer = LayerConfig(dispatcher="direct", row_factor=changes.pop("row_factor", num_ranks))
    num_passes = changes.pop("num_passes", 3)
    found, said = [], []
    device = gpu_of(world_rank)
    torch.cuda.set_device(device)
    own = changes.pop("workload", {})
    for cuda_graph in ("never", "auto"):
        work = dataclasses.replace(WORKLOAD, dtype="bfloat16", iterations=100, cuda_graph=cuda_graph, **own)
        settings = {"layer": layer, "gate": GateConfig(kind="naive"), "model": GPU_MODEL, "workload": work, **changes}
        config = make_config(plan, num_passes, **settings)
        trainer = trainer_of(config, str(device))
        trainer.graphs.tell = said.append
        # the one way of attention whose backward pass is deterministic
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found.append(curve(trainer, before, iterations))
        said.append(trainer.graphs.reason)
        peak = trainer.graphs.num_bytes
        trainer.close()
        del trainer
    return (*found, said, peak)


def _gpu_world(world_rank, num_ranks, names):
    return {name: gpu_curves(world_rank, num_ranks, name) for name in names}


def _cases(num_ranks: int) -> list[str]:
    """Those for so many ranks: all without a plan, of which one rank has no copies."""
    return [
        name
        for name, (changes, _) in GPU_CASES.items()
        if (changes["plan"].world_size == num_ranks if "plan" in changes else num_ranks < 3)
        and (num_ranks > 1 or "copies" not in name)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_on_gpus_a_graph_changes_no_bit(num_ranks):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    backend = gpu_backend(num_ranks)
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped GEMM keeps counts on the device from compute capability 9.0")
    ranks = spawn(_gpu_world, num_ranks, num_ranks, _cases(num_ranks), backend=backend, timeout_s=300)
    for rank, found in enumerate(ranks):
        for name, (plain, recorded, said, num_bytes) in found.items():
            asks = GPU_CASES[name][1] in (_ask, _ask_with_copies)
            fails = asks and (rank == num_ranks - 1 or name not in GPU_PIPELINES)  # of stages each by itself
            assert said[0] == 'workload.cuda_graph = "never"' and bool(said[-1]) == fails, f"{name}: {said}"
            assert any("captured in" in words for words in said) == (num_bytes > 0) == (not fails), f"{name}: {said}"
            assert recorded == plain, name
            if GPU_CASES[name][1] is _grow:
                assert sum("captured in" in words for words in said) == 2, said
