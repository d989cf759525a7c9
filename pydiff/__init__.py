"""pydiff compiles the sampling loop of any diffusion model.

Names are loaded on first use, so that importing pydiff does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "pydiff.sampler": ("Sampler", "sample", "check_capturable"),
    "pydiff.run.loop": ("NonFiniteError", "run_plan"),
    "pydiff.run.options": ("StageInfo",),
    "pydiff.run.beginning": ("init", "initial_noise"),
    "pydiff.check.capturable": ("CaptureReport",),
    "pydiff.run.state": ("State", "step"),
    "pydiff.solvers.compiler": ("make_plan",),
    "pydiff.plans": ("Plan", "PlanError", "concatenate"),
    "pydiff.schedules": (
        "EDM",
        "VE",
        "DiscreteBetas",
        "EDMPrecond",
        "FromLogSNR",
        "NoiseSchedule",
        "Prediction",
        "RectifiedFlow",
        "VPCosine",
        "VPLinear",
        "from_diffusers_config",
        "get_prediction",
        "list_grids",
        "make_times",
    ),
    "pydiff.solvers": ("get_solver", "list_solvers"),
    "pydiff.models": ("load_model",),
    "pydiff.optimize": ("decode", "restore"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", "optimize", *sorted(_HOME)]

if TYPE_CHECKING:
    from pydiff.check.capturable import CaptureReport as CaptureReport
    from pydiff.models import load_model as load_model
    from pydiff.optimize import decode as decode
    from pydiff.optimize import optimize as optimize
    from pydiff.optimize import restore as restore
    from pydiff.plans import Plan as Plan
    from pydiff.plans import PlanError as PlanError
    from pydiff.plans import concatenate as concatenate
    from pydiff.run.beginning import init as init
    from pydiff.run.beginning import initial_noise as initial_noise
    from pydiff.run.loop import NonFiniteError as NonFiniteError
    from pydiff.run.loop import run_plan as run_plan
    from pydiff.run.options import StageInfo as StageInfo
    from pydiff.run.state import State as State
    from pydiff.run.state import step as step
    from pydiff.sampler import Sampler as Sampler
    from pydiff.sampler import check_capturable as check_capturable
    from pydiff.sampler import sample as sample
    from pydiff.schedules import EDM as EDM
    from pydiff.schedules import VE as VE
    from pydiff.schedules import DiscreteBetas as DiscreteBetas
    from pydiff.schedules import EDMPrecond as EDMPrecond
    from pydiff.schedules import FromLogSNR as FromLogSNR
    from pydiff.schedules import NoiseSchedule as NoiseSchedule
    from pydiff.schedules import Prediction as Prediction
    from pydiff.schedules import RectifiedFlow as RectifiedFlow
    from pydiff.schedules import VPCosine as VPCosine
    from pydiff.schedules import VPLinear as VPLinear
    from pydiff.schedules import from_diffusers_config as from_diffusers_config
    from pydiff.schedules import get_prediction as get_prediction
    from pydiff.schedules import list_grids as list_grids
    from pydiff.schedules import make_times as make_times
    from pydiff.solvers import get_solver as get_solver
    from pydiff.solvers import list_solvers as list_solvers
    from pydiff.solvers.compiler import make_plan as make_plan


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:  # most likely the folder of a source tree, found by its place alone
        remedy = f"pydiff in {__path__[0]} lacks what installing it brings; in its source tree: `pip install -e .`"
        raise ModuleNotFoundError(f"{error}: {remedy}", name=error.name, path=error.path) from error


def __getattr__(name: str) -> Any:
    if name == "optimize":  # the package `pydiff.optimize`, which can be called
        return _import("pydiff.optimize")
    if name not in _HOME:
        raise AttributeError(f"module 'pydiff' has no attribute {name!r}")
    value = getattr(_import(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
