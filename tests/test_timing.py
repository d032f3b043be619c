"""Layer times: every layer, forward and backward, counted once also under recomputation."""

import pytest
import torch
from parity import make_config, make_trainer

from smartmoe.config import ParallelPlan
from smartmoe.timing import LayerTimer


@pytest.mark.parametrize("recompute", [False, True])
def test_every_layer_is_timed_once_a_micro_batch(recompute):
    trainer = make_trainer(make_config(ParallelPlan(recompute=recompute)))
    timer = LayerTimer(trainer.layers, torch.device("cpu"))
    trainer.run_iteration()
    parts = [(layer, part) for layer, part, _, _ in timer._marks]
    expected = [(layer, part) for layer in trainer.layers for part in ("forward", "backward")]
    assert sorted(parts) == sorted(expected * trainer.config.num_micro_batches)
    times = timer.take()
    assert set(times) == set(trainer.layers)
    assert all(ms > 0 for layer in times.values() for ms in layer.values())
    assert timer.take() == {}


def test_every_replay_of_captured_passes_counts():
    trainer = make_trainer(make_config(ParallelPlan()))
    timer = LayerTimer(trainer.layers, torch.device("cpu"))
    timer.begin(repeats=False)
    trainer.run_iteration()
    captured = timer.end()
    assert captured and timer.take() == {}, "a capture runs nothing"
    timer.replayed(captured)
    once = timer.take()
    for _ in range(3):
        timer.replayed(captured)
    thrice = timer.take()
    for layer, times in once.items():
        assert thrice[layer] == pytest.approx({part: 3 * ms for part, ms in times.items()})


def test_of_captured_passes_the_first_is_timed_for_all(monkeypatch):
    """An event in a graph holds the GPU up."""
    trainer = make_trainer(make_config(ParallelPlan()))
    timer, num_asked = LayerTimer(trainer.layers, torch.device("cpu")), 0
    now = timer._now

    def count():
        nonlocal num_asked
        num_asked += 1
        return now()

    monkeypatch.setattr(timer, "_now", count)
    captured = []
    for repeats in (False, True):
        timer.begin(repeats)
        trainer.run_iteration()
        captured.append(timer.end())
        assert num_asked == 2 * len(captured[0]) > 0
    assert sorted(set(captured[1])) == sorted({mark[:2]: mark for mark in captured[0]}.values())
    trainer.run_iteration()  # what is not captured is timed
    assert num_asked == 4 * len(captured[0])


def test_a_turn_gives_the_iteration_before():
    trainer = make_trainer(make_config(ParallelPlan()))
    timer, by_hand = (LayerTimer(trainer.layers, torch.device("cpu")) for _ in range(2))
    taken, given = [], []
    for _ in range(3):
        trainer.run_iteration()
        timer._marks = list(by_hand._marks)  # the same clock
        taken.append(by_hand.take())
        given.append(timer.turn())
    assert given == [{}, *taken[:2]]
    trainer.run_iteration()
    timer.forget()
    assert timer.turn() == taken[2] and timer.turn() == {}


class FakeEvent:
    """A CUDA event of a device whose clock is `now`. `waited`: which were waited for."""

    now, waited = 0.0, []

    def __init__(self, **_):
        self.ms = None

    def record(self):
        FakeEvent.now += 1.0
        self.ms = FakeEvent.now

    def synchronize(self):
        FakeEvent.waited.append(self)

    def elapsed_time(self, end):
        return end.ms - self.ms


def test_a_gpu_is_asked_for_the_iteration_before_alone_but_where_a_graph_is_replayed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    FakeEvent.now, FakeEvent.waited = 0.0, []
    timer, ends = LayerTimer({}, torch.device("cuda")), []

    def run(idle_ms):
        timer._begin(0, "forward")
        FakeEvent.now += idle_ms
        timer._end(0, "forward")
        ends.append(timer._marks[-1][3])

    run(9.0)
    assert timer.turn() == {} and FakeEvent.waited == []
    run(19.0)
    assert timer.turn() == {0: {"forward_ms": 10.0, "backward_ms": 0.0}} and FakeEvent.waited == ends[:1]
    timer.begin(repeats=False)
    run(29.0)
    captured = timer.end()
    timer.replayed(captured)
    assert timer.turn() == {0: {"forward_ms": 20.0, "backward_ms": 0.0}} and FakeEvent.waited == ends
    captured[0][2].record()  # the next replay is on its way: start is new, end is not yet
    timer.replayed(captured)
    timer.forget()
    run(39.0)
    assert timer.turn() == {0: {"forward_ms": 30.0, "backward_ms": 0.0}} and FakeEvent.waited == ends[:3]
    assert timer.turn() == {0: {"forward_ms": 40.0, "backward_ms": 0.0}} and FakeEvent.waited == ends
