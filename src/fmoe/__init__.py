"""FastMoE's interface (github.com/laekov/fastmoe, v1.1) on top of smartmoe: its programs import it unchanged.

The names, arguments and meaning of the interface are FastMoE's; the code is this project's. Tokens travel by
smartmoe.dispatch, experts are multiplied by smartmoe.ops, on CPUs (gloo) and GPUs. From after v1.1 are gate_bias (pull request
185) and SwitchGate's seats, which it divides among experts (issue 199). The experts of FMoETransformerMLP are one module, as
before v1.1 (`experts.htoh4.weight`), no list that could be indexed. Not here: `fmoe_cuda`, `fmoe.megatron`.
"""

from fmoe.distributed import DistributedGroupedDataParallel
from fmoe.layers import FMoE
from fmoe.linear import FMoELinear
from fmoe.transformer import FMoETransformerMLP

__all__ = ["DistributedGroupedDataParallel", "FMoE", "FMoELinear", "FMoETransformerMLP"]
