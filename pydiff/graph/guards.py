"""What a captured graph takes for granted: the model it was captured from, and torch's settings.

A graph repeats the addresses, numbers and branches of its capture. Values written into parameters in place are read
anew by every replay, and so is all that lies in the loop's own buffers; everything else must be as it was. A guard
remembers it and compares before each replay: storage and dtype of every parameter and buffer, which modules there are,
their hooks, and the plain attributes (numbers, flags, LoRA scales) of modules and of the objects they hold.

Not seen: what lies deeper in objects than `DEPTH`, containers of more than `LONGEST` entries, slots, class attributes,
arrays written in place, and the global variables of functions that the model's own function calls.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import compress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydiff.check.references import closure_values, global_values

DEPTH = 4
"""How many objects and containers, one in the other, are looked into below a module, a model or the condition."""
LONGEST = 1000
"""Longer containers are no settings, and are not looked into."""
_DTYPE = operator.attrgetter("dtype")
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CALLABLES = (BuiltinFunctionType, FunctionType, MethodType, ModuleType)
# Of torch's own entries in a module's `__dict__`, those that change what a call does.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")
_WATCHED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def settings(device: torch.device) -> tuple[Any, ...]:
    """Torch's switches that change which kernels a call launches. Grad mode is none: the loop always runs without."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    try:
        precision = (torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    except RuntimeError:  # set by the newer names, beside which the older ones cannot be asked
        precision = (matmul.fp32_precision, cudnn.conv.fp32_precision)
    sdp = torch.backends.cuda
    return (
        autocast,
        torch.get_default_dtype(),
        *precision,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        getattr(matmul, "allow_fp16_accumulation", None),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


class Guard:
    """A model as it is now, to be compared with what it is later."""

    def __init__(self, model: Any, arguments: Any = None):
        self._empty: list[tuple[str, dict[Any, Any]]] = []  # dictionaries that must stay so
        self._live: list[Any] = []  # containers, and
        self._kept: list[Any] = []  # what was in them
        self._names: list[str] = []  # of these
        self._fields: list[_Field] = []
        self._holders: list[dict[str, Any]] = []  # that must not get further attributes
        self._holder_names: list[str] = []
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        self._seen: set[int] = set()
        self._modules: list[nn.Module] = []
        self._visit("model", model, DEPTH)
        self._visit("cond", arguments, DEPTH)
        tensors = [tensor for _, tensor in self._tensors.values()]
        plain = [type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors]
        self._plain = [*compress(tensors, plain)]
        self._wrapped = [t for t, is_plain in zip(tensors, plain) if not is_plain]
        self._empty_dicts = [container for _, container in self._empty]
        self._getters = [(field.getter, field.holder) for field in self._fields]
        self._state = self._now()

    def holds(self) -> bool:
        """Whether nothing has changed that a graph would not see."""
        try:
            return not any(self._empty_dicts) and self._live == self._kept and self._now() == self._state
        except Exception:  # a comparison that cannot be made (of two arrays, say) compares what is not the same
            return False

    def difference(self) -> str:
        """The first thing that changed, in words; empty if nothing did."""
        try:
            return self._difference()
        except Exception:  # what was there is gone, or cannot be compared
            return "an attribute of the model was removed"

    def _difference(self) -> str:
        for name, live, kept in zip(self._names, self._live, self._kept):
            if not _same(live, kept):
                return _container_difference(name, live, kept)
        for name, container in self._empty:
            if container:
                return f"{name}: a hook, a module or a weight was added"
        now, before = self._now(), self._state
        for field, a, b in zip(self._fields, now.fields, before.fields):
            if not _same(a, b):
                return f"an attribute of {field.name} changed ({_field_difference(field, a, b)})"
        for a, b in zip(now.classes, before.classes):
            if a is not b:
                return f"the class of a module is {a.__name__} and was {b.__name__}"
        for name, a, b in zip(self._holder_names, now.sizes, before.sizes):
            if a != b:
                return f"{name} has {a} attributes and had {b}"
        named = {id(tensor): name for name, tensor in self._tensors.values()}
        memory = zip(zip(now.addresses, now.dtypes), zip(before.addresses, before.dtypes))
        for tensor, (a, b) in zip(self._plain, memory):
            if a != b:
                return f"{named[id(tensor)]} was given other memory"
        return "a tensor subclass among the weights was given other memory" if now != before else ""

    def _now(self) -> _Snapshot:
        return _Snapshot(
            [getter(holder) for getter, holder in self._getters],
            [*map(len, self._holders)],
            [*map(type, self._modules)],
            [*map(Tensor.data_ptr, self._plain)],
            [*map(_DTYPE, self._plain)],
            [_addresses(t) for t in self._wrapped],
        )

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _SCALARS) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._tensors[id(value)] = (name, value)
        elif isinstance(value, torch.jit.ScriptModule):  # its Python attributes are not what runs
            for key, tensor in (*value.named_parameters(), *value.named_buffers()):
                self._visit(f"{name}.{key}", tensor, depth)
        elif isinstance(value, nn.Module):
            self._visit_module(name, value)
        elif depth >= 0 and _length(value) <= LONGEST:
            if isinstance(value, (dict, list, set, deque)):
                self._watch(name, value)
            for label, item in _parts(name, value):
                self._visit(label, item, depth - 1)
            if isinstance(value, FunctionType):
                self._visit_function(name, value, depth)
            if _is_object(value):
                called = vars(type(value)).get("__call__")
                if isinstance(called, FunctionType):
                    self._visit_function(name, called, depth)
                self._watch_fields(name, vars(value), list(vars(value)), depth)

    def _visit_function(self, name: str, function: FunctionType, depth: int) -> None:
        """Its closure and its defaults, and what it uses of the variables of its file, functions and types aside."""
        self._fields.append(_Field(name, [*_FUNCTION], operator.attrgetter(*_FUNCTION), function))
        if function.__closure__:
            self._fields.append(_Field(name, list(closure_values(function)), _closure, function))
        used = {n: v for n, v in global_values(function).items() if not isinstance(v, (type, *_CALLABLES))}
        if used:
            self._watch_values(name, function.__globals__, list(used))
        for value in (function.__defaults__, function.__kwdefaults__, *used.values()):
            self._visit(name, value, depth - 1)

    def _watch(self, name: str, container: Any) -> None:
        """Python's == asks whether two are the same object first, so that an equal number is no change, and to compare
        another tensor in the place of one raises. Not where it has a single element: then they may be equal."""
        items = container.values() if isinstance(container, dict) else container
        if any(isinstance(item, Tensor) and item.numel() == 1 for item in items):
            self._fields.append(_Field(name, [], _identities, container))
        else:
            self._names.append(name)
            self._live.append(container)
            self._kept.append(container.copy())

    def _visit_module(self, name: str, module: nn.Module) -> None:
        own = vars(module)
        self._modules.append(module)
        for container in (own[entry] for entry in _WATCHED):
            if container:
                self._watch(name, container)
            else:
                self._empty.append((name, container))
        self._watch_fields(name, own, [key for key in own if key not in _OF_TORCH], DEPTH)
        for group in _WATCHED:
            for key, item in own[group].items():
                self._visit(f"{name}.{key}", item, DEPTH)

    def _watch_fields(self, name: str, holder: dict[str, Any], keys: list[str], depth: int) -> None:
        self._holders.append(holder)
        self._holder_names.append(name)
        self._watch_values(name, holder, keys)
        for key in keys:
            self._visit(f"{name}.{key}", holder[key], depth - 1)

    def _watch_values(self, name: str, holder: dict[str, Any], keys: list[str]) -> None:
        plain = [key for key in keys if not isinstance(holder[key], Tensor)]
        if plain:
            self._fields.append(_Field(name, plain, operator.itemgetter(*plain), holder))
        for key in (key for key in keys if isinstance(holder[key], Tensor)):
            self._fields.append(_Field(f"{name}.{key}", [], partial(_identity, key), holder))


class _Field(NamedTuple):
    """Attributes of an object, variables of a closure, tensors in a list: what `getter` finds in `holder`."""

    name: str
    keys: list[str]
    getter: Callable[[Any], Any]
    holder: Any


class _Snapshot(NamedTuple):
    fields: list[Any]
    sizes: list[int]
    classes: list[type]
    addresses: list[int]
    dtypes: list[torch.dtype]
    wrapped: list[Any]


def _identity(key: str, holder: dict[str, Any]) -> int:
    return id(holder[key])


def _identities(container: Any) -> list[int]:
    return [*map(id, container.values() if isinstance(container, dict) else container)]


def _is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's class, whose attributes say what it does. What torch.compile keeps of
    its own work, and adds to at any call, says nothing."""
    there = type(value).__module__
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, *_CALLABLES))
        and there not in ("builtins", "threading", "logging", "collections")
        and not there.startswith("torch._dynamo")
    )


def _closure(function: FunctionType) -> tuple[Any, ...]:
    return tuple(closure_values(function).values())


def _length(value: Any) -> int:
    try:
        return len(value)
    except Exception:  # what has none, or does not tell it
        return 0


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, function, partial or bound method holds."""
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r:.40}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"{name}[{k}]", item) for k, item in enumerate(value))
    elif isinstance(value, partial):
        yield from _parts(name, [value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, MethodType):
        yield from ((name, part) for part in (value.__self__, value.__func__))
    elif isinstance(value, FunctionType) and value.__closure__:
        yield from closure_values(value).items()


def _addresses(tensor: Tensor) -> tuple[Any, ...]:
    """The memory of a tensor subclass: of the tensors it wraps where it says which."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return tuple(address for name in names for address in _addresses(getattr(tensor, name)))
    try:
        return tensor.data_ptr(), tensor.dtype
    except (RuntimeError, NotImplementedError):
        return id(tensor), tensor.dtype


def _same(a: Any, b: Any) -> bool:
    try:
        return bool([a] == [b])
    except Exception:
        return False


def _container_difference(name: str, live: Any, kept: Any) -> str:
    if isinstance(live, dict) and isinstance(kept, dict):
        for key in dict.fromkeys([*kept, *live]):
            if key not in live or key not in kept or not _same(live[key], kept[key]):
                if isinstance(key, str):
                    return f"{name}.{key} was replaced"
    return f"{name}: a hook, a module, a weight or an entry was added, removed or replaced"


def _field_difference(field: _Field, now: Any, before: Any) -> str:
    if not field.keys:
        return "a tensor was replaced"
    if len(field.keys) == 1 and not isinstance(field.holder, FunctionType):  # an itemgetter of one key gives no tuple
        now, before = (now,), (before,)
    changed = ((key, a, b) for key, a, b in zip(field.keys, now, before) if not _same(a, b))
    return next((f"{key}: {b!r:.40} became {a!r:.40}" for key, a, b in changed), "")
