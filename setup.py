"""Build script: the CUDA extension `smartmoe._C` when nvcc and a CUDA build of torch are there, pure Python otherwise.

    pip install --no-build-isolation .        # the torch of this environment; without the flag pip hides it
    python setup.py build_ext --inplace       # beside the sources

TORCH_CUDA_ARCH_LIST names the GPUs to build for; by default compute capability 8.0 and 9.0, and PTX for newer ones. 9.0 is
built as 9.0a, which every such GPU runs: its instructions are what the extension multiplies rows and experts with.
SMARTMOE_CUDA=0 leaves the extension out, SMARTMOE_CUDA=1 makes it an error when it cannot be built.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

SOURCES = Path("src/csrc")
DEFAULT_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
FIRST_CUDA = (12, 8)


def targets_of(arch_list: str) -> tuple[str, ...]:
    """What nvcc is to build for, from TORCH_CUDA_ARCH_LIST; none when torch is to read it (names, or nothing of 9.0)."""
    if not arch_list:
        return DEFAULT_TARGETS
    found = [re.fullmatch(r"(\d+)\.(\d+a?)(\+PTX)?", entry) for entry in re.split(r"[;\s]+", arch_list.strip())]
    targets = []
    for major, minor, ptx in (match.groups() for match in found if match):
        code = "90a" if (major, minor) == ("9", "0") else major + minor
        targets += [f"arch=compute_{code},code=sm_{code}"]
        targets += [f"arch=compute_{major}{minor},code=compute_{major}{minor}"] if ptx else []
    return tuple(targets) if all(found) and any("90a" in target for target in targets) else ()


def why_not() -> str:
    """Why the extension cannot be built here; empty when it can."""
    if os.environ.get("SMARTMOE_CUDA") == "0":
        return "SMARTMOE_CUDA=0"
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return "torch is not installed in the build environment (pip install --no-build-isolation . uses yours)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = CUDA_HOME and Path(CUDA_HOME) / "bin" / "nvcc"
    if not nvcc or not nvcc.exists():
        return "nvcc was not found (set CUDA_HOME)"
    version = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    have = tuple(int(part) for part in version.groups()) if version else (0, 0)
    if have < FIRST_CUDA:
        return f"{nvcc} is CUDA {have[0]}.{have[1]}, the extension needs {FIRST_CUDA[0]}.{FIRST_CUDA[1]} or newer"
    if str(have[0]) != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is CUDA {have[0]}.{have[1]}, but torch is built for CUDA {torch.version.cuda}"
    return ""


def extension() -> dict:
    """The arguments of setup() for the extension, none when it cannot be built."""
    reason = why_not()
    if reason:
        print(f"smartmoe: building without the CUDA extension: {reason}", file=sys.stderr)
        if os.environ.get("SMARTMOE_CUDA") == "1":
            raise SystemExit("smartmoe: SMARTMOE_CUDA=1 asks for the extension")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    targets = [f"-gencode={target}" for target in targets_of(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))]
    sources = sorted(str(path) for path in [*SOURCES.glob("kernels/*.cu"), *SOURCES.glob("bindings/*.cpp")])
    flags = {"cxx": ["-O3"], "nvcc": ["-O3", *targets]}
    return {
        "ext_modules": [CUDAExtension("smartmoe._C", sources, extra_compile_args=flags)],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(**extension())
