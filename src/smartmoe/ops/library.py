"""Registration of operations with torch, so that a compiled graph holds each as one node."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("smartmoe", "FRAGMENT")


def _is_plain(value) -> bool:
    return type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter)


def register(schema: str, run: Callable, fake: Callable, *, backward: Callable | None = None, setup=None, eager=None):
    """Register "smartmoe::<schema>" and return a function that is called like it.

    run: computes on any device. fake: results of the right shape without data. backward(ctx, *gradients) and
    setup(ctx, inputs, output): as torch.library.register_autograd; None = not differentiable.

    Plain tensors outside of torch.compile take a short cut past the dispatcher: the same code as a torch.autograd.Function,
    which the host gets through in a fraction of the time. `eager` replaces `run` there, and may change its arguments.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smartmoe::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"smartmoe::{name}", backward, setup_context=setup, lib=_LIBRARY)
    operation = getattr(torch.ops.smartmoe, name).default
    eager = eager or run
    if backward is not None:
        members = {
            "forward": staticmethod(eager),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(backward),
        }
        eager = type(name, (torch.autograd.Function,), members).apply

    def call(*args):
        return eager(*args) if _is_plain(args[0]) and not torch.compiler.is_compiling() else operation(*args)

    return call
