"""Measure this machine in parts that can be interrupted, resumed and carried to another machine of the same kind.

    scripts/measure_node.sh [--minutes M] [--out DIR] [--list] [--only PART ..] [--trace FILE] [--cluster auto|local|cpu]

The parts are declared in scripts/measure_node.toml. A part is done when DIR/PART/done.json is there; it is written last. Exit
codes: 0 nothing is left to do (what cannot run here is skipped, and said); 1 a part failed (the next call tries it again); 2
bad input; 3 the minutes were over, call again; 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

from launch import count_gpus  # noqa: E402
from node_parts import LIMIT_S, Node, Part, chosen, expand, lack, read_parts  # noqa: E402
from runner import end_with_parent, stop  # noqa: E402

from smartmoe import record  # noqa: E402

SHORTEST_S = 60.0  # worth starting of a part that can be cut
STATES = ("done", "cut", "failed", "skipped", "to do")
STOP_S = 30.0  # what a training run takes to stop
CPU_RANKS = 4
BIG_BYTES = 16 << 20  # what is often the most that a file may have to travel
LOG_BYTES = 64 << 10  # longer consoles are compressed


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        node = find_node(args)
        parts = chosen(expand(read_parts(args.table), node), args.only)
        print_plan(parts, node, args.minutes)
        if args.list:
            return 0
        node.out.mkdir(parents=True, exist_ok=True)
        with (node.out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{node.out}: another call is at work here") from None
            check_same_machine(node)
            return measure(parts, node, args.minutes)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"measure_node: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="measure_node.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop in time to be back after M minutes (no limit)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run-set (default: logs/<device>x<GPUs>-<date>)")
    parser.add_argument("--list", action="store_true", help="print the parts and their state, run nothing")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="these parts, or all whose name begins so"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the published trace (.npz or its folder of tables)")
    parser.add_argument(
        "--cluster", choices=("auto", "local", "cpu"), default="auto", help="default: GPUs if there are any"
    )
    parser.add_argument("--table", type=Path, default=ROOT / "scripts/measure_node.toml", metavar="FILE",
                        help="another table of parts")  # fmt: skip
    args = parser.parse_args(argv)
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g} must be positive")
    return args


def find_node(args: argparse.Namespace) -> Node:
    """The machine and the run-set. Raises ValueError when GPUs are asked for and there are none."""
    gpus = 0 if args.cluster == "cpu" else count_gpus()
    if args.cluster == "local" and not gpus:
        raise ValueError("--cluster local needs CUDA GPUs and a CUDA build of torch")
    if args.trace and not args.trace.exists():
        raise ValueError(f"--trace {args.trace}: there is no such file or folder")
    cluster, ranks = ("local", gpus) if gpus else ("cpu", CPU_RANKS)
    name = f"{short_name(gpu_name())}x{gpus}" if gpus else "node-cpu"
    out = args.out or ROOT / "logs" / f"{name}-{datetime.now(UTC):%Y%m%d}"
    return Node(cluster, ranks, out.resolve(), args.trace.resolve() if args.trace else None)


def gpu_name() -> str:
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def short_name(device: str) -> str:
    """The first word with a digit: h200 of NVIDIA H200, a100 of NVIDIA A100-SXM4-80GB."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return next((word for word in words if re.search(r"\d", word)), words[-1] if words else "gpu")


def check_same_machine(node: Node) -> None:
    """Raise ValueError when the run-set was begun on another kind of machine: its numbers would not compare."""
    device = gpu_name() if node.cluster == "local" else "cpu"
    path, here = node.out / "node.json", {"device": device, "gpus": node.gpus}
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else here
    if begun != here:
        raise ValueError(f"{node.out} was begun on {begun}, this is {here}: give another --out")
    record.write_json(path, here)


def print_plan(parts: list[Part], node: Node, minutes: float | None) -> None:
    width = max(len(part.name) for part in parts)
    what = f"{node.gpus} GPUs" if node.cluster == "local" else f"CPU, {node.gpus} ranks"
    print(f"{node.out}: {what}" + (f", at most {minutes:g} minutes in this call" if minutes else ""))
    left_s = 0.0
    for part in parts:
        reason, state = part.why_skipped(parts), part.state()
        left_s += 0 if reason or state == "done" else part.estimate_s
        shown = state if state == "done" or not reason else "skipped"
        about = part.declared.about if shown != "skipped" else reason
        print(f"{part.name:<{width}} {part.declared.minutes:>5g} min  {shown:<8} {about}")
    print(f"about {left_s / 60:.0f} minutes to do", flush=True)


def measure(parts: list[Part], node: Node, minutes: float | None) -> int:
    """Do what is to do, parts that failed before last, until the time is over or a signal comes. Returns the exit code."""
    end = float("inf")
    if minutes:  # what is cut needs a moment to end
        end = time.monotonic() + minutes * 60 - min(STOP_S, minutes * 6)
    signals: list[int] = []
    asks = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: signals.append(number)) for number in asks]
    try:
        return summarise(parts, node, _do_all(parts, node, end, signals), signals)
    finally:
        for number, handler in zip(asks, previous, strict=True):
            signal.signal(number, handler)


def _do_all(parts: list[Part], node: Node, end: float, signals: list[int]) -> list[Part]:
    """Returns the parts whose turn did not come before `end` or a signal."""
    waiting = [part for part in parts if part.state() != "done" and not part.why_skipped(parts)]
    waiting.sort(key=lambda part: part.state() == "failed")
    late = []
    if waiting and node.cluster == "local":
        print(build_extension(node), flush=True)
    for place, part in enumerate(waiting):
        left_s = end - time.monotonic()
        needed_s = SHORTEST_S if part.declared.resumable else part.estimate_s
        missing = next(filter(None, (lack(need, node, []) for need in part.declared.needs)), "")
        if signals or left_s < min(needed_s, part.estimate_s):
            late.append(part)
            continue
        label = f"[{place + 1}/{len(waiting)}] {part.name}"
        words = f"skipped: {missing}" if missing else run_part(part, label, left_s, signals)
        print(f"{label} {words}", flush=True)
    return late


def build_extension(node: Node) -> str:
    """Build the CUDA extension in place unless it is there, for this GPU alone; returns words for what became of it."""
    if any((ROOT / "src/smartmoe").glob("_C*.so")):
        return "the CUDA extension is there"
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    arch = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    start = time.monotonic()
    with (node.out / "build.log").open("w") as log:
        env = {"MAX_JOBS": "8", "TORCH_CUDA_ARCH_LIST": arch, **os.environ}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    built = any((ROOT / "src/smartmoe").glob("_C*.so"))
    words = "built" if built else f"not built, plain torch stands in for it: see {node.out}/build.log"
    return f"the CUDA extension was {words} ({time.monotonic() - start:.0f} s)"


def run_part(part: Part, label: str, left_s: float, signals: list[int]) -> str:
    """Run the commands of a part and write down how it ended; returns words for it."""
    declared = part.declared
    if not declared.resumable:
        shutil.rmtree(part.folder, ignore_errors=True)
    part.folder.mkdir(parents=True, exist_ok=True)
    for state in ("failed", "cut"):
        (part.folder / f"{state}.json").unlink(missing_ok=True)
    start = time.monotonic()
    limit_s = left_s if declared.resumable else min(left_s, LIMIT_S)
    good, code, why = (0, 1) if declared.some_may_fail else (0,), 0, ""
    for command in part.commands():
        code, why = _run(command, part, label, start + limit_s, signals)
        if why or code not in good:
            break
    seconds = round(time.monotonic() - start, 1)
    _shrink(part)
    ended_early = why and (declared.resumable or signals or limit_s == left_s)
    state = "cut" if ended_early else "failed" if why or code not in good else "done"
    why = why or (f"exit code {code}" if code else "")
    facts = {"part": part.name, "gpus": part.gpus, "seconds": seconds, "why": why, "ended": record.utc_now()}
    record.write_json(part.folder / f"{state}.json", facts)
    words = {
        "done": f"ok{why and ', '}{why}",
        "cut": "cut, the next call goes on with it",
        "failed": f"failed: {why}; see {part.folder}/console.log",
    }
    return f"after {seconds:.0f} s: {words[state]}"


def _run(command: list[str], part: Part, label: str, end: float, signals: list[int]) -> tuple[int, str]:
    """(exit code, why it was stopped or "") of one command, its output in console.log."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PY": sys.executable}
    if part.node.cluster == "local":  # fewer ranks than GPUs must not see the others: a launcher takes all it finds
        shown = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(part.node.gpus)))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(shown.split(",")[: part.gpus])
    with (part.folder / "console.log").open("ab") as console:
        console.write(f"$ {shlex.join(command)}\n".encode())
        console.flush()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, cwd=ROOT,
                                 env=env, start_new_session=True, preexec_fn=end_with_parent)  # fmt: skip
        try:
            start = shown_s = time.monotonic()
            while child.poll() is None:
                now = time.monotonic()
                if signals or now > end:
                    return 1, "interrupted" if signals else "the time was over"
                if now - shown_s > 1 and sys.stdout.isatty():
                    shown_s = now
                    print(f"\r\033[K{label} {now - start:.0f} of about {part.estimate_s:.0f} s", end="", flush=True)
                time.sleep(0.1)
        finally:
            stop(child)
            if sys.stdout.isatty():
                print("\r\033[K", end="", flush=True)
    return child.returncode, ""


def _shrink(part: Part) -> None:
    """Keep what travels small: no checkpoints (of runs that were cut), a long console.log compressed."""
    for folder in list(part.node.out.rglob("checkpoints")):
        shutil.rmtree(folder, ignore_errors=True)
    console = part.folder / "console.log"
    if console.exists() and console.stat().st_size > LOG_BYTES:
        text = console.read_bytes()
        with gzip.open(part.folder / "console.log.gz", "ab") as packed:
            packed.write(text)
        console.write_bytes(b"(the whole text is in console.log.gz)\n" + text[-LOG_BYTES // 4 :])


def summarise(parts: list[Part], node: Node, late: list[Part], signals: list[int]) -> int:
    """Print and write summary.json; returns the exit code."""
    rows = {}
    for part in parts:
        state, reason = part.state(), part.why_skipped(late)
        rows[part.name] = {"state": state if state == "done" or not reason else "skipped", "reason": reason}
        with contextlib.suppress(OSError, ValueError):
            rows[part.name] |= json.loads((part.folder / f"{state}.json").read_text(encoding="utf-8"))
    device = gpu_name() if node.cluster == "local" else record.cpu_name()
    facts = record.provenance(device=device, num_ranks=node.gpus)
    record.write_json(node.out / "summary.json", {"provenance": facts, "parts": rows})
    states = [row["state"] for row in rows.values()]
    print(", ".join(f"{states.count(state)} {state}" for state in STATES if state in states))
    for name, row in rows.items():
        if row["state"] in ("failed", "skipped"):
            print(f"  {name}: {row['state']}: {row.get('why') or row['reason']}")
    for path in sorted(path for path in node.out.rglob("*") if path.is_file() and path.stat().st_size > BIG_BYTES):
        print(f"  {path} has {path.stat().st_size >> 20} MiB")
    print(f"./RUNME-a.sh --logs {shlex.quote(os.path.relpath(node.out))} draws what is there", flush=True)
    if signals:
        return 128 + signals[0]
    return 3 if late or "cut" in states else 1 if "failed" in states else 0


if __name__ == "__main__":
    sys.exit(main())
