"""Checkpoints in logical order: any world size, plan and placement can read what another one wrote.

A checkpoint holds fp32 masters and Adam moments by name, each expert under its logical index, written with
torch.distributed.checkpoint; beside it `meta.json` has the iteration, the loss scale, the placements, the loads that online
placement expects, the complete configuration, and size and checksum of every file. It is written to a scratch directory
and renamed when complete, so a kill leaves the last good one, and a damaged one is found before it is used.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard

from smartmoe import record
from smartmoe.config import RunConfig, to_dict
from smartmoe.mesh import Mesh
from smartmoe.optimizer import MixedAdamW, layer_of
from smartmoe.parallel.data import ParamRef, Share
from smartmoe.parallel.zero import cut_dim
from smartmoe.placement import EMPTY, Placement

_PREFIX = "iter_"


def save(
    folder: Path,
    iteration: int,
    optimizer: MixedAdamW,
    placements: dict[int, Placement],
    facts: dict,
    loads: dict[int, list[float]] | None = None,
) -> Path:
    """Write checkpoint `iteration` under `folder` and return its directory.

    placements, loads: by layer_idx, of this rank's MoE layers (see OnlinePlacement.saved_loads). facts: JSON-ready values
    saved as they are. Collective over the world. Raises OSError on every rank when one of them cannot write (for example
    on a full disk); what was written is removed, and earlier checkpoints are as they were.
    """
    target, scratch = folder / f"{_PREFIX}{iteration:07d}", folder / f".{_PREFIX}{iteration:07d}.partial"
    is_coordinator = optimizer.mesh.world_rank == 0

    def write() -> tuple:
        state, is_alone = _logical_state(optimizer, placements), not dist.is_initialized()
        with _alone_on_purpose():
            dcp.save(state, storage_writer=_Writer(scratch), no_dist=is_alone)
        return placements, loads or {}, _checksums(_files_of_rank(scratch, optimizer.mesh.world_rank))

    try:
        _all_or_none(lambda: _make_empty(scratch) if is_coordinator else None)
        parts = _all_or_none(write)
        meta = {"iteration": iteration, **optimizer.scalars(), **facts, "placements": {}, "loads": {}, "files": {}}
        for placement_of, load_of, files in parts:
            meta["placements"] |= {str(layer): placement.to_dict() for layer, placement in placement_of.items()}
            meta["loads"] |= {str(layer): load for layer, load in load_of.items()}
            meta["files"] |= files
        _all_or_none(lambda: _complete(scratch, target, meta) if is_coordinator else None)
    except OSError as error:
        if is_coordinator:
            shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{target}: this checkpoint could not be written: {error}") from error
    return target


@contextmanager
def _alone_on_purpose():
    """Without torch's warning that a single process writes or reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _all_or_none(step: Callable) -> list:
    """Every rank's result of `step`, by rank; when it fails on one, every rank raises OSError with the first reason.

    Collective over the world, so that no rank waits for one that has given up."""
    result, problem = None, ""
    try:
        result = step()
    except dcp.api.CheckpointException as error:  # the same on every rank
        rank, (cause, _) = next(iter(error.failures.items()))
        problem = f"rank {rank}: {_in_words(cause)}"
    except (OSError, RuntimeError) as error:
        problem = f"rank {dist.get_rank() if dist.is_initialized() else 0}: {_in_words(error)}"
    answers = _gather((result, problem))
    problems = [text for _, text in answers if text]
    if problems:
        raise OSError(problems[0])
    return [answer for answer, _ in answers]


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # torch's writer notices a full disk, or a file of the largest allowed size, only by where it stands in the file
    return "a file could not be written to its end; is the disk full?" if "unexpected pos" in str(error) else str(error)


def _gather(mine) -> list:
    answers = [mine]
    if dist.is_initialized():
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, mine)
    return answers


def _make_empty(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _files_of_rank(folder: Path, world_rank: int) -> list[Path]:
    """The files that a rank of torch.distributed.checkpoint writes; the coordinator, metadata as well."""
    return sorted(folder.glob(f"__{world_rank}_*")) + ([folder / ".metadata"] if world_rank == 0 else [])


def _checksums(files: Iterable[Path]) -> dict[str, list[int]]:
    """name -> [bytes, CRC-32]."""
    return {path.name: [path.stat().st_size, _checksum(path)] for path in files}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _complete(scratch: Path, target: Path, meta: dict) -> None:
    """Write meta.json, and give the checkpoint its name, in which it replaces one of the same iteration."""
    record.write_json(scratch / "meta.json", meta)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None. Complete: it has its name and its meta.json."""
    complete = sorted(path.parent for path in folder.glob(f"{_PREFIX}*/meta.json"))
    return complete[-1] if complete else None


def newest_good(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `folder` whose files are all as they were written, or None when there is none at all.

    say: told, on every rank, of each damaged one that is passed over, in words for the user. Each rank reads its share of
    the files; collective over the world. Raises ValueError when there are checkpoints and all are damaged.
    """
    found = _gather(sorted((path.parent.name for path in folder.glob(f"{_PREFIX}*/meta.json")), reverse=True))[0]
    world_rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name in found:
        problems = [text for text in _gather(_damage(folder / name, world_rank, world_size)) if text]
        if not problems:
            return folder / name
        say(f"checkpoint {name} is damaged and is not used: {problems[0]}")
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints is whole; remove it to start from the beginning")
    return None


def _damage(path: Path, world_rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with this rank's share of the files of a checkpoint; "" = nothing."""
    try:
        files = read_meta(path)["files"]
        for name, (size, checksum) in sorted(files.items())[world_rank::world_size]:
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
            if _checksum(path / name) != checksum:
                return f"the contents of {name} have changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return str(error)
    return ""


def read_meta(path: Path) -> dict:
    """The facts beside a checkpoint. Raises ValueError naming the file when it is damaged."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        meta["placements"] = {int(layer): Placement.from_dict(data) for layer, data in meta["placements"].items()}
        # checkpoints of earlier versions have neither
        meta["loads"] = {int(layer): load for layer, load in meta.get("loads", {}).items()}
        return {"files": {}, **meta, "iteration": int(meta["iteration"])}
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged checkpoint: {error!r}; remove {path} to resume from the one before"
        ) from None


def read_meta_of(path: Path, config: RunConfig) -> dict:
    """As `read_meta`; raises ValueError, too, when the checkpoint is of another model, batch size or seed than `config`'s."""
    meta, mine = read_meta(path), json.loads(json.dumps(to_dict(config)))  # lists as in the file
    for section, keys in (("model", None), ("workload", ("global_batch_size", "seed"))):
        for key in keys or mine[section]:
            saved = meta["config"][section].get(key)
            if key != "name" and saved != mine[section][key]:
                raise ValueError(f"{path}: was written with {section}.{key} = {saved}, not {mine[section][key]}")
    return meta


def restore(path: Path, optimizer: MixedAdamW, placements: dict[int, Placement]) -> None:
    """Fill masters, moments and parameters from the checkpoint at `path`.

    placements: the current placement of this rank's MoE layers, which need not be the saved one. Collective over the
    world. Raises ValueError when the checkpoint lacks a parameter or has it in another shape.
    """
    _load(path, _logical_state(optimizer, placements), _SafeReader(path), no_dist=not dist.is_initialized())
    meta = read_meta(path)
    optimizer.set_scalars(meta, meta["config"]["workload"]["dtype"])
    optimizer.refresh_params()


def _load(path: Path, state: dict, reader: _SafeReader, no_dist: bool) -> None:
    try:
        with _alone_on_purpose():
            dcp.load(state, storage_reader=reader, no_dist=no_dist)
    except (dcp.api.CheckpointException, RuntimeError, OSError, KeyError, ValueError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
        raise ValueError(f"{path}: this checkpoint is damaged or of another model: {cause}") from error


def export(path: Path, out: Path, with_optimizer: bool = False) -> dict[str, int]:
    """Write a checkpoint as one file that plain torch reads: torch.load(out, weights_only=True).

    The file holds {"iteration": int, "config": dict, "model": {name: fp32 tensor}}, and with_optimizer "exp_avg" and
    "exp_avg_sq" like "model". Experts are stacked along dim 0 in logical order, whatever the placement was.
    Needs no process group; all of it must fit in memory. Returns {"tensors", "experts", "bytes"}. Raises ValueError when
    the checkpoint is damaged.
    """
    problem = _damage(path)
    if problem:
        raise ValueError(f"{path}: {problem}")
    meta, reader = read_meta(path), _SafeReader(path)
    sizes = {key: value.size for key, value in reader.read_metadata().state_dict_metadata.items()}
    kinds = {"master": "model", **({"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"} if with_optimizer else {})}
    wanted = {key: torch.empty(size) for key, size in sizes.items() if key.split(".", 1)[0] in kinds}
    _load(path, wanted, reader, no_dist=True)
    file: dict = {"iteration": meta["iteration"], "config": meta["config"]}
    experts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for key, tensor in wanted.items():
        kind, name = key.split(".", 1)
        stem, _, last = name.rpartition(".")
        if last.isdigit():  # parameters are not called by numbers, experts are
            experts.setdefault((kinds[kind], stem), {})[int(last)] = tensor
        else:
            file.setdefault(kinds[kind], {})[name] = tensor
    for (kind, name), by_expert in experts.items():
        file.setdefault(kind, {})[name] = torch.stack([by_expert[expert] for expert in range(len(by_expert))])
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        torch.save(file, scratch)
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
    num_experts = max((len(by_expert) for by_expert in experts.values()), default=0)
    return {"tensors": len(file["model"]), "experts": num_experts, "bytes": out.stat().st_size}


def _logical_state(optimizer: MixedAdamW, placements: dict[int, Placement]) -> dict[str, torch.Tensor]:
    """Name -> tensor that shares memory with the optimizer's state; every expert is an entry of its own. A part of a
    parameter is a DTensor, which says where in the whole it belongs."""
    state: dict[str, torch.Tensor] = {}
    for idx, (ref, share) in enumerate(zip(optimizer.buffers.refs, optimizer.buffers.shares, strict=True)):
        for kind, tensor in optimizer.state_tensors(idx).items():
            if ref.kind == "expert":
                placement = placements[layer_of(ref.name)]
                first = optimizer.mesh.ep_rank * placement.slots_per_rank
                for slot in range(placement.slots_per_rank):
                    expert = placement.expert_of_slot[first + slot]
                    if expert != EMPTY:
                        one = _describe(tensor[slot], ref, share, optimizer.mesh, ref.local.shape[1:])
                        state[f"{kind}.{ref.name}.{expert}"] = one
            else:
                state[f"{kind}.{ref.name}"] = _describe(tensor, ref, share, optimizer.mesh, ref.local.shape)
    return state


def _describe(tensor: torch.Tensor, ref: ParamRef, share: Share, mesh: Mesh, shape: torch.Size) -> torch.Tensor:
    """This rank's `tensor` as what it is of the parameter, which has `shape` on one rank (of one expert)."""
    if ref.kind == "tensor":
        sliced = ref.param.sliced_dim
        shape = torch.Size(size * mesh.plan.tp if dim == sliced else size for dim, size in enumerate(shape))
        if share.num == 1:
            return DTensor.from_local(tensor, mesh.tp_mesh, [Shard(sliced)], run_check=False)
        layout = [Shard(cut_dim(ref)), Shard(sliced)]
    elif share.num == 1:
        return tensor
    else:
        layout = [Shard(0)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh.share_mesh[ref.kind], layout, run_check=False, shape=shape, stride=stride)


class _Writer(dcp.FileSystemWriter):
    """Leaves out the directory's name, which is of no use to a checkpoint that will be renamed."""

    def storage_meta(self):
        return None


class _SafeReader(dcp.FileSystemReader):
    """Reads metadata with an unpickler that knows only the classes a tensor checkpoint consists of, so that a hostile
    file can run nothing, and refuses file names that lead outside the checkpoint."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
                raise ValueError(f"{path}: damaged or foreign checkpoint metadata: {error}") from None
        if any(Path(info.relative_path).name != info.relative_path for info in metadata.storage_data.values()):
            raise ValueError(f"{path}: names a file outside the checkpoint's directory")
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                     "StorageMeta", "_MEM_FORMAT_ENCODING")
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch", "strided"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)
