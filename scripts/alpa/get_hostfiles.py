#!/usr/bin/env python3
"""Write hostfile, hostfile_2node, hostfile_4node and hostfile_8node for the DeepSpeed benchmark.

The nodes come from --hosts, from Slurm's list (inside a job, or --nodelist) or from a hostfile that exists (--from). This
host comes first where it is among them. Slots are the GPUs of a node: --slots, else what the source says (slots= of the
hostfile, SLURM_GPUS_ON_NODE), else the GPUs that nvidia-smi finds here. Files are written for as many nodes as there are;
with --nodes N, exactly those that N nodes need, and fewer nodes are an error before anything is written.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

SIZES = (1, 2, 4, 8)


def file_name(num_nodes: int) -> str:
    """hostfile for one node, hostfile_<n>node for more: the names of Alpa's artifact."""
    return "hostfile" if num_nodes == 1 else f"hostfile_{num_nodes}node"


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host of a DeepSpeed hostfile. Raises ValueError naming the file and line that do not fit the format."""
    slots: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read this hostfile: {error}") from None
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match:
            raise ValueError(f"{path}:{number}: expected HOST slots=N, not {text!r}")
        if match[1] in slots:
            raise ValueError(f"{path}:{number}: host {match[1]} is there twice")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"{path}: names no host")
    return slots


def expand(nodelist: str) -> list[str]:
    """The hosts of a list in Slurm's notation: a,b[1-3,07],c-[01-02]x -> a b1 b2 b3 b07 c-01x c-02x."""
    hosts = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        hosts += _expand_item(item.strip())
    if not hosts or nodelist.count("[") != nodelist.count("]"):
        raise ValueError(f"{nodelist!r} is not a list of nodes")
    return hosts


def _expand_item(item: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", item)
    if not match:
        return [item]
    names = []
    for part in match[2].split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not bounds or bounds[2] and int(bounds[2]) < int(bounds[1]):
            raise ValueError(f"{item!r}: {part!r} is not a number or a range")
        width = len(bounds[1])
        names += [f"{match[1]}{i:0{width}d}" for i in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)]
    return [name + rest for name in names for rest in _expand_item(match[3])]


def local_first(slots: dict[str, int], local: set[str]) -> dict[str, int]:
    """The same hosts with this one in front: DeepSpeed takes the first as the master."""
    ordered = sorted(slots, key=lambda host: host not in local and host.split(".")[0] not in local)
    return {host: slots[host] for host in ordered}


def local_names() -> set[str]:
    """What this host is called, address included."""
    names = {socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()}
    try:
        names.add(socket.gethostbyname(socket.gethostname()))
    except OSError:
        pass  # a host that cannot resolve its own name: its address is not known
    return names


def gpus_here() -> int:
    """GPUs that nvidia-smi lists; 0 where there is none."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def find_hosts(args: argparse.Namespace, environ: dict[str, str]) -> dict[str, int]:
    """Slots by host from the source that the arguments choose. Raises ValueError when there is none, or no slots."""
    if args.source:
        found = read_hostfile(args.source)
        return {host: args.slots or slots for host, slots in found.items()}
    nodelist = args.nodelist or environ.get("SLURM_JOB_NODELIST", "")
    if not (args.hosts or nodelist):
        raise ValueError("no nodes: give --hosts A B .., --nodelist LIST or --from HOSTFILE, or call this in a Slurm job")
    hosts = args.hosts or expand(nodelist)
    for host in hosts:
        if hosts.count(host) > 1:
            raise ValueError(f"host {host} is there twice")
    in_job = "" if args.hosts else environ.get("SLURM_GPUS_ON_NODE", "")
    slots = args.slots or int(in_job or 0) or gpus_here()
    if not slots:
        raise ValueError("the number of GPUs of a node is not known here: give --slots N")
    return dict.fromkeys(hosts, slots)


def plan_files(slots: dict[str, int], num_nodes: int | None) -> dict[str, str]:
    """Contents by file name. Raises ValueError when there are fewer hosts than `num_nodes`."""
    if num_nodes is not None and len(slots) < num_nodes:
        raise ValueError(f"{num_nodes} nodes are asked for, but only {len(slots)} are there: {', '.join(slots)}")
    sizes = [size for size in SIZES if size <= (num_nodes or len(slots))]
    lines = [f"{host} slots={count}\n" for host, count in slots.items()]
    return {file_name(size): "".join(lines[:size]) for size in sizes}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="get_hostfiles.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hosts", nargs="+", metavar="HOST", help="the nodes by name or address")
    source.add_argument("--nodelist", metavar="LIST", help="the nodes in Slurm's notation (default: the job's)")
    source.add_argument("--from", dest="source", type=Path, metavar="HOSTFILE", help="a hostfile that exists")
    parser.add_argument("--slots", type=int, metavar="N", help="GPUs of every node")
    parser.add_argument("--nodes", type=int, choices=SIZES, help="how many nodes there must be")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where to write (default: here)")
    args = parser.parse_args(argv)
    try:
        if args.slots is not None and args.slots < 1:
            raise ValueError(f"--slots {args.slots} must be at least 1")
        files = plan_files(local_first(find_hosts(args, dict(os.environ)), local_names()), args.nodes)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (args.out / name).write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"get_hostfiles.py: {error}", file=sys.stderr)
        return 2
    for name, text in files.items():
        print(f"{args.out / name}: {', '.join(line.split()[0] for line in text.splitlines())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
