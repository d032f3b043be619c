"""The CUDA extension, and which path an operation takes on which device."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType

import torch

try:
    from smartmoe import _C

    _MISSING = ""
except ImportError as error:
    _C, _MISSING = None, str(error)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Path:
    """How the experts are computed. gemm: "grouped" (one grouped product, counts stay on the device) or "loop" (one
    product for each slot, reads the counts on the host). kernels: "extension" or "torch" for everything around it."""

    gemm: str
    kernels: str
    reason: str


def choose_path(capability: tuple[int, int] | None, dtype: torch.dtype, have_extension: bool) -> Path:
    """Choose for a device of this compute capability, None = a CPU. Pure.

    torch's grouped product stays on the device in bfloat16 on compute capability 9.x and 10.x; elsewhere it would loop
    over the groups and synchronise in every product, so that one loop of our own, with one synchronisation, is better.
    Raises ValueError for bfloat16 on a device without it (before 8.0, so V100 and T4).
    """
    if capability is None:
        return Path("grouped", "torch", "no CUDA device")
    name = f"compute capability {capability[0]}.{capability[1]}, {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        raise ValueError(f'{name}: this GPU has no bfloat16 arithmetic, take workload.dtype = "float16"')
    gemm = "grouped" if dtype == torch.bfloat16 and capability[0] in (9, 10) else "loop"
    kernels = "extension" if have_extension and dtype in KERNEL_DTYPES and capability >= (7, 0) else "torch"
    return Path(gemm, kernels, name)


@functools.cache
def have_triton() -> bool:
    """Whether kernels can be written in Triton, which comes with CUDA builds of torch."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether the extension holds code for this GPU; one small launch tells."""
    try:
        _C.count_slots(torch.zeros(1, 1, dtype=torch.int64, device=device), 1)
    except RuntimeError as error:
        name = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        _logger.warning("the CUDA extension does not run here, build it with TORCH_CUDA_ARCH_LIST=%s: %s", name, error)
        return False
    return True


@functools.cache
def _path_of(device: torch.device, dtype: torch.dtype) -> Path:
    if device.type != "cuda":
        return choose_path(None, dtype, False)
    path = choose_path(torch.cuda.get_device_capability(device), dtype, _C is not None and _runs_on(device))
    _logger.info("experts on %s: %s products, kernels of %s", path.reason, path.gemm, path.kernels)
    if _C is None:
        _logger.warning("the CUDA extension is not there, the layer takes about twice as long: %s", _MISSING)
    return path


def path_for(tensor: torch.Tensor) -> Path:
    """The path for a tensor's device and dtype; said once in the log for each of them."""
    return _path_of(tensor.device, tensor.dtype)


@functools.cache
def _can_multiply(device: torch.device) -> bool:
    kernels = _C
    # an extension that was built before it had products has no such question
    found = hasattr(kernels, "can_multiply") and bool(kernels.can_multiply(torch.empty(0, device=device)))
    if found:
        _logger.info("bfloat16 products of experts on %s: the extension's own", device)
    return found


def products_for(*factors: torch.Tensor | None) -> ModuleType | None:
    """The extension when it can multiply these (and add a bias, which may be None): bfloat16, contiguous, in rows of whole
    16 bytes, on a GPU of compute capability 9.0 that it was built for as 9.0a; else None."""
    first = factors[0]
    if not first.is_cuda or kernels_for(first) is None or not _can_multiply(first.device):
        return None
    fits = all(
        t.dtype == torch.bfloat16 and t.is_contiguous() and t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0
        for t in factors
        if t is not None
    )
    return _C if fits else None


def kernels_for(tensor: torch.Tensor, weight: torch.Tensor | None = None) -> ModuleType | None:
    """The extension when it can work on these: on CUDA, rows of a type it knows, combine weights float32; else None."""
    if _C is None or not tensor.is_cuda or tensor.dtype not in (*KERNEL_DTYPES, torch.int64):
        return None
    if weight is not None and weight.dtype != torch.float32:
        return None
    return _C if _runs_on(tensor.device) else None
