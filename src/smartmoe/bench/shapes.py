"""The sizes of layers that the benchmarks know by name."""

from __future__ import annotations

from dataclasses import dataclass

from smartmoe.config import ACTIVATIONS
from smartmoe.ops.activation import widening

PASSES = 3  # products of one size: forward, gradient of the input, gradient of the weights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer; num_tokens on each rank. `one_gpu`: every rank has all experts and computes for itself."""

    name: str
    num_tokens: int
    width: int
    ffn: int
    num_experts: int
    top_k: int
    activation: str = "gelu"
    one_gpu: bool = False

    def flops(self, num_copies: float) -> float:
        """Floating-point operations of the forward pass of `num_copies` token copies."""
        return 2.0 * (1 + widening(self.activation)) * self.width * self.ffn * num_copies


def _shape(name, *sizes, **more) -> Shape:
    keys = ("num_tokens", "width", "ffn", "num_experts", "top_k", "activation")
    return Shape(name=name, **dict(zip(keys, sizes, strict=False)), **more)


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("S1", 8192, 1536, 3072, 32, 2),
        _shape("S2", 8192, 2560, 5120, 32, 2),
        _shape("S3", 8192, 2048, 1024, 128, 8),
        _shape("S4", 32768, 2048, 1024, 128, 8),
        _shape("mixtral", 8192, 4096, 14336, 8, 2, "swiglu"),
        _shape("qwen3-30b-a3b", 8192, 2048, 768, 128, 8, "swiglu"),
        _shape("launch-bound", 512, 1536, 3072, 32, 2),
        _shape("alone-S1", 8192, 1536, 3072, 32, 2, "swiglu", one_gpu=True),
        _shape("alone-qwen", 32768, 2048, 768, 128, 8, "swiglu", one_gpu=True),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of SHAPES, or T,D,F,E,K with an activation behind it. Raises ValueError naming what exists."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) in (5, 6) and all(p.isdigit() and int(p) > 0 for p in parts[:5]):
        if parts[5:] and parts[5] not in ACTIVATIONS:
            raise ValueError(f'shape "{text}": activation is one of {", ".join(ACTIVATIONS)}')
        if int(parts[4]) > int(parts[3]):
            raise ValueError(f'shape "{text}": {parts[4]} choices of {parts[3]} experts')
        return _shape(text, *map(int, parts[:5]), *parts[5:])
    raise ValueError(f'shape "{text}" is neither T,D,F,E,K[,activation] nor one of {", ".join(SHAPES)}')
