"""The report of a benchmark: its options, its rows on the screen, and one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from smartmoe import record
from smartmoe.bench.measure import LeftAloneError, Timing, World, attempt

SCHEMA = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOW = (
    "Times: device events around exactly one step, routing and inputs fixed, in each iteration the slowest rank; "
    "warm-up left out; caches stay as the last iteration left them."
)


class Report:
    """The rows of a run: printed as they come, and in one JSON file that is whole at any time. Written by rank 0.

    When torchrun restarts the processes (--max-restarts), rows that the file has are not measured again.
    """

    def __init__(self, kind: str, world: World, path: Path | None, settings: dict, keys: tuple[str, ...]):
        self.world, self.path, self.keys = world, path, keys
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else record.cpu_name()
        facts = {"device": device, "num_ranks": world.num_ranks}
        if world.device.type == "cuda":
            facts |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        self.data = {"schema": SCHEMA, "kind": kind, "provenance": record.provenance(**facts), "settings": settings}
        self.data["rows"] = self._earlier_rows()

    def _earlier_rows(self) -> list[dict]:
        rows: list[dict] = []
        if self.path is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and self.path.exists():
            rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
        rows = self.world.share(rows)[0]
        for row in rows:
            if row["status"] == "running":
                row.update(status="failed", reason="a rank failed alone or a GPU stopped answering")
        return rows

    def has(self, row: dict) -> bool:
        """Whether an earlier start of these processes measured this row."""
        return any(all(row[key] == old[key] for key in self.keys) for old in self.data["rows"])

    def begin(self, row: dict) -> None:
        """Note which row is being measured, for a reader of the file if it never ends."""
        self.data["rows"].append(row | {"status": "running", "reason": ""})
        self._write()

    def end(self, row: dict, line: str) -> None:
        """Replace the row that was begun, and print its line."""
        self.data["rows"][-1] = row
        self._write()
        self.say(line)

    def measure(self, row: dict, case: Callable[[], dict], make_row: Callable, format_row: Callable) -> None:
        """Run `case` on all ranks unless an earlier start did: the row gets its status and, from every rank's result,
        make_row(results); then it is printed. Collective."""
        if self.has(row):
            return
        self.begin(row)
        status, reason, results = attempt(self.world, case)
        row |= {"status": status, "reason": reason, **(make_row(results) if results else {})}
        self.end(row, format_row(row))

    def note(self, key: str, value) -> None:
        """Add a JSON-ready fact about all rows to the file."""
        self.data[key] = value
        self._write()

    def say(self, text: str) -> None:
        if self.world.ep_rank == 0:
            print(text, flush=True)

    def give_up(self, error: LeftAloneError) -> None:
        """End this process: the others cannot be reached. Whoever knows the reason writes it into the row."""
        if self.path is not None and self.data["rows"] and "stuck" not in str(error):
            self.data["rows"][-1] |= {"status": "failed", "reason": str(error)}
            record.write_json(self.path, self.data)
        hint = "" if self.path is None else f"; rows so far are in {self.path}, torchrun --max-restarts 9 goes on"
        print(f"{error}{hint}", file=sys.stderr, flush=True)
        os._exit(1)

    def _write(self) -> None:
        if self.path is not None and self.world.ep_rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record.write_json(self.path, self.data)


def add_options(parser: argparse.ArgumentParser, *, timing: bool = True) -> None:
    """The options that every benchmark has; `timing`: with those of `timing_of`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where torch finds a GPU, else cpu")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--seed", type=at_least(0), default=1, help="of weights and routing; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and where they come from to FILE")
    parser.add_argument("--note", default="", help="free text for the JSON file, such as the commit where git is absent")
    if not timing:
        return
    default = Timing()
    parser.add_argument("--warmup", type=at_least(1), default=default.warmup, help="untimed iterations; default: %(default)s")
    parser.add_argument("--iterations", type=at_least(1), default=default.iterations,
                        help="timed iterations, at most; default: %(default)s")  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=default.seconds,
        help="fewer iterations (5 at least) where they take longer; default: %(default)s",
    )  # fmt: skip


def timing_of(args: argparse.Namespace) -> Timing:
    return Timing(warmup=args.warmup, iterations=args.iterations, seconds=args.seconds)


def dtype_of(args: argparse.Namespace) -> str:
    return args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def settings_of(args: argparse.Namespace, **facts) -> dict:
    """The settings that a report states."""
    return {"dtype": dtype_of(args), "seed": args.seed, "note": args.note, "how": HOW, **asdict(timing_of(args)), **facts}


def at_least(smallest: int):
    """For argparse: an integer that is not smaller."""

    def number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return int(text)

    return number


def checked(parse):
    """`parse` for argparse, which shows the message of a ValueError only when it is told so."""

    def of(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return of
