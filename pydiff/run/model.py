"""What a model is: any callable model(x, t, **cond), and what can be told from one before it is called."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from pydiff.run.warning import warn

Model = Callable[..., torch.Tensor]

_warned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

FROM_CONFIG = (
    "schedule, prediction, times = pydiff.from_diffusers_config(pipe.scheduler)\n"
    "    sampler = pydiff.Sampler({model}, times=pydiff.make_times(schedule, 20, **times), schedule=schedule, "
    "prediction=prediction)"
)


def check_model(model: Any) -> None:
    """Raise TypeError unless `model` can be called as model(x, t, **cond): a pipeline has its model in a part."""
    part = next((name for name in ("unet", "transformer", "prior") if hasattr(model, name)), None)
    if hasattr(model, "scheduler") and part is not None and not isinstance(model, torch.nn.Module):
        line = FROM_CONFIG.format(model=f"pipe.{part}")
        raise TypeError(
            f"model is a pipeline ({type(model).__name__}): pydiff samples with the network in it, and with its "
            f"scheduler's noise schedule:\n    {line}"
        )
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")


def check_schedule_is_known(model: Any) -> None:
    """Raise TypeError for a diffusers model that comes without its schedule: `VPLinear` is not it."""
    if any(cls.__module__.split(".")[0] == "diffusers" for cls in type(model).__mro__):
        raise TypeError(
            f"model is diffusers' {type(model).__name__}, whose noise schedule and unit of time stand in its "
            f"scheduler's config; give both, e.g.\n    {FROM_CONFIG.format(model='model')}\n(a flow-matching model is "
            "told 1000 t: lambda x, t, **cond: model(x, 1000 * t, **cond)), or say schedule=pydiff.VPLinear() if that "
            "is what it was trained with"
        )


def warn_if_training(model: Any) -> None:
    """Warn, once for each module in training mode, that dropout and batch statistics enter its samples."""
    if isinstance(model, torch.nn.Module) and model.training and model not in _warned:
        _warned.add(model)
        warn(
            f"{type(model).__name__} is in training mode, where dropout and batch statistics change its "
            "samples; call model.eval() first"
        )


def first_parameter(model: Any) -> torch.Tensor | None:
    """The model's first parameter, which says where the model is now and in what dtype; None where it has none."""
    if not isinstance(model, torch.nn.Module):
        return None
    for parameter in model._parameters.values():
        if parameter is not None:
            return parameter
    for part in model._modules.values():
        found = first_parameter(part)
        if found is not None:
            return found
    return None
