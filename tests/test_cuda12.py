"""The device code of every kernel file compiles for a V100 with CUDA 12, which newer toolkits no longer do.

NVRTC comes as a wheel, nvcc 12 does not: pip install nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-runtime-cu12==12.8.90
nvidia-cuda-cccl-cu12==12.8.90. It knows no host code, so the launchers are compiled as device code, which may launch
kernels, too.
"""

import ctypes
import importlib.util
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[1] / "src" / "csrc" / "kernels").glob("*.cu"))
WHEELS = ("nvidia.cuda_nvrtc", "nvidia.cuda_runtime", "nvidia.cuda_cccl")
# What a host compiler would bring, and those parts of the runtime that device code has not.
HEADERS = {
    "stdlib.h": "",
    "stdint.h": "#pragma once\n#include <cuda/std/cstdint>\nusing namespace cuda::std;\n",
    "cstdint": "#include <stdint.h>\n",
    "type_traits": "#pragma once\n#include <cuda/std/type_traits>\nnamespace std { using namespace cuda::std; }\n",
}
HOST_ONLY = """#include <cuda_runtime.h>
template <class... A> cudaError_t cudaGetDriverEntryPointByVersion(A...) { return cudaErrorNotSupported; }
template <class... A> cudaError_t cudaFuncSetAttribute(A...) { return cudaErrorNotSupported; }
template <class K> static __inline__ __device__ cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, K*) {
  return cudaErrorNotSupported;
}
#line 1
"""


def _folder(name):
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    return Path(spec.submodule_search_locations[0]) if spec else None


@pytest.fixture(scope="module")
def nvrtc():
    """(library, its include folders)."""
    folders = [_folder(name) for name in WHEELS]
    if not all(folders):
        pytest.skip("needs the CUDA 12 wheels that the head of this file names")
    return ctypes.CDLL(str(folders[0] / "lib" / "libnvrtc.so.12")), [folder / "include" for folder in folders[1:]]


def compile_for(nvrtc, path: Path, source: str, target: str) -> tuple[int, str]:
    """NVRTC's return code, 0 = compiled and assembled, and its log."""
    library, includes = nvrtc
    strings = lambda texts: (ctypes.c_char_p * len(texts))(*(str(text).encode() for text in texts))  # noqa: E731
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = strings(list(HEADERS.values())), strings(list(HEADERS))
    create = library.nvrtcCreateProgram
    assert create(ctypes.byref(program), source.encode(), str(path).encode(), len(HEADERS), *headers) == 0
    options = [f"--gpu-architecture=sm_{target}", "--std=c++17", "-default-device", "-rdc=true", "--ptxas-options=-O0"]
    options += [f"-I{folder}" for folder in (path.parent, *includes)]
    code = library.nvrtcCompileProgram(program, len(options), strings(options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_kernel_file_compiles_for_a_v100(nvrtc, path):
    # a launcher may keep what it looked up; device code has no such variables
    source = HOST_ONLY + path.read_text().replace("  static const ", "  const ")
    code, log = compile_for(nvrtc, path, source, "70")
    assert code == 0, log


def test_what_a_v100_lacks_is_seen(nvrtc):
    source = '__global__ void wait() { asm volatile("cp.async.wait_all;"); }'
    assert compile_for(nvrtc, KERNELS[0], source, "80")[0] == 0
    assert compile_for(nvrtc, KERNELS[0], source, "70")[0] != 0
