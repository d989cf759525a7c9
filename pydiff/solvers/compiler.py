"""From a solver's name, a schedule and a time grid to a checked `Plan`."""

from __future__ import annotations

import difflib
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
    """Compile a sampler.

    Args:
        solver: a registered name, see `pydiff.list_solvers()`.
        schedule: noise schedule; VPLinear() by default.
        steps: intervals of the time grid, at least 1. Not with `times` or `sigmas`.
        grid: name of a time grid (`pydiff.list_grids()`); the schedule's own by default.
        times: n + 1 strictly decreasing times of the schedule, in place of a grid.
        sigmas: n + 1 strictly decreasing values of sigma / alpha, in place of times.
        prediction: what the model returns: "epsilon", "sample", "v_prediction", "score", "flow_prediction" or a
            `Prediction`.
        guidance_scale: of classifier-free guidance: a number, one for each model call, or a function of the times.
        clip: bounds of the estimated x0: (low, high), or c for (-c, c).
        known: also compile what stands in a masked region (inpainting); runs that take a mask need it.
        t_start, t_end, final_sigmas_type, grid_options: passed to the grid, see `pydiff.make_times`.
        options: the solver's own, see `pydiff plan --help` or `get_solver(name).options`.

    Returns: the plan, float64, validated.
    Raises: ValueError or TypeError naming the argument, its value and what is accepted.
    """
    entry = get_solver(solver)
    schedule = VPLinear() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule such as pydiff.VPLinear(), got {schedule!r}")
    prediction = get_prediction(prediction)
    _check_options(entry, options)
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


def _description(thing: NoiseSchedule | Prediction) -> Any:
    try:
        return thing.to_dict()
    except (TypeError, ValueError):  # a schedule of the caller's own has no description but its name
        return {"type": repr(thing)}


def _check_options(entry: Solver, options: dict[str, Any]) -> None:
    for name in options:
        if name not in entry.options:
            close = difflib.get_close_matches(name, entry.options, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            accepted = ", ".join(entry.options) or "none"
            raise TypeError(f"{entry.name} has no option {name!r}{hint} (its options: {accepted})")


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
        return make_times(schedule, steps, grid, **ends, **(grid_options or {}))
    others = {"steps": steps, "grid": grid, "grid_options": grid_options, **ends}
    given = [name for name, value in others.items() if value is not None]
    if given == ["steps"] and len(times if times is not None else sigmas) == steps + 1:  # type: ignore[operator]
        given = []
    if given:
        raise TypeError(f"{', '.join(given)} cannot be given together with explicit times or sigmas")
    return check_times(schedule, times, sigmas=sigmas)


def _check_clip(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = (-clip, clip) if isinstance(clip, (int, float)) else tuple(clip)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"clip must be (low, high) with low < high, or a positive number, got {clip!r}")
    return float(bounds[0]), float(bounds[1])
