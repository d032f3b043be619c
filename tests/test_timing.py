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
    timer.begin()
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
