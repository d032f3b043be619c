"""Every legal plan, system and migration gives the losses of one process (fp32, real text)."""

import pytest
from dist import spawn
from parity import GATES, compare, legal_plans, make_config, run_curve

from smartmoe.config import ParallelPlan


@pytest.fixture(scope="module")
def references():
    return {name: run_curve(make_config(gate=gate)) for name, gate in GATES.items()}


def _run_plans(world_rank, cases):
    return [run_curve(make_config(plan, gate=GATES[gate])) for plan, gate in cases]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_plan_follows_one_process(references, world_size, gate):
    cases = [(plan, gate) for plan in legal_plans(world_size)]
    curves = spawn(_run_plans, world_size, cases, timeout_s=900)[0]
    reports = [compare(curve, references[gate], plan.describe()) for curve, (plan, _) in zip(curves, cases, strict=True)]
    flips = [report for report in reports if report]
    print("\n".join(flips))
    assert len(flips) <= len(cases) // 4, "near-ties are rare:\n" + "\n".join(flips)


def test_the_comparison_sees_a_wrong_gradient():
    plan = ParallelPlan(recompute=True)
    good = run_curve(make_config(plan))

    def spoil(trainer, iteration):
        if iteration == 2:
            ref = trainer.optimizer.buffers.refs[0]
            ref.local.mul_(1.01)

    with pytest.raises(AssertionError):
        compare(run_curve(make_config(plan), before_iteration=spoil), good, "spoiled")
