"""What the model is called with beside x and t, and how conditional and unconditional calls share a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

MAPPINGS = (dict, Mapping)  # a dict is told at once, and need not ask the abstract class


def model_keywords(name: str, value: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """`cond` or `uncond` as keyword arguments of the model, numpy arrays as tensors on its device.

    Integers and truth values keep their dtype, floating-point numbers get that of the model's input. Tensors stay as
    they are.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} holds a numpy array of {array.dtype}, which is no tensor; give numbers")
        made = torch.as_tensor(array)
        return made.to(device, dtype if made.is_floating_point() else None)

    return map_leaves(check_condition(name, value), np.ndarray, tensor)


def check_condition(name: str, value: Any) -> dict[str, Any]:
    """`cond` or `uncond` as a dictionary; TypeError for what is no mapping."""
    if value is None:
        return {}
    if not isinstance(value, MAPPINGS):
        raise TypeError(
            f"{name} must be a mapping of the model's keyword arguments, e.g. {name}={{'labels': y}}, "
            f"got {type(value).__name__}"
        )
    return dict(value)


def join(uncond: Any, cond: Any, rows: int, name: str = "cond") -> Any:
    """[uncond; cond] along the batch, through nested mappings and sequences; what is equal in both stays as it is."""
    if isinstance(cond, torch.Tensor) and isinstance(uncond, torch.Tensor):
        return torch.cat([_expand(uncond, rows, f"un{name}"), _expand(cond, rows, name)])
    if isinstance(cond, MAPPINGS) and isinstance(uncond, MAPPINGS):
        if set(cond) != set(uncond):
            odd = sorted(map(str, set(cond) ^ set(uncond)))
            raise ValueError(f"cond and uncond must hold the same names; {', '.join(odd)} stands in one of them only")
        return {key: join(uncond[key], cond[key], rows, f"{name}[{key!r}]") for key in cond}
    if isinstance(cond, (list, tuple)) and isinstance(uncond, (list, tuple)) and len(cond) == len(uncond):
        return type(cond)(join(u, c, rows, f"{name}[{k}]") for k, (u, c) in enumerate(zip(uncond, cond)))
    if isinstance(cond, torch.Tensor) or isinstance(uncond, torch.Tensor):
        tensor, number = (cond, uncond) if isinstance(cond, torch.Tensor) else (uncond, cond)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            filled = torch.full_like(_expand(tensor, rows, name), number)
            return join(filled, cond, rows, name) if tensor is cond else join(uncond, filled, rows, name)
    if type(cond) is type(uncond) and cond == uncond:
        return cond
    raise ValueError(
        f"{name} differs between cond and uncond and is no tensor: {cond!r:.60} and {uncond!r:.60}; "
        "give tensors [batch, ...]"
    )


def _expand(value: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    if value.ndim == 0:
        return value.expand(rows)
    if value.shape[0] not in (1, rows):
        raise ValueError(f"{name} must have 1 or {rows} rows like the batch, got shape {list(value.shape)}")
    return value.expand(rows, *value.shape[1:])


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The same nested mappings and sequences with `function` of every tensor in them."""
    return map_leaves(value, torch.Tensor, function)


def map_leaves(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same nested mappings and sequences with `function` of everything in them that is of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, MAPPINGS):
        items = {key: map_leaves(item, kind, function) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        made = copy.copy(value)  # of its own class, whose attributes a model may ask for
        made.update(items)
        return made
    if isinstance(value, (list, tuple)):
        parts = [map_leaves(item, kind, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def structure(value: Any) -> Hashable:
    """What two conditions have in common that differ in nothing but the contents of their tensors."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.shape, value.dtype)
    if isinstance(value, MAPPINGS):
        return (dict, tuple((key, structure(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(structure(item) for item in value))
    if isinstance(value, float):
        return (float, value.hex())  # NaN is equal to itself here
    return (type(value), value if isinstance(value, Hashable) else id(value))


def copy_into(targets: Any, values: Any) -> None:
    """Copy every tensor of `values` into the one at the same place in `targets`, which has the same structure."""
    if isinstance(targets, torch.Tensor):
        if targets is not values:
            targets.copy_(values, non_blocking=True)
    elif isinstance(targets, MAPPINGS):
        for key, target in targets.items():
            copy_into(target, values[key])
    elif isinstance(targets, (list, tuple)):
        for target, value in zip(targets, values):
            copy_into(target, value)
