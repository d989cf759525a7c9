"""What the model is called with beside x and t, and how conditional and unconditional calls share a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_condition(name: str, value: Any) -> dict[str, Any]:
    """`cond` or `uncond` as keyword arguments of the model."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of the model's keyword arguments, e.g. {name}={{'labels': y}}, "
                        f"got {type(value).__name__}")
    return dict(value)


def join(uncond: Any, cond: Any, rows: int, name: str = "cond") -> Any:
    """[uncond; cond] along the batch, through nested mappings and sequences; what is equal in both stays as it is."""
    if isinstance(cond, torch.Tensor) and isinstance(uncond, torch.Tensor):
        return torch.cat([_expand(uncond, rows, f"un{name}"), _expand(cond, rows, name)])
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
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
    raise ValueError(f"{name} differs between cond and uncond and is no tensor: {cond!r:.60} and {uncond!r:.60}; "
                     "give tensors [batch, ...]")


def _expand(value: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    if value.ndim == 0:
        return value.expand(rows)
    if value.shape[0] not in (1, rows):
        raise ValueError(f"{name} must have 1 or {rows} rows like the batch, got shape {list(value.shape)}")
    return value.expand(rows, *value.shape[1:])
