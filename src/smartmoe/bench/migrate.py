"""Time the moving of experts with their whole training state:  torchrun --nproc-per-node N -m smartmoe.bench.migrate

An expert's state is what training keeps of it: weights, fp32 masters (of 16-bit weights) and two moments. Ranks 2i and
2i + 1 either exchange experts ("swap"), or the even one gives experts
into empty slots of the odd one and, in the next step, gets them back ("move"). The floor is one bare message of as many
bytes between the same ranks, in the same directions. Two times: of the devices, as in training, where the host plans the
migration while the optimizer's kernels run; and from idle devices to idle devices, planning and launches included.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.distributed as dist

from smartmoe.bench.measure import (
    LeftAloneError,
    Timing,
    World,
    lead_for,
    run_in_world,
    slowest,
    spread,
    time_steps,
)
from smartmoe.bench.report import DTYPES, Report, add_options, checked, dtype_of, settings_of, timing_of
from smartmoe.bench.shapes import Shape, parse_shape
from smartmoe.migrate import STAGING_BYTES, Staging, migrate
from smartmoe.ops.activation import widening
from smartmoe.placement import EMPTY, Placement

KINDS = ("swap", "move")
HOW = (
    "ms and bare ms: device events, launched while the devices idle; from idle: host, planning and launches included; in each "
    "iteration the slowest rank; warm-up left out."
)


def placements(kind: str, num_experts: int, num_ranks: int) -> tuple[Placement, Placement]:
    """(old, new): `num_experts` experts of each rank change, or of each even rank move. Raises ValueError for an odd
    number of ranks."""
    if num_ranks % 2:
        raise ValueError(f"{num_ranks} ranks: experts travel between pairs of ranks, take an even number")
    old, new, first = [], [], 0
    for _ in range(0, num_ranks, 2):
        mine = [*range(first, first + num_experts)]
        if kind == "swap":
            theirs = [*range(first + num_experts, first + 2 * num_experts)]
            old += mine + theirs
            new += theirs + mine
            first += 2 * num_experts
        else:  # one expert of the odd rank stays where it is
            nobody, stays = [EMPTY] * num_experts, first + num_experts
            old += [*mine, EMPTY, *nobody, stays]
            new += [*nobody, EMPTY, *mine, stays]
            first += num_experts + 1
    return Placement(num_ranks, tuple(old)), Placement(num_ranks, tuple(new))


class Bench:
    """The state of one layer's experts on this rank, every element of it the expert's number."""

    def __init__(self, shape: Shape, kind: str, num_experts: int, world: World, dtype: torch.dtype, staging: Staging):
        self.world, self.staging = world, staging
        self.now, self.then = placements(kind, num_experts, world.num_ranks)
        width, ffn = shape.width, shape.ffn
        sizes = [(width, ffn * widening(shape.activation)), (ffn, width)]
        kinds = [dtype] + [torch.float32] * (2 if dtype == torch.float32 else 3)
        slots = self.now.experts_of_rank(world.ep_rank)
        number_N = torch.tensor(slots, device=world.device, dtype=torch.float32)
        self.tensors = [
            number_N.to(kind)[:, None, None].expand(len(slots), *size).contiguous() for size in sizes for kind in kinds
        ]
        self.bytes_of_expert = sum(tensor[0].nbytes for tensor in self.tensors)
        peer = world.ep_rank ^ 1
        num_bytes = num_experts * self.bytes_of_expert
        self._message = torch.zeros(2, num_bytes, dtype=torch.uint8, device=world.device)
        self._peer, self._both_ways = peer, kind == "swap"

    def measure(self, timing: Timing) -> dict:
        """Times in ms of this rank, of the migration and of the bare message. Collective.

        Raises RuntimeError when the experts do not arrive.
        """
        for _ in range(2):
            self._step(None)
            self._check()
        times = self._time(self._step, timing)
        from_idle = self._time_from_idle(timing)
        self._check()
        return {
            "times": times,
            "from_idle": from_idle,
            "bare": self._time(self._bare, timing),
            "num_bytes": self._message.shape[1],
            "staging_bytes": self.staging.num_bytes,
        }

    def _time(self, step, timing: Timing) -> list[list[float]]:
        step(None)
        return time_steps(self.world, step, timing, lead_cycles=lead_for(self.world, step))[0].tolist()

    def _time_from_idle(self, timing: Timing) -> list[list[float]]:
        times = []
        for _ in range(timing.warmup + timing.iterations):
            self.world.align()
            self.world.synchronize()
            start = time.perf_counter()
            self._step(None)
            self.world.synchronize()
            times.append([(time.perf_counter() - start) * 1e3])
        return times[timing.warmup :]

    def _step(self, _mark) -> None:
        migrate([(self.tensors, self.now, self.then)], self.world.group, self.staging)
        self.now, self.then = self.then, self.now

    def _bare(self, _mark) -> None:
        sends, receives = self._both_ways or not self.world.ep_rank % 2, self._both_ways or self.world.ep_rank % 2
        group, ops = self.world.group, []
        if sends:
            ops.append(dist.P2POp(dist.isend, self._message[0], group=group, group_peer=self._peer))
        if receives:
            ops.append(dist.P2POp(dist.irecv, self._message[1], group=group, group_peer=self._peer))
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def _check(self) -> None:
        for tensor in self.tensors:
            for slot, expert in enumerate(self.now.experts_of_rank(self.world.ep_rank)):
                if expert != EMPTY and not (tensor[slot] == expert).all():
                    raise RuntimeError(f"slot {slot} does not hold the state of expert {expert}")


def make_row(results_W: list[dict]) -> dict:
    """Times of the slowest rank; GB/s = bytes that leave a rank that sends, over the time."""
    keys = ("times", "bare", "from_idle")
    took, bare, from_idle = (spread(slowest([result[key] for result in results_W])[:, -1]) for key in keys)
    num_bytes = results_W[0]["num_bytes"]
    return {
        "ms": took,
        "bare_ms": bare,
        "from_idle_ms": from_idle,
        "num_bytes": num_bytes,
        "gbytes_per_s": round(num_bytes / took["median"] / 1e6, 6),
        "bare_gbytes_per_s": round(num_bytes / bare["median"] / 1e6, 6),
        "staging_bytes": max(result["staging_bytes"] for result in results_W),
    }


COLUMNS = "shape           kind  experts       MB    ms (p10 - p90)              GB/s  bare ms   GB/s  from idle  staging MB"


def format_row(row: dict) -> str:
    start = f"{row['shape']:15.15s} {row['kind']:6s} {row['experts']:6d}"
    if row["status"] != "ok":
        return f"{start}  {row['status']}: {row['reason']}"
    ms, bare = row["ms"], row["bare_ms"]
    took = f"{ms['median']:9.3f} ({ms['p10']:.3f} - {ms['p90']:.3f})".ljust(28)
    return (
        f"{start} {row['num_bytes'] / 1e6:9.1f} {took} {row['gbytes_per_s']:6.1f}  {bare['median']:7.3f} "
        f"{row['bare_gbytes_per_s']:6.1f}  {row['from_idle_ms']['median']:9.3f}  {row['staging_bytes'] / 1e6:10.1f}"
    )


def run(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has. Collective."""
    dtype = DTYPES[dtype_of(args)]
    keys = ("shape", "kind", "experts", "staging")
    report = Report("migrate", world, args.json, settings_of(args, how=HOW), keys)
    report.say(f"{world.num_ranks} x {report.data['provenance']['device']}, {dtype_of(args)}. {HOW}\n{COLUMNS}")
    cases = [(s, k, n, b) for s in args.shapes for k in args.kinds for n in args.experts for b in args.staging]
    try:
        for shape, kind, num_experts, staging_mib in cases:
            row = dict(zip(keys, (shape.name, kind, num_experts, staging_mib), strict=True))

            def case(shape=shape, kind=kind, num=num_experts, mib=staging_mib) -> dict:
                if world.group is None:
                    raise ValueError("a migration needs two ranks: start it with torchrun")
                return Bench(shape, kind, num, world, dtype, Staging(mib << 20)).measure(timing_of(args))

            report.measure(row, case, make_row, format_row)
    except LeftAloneError as error:
        report.give_up(error)
    return report.data


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.migrate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example:\n  torchrun --nproc-per-node 2 -m smartmoe.bench.migrate --shapes S1 S2 --experts 1 4\n",
    )
    parser.add_argument("--shapes", nargs="+", type=checked(parse_shape), metavar="SHAPE", default=[parse_shape("S1")],
                        help="a name, or T,D,F,E,K of which D and F count; default: S1")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="default: both")
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 4], help="experts that leave a rank at once")
    parser.add_argument("--staging", nargs="+", type=int, metavar="MIB", default=[STAGING_BYTES >> 20],
                        help="MiB beside the tensors")  # fmt: skip
    add_options(parser)
    args = parser.parse_args(argv)
    if min(*args.experts, *args.staging) < 1:
        parser.error("--experts and --staging are at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
