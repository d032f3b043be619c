"""A stand-in for the CUDA calls of Megatron-LM (megatron-core 0.19), so that its training loop runs on CPUs over gloo.

For tests only. `install()` once in a process, before megatron is imported: torch.cuda's calls answer for a device that is
the CPU, tensors asked for on "cuda" are made there, and triton is an empty shell where it is not installed.
"""

import contextlib
import importlib.machinery
import queue
import sys
import types
import typing

import torch
import torch._dynamo
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Nothing:
    """A stream or an event of a device that has done its work as soon as it is asked to."""

    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class _OnCpu(TorchFunctionMode):
    """device="cuda" means the CPU, and tensors call themselves CUDA tensors, as the optimizer wants."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + function(args[0]).removeprefix("torch.")
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = CPU
        if function is torch.Tensor.to and len(args) > 1 and "cuda" in str(args[1]):
            args = (args[0], CPU, *args[2:])
        return function(*args, **kwargs)


def install() -> None:
    """Make this process one in which Megatron finds a device. Cannot be undone."""
    _add_missing_modules()
    nothing = _Nothing()
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": CPU,
        "get_device_capability": (9, 0),
        "get_device_name": "cpu",
        "current_stream": nothing,
        "default_stream": nothing,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "memory_stats": {},
        **dict.fromkeys(("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Stream = torch.cuda.Event = _Nothing
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=1 << 34
    )
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.manual_seed_all = lambda seed: None
    torch.Tensor.cuda = torch.nn.Module.cuda = torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    exchange = dist.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        """gloo wants the sizes as lists; Megatron leaves them in tensors where there is no device to wait for."""
        sizes = [s.tolist() if hasattr(s, "tolist") else s for s in (output_split_sizes, input_split_sizes)]
        return exchange(output, input, *sizes, **kwargs)

    dist.all_to_all_single = all_to_all_single
    torch._dynamo.config.disable = True  # Megatron compiles small functions
    _OnCpu().__enter__()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    # A checkpoint is written by threads of the process that saves it; for results Megatron would start another one, which
    # imports torch and Megatron: 12 s a rank.
    filesystem_async._results_queue = queue.Queue()

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def _add_missing_modules() -> None:
    """typing.override is of Python 3.12, triton of CUDA builds of torch."""
    typing.override = getattr(typing, "override", lambda method: method)
    if importlib.util.find_spec("triton") is not None:
        return
    for name in ("torch._inductor.utils", "torch._inductor.runtime.triton_compat", "torch._dynamo"):
        importlib.import_module(name)  # these look for triton when they are imported: let them see that there is none
    for name in ("triton", "triton.language", "triton.runtime", "triton.testing"):
        module = types.ModuleType(name)
        module.__path__, module.__version__ = [], "0.0.0"
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = _shell_attribute
        sys.modules[name] = module


def _shell_attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Shell()


class _Shell:
    """Whatever a module of kernels does with triton when it is imported: decorate functions, subscript, combine types."""

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name):
        return _shell_attribute(name)

    def __getitem__(self, key):
        return self

    def __or__(self, other):
        return self

    def __mro_entries__(self, bases):
        return (object,)


def allow_norms_with_sequence_parallel() -> None:
    """Torch's norms do what Apex's or Transformer Engine's do and Megatron's wrapper of torch's refuses: gradients are
    summed over the tensor-parallel ranks."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new(cls, config, hidden_size, eps=1e-5, **kwargs):
        norm = torch.nn.LayerNorm(hidden_size, eps=eps)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new
