"""What objects refer to: a function to variables from around it and to globals, others to their attributes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


def global_objects(function: FunctionType) -> dict[str, Any]:
    """Of `global_values` those that may hold tensors: no modules, no classes, no functions of other files."""
    there = function.__globals__
    if str(there.get("__name__")).split(".")[0] == "torch":
        return {}
    found = {name: as_written(value) for name, value in global_values(function).items()}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, (type, ModuleType))
        and not (isinstance(value, FunctionType) and value.__globals__ is not there)
    }


def as_written(leaf: Any) -> Any:
    """What torch.compile was given, for what it returned."""
    if isinstance(leaf, FunctionType):
        return getattr(leaf, "_torchdynamo_orig_callable", leaf)
    return getattr(leaf, "_orig_mod", leaf) if isinstance(leaf, nn.Module) else leaf


def has_attributes(leaf: Any) -> bool:
    """Whether an object may hold something in attributes of its own; functions refer to more than that."""
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (type, ModuleType, FunctionType))


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors in arguments, modules, bound methods, partial functions, closures, globals in use, and attributes."""
    seen = set() if seen is None else seen
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from tensors(_parts(leaf), seen)


def _parts(leaf: Any) -> list[Any]:
    """What an object refers to that may be, or hold, a tensor."""
    if isinstance(leaf, functools.partial):
        return [leaf.func, leaf.args, leaf.keywords]
    if isinstance(leaf, MethodType):
        return [leaf.__self__]
    if isinstance(leaf, FunctionType):
        return [*closure_values(leaf).values(), leaf.__defaults__, leaf.__kwdefaults__, *global_objects(leaf).values()]
    return list(vars(leaf).values()) if has_attributes(leaf) else []
