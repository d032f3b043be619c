"""When copies of experts that stay for a step are sent by kernels, where passes are recorded: on a CPU, without the kernels."""

from types import SimpleNamespace

import pytest
import torch
from test_graphs import _Rooms as Rooms

from smartmoe.dispatch.symmetric_replicas import SymmetricReplication
from smartmoe.graphs import WARM_UP, PassGraphs
from smartmoe.parallel.data import GradientBuffers
from smartmoe.parallel.pipeline_passes import ChunkSource
from smartmoe.replicas import SymmetricHistory


@pytest.mark.parametrize("num_slots", [1, 3])
def test_of_all_recordings_the_first_micro_batchs_sends_copies_that_stay(num_slots, monkeypatch):
    """What was dropped, or failed, may never have run: it counts as not sent."""
    linear, replication, sent = torch.nn.Linear(4, 4), SymmetricHistory(None, 1), []
    monkeypatch.setattr(SymmetricReplication, "send_weights", lambda self, plan: sent.append(len(tape.held)))

    def run(x, token_id, target):
        replication.send_weights(None)
        return linear(x.float()).sum().view(1), torch.zeros(1)

    dispatcher = SimpleNamespace(transport=SimpleNamespace(is_open=False), is_settled=True, num_rows=8)
    layer = SimpleNamespace(observers=[], dispatcher=dispatcher, replication=replication)
    buffers, tape = GradientBuffers(list(linear.named_parameters()), {}), Rooms(replication)
    settings = {"num_passes": 4, "reason": "", "tape": tape, "group": None}
    graphs = PassGraphs([ChunkSource(run, (), True, True, num_slots)], buffers, [layer], [], **settings)
    for _ in range(WARM_UP + 1):
        graphs.prepare(*torch.ones(3, 2, 4, dtype=torch.int64))
    assert graphs.is_recorded and sent == [1] and len(tape.held) > 2
    graphs.drop()
    replication.send_weights(None)
    assert len(sent) == 2
    replication.forget_weights()  # as send_all
    monkeypatch.setattr(graphs, "_record_pass", lambda *_: replication.send_weights(None) or 1 / 0)
    for _ in range(WARM_UP):
        graphs.prepare(*torch.ones(3, 2, 4, dtype=torch.int64))
    assert "ZeroDivisionError" in graphs.reason and len(sent) == 3
    replication.send_weights(None)
    replication.send_weights(None)
    assert len(sent) == 4
