"""Time the exchange of token rows alone:  torchrun --nproc-per-node N -m smartmoe.bench.exchange [options]

Every rank has R rows of D values, each for one expert, one expert a rank. Dispatch carries them to their ranks,
combine brings them back; each is timed on the device from its first kernel to its last, barriers included, right
after an exchange of the same kind that is not timed.
Rows go to all ranks in equal parts ("even": on 2 ranks half of them stay) or all to other ranks ("all").
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
import torch.distributed as dist

from smartmoe.bench.measure import (
    LeftAloneError,
    Timing,
    World,
    capture,
    lead_for,
    run_in_world,
    slowest,
    spread,
    time_steps,
)
from smartmoe.bench.report import DTYPES, HOW, Report, add_options, checked, dtype_of, settings_of, timing_of
from smartmoe.config import ClusterSpec, LayerConfig
from smartmoe.dispatch import build_dispatcher
from smartmoe.gates import Routing

SIZES = ("4096x4096", "16384x1536", "24576x2048", "49152x2048")
MECHANISMS = {
    "collective": "one bare all_to_all_single each way: rows sorted beforehand, sizes known to the host (NCCL, gloo)",
    "basic": "counts, host synchronisation, permutation, all-to-all-v",
    "overlapped": "all-to-all-v in steps; only the round trip can be timed",
    "padded": "equal buffers as large as the fullest needs",
    "direct": "stores into the peers' memory; dispatch also routes, plans and gathers rows into expert order",
    "direct-link": "of direct, what crosses the link: tokens into rows, weighted sums back; the plan is made",
}
IN_A_GRAPH = ("collective", "direct", "direct-link")  # those that never wait for the host


def parse_size(text: str) -> tuple[int, int]:
    """"4096x1536" -> (4096, 1536). Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'size "{text}": expected ROWSxWIDTH, such as 4096x1536')
    return int(parts[0]), int(parts[1])


def destinations(num_rows: int, num_ranks: int, ep_rank: int, share: str, seed: int) -> np.ndarray:
    """[R] int64, the rank that each row goes to, in random order: numbers of rows differ by one at most."""
    ranks = [rank for rank in range(num_ranks) if share == "even" or rank != ep_rank]
    if not ranks:
        raise ValueError("a world of one rank has no other ranks: take --share even")
    return np.random.default_rng([seed, ep_rank]).permutation(np.resize(ranks, num_rows))


class Bench:
    """Rows and destinations of one case on this rank."""

    def __init__(self, size: tuple[int, int], share: str, world: World, dtype: torch.dtype, seed: int):
        self.world, device = world, world.device
        to_R = torch.from_numpy(destinations(size[0], world.num_ranks, world.ep_rank, share, seed))
        generator = torch.Generator(device).manual_seed(seed + world.ep_rank)
        self.x_TD = torch.randn(size, generator=generator, device=device, dtype=dtype)
        self.send_splits = torch.bincount(to_R, minlength=world.num_ranks).tolist()
        self.slot_TK = to_R.to(device).unsqueeze(1)
        self.weight_TK = torch.ones(size[0], 1, device=device)
        self.off_rank_bytes = (size[0] - self.send_splits[world.ep_rank]) * size[1] * self.x_TD.element_size()

    def measure(self, mechanism: str, timing: Timing) -> dict:
        """This rank's times of dispatch and combine, or of the round trip; checks that the rows come back. Collective.

        Raises RuntimeError when they do not.
        """
        name, _, graph = mechanism.partition("+")
        with torch.no_grad():
            there, back = self._collective() if name == "collective" else self._ways(name)
            step = _step(there, back)
            y_TD = step(lambda: None)
            if graph:
                step = self._captured(there, back)
                y_TD = step(lambda: None)
            if not torch.equal(y_TD, self.x_TD):
                raise RuntimeError(f"{int((y_TD != self.x_TD).any(1).sum())} rows did not come back as they left")
            led_in = _after_another(step)
            lead = lead_for(self.world, led_in)
            times, is_late = time_steps(self.world, led_in, timing, lead_cycles=lead)
        times = times[:, 1:]
        facts = {"off_rank_bytes": self.off_rank_bytes, "lead_cycles": lead}
        return {"times": times.tolist(), "is_late": is_late.tolist(), **facts}

    def _captured(self, there, back):
        """Both ways from a CUDA graph each."""
        if self.world.device.type != "cuda":
            raise ValueError("CUDA graphs need --device cuda")
        there_graph, arrived = capture(there)
        back_graph, y_TD = capture(lambda: back(arrived))

        def replay(mark):
            there_graph.replay()
            mark()
            back_graph.replay()
            return y_TD

        return replay

    def _collective(self):
        """Rows sorted by destination before the clock starts."""
        group = self.world.group
        sent = torch.tensor(self.send_splits, device=self.world.device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        send_splits, recv_splits = self.send_splits, received.tolist()
        self.x_TD = self.x_TD[self.slot_TK[:, 0].argsort(stable=True)]
        arrived = self.x_TD.new_empty(sum(recv_splits), self.x_TD.shape[1])
        returned = torch.empty_like(self.x_TD)

        def there():
            dist.all_to_all_single(arrived, self.x_TD, recv_splits, send_splits, group=group)

        def back(_):
            dist.all_to_all_single(returned, arrived, send_splits, recv_splits, group=group)
            return returned

        return there, back

    def _ways(self, name: str):
        """there() -> what back(...) needs to give y_TD; no `there` where the two cannot be told apart."""
        cluster = ClusterSpec(device=self.world.device.type, ranks_per_node=self.world.num_ranks)
        layer = LayerConfig(dispatcher=name.removesuffix("-link"))
        dispatcher = build_dispatcher(layer, self.world.group, slots_per_rank=1, cluster=cluster)
        if layer.dispatcher == "direct":
            dispatcher.num_careful = 1  # as after the first calls of a run
        x_TD, slot_TK, weight_TK = self.x_TD, self.slot_TK, self.weight_TK
        if name == "overlapped":
            routing = Routing(slot_TK, weight_TK, torch.zeros((), device=self.world.device))
            return None, lambda _: dispatcher(x_TD, routing, slot_TK, _same_rows)
        if name in ("basic", "padded"):
            return lambda: dispatcher.dispatch(x_TD, slot_TK), lambda sent: dispatcher.combine(*sent, weight_TK)
        if name == "direct":
            return lambda: dispatcher.dispatch(x_TD, slot_TK, weight_TK), lambda sent: dispatcher.combine(*sent)
        rows_RD, handle = dispatcher.dispatch(x_TD, slot_TK, weight_TK)
        dispatcher.combine(rows_RD, handle)
        bring, sum_back = handle.transport.bring, handle.transport.sum_back
        return (
            lambda: bring(x_TD, slot_TK, handle.plan),
            lambda _: sum_back(rows_RD, handle.plan, slot_TK, handle.told),
        )


def _step(there, back):
    if there is None:
        return lambda mark: back(None)

    def step(mark):
        arrived = there()
        mark()
        return back(arrived)

    return step


def _after_another(step):
    """The step twice, the first time as a part of its own: its waits align the ranks as those of the layer before would,
    closer than a collective does."""

    def both(mark):
        step(lambda: None)
        mark()
        return step(mark)

    return both


def _same_rows(rows_RD, count_L):
    return rows_RD


def make_row(results_W: list[dict]) -> dict:
    """Times in us of the slowest rank; GB/s = bytes that leave a rank, each way, over the time."""
    times_us = 1e3 * slowest([result["times"] for result in results_W])
    names = ("dispatch", "combine", "round_trip") if times_us.shape[1] == 3 else (None, "round_trip")
    row = {f"{name}_us": spread(part) for name, part in zip(names, times_us.T, strict=True) if name}
    num_bytes = float(np.mean([result["off_rank_bytes"] for result in results_W]))
    num_late = int(np.any([result["is_late"] for result in results_W], axis=0).sum())
    row |= {"num_iterations": len(times_us), "num_late": num_late, "off_rank_bytes": num_bytes}
    row["lead_cycles"] = max(result["lead_cycles"] for result in results_W)
    for name in names:
        if name:
            trips = 2 if name == "round_trip" else 1
            row[f"{name}_gbytes_per_s"] = round(trips * num_bytes / row[f"{name}_us"]["median"] / 1e3, 6)
    return row


COLUMNS = (
    "rows x width   share  mechanism         dispatch us (p10 - p90)   GB/s   combine us (p10 - p90)    GB/s   "
    "round trip us (p10 - p90)  GB/s  late"
)


def format_row(row: dict) -> str:
    start = f"{row['size']:14.14s} {row['share']:6s} {row['mechanism']:17s}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    text = start
    for name in ("dispatch", "combine", "round_trip"):
        if f"{name}_us" not in row:
            text += "-".rjust(20) + " " * 13
            continue
        us = row[f"{name}_us"]
        text += f"{us['median']:11.1f} ({us['p10']:.1f} - {us['p90']:.1f})".ljust(27)
        text += f"{row[f'{name}_gbytes_per_s']:6.1f}"
    return text + f"{row['num_late']:6d}"


def run(args: argparse.Namespace, world: World) -> dict:
    """Measure everything that `args` asks for and return what the JSON file has. Collective."""
    dtype = DTYPES[dtype_of(args)]
    settings = settings_of(args, mechanisms=MECHANISMS)
    report = Report("exchange", world, args.json, settings, ("size", "share", "mechanism"))
    report.say(f"{world.num_ranks} x {report.data['provenance']['device']}, {dtype_of(args)}. {HOW}")
    report.say("GB/s: bytes of rows that leave a rank, each way, over the time. late: iterations that began before the "
               f"host had launched all of them, so that launches may be in their times.\n{COLUMNS}")  # fmt: skip
    try:
        for size in args.sizes:
            for share in args.share:
                for mechanism in args.mechanisms:
                    row = {"size": f"{size[0]}x{size[1]}", "share": share, "mechanism": mechanism}

                    def case(size=size, share=share, mechanism=mechanism) -> dict:
                        if world.group is None:
                            raise ValueError("an exchange needs two ranks: start it with torchrun")
                        return Bench(size, share, world, dtype, args.seed).measure(mechanism, timing_of(args))

                    report.measure(row, case, make_row, format_row)
    except LeftAloneError as error:
        report.give_up(error)
    return report.data


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {name:11s} {text}" for name, text in MECHANISMS.items())
    names = [*MECHANISMS, *(f"{name}+graph" for name in IN_A_GRAPH)]
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.bench.exchange",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=f"mechanisms:\n{about}\n\nNAME+graph: both ways captured in CUDA graphs and replayed "
        f"({', '.join(IN_A_GRAPH)}).\nOne that is not there, or fails, is a row with its reason. On a GPU each step is "
        "launched while the GPU idles,\nso that launches cost nothing unless the mechanism waits for the host.\n\n"
        "example:\n  torchrun --nproc-per-node 2 -m smartmoe.bench.exchange --sizes 4096x4096 --share even all\n",
    )
    parser.add_argument("--sizes", nargs="+", type=checked(parse_size), metavar="ROWSxWIDTH",
                        default=[parse_size(size) for size in SIZES], help=f"default: {' '.join(SIZES)}")  # fmt: skip
    parser.add_argument("--share", nargs="+", choices=("even", "all"), default=["even", "all"],
                        help="where rows go: to all ranks evenly, or all to other ranks; default: both")  # fmt: skip
    parser.add_argument("--mechanisms", nargs="+", choices=names, metavar="NAME", default=names,
                        help="default: all")  # fmt: skip
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_in_world(parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
