"""Checkpoints in logical order: any world size, plan and placement can read what another one wrote.

A checkpoint holds fp32 masters and Adam moments by name, each expert under its logical index, written with
torch.distributed.checkpoint; beside it `meta.json` has the iteration, the loss scale, the placements and the complete
configuration. It is written to a scratch directory and renamed when complete, so a kill leaves the last good one.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard

from smartmoe import record
from smartmoe.optimizer import MixedAdamW, layer_of
from smartmoe.placement import Placement

_PREFIX = "iter_"


def save(folder: Path, iteration: int, optimizer: MixedAdamW, placements: dict[int, Placement], facts: dict) -> Path:
    """Write checkpoint `iteration` under `folder` and return its directory.

    placements: layer_idx -> Placement of this rank's MoE layers. facts: JSON-ready values saved as they are.
    Collective over the world. Raises OSError (for example a full disk) without harming earlier checkpoints.
    """
    target, scratch = folder / f"{_PREFIX}{iteration:07d}", folder / f".{_PREFIX}{iteration:07d}.partial"
    is_coordinator = optimizer.mesh.world_rank == 0
    if is_coordinator:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    _barrier()
    dcp.save(_logical_state(optimizer, placements), storage_writer=_Writer(scratch), no_dist=not dist.is_initialized())
    gathered: list = [placements]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, placements)
    if is_coordinator:
        merged = {str(layer): placement.to_dict() for part in gathered for layer, placement in part.items()}
        meta = {"iteration": iteration, "placements": merged, **optimizer.scalars(), **facts}
        record.write_json(scratch / "meta.json", meta)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    _barrier()
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    complete = sorted(path.parent for path in folder.glob(f"{_PREFIX}*/meta.json"))
    return complete[-1] if complete else None


def read_meta(path: Path) -> dict:
    """The facts beside a checkpoint. Raises ValueError naming the file when it is damaged."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        meta["placements"] = {int(layer): Placement.from_dict(data) for layer, data in meta["placements"].items()}
        return {**meta, "iteration": int(meta["iteration"])}
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged checkpoint: {error!r}; remove {path} to resume from the one before"
        ) from None


def restore(path: Path, optimizer: MixedAdamW, placements: dict[int, Placement]) -> None:
    """Fill masters, moments and parameters from the checkpoint at `path`.

    placements: the current placement of this rank's MoE layers, which need not be the saved one. Collective over the
    world. Raises ValueError when the checkpoint lacks a parameter or has it in another shape.
    """
    state = _logical_state(optimizer, placements)
    try:
        dcp.load(state, storage_reader=_SafeReader(path), no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, RuntimeError, OSError, KeyError, ValueError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
        raise ValueError(f"{path}: this checkpoint is damaged or of another model: {cause}") from error
    meta = read_meta(path)
    optimizer.set_scalars(meta)
    optimizer.refresh_params()


def _logical_state(optimizer: MixedAdamW, placements: dict[int, Placement]) -> dict[str, torch.Tensor]:
    """Name -> tensor that shares memory with the optimizer's state; every expert is an entry of its own."""
    state: dict[str, torch.Tensor] = {}
    for idx, ref in enumerate(optimizer.buffers.refs):
        for kind, tensor in optimizer.state_tensors(idx).items():
            if ref.kind == "expert":
                placement = placements[layer_of(ref.name)]
                first = optimizer.mesh.ep_rank * placement.slots_per_rank
                for slot in range(placement.slots_per_rank):
                    expert = placement.expert_of_slot[first + slot]
                    if expert >= 0:
                        state[f"{kind}.{ref.name}.{expert}"] = tensor[slot]
            elif ref.kind == "tensor":
                layout = [Shard(ref.param.sliced_dim)]
                state[f"{kind}.{ref.name}"] = DTensor.from_local(
                    tensor, optimizer.mesh.tp_mesh, layout, run_check=False
                )
            else:
                state[f"{kind}.{ref.name}"] = tensor
    return state


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


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
