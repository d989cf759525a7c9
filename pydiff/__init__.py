"""pydiff compiles the sampling loop of any diffusion model.

Names are loaded on first use, so that importing pydiff does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "pydiff.sampler": ("Sampler", "sample"),
    "pydiff.loop": ("NonFiniteError", "StageInfo", "run_plan"),
    "pydiff.graph.capturable": ("CaptureReport", "check_capturable"),
    "pydiff.state": ("State", "init", "initial_noise", "step"),
    "pydiff.compiler": ("make_plan",),
    "pydiff.plan": ("Plan", "PlanError", "concatenate"),
    "pydiff.noise_schedule": (
        "EDM",
        "VE",
        "DiscreteBetas",
        "FromLogSNR",
        "NoiseSchedule",
        "RectifiedFlow",
        "VPCosine",
        "VPLinear",
    ),
    "pydiff.schedule_from_config": ("from_diffusers_config",),
    "pydiff.prediction": ("EDMPrecond", "Prediction", "get_prediction"),
    "pydiff.time_grid": ("list_grids", "make_times"),
    "pydiff.solvers": ("get_solver", "list_solvers"),
    "pydiff.models": ("load_model",),
    "pydiff.optimize": ("decode", "restore"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", "optimize", *sorted(_HOME)]

if TYPE_CHECKING:
    from pydiff.compiler import make_plan as make_plan
    from pydiff.graph.capturable import CaptureReport as CaptureReport
    from pydiff.graph.capturable import check_capturable as check_capturable
    from pydiff.loop import NonFiniteError as NonFiniteError
    from pydiff.loop import StageInfo as StageInfo
    from pydiff.loop import run_plan as run_plan
    from pydiff.models import load_model as load_model
    from pydiff.noise_schedule import EDM as EDM
    from pydiff.noise_schedule import VE as VE
    from pydiff.noise_schedule import DiscreteBetas as DiscreteBetas
    from pydiff.noise_schedule import FromLogSNR as FromLogSNR
    from pydiff.noise_schedule import NoiseSchedule as NoiseSchedule
    from pydiff.noise_schedule import RectifiedFlow as RectifiedFlow
    from pydiff.noise_schedule import VPCosine as VPCosine
    from pydiff.noise_schedule import VPLinear as VPLinear
    from pydiff.optimize import decode as decode
    from pydiff.optimize import optimize as optimize
    from pydiff.optimize import restore as restore
    from pydiff.plan import Plan as Plan
    from pydiff.plan import PlanError as PlanError
    from pydiff.plan import concatenate as concatenate
    from pydiff.prediction import EDMPrecond as EDMPrecond
    from pydiff.prediction import Prediction as Prediction
    from pydiff.prediction import get_prediction as get_prediction
    from pydiff.sampler import Sampler as Sampler
    from pydiff.sampler import sample as sample
    from pydiff.schedule_from_config import from_diffusers_config as from_diffusers_config
    from pydiff.solvers import get_solver as get_solver
    from pydiff.solvers import list_solvers as list_solvers
    from pydiff.state import State as State
    from pydiff.state import init as init
    from pydiff.state import initial_noise as initial_noise
    from pydiff.state import step as step
    from pydiff.time_grid import list_grids as list_grids
    from pydiff.time_grid import make_times as make_times


def __getattr__(name: str) -> Any:
    if name == "optimize":  # the package `pydiff.optimize`, which can be called
        return importlib.import_module("pydiff.optimize")
    if name not in _HOME:
        raise AttributeError(f"module 'pydiff' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
