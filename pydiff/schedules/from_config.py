"""Reads a diffusers scheduler config into a schedule, a prediction and the arguments of `make_times`.

The class named by `_class_name` decides how indices are spaced, where the last step ends and what the
defaults are; the tables below say so for each family. Only what determines times and coefficients is read:
solver orders, clipping and thresholding belong to whoever builds the solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import EDM, DiscreteBetas, RectifiedFlow, named_betas
from pydiff.schedules.prediction import EDMPrecond, Prediction
from pydiff.schedules.suggestion import suggestion

Config = Mapping[str, Any]
Parsed = tuple[NoiseSchedule, str | Prediction, dict[str, Any]]

_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
_SIGMA_GRIDS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}


@dataclass(frozen=True)
class _Family:
    """How one family of index-based schedulers places its times (defaults of the classes' constructors)."""

    spacing: str = "leading"
    drop_last: bool = False  # spaces n + 1 indices and drops the last
    integers: bool = True
    final: str = "config"  # "config": final_sigmas_type; "alpha": set_alpha_to_one; else the ending itself
    alpha_to_one: bool = True  # default of set_alpha_to_one
    span: bool = False  # sigma grids run between the spaced indices, not over the whole schedule
    betas: tuple[float, float] = (1e-4, 0.02)


_DDIM = _Family(final="alpha")
_DDPM = _Family(final="zero")
_PNDM = _Family(final="alpha", alpha_to_one=False)
_DPM = _Family(spacing="linspace", drop_last=True)
_DEIS = _Family(spacing="linspace", drop_last=True, final="sigma_min")
_EULER = _Family(spacing="linspace", integers=False, span=True)
_HEUN = _Family(spacing="linspace", integers=False, span=True, betas=(0.00085, 0.012))

_FAMILIES = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": _PNDM,
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM,
    "UniPCMultistepScheduler": _DPM,
    "DEISMultistepScheduler": _DEIS,
    "SASolverScheduler": _DEIS,
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _EULER,
    "LMSDiscreteScheduler": _EULER,
    "HeunDiscreteScheduler": _HEUN,
    "KDPM2DiscreteScheduler": _HEUN,
    "KDPM2AncestralDiscreteScheduler": _HEUN,
    "DPMSolverSDEScheduler": _HEUN,
}
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


def from_diffusers_config(config: Config | Any, *, mu: float | None = None, strict: bool = False) -> Parsed:
    """What a diffusers scheduler config says of a model: its noise schedule, its prediction and its time grid.

    Args:
        config: as saved in scheduler_config.json, or the scheduler itself, e.g. pipe.scheduler.
        mu: the resolution-dependent shift of `use_dynamic_shifting` configs, as diffusers' set_timesteps has it.
        strict: shift flow-matching times once; by default the last time is shifted twice as diffusers does, which is
            what its models are tuned to.

    Returns: (schedule, prediction, arguments of `make_times`). Times are exact floats where diffusers rounds those of
        sigma grids to integers. Solver orders, clipping and thresholding are not read.

    Raises: TypeError for what is neither a config nor a scheduler; ValueError for unknown classes and for settings
        without an equivalent, naming them.

    Example:
        config = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085}
        schedule, prediction, grid = pydiff.from_diffusers_config(config)
        times = pydiff.make_times(schedule, 20, **grid)
        plan = pydiff.make_plan("euler", schedule, times=times, prediction=prediction)
    """
    if not isinstance(config, Mapping):
        if not isinstance(getattr(config, "config", None), Mapping):
            raise TypeError(f"from_diffusers_config: give a scheduler or its config, got {type(config).__name__}")
        config = {**config.config, "_class_name": type(config).__name__}
    name = config.get("_class_name")
    if name in _EDM:
        return _from_edm(config)
    if name in _FLOW:
        return _from_flow(config, mu, strict)
    if name in _FAMILIES:
        family = _FAMILIES[str(name)]
        prediction = _one_of(config, "prediction_type", _PREDICTIONS, "epsilon")
        if config.get("use_flow_sigmas"):
            return _from_flow_sigmas(config, str(name), mu, prediction)
        schedule = _betas(config, family)
        return schedule, prediction, _index_options(config, family, schedule)
    known = [*_FAMILIES, *_FLOW, *_EDM]
    hint = suggestion(name, known)
    raise ValueError(
        f"from_diffusers_config: _class_name = {name!r} is not supported; known are {', '.join(known)}{hint}"
    )


def _betas(config: Config, family: _Family) -> DiscreteBetas:
    betas = config.get("trained_betas")
    if betas is None:
        betas = named_betas(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", family.betas[0]),
            config.get("beta_end", family.betas[1]),
        )
    return DiscreteBetas(betas, rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)))


def _index_options(config: Config, family: _Family, schedule: DiscreteBetas) -> dict[str, Any]:
    _one_of(config, "interpolation_type", ("linear",), "linear")
    _one_of(config, "timestep_type", ("discrete",), "discrete")
    spacing = _one_of(config, "timestep_spacing", ("linspace", "leading", "trailing"), family.spacing)
    offset = int(config.get("steps_offset", 0))
    options: dict[str, Any] = {"grid": spacing, "final_sigmas_type": _ending(config, family, spacing, offset)}
    if (grid := _sigma_grid(config)) is not None:
        options["grid"] = grid
        if grid == "beta":
            options["on"] = "ratio"
        return options | _sigma_ends(config, family, schedule, spacing, offset)
    if spacing == "leading":
        options["steps_offset"] = offset
    if spacing == "linspace":
        options["integers"] = family.integers
    if spacing != "trailing" and family.drop_last:
        options["drop_last"] = True
    return options | _clipped_start(config, schedule)


def _sigma_grid(config: Config) -> str | None:
    chosen = [grid for key, grid in _SIGMA_GRIDS.items() if config.get(key)]
    if len(chosen) > 1:
        raise ValueError(f"from_diffusers_config: grids {' and '.join(chosen)} exclude each other; keep one")
    return chosen[0] if chosen else None


def _ending(config: Config, family: _Family, spacing: str, offset: int) -> str:
    if family.final == "config":
        return str(_one_of(config, "final_sigmas_type", ("zero", "sigma_min"), "zero"))
    if family.final == "alpha":
        to_clean = bool(config.get("set_alpha_to_one", family.alpha_to_one))
        # Spacings that visit index 0 would end in a step from 0 to 0, a wasted model call; here it ends at clean.
        visits_0 = spacing == "linspace" or (spacing == "leading" and offset == 0)
        return "zero" if to_clean or visits_0 else "sigma_min"
    return family.final


def _sigma_ends(config: Config, family: _Family, schedule: DiscreteBetas, spacing: str, offset: int) -> dict[str, Any]:
    sigma_min, sigma_max = config.get("sigma_min"), config.get("sigma_max")
    if (sigma_min is None) != (sigma_max is None):
        raise ValueError("from_diffusers_config: sigma_min and sigma_max must be given together or not at all")
    if sigma_min is not None and sigma_max is not None:
        return {
            "t_start": schedule.t_of_log_snr(-math.log(sigma_max)),
            "t_end": schedule.t_of_log_snr(-math.log(sigma_min)),
        }
    if not family.span:
        return {}
    return {"span": spacing, "steps_offset": offset} if spacing == "leading" else {"span": spacing}


def _clipped_start(config: Config, schedule: DiscreteBetas) -> dict[str, Any]:
    """`lambda_min_clipped` leaves out the noisiest indices, those with lambda below it."""
    lowest = float(config.get("lambda_min_clipped", -math.inf))
    kept = [i for i in range(schedule.num_train_timesteps) if schedule.log_snr(float(i)) >= lowest]
    if not kept:
        raise ValueError(
            f"from_diffusers_config: lambda_min_clipped = {lowest:g} leaves no timestep; give a lower value"
        )
    return {} if kept[-1] == schedule.t_start else {"t_start": float(kept[-1])}


def _from_edm(config: Config) -> Parsed:
    schedule = EDM(config.get("sigma_min", 0.002), config.get("sigma_max", 80.0))
    kind = _one_of(config, "prediction_type", ("epsilon", "v_prediction"), "epsilon")
    prediction = EDMPrecond(config.get("sigma_data", 0.5), output_sign=1 if kind == "epsilon" else -1)
    grid = _one_of(config, "sigma_schedule", ("karras", "exponential"), "karras")
    ending = _one_of(config, "final_sigmas_type", ("zero", "sigma_min"), "zero")
    options: dict[str, Any] = {"grid": grid, "final_sigmas_type": ending}
    if grid == "karras":
        options["rho"] = float(config.get("rho", 7.0))
    return schedule, prediction, options


def _from_flow(config: Config, mu: float | None, strict: bool) -> Parsed:
    _one_of(config, "shift_terminal", (None,), None)
    _one_of(config, "invert_sigmas", (False,), False)
    schedule = RectifiedFlow(_flow_shift(config, "shift", mu))
    last = 1.0 / int(config.get("num_train_timesteps", 1000))
    if not strict and not config.get("use_dynamic_shifting"):
        last = schedule.shift_time(last)  # the class shifts its sigma_min once when built and again in set_timesteps
    options: dict[str, Any] = {"grid": _sigma_grid(config) or "uniform", "final_sigmas_type": "zero"}
    options["t_end"] = schedule.shift_time(last)
    if options["grid"] != "uniform":
        options["on"] = "time"
    return schedule, "flow_prediction", options


def _from_flow_sigmas(config: Config, name: str, mu: float | None, prediction: str) -> Parsed:
    """`use_flow_sigmas` of the DPM family: it stops short of t = 1, where log-SNR is -inf."""
    if (grid := _sigma_grid(config)) is not None:
        raise ValueError(f"from_diffusers_config: use_flow_sigmas with the {grid} grid is not supported; keep one")
    _one_of(config, "shift_terminal", (None,), None)
    # DEIS and SA-Solver repeat their last noisy sigma, a step of length 0; the others may be told to.
    _one_of(config, "final_sigmas_type", ("zero",), "zero")
    schedule = RectifiedFlow(_flow_shift(config, "flow_shift", mu))
    last = 1.0 / int(config.get("num_train_timesteps", 1000))
    if name == "UniPCMultistepScheduler":
        options = {"grid": "sgm_uniform", "t_start": 1.0 - 1e-6, "t_end": schedule.shift_time(last)}
    else:
        options = {"grid": "uniform", "t_start": schedule.shift_time(1.0 - last)}
    return schedule, prediction, {**options, "final_sigmas_type": "zero"}


def _flow_shift(config: Config, key: str, mu: float | None) -> float:
    if not config.get("use_dynamic_shifting"):
        return float(config.get(key, 1.0))
    if mu is None:
        raise ValueError("from_diffusers_config: use_dynamic_shifting = True needs mu, which depends on the image size")
    kind = _one_of(config, "time_shift_type", ("exponential", "linear"), "exponential")
    return math.exp(mu) if kind == "exponential" else float(mu)


def _one_of(config: Config, key: str, accepted: tuple[Any, ...], default: Any) -> Any:
    value = config.get(key, default)
    if value not in accepted:
        choices = ", ".join(map(repr, accepted))
        raise ValueError(f"from_diffusers_config: {key} = {value!r} is not supported; give {choices}")
    return value
