"""Finding what can be drawn: published tables, raw artifact logs or measured run-sets, told apart by their content."""

from __future__ import annotations

from pathlib import Path

from plotting import judge, published, runset, tables
from plotting.files import Folder, clean, file_stem
from plotting.model import Dataset, Finding
from plotting.runs import find_run_files

PUBLISHED_TITLE = "published: SmartMoE, ATC'23 artifact"


def load_default(logs: Path) -> list[Dataset]:
    """The published tables (unnamed) and every run-set in a sub-directory of `logs` (named after it)."""
    datasets, taken = [], set()
    for path in sorted(p for p in logs.iterdir() if p.is_dir() or p.is_symlink()):
        folder = Folder(path, [])
        if path.is_symlink():
            folder.report(
                "link-refused", "a symbolic link is not a run-set of this repository; it is not read", clean(path.name)
            )
            datasets.append(Dataset("", "", "refused", findings=folder.findings))
        elif tables.is_tables(path):
            datasets.insert(0, _from_tables(folder, ""))
        elif find_run_files(folder):
            datasets.append(runset.to_dataset(folder, unused(file_stem(path.name), taken)))
    return datasets


def load_directories(roots: list[Path]) -> list[Dataset]:
    """One data set for each directory, drawn alone: unnamed when there is one directory, else named after each."""
    datasets, taken = [], set()
    for root in roots:
        if any(tables.is_tables(p) for p in root.iterdir() if p.is_dir()):
            datasets += load_default(root)  # a logs directory such as this repository's own
            continue
        name = "" if len(roots) == 1 else unused(file_stem(root.resolve().name), taken)
        datasets.append(load_directory(root, name))
    return datasets


def load_directory(root: Path, name: str = "") -> Dataset:
    """What is below one directory: tables, run directories (run.json) or else raw artifact logs."""
    folder = Folder(root, [])
    if tables.is_tables(root):
        return _from_tables(folder, name)
    if find_run_files(folder):
        return runset.to_dataset(folder, name)
    rows = published.read_raw(folder)
    data = judge.to_dataset(rows, folder.findings, name, PUBLISHED_TITLE)
    if not rows:
        data.findings.append(
            Finding("nothing", "neither a run.json nor a log of the published artifact was found", [folder.label])
        )
    return data


def _from_tables(folder: Folder, name: str) -> Dataset:
    return judge.to_dataset(tables.read_tables(folder), folder.findings, name, PUBLISHED_TITLE)


def unused(name: str, taken: set[str]) -> str:
    """`name`, or name-2, name-3 ... when it is taken (file systems may ignore case)."""
    result, n = name, 1
    while result.lower() in taken:
        n += 1
        result = f"{name}-{n}"
    taken.add(result.lower())
    return result
