"""How a module is made faster in place: its class is replaced by a subclass with another `forward`, and put back later.

The instance, its parameters, hooks, children and `state_dict` keys stay what they are, ``isinstance`` still holds, and
`restore` is the assignment of the old class. The subclass is made when it is needed, from a mixin of this package and
the model's own class, so that no model library is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

PACKED = "_pydiff_packed"  # how the names of packed weights begin


class Fused(nn.Module):
    """Base of the mixins. A mixin's `forward` calls ``super().forward`` wherever it cannot do better."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle and copy must be told how to make it again.
        return _rebuild, (self._original, _mixin(type(self))), object.__reduce_ex__(self, max(protocol, 2))[2]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the model's own class, which may register its subclasses."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        for name in vars(self):
            if name.startswith(PACKED):
                object.__setattr__(self, name, None)  # weights that move to another device leave nothing behind
        return super()._apply(*args, **kwargs)


_classes: dict[tuple[type, type], Any] = {}


def fused_class(mixin: type, original: type) -> Any:
    """The subclass of the module class `original` whose methods come from `mixin` first."""
    if (mixin, original) not in _classes:
        body = {"_original": original, "__module__": mixin.__module__, "__doc__": original.__doc__}
        _classes[mixin, original] = type(original.__name__, (mixin, original), body)
    return _classes[mixin, original]


def _mixin(cls: type) -> type:
    return cls.__mro__[1]


def _rebuild(original: type[nn.Module], mixin: type[Fused]) -> nn.Module:
    cls = fused_class(mixin, original)
    return cls.__new__(cls)


class Rule(NamedTuple):
    """One kind of module that has a faster form."""

    names: tuple[str, ...]
    """Qualified names of the classes it is for ("torch.nn.modules.normalization.GroupNorm"), never their subclasses; a
    name without a dot is met by a class of that name in any module."""
    mixin: type[Fused]
    """Whose methods the module gets."""
    what: str
    """What is done, for the report."""
    refuse: Callable[[Any], str | None] = lambda module: None
    """Why this instance cannot be done, or None."""
    prepare: Callable[[Any], str | None] = lambda module: None
    """Run when every module of the model has been swapped; a reason it returns undoes this swap."""
    contract: str = "close"
    """Its numbers beside the original's: "exact" (bit for bit) or "close"."""
    option: str = ""
    """The keyword of `optimize` that asks for it, of what is done on request alone."""


def refusal(module: nn.Module) -> str | None:
    """Why no module in this condition may be swapped, or None."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance (offloading or another patch)"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled already: optimize first, compile afterwards"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    return None


def is_fused(module: nn.Module) -> bool:
    """Whether a module was swapped."""
    return isinstance(module, Fused)


def swap_in(module: nn.Module, rule: Rule) -> None:
    """Give a module the rule's methods; `swap_back` takes them away."""
    module.__class__ = fused_class(rule.mixin, type(module))


def swap_back(module: Fused) -> None:
    """The class the module had, without what the fused forward kept on the instance."""
    kept = [name for name in vars(module) if name.startswith("_pydiff_")]
    if any(name.startswith(PACKED) for name in kept):
        for parameter in module.parameters():  # out of the storage it shared with its neighbours
            if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
                parameter.data = parameter.data.clone()
    for name in kept:
        delattr(module, name)
    cls: Any = type(module)
    if "_original" in vars(cls):
        module.__class__ = cls._original
    else:  # a class made on top of the fused one since: torch.nn.utils.parametrize
        cls.__bases__ = (cls._original,)


def ready(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the fused forward may run now: inference, and no autocast to follow. Warns once of each reason."""
    reason = not_ready(module, x)
    if reason and reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"pydiff.optimize: the model runs as it did before it was optimised: {reason}", stacklevel=3)
    return not reason


_warned: set[str] = set()


def not_ready(module: nn.Module, x: torch.Tensor) -> str:
    """Why the fused forward may not run now, or ""."""
    if module.training:
        return "it is in training mode (call model.eval())"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return "gradients are required (call it under torch.no_grad())"
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    ):
        return "a transform of torch.func or forward-mode differentiation is running"
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return "autocast is on (convert the model with .to(torch.bfloat16) instead)"
    return ""
