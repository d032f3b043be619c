"""What the planner's commands are given, by name or by file: models, clusters with a profile or rates, traces.

A name is looked up in a folder laid out as scripts/ of the repository: models.toml and clusters/<name>.toml. Every function
raises ValueError saying what is missing and how to get it.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, RunConfig, from_dict, read_table
from smartmoe.planner import described, loads
from smartmoe.planner.loads import Loads
from smartmoe.planner.primitives import Primitives, Profile
from smartmoe.trace import read_trace


def default_folder() -> Path:
    """Where names are looked up unless told otherwise: scripts/ here, or that of the repository this code lies in."""
    here, own = Path("scripts"), Path(__file__).resolve().parents[3] / "scripts"
    return own if not (here / "models.toml").exists() and (own / "models.toml").exists() else here


def read_model(text: str, folder: Path) -> RunConfig:
    """A run with the model of that name in folder/models.toml, or the run that a .toml or .json file describes."""
    if text.endswith((".toml", ".json")):
        return from_dict(RunConfig, read_table(text), text)
    path = folder / "models.toml"
    tables = read_table(path)
    if text not in tables:
        near = difflib.get_close_matches(text, tables, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(tables)}"
        raise ValueError(f'unknown model "{text}" in {path}{hint}')
    return RunConfig(model=from_dict(ModelConfig, {"name": text, **tables[text]}, f"{path}: [{text}]"))


def refuse_swin(model: ModelConfig) -> None:
    """Raise ValueError for a Swin transformer: what its blocks of different sizes cost is not modelled."""
    if model.swin is not None:
        raise ValueError(
            f"{model.name} is a Swin transformer, which is not planned: its plans are dp = all ranks, ep any divisor; "
            f"time each with `python -m smartmoe.bench.train_step --model {model.name} --plan dp2-ep1 ..`"
        )


def read_cluster(text: str, folder: Path) -> tuple[ClusterSpec, described.Rates | None, Path]:
    """(cluster, its [rates] or None, its file) of a name in folder/clusters, or of a .toml file."""
    path = Path(text) if text.endswith(".toml") else folder / "clusters" / f"{text}.toml"
    if not path.exists():
        known = sorted(p.stem for p in (folder / "clusters").glob("*.toml"))
        near = difflib.get_close_matches(text, known, n=1)
        there = ", ".join(known) or "none; --configs names another folder, the repository's is scripts"
        hint = f'did you mean "{near[0]}"?' if near else f"known in {folder}/clusters: {there}"
        raise ValueError(f'unknown cluster "{text}"; {hint}')
    table = dict(read_table(path))
    rates = table.pop("rates", None)
    for launching in ("slurm", "machine"):  # how runs are started, which plans do not depend on
        table.pop(launching, None)
    cluster = from_dict(ClusterSpec, {"name": path.stem, **table}, str(path))
    return cluster, None if rates is None else from_dict(described.Rates, rates, f"{path}: rates"), path


def profile_path(cluster_file: Path) -> Path:
    """Where a cluster's profile is looked for: beside its file."""
    return cluster_file.with_name(f"{cluster_file.stem}.profile.json")


def read_primitives(
    cluster: ClusterSpec, rates: described.Rates | None, cluster_file: Path, profile: Path | None, dtype: str
) -> Primitives:
    """A measured profile when one is named or lies beside the cluster's file, else the described rates.

    What crosses nodes comes from the cluster's inter_node_gbytes_per_s in either case: a profile is of one node.
    """
    found = profile or profile_path(cluster_file)
    if profile is None and not found.exists():
        if rates is None:
            raise ValueError(
                f"cluster {cluster.name} has neither a profile nor [rates]: measure it with `smartmoe profile --ranks N "
                f"--out {found}`, or describe it in {cluster_file}"
            )
        return described.describe(cluster, rates, dtype)
    measured = Profile.load(found)
    if measured.dtype != dtype:
        raise ValueError(
            f"{found} was measured in {measured.dtype}, the plan is for {dtype}: profile with --dtype {dtype}"
        )
    check_links(measured, cluster, found)
    rates = rates or described.Rates()
    inter_ms = 1 / (cluster.inter_node_gbytes_per_s * rates.link_efficiency)
    return Primitives.fit(measured).with_links(inter_ms, rates.inter_latency_us / 1e3)


def check_links(profile: Profile, cluster: ClusterSpec, path: Path) -> None:
    """Raise ValueError when `profile`, of file `path`, was measured with other links than `cluster` says."""
    measured, wanted = profile.facts.get("slow_links_gbytes_per_s", 0.0), cluster.slow_links_gbytes_per_s
    if measured != wanted:
        words = [f"links slowed to {rate:g} GB/s" if rate else "links as they are" for rate in (measured, wanted)]
        raise ValueError(
            f"{path} was measured with {words[0]}, this is about {words[1]}: take another --profile, or make one with "
            f"smartmoe profile{f' --slow-links {wanted:g}' if wanted else ''}"
        )


def read_loads(trace: str, model: ModelConfig, num_samples: int | None = None) -> Loads:
    """The loads of a trace, by any of the names that `smartmoe.trace.read_trace` takes; a synthetic one is for `model`."""
    try:
        found = read_trace(trace, experts=model.num_experts, layers=max(1, loads.num_moe_layers(model)))
        return loads.from_trace(found, model, num_samples)
    except ValueError as error:
        raise ValueError(f"--trace {trace}: {str(error).removeprefix(f'{trace}: ')}") from None


def choose_loads(model: ModelConfig, gate: GateConfig, trace: str | None, kind: str, num_samples: int) -> Loads:
    """Loads for a search: of a trace, else uniform (kind "uniform") or the prior of the gate ("prior")."""
    if trace is not None:
        return read_loads(trace, model, num_samples).limited(gate.capacity).mean_over_micro_batches()
    return loads.uniform(model) if kind == "uniform" else loads.zipf(model, gate, num_samples)


def to_toml(config: RunConfig) -> str:
    """`config` as a TOML file that `smartmoe train` takes; empty values are left out."""
    lines, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
            rows = [f"{key} = {_toml_value(v)}" for key, v in rows if v is not None and v != ()]
            tables.append("\n".join([f"[{field.name}]", *rows]))
        else:
            lines.append(f"{field.name} = {_toml_value(value)}")
    return "\n\n".join(["\n".join(lines), *tables]) + "\n"


def _toml_value(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
