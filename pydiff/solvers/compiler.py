"""From a solver's name, a schedule and a time grid to a checked `Plan`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pydiff.plans.builder import PlanBuilder
from pydiff.plans.consistency import check_mean
from pydiff.plans.plan import Plan
from pydiff.plans.validation import stage_values
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import VPLinear
from pydiff.schedules.prediction import Prediction, get_prediction
from pydiff.schedules.suggestion import suggestion
from pydiff.schedules.time_grid import check_times, make_times
from pydiff.solvers.registry import Solver, get_solver

GuidanceScale = float | Sequence[float] | np.ndarray | Callable[[np.ndarray], Any]


def make_plan(
    solver: str,
    schedule: NoiseSchedule | None = None,
    steps: int | None = None,
    *,
    grid: str | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
    prediction: str | Prediction = "epsilon",
    guidance_scale: GuidanceScale = 1.0,
    clip: float | tuple[float, float] | None = None,
    known: bool = False,
    t_start: float | None = None,
    t_end: float | None = None,
    final_sigmas_type: str | None = None,
    grid_options: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Compile a sampler: a solver on a time grid of a noise schedule, for a model of one prediction.

    Args:
        solver: a registered name, see `pydiff.list_solvers`.
        schedule: the noise schedule that the model was trained with; VPLinear() by default.
        steps: intervals of the time grid, at least 1; a step takes one model call (a stage) or several. Left out where
            `times` or `sigmas` are given.
        grid: name of a time grid, see `pydiff.list_grids`; the schedule's own by default.
        times: float [n + 1], strictly decreasing times of the schedule, in place of a grid.
        sigmas: float [n + 1], strictly decreasing values of sigma / alpha, in place of times.
        prediction: what the model returns: "epsilon", "sample", "v_prediction", "score", "flow_prediction", "edm" or a
            `Prediction`; see `pydiff.get_prediction`.
        guidance_scale: of classifier-free guidance, m = m_uncond + scale * (m_cond - m_uncond): a number, one for each
            model call, or a function of the model's time. 1 is no guidance.
        clip: bounds of the estimated x0: (low, high), or c for (-c, c).
        known: also compile what stands in a masked region (inpainting): the clean image that a run is given as `known`,
            noised to the level of x. Runs that take a mask need it.
        t_start, t_end, final_sigmas_type: the ends of the grid, see `pydiff.make_times`.
        grid_options: further arguments of the grid, by name.
        options: the solver's own, see `pydiff solvers NAME` or ``pydiff.get_solver(name).options``.

    Returns: the plan, float64, validated. Its length is the number of model calls.

    Raises: ValueError or TypeError naming the argument, its value and what is accepted; `PlanError`, a ValueError,
        where the schedule is singular at a time, or the solver leaves no noise for `known`.

    Example:
        plan = pydiff.make_plan("dpmpp_2m", pydiff.VPLinear(), steps=10, grid="karras", guidance_scale=5.0)
        print(plan)  # one line a model call
        heun = pydiff.make_plan("heun", pydiff.EDM(), sigmas=[80.0, 10.0, 1.0, 0.0], prediction="sample")
        assert len(heun) == 5  # two calls a step, one in the last
    """
    entry = get_solver(solver)
    schedule = _check_schedule(schedule)
    prediction = get_prediction(prediction)
    _check_options(entry, options)
    options = {name: _plain(value) for name, value in options.items()}
    ends = {"t_start": t_start, "t_end": t_end, "final_sigmas_type": final_sigmas_type}
    points = _times(schedule, steps, grid, times, sigmas, ends, grid_options)
    builder = PlanBuilder(schedule, prediction, points)
    entry.build(builder, **options)
    plan = builder.build(
        solver,
        clip=_check_clip(clip),
        known=known,
        config={
            "schedule": _description(schedule),
            "prediction": _description(prediction),
            "options": options,
            "grid": "times" if times is not None or sigmas is not None else grid or schedule.default_grid,
        },
    )
    if clip is not None and "epsilon" in plan.targets:
        raise ValueError(
            f"clip bounds the estimated x0, but {solver} with these options integrates epsilon; "
            "use a solver for x0, such as 'ddim' or 'dpmpp_2m'"
        )
    if entry.exact_mean:
        check_mean(plan, noise=options.get("s_noise", 1.0) == 1.0)  # 0 leaves no draw, and less noise than there was
    if callable(guidance_scale):
        guidance_scale = np.array([float(guidance_scale(t)) for t in plan.model_times])
    scales = stage_values("guidance_scale", guidance_scale, len(plan))
    return plan if (scales == 1.0).all() else plan.with_guidance(scales)


def _check_schedule(schedule: NoiseSchedule | None) -> NoiseSchedule:
    if schedule is None or isinstance(schedule, NoiseSchedule):
        return VPLinear() if schedule is None else schedule
    remedy = ""
    if hasattr(schedule, "config"):
        remedy = "; for a diffusers scheduler: schedule, prediction, times = pydiff.from_diffusers_config(scheduler)"
    given = " ".join(repr(schedule).split())
    raise TypeError(f"schedule must be a NoiseSchedule such as pydiff.VPLinear(), got {given:.80}{remedy}")


def _description(thing: NoiseSchedule | Prediction) -> Any:
    try:
        return thing.to_dict()
    except (TypeError, ValueError):  # a schedule of the caller's own has no description but its name
        return {"type": repr(thing)}


def _check_options(entry: Solver, options: dict[str, Any]) -> None:
    for name in options:
        if name not in entry.options:
            mine = [*inspect.signature(make_plan).parameters][:-1]
            hint = suggestion(name, entry.options) or suggestion(name, mine)
            accepted = ", ".join(entry.options) or "none"
            raise TypeError(f"{entry.name} has no option {name!r}{hint} (its options: {accepted})")


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's, which keep the formulas in float64 and can be saved."""
    return value.item() if isinstance(value, np.generic) else value


def _times(
    schedule: NoiseSchedule,
    steps: int | None,
    grid: str | None,
    times: Any,
    sigmas: Any,
    ends: dict[str, Any],
    grid_options: dict[str, Any] | None,
) -> np.ndarray:
    if times is None and sigmas is None:
        if steps is None:
            raise TypeError("steps is missing: give steps=20, or times= or sigmas=")
        given = {name: value for name, value in ends.items() if value is not None}
        twice = sorted(given.keys() & (grid_options or {}).keys())
        if twice:
            raise TypeError(f"{', '.join(twice)} is given twice: as an argument and in grid_options")
        return make_times(schedule, steps, grid, **given, **(grid_options or {}))
    others = {"steps": steps, "grid": grid, "grid_options": grid_options, **ends}
    besides = [name for name, value in others.items() if value is not None]
    if besides == ["steps"] and len(times if times is not None else sigmas) == steps + 1:  # type: ignore[operator]
        besides = []
    if besides:
        raise TypeError(f"{', '.join(besides)} cannot be given together with explicit times or sigmas")
    return check_times(schedule, times, sigmas=sigmas)


def _check_clip(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = (-float(clip), float(clip)) if isinstance(clip, (int, float, np.generic)) else tuple(clip)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"clip must be (low, high) with low < high, or a positive number, got {clip!r}")
    return float(bounds[0]), float(bounds[1])
