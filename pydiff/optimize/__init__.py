"""`optimize`: an existing model made faster in place, and `restore`, its inverse.

The package itself can be called: ``pydiff.optimize(model)`` is ``pydiff.optimize.optimize(model)``.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn

from pydiff.optimize import generic, rules
from pydiff.optimize.report import Entry, Report
from pydiff.optimize.swap import Fused, Rule, is_fused, refusal, swap_back, swap_in
from pydiff.optimize.vae import decode as decode

M = TypeVar("M", bound=nn.Module)
MemoryFormat = torch.memory_format | Literal["auto"] | None


@overload
def optimize(
    model: M, *, report: Literal[False] = False, memory_format: MemoryFormat = "auto", fold_upsampling: bool = False
) -> M: ...
@overload
def optimize(
    model: M, *, report: Literal[True], memory_format: MemoryFormat = "auto", fold_upsampling: bool = False
) -> tuple[M, Report]: ...
def optimize(
    model: M, *, report: bool = False, memory_format: MemoryFormat = "auto", fold_upsampling: bool = False
) -> M | tuple[M, Report]:
    """Make a model faster in place: fused kernels, no needless operations, channels-last, hoisting made possible.

    The model stays the same object, with its parameters, hooks, `state_dict` and pickling; `restore` gives back what
    it was. A module that is not known, or that is in a condition the fused form does not serve, stays as it is. When
    a fused module is called in a way it does not serve (training mode, gradients, autocast), it does what it did
    before, with one warning.

    Args:
        model: on any device; a diffusers UNet2DModel, UNet2DConditionModel, AutoencoderKL or transformer, a
            guided-diffusion or EDM U-Net, the bundled U-Net, or any module: its norm-activation pairs and attention are
            looked for.
        report: return (model, `Report`): what was replaced and what was not, and why.
        memory_format: of the convolutions' weights. "auto" is torch.channels_last for a model on a CUDA device and
            no change elsewhere; None is no change.
        fold_upsampling: fold nearest upsampling into the 3x3 convolution that follows it: 4 products in place of 9.
            On request, because its sums of weights are rounded once more: in low precision the error can be several
            times PyTorch's where a filter's weights cancel on a constant image.

    Returns: the model itself; with report (model, `Report`).

    Raises: TypeError if `model` is no module, or is compiled: optimize first, then compile. ValueError for another
        memory_format.

    Contract: close. Each fused operation errs at most twice as much as PyTorch's own chain in the same precision.

    Example:
        model, report = pydiff.optimize(pydiff.load_model("mnist"), report=True)
        print(report)  # what was replaced, what was not, and why
        x = pydiff.sample(model, (1, 1, 28, 28), steps=6, seed=0)
        pydiff.restore(model)
    """
    _check(model, memory_format)
    options = {"fold_upsampling": fold_upsampling}
    chosen: list[tuple[Entry, nn.Module, Rule]] = []
    left: list[tuple[Entry, nn.Module | None]] = []
    for name, module in list(model.named_modules()):
        rule = None if is_fused(module) else rules.find(module)
        if rule is None:
            continue
        cls, reason = type(module).__name__, refusal(module) or rule.refuse(module)
        if not reason and rule.option and not options[rule.option]:
            reason = f"on request alone: {rule.option}=True"
        if reason:
            left.append((Entry(name, cls, reason), module))
        else:
            chosen.append((Entry(name, cls, rule.what, rule.contract), module, rule))
    more = generic.plan(model, {id(module) for _, module, _ in chosen})
    chosen += [(Entry(name, type(m).__name__, rule.what, rule.contract), m, rule) for name, m, rule in more.chosen]
    left += [(entry, None) for entry in more.left]
    for _, module, rule in chosen:
        swap_in(module, rule)
    for entry, module, rule in list(chosen):  # a whole looks at its parts, which must be swapped by then
        reason = rule.prepare(module)
        if reason:
            swap_back(module)  # type: ignore[arg-type]
            left.append((entry._replace(what=reason, contract=""), module))
            chosen.remove((entry, module, rule))
    _to_memory_format(model, memory_format)
    if not any(is_fused(module) for module in model.modules()):
        warnings.warn(
            f"pydiff.optimize: nothing in {type(model).__name__} is known, it runs as before"
            + (f" ({left[0][0].name or left[0][0].cls}: {left[0][0].what})" if left else ""),
            stacklevel=3,
        )
    if not report:
        return model
    # A module that its parent has seen to (SD3's joint attention) is not one that was left.
    still = tuple(entry for entry, module in left if module is None or not is_fused(module))
    return model, Report(tuple(entry for entry, _, _ in chosen), still, tuple(_notes(model)))


def restore(model: M) -> M:
    """Undo `optimize`: every module's class, and the layout and storage of its weights, are what they were.

    Args:
        model: changed in place; one that was never optimised stays as it is.

    Returns: the model itself. Its outputs are those of the original, bit for bit.

    Raises: TypeError if `model` is no module.

    Example:
        model = pydiff.load_model("mnist")
        before = type(model)
        assert type(pydiff.optimize(model)) is not before
        assert type(pydiff.restore(model)) is before
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad():  # parameters stay such as can be trained
        for module in list(model.modules()):
            strides = vars(module).pop("_pydiff_strides", {})
            for name, p in module.named_parameters() if strides else ():
                if name in strides and p.ndim == len(strides[name]) and p.stride() != strides[name]:
                    before = torch.empty_strided(p.shape, strides[name], dtype=p.dtype, device=p.device)
                    p.data = before.copy_(p)
            if isinstance(module, Fused):
                swap_back(module)
    return model


def _check(model: Any, memory_format: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}"
            + ("; give its parts, pipe.unet and pipe.vae" if hasattr(model, "scheduler") else "")
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled by torch.compile; optimize the module first, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is TorchScript; give the torch.nn.Module it was made from")
    if memory_format not in ("auto", None, torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f'memory_format must be "auto", None, torch.channels_last or torch.contiguous_format, got {memory_format!r}'
        )


def _to_memory_format(model: nn.Module, memory_format: MemoryFormat) -> None:
    """Change the layout of the convolutions' weights, remembering the strides of those that change."""
    on_cuda = any(p.device.type == "cuda" for p in model.parameters())
    if memory_format is None or (memory_format == "auto" and not on_cuda):
        return
    wanted = torch.channels_last if memory_format == "auto" else memory_format
    strides = vars(model).setdefault("_pydiff_strides", {})
    with torch.inference_mode(False), torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 4 and not p.is_contiguous(memory_format=wanted):
                strides.setdefault(name, p.stride())
                p.data = p.data.contiguous(memory_format=wanted)


def _notes(model: nn.Module) -> Iterator[str]:
    devices = {p.device.type for p in model.parameters()}
    if devices - {"cuda"}:
        yield (
            f"parameters are on {', '.join(sorted(devices))}: Triton kernels run on CUDA devices, elsewhere the "
            "fused operations are plain PyTorch"
        )
    if model.training:
        yield "the model is in training mode, in which it runs as before: call model.eval()"


class _Package(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return optimize(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
