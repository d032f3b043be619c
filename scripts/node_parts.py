"""The parts of scripts/measure_node.toml: read, checked, and turned into commands for one machine."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from smartmoe.config import from_dict, read_table

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 480.0  # of a part that cannot be cut
LONGEST_S = 420.0  # estimate of such a part: a call of 8 minutes, which stops in time, must be able to start it
SIZES = ("all", "one", "each")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One [[part]] of the table; the keys are explained there."""

    name: str
    about: str
    minutes: float
    command: tuple[str, ...]
    sizes: str = "all"
    min_gpus: int = 1
    needs: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    resumable: bool = False
    some_may_fail: bool = False


@dataclass(frozen=True)
class Node:
    """What is measured on, and where to."""

    cluster: str  # "local" or "cpu"
    gpus: int  # ranks on a CPU
    out: Path
    trace: Path | None

    @property
    def sizes(self) -> list[int]:
        """The powers of two up to all GPUs: by others the figures' models do not divide."""
        return [2**power for power in range(self.gpus.bit_length())]


@dataclass(frozen=True)
class Part:
    """A declared part at one number of ranks."""

    name: str
    declared: Declared
    gpus: int
    node: Node

    @property
    def folder(self) -> Path:
        return self.node.out / self.name

    @property
    def estimate_s(self) -> float:
        return self.declared.minutes * 60

    def state(self) -> str:
        """done, cut, failed or to do."""
        for name, state in (("done.json", "done"), ("cut.json", "cut"), ("failed.json", "failed")):
            if (self.folder / name).exists():
                return state
        return "to do"

    def why_skipped(self, parts: list[Part] = ()) -> str:
        """Why this cannot run here; empty when it can."""
        declared, node = self.declared, self.node
        if node.cluster == "cpu" and not declared.cpu:
            return "needs GPUs"
        if self.gpus < declared.min_gpus:
            return f"needs {declared.min_gpus} GPUs"
        return next(filter(None, (lack(need, node, parts) for need in declared.needs)), "")

    def commands(self) -> list[list[str]]:
        node = self.node
        python = [sys.executable]
        torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        known = {"gpus": self.gpus, "out": self.folder, "set": node.out, "trace": node.trace, "cluster": node.cluster,
                 "sizes": " ".join(map(str, node.sizes))}  # fmt: skip
        lines = self.declared.cpu if node.cluster == "cpu" else self.declared.command
        whole = {"{python}": python, "{torchrun}": torchrun}

        def filled(word: str) -> list[str]:
            return whole[word] if word in whole else [word.format_map(known)]

        return [[part for word in shlex.split(line) for part in filled(word)] for line in lines]


def read_parts(path: Path) -> list[Declared]:
    """The table. Raises ValueError naming the file and what does not fit."""
    table = dict(read_table(path))
    rows = table.pop("part", [])
    if table or not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected [[part]] tables and nothing else")
    parts = [from_dict(Declared, row, f"{path}: part {place}") for place, row in enumerate(rows, 1)]
    names = [part.name for part in parts]
    for part in parts:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", part.name) or names.count(part.name) > 1:
            raise ValueError(f'{path}: name = "{part.name}" must be of a-z, 0-9 and -, and not be there twice')
        if part.sizes not in SIZES:
            raise ValueError(f'{path}: {part.name}: sizes = "{part.sizes}" is not one of {", ".join(SIZES)}')
        if not part.resumable and part.minutes * 60 > LONGEST_S:
            raise ValueError(f"{path}: {part.name}: {part.minutes} minutes: at most {LONGEST_S / 60:g} unless resumable")
        _check_words(part, path)
    return parts


def _check_words(part: Declared, path: Path) -> None:
    node = Node("cpu", 1, Path(), None)
    for cluster in ("local", "cpu"):
        try:
            Part(part.name, part, 1, dataclasses.replace(node, cluster=cluster)).commands()
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: {part.name}: a command has an unknown {{word}} or an open quote: {error}"
            ) from None
    for need in part.needs:
        if need != "trace" and need.partition(":")[0] not in ("module", "command", "file", "part"):
            raise ValueError(f'{path}: {part.name}: needs = "{need}" is no kind of need')


def expand(declared: list[Declared], node: Node) -> list[Part]:
    """The parts at their numbers of ranks, in the order of the table."""
    halves = [node.gpus, node.gpus // 2] if node.gpus > 1 and node.cluster == "local" else [node.gpus]
    parts = []
    for row in declared:
        if row.sizes == "each":
            parts += [Part(f"{row.name}-x{gpus}", row, gpus, node) for gpus in halves]
        else:
            parts.append(Part(row.name, row, 1 if row.sizes == "one" else node.gpus, node))
    return parts


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """The parts named; a name that none has stands for all that begin so. Raises ValueError for one that fits none."""
    names, wanted = [part.name for part in parts], set()
    for name in only:
        fitting = [name] if name in names else [known for known in names if known.startswith(name)]
        if not fitting:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ValueError(f"--only {name}: {known}")
        wanted.update(fitting)
    return [part for part in parts if not only or part.name in wanted]


def lack(need: str, node: Node, parts: list[Part]) -> str:
    """What is missing for one of a part's needs, or "". A part of `parts` counts as done: its turn will come."""
    kind, _, name = need.partition(":")
    if kind == "trace":
        return "" if node.trace else "needs the published trace: --trace FILE"
    if kind == "module":
        return "" if importlib.util.find_spec(name) else f"needs the Python package {name}"
    if kind == "command":
        return "" if shutil.which(name) else f"needs the command {name}"
    if kind == "file":
        return "" if (ROOT / name).exists() else f"needs {name}"
    if (node.out / name / "done.json").exists() or any(part.name == name for part in parts):
        return ""
    return f"needs part {name}"
