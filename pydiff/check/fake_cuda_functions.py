"""What fake CUDA tensors need besides torch's own `FakeTensorMode`.

A torch built without CUDA finds no device guard for some functions ("PyTorch is not linked with support for cuda
devices"): `ON_CUDA` and `ANYWHERE` spell them out, for fake tensors on a CUDA device and for all tensors. And where the
result of an operator depends on values, `plausible` is one that it might have, so that a program can be followed on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_ASSIGNMENTS = (aten.index_put, aten.index_put_, aten._unsafe_index_put, aten._index_put_impl_)


def contiguous(x: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``x.contiguous(memory_format=...)`` out of operators."""
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _get_item(x: Tensor, index: Any) -> Tensor:
    view, indices = _indexed(x, index)
    return aten.index(view, indices) if indices else view


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    view, indices = _indexed(x, index)
    scalar = not isinstance(value, Tensor) or (value.dim() == 0 and value.device.type == "cpu")
    if not indices:
        if scalar:
            view.fill_(value)
        else:
            extra = max(value.dim() - view.dim(), 0)  # leading dimensions of one element
            aten.copy_(view, value.reshape(value.shape[extra:]))
    elif scalar and sum(i is not None for i in indices) == 1 and is_mask(indices[-1]):
        before, mask = len(indices) - 1, indices[-1]
        view.masked_fill_(mask.reshape(*mask.shape, *[1] * (view.dim() - before - mask.dim())), value)
    else:
        values = torch.full((), value, dtype=x.dtype, device=x.device) if not isinstance(value, Tensor) else value
        aten.index_put_(view, indices, values)


def is_mask(index: Any) -> bool:
    """Whether an index is a tensor that selects where it is true."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _indexed(x: Tensor, index: Any) -> tuple[Tensor, list[Any]]:
    """The view that integers, slices, None and ... make of x, and the tensors (None: all) left to index it with."""
    given = [_as_index(i, x.device) for i in (index if isinstance(index, tuple) else (index,))]
    skipped = x.dim() - sum(_dimensions(i) for i in given)
    indices: list[Any] = []
    dim = 0
    for i in given:
        if isinstance(i, int) and not isinstance(i, bool):
            x = x.select(dim, i)
            continue
        if i is None or isinstance(i, bool):
            x = x.unsqueeze(dim)
        elif isinstance(i, slice):
            start, stop, step = (end.item() if isinstance(end, Tensor) else end for end in (i.start, i.stop, i.step))
            x = aten.slice(x, dim, start, stop, 1 if step is None else step)
        covered = skipped if i is Ellipsis else max(_dimensions(i), 1)
        indices += [i] if isinstance(i, Tensor) else [None] * covered
        dim += covered
    return x, indices if any(i is not None for i in indices) else []


def _as_index(index: Any, device: torch.device) -> Any:
    """An index as one of int, bool, slice, None, ... and a tensor on the device."""
    if isinstance(index, np.integer):
        return int(index)
    if isinstance(index, (list, range, np.ndarray)):
        return torch.as_tensor(index, device=device)
    if not isinstance(index, Tensor):
        return index
    if index.dim():
        return index if index.device == device else index.to(device)
    value = index.item()  # the host has to know where a view begins
    return value if isinstance(value, bool) else 0


def _dimensions(index: Any) -> int:
    """How many dimensions an index stands for."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    return index.dim() if is_mask(index) else 1


def _nonzero(x: Tensor, *, as_tuple: bool = False) -> Any:
    found = aten.nonzero(x)
    return found.unbind(1) if as_tuple else found


def _new_tensor(
    x: Tensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    return torch.tensor(data, dtype=dtype or x.dtype, device=device or x.device, requires_grad=requires_grad)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` for a device without an index, which is the current one."""

    def indexed(argument: Any) -> Any:
        named = isinstance(argument, (str, torch.device)) and torch.device(argument) == torch.device("cuda")
        return CUDA if named else argument

    return Tensor.to(x, *map(indexed, args), **{name: indexed(value) for name, value in kwargs.items()})


def _to_cuda(
    x: Tensor,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    return Tensor.to(x, CUDA, non_blocking=non_blocking, memory_format=memory_format)


def _numpy(x: Tensor, *, force: bool = False) -> np.ndarray:
    if not isinstance(x, FakeTensor):
        return Tensor.numpy(x, force=force)
    if x.device.type == "cuda" and not force:
        raise TypeError("can't convert a CUDA tensor to numpy: use Tensor.cpu() first")
    shape, dtype = x.cpu().shape, x.dtype
    with _disable_current_modes():
        return torch.ones(shape, dtype=dtype).numpy()


def _format(x: Tensor, specification: str) -> str:
    return format(x.item() if x.dim() == 0 else str(x), specification)


ON_CUDA: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _get_item,
    Tensor.__setitem__: _set_item,
    Tensor.contiguous: contiguous,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    Tensor.new_tensor: _new_tensor,
    Tensor.copy_: lambda x, source, non_blocking=False: aten.copy_(x, source, non_blocking),
    Tensor.__invert__: aten.bitwise_not,
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.__index__: lambda x: operator.index(x.item()),
    Tensor.__float__: lambda x: float(x.item()),
    Tensor.__complex__: lambda x: complex(x.item()),
}
ANYWHERE: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: _to_cuda,
    Tensor.numpy: _numpy,
    Tensor.pin_memory: lambda x, *_: x.clone(),
    Tensor.__format__: _format,
}


# ---------------------------------------------------------------------------- results that depend on values


def shape_depends_on_values(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether the shape of what an operator returns, or writes, is known to the device alone.

    torch tags such operators, some too generously: a tensor of integers as an index, or repetitions whose sum is given,
    have nothing to ask the device for.
    """
    packet = operation.overloadpacket
    if packet in _ASSIGNMENTS:
        return any(map(is_mask, args[1])) and not (args[2].numel() == 1 and args[2].device.type == "cpu")
    if torch.Tag.dynamic_output_shape not in operation.tags:
        return False
    if packet is aten.index:
        return any(map(is_mask, args[1]))
    return packet is not aten.repeat_interleave or kwargs.get("output_size") is None


def plausible(operation: Any, args: Any) -> Any:
    """A result, or its fake, that an operator might have that depends on values: ones, and masks all true.

    Raises `NotImplementedError` for an operator that it does not know.
    """
    x, packet = args[0], operation.overloadpacket
    if packet in (aten._local_scalar_dense, aten.item):
        return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1j if x.is_complex() else 1
    if packet in (aten.equal, aten.allclose, aten.is_nonzero):
        return True
    if packet is aten.nonzero:
        return _long(x, x.numel(), x.dim())
    if packet is aten.masked_select:
        return x.new_empty(torch.broadcast_shapes(x.shape, args[1].shape).numel())
    if packet in _ASSIGNMENTS:
        return x if operation._schema.is_mutable else torch.empty_like(x)
    if packet is aten.index:
        return operation(x, [part for index in args[1] for part in _all_of(index)])
    if packet in (aten._unique, aten._unique2, aten.unique_consecutive):
        return (x.new_empty(x.numel()), _long(x, *x.shape), _long(x, x.numel()))[: len(operation._schema.returns)]
    if packet is aten.unique_dim:
        return x.new_empty(x.shape), _long(x, x.shape[args[1]]), _long(x, x.shape[args[1]])
    if packet is aten.repeat_interleave:
        return _long(x, *x.shape)
    if packet is aten.bincount:
        return _long(x, max(args[2] if len(args) > 2 else 0, 1))
    raise NotImplementedError(f"what {operation} returns depends on values")


def _all_of(index: Tensor | None) -> list[Tensor | None]:
    """What stands for a mask among the indices: an integer index for each of its dimensions."""
    return [_long(index, index.numel())] * index.dim() if index is not None and is_mask(index) else [index]


def _long(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int64)
