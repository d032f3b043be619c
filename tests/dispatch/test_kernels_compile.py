"""The kernels of the direct exchange compile for a GPU, which none is needed for: what their language refuses, its interpreter
takes."""

import importlib.util
import os

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton")
SIZES = {"K": 3, "K_PAD": 4, "W": 2, "W_PAD": 2, "BLOCK_T": 4, "BLOCK_D": 512}
POINTERS = {
    "bf16": "own_TD rows_RD grad_RD y_TD copies_a copies_b",
    "fp32": "weight_N weight_out_N grad_TK owned_a owned_b",
    "i64": "slot_N slot_TK local_N row_N peers_W wanted_L count_L expert_N token_id_T addresses_SW words_S sizes_S",
    "i32": "state odd num_rows num_needed told most primary_E replica_N ended",
}
KERNELS = [
    ("announce_kernel", {"W": 2, "BLOCK": 512, "EARLY": True}),
    ("spread_kernel", {**SIZES, "WEIGH": False, "BOUND": True, "EARLY": True, "L_PAD": 16, "BLOCK_W": 128}),
    ("spread_kernel", {**SIZES, "WEIGH": True, "BOUND": False, "EARLY": False, "L_PAD": 16, "BLOCK_W": 128}),
    ("sum_kernel", {**SIZES, "WEIGHTED": True, "GRADS": False, "MIXED": True}),
    ("sum_kernel", {**SIZES, "WEIGHTED": False, "GRADS": True, "MIXED": False}),
    ("meet_kernel", {"W": 2}),
    ("plan_kernel", {"BUCKETS": 256, "NEAR": 256, "W": 2, "W_PAD": 2, "E_PAD": 32, "N_PAD": 4, "P": 32, "BLOCK": 512}),
    ("pull_kernel", {"BLOCK": 4096}),
    ("return_kernel", {"W": 2, "HAS_B": True, "N_PAD": 4, "BLOCK": 4096}),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name,constants", KERNELS, ids=lambda value: value if isinstance(value, str) else "")
def test_kernels_compile_without_a_gpu(name, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smartmoe.dispatch import direct_kernels, replica_kernels

    kernel = getattr(direct_kernels, name, None) or getattr(replica_kernels, name)
    types = {pointer: f"*{dtype}" for dtype, names in POINTERS.items() for pointer in names.split()}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    positions = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    assert "ptx" in triton.compile(ASTSource(kernel, signature, positions), target=GPUTarget("cuda", 90, 32)).asm
