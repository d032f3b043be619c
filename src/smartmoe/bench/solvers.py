"""Time the placement solvers, and judge them on a trace:  python -m smartmoe.bench.solvers [--trace FILE] [options]

Times are wall-clock ms of one call on this CPU, counts drawn from a Zipf distribution, caches warm. With --trace, every
recorded iteration but the first is balanced with a plan made from the record before it: by its counts alone ("newest"),
by the history that `policy.blend` keeps ("history"), and with owners moved as well ("joint"). The measure is the load of
the fullest rank over the mean rank, its mean over layers and iterations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smartmoe import policy, record, solvers
from smartmoe.bench.measure import spread
from smartmoe.placement import Placement
from smartmoe.trace import ExpertTrace

MODES = ("newest", "history", "joint")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.solvers", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, help="an .npz trace; without it only times are taken")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], help="ranks that the trace is regrouped to")
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 1, 2, 4], help="replica slots per rank")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["newest", "history"],
                        help="copies by the newest loads, by the history, or by it with owners moved too")  # fmt: skip
    parser.add_argument("--every", type=int, default=1, help="judge every n-th recorded iteration only")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each solver")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and where they come from to FILE")
    args = parser.parse_args(argv)
    try:
        if min(args.repeats, args.every, *args.ranks) < 1 or min(args.slots) < 0:
            raise ValueError("--repeats, --every and --ranks must be at least 1, --slots at least 0")
        data = {"schema": 1, "kind": "solvers", "provenance": record.provenance(device=record.cpu_name())}
        data["times"] = take_times(args.repeats)
        if args.trace:
            trace = ExpertTrace.load(args.trace)
            data["trace"] = {"file": args.trace.name, "num_records": len(trace.iteration)}
            data["balance"] = judge(trace, args.ranks, args.slots, args.modes, args.every)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            record.write_json(args.json, data)
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------------------------------- times


def cases() -> list[tuple[str, int, int, int, Callable[[np.ndarray, list[Placement]], object]]]:
    """(solver, layers, experts, ranks, call on counts [Y, W, E] and placements), two replica slots per rank."""

    def replicas(local: bool):
        return lambda count_YSE, placements: solvers.solve_replicas_layers(count_YSE, placements, 2, local=local)

    def step(count_YSE, placements):
        return solvers.solve_exact_step(count_YSE[0], placements[0], 2)

    def least_move(count_YSE, placements):
        return solvers.solve_least_move(count_YSE[0].sum(axis=0), placements[0])

    def joint(count_YSE, placements):
        return solvers.solve_joint(count_YSE[0], placements[0], 2)

    return [
        ("replicas, all sources alike", 1, 32, 64, replicas(False)),
        ("replicas, all sources alike", 61, 256, 64, replicas(False)),
        ("replicas, near hosts first", 1, 32, 8, replicas(True)),
        ("replicas, near hosts first", 1, 32, 64, replicas(True)),
        ("exact step", 1, 32, 2, step),
        ("exact step", 1, 32, 8, step),
        ("exact step", 1, 128, 8, step),
        ("exact step", 1, 32, 64, step),
        ("least move", 1, 32, 8, least_move),
        ("least move", 1, 256, 64, least_move),
        ("joint", 1, 32, 8, joint),
    ]


def take_times(repeats: int) -> list[dict]:
    """One row per case: ms as median, p10 and p90 of `repeats` calls; two calls before them are not counted."""
    print(f"{'solver':<30}{'layers':>7}{'experts':>8}{'ranks':>6}   median ms (p10, p90)")
    rows = []
    for name, num_layers, num_experts, num_ranks, call in cases():
        rng = np.random.default_rng(1)
        weight_E = 1 / np.arange(1, num_experts + 1)
        weight_YE = rng.permuted(np.tile(weight_E / weight_E.sum(), (num_layers, 1)), axis=1)
        count_YSE = rng.multinomial(16384, weight_YE[:, None], (num_layers, num_ranks))
        placements = [Placement.identity(num_experts, num_ranks)] * num_layers
        ms = []
        for repeat in range(repeats + 2):
            start = time.perf_counter()
            call(count_YSE, placements)
            if repeat >= 2:
                ms.append((time.perf_counter() - start) * 1e3)
        times = spread(ms)
        row = {
            "solver": name,
            "num_layers": num_layers,
            "num_experts": num_experts,
            "num_ranks": num_ranks,
            "ms": times,
        }
        rows.append(row)
        text = f"{times['median']:10.3f} ({times['p10']:.3f}, {times['p90']:.3f})"
        print(f"{name:<30}{num_layers:>7}{num_experts:>8}{num_ranks:>6}{text}", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------- balance


def regroup(trace: ExpertTrace, num_ranks: int) -> np.ndarray:
    """[I, L, W, E] int64 counts with the sources of the trace joined to `num_ranks`, micro-batches added up."""
    count_IRLE = trace.counts.sum(axis=3, dtype=np.int64)
    num_iterations, num_sources, num_layers, num_experts = count_IRLE.shape
    if num_sources % num_ranks:
        raise ValueError(f"{num_sources} ranks of the trace do not divide over {num_ranks}")
    shape = (num_iterations, num_ranks, num_sources // num_ranks, num_layers, num_experts)
    return count_IRLE.reshape(shape).sum(axis=2).swapaxes(1, 2)


def judge(trace: ExpertTrace, ranks: list[int], slots: list[int], modes: list[str], every: int) -> list[dict]:
    """One row per number of ranks, of slots, and mode: max/mean rank load with a plan one record old."""
    print(
        f"\n{'ranks':>5}{'slots':>6} {'plan':<8}   mean of max/mean: all (iterations 1-500, later), p90; copies; experts moved"
    )
    rows = []
    for num_ranks in ranks:
        count_ILSE = regroup(trace, num_ranks)
        for num_slots in slots:
            for mode in modes:
                row = {"num_ranks": num_ranks, "num_slots": num_slots, "plan": mode}
                row |= follow(count_ILSE, trace.iteration, num_ranks, num_slots, mode, every)
                rows.append(row)
                parts = (
                    " - " if row["early"] is None or row["late"] is None else f"{row['early']:.3f}, {row['late']:.3f}"
                )
                text = f"{row['mean']:.4f} ({parts}), {row['p90']:.4f}; {row['copies']:.1f}; {row['moves']:.2f}"
                print(f"{num_ranks:>5}{num_slots:>6} {mode:<8}   {text}", flush=True)
    return rows


def follow(
    count_ILSE: np.ndarray, iteration_I: np.ndarray, num_ranks: int, num_slots: int, mode: str, every: int
) -> dict:
    """Plan from each record for the next one, from identity placements on."""
    num_iterations, num_layers, _, num_experts = count_ILSE.shape
    placements = [Placement.identity(num_experts, num_ranks)] * num_layers
    history, balance, at, copies, moves = None, [], [], [], []
    for row in range(num_iterations - 1):
        gap = int(iteration_I[row] - iteration_I[row - 1]) if row else 1
        history = policy.blend(history, count_ILSE[row], int(iteration_I[row]), gap)
        if row % every:
            continue
        seen_LSE = count_ILSE[row] if mode == "newest" else history
        old = [placement.rank_of_expert() for placement in placements]
        if mode == "joint":
            pairs = [solvers.solve_joint(seen, has, num_slots) for seen, has in zip(seen_LSE, placements, strict=True)]
            placements, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        else:
            found = solvers.solve_replicas_layers(seen_LSE, placements, num_slots)
        moves.append(np.mean([(a != p.rank_of_expert()).sum() for a, p in zip(old, placements, strict=True)]))
        load_LW = np.stack([each.host_load(count) for each, count in zip(found, count_ILSE[row + 1], strict=True)])
        balance.append(load_LW.max(axis=1) / np.maximum(load_LW.mean(axis=1), 1e-9))
        at.append(int(iteration_I[row + 1]))
        copies.append(np.mean([each.num_copies for each in found]))
    balance_IL, early = np.array(balance), np.array(at) <= 500
    return {
        "mean": round(float(balance_IL.mean()), 5),
        "early": round(float(balance_IL[early].mean()), 5) if early.any() else None,
        "late": round(float(balance_IL[~early].mean()), 5) if not early.all() else None,
        "p90": round(float(np.quantile(balance_IL, 0.9)), 5),
        "copies": round(float(np.mean(copies)), 2),
        "moves": round(float(np.mean(moves)), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
