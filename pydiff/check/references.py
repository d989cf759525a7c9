"""What a Python function refers to besides its arguments: variables from around it, and globals."""

from __future__ import annotations

import contextlib
from types import CodeType, FunctionType
from typing import Any


def closure_values(function: FunctionType) -> dict[str, Any]:
    """The variables that a function has from around it, those without a value yet left out."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def global_values(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names, or a function within it."""
    there = function.__globals__
    return {name: there[name] for name in sorted(_names(function.__code__)) if name in there}


def _names(code: CodeType) -> set[str]:
    """Names that code looks up, attributes among them."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))
