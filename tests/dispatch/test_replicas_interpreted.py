"""The kernels of exact replication on a CPU: Triton's interpreter, ranks that reach each other's memory through files.

Slow, and without the memory model of a GPU; what it holds is the arithmetic of several ranks, without any GPU.
"""

import importlib.util
import time

import pytest
import torch

from smartmoe.dispatch import symmetric_replicas
from tests.dispatch import cases, test_symmetric_replicas
from tests.dispatch.test_kernels_interpreted import interpret
from tests.dist import spawn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton")


def _interpreted(world_rank, num_ranks, folder):
    interpret(folder)
    test_symmetric_replicas.gpu_of = lambda rank: torch.device("cpu")
    start_return = symmetric_replicas.SymmetricReplication._return

    def late_where_copies_are(self, plan, items):
        time.sleep(0.5 * bool(plan.held_G.max() >= 0))
        start_return(self, plan, items)

    symmetric_replicas.SymmetricReplication._return = late_where_copies_are
    cases.cases = _cases
    assert test_symmetric_replicas._plan(world_rank, num_ranks, (3, 1, 2, 4)) > 10
    exact = test_symmetric_replicas._carry_table(world_rank, num_ranks, torch.float32, ("grouped",))
    return exact, test_symmetric_replicas._carry_histories(world_rank, num_ranks, (torch.float32,))


def _cases(num_ranks):
    return [cases.Case("one hot expert", (24,) * num_ranks, 4 * num_ranks, 2, kind="hot")]


@pytest.mark.parametrize("num_ranks", [2])
def test_layers_with_replicas_give_the_oracles_answer_in_the_interpreter(num_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    tables_W = spawn(_interpreted, num_ranks, num_ranks, str(tmp_path), fresh=True)
    case = _cases(num_ranks)[0]
    answers = [table["one hot expert", "grouped"] for table, _ in tables_W]
    cases.compare(case, answers, "replicas", torch.float32)
    assert max(answers[0]["replicas"]) >= 0 and all(answer["replicas"] == answers[0]["replicas"] for answer in answers)
    monkeypatch.setattr(cases, "cases", _cases)
    test_symmetric_replicas.compare_histories([table for _, table in tables_W], num_ranks, (torch.float32,))
