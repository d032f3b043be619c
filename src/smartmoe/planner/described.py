"""Clusters that nobody measured: primitives from peak rates and stated efficiencies.

A cluster file may have a table [rates] (see `Rates`) beside the keys of ClusterSpec; it says that the cluster is
described. Times are sums of: a floor for each kernel, operations over peak * efficiency, bytes over bandwidth, and for
exchanges a latency and the bytes on the busiest link. Nothing here was fitted to a measurement unless the file says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smartmoe.config import ClusterSpec
from smartmoe.planner.primitives import EXCHANGES, Curve, Primitives


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What peak numbers do not say. Efficiencies are fractions of the cluster's tflops or link bandwidths.

    memory_gbytes_per_s: of the device. kernel_us: the least time of a kernel on the device; host_us: what the host takes
    to launch one. peer_us: what each further rank adds to an exchange. expert_us: added for each expert that has rows,
    forward (backward: twice that). step_ms: added to every step (data, logging).
    """

    gemm_efficiency: float = 0.6
    attention_efficiency: float = 0.35
    expert_efficiency: float = 0.5
    link_efficiency: float = 0.8
    memory_gbytes_per_s: float = 800.0
    kernel_us: float = 4.0
    host_us: float = 8.0
    expert_us: float = 0.0
    intra_latency_us: float = 15.0
    inter_latency_us: float = 30.0
    peer_us: float = 0.5
    step_ms: float = 0.0


# (kernels forward, backward) of each part, as the trainer launches them.
_KERNELS = {
    "linear": (1, 2), "attention": (2, 3), "experts": (6, 10), "experts_loop": (3, 4), "gate": (14, 14),
    "gate_limited": (60, 24), "route": (14, 8), "norm": (4, 8), "embedding": (3, 4), "loss": (4, 4),
}  # fmt: skip
# Passes over the elements of an amount (its place in the primitive's amounts), (forward, backward).
_PASSES = {
    "norm": {1: (10, 14)},  # both of a block, and the additions
    "route": {1: (4, 4), 2: (2, 3)},
    "gate": {1: (4, 5), 2: (6, 6)},
    "gate_limited": {1: (4, 5), 2: (8, 6)},
    "embedding": {1: (3, 3), 2: (0, 3)},
    "loss": {1: (8, 10)},
    "experts": {4: (2, 4), 5: (1, 1), 6: (0, 1)},
    "experts_loop": {4: (2, 4), 5: (1, 1), 6: (0, 1)},
}


def describe(cluster: ClusterSpec, rates: Rates, dtype: str) -> Primitives:
    """Primitives of a described cluster for training in `dtype`."""
    width = 4 if dtype == "float32" else 2
    element_ms = width / rates.memory_gbytes_per_s  # one pass over 1e6 elements
    floor_ms, host_ms = rates.kernel_us / 1e3, 0.0 if cluster.device == "cpu" else rates.host_us / 1e3
    product_ms = {  # 1e9 multiply-adds
        "linear": 2 / (cluster.tflops * rates.gemm_efficiency),
        "attention": 2 / (cluster.tflops * rates.attention_efficiency),
        "experts": 2 / (cluster.tflops * rates.expert_efficiency),
    }
    product_ms["experts_loop"] = product_ms["experts"]
    device, host = {}, {}
    for name, kernels in _KERNELS.items():
        for way, num_kernels in enumerate(kernels):
            size = 8 if name.startswith("experts") else 3 if name in ("attention", "embedding") else 4
            size = 2 if name in ("norm", "loss") else size
            per = np.zeros(size)
            per[0] = num_kernels * floor_ms
            for amount, passes in _PASSES.get(name, {}).items():
                per[amount] += passes[way] * element_ms
            if name in ("linear", "attention"):
                per[1] = product_ms[name] * (1, 2.5 if name == "attention" else 2)[way]
            if name.startswith("experts"):
                per[2] = product_ms[name] * (1, 2)[way]
                per[1] = rates.expert_us / 1e3 * (1, 2)[way]
            host_per = [num_kernels * host_ms]
            if name == "experts_loop":  # one by one: floors and launches for each expert
                per[1] += per[0]
                host_per = [0.0, num_kernels * host_ms]
            elif name == "experts":
                host_per = [num_kernels * host_ms, 0.0]
            key = f"{name}_{('forward', 'backward')[way]}"
            device[key], host[key] = Curve(per), Curve(np.array(host_per))
    state_ms = 1 / rates.memory_gbytes_per_s  # 1e6 bytes
    device["accumulate"] = Curve(np.array([0.0, floor_ms, (8 + width) * state_ms]))
    host["accumulate"] = Curve(np.array([0.0, 3 * host_ms]))
    device["by_sample"], host["by_sample"] = Curve(np.array([floor_ms, 2 * element_ms])), Curve(np.array([host_ms]))
    device["optimizer"], host["optimizer"] = Curve(np.array([10 * floor_ms, (44 + width) * state_ms])), Curve(np.zeros(1))
    device["optimizer_launches"] = Curve(np.array([20 * host_ms, 4 * host_ms]))
    host["optimizer_launches"] = Curve(np.zeros(1))
    for way, passes in (("forward", (6, 5)), ("backward", (7, 6))):
        off_ms = 1 / (cluster.intra_node_gbytes_per_s * rates.link_efficiency)
        meetings = 2 * rates.intra_latency_us / 1e3
        per = [8 * floor_ms + meetings, passes[0] * element_ms, passes[1] * element_ms, 0.0, off_ms]
        device[f"direct_{way}"], host[f"direct_{way}"] = Curve(np.array(per)), Curve(np.array([16 * host_ms]))
    intra_ms = 1 / (cluster.intra_node_gbytes_per_s * rates.link_efficiency)
    inter_ms = 1 / (cluster.inter_node_gbytes_per_s * rates.link_efficiency)
    for name in EXCHANGES:
        device[name] = Curve(np.array([rates.intra_latency_us / 1e3, rates.peer_us / 1e3, intra_ms, inter_ms]))
        host[name] = Curve(np.array([3 * host_ms]))
    for name, value in (("launch", floor_ms), ("sync", floor_ms + 2 * host_ms)):
        device[name], host[name] = Curve(np.array([value])), Curve(np.array([host_ms]))
    facts = {"cluster": cluster.name, "inter_latency_ms": rates.inter_latency_us / 1e3, "step_ms": rates.step_ms}
    return Primitives(device, host, "described", facts)
