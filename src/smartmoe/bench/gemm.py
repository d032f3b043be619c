"""Time the products of the experts of one rank:  python -m smartmoe.bench.gemm [options]

The six grouped products of a layer's forward and backward on rows sorted by expert, the two that an activation goes with,
and the two that a trainer adds to float32 sums, each in two ways by turns in one process: "torch" is
torch.nn.functional.grouped_mm (and a kernel for the activation or the sum), "own" the products of the extension, with that
in the same pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from smartmoe.bench import routing as routings
from smartmoe.bench.measure import LeftAloneError, Timing, World, between, now, run_in_world, spread
from smartmoe.bench.report import DTYPES, Report, add_options, at_least, checked, dtype_of, settings_of, timing_of
from smartmoe.bench.shapes import SHAPES, Shape, parse_shape
from smartmoe.ops.activation import activate_rows, activate_rows_backward, widening
from smartmoe.ops.adamw import accumulate_
from smartmoe.ops.extension import products_for

CEILINGS = {"cuda": (700.0, 4.18), "cpu": (0.0, 0.0)}  # TFLOP/s of products, TB/s of memory
PRODUCTS = {
    "first": "rows times the first matrix",
    "second": "activations times the second matrix",
    "back_second": "gradients of the second product's rows",
    "back_first": "gradients of the first product's rows",
    "weight_second": "gradient of the second matrix",
    "weight_first": "gradient of the first matrix",
    "weight_second+sum": "weight_second, added to the float32 sum over micro-batches",
    "weight_first+sum": "weight_first, added to the float32 sum over micro-batches",
    "first+act": "first, and the activation",
    "back_second+act": "back_second, the gradient of the activation's argument, and the activation once more",
}
WAYS = ("torch", "own")


class Bench:
    """One shape on the fullest of `num_ranks` ranks under one routing: rows, gradients and weights on the device."""

    def __init__(self, shape: Shape, spec: routings.RoutingSpec, num_ranks: int, device, dtype: torch.dtype, seed: int):
        num_ranks = 1 if shape.one_gpu else num_ranks
        count_L = _fullest_rank(shape, spec, num_ranks, seed)
        self.shape, self.num_rows = shape, int(count_L.sum())
        num_slots, width, ffn = len(count_L), shape.width, shape.ffn
        wide = ffn * widening(shape.activation)
        self.end_L = torch.from_numpy(count_L).cumsum(0).to(device=device, dtype=torch.int32)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size, scale=1.0):
            return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale)

        self.rows_RD, self.grad_RD = draw(self.num_rows, width), draw(self.num_rows, width)
        self.hidden_RW, self.act_RF = draw(self.num_rows, wide), draw(self.num_rows, ffn)
        self.w1_LDW = draw(num_slots, width, wide, scale=width**-0.5)
        self.w2_LFD = draw(num_slots, ffn, width, scale=ffn**-0.5)
        skew = round(float(count_L.max() / count_L.mean()), 3)
        self.facts = {"num_rows": self.num_rows, "num_slots": num_slots, "slot_max_over_mean": skew}

    def call(self, product: str, way: str):
        """f() -> the product's results; None where the way does not exist: own products need their GPU and type."""
        own = products_for(self.rows_RD, self.w1_LDW)
        if way == "own" and own is None:
            return None
        end, activation = self.end_L, self.shape.activation
        name, _, more = product.partition("+")
        rows, weight, transposed = {
            "first": (self.rows_RD, self.w1_LDW, False), "second": (self.act_RF, self.w2_LFD, False),
            "back_second": (self.grad_RD, self.w2_LFD, True), "back_first": (self.hidden_RW, self.w1_LDW, True),
            "weight_second": (self.act_RF, self.grad_RD, None), "weight_first": (self.rows_RD, self.hidden_RW, None),
        }[name]  # fmt: skip
        if transposed is None:
            multiply = partial(F.grouped_mm, rows.t(), weight, offs=end)
            if more == "sum":
                total = torch.zeros(len(end), rows.shape[1], weight.shape[1], device=end.device)
                if way == "own":
                    return lambda: (own.multiply_slots(rows, weight, end, total, False, None), total)[1]
                return lambda: (accumulate_(total, multiply(), False), total)[1]
            return partial(own.multiply_slots, rows, weight, end, None, False, None) if way == "own" else multiply
        turned = weight.transpose(1, 2) if transposed else weight
        multiply = partial(own.multiply_rows, rows, weight, None, end, transposed) if way == "own" else None
        multiply = multiply or partial(F.grouped_mm, rows, turned, offs=end)
        if not more:
            return multiply
        if name == "first":
            if way == "own":
                return partial(own.multiply_activate, rows, weight, None, end, activation)
            return lambda: _with(multiply(), lambda hidden: activate_rows(hidden, None, end, activation))
        if way == "own":
            return lambda: own.multiply_slope(rows, weight, None, end, self.hidden_RW, activation, False, None, False)[:2]
        return lambda: activate_rows_backward(self.hidden_RW, None, multiply(), end, activation)[:2]

    def floor_ms(self, product: str, ceiling_tflops: float, ceiling_tbytes: float) -> float | None:
        """The larger of the time of the operations and that of reading every factor and writing every result once."""
        if not ceiling_tflops:
            return None
        shape, copies = self.shape, self.num_rows
        factor = widening(shape.activation)
        ffn, width, slots = shape.ffn, shape.width, self.facts["num_slots"]
        name, _, more = product.partition("+")
        wide = ffn * (factor if "first" in name else 1)
        num = copies * (width + wide) + slots * width * wide
        if more == "act":
            num += copies * (ffn if name == "first" else 2 * factor * ffn)
        num_bytes = num * self.rows_RD.element_size()
        if more == "sum":  # read and written in float32 instead
            num_bytes += slots * width * wide * (2 * 4 - self.rows_RD.element_size())
        return max(2.0 * copies * width * wide / ceiling_tflops / 1e9, num_bytes / ceiling_tbytes / 1e9)


def _fullest_rank(shape, spec, num_ranks, seed) -> np.ndarray:
    """[L] int64: the copies that each expert of the rank with most copies gets from all ranks."""
    if shape.num_experts % num_ranks:
        raise ValueError(f"{shape.num_experts} experts cannot be spread evenly over {num_ranks} ranks")
    args = (shape.num_tokens, shape.num_experts, shape.top_k)
    drawn = [routings.draw(spec, *args, ep_rank, seed) for ep_rank in range(num_ranks)]
    count_WL = np.bincount(np.concatenate(drawn).ravel(), minlength=shape.num_experts).reshape(num_ranks, -1)
    return count_WL[count_WL.sum(1).argmax()]


def _with(first, second):
    return first, second(first)


def by_turns(calls: dict, world: World, timing: Timing) -> dict:
    """Milliseconds of each call, called by turns: {name: [iterations]}. On a GPU between device events, and nothing
    waits for the host between two calls."""
    times = {name: [] for name in calls}
    start_s = time.perf_counter()
    for turn in range(timing.warmup + timing.iterations):
        if turn == 1:
            world.synchronize()
            start_s = time.perf_counter()
        if turn == 2:
            world.synchronize()
            took_s = time.perf_counter() - start_s
        if turn > timing.warmup + 5 and (turn - timing.warmup) * took_s > timing.seconds:
            break
        for name, call in calls.items():
            marks = [now(world)]
            call()
            marks.append(now(world))
            if turn >= timing.warmup:
                times[name].append(marks)
    world.synchronize()
    return {name: [between(*marks) for marks in pairs] for name, pairs in times.items()}


def _distance(got, want) -> float:
    """Largest relative distance (2-norm) of results of equal place."""
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs)


def measure(bench: Bench, product: str, world: World, timing: Timing, ceilings: tuple) -> dict:
    """The numbers of one row: times in ms of each way that exists, TFLOP/s, floor, and how far the results lie apart."""
    calls = {way: call for way in WAYS if (call := bench.call(product, way)) is not None}
    row = {"own_reason": "" if "own" in calls else "the extension has no products for this GPU and type (see setup.py)"}
    row["difference"] = _distance(calls["own"](), calls["torch"]()) if "own" in calls else None
    wide = bench.shape.ffn * (widening(bench.shape.activation) if "first" in product else 1)
    flops = 2.0 * bench.num_rows * bench.shape.width * wide
    times = by_turns(calls, world, timing)
    for way in WAYS:
        row[f"{way}_ms"] = spread(times[way]) if way in times else None
        row[f"{way}_tflops"] = round(flops / row[f"{way}_ms"]["median"] / 1e9, 3) if way in times else None
    row["own_over_torch"] = round(row["own_ms"]["median"] / row["torch_ms"]["median"], 4) if "own" in times else None
    return row | {"floor_ms": bench.floor_ms(product, *ceilings), **bench.facts}


COLUMNS = (
    "shape          routing     product              torch ms (p10 - p90)  TFLOP/s     own ms (p10 - p90)  TFLOP/s  "
    "own/torch   floor  diff"
)


def format_row(row: dict) -> str:
    start = f"{row['shape']:14.14s} {row['routing']:11.11s} {row['product']:17.17s}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    text = start
    for way in WAYS:
        ms = row[f"{way}_ms"]
        if ms is None:
            text += f" {'-':>8s} {'-':>25s}"
        else:
            text += f" {ms['median']:8.4f} ({ms['p10']:.4f} - {ms['p90']:.4f}) {row[f'{way}_tflops']:7.0f}"
    ratio, floor, diff = row["own_over_torch"], row["floor_ms"], row["difference"]
    text += "         -" if ratio is None else f" {ratio:9.3f}"
    text += "        -" if floor is None else f" {floor:8.4f}"
    return text + ("     -" if diff is None else f" {diff:.0e}")


def run(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has."""
    timing, dtype = timing_of(args), DTYPES[dtype_of(args)]
    ceilings = CEILINGS[args.device]
    settings = settings_of(args, num_ranks=args.ranks, ceilings=ceilings)
    report = Report("gemm", world, args.json, settings, ("shape", "routing", "product"))
    report.say(f"{report.data['provenance']['device']}, {dtype_of(args)}, experts of the fullest of {args.ranks} ranks.")
    report.say(f"Floor: operations at {ceilings[0]:g} TFLOP/s, or every byte once at {ceilings[1]:g} TB/s.\n{COLUMNS}")
    try:
        for shape in args.shapes:
            for spec in args.routing:
                made: list[Bench] = []
                for product in args.products:
                    row = {"shape": shape.name, "routing": spec.label, "product": product, "sizes": asdict(shape)}

                    def case(shape=shape, spec=spec, product=product, made=made):
                        if not made:
                            made.append(Bench(shape, spec, args.ranks, world.device, dtype, args.seed))
                        return measure(made[0], product, world, timing, ceilings)

                    report.measure(row, case, lambda results: results[0], format_row)
    except LeftAloneError as error:
        report.give_up(error)
    return report.data


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {name:16s} {text}" for name, text in PRODUCTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.gemm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=f"products:\n{about}",
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", type=checked(parse_shape), metavar="SHAPE",
                        default=[SHAPES[name] for name in ("S1", "S2", "S3")],
                        help="as in bench.layer; default: S1 S2 S3")  # fmt: skip
    parser.add_argument("--routing", nargs="+", type=checked(routings.parse), metavar="ROUTING",
                        default=[routings.parse("balanced")], help="as in bench.layer; default: balanced")  # fmt: skip
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, metavar="NAME", default=[*PRODUCTS], help="default: all")
    parser.add_argument("--ranks", type=at_least(1), default=2, metavar="W",
                        help="ranks that the experts are spread over; measured is the fullest; default 2")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
