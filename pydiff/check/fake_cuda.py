"""CUDA tensors without a GPU: shapes, strides, dtypes and a device, but no memory and no values.

`fake_cuda` copies tensors and whatever holds some (a module, a function, an object) to fake ones on ``cuda:0``. They
are used inside `fake_mode`: torch's own `FakeTensorMode`, what that cannot do where torch is built without CUDA, and a
stand-in for every result that depends on values (see `pydiff.check.fake_cuda_functions`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydiff.check.fake_cuda_functions import ANYWHERE, CUDA, ON_CUDA, plausible, shape_depends_on_values
from pydiff.check.references import closure_values, global_values

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
        return _copied(value, {})


@contextlib.contextmanager
def fake_mode() -> Iterator[None]:
    """Where fake CUDA tensors are computed with, and new tensors are fake ones of whatever device they name."""
    with _one_thread, fake_tensor_mode(), _Plausible(), _SpeltOut():
        yield


def is_fake(value: Any) -> bool:
    """Whether a fake tensor is in `value`: in arguments, modules, functions or objects."""
    return any(isinstance(t, FakeTensor) for t in tensors(value))


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
        return [*closure_values(leaf).values(), leaf.__defaults__, leaf.__kwdefaults__, *_globals(leaf).values()]
    return list(vars(leaf).values()) if _has_attributes(leaf) else []


def _has_attributes(leaf: Any) -> bool:
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (type, ModuleType, FunctionType))


# ---------------------------------------------------------------------------- copies


@functools.cache
def fake_tensor_mode() -> FakeTensorMode:
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


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    return pytree.tree_map(lambda leaf: _copied_leaf(leaf, memo), value)


def _copied_leaf(leaf: Any, memo: dict[int, Any]) -> Any:
    leaf = _as_written(leaf)
    if id(leaf) in memo:
        return memo[id(leaf)]
    if isinstance(leaf, FunctionType):
        return _copied_function(leaf, memo)
    if isinstance(leaf, functools.partial):
        return functools.partial(_copied(leaf.func, memo), *_copied(leaf.args, memo), **_copied(leaf.keywords, memo))
    if isinstance(leaf, MethodType):
        return MethodType(leaf.__func__, _copied(leaf.__self__, memo))
    if not isinstance(leaf, Tensor) and not _has_attributes(leaf):
        return leaf
    try:
        made = copy.deepcopy(leaf, memo)
    except Exception as error:
        raise TypeError(f"{type(leaf).__name__} cannot be copied: {error}") from error
    _copy_functions_within(made, memo, set())
    return made


def _as_written(leaf: Any) -> Any:
    """What torch.compile was given, for what it returned."""
    if isinstance(leaf, FunctionType):
        return getattr(leaf, "_torchdynamo_orig_callable", leaf)
    return getattr(leaf, "_orig_mod", leaf) if isinstance(leaf, nn.Module) else leaf


def _copy_functions_within(holder: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Exchange the functions among the attributes of a copied object: a deep copy keeps functions as they are."""
    if id(holder) in seen or isinstance(holder, Tensor) or not _has_attributes(holder):
        return
    seen.add(id(holder))
    for name, value in list(vars(holder).items()):
        if isinstance(value, FunctionType):
            vars(holder)[name] = _copied_function(value, memo)
        else:
            for leaf in pytree.tree_leaves(value):
                _copy_functions_within(leaf, memo, seen)


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with cells, defaults and globals of its own, as far as they hold tensors or change."""
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(CellType() for _ in function.__closure__ or ())
    names = memo.setdefault(id(function.__globals__), dict(function.__globals__))  # one for all functions of a file
    made = FunctionType(function.__code__, names, function.__name__, None, cells)
    made.__dict__.update(function.__dict__)
    memo[id(function)] = made  # before what it refers to, which may be itself
    contents = closure_values(function)
    for name, cell in zip(function.__code__.co_freevars, cells):
        if name in contents:
            cell.cell_contents = _copied_reference(contents[name], memo)
    made.__defaults__ = _copied_reference(function.__defaults__, memo)
    made.__kwdefaults__ = _copied_reference(function.__kwdefaults__, memo)
    names.update({name: _copied_reference(value, memo) for name, value in _globals(function).items()})
    return made


def _copied_reference(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a function refers to; what holds no tensor (a logger, a scheduler) need not allow it."""
    if any(True for _ in tensors(value)):
        return _copied(value, memo)
    return pytree.tree_map(lambda leaf: leaf, value)  # containers of its own


def _globals(function: FunctionType) -> dict[str, Any]:
    """Globals that a function names and that may hold tensors: no modules, no classes, no functions of other files."""
    there = function.__globals__
    if str(there.get("__name__")).split(".")[0] == "torch":
        return {}
    found = {name: _as_written(value) for name, value in global_values(function).items()}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, (type, ModuleType))
        and not (isinstance(value, FunctionType) and value.__globals__ is not there)
    }


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
        raise NotImplementedError


def _unannounced(function: Any) -> FunctionType | None:
    """A Python function of torch's whose own check for modes finds none; None for what is spelt out, or no such."""
    if not isinstance(function, FunctionType) or function in ANYWHERE:
        return None
    checks = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    if not checks:
        return None
    names = {**function.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


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
