"""Nodes of captured CUDA graphs that a device is slow at.

A memset of 4 bytes, such as cuBLAS puts before most products, is a node of its own: the device stands still for some 3 us on
either side of it, as it does not of kernels.
"""

from __future__ import annotations

import torch

from smartmoe.ops.extension import kernels_for


def replace_memsets(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """Have kernels do the small memsets of a graph, captured with keep_graph=True on this device and not instantiated yet.
    Nothing happens without the extension."""
    kernels = kernels_for(torch.empty(0, dtype=torch.int64, device=device))
    if kernels:
        kernels.replace_memsets(graph.raw_cuda_graph())
