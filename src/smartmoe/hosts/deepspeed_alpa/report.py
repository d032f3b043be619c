"""What a run leaves: one JSON file with everything, and a row of the artifact's TSV. Never imports torch."""

from __future__ import annotations

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

from smartmoe.hosts.deepspeed_alpa.options import TSV_NAME
from smartmoe.hosts.deepspeed_alpa.suites import Case, parameter_count, tflops


def summarise(case: Case, seconds: list[float]) -> dict:
    """Median seconds of an iteration and what follows from them. seconds: one for each measured iteration, of the slowest
    rank."""
    median = statistics.median(seconds)
    return {
        "seconds_per_iteration": median,
        "tokens_per_s": case.tokens / median,
        "tflops_per_gpu": tflops(case, median),
        "parameters": parameter_count(case.model),
        "group_size": case.group_size,
    }


def tsv_row(result: dict, timestamp: float) -> str:
    """One line of the artifact's table: exp_name, instance, num_hosts, num_devices_per_host, model_name, method, value,
    time_stamp.

    The value is a Python dict literal. `tflops` counts as the artifact does; both of its names for the number of
    parameters (billions) are there. Devices of a host are right for 8 GPUs, too, where the artifact wrote 0.
    """
    summary, case = result["summary"], result["case"]
    rates, billions = summary["tflops_per_gpu"], summary["parameters"] / 1e9
    per_host = min(case["num_gpus"], result["options"]["gpus_per_node"])
    value = {
        "tflops": rates["artifact"], "tflops_alpa": rates["alpa"], "tflops_useful": rates["useful"],
        "param_count": billions, "parameter_count": billions,
        "seconds": summary["seconds_per_iteration"], "tokens_per_s": summary["tokens_per_s"],
        "group_size": summary["group_size"], "zero": result["options"]["zero"], "ep": case["ep"],
        "precision": result["options"]["precision"], "captured": result["captured"],
        "deepspeed": result["versions"].get("deepspeed", ""),
    }  # fmt: skip
    instance = result["device"].replace("\t", " ")
    words = ("e2e", instance, case["num_gpus"] // per_host, per_host, "moe", result["backend"], value, timestamp)
    return "\t".join(map(str, words)) + "\n"


def write(result: dict, out: str | Path) -> Path:
    """Append the row to the table under `out` and write the JSON file; returns the file's path."""
    out, now = Path(out), datetime.now(UTC)
    out.mkdir(parents=True, exist_ok=True)
    case, options = result["case"], result["options"]
    name = f"{case['model']['name']}-{case['num_gpus']}gpu-{result['backend']}-zero{options['zero']}-ep{case['ep']}"
    path = out / f"{name}-{now:%Y%m%dT%H%M%S%f}.json"
    path.write_text(json.dumps({"time": now.isoformat(), **result}, indent=1) + "\n", encoding="utf-8")
    with (out / TSV_NAME).open("a", encoding="utf-8") as file:
        file.write(tsv_row(result, now.timestamp()))
    return path


def describe(result: dict) -> str:
    """A few lines for people: time first, FLOPs in three counts last."""
    summary, memory = result["summary"], max(result["peak_memory_bytes"])
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in summary["tflops_per_gpu"].items())
    return (
        f"{result['case']['model']['name']} on {result['case']['num_gpus']} x {result['device']}, {result['backend']}"
        f"{', blocks from CUDA graphs' * result['captured']}: "
        f"{summary['seconds_per_iteration']:.4g} s an iteration (median of {len(result['seconds'])}), "
        f"{summary['tokens_per_s']:,.0f} tokens/s\n  TFLOP/s a GPU: {rates}; peak memory {memory / 2**30:.1f} GiB; "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
    )


def compare(results: list[dict]) -> str:
    """What switching the back end gives, when both ran."""
    speed = {result["backend"]: result["summary"]["tokens_per_s"] for result in results}
    if len(speed) < 2:
        return ""
    return f"tokens/s with SmartMoE's layer over DeepSpeed's: {speed['smartmoe'] / speed['deepspeed']:.3f}"
