"""The next batch is read while a GPU works on the update: the same batches, each once, and errors when it is their turn."""

import dataclasses

import pytest
import torch
from parity import WORKLOAD, make_config, make_trainer


def _trainer(reads_ahead: bool = True, iterations: int = 4, device: str = "cpu"):
    """A trainer that may read ahead also on a CPU, and the iterations, from 0, whose batches have been read."""
    trainer = make_trainer(make_config(workload=dataclasses.replace(WORKLOAD, iterations=iterations)), device)
    trainer._reads_ahead, batch, read = reads_ahead, trainer.batch, []
    trainer.batch = lambda iteration: [read.append(iteration), batch(iteration)][1]
    return trainer, read


def test_what_is_read_ahead_is_trained_on():
    curves = []
    for reads_ahead in (False, True):
        trainer, read = _trainer(reads_ahead)
        results = [trainer.run_iteration() for _ in range(3)]
        curves.append([(result.lm_loss, result.optimizer.grad_norm) for result in results])
        assert read == [0, 1, 2] + [3] * reads_ahead
    assert curves[0] == curves[1]
    trainer.run_iteration()
    assert read == [0, 1, 2, 3] and trainer._ahead is None, "nothing behind the last iteration"


def test_an_iteration_out_of_turn_has_its_own_batch():
    trainer, read = _trainer(iterations=9)
    trainer.run_iteration()
    trainer.iteration = 5  # as a checkpoint says
    trainer.run_iteration()
    assert read == [0, 1, 5, 6]
    straight, _ = _trainer(iterations=9)
    straight.run_iteration()
    straight.iteration = 5
    straight._ahead = None
    straight.run_iteration()
    assert all(torch.equal(a, b) for a, b in zip(trainer.optimizer.masters, straight.optimizer.masters, strict=True))


def test_bad_data_is_told_when_its_iteration_comes():
    trainer, _ = _trainer()
    trainer.data.parts = [(name, tokens.copy()) for name, tokens in trainer.data.parts]
    trainer.run_iteration()
    for _, tokens in trainer.data.parts:
        tokens[:] = trainer.config.model.vocab_size
    trainer.run_iteration()  # has its batch, and its result is not lost for what comes behind it
    assert trainer.iteration == 2
    with pytest.raises(ValueError, match="outside model.vocab_size"):
        trainer.run_iteration()


@pytest.mark.gpu
def test_reading_ahead_does_not_wait_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    trainer, read = _trainer(device="cuda")
    assert make_trainer(trainer.config, "cuda")._reads_ahead
    trainer.run_iteration()
    wanted = trainer.batch(7)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    found = trainer.batch(7)
    assert not torch.cuda.current_stream().query(), "the host has waited"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
