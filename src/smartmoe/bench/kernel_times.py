"""Where the time of a step goes on a GPU: its kernels by kind, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# The first kind whose pattern a kernel's name has. Names are those of torch, cuBLAS, CUTLASS, NCCL and this package.
KINDS = (
    ("exchange", r"nccl|(^|\b)(announce|spread|sum|meet|pull|return)_kernel"),
    ("attention", r"flash|fmha|sdpa|cudnn.*attention"),
    ("expert GEMM", r"grouped_gemm|GroupProblemShape|GroupMM|grouped_mm"),
    ("dense GEMM", r"gemm|nvjet|cutlass|xmma|gemv|splitK"),
    ("expert rows", r"(::|^|\b)(activate|activate_backward|add_bias|sum_pieces|sum_slots|permute|clear|gather|gather_sum"
     r"|combine_backward)_kernel"),
    ("routing", r"(count_chunks|count_slots|ends|place|slots|stack|plan)_kernel|topk|TopK|bitonic|[rR]adix|[sS]ort"),
    ("optimizer", r"Adam|multi_tensor_apply|update_kernel"),
    ("gradient sums", r"accumulate_kernel"),
    ("norm", r"layer_norm|LayerNorm|GammaBeta|cuCompute|norm_(forward|backward)_kernel"),
    ("softmax, loss", r"[sS]oft[mM]ax|nll_loss|cross_entropy|loss_(forward|backward)_kernel"),
    ("copy, fill", r"[mM]em(cpy|set)|FillFunctor|copy_kernel|direct_copy|CatArray"),
    ("elementwise", r"elementwise"),
    ("reduction", r"reduce"),
)  # fmt: skip
RANGE = "smartmoe "  # how the trainer's ranges begin


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill: microseconds from any origin."""

    name: str
    start_us: float
    end_us: float


def kind_of(name: str) -> str:
    """The kind of a kernel by its name; "other" when no pattern fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def breakdown(kernels: Iterable[Kernel], wall_us: float) -> dict:
    """Milliseconds by kind and by kernel, and how long the device had nothing to do.

    Kernels of several streams may overlap: kinds then sum to more than busy_ms. idle_ms = wall - busy.
    """
    by_kind, by_name = defaultdict(float), defaultdict(lambda: [0.0, 0])
    kernels = sorted(kernels, key=lambda kernel: kernel.start_us)
    busy_us, reached = 0.0, float("-inf")
    for kernel in kernels:
        by_kind[kind_of(kernel.name)] += kernel.end_us - kernel.start_us
        entry = by_name[kernel.name]
        entry[0] += kernel.end_us - kernel.start_us
        entry[1] += 1
        busy_us += max(0.0, kernel.end_us - max(reached, kernel.start_us))
        reached = max(reached, kernel.end_us)
    names = sorted(by_name.items(), key=lambda item: -item[1][0])
    return {
        "wall_ms": round(wall_us / 1e3, 3),
        "busy_ms": round(busy_us / 1e3, 3),
        "idle_ms": round((wall_us - busy_us) / 1e3, 3),
        "num_kernels": len(kernels),
        "by_kind_ms": {kind: round(us / 1e3, 3) for kind, us in sorted(by_kind.items(), key=lambda item: -item[1])},
        "by_kernel": [{"name": name, "ms": round(us / 1e3, 3), "calls": num} for name, (us, num) in names],
    }


def profile(step: Callable[[], object]) -> dict:
    """Run `step` once under the profiler, on CUDA: `breakdown` of its kernels, and the spans of the ranges that the
    program marks (torch.profiler.record_function) as the device lived through them, in "ranges_ms". Waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
    kernels, ranges_ms = [], defaultdict(float)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        name, first, length = event.name(), event.start_ns() / 1e3, event.duration_ns() / 1e3
        if not event.is_user_annotation():
            kernels.append(Kernel(name, first, first + length))
        elif name.startswith(RANGE):
            ranges_ms[name.removeprefix(RANGE)] += length / 1e3
    found = breakdown(kernels, start.elapsed_time(end) * 1e3)
    return found | {"ranges_ms": {name: round(ms, 3) for name, ms in ranges_ms.items()}}


def format_breakdown(found: dict, top: int) -> str:
    """A table of kinds, of ranges, and of the `top` kernels."""
    wall = found["wall_ms"]
    lines = [f"profiled: wall {wall:.1f} ms, busy {found['busy_ms']:.1f}, idle {found['idle_ms']:.1f} "
             f"({found['idle_ms'] / wall:.1%}), {found['num_kernels']} kernels"]  # fmt: skip
    lines += [f"  range {name:20s} {ms:9.2f} ms {ms / wall:6.1%}" for name, ms in found["ranges_ms"].items()]
    lines += [f"  kind  {kind:20s} {ms:9.2f} ms {ms / wall:6.1%}" for kind, ms in found["by_kind_ms"].items()]
    for kernel in found["by_kernel"][:top]:
        kind, name = kind_of(kernel["name"]), _short(kernel["name"])
        lines.append(f"  {kernel['ms']:9.2f} ms {kernel['calls']:6d} x  {kind:14s} {name}")
    return "\n".join(lines)


def _short(name: str, width: int = 110) -> str:
    name = re.sub(r"\bvoid |at::native::|\(anonymous namespace\)::|std::", "", name)
    return name if len(name) <= width else name[: width - 2] + ".."
