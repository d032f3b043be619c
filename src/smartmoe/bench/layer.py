"""Time one MoE layer, forward and backward:  torchrun --nproc-per-node N -m smartmoe.bench.layer [options]

Timed is what lies between the gate and the sum of the experts' answers: dispatch, experts, combine, and their
backwards with the gradients of inputs, combine weights and expert weights. The gate is replaced by a fixed routing.
Experts are spread in order over all N ranks, T tokens a rank; without torchrun one process computes everything.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, astuple

import numpy as np
import torch

from smartmoe.bench import routing as routings
from smartmoe.bench.measure import (
    LeftAloneError,
    MemoryMeter,
    Timing,
    World,
    attempt,
    capture,
    run_in_world,
    slowest,
    spread,
    time_steps,
)
from smartmoe.bench.peers import PlainTorch
from smartmoe.bench.report import DTYPES, HOW, Report, add_options, checked, dtype_of, settings_of, timing_of
from smartmoe.bench.shapes import PASSES, SHAPES, Shape, parse_shape
from smartmoe.config import EQUAL_BLOCKS, EXPERT_IMPLS, ClusterSpec, LayerConfig, ModelConfig
from smartmoe.dispatch import build_dispatcher
from smartmoe.gates import Routing
from smartmoe.layer import Experts
from smartmoe.ops.plan import count_slots, make_plan

CEILING_TFLOPS = {"cuda": 700.0, "cpu": 0.0}


DISPATCHERS = {
    "torch": "a plain torch layer, as peer (see bench/peers.py)",
    "fastmoe": "the fastmoe preset: basic with --experts loop",
    "basic": "counts first, then all-to-all-v (FastMoE)",
    "overlapped": "exchange and experts in overlapping steps (FasterMoE); no shadowing",
    "padded": "equal buffers as large as the fullest expert needs (GShard, DeepSpeed)",
    "pipelined": "the same in pieces that travel while experts compute; how many is tried out before (Tutel)",
    "tutel": "the tutel preset: pipelined with --experts batched",
    "direct": "stores into the peers' memory inside one NVLink domain",
    "direct+graph": "the same, captured once in a CUDA graph and replayed",
    "direct+compile": "direct through torch.compile as one graph",
}
PRESETS = {"fastmoe": ("basic", "loop"), "tutel": ("pipelined", "batched")}
ALONE = "experts"  # the row of a one_gpu shape that has no dispatch at all


# ---------------------------------------------------------------------------------------------------------------- case


class Bench:
    """One shape on this rank: weights and inputs on the device, made once for all dispatchers and routings."""

    def __init__(self, shape: Shape, world: World, dtype: torch.dtype, seed: int, bias: bool, row_factor: float):
        self.shape, self.seed, self.row_factor, self.dispatcher = shape, seed, row_factor, None
        self.world, self.dtype, device = world, dtype, world.device
        self.group, self.num_ranks = (None, 1) if shape.one_gpu else (world.group, world.num_ranks)
        self.ep_rank = 0 if shape.one_gpu else world.ep_rank
        if shape.num_experts % self.num_ranks:
            raise ValueError(f"{shape.num_experts} experts cannot be spread evenly over {self.num_ranks} ranks")
        self.slots_per_rank = shape.num_experts // self.num_ranks
        model = ModelConfig(
            hidden_size=shape.width, ffn_size=shape.ffn, num_experts=shape.num_experts, top_k=shape.top_k,
            activation=shape.activation, expert_bias=bias,
        )  # fmt: skip
        # empty slots cost no random numbers on the host; the weights of a benchmark may be any
        empty = (-1,) * self.slots_per_rank
        self.experts = Experts(model, empty, impl="grouped", layer_idx=0, seed=seed, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(seed + world.ep_rank)
        with torch.no_grad():
            for weight in self.experts.parameters():
                weight.normal_(0.0, weight.shape[-2] ** -0.5 if weight.dim() == 3 else 0.02, generator=generator)
        size = (shape.num_tokens, shape.width)
        self.x_TD = torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_()
        self.grad_TD = torch.randn(size, generator=generator, device=device, dtype=dtype)
        weight_TK = torch.rand(shape.num_tokens, shape.top_k, generator=generator, device=device).softmax(1)
        self.weight_TK = weight_TK.requires_grad_()

    def set_routing(self, spec: routings.RoutingSpec) -> dict:
        """Route as `spec` says from now on; returns the facts of the routing. Collective."""
        shape = self.shape
        args = (shape.num_tokens, shape.num_experts, shape.top_k)
        drawn = torch.from_numpy(routings.draw(spec, *args, self.world.ep_rank, self.seed)).to(self.world.device)
        self.routing = Routing(drawn, self.weight_TK, torch.zeros((), device=self.world.device))
        self.reference = None
        rank_TK = drawn // self.slots_per_rank
        goes_TW = torch.stack([(rank_TK == rank).any(1) for rank in range(self.num_ranks)], dim=1)
        goes_TW[:, self.ep_rank] = False
        return {
            "copies_W": torch.bincount(rank_TK.flatten(), minlength=self.num_ranks).tolist(),
            "row_bytes": shape.width * self.x_TD.element_size(),
            "off_rank_copies": int((rank_TK != self.ep_rank).sum()),
            "off_rank_rows": int(goes_TW.sum()),
        }

    def measure(self, dispatcher: str, impl: str, timing: Timing) -> dict:
        """Time one dispatcher under the routing that is set: this rank's times, memory and results. Collective."""
        name, _, how = dispatcher.partition("+")
        forward = self._forward_of(name, impl)
        meter = MemoryMeter(self.world)
        difference = self._check(forward)
        for _ in range(getattr(self.dispatcher, "num_trial_passes", 0)):
            self._check(forward)
        if how == "compile":
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
            difference = self._check(forward)
        meter.start_peak()
        if how == "graph":
            parts = self._time_graphs(forward, timing)
        else:
            parts, _ = time_steps(self.world, lambda mark: self._step(forward, mark), timing, self._drop_gradients)
        result = {"times": parts.tolist(), "difference": difference, **meter.read()}
        result |= {"shared_bytes": getattr(self.dispatcher, "shared_bytes", 0), "sends_once": name == "direct"}
        if hasattr(self.dispatcher, "search"):
            known = self.dispatcher.search.known()
            result["degrees"] = {str(capacity): list(astuple(choice)) for capacity, choice in known.items()}
        if self.group is not None and not how:
            result |= self._time_exchange(name, impl, timing)
        return result

    def _forward_of(self, name: str, impl: str):
        """f(experts) -> y."""
        self.experts.impl = impl
        self.dispatcher = None
        if name == ALONE:
            return self._experts_alone()
        if name == "torch":
            dispatcher = PlainTorch(self.group, self.shape.num_experts)
        else:
            config = LayerConfig(dispatcher=name, experts=impl, row_factor=self.row_factor)
            cluster = ClusterSpec(device=self.world.device.type, ranks_per_node=self.world.num_ranks)
            dispatcher = build_dispatcher(config, self.group, slots_per_rank=self.slots_per_rank, cluster=cluster)
            if name == "direct":
                dispatcher.num_careful = 1  # as after the first calls of a run
        self.dispatcher = dispatcher
        return lambda experts: dispatcher(self.x_TD, self.routing, self.routing.expert_idx_TK, experts)

    def _experts_alone(self):
        """Rows sorted by expert beforehand."""
        count_L = count_slots(self.routing.expert_idx_TK, self.shape.num_experts)
        plan = make_plan(self.routing.expert_idx_TK, self.shape.num_experts, self.routing.expert_idx_TK.numel())
        self.rows_RD = self.x_TD.detach()[plan.token_of_row_R].requires_grad_()
        self.grad_rows_RD = self.grad_TD[plan.token_of_row_R]
        return lambda experts: experts(self.rows_RD, count_L)

    def _step(self, forward, mark) -> torch.Tensor:
        y = forward(self.experts)
        mark()
        y.backward(self.grad_TD if y.shape == self.grad_TD.shape else self.grad_rows_RD)
        return y

    def _drop_gradients(self) -> None:
        for tensor in (self.x_TD, self.weight_TK, getattr(self, "rows_RD", None), *self.experts.parameters()):
            if tensor is not None:
                tensor.grad = None

    def _check(self, forward) -> float | None:
        """Largest relative distance (2-norm) of the output and the input's gradient from those of the first
        dispatcher."""
        y = self._step(forward, lambda: None).detach()
        got = (y, self.x_TD.grad)
        self._drop_gradients()
        if hasattr(self.dispatcher, "check"):  # "direct": the routing may need more rows than it has
            self.dispatcher.check()
        if got[1] is None:
            return None
        if self.reference is None:
            self.reference = got
        pairs = zip(got, self.reference, strict=True)
        return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs)

    def _time_graphs(self, forward, timing: Timing) -> np.ndarray:
        """Forward and whole step captured apart and replayed; backward is the difference of times of equal place when
        sorted."""
        if self.world.device.type != "cuda":
            raise ValueError("CUDA graphs need --device cuda")
        times = []
        for body in (lambda: forward(self.experts), lambda: self._step(forward, lambda: None)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    body()
                    self._drop_gradients()
            torch.cuda.current_stream().wait_stream(side)
            graph, _ = capture(body)
            times.append(time_steps(self.world, lambda mark, graph=graph: graph.replay(), timing)[0])
            del graph
            self._drop_gradients()
        num = min(map(len, times))
        forward_I, step_I = (np.sort(part[:, 0])[np.linspace(0, len(part) - 1, num).astype(int)] for part in times)
        return np.stack([forward_I, step_I - forward_I], axis=1)

    def _time_exchange(self, name: str, impl: str, timing: Timing) -> dict:
        """The forward pass with experts that return their rows: dispatch, permutation and combine."""
        search = getattr(self.dispatcher, "search", None)
        forward = self._forward_of(name, impl)
        if search is not None:
            self.dispatcher.search = search
        with torch.no_grad():
            times, _ = time_steps(self.world, lambda mark: forward(_Identity(self.experts)), timing)
        return {"exchange": times.tolist()}


class _Identity:
    """Experts that give back what they get."""

    def __init__(self, experts: Experts):
        self.weights, self.activation, self.impl = experts.weights, experts.activation, experts.impl

    def __call__(self, rows_RD, count_L):
        return rows_RD


# ---------------------------------------------------------------------------------------------------------------- rows


def make_row(shape: Shape, facts_W: list[dict], results_W: list[dict], ceiling_tflops: float) -> dict:
    """The numbers of one row from every rank's facts and results. Times in ms, memory in bytes, per rank."""
    times = slowest([result["times"] for result in results_W])
    copies_W = np.sum([facts["copies_W"] for facts in facts_W], axis=0)
    mean_copies = shape.num_tokens * shape.top_k
    row = dict(zip(("forward_ms", "backward_ms", "total_ms"), map(spread, times.T), strict=True))
    passes = {"forward_ms": 1, "backward_ms": PASSES - 1, "total_ms": PASSES}
    flops = shape.flops(mean_copies)
    row["tflops_per_gpu"] = {
        key.removesuffix("_ms"): round(num * flops / row[key]["median"] / 1e9, 3) for key, num in passes.items()
    }
    skew = 1.0 if shape.one_gpu else float(copies_W.max() / copies_W.mean())
    floor_ms = PASSES * flops / ceiling_tflops / 1e9 if ceiling_tflops else None
    row |= {
        "num_iterations": len(times),
        "rank_max_over_mean": round(skew, 4),
        "floor_ms": floor_ms and float(f"{floor_ms:.6g}"),
        "floor_fullest_rank_ms": floor_ms and float(f"{floor_ms * skew:.6g}"),
        "difference": max((r["difference"] for r in results_W if r["difference"] is not None), default=None),
    }
    if results_W[0].get("degrees"):
        row["degrees"] = results_W[0]["degrees"]  # capacity -> (pieces, in two steps)
    memory = ("peak_bytes", "outside_bytes", "shared_bytes")
    row |= {key: max(result[key] for result in results_W) for key in memory}
    return row | exchange_of(facts_W, results_W, once=all(result["sends_once"] for result in results_W))


def exchange_of(facts_W: list[dict], results_W: list[dict], once: bool) -> dict:
    """Dispatch and combine alone: ms of both together, and the bytes of rows that leave a rank, each way, over that time.

    `once`: the dispatcher sends a token once to each rank that hosts some of its experts, not once for each copy.
    """
    if not all("exchange" in result for result in results_W):
        return {"exchange_ms": None}
    exchange_ms = spread(slowest([result["exchange"] for result in results_W])[:, -1])
    copies, rows = (float(np.mean([f[key] for f in facts_W])) for key in ("off_rank_copies", "off_rank_rows"))
    row_bytes = facts_W[0]["row_bytes"]
    crossing = rows if once else copies
    return {
        "exchange_ms": exchange_ms,
        "off_rank_copy_bytes": copies * row_bytes,
        "off_rank_row_bytes": rows * row_bytes,
        "exchange_gbytes_per_s": round(2 * crossing * row_bytes / exchange_ms["median"] / 1e6, 6),
    }


COLUMNS = (
    "shape          routing     dispatcher        total ms (p10 - p90)      forward backward TFLOP/s  floor x floor "
    "peak MiB +shared  of torch  exch ms   GB/s  diff"
)


def format_row(row: dict) -> str:
    is_plain = row["experts"] == "grouped" or row["dispatcher"] in PRESETS
    name = row["dispatcher"] + ("" if is_plain else f" {row['experts']}")
    start = f"{row['shape']:14.14s} {row['routing']:11.11s} {name:15.15s}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    total, floor = row["total_ms"], row["floor_fullest_rank_ms"]
    text = f"{start} {total['median']:9.3f} ({total['p10']:.3f} - {total['p90']:.3f})".ljust(69)
    text += f"{row['forward_ms']['median']:8.3f} {row['backward_ms']['median']:8.3f} "
    text += f"{row['tflops_per_gpu']['total']:8.3f} " if floor is None else f"{row['tflops_per_gpu']['total']:8.0f} "
    text += "     -       - " if floor is None else f"{floor:6.2f} {total['median'] / floor:7.2f} "
    text += f"{row['peak_bytes'] / 2**20:8.0f} {row['shared_bytes'] / 2**20:7.0f} "
    share = row["memory_over_torch"]
    text += "        - " if share is None else f"{share:9.2f} "
    exchange, diff = row["exchange_ms"], row["difference"]
    text += "       -      - " if exchange is None else f"{exchange['median']:8.3f} {row['exchange_gbytes_per_s']:6.1f} "
    return text + ("    -" if diff is None else f"{diff:.0e}")


# ---------------------------------------------------------------------------------------------------------------- main


def run(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has. Collective."""
    timing, dtype = timing_of(args), DTYPES[dtype_of(args)]
    ceiling = CEILING_TFLOPS[args.device] if args.ceiling_tflops is None else args.ceiling_tflops
    settings = settings_of(args, bias=args.bias, row_factor=args.row_factor, ceiling_tflops=ceiling)
    report = Report("layer", world, args.json, settings, ("shape", "routing", "dispatcher", "experts"))
    report.say(f"{world.num_ranks} x {report.data['provenance']['device']}, {dtype_of(args)}. {HOW}")
    report.say(f"Floor: expert FLOPs of the fullest rank at {ceiling:g} TFLOP/s, no exchange." if ceiling else "No floor.")
    report.say("peak: torch's allocator above weights and inputs; +shared: memory that peers store into, once for all "
               "layers of a size; of torch: both over those of the plain torch layer.")  # fmt: skip
    report.say(f"exch: dispatch + combine, forward, no experts; GB/s: rows off the rank, each way. diff: relative, to "
               f"the first dispatcher.\n{COLUMNS}")  # fmt: skip
    try:
        for shape in args.shapes:
            _run_shape(args, shape, world, dtype, timing, ceiling, report)
    except LeftAloneError as error:
        report.give_up(error)
    return report.data


def _run_shape(args, shape, world, dtype, timing, ceiling, report) -> None:
    made: list[Bench] = []
    built = attempt(world, lambda: made.append(Bench(shape, world, dtype, args.seed, args.bias, args.row_factor)))
    for spec in args.routing:
        bench = made[0] if made else None
        routed = attempt(world, lambda spec=spec, bench=bench: bench.set_routing(spec)) if built[0] == "ok" else built
        for dispatcher, impl in _cases(args, shape):
            row = {"shape": shape.name, "routing": spec.label, "dispatcher": dispatcher, "experts": impl}
            if report.has(row):
                continue
            report.begin(row)
            status, reason, results = routed
            if status == "ok":
                name = PRESETS.get(dispatcher, (dispatcher,))[0]
                measure = lambda name=name, impl=impl, bench=bench: bench.measure(name, impl, timing)  # noqa: E731
                status, reason, results = attempt(world, measure)
            row |= {"sizes": asdict(shape), "status": status, "reason": reason}
            if status == "ok":
                row |= make_row(shape, routed[2], results, ceiling)
                row["memory_over_torch"] = _memory_over_torch(row, report.data["rows"])
            report.end(row, format_row(row))


def _memory_over_torch(row, rows) -> float | None:
    """Peak and shared memory over that of the plain torch layer on the same routing, measured before."""
    for peer in [*rows, row]:
        if peer["dispatcher"] == "torch" and peer["status"] == "ok":
            if (peer["shape"], peer["routing"]) == (row["shape"], row["routing"]) and peer["peak_bytes"]:
                return round((row["peak_bytes"] + row["shared_bytes"]) / peer["peak_bytes"], 4)
    return None


def _cases(args, shape) -> list[tuple[str, str]]:
    """(dispatcher, expert implementation) in the order of the table, none twice."""
    cases = [(ALONE, impl) for impl in args.experts if impl != "batched"] if shape.one_gpu else []
    names = {parts: name for name, parts in PRESETS.items()}
    for dispatcher in args.dispatchers:
        if dispatcher in PRESETS:
            cases.append((dispatcher, PRESETS[dispatcher][1]))
        elif dispatcher.startswith(("torch", "direct")):
            cases.append((dispatcher, "grouped"))
        else:
            impls = [impl for impl in args.experts if impl != "batched" or dispatcher in EQUAL_BLOCKS]
            cases += [(names.get((dispatcher, impl), dispatcher), impl) for impl in impls]
    return list(dict.fromkeys(cases))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {name:14s} {text}" for name, text in DISPATCHERS.items())
    shapes = "\n".join(
        f"  {s.name:14s} T {s.num_tokens} D {s.width} F {s.ffn} E {s.num_experts} K {s.top_k} {s.activation}"
        + (", on one GPU; the row 'experts' has no dispatch at all" if s.one_gpu else "")
        for s in SHAPES.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.layer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=f"shapes (T tokens a rank, D width, F ffn, E experts, K a token):\n{shapes}\n\ndispatchers:\n{about}\n\n"
        "A dispatcher that is not there, or fails, is a row with its reason.\n\n"
        "examples:\n  torchrun --nproc-per-node 2 -m smartmoe.bench.layer --shapes S1 S2 --json out.json\n"
        "  torchrun --nproc-per-node 2 -m smartmoe.bench.layer --device cpu --shapes 256,64,128,8,2 "
        "--routing balanced zipf=1.2\n",
    )
    parser.add_argument("--shapes", nargs="+", type=checked(parse_shape), metavar="SHAPE", default=[*SHAPES.values()],
                        help="names as below, or T,D,F,E,K[,activation]; default: all")  # fmt: skip
    parser.add_argument("--routing", nargs="+", type=checked(routings.parse), metavar="ROUTING",
                        default=[routings.parse("balanced")],
                        help="balanced (default), zipf[=EXPONENT], trace=FILE:ITERATION:LAYER")  # fmt: skip
    parser.add_argument("--dispatchers", nargs="+", choices=DISPATCHERS, metavar="NAME",
                        default=[name for name in DISPATCHERS if not name.endswith("+compile")],
                        help="default: all but direct+compile, in the order below")  # fmt: skip
    parser.add_argument("--experts", nargs="+", choices=EXPERT_IMPLS, default=["grouped"],
                        help="how experts are computed; torch and direct have their own way")  # fmt: skip
    parser.add_argument("--bias", action="store_true", help="experts with biases, as FastMoE's have them")
    parser.add_argument("--row-factor", type=float, metavar="X", default=LayerConfig().row_factor,
                        help="room of direct: layer.row_factor, default %(default)g")  # fmt: skip
    parser.add_argument("--ceiling-tflops", type=float, metavar="X",
                        help="speed that the floor assumes; default 700, an H200's grouped GEMM, on a CPU none")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
