"""Tensor operations of the MoE layer, one file per operation.

Layer 2. Every file holds the plain torch form of its operation, on CPU and CUDA alike; a faster kernel replaces the
body of a function here and nothing above it changes.

Shape letters: T tokens, K experts per token, N = T * K token copies, R rows (kept copies, or buffer rows), D model
width, F ffn width, E logical experts, S slots of all ranks, L slots of this rank, W ranks of the expert-parallel
group.
"""
