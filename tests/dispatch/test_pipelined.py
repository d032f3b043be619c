"""Tutel's exchange: the search of the number of pieces, its agreement over ranks, and what it refuses."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from smartmoe.config import ClusterSpec, LayerConfig, ParallelPlan, RunConfig, check
from smartmoe.dispatch.degree_search import Choice, DegreeSearch, Trial
from smartmoe.dispatch.pipelined import PipelinedDispatcher, ranks_per_node
from smartmoe.ops.expert_ffn import expert_ffn
from tests import oracle
from tests.dispatch import cases
from tests.dist import spawn

FOUR = tuple(Choice(degree) for degree in (1, 2, 4, 8))


def _settle(search, capacity, ms_of):
    """Ask and tell until no trial is asked for; the trials in their order."""
    asked = []
    while (answer := search.choose(capacity))[1]:
        asked.append(answer[0])
        search.tell(capacity, answer[0], ms_of(answer[0]))
    return asked, answer[0]


def test_each_window_of_capacities_gets_its_fastest_choice():
    search = DegreeSearch(FOUR, window=128, num_trials=2)
    asked, best = _settle(search, 1000, lambda choice: abs(choice.degree - 4))
    assert sorted(asked, key=FOUR.index) == [choice for choice in FOUR for _ in range(2)] and best == Choice(4)
    assert search.choose(1023) == (Choice(4), False) and search.choose(896) == (Choice(4), False), "one window"
    assert search.choose(1024) == (Choice(4), True), "a new window begins with what is best beside it"
    _, best = _settle(search, 1024, lambda choice: choice.degree)
    assert best == Choice(1) and search.known() == {896: Choice(4), 1024: Choice(1)}


def test_the_faster_trial_of_a_choice_counts():
    search = DegreeSearch(FOUR[:2])
    for choice, ms in ((FOUR[0], 5.0), (FOUR[0], 5.0), (FOUR[1], 90.0), (FOUR[1], 4.0)):
        search.tell(10, choice, ms)
    assert search.choose(10) == (FOUR[1], False)
    assert DegreeSearch(FOUR[1:2]).choose(10) == (FOUR[1], False), "one choice is no trial"


def test_a_trial_takes_the_time_of_both_passes():
    trial = Trial(8, FOUR[0], is_cuda=False)
    x = torch.ones(3, requires_grad=True)
    y = trial.leave(trial.enter(x) * 2)
    assert not trial.is_done
    y.sum().backward()
    assert trial.is_done and trial.ms() > 0 and torch.equal(x.grad, torch.full((3,), 2.0))


def test_weights_are_tried_only_where_they_are_fewer_bytes_than_rows():
    class Two:
        size = staticmethod(lambda: 2)
        rank = staticmethod(lambda: 0)

    dispatcher = PipelinedDispatcher(Two, 2)
    weights = oracle.slots_of_rank(cases.cases(2)[0].weights(), cases.cases(2)[0].placement(), 0, torch.float32, "cpu")
    experts = cases.StackedExperts(weights, "gelu", "batched")
    travel = Choice(1, weights_travel=True)
    assert travel in dispatcher.search.choices
    # [2, D, F] and [2, F, D], gathered and summed, against 4 * 2 * capacity * D; F = 24: even at 24 rows, a window begins at 0
    assert dispatcher._out_of_question(127, experts) == (travel,) and dispatcher._out_of_question(128, experts) == ()
    assert dispatcher._out_of_question(128, lambda rows, count: rows) == (travel,), "experts with copies"
    assert travel not in PipelinedDispatcher(Two, 2, degree=4).search.choices


def test_nodes_are_used_where_they_are_alike():
    assert ranks_per_node((0, 0, 1, 1)) == 2 and ranks_per_node((4, 4, 4)) == 3 and ranks_per_node((0, 1, 2)) == 1
    assert ranks_per_node((0, 0, 1)) == 3 and ranks_per_node((0, 1, 0, 1)) == 4 and ranks_per_node((0, 1, 1, 2)) == 4


def _train(world_rank: int, num_ranks: int, device_type: str):
    """Passes at two capacities until all is settled: what each rank knows, and the last answers."""
    case = next(case for case in cases.cases(num_ranks) if case.name == "even")
    nodes = tuple(rank // 2 for rank in range(num_ranks))
    device = torch.device(device_type, world_rank) if device_type == "cuda" else torch.device("cpu")
    dispatcher = PipelinedDispatcher(dist.group.WORLD, case.placement().slots_per_rank, 0, nodes)
    dispatcher.search.num_trials = 1
    for max_copies in (8, 200):
        for _ in range(dispatcher.num_trial_passes + 1):
            answer = cases.carry(case, dispatcher, "batched", world_rank, torch.float32, device, max_copies)
    travel = Choice(1, weights_travel=True)  # fewer bytes than the rows at 200 only
    seen = [dispatcher.search.choose(8, (travel,)), dispatcher.search.choose(200)]
    return dispatcher.search.known(), seen, len(dispatcher.search.choices), answer


def _check_agreement(results, want_choices: int):
    known, seen, num_choices, _ = results[0]
    assert num_choices == want_choices and set(known) == {0, 128} and not any(is_trial for _, is_trial in seen)
    assert all(each[:2] == (known, seen) for each in results)
    case = next(case for case in cases.cases(len(results)) if case.name == "even")
    cases.compare(case, [each[3] for each in results], "searched", torch.float32)


def test_ranks_agree_on_what_they_tried():
    _check_agreement(spawn(_train, 4, 4, "cpu"), 9)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks,num_choices", [(2, 5), (4, 9)])
def test_ranks_agree_by_events_of_the_device(num_ranks, num_choices):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    _check_agreement(spawn(_train, num_ranks, num_ranks, "cuda", backend="nccl"), num_choices)


def _two_steps(world_rank: int, num_ranks: int):
    case = next(case for case in cases.cases(num_ranks) if case.name == "one choice, swiglu")
    dispatcher = cases.in_two_steps(dist.group.WORLD, case.placement().slots_per_rank, 2)
    return cases.carry(case, dispatcher, "batched", world_rank, torch.float32, torch.device("cpu"))


def test_two_steps_over_two_nodes_of_three():
    case = next(case for case in cases.cases(6) if case.name == "one choice, swiglu")
    cases.compare(case, spawn(_two_steps, 6, 6), "two steps", torch.float32)


def _recompute(world_rank: int, num_ranks: int):
    """Passes whose experts are computed again: the capacity stays, so that trials go on from pass to pass."""
    case = next(case for case in cases.cases(num_ranks) if case.name == "even")
    dispatcher = PipelinedDispatcher(dist.group.WORLD, case.placement().slots_per_rank)

    def behind(*args):
        y_TD = dispatcher(*args)
        return y_TD * torch.ones_like(y_TD)  # kept for the backward pass: what is computed again reaches to here

    again = lambda *args: checkpoint(behind, *args, use_reentrant=False)  # noqa: E731
    for _ in range(dispatcher.num_trial_passes + 1):
        answer = cases.carry(case, again, "batched", world_rank, torch.float32, torch.device("cpu"), 8)
    return dispatcher.search.known(), len(dispatcher._trials), answer


def test_activations_may_be_computed_again_while_choices_are_tried():
    case = next(case for case in cases.cases(2) if case.name == "even")
    results = spawn(_recompute, 2, 2)
    assert all(set(known) == {0} and not num_left for known, num_left, _ in results), "a repetition is no trial"
    cases.compare(case, [answer for *_, answer in results], "recomputed", torch.float32)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="degree = 3 is not 0 .searched. or one of 1, 2, 4, 8"):
        PipelinedDispatcher(None, 2, 3)
    for layer, words in (
        (LayerConfig(dispatcher="pipelined", overlap_degree=3), "overlap_degree = 3 is not one of 0, 1, 2, 4, 8"),
        (LayerConfig(overlap_degree=2), 'is part of layer.dispatcher = "pipelined"'),
        (LayerConfig(dispatcher="pipelined"), "set layer.overlap_degree, plan.recompute = false or plan.pp = 1"),
        (LayerConfig(experts="batched"), "set layer.dispatcher to padded or pipelined"),
    ):
        with pytest.raises(ValueError, match=words):
            check(RunConfig(layer=layer, plan=ParallelPlan(pp=2, recompute=True), cluster=ClusterSpec(ranks_per_node=2)))
    weights = oracle.slots_of_rank(cases.cases(1)[0].weights(), cases.cases(1)[0].placement(), 0, torch.float32, "cpu")
    rows = torch.zeros(5, cases.WIDTH)
    with pytest.raises(ValueError, match="5 rows are not 2 equal blocks"):
        expert_ffn(rows, torch.tensor([3, 2]), *weights, activation="gelu", impl="batched")
