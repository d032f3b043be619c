"""Expert-selection traces: how many token copies every expert got, by iteration, rank, layer and micro-batch.

Layer 0: numpy only. Three file formats, described in moe_trace/README.md: one .npz, the text tables of the published
SmartMoE artifact, and .csv. Axes: I iterations, R ranks, L layers, M micro-batches, E experts.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smartmoe.trace_synthetic import chances, draw_counts, skew_of

SYNTHETIC = "synthetic:"
_SIZES = {"iterations": 200, "ranks": 4, "layers": 4, "micro_batches": 1, "experts": 32, "copies": 4096}
# A trace of 500 iterations, 64 ranks, 24 layers, 4 micro-batches and 256 experts takes 3 GB; more is taken for damage.
MAX_MEMBER_BYTES = 8 << 30
FORMATS = (
    "a trace is an .npz of counts [iterations, ranks, layers, micro-batches, experts] or [iterations, experts] and iteration "
    "[iterations], a .csv with the columns iteration, layer, expert, a folder of table_iter<I>_rank<R>.log files, or "
    "synthetic:KIND (moe_trace/README.md)"
)
CSV_AXES = ("iteration", "rank", "layer", "micro_batch", "expert")
_CSV_NEEDED = ("iteration", "layer", "expert")
_TABLE_NAME = re.compile(r"table_iter(\d{1,9})_rank(\d{1,6})\.log")


@dataclass(frozen=True, eq=False)
class ExpertTrace:
    """Token copies per expert.

    Args:
        counts: [I, R, L, M, E] integers, not negative, stored as int32. Ranks are the sources of the tokens: the ranks
            of a pipeline stage by stage_rank; the layers of all stages are joined. Dropped copies are not counted.
        iteration: [I] int64, strictly rising training iterations, from 1.
        meta: JSON-ready facts about where the trace comes from.
    Raises ValueError for anything else.
    """

    counts: np.ndarray
    iteration: np.ndarray
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        counts, iteration = np.asarray(self.counts), np.asarray(self.iteration)
        if counts.dtype.kind not in "iu" or iteration.dtype.kind not in "iu":
            raise ValueError(f"trace: counts and iteration must be integers, got {counts.dtype} and {iteration.dtype}")
        if counts.ndim != 5 or 0 in counts.shape:
            raise ValueError(
                f"trace: counts has shape {counts.shape}, expected [iterations, ranks, layers, micro-batches, experts]"
            )
        if iteration.shape != counts.shape[:1]:
            raise ValueError(f"trace: {iteration.size} iteration numbers for {counts.shape[0]} iterations")
        if counts.min() < 0 or counts.max() > np.iinfo(np.int32).max:
            raise ValueError("trace: counts must lie in 0 .. 2^31 - 1")
        if iteration.max() > np.iinfo(np.int64).max or (np.diff(iteration.astype(np.int64)) <= 0).any():
            raise ValueError("trace: iteration numbers must rise strictly")
        if not isinstance(self.meta, dict):
            raise ValueError(f"trace: meta must be a dict, got {type(self.meta).__name__}")
        object.__setattr__(self, "counts", counts.astype(np.int32, copy=False))
        object.__setattr__(self, "iteration", iteration.astype(np.int64, copy=False))

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz; the file appears under its name when it is complete. No pickle is involved."""
        path = Path(path)
        try:
            meta = json.dumps(self.meta, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: meta cannot be written as JSON: {error}") from None
        scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(scratch, "wb") as file:
                meta_bytes = np.frombuffer(meta.encode(), dtype=np.uint8)
                np.savez_compressed(file, counts=self.counts, iteration=self.iteration, meta=meta_bytes)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> ExpertTrace:
        """Read an .npz written by `save`, or one with `counts` and `iteration` only.

        Two-dimensional counts [I, E] are taken as one rank, one layer and one micro-batch. Sizes are checked before
        anything is unpacked, and nothing is unpickled. Raises ValueError naming the file and what is wrong.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                counts, iteration = (_read_member(archive, key) for key in ("counts", "iteration"))
                has_meta = "meta.npy" in archive.namelist()
                meta = json.loads(_read_member(archive, "meta").tobytes().decode()) if has_meta else {}
            return cls(counts[:, None, None, None, :] if counts.ndim == 2 else counts, iteration, meta)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: cannot read this trace: {error}; {FORMATS}") from None
        except (OSError, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
            raise ValueError(f"{path}: cannot read this trace: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a valid trace: {error}") from None

    @classmethod
    def read_csv(cls, path: str | Path) -> ExpertTrace:
        """Read a .csv whose first line names its columns: iteration, layer, expert, and as wanted rank, micro_batch, count.

        A line stands for `count` token copies (1 where there is no such column); lines of one place add up, and places
        without a line have none. Layers, ranks and micro-batches are numbered anew in their order, experts keep their
        numbers. Other columns are not read. Raises ValueError naming the file and the line.
        """
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                columns = [name.strip() for name in next(reader, [])]
                if lacking := [name for name in _CSV_NEEDED if name not in columns]:
                    has = ", ".join(columns)[:200] or "nothing"
                    raise ValueError(f"no column {', '.join(lacking)} in line 1, which has: {has}")
                names = [name for name in (*CSV_AXES, "count") if name in columns]
                places = [columns.index(name) for name in names]
                rows = []
                for row in reader:
                    try:
                        if row:
                            rows.append([int(row[place]) for place in places])
                    except (ValueError, IndexError):
                        raise ValueError(f"line {reader.line_num}: needs whole numbers for {', '.join(names)}") from None
                    if row and not 0 <= min(rows[-1]) <= max(rows[-1]) < 2**53:
                        raise ValueError(f"line {reader.line_num}: a number outside 0 .. 2^53")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot read this trace: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a valid trace: {error}") from None
        if not rows:
            raise ValueError(f"{path}: not a valid trace: it has no line below its first")
        found = dict(zip(names, np.array(rows, np.int64).T, strict=True))
        axes, places = {}, []
        for name in CSV_AXES:
            axes[name], place = np.unique(found.get(name, np.zeros(len(rows), np.int64)), return_inverse=True)
            places.append(found["expert"] if name == "expert" else place)
        shape = [len(axes[name]) for name in CSV_AXES[:-1]] + [int(found["expert"].max()) + 1]
        if math.prod(shape) * 8 > MAX_MEMBER_BYTES:
            raise ValueError(f"{path}: not a valid trace: its numbers span {' x '.join(map(str, shape))} places, too many")
        counts = np.zeros(shape, np.int64)
        np.add.at(counts, tuple(places), found.get("count", 1))
        try:
            return cls(counts, axes["iteration"], {"source": "csv"})
        except ValueError as error:
            raise ValueError(f"{path}: not a valid {error}") from None

    @classmethod
    def read_published(cls, folder: str | Path) -> ExpertTrace:
        """Read every `table_iter<I>_rank<R>.log` of `folder` (not of folders below it).

        Ranks must be 0 .. R-1 and every iteration must have all of them. Raises ValueError naming the file and the line
        that is not as it should be, or a link that leads out of the folder.
        """
        folder = Path(folder)
        files: dict[tuple[int, int], Path] = {}
        try:
            root = folder.resolve(strict=True)
            for path in sorted(folder.iterdir()):
                if match := _TABLE_NAME.fullmatch(path.name):
                    if not path.resolve().is_relative_to(root):
                        raise ValueError(f"{path}: this link leads out of {folder}; put the file itself there")
                    files[int(match[1]), int(match[2])] = path
        except OSError as error:
            raise ValueError(f"{folder}: cannot read this folder: {error}") from None
        if not files:
            raise ValueError(f"{folder}: no file is called table_iter<I>_rank<R>.log")
        iterations, num_ranks = sorted({key[0] for key in files}), 1 + max(key[1] for key in files)
        for iteration in iterations:
            for rank in range(num_ranks):
                if (iteration, rank) not in files:
                    raise ValueError(f"{folder}: table_iter{iteration}_rank{rank}.log is missing")
        first = files[iterations[0], 0]
        expected = _read_table(first).shape
        counts = np.zeros((len(iterations), num_ranks, *expected), np.int32)
        for row, iteration in enumerate(iterations):
            for rank in range(num_ranks):
                path = files[iteration, rank]
                table_LME = _read_table(path)
                if table_LME.shape != expected:
                    raise ValueError(f"{path}: shape {table_LME.shape}, but {first.name} has {expected}")
                counts[row, rank] = table_LME
        return cls(counts, np.array(iterations, np.int64), {"source": "text tables"})

    def write_published(self, folder: str | Path) -> None:
        """Write one `table_iter<I>_rank<R>.log` per iteration and rank into `folder`, which is made when absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for counts_RLME, iteration in zip(self.counts, self.iteration.tolist(), strict=True):
            for rank, counts_LME in enumerate(counts_RLME):
                tables = enumerate(counts_LME.astype(float).tolist())
                text = "".join(f"{layer}:{json.dumps(table)}\n" for layer, table in tables)
                (folder / f"table_iter{iteration}_rank{rank}.log").write_text(text, encoding="utf-8")

    def expert_load(self) -> np.ndarray:
        """[I, L, E] int64, token copies of each expert over all ranks and micro-batches."""
        return self.counts.sum(axis=(1, 3), dtype=np.int64)

    def max_over_mean(self) -> np.ndarray:
        """[I, L] load of the busiest expert over the mean expert; 1.0 where a layer has no load."""
        load_ILE = self.expert_load()
        mean = load_ILE.mean(axis=2)
        return np.where(mean > 0, load_ILE.max(axis=2) / np.where(mean > 0, mean, 1.0), 1.0)

    def idle_experts(self) -> np.ndarray:
        """[I, L] int64, how many experts got nothing."""
        return (self.expert_load() == 0).sum(axis=2)

    def top_share(self, num_top: int) -> np.ndarray:
        """[I, L] share of all token copies that the `num_top` busiest experts got; 0.0 where a layer has no load."""
        load_ILE = np.sort(self.expert_load(), axis=2)
        total = load_ILE.sum(axis=2)
        return load_ILE[:, :, -num_top:].sum(axis=2) / np.maximum(total, 1)

    def correlation(self, lag: int = 1) -> np.ndarray:
        """[I - lag, L] Pearson correlation of a layer's expert loads with those `lag` recorded iterations later.

        NaN where all experts of a layer have the same load. Raises ValueError unless 1 <= lag < I.
        """
        if not 1 <= lag < len(self.iteration):
            raise ValueError(f"trace: lag = {lag} is not in 1 .. {len(self.iteration) - 1}")
        load_ILE = self.expert_load().astype(np.float64)
        load_ILE -= load_ILE.mean(axis=2, keepdims=True)
        norm = np.sqrt(np.square(load_ILE).sum(axis=2))
        norm[norm == 0] = np.nan
        return (load_ILE[:-lag] * load_ILE[lag:]).sum(axis=2) / (norm[:-lag] * norm[lag:])


def synthetic(
    kind: str,
    *,
    num_iterations: int,
    num_ranks: int,
    num_layers: int,
    num_micro_batches: int,
    num_experts: int,
    num_copies: int,
    seed: int = 0,
    **changes,
) -> ExpertTrace:
    """A seeded trace whose skew is known.

    Args:
        kind: one of trace_synthetic.SKEWS.
        num_copies: token copies (tokens times top-k) per rank and micro-batch.
        changes: numbers of the kind's Skew to change, e.g. exponent = 0.8.
    Raises ValueError naming what does not fit.
    """
    sizes = {"iterations": num_iterations, "ranks": num_ranks, "layers": num_layers,
             "micro_batches": num_micro_batches, "experts": num_experts}  # fmt: skip
    if bad := [f"{name} = {value}" for name, value in sizes.items() if value < 1]:
        raise ValueError(f"trace: {', '.join(bad)}: must be at least 1")
    if num_copies < 0:
        raise ValueError(f"trace: num_copies = {num_copies} must be at least 0")
    skew = skew_of(kind, **changes)
    chance_ILE = chances(skew, num_iterations, num_layers, num_experts, seed)
    counts = draw_counts(chance_ILE, num_ranks, num_micro_batches, num_copies, seed)
    meta = {"source": "synthetic", "kind": kind, "seed": seed, "skew": dataclasses.asdict(skew)}
    return ExpertTrace(counts, np.arange(1, num_iterations + 1), meta)


def read_trace(source: str | Path, **sizes) -> ExpertTrace:
    """The trace that `source` names: an .npz, a .csv, a folder of text tables, or "synthetic:KIND[,KEY=NUMBER ..]".

    The keys of a synthetic one are iterations (200), ranks (4), layers (4), micro_batches (1), experts (32), copies
    (4096), seed (0) and the numbers of its Skew. `sizes` are other defaults for these, e.g. experts=16. Raises
    ValueError naming `source` and what is wrong with it.
    """
    text = str(source)
    if not text.startswith(SYNTHETIC):
        if text.lower().endswith(".csv"):
            return ExpertTrace.read_csv(source)
        return ExpertTrace.read_published(source) if Path(source).is_dir() else ExpertTrace.load(source)
    kind, *pairs = text.removeprefix(SYNTHETIC).split(",")
    values = {**_SIZES, "seed": 0, **sizes}
    try:
        for pair in pairs:
            key, _, number = pair.partition("=")
            values[key.strip()] = float(number) if key.strip() in ("exponent", "share", "chance") else int(number)
        counts = {f"num_{key}": values.pop(key) for key in _SIZES}
        return synthetic(kind, seed=values.pop("seed"), **counts, **values)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


def _read_member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an .npz. Its declared size must be that of its data: no memory is taken on a header's word."""
    try:
        info = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise ValueError(f'no array "{key}"; it has {", ".join(sorted(archive.namelist())) or "none"}') from None
    if info.file_size > MAX_MEMBER_BYTES:
        raise ValueError(f'array "{key}" unpacks to {info.file_size} bytes, more than {MAX_MEMBER_BYTES}')
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f'array "{key}" has .npy version {version}, expected 1.0 or 2.0')
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        if dtype.kind not in "iu":
            raise ValueError(f'array "{key}" has dtype {dtype}, expected integers')
        num_bytes = info.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != num_bytes:
            raise ValueError(f'array "{key}" declares {dtype} of shape {shape} but holds {num_bytes} bytes')
        data = np.frombuffer(bytearray(file.read()), dtype)
    return data.reshape(shape, order="F" if is_fortran else "C")


def _read_table(path: Path) -> np.ndarray:
    """[L, M, E] int32 of one text table."""
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            layer, _, table = line.partition(":")
            if layer.strip() != str(number - 1):
                raise ValueError(f'line {number} must start with "{number - 1}:"')
            table_ME = np.array(json.loads(table), dtype=np.float64)
            if table_ME.ndim != 2 or table_ME.shape != (rows[0] if rows else table_ME).shape:
                raise ValueError(f"line {number} has shape {table_ME.shape}, expected [micro-batches, experts]")
            in_range = (table_ME >= 0) & (table_ME <= np.iinfo(np.int32).max)
            if not in_range.all() or (table_ME != np.floor(table_ME)).any():
                raise ValueError(f"line {number} has a number that is no count")
            rows.append(table_ME)
        if not rows or not rows[0].size:
            raise ValueError("it has no tables")
        return np.stack(rows).astype(np.int32)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid table: {error}") from None
