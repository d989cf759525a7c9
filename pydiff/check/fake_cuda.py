"""CUDA tensors without a GPU: shapes, strides, dtypes and a device, but no memory and no values.

`fake_cuda` copies tensors and whatever holds some (a module, a function, an object) to fake ones on ``cuda:0``. They
are used inside `fake_mode`: torch's own `FakeTensorMode`, what that cannot do where torch is built without CUDA, and a
stand-in for every result that depends on values (see `pydiff.check.fake_cuda_functions`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydiff.check.copied import Copies, rebuilt
from pydiff.check.fake_cuda_functions import ANYWHERE, CUDA, ON_CUDA, plausible, shape_depends_on_values
from pydiff.check.references import tensors

T = TypeVar("T")
_one_thread = threading.RLock()  # torch's fake mode keeps what it is doing in itself


def fake_cuda(value: T) -> T:
    """A copy of a tensor, or of anything that holds tensors, in which every tensor is a fake one on ``cuda:0``.

    Modules, functions with what they refer to, `functools.partial`, bound methods, objects with attributes, and lists,
    tuples and dicts of them; what was compiled is copied as it was before. What is shared stays shared. The originals,
    on whatever device, stay as they are, and no memory is taken for the copy's parameters. Raises `TypeError` for an
    object that cannot be copied.
    """
    with _one_thread, _Faking():
        return Copies().of(value)


@contextlib.contextmanager
def fake_mode() -> Iterator[None]:
    """Where fake CUDA tensors are computed with, and new tensors are fake ones of whatever device they name."""
    with _one_thread, fake_tensor_mode(), _Plausible(), _SpeltOut():
        yield


def is_fake(value: Any) -> bool:
    """Whether a fake tensor is in `value`: in arguments, modules, functions or objects."""
    return any(isinstance(t, FakeTensor) for t in tensors(value))


# ---------------------------------------------------------------------------- copies


@functools.cache
def fake_tensor_mode() -> FakeTensorMode:
    """The one mode that all fake tensors share."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake_tensor(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    mode = fake_tensor_mode()
    with mode:
        return FakeTensor(mode, meta, CUDA)


class _Faking(TorchFunctionMode):
    """Where a deep copy of a tensor is a fake one; a parameter copies itself by cloning its data."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__deepcopy__, Tensor.clone):
            return _fake_tensor(args[0])
        return function(*args, **kwargs or {})


# ---------------------------------------------------------------------------- modes


class ReentrantMode(TorchFunctionMode):
    """A function mode that is told, by `call`, of every function that is no Python code of torch's.

    torch sets a mode aside while a function runs that it has announced, so what `multi_head_attention_forward` calls
    would go unseen. Here such a function runs as if nobody had asked to be told of it, with the mode in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: list[Any] = [None]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = _unannounced(function)
        # A method that calls its namesake in the base class, which is announced by the same name, is that one.
        if body is None or self._running[-1] is function:
            return self.call(function, args, kwargs or {})
        self._running.append(function)
        try:
            with self:
                return body(*args, **kwargs or {})
        finally:
            self._running.pop()

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What becomes of a call; each subclass says it."""
        raise NotImplementedError


def _unannounced(function: Any) -> FunctionType | None:
    """A Python function of torch's whose own check for modes finds none; None for what is spelt out, or no such."""
    if not isinstance(function, FunctionType) or function in ANYWHERE:
        return None
    checks = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    if not checks:
        return None
    names = {**function.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    return rebuilt(function, names, function.__closure__)


class _SpeltOut(ReentrantMode):
    """Functions for which a torch without CUDA finds no device guard, out of others that need none."""

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled() and _would_record(function, (args, kwargs)):
            # Autograd would end the process: it asks for a device guard where no error is caught.
            raise NotImplementedError("gradients on fake CUDA tensors need a torch that is built with CUDA")
        if function in ANYWHERE:
            return ANYWHERE[function](*args, **kwargs)
        if function in ON_CUDA and isinstance(args[0], FakeTensor) and args[0].device.type == "cuda":
            return ON_CUDA[function](*args, **kwargs)
        return function(*args, **kwargs)


def _would_record(function: Any, arguments: Any) -> bool:
    """Whether autograd would take part in a call, in a torch that cannot do that on fake CUDA tensors."""
    if torch.backends.cuda.is_built() or getattr(function, "__name__", "") == "__get__":
        return False
    return any(isinstance(t, FakeTensor) and t.requires_grad for t in pytree.tree_leaves(arguments))


class _Plausible(TorchDispatchMode):
    """Goes on where a result depends on values: with one that it might have been."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if shape_depends_on_values(operation, args, kwargs):
            return plausible(operation, args)
        try:
            return operation(*args, **kwargs)
        except DataDependentOutputException:
            return plausible(operation, args)
