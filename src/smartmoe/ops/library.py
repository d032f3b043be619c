"""Registration of operations with torch, so that a compiled graph holds each as one node."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("smartmoe", "FRAGMENT")


def register(schema: str, run: Callable, fake: Callable, *, backward: Callable | None = None, setup=None, eager=None):
    """Register "smartmoe::<schema>" and return a function that is called like it.

    run: computes on any device. fake: results of the right shape without data. backward(ctx, *gradients) and
    setup(ctx, inputs, output): as torch.library.register_autograd; None = not differentiable.

    eager: what to call instead outside of torch.compile, with plain tensors; unlike `run` it may change its arguments.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smartmoe::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"smartmoe::{name}", backward, setup_context=setup, lib=_LIBRARY)
    operation = getattr(torch.ops.smartmoe, name).default
    if eager is None:
        return operation

    def call(*args):
        is_plain = type(args[0]) is torch.Tensor and not torch.compiler.is_compiling()
        return eager(*args) if is_plain else operation(*args)

    return call
