"""The CUDA sources compile, the tables of names agree, and the build says why when there is nothing to build with."""

import functools
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "csrc"
NVCC = shutil.which("nvcc")
KERNELS = sorted((SOURCES / "kernels").glob("*.cu"))
# V100 and T4 where the toolkit still knows them, then the two that the extension is built for
TARGETS = ("70", "75", "80", "90")


def known_targets() -> list[str]:
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [target for target in TARGETS if f"compute_{target}" in listed]


@functools.cache
def without_optimisation() -> str:
    """The option with which nvcc takes about half the time; before 12.9 only assembling could be hurried."""
    options = subprocess.run([NVCC, "--help"], capture_output=True, text=True, check=True).stdout
    return "--Ofast-compile=max" if "--Ofast-compile" in options else "-Xptxas=-O0"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_a_kernel_file_compiles(source, tmp_path):
    # what only one generation has is left out of the code for the others
    special = ["90a"] if "hopper.cuh" in source.read_text() else []
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in (*known_targets(), *special)]
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"} <= set(targets)
    options = ["-std=c++17", without_optimisation(), "-Werror=all-warnings"]
    command = [NVCC, *options, *targets, "-c", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_include_no_torch_header():
    for path in sorted((SOURCES / "kernels").iterdir()):
        includes = re.findall(r"#include [<\"]([^>\"]+)", path.read_text())
        assert not [name for name in includes if name.split("/")[0] in ("torch", "ATen", "c10", "pybind11")], path


def test_the_table_of_the_extension_names_what_the_bindings_declare():
    table = re.findall(r'm\.def\("(\w+)", &b::(\w+)\);', (SOURCES / "bindings" / "pybind.cpp").read_text())
    header = (SOURCES / "bindings" / "bindings.h").read_text()
    declared = re.findall(r"^(?:Tensor|void|std::tuple<[^>]+>) (\w+)\(", header, re.M)
    assert [name for name, _ in table] == [function for _, function in table] == declared
    used = {
        name
        for path in (ROOT / "src" / "smartmoe" / "ops").glob("*.py")
        if re.search("kernels_for|products_for", text := path.read_text())  # others have kernels in Triton
        for name in re.findall(r"\bkernels\.(\w+)\(", text)
    }
    assert used == set(declared)


def test_the_build_without_cuda_says_why_and_goes_on(tmp_path):
    done = build(tmp_path, SMARTMOE_CUDA="0")
    assert done.returncode == 0 and "building without the CUDA extension: SMARTMOE_CUDA=0" in done.stderr


def test_the_build_asked_for_the_extension_fails_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('hidden by the test')")
    done = build(tmp_path, SMARTMOE_CUDA="1", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0 and "torch is not installed in the build environment" in done.stderr


def test_9_0_is_built_with_the_instructions_of_9_0a(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setenv("SMARTMOE_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    targets_of = runpy.run_path(str(ROOT / "setup.py"))["targets_of"]
    hopper = "arch=compute_90a,code=sm_90a"
    assert hopper in targets_of("") and targets_of("9.0") == targets_of("9.0a") == (hopper,)
    assert targets_of("8.0 9.0+PTX") == ("arch=compute_80,code=sm_80", hopper, "arch=compute_90,code=compute_90")
    assert targets_of("8.0;8.6") == targets_of("Hopper") == targets_of("9.0;Ampere") == ()


def build(tmp_path, **environment):
    """Ask setup.py for the package's name: it decides on the extension, and builds nothing."""
    pytest.importorskip("setuptools")
    command = [sys.executable, str(ROOT / "setup.py"), "--name"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PATH": str(tmp_path), **environment})
