"""What it takes to compile a kernel ahead of time: one case for each configuration that a launch would select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A kernel specialised for one shape class.

    `signature` gives every run-time argument's type in Triton's spelling ("*bf16", "*fp32", "i32", "i64", "fp32"), in
    the order of the kernel's parameters; `constants` the values of its `tl.constexpr` parameters (and of pointers that
    are None). Pointers, and integers named in `aligned`, are taken as divisible by 16.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()


def specialised(
    kernel: Any,
    label: str,
    arguments: Mapping[str, str | int],
    constants: Mapping[str, Any],
    unaligned: Sequence[str] = (),
) -> Case:
    """The case of a launch: of its arguments Triton makes constants and finds out what 16 divides.

    Args:
        arguments: run-time arguments by name, integers as their values, others as their types; those that the kernel
            does not take are of no effect, pointers that are missing are None.
        constants: its `tl.constexpr` arguments, likewise, and ``num_warps``.
        unaligned: integers of which the kernel does not ask whether 16 divides them.
    """
    given = {**arguments, **constants}
    values = {name: given.get(name) for name in kernel.arg_names}
    fixed = {name: v for name, v in values.items() if name in constants or v is None or v == 1}
    signature = {name: v if isinstance(v, str) else "i32" for name, v in values.items() if name not in fixed}
    numbers = [name for name in signature if isinstance(values[name], int) and name not in unaligned]
    aligned = tuple(name for name in numbers if values[name] % 16 == 0)
    return Case(kernel, label, signature, fixed, constants["num_warps"], aligned=aligned)
