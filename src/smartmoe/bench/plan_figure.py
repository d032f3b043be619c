"""Runs of a figure from what plan_accuracy measured: FastMoE, the plan that uniform loads choose (Alpa's assumption), and the
planner's.

Alpa's bar differs from the planner's in the plan alone, as in the paper; FastMoE has its own plan and mechanism, and of the
micro-batches that were measured the one that the cost model takes for its fastest.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from smartmoe import record, systems
from smartmoe.config import RunConfig, to_dict
from smartmoe.planner import pool
from smartmoe.planner.cost_model import CostModel


def fastmoe_of(cost: CostModel, micro_batches: list[int]) -> RunConfig:
    """FastMoE's run on the cost model's cluster, with the best of `micro_batches` that it can have.

    Raises ValueError when it can have none of them.
    """
    config, found, problem = cost.config, [], "out of memory"
    for micro_batch in sorted(set(micro_batches)):
        work = dataclasses.replace(config.workload, micro_batch_size=micro_batch)
        try:
            run = systems.build("fastmoe", model=config.model, gate=config.gate, workload=work, cluster=cost.cluster)
        except ValueError as error:
            problem = str(error)
            continue
        own = CostModel(run, cost.cluster, cost.primitives, cost.loads)
        if pool.fits(own, run.plan, micro_batch):
            found.append((own.estimate(run.plan, micro_batch).mean_ms, micro_batch, run))
    if not found:
        raise ValueError(f"--runs: FastMoE can have none of the micro-batches {sorted(set(micro_batches))}: {problem}")
    return min(found, key=lambda item: item[:2])[2]


def write_runs(folder: Path, cost: CostModel, rows: list, fastmoe: tuple, provenance: dict, panel: str) -> None:
    """Run directories of the three bars under `folder`, as logs/README.md describes them; its name is that of the figure.

    rows: of plan_accuracy, predicted; fastmoe: (its row, its config).
    """
    config, capacity = cost.config, cost.config.gate.capacity
    group = f"{cost.cluster.num_ranks}/{'+inf' if capacity is None else format(capacity, 'g')}"
    bars = [(["fastmoe"], *fastmoe)]
    chosen = [(series, min(rows, key=lambda row, value=value: getattr(row, value)))
              for series, value in (("alpa", "blind_ms"), ("smartmoe_static", "predicted_ms"))]  # fmt: skip
    for row in {id(row): row for _, row in chosen}.values():  # both may have chosen one plan
        all_series = [series for series, other in chosen if other is row]
        run = pool.config_of(config, cost.cluster, *pool.parse_name(row.name))
        bars.append((all_series, row, dataclasses.replace(run, system=all_series[-1])))
    for all_series, row, run in bars:
        num_warm = len(row.steps_ms) - row.num_measured
        work = dataclasses.replace(run.workload, iterations=len(row.steps_ms), warmup_iterations=num_warm)
        run_id = record.safe_run_id(run.system, row.name)
        run_dir = folder / run.system / run_id
        places = [{"figure": folder.name, "panel": panel, "group": group, "series": series} for series in all_series]
        facts = {**provenance, "num_ranks": cost.cluster.num_ranks, "entry": "plan_accuracy"}
        run = dataclasses.replace(run, workload=work)
        record.create_run(run_dir, run_id, to_dict(run), places, provenance=facts)
        record.set_status(run_dir, "running")
        writer = record.RunWriter(run_dir)
        for number, (step_ms, loss) in enumerate(zip(row.steps_ms, row.losses, strict=True), 1):
            writer.metric({"iteration": number, "step_ms": step_ms, "lm_loss": loss, "skipped": False})
        writer.close()
        record.set_status(run_dir, "ok")
