"""Where the stages of a sampler sit: strictly decreasing float64 times from the noisiest to where sampling ends.

A grid with n steps has n + 1 times. It ends in one of two ways, as `final_sigmas_type` says:

    "zero"         n nodes from t_start to t_end, then the schedule's clean time (sigma = 0 exactly)
    "sigma_min"    n + 1 nodes from t_start to t_end, which is left noisy

The spacings themselves are the small functions of `grid_nodes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pydiff.schedules.base import Array, NoiseSchedule
from pydiff.schedules.closed_form import RectifiedFlow
from pydiff.schedules.grid_nodes import Grid, check_indices, list_grids, lookup_grid, t_of_ratio

__all__ = ["FINAL_SIGMAS_TYPES", "check_times", "list_grids", "make_times"]

FINAL_SIGMAS_TYPES = ("zero", "sigma_min")


def make_times(
    schedule: NoiseSchedule,
    steps: int,
    grid: str | None = None,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final_sigmas_type: str | None = None,
    **options: Any,
) -> Array:
    """The time grid of a sampler, in the schedule's own time.

    Args:
        schedule: a noise schedule; it has defaults for all but steps.
        steps: intervals of the grid, at least 1.
        grid: a name of `list_grids`.
        t_start, t_end: the noisiest time, and the last noisy one (for "leading" and "trailing", whose last node follows
            from their stride, with "sigma_min" alone).
        final_sigmas_type: "zero": steps times from t_start to t_end, then the clean time. "sigma_min": steps + 1 times
            from t_start to t_end, whose noise is left in the sample.
        options: further arguments of one grid, such as rho of "karras"; see `pydiff grids`.

    Returns: float64 [steps + 1], strictly decreasing. (The uniform grid of a rectified flow reaches the clean time by
        itself: with "zero" and no t_end it is steps + 1 evenly spaced times.)

    Raises: ValueError for unknown names and options, steps < 1, times out of range, and for grids whose nodes coincide
        (more steps than indices).

    Example:
        times = pydiff.make_times(pydiff.EDM(), 10, "karras", rho=7.0)
        assert len(times) == 11 and times[0] == 80.0 and times[-1] == 0.0
        plan = pydiff.make_plan("heun", pydiff.EDM(), times=times)
    """
    name = schedule.default_grid if grid is None else grid
    entry = lookup_grid(name)
    n = _check_steps(steps)
    ending = _check_ending(schedule.final_sigmas_type if final_sigmas_type is None else final_sigmas_type)
    start = schedule.t_start if t_start is None else float(t_start)
    if name == "uniform" and isinstance(schedule, RectifiedFlow) and ending == "zero" and t_end is None:
        ending, t_end = "sigma_min", schedule.clean_time  # n + 1 nodes, of which the last is clean
    end = schedule.t_end if t_end is None else float(t_end)
    _check_ends(schedule, start, end)
    _check_options(name, entry, options)
    if entry.own_end and ending == "zero" and t_end is not None:
        raise ValueError(
            f"grid {name!r} ends where its stride leads: t_end = {t_end:g} would not be used; leave it out, "
            "give final_sigmas_type='sigma_min' to end there, or use grid 'linspace'"
        )
    if entry.index_only:
        check_indices(schedule, name, n)
        nodes = _index_nodes(name, entry, schedule, n, start, end, ending, options)
    else:
        if "clean_follows" in entry.options:
            options["clean_follows"] = ending == "zero"
        nodes = entry.nodes(schedule, n if ending == "zero" else n + 1, start, end, **options)
    times = np.append(nodes, schedule.clean_time) if ending == "zero" else nodes
    return _check_grid(schedule, times, name, n)


def check_times(
    schedule: NoiseSchedule,
    times: Sequence[float] | Array | None = None,
    *,
    sigmas: Sequence[float] | Array | None = None,
) -> Array:
    """A time grid given by the user, checked: float64 [n + 1] times of the schedule.

    Args:
        schedule: whose times they are.
        times: at least two, finite, strictly decreasing, inside the schedule's range.
        sigmas: in their place, noise ratios sigma / alpha, which VE and EDM have as times; a last 0 is the clean time.

    Raises: ValueError naming the index and the values that break a rule.
    """
    if (times is None) == (sigmas is None):
        raise ValueError("check_times: give exactly one of times and sigmas")
    name = "times" if sigmas is None else "sigmas"
    values = np.array(times if sigmas is None else sigmas, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"{name} of shape {values.shape} is not accepted; give a vector of steps + 1 >= 2 values")
    low, high = (schedule.clean_time, schedule.t_max) if sigmas is None else (0.0, math.inf)
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"{name}[{i}] = {values[i]:g} is not accepted; give finite values in [{low:g}, {high:g}]")
    rising = ~(np.diff(values) < 0.0)
    if rising.any():
        i = int(rising.argmax())
        raise ValueError(
            f"{name}[{i}] = {values[i]!r} and {name}[{i + 1}] = {values[i + 1]!r} do not decrease; "
            "give strictly decreasing values, the noisiest first"
        )
    return values if sigmas is None else t_of_ratio(schedule, values)


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps = {steps!r} is not accepted; give an integer >= 1")
    return int(steps)


def _check_ending(ending: str) -> str:
    if ending not in FINAL_SIGMAS_TYPES:
        raise ValueError(f"final_sigmas_type = {ending!r} is unknown; give 'zero' or 'sigma_min'")
    return ending


def _check_ends(schedule: NoiseSchedule, start: float, end: float) -> None:
    for name, value in (("t_start", start), ("t_end", end)):
        if not (math.isfinite(value) and schedule.clean_time <= value <= schedule.t_max):
            limits = f"[{schedule.clean_time:g}, {schedule.t_max:g}]"
            raise ValueError(f"{name} = {value!r} is not accepted by {schedule!r}; give a time in {limits}")
    if start <= end:
        raise ValueError(f"t_start = {start:g} must be above t_end = {end:g}: sampling runs from noisy to clean")


def _check_options(name: str, entry: Grid, options: dict[str, Any]) -> None:
    public = entry.options - {"clean_follows"}
    unknown = sorted(set(options) - public)
    if unknown:
        known = ", ".join(sorted(public)) or "no options"
        raise ValueError(f"grid {name!r}: option {unknown[0]!r} is unknown; it takes {known}")


def _check_grid(schedule: NoiseSchedule, times: Array, name: str, n: int) -> Array:
    if not np.all(np.diff(times) < 0.0):
        i = int(np.argmin(np.diff(times) < 0.0))
        raise ValueError(
            f"grid {name!r} with steps = {n}: nodes {i} and {i + 1} are {times[i]:g} and {times[i + 1]:g} "
            "and do not decrease; use fewer steps, another grid, or another final_sigmas_type"
        )
    if times[0] > schedule.t_max or times[-1] < schedule.clean_time:
        raise ValueError(
            f"grid {name!r} with steps = {n} runs from {times[0]:g} to {times[-1]:g}, outside "
            f"[{schedule.clean_time:g}, {schedule.t_max:g}]; use fewer steps or a smaller steps_offset"
        )
    return times


def _index_nodes(
    name: str,
    entry: Grid,
    schedule: NoiseSchedule,
    n: int,
    start: float,
    end: float,
    ending: str,
    options: dict[str, Any],
) -> Array:
    """`n` indices; with "sigma_min" t_end follows them, and linspace stops short of it to leave that last
    step.
    """
    if not (start.is_integer() and end.is_integer()):
        raise ValueError(f"grid {name!r}: t_start = {start:g} and t_end = {end:g} must be whole indices")
    if ending == "sigma_min" and "drop_last" in entry.options:
        options.setdefault("drop_last", name == "linspace")
    nodes = entry.nodes(schedule, n, start, end, **options)
    return np.append(nodes, end) if ending == "sigma_min" else nodes
