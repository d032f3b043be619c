"""Tensor operations of the MoE layer, one file per operation.

Layer 2. Every file holds the plain torch form of its operation, which runs anywhere; on CUDA the kernels of the
extension (src/csrc, built by setup.py) take its place where they are there (`extension`). What is differentiable is
registered with torch (`library`), so that a compiled graph holds each operation as one node.

Shape letters: T tokens, K experts per token, N = T * K token copies, R rows (kept copies, or buffer rows), D model
width, F ffn width, E logical experts, S slots of all ranks, L slots of this rank, W ranks of the expert-parallel
group.
"""
