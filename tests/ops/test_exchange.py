"""Exchanges of rows: what arrives, the gradients, and that start and wait overlap in backward too."""

import torch
import torch.distributed as dist

from smartmoe.ops import all_to_all
from smartmoe.ops.all_to_all import exchange_counts, exchange_rows, gather_all, start_exchange, wait_exchange
from smartmoe.ops.regroup import order_by_slot, reorder, restore
from tests.dist import spawn

# COUNT[source][target]
COUNT = ((1, 0, 3), (2, 2, 0), (0, 4, 0))


def _exchange(world_rank):
    group = dist.group.WORLD
    send, receive = list(COUNT[world_rank]), [row[world_rank] for row in COUNT]
    rows = (100.0 * world_rank + torch.arange(sum(send))).unsqueeze(1).requires_grad_()
    got = exchange_rows(rows, send, receive, group)
    (got * (world_rank + 1)).sum().backward()
    counts = exchange_counts(torch.tensor([[n] for n in send]), group)
    return got.detach(), rows.grad, counts, gather_all(torch.tensor([world_rank, 7]), group)


def test_rows_arrive_by_source_and_gradients_go_back():
    for target, (got, grad, counts, gathered) in enumerate(spawn(_exchange, 3)):
        want = []
        for source in range(3):
            start = sum(COUNT[source][:target])
            want += [100.0 * source + start + i for i in range(COUNT[source][target])]
        assert got.flatten().tolist() == want
        assert grad.flatten().tolist() == [t + 1.0 for t in range(3) for _ in range(COUNT[target][t])]
        assert counts.flatten().tolist() == [COUNT[source][target] for source in range(3)]
        assert gathered.tolist() == [0, 7, 1, 7, 2, 7]


def _pipeline(world_rank):
    """Two exchanges, each computed on as it arrives; the order of launches and waits in both directions."""
    log = []
    launch, wait = all_to_all.Pending.launch, all_to_all.Pending.wait

    def logged_launch(self, *args):
        log.append("launch")
        return launch(self, *args)

    def logged_wait(self):
        log.append("wait")
        return wait(self)

    all_to_all.Pending.launch, all_to_all.Pending.wait = logged_launch, logged_wait
    x = torch.ones(4, 2, requires_grad=True)
    sends = [start_exchange(part, [1, 1], [1, 1], dist.group.WORLD) for part in x.split(2)]
    returns = [start_exchange(wait_exchange(*send) * 2, [1, 1], [1, 1], dist.group.WORLD) for send in sends]
    y = torch.cat([wait_exchange(*pending) for pending in returns])
    forward = log.copy()
    log.clear()
    y.sum().backward()
    return forward, log, x.grad


def test_backward_is_the_pipeline_of_forward_in_reverse():
    for forward, backward, grad in spawn(_pipeline, 2):
        assert forward == ["launch", "launch", "wait", "launch", "wait", "launch", "wait", "wait"]
        assert backward == forward
        assert torch.equal(grad, torch.full((4, 2), 2.0))


def test_one_process_exchanges_nothing():
    rows = torch.ones(3, 2)
    assert exchange_rows(rows, [3], [3], None) is rows


def test_received_rows_are_sorted_by_slot_then_source_and_back():
    count_WL = torch.tensor([[2, 0, 1], [0, 3, 1]])
    labels = [(slot, source) for source in range(2) for slot in range(3) for _ in range(int(count_WL[source, slot]))]
    order = order_by_slot(count_WL, len(labels))
    rows = torch.arange(float(len(labels)), requires_grad=True).unsqueeze(1)
    by_slot = reorder(rows, order)
    want = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    assert by_slot.flatten().tolist() == want
    assert torch.equal(restore(by_slot, order), rows)
    single = order_by_slot(torch.tensor([[2, 0, 1]]), 3)
    assert reorder(rows, single) is rows


def test_regrouping_has_the_gradient_of_a_permutation():
    order = order_by_slot(torch.tensor([[2, 0, 1], [0, 3, 1]]), 7)
    rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: reorder(r, order), rows)
    assert torch.autograd.gradcheck(lambda r: restore(r, order), rows)
