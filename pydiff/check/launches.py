"""How many kernels an eager call would launch on a CUDA device, counted without one.

The call runs on fake CUDA tensors (shapes, strides and dtypes, no memory), and every operator that reaches the
dispatcher is counted by the rules below. They are those of PyTorch's own CUDA code:

- views, allocations, metadata and copies between the host and the device launch nothing; a copy within the device is
  one launch, also where it would be a memcpy;
- `convolution` is one kernel, one more for its bias, and one for each operand that is not in the memory format cuDNN
  runs in (channels_last as soon as the input or the weight is);
- `native_group_norm` is three (statistics, parameters of the line, the line), two where it has no weight and bias, and
  one more where its input is not contiguous; its output is contiguous, whatever its input was;
- `native_layer_norm` is one, two where the width is no multiple of 4, and one more for an input that is not
  contiguous;
- `addmm` with a bias of one dimension is one (cuBLASLt's epilogue), otherwise two (the copy of its addend, the
  product), and so is `baddbmm` unless beta is 0;
- `scaled_dot_product_attention` is one, whichever backend it would be;
- an operator of `pydiff` is what its module says (``<op>_launches``);
- everything else is one.

Not counted, because a library decides it at run time: the reduction of a split-K product or of split attention, cuDNN's
own transforms, a mask or a head dimension that a backend pads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pydiff.ops as ops
from pydiff.check.fake_cuda import ReentrantMode, fake_cuda, fake_mode, is_fake
from pydiff.check.fake_cuda_functions import contiguous

__all__ = ["Launches", "count_launches", "fake_cuda"]

aten = torch.ops.aten
ATTENTION = "scaled_dot_product_attention"
COPIES = (aten._to_copy, aten.copy_)

# What launches nothing and is no view: allocations, metadata, reading a value on the host.
NOTHING = frozenset(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize_ set_ lift_fresh lift detach_ "
    "_local_scalar_dense item is_same_size scalar_tensor sym_size sym_stride sym_numel sym_storage_offset "
    "is_pinned _unsafe_view _reshape_alias record_stream".split()
)


@dataclass
class Launches:
    """The kernels of a call."""

    by_name: Counter[str] = field(default_factory=Counter)
    """How many each operator accounts for (`aten::` left out of the names)."""

    @property
    def total(self) -> int:
        """How many there are."""
        return self.by_name.total()

    def __str__(self) -> str:
        rows = [f"{count:6d} {name}" for name, count in self.by_name.most_common()]
        return "\n".join([f"{self.total:6d} kernels", *rows])


def count_launches(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Launches:
    """The kernels that ``function(*args, **kwargs)`` launches without gradients; see the module for what counts.

    With tensors and modules from `fake_cuda` nothing is computed and a model of any size is counted in seconds. With
    real tensors on the CPU the call is carried out, and counted as if it ran on a CUDA device. Where tensors of both
    kinds of device take part, what runs on the host is not counted.
    """
    count = _Count()
    fake = fake_mode() if is_fake((function, args, kwargs)) else contextlib.nullcontext()
    with torch.no_grad(), fake, _CountedOperators(count), _CountedFunctions(count):
        function(*args, **kwargs)
    return count.found["cuda"] if count.found["cuda"].total else count.found["cpu"]


# ---------------------------------------------------------------------------- the rules


def _runs_in(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution: channels_last as soon as one of the two is."""
    formats = {suggest_memory_format(x), suggest_memory_format(weight)} - {torch.contiguous_format}
    return formats.pop() if formats else torch.contiguous_format


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> int:
    converted = sum(not t.is_contiguous(memory_format=_runs_in(x, weight)) for t in (x, weight))
    return 1 + converted + (bias is not None)


def _group_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any) -> int:
    affine = weight is not None or bias is not None
    return 2 + (affine and x.numel() > x.shape[0] * x.shape[1]) + (not x.is_contiguous())


def _layer_norm(x: Tensor, normalized_shape: list[int], *_: Any, **__: Any) -> int:
    width = 1
    for size in normalized_shape:
        width *= size
    return (1 if width % 4 == 0 else 2) + (not x.is_contiguous())


def _addmm(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, **_: Any) -> int:
    in_epilogue = addend.dim() == 1 and addend.is_contiguous() and min(b.shape) > 1
    return 1 if beta == 0 or (beta == 1 and in_epilogue) else 2


def _baddbmm(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, **_: Any) -> int:
    return 1 if beta == 0 else 2


RULES: dict[Any, Callable[..., int]] = {
    aten.convolution: _convolution,
    aten.native_group_norm: _group_norm,
    aten.native_layer_norm: _layer_norm,
    aten.addmm: _addmm,
    aten.baddbmm: _baddbmm,
}


def _pydiff_launches(operator: Any, args: Any, kwargs: Any) -> int:
    """What ``<op>_launches`` says of the arguments it names; one where nothing says.

    An operator that is a form of another (add_layer_norm, of layer_norm) counts as that one.
    """
    known, name = _launch_functions(), operator._schema.name
    stem = max((op for op in known if op in name), key=len, default=None)
    if stem is None:
        return 1
    given = dict(zip((argument.name for argument in operator._schema.arguments), args)) | kwargs
    wanted = inspect.signature(known[stem]).parameters
    return known[stem](**{key: value for key, value in given.items() if key in wanted})


@functools.cache
def _launch_functions() -> dict[str, Callable[..., int]]:
    """The functions of `pydiff.ops` that are named ``<op>_launches``, by the name of the op."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        for name, value in vars(importlib.import_module(f"{ops.__name__}.{module.name}")).items():
            if name.endswith("_launches"):
                found[name.removesuffix("_launches")] = value
    return found


def _launches(operator: Any, args: Any, kwargs: Any) -> int:
    space, _, name = operator._schema.name.partition("::")
    if space == "pydiff":
        return _pydiff_launches(operator, args, kwargs)
    if space in ("prim", "prims") or name in NOTHING or operator.is_view:
        return 0
    rule = RULES.get(operator.overloadpacket)
    return rule(*args, **kwargs) if rule else 1


def _device_types(value: Any) -> set[str]:
    return {leaf.device.type for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _laid_out(operator: Any, args: Any, result: Any) -> Any:
    """A fake result with the strides that the CUDA kernel gives it, where those of the fake operator may differ."""
    if operator is aten.convolution and isinstance(result, FakeTensor):
        return contiguous(result, memory_format=_runs_in(*args[:2]))
    if operator in (aten.native_group_norm, aten.native_layer_norm) and isinstance(result[0], FakeTensor):
        return (contiguous(result[0]), *result[1:])
    return result


class _Count:
    """What both modes write to; `inside` is positive while the body of an operator runs, which is counted already."""

    def __init__(self) -> None:
        self.found = {"cuda": Launches(), "cpu": Launches()}
        self.inside = 0

    def add(self, name: str, count: int, devices: set[str]) -> None:
        if count:
            self.found["cuda" if "cuda" in devices else "cpu"].by_name[name] += count

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.inside -= 1


class _CountedOperators(TorchDispatchMode):
    """Counts what reaches the dispatcher, and gives fake results the strides that CUDA's kernels give theirs."""

    def __init__(self, count: _Count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.count.inside:
            return operator(*args, **kwargs)
        result = self.count.run(operator, args, kwargs)
        devices = _device_types((args, kwargs, result))
        crossing = operator.overloadpacket in COPIES and len(devices) > 1
        if devices and not crossing:
            name = operator._schema.name.removeprefix("aten::")
            self.count.add(name, _launches(operator, args, kwargs), devices)
        return _laid_out(operator.overloadpacket, args, result)


class _CountedFunctions(ReentrantMode):
    """Counts `scaled_dot_product_attention` as one kernel, in place of the operators it is made of without CUDA."""

    def __init__(self, count: _Count):
        super().__init__()
        self.count = count

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if function is not F.scaled_dot_product_attention or self.count.inside:
            return function(*args, **kwargs)
        self.count.add(ATTENTION, 1, _device_types((args, kwargs)))
        return self.count.run(_attention if is_fake(args) else function, args, kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result's shape and strides as flash attention has them: heads beside one another in every row."""
    batch, length = query.shape[:-3], query.shape[-2]
    heads = query.shape[-3:-2]
    return query.new_empty((*batch, length, *heads, value.shape[-1])).transpose(-3, -2)
