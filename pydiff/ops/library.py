"""The `torch.library` namespace ``pydiff``: what `torch.compile`, export and fake tensors see of an operation.

Eager code does not come this way: the dispatcher costs three times what a direct call does. An operation's function
goes through its operator only while a compiler traces it (`torch.compiler.is_compiling()`) or when a tensor it is
given has no memory of its own (`pydiff.ops.native.is_plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("pydiff", "DEF")


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it.

    Args:
        schema: ``name(Tensor x, ...) -> ...`` in torch's notation, with ``(a!)`` on the tensors that are written.
        function: runs it on real tensors of any device.
        fake: makes the outputs (shapes, dtypes and devices alone) from fake inputs.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pydiff::{name}", fake, lib=_library)
    return getattr(torch.ops.pydiff, name).default
