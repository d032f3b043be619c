"""Time exact replication on the device:  torchrun --nproc-per-node N -m smartmoe.bench.replicas [options]

For each shape and routing: the layer without replication ("static"), with it ("exact"), and with it but for the weights or
the gradients on their way, which shows what these add to the layer; and each part alone. Timed is what bench.layer times,
and the decision where copies go. Needs GPUs that reach each other's memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from smartmoe.bench import routing as routings
from smartmoe.bench.measure import LeftAloneError, Timing, World, attempt, run_in_world, slowest, spread, time_steps
from smartmoe.bench.report import DTYPES, HOW, Report, add_options, at_least, checked, dtype_of, settings_of, timing_of
from smartmoe.bench.shapes import SHAPES, Shape, parse_shape
from smartmoe.config import ModelConfig
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.dispatch.symmetric_replicas import COPY_COST, SymmetricReplication
from smartmoe.gates import Routing
from smartmoe.held_experts import HeldExperts
from smartmoe.layer import Experts
from smartmoe.ops.plan import slots_of
from smartmoe.placement import Placement

LEAD_CYCLES = 400_000  # before parts that are shorter than their launches
CASES = {
    "static": "no replication",
    "exact": "replication from the routing's own counts",
    "exact, weights stay": "as exact, but no weights are sent: what is missing to exact is what sending adds",
    "exact, grads stay": "as exact, but no gradients are returned",
    "plan": "count, exchange counts, decide, find slots",
    "send": "fill the replica slots",
    "return": "add the replicas' gradients to the owners'",
}


class Bench:
    """One shape on this rank, with and without replication on the same weights."""

    def __init__(self, shape: Shape, world: World, dtype: torch.dtype, args: argparse.Namespace):
        reason = "one rank has nothing to replicate" if world.num_ranks == 1 else why_unavailable(world.group)
        if reason:
            raise ValueError(reason)
        self.shape, self.world, self.seed, self.num_replicas = shape, world, args.seed, args.replica_slots
        self.placement = Placement.identity(shape.num_experts, world.num_ranks)
        num_owned, device = self.placement.slots_per_rank, world.device
        model = ModelConfig(
            hidden_size=shape.width, ffn_size=shape.ffn, num_experts=shape.num_experts, top_k=shape.top_k,
            activation=shape.activation, expert_bias=False,
        )  # fmt: skip
        self.replication = _Partly(world.group, self.num_replicas, args.copy_cost)
        # empty slots cost no random numbers on the host; the weights of a benchmark may be any
        self.experts = Experts(
            model, (-1,) * num_owned, impl="grouped", layer_idx=0, seed=args.seed, dtype=dtype, device=device,
            num_replicas=self.num_replicas, allocate=self.replication.allocate,
        )  # fmt: skip
        self.replication.bind(self.experts.storages)
        self.replication.set_placement(self.placement)
        generator = torch.Generator(device).manual_seed(args.seed + world.ep_rank)
        with torch.no_grad():
            for weight in self.experts.parameters():
                weight.normal_(0.0, weight.shape[-2] ** -0.5, generator=generator)
        size = (shape.num_tokens, shape.width)
        self.x_TD = torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_()
        self.grad_TD = torch.randn(size, generator=generator, device=device, dtype=dtype)
        weight_TK = torch.rand(shape.num_tokens, shape.top_k, generator=generator, device=device).softmax(1)
        self.weight_TK = weight_TK.requires_grad_()
        self.token_id_T = torch.arange(shape.num_tokens, device=device) + world.ep_rank * shape.num_tokens
        grads = [torch.zeros_like(storage).tensor_split([num_owned]) for storage in self.experts.storages]
        self.grads = dict(enumerate(grads))
        build = partial(DirectDispatcher, world.group, row_factor=float(world.num_ranks))
        self.plain, self.replicated = build(num_owned), build(num_owned + self.num_replicas)
        self.slot_E = torch.from_numpy(self.placement.primary_slot_E).to(device)[:, None]

    def set_routing(self, spec: routings.RoutingSpec) -> dict:
        """Route as `spec` says from now on; returns the copies on each rank before and after, and the replicas."""
        args = (self.shape.num_tokens, self.shape.num_experts, self.shape.top_k, self.world.ep_rank, self.seed)
        drawn = torch.from_numpy(routings.draw(spec, *args)).to(self.world.device)
        self.routing = Routing(drawn, self.weight_TK, torch.zeros((), device=self.world.device))
        self.plan = self.replication.plan(drawn, self.token_id_T)
        num_owned, num_ranks = self.placement.slots_per_rank, self.world.num_ranks
        return {
            "before_W": torch.bincount(drawn.flatten() // num_owned, minlength=num_ranks).tolist(),
            "after_W": torch.bincount(
                self.plan.slot_TK.flatten() // (num_owned + self.num_replicas), minlength=num_ranks
            ).tolist(),
            "replicas": self.plan.replica_N.tolist(),
        }

    def measure(self, case: str, graph: bool, timing: Timing) -> dict:
        """This rank's times of one of CASES. Collective."""
        self.replication.stay = case.removeprefix("exact, ").removesuffix(" stay") if "stay" in case else ""
        step, lead = self._step_of(case)
        if not graph:
            return {"times": time_steps(self.world, step, timing, self._drop_gradients, lead)[0].tolist()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(lambda: None)
                self._drop_gradients()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            step(lambda: None)
        times, _ = time_steps(self.world, lambda mark: captured.replay(), timing, lead_cycles=lead)
        self._drop_gradients()
        return {"times": times.tolist()}

    def _step_of(self, case: str):
        """(what time_steps calls, cycles of lead)."""
        if case == "plan":
            return lambda mark: self.replication.plan(self.routing.expert_idx_TK, self.token_id_T), LEAD_CYCLES
        if case == "send":
            return lambda mark: self._send(), LEAD_CYCLES
        if case == "return":
            return lambda mark: self._return(), LEAD_CYCLES
        forward = self._static if case == "static" else self._exact
        return partial(self._layer_step, forward), 0

    def _layer_step(self, forward, mark) -> None:
        y = forward()
        mark()
        y.backward(self.grad_TD)

    def _static(self):
        slot_TK = slots_of(self.routing.expert_idx_TK, self.slot_E)
        return self.plain(self.x_TD, self.routing, slot_TK, self.experts)

    def _exact(self):
        plan = self.replication.plan(self.routing.expert_idx_TK, self.token_id_T)
        experts = HeldExperts(self.experts, self.replication, plan)
        return experts.finish(self.replicated(self.x_TD, self.routing, plan.slot_TK, experts))

    def _send(self):
        self.replication.send_weights(self.plan)
        self.replication.wait_weights()

    def _return(self):
        self.replication.return_grads(self.plan, self.grads)
        self.replication.wait_grads()

    def _drop_gradients(self) -> None:
        for tensor in (self.x_TD, self.weight_TK, *self.experts.parameters()):
            tensor.grad = None


class _Partly(SymmetricReplication):
    """Replication that leaves out what `stay` names: the results are wrong, the times tell what the rest costs."""

    stay = ""

    def send_weights(self, plan) -> None:
        if self.stay != "weights":
            super().send_weights(plan)

    def return_grads(self, plan, grads) -> None:
        if self.stay != "grads":
            super().return_grads(plan, grads)


def make_row(facts_W: list[dict], results_W: list[dict]) -> dict:
    """The numbers of one row from all ranks."""
    before, after = (np.sum([facts[key] for facts in facts_W], axis=0) for key in ("before_W", "after_W"))
    return {
        "total_ms": spread(slowest([result["times"] for result in results_W])[:, -1]),
        "max_over_mean_static": round(float(before.max() / before.mean()), 4),
        "max_over_mean_exact": round(float(after.max() / after.mean()), 4),
        "replicas": facts_W[0]["replicas"],
    }


def format_row(row: dict) -> str:
    start = f"{row['shape']:16.16s} {row['routing']:12.12s} {row['case']:20.20s} {'graph' if row['graph'] else 'calls'}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    total = row["total_ms"]
    text = f"{start} {total['median']:8.4f} ({total['p10']:.4f} - {total['p90']:.4f})  max/mean "
    return text + f"{row['max_over_mean_static']:.3f} -> {row['max_over_mean_exact']:.3f}  {row['replicas']}"


def run(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has. Collective."""
    timing, dtype = timing_of(args), DTYPES[dtype_of(args)]
    settings = settings_of(args, replica_slots=args.replica_slots, copy_cost=args.copy_cost)
    report = Report("replicas", world, args.json, settings, ("shape", "routing", "case", "graph"))
    report.say(f"{world.num_ranks} x {report.data['provenance']['device']}, {dtype_of(args)}. {HOW}")
    try:
        for shape in args.shapes:
            made: list[Bench] = []
            built = attempt(world, lambda shape=shape, made=made: made.append(Bench(shape, world, dtype, args)))
            for spec in args.routing:
                bench = made[0] if made else None
                routed = attempt(world, partial(bench.set_routing, spec)) if bench else built
                for case in args.cases:
                    for graph in args.graph:
                        row = {"shape": shape.name, "routing": spec.label, "case": case, "graph": graph == "yes"}
                        _measure_row(report, world, bench, routed, row, asdict(shape), timing)
    except LeftAloneError as error:
        report.give_up(error)
    return report.data


def _measure_row(report, world, bench, routed, row, sizes, timing) -> None:
    if report.has(row):
        return
    report.begin(row)
    status, reason, results = routed
    if status == "ok":
        status, reason, results = attempt(world, lambda: bench.measure(row["case"], row["graph"], timing))
    row |= {"sizes": sizes, "status": status, "reason": reason}
    if status == "ok":
        row |= make_row(routed[2], results)
    report.end(row, format_row(row))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {name:20s} {text}" for name, text in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.replicas", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=f"cases:\n{about}",
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", type=checked(parse_shape), metavar="SHAPE", default=[SHAPES["S1"]],
                        help="as in bench.layer; default: S1")  # fmt: skip
    parser.add_argument("--routing", nargs="+", type=checked(routings.parse), metavar="ROUTING",
                        default=[routings.parse("balanced"), routings.parse("zipf=1.2")],
                        help="as in bench.layer; default: balanced zipf=1.2")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=[*CASES], help="default: all")
    parser.add_argument("--graph", nargs="+", choices=("no", "yes"), default=["no"], help="replayed from a CUDA graph")
    parser.add_argument("--replica-slots", type=at_least(1), default=2, metavar="G", help="on each rank; default 2")
    parser.add_argument("--copy-cost", type=at_least(0), default=COPY_COST, metavar="N",
                        help=f"token copies that an expert must take along to be sent; default {COPY_COST}")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
