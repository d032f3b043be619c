"""The house rules that a machine can hold: layers, torch-free modules, groups, environment, file length."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "smartmoe"
FMOE = sorted((ROOT / "src" / "fmoe").rglob("*.py"))
FMOE_LAYER = 5  # imports what is below, and nobody imports it
LAYERS = {
    "config": 0, "swin_sizes": 0, "placement": 0, "solvers": 0, "policy": 0, "trace_synthetic": 0, "trace": 0, "record": 0,
    "planner": 1, "mesh": 1, "slow_links": 1, "slow_links_kernel": 1, "systems": 1, "controller": 1, "load_map": 1,
    "ops": 2,
    "gates": 3, "dispatch": 3,
    "layer": 4, "held_experts": 4, "replicas": 4, "migrate": 4, "observe": 4, "online": 4, "own_loop": 4, "parallel": 4,
    "timing": 4,
    "blocks": 5, "gpt": 5, "swin": 5,
    "data": 5, "images": 5, "samples": 5, "models": 5, "optimizer": 5, "checkpoint": 5, "graphs": 5,
    "trainer": 6, "run_log": 6, "train": 6, "bench": 6, "hosts": 6, "run_numbers": 6, "report": 6,
    "cli": 7, "sequence": 7, "__main__": 8,
}  # fmt: skip
TORCH_FREE = {
    "config", "swin_sizes", "placement", "solvers", "policy", "controller", "trace_synthetic", "trace", "record", "planner",
    "systems", "load_map", "images", "samples",
}  # fmt: skip
ENTRY_POINTS = {"train", "bench", "hosts", "cli", "sequence"}
# Steps inside one layer, for instance placement -> solvers -> policy.
SAME_LAYER = {
    ("config", "swin_sizes"), ("images", "data"), ("samples", "data"), ("samples", "images"), ("models", "gpt"),
    ("gpt", "blocks"), ("swin", "blocks"),
    ("models", "swin"), ("models", "images"), ("layer", "replicas"), ("layer", "held_experts"), ("held_experts", "replicas"),
    ("slow_links", "slow_links_kernel"),
    ("solvers", "placement"), ("policy", "placement"), ("policy", "solvers"), ("trace", "trace_synthetic"),
    ("own_loop", "layer"), ("own_loop", "replicas"), ("online", "migrate"), ("online", "observe"), ("online", "timing"),
    ("online", "replicas"), ("checkpoint", "optimizer"), ("train", "trainer"), ("bench", "train"), ("bench", "trainer"),
    ("hosts", "train"), ("hosts", "trainer"), ("run_log", "trainer"), ("train", "run_log"), ("hosts", "run_log"),
    ("report", "run_numbers"),
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = sorted(path for top in ("src", "scripts", "plotting", "tests") for path in (ROOT / top).rglob("*.py"))


def unit_of(path: Path) -> str:
    """Top-level module or folder of the package that `path` belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_units(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported_names(path)]
    return {part[1] for part in parts if part[0] == "smartmoe" and len(part) > 1 and part[1] in LAYERS}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(path):
    unit = unit_of(path)
    if not unit:
        return
    assert unit in LAYERS, f"{path}: give {unit} a layer in this test and in the README"
    for other in imported_units(path) - {unit}:
        allowed = LAYERS[other] < LAYERS[unit] or (unit, other) in SAME_LAYER
        assert allowed, f"{path}: {unit} (layer {LAYERS[unit]}) imports {other} (layer {LAYERS[other]})"


@pytest.mark.parametrize("path", FMOE, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_fastmoes_interface_stands_on_the_layer(path):
    assert not [unit for unit in imported_units(path) if LAYERS[unit] >= FMOE_LAYER]
    source = path.read_text()
    assert "new_group(" not in source and ("os.environ" not in source or path.parts[-2:] == ("fastermoe", "config.py"))


def test_the_library_does_not_need_fastmoes_interface():
    for path in MODULES:
        assert not [name for name in imported_names(path) if name.split(".")[0] == "fmoe"], path


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) in TORCH_FREE], ids=lambda path: path.name)
def test_planning_and_records_never_import_torch(path):
    assert not [name for name in imported_names(path) if name.split(".")[0] == "torch"]


def test_only_the_mesh_makes_process_groups():
    for path in MODULES:
        source = path.read_text()
        if unit_of(path) != "mesh":
            assert "new_group(" not in source and "init_device_mesh" not in source, path


def test_the_environment_is_read_in_entry_points_only():
    for path in MODULES:
        if unit_of(path) not in ENTRY_POINTS:
            assert "os.environ" not in path.read_text() and "os.getenv" not in path.read_text(), path


def test_the_library_never_mentions_a_figure_number():
    for path in MODULES:
        for figure in range(8, 14):
            assert f"fig{figure}" not in path.read_text(), path


def test_plotting_imports_neither_torch_nor_the_library():
    for path in (ROOT / "plotting").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_names(path)}
        assert not roots & {"torch", "smartmoe"}, path


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600


def test_files_of_tests_have_names_of_their_own():
    """The folders of tests are no packages, so pytest refuses the second file of a name, but only where both are run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 100 and len(set(names)) == len(names)
