"""The named spacings that `time_grid.make_times` chooses from: one small function each, in a table.

A grid function places n nodes from t_start to t_end; what follows them is `make_times`' affair. Adding a grid
is writing such a function under `@register_grid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pydiff.schedules.base import Array, NoiseSchedule
from pydiff.schedules.closed_form import VE, DiscreteBetas, RectifiedFlow
from pydiff.schedules.suggestion import suggestion

GridFunction = Callable[..., Array]


@dataclass(frozen=True)
class Grid:
    """A registered grid function."""

    nodes: GridFunction
    """nodes(schedule, n, t_start, t_end, **options) -> n times."""
    options: frozenset[str]
    """The names of its keyword options."""
    index_only: bool
    """Whether it spaces integer indices, and is defined for `DiscreteBetas` alone."""
    own_end: bool
    """Whether its last node follows from its stride, whatever t_end."""


_GRIDS: dict[str, Grid] = {}


def register_grid(name: str, index_only: bool = False, own_end: bool = False) -> Callable[[GridFunction], GridFunction]:
    """Register `nodes(schedule, n, t_start, t_end, **options) -> n decreasing times` under a name.

    index_only, own_end: the fields of `Grid`.
    """

    def register(function: GridFunction) -> GridFunction:
        code = function.__code__
        keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        _GRIDS[name] = Grid(function, frozenset(keywords), index_only, own_end)
        return function

    return register


def list_grids() -> list[str]:
    """The names of the time grids that `make_times` and `make_plan` accept; `pydiff grids` says what each is."""
    return list(_GRIDS)


def lookup_grid(name: str) -> Grid:
    """The grid registered under a name.

    Raises: ValueError for an unknown name, with a suggestion.
    """
    if name in _GRIDS:
        return _GRIDS[name]
    raise ValueError(f"grid = {name!r} is unknown; known are {', '.join(_GRIDS)}{suggestion(name, _GRIDS)}")


def check_indices(schedule: NoiseSchedule, name: str, n: int) -> None:
    """Raise ValueError unless an index grid of that name can place n nodes on this schedule."""
    if not isinstance(schedule, DiscreteBetas):
        raise ValueError(
            f"grid {name!r} spaces indices and needs a DiscreteBetas schedule, not {schedule!r}; "
            "use 'uniform' or 'logsnr'"
        )
    if n > schedule.num_train_timesteps:
        raise ValueError(
            f"grid {name!r}: steps = {n} is more than the {schedule.num_train_timesteps} training timesteps; "
            "use fewer steps, or a grid that is not bound to indices ('uniform', 'logsnr', 'karras')"
        )


# Continuous grids.


@register_grid("uniform")
def _uniform(schedule: NoiseSchedule, n: int, t_start: float, t_end: float) -> Array:
    """Even in t; for a rectified flow even in u with t = shift_time(u) (SD3, 2403.03206, eq. 23)."""
    if isinstance(schedule, RectifiedFlow) and schedule.shift != 1.0:
        u = _spaced(schedule.unshift_time(t_start), schedule.unshift_time(t_end), n)
        return _pinned(schedule.shift_time(u), t_start, t_end)
    return _spaced(t_start, t_end, n)


@register_grid("sgm_uniform")
def _sgm_uniform(schedule: NoiseSchedule, n: int, t_start: float, t_end: float, *, clean_follows: bool) -> Array:
    """`uniform`, except that a clean time that follows takes the place of t_end (sgm_uniform of ComfyUI)."""
    nodes = _uniform(schedule, n + 1 if clean_follows else n, t_start, t_end)
    return nodes[:-1] if clean_follows else nodes


@register_grid("logsnr")
def _logsnr(schedule: NoiseSchedule, n: int, t_start: float, t_end: float) -> Array:
    """Even in lambda = log(alpha/sigma) (DPM-Solver, 2206.00927, section 3.4)."""
    first, last = _ratio_ends(schedule, t_start, t_end, "logsnr")
    times = schedule.t_of_log_snr(_spaced(-math.log(first), -math.log(last), n))
    return _pinned(times, t_start, t_end)


@register_grid("quadratic")
def _quadratic(schedule: NoiseSchedule, n: int, t_start: float, t_end: float) -> Array:
    """Even in sqrt(t) above the clean time (DDIM, 2010.02502, appendix D; DPM-Solver's time_quadratic)."""
    zero = schedule.clean_time
    return _pinned(zero + _spaced(math.sqrt(t_start - zero), math.sqrt(t_end - zero), n) ** 2, t_start, t_end)


@register_grid("karras")
def _karras(
    schedule: NoiseSchedule,
    n: int,
    t_start: float,
    t_end: float,
    *,
    rho: float = 7.0,
    on: str = "ratio",
    span: str | None = None,
    steps_offset: int = 0,
) -> Array:
    """Even in ratio^(1/rho), ratio = sigma/alpha (EDM, 2206.00364, eq. 5).

    rho: how much denser the nodes are towards the clean end; 1 is even in sigma/alpha.
    on, span, steps_offset: as for `exponential`.
    """
    if not (math.isfinite(rho) and rho > 0.0):
        raise ValueError(f"grid 'karras': rho = {rho!r} is not accepted; give a finite number > 0")
    t_start, t_end = _span_ends(schedule, n, t_start, t_end, span, steps_offset)
    first, last = _axis_ends(schedule, t_start, t_end, on, "karras")
    return _from_axis(schedule, _spaced(first ** (1 / rho), last ** (1 / rho), n) ** rho, t_start, t_end, on)


@register_grid("exponential")
def _exponential(
    schedule: NoiseSchedule,
    n: int,
    t_start: float,
    t_end: float,
    *,
    on: str = "ratio",
    span: str | None = None,
    steps_offset: int = 0,
) -> Array:
    """Even in log(sigma/alpha): k-diffusion's exponential grid.

    on: "ratio" places the nodes on sigma/alpha, "time" on t itself (what diffusers does for flow schedules).
    span: "leading", "trailing" or "linspace" takes the two ends from that index grid with the same number of
    nodes and `steps_offset`, as diffusers' Euler family does, instead of from t_start and t_end.
    steps_offset: of the index grid that `span` names.
    """
    t_start, t_end = _span_ends(schedule, n, t_start, t_end, span, steps_offset)
    first, last = _axis_ends(schedule, t_start, t_end, on, "exponential")
    if last <= 0.0:
        raise ValueError(f"grid 'exponential': t_end = {t_end:g} has no logarithm; give t_end > 0")
    return _from_axis(schedule, np.exp(_spaced(math.log(first), math.log(last), n)), t_start, t_end, on)


@register_grid("beta")
def _beta(
    schedule: NoiseSchedule,
    n: int,
    t_start: float,
    t_end: float,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    on: str = "time",
    span: str | None = None,
    steps_offset: int = 0,
) -> Array:
    """Quantiles of Beta(alpha, beta) between the ends (2407.12173).

    alpha, beta: below 1 they make the nodes denser towards the clean and the noisy end.
    on: "time" places the nodes on t, "ratio" on sigma/alpha (diffusers' variant).
    span, steps_offset: as for `exponential`.
    """
    try:
        from scipy.special import betaincinv  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("grid 'beta' needs scipy: pip install 'pydiff[scipy]', or use another grid") from error
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"grid 'beta': {name} = {value!r} is not accepted; give a finite number > 0")
    t_start, t_end = _span_ends(schedule, n, t_start, t_end, span, steps_offset)
    first, last = _axis_ends(schedule, t_start, t_end, on, "beta")
    quantile = np.asarray(betaincinv(alpha, beta, _spaced(1.0, 0.0, n)), dtype=np.float64)
    return _from_axis(schedule, last + quantile * (first - last), t_start, t_end, on)


# Index grids: the timestep spacings of 2305.08891, table 2, with the integers diffusers gives


@register_grid("linspace", index_only=True)
def _linspace(
    schedule: NoiseSchedule, n: int, t_start: float, t_end: float, *, drop_last: bool = False, integers: bool = True
) -> Array:
    """Evenly from t_start to t_end, both included.

    drop_last: space n + 1 nodes and drop the last (diffusers' DPM-Solver, UniPC, DEIS and SA-Solver).
    integers: round to whole indices; False keeps fractions (diffusers' Euler, Heun, LMS and KDPM2).
    """
    # Ascending before reversing, because rounding ties must fall as they do in diffusers.
    count = n + 1 if drop_last else n
    # diffusers reverses a linspace that starts at 0, so its single node is the clean end; ours is the noisy
    # one.
    nodes = np.linspace(t_end, t_start, count)[::-1] if count > 1 else np.array([t_start])
    return np.array((nodes.round() if integers else nodes)[:n])


@register_grid("leading", index_only=True, own_end=True)
def _leading(
    schedule: NoiseSchedule, n: int, t_start: float, t_end: float, *, drop_last: bool = False, steps_offset: int = 0
) -> Array:
    """Multiples of floor(N/n) plus `steps_offset`; starts well below N - 1.

    drop_last: as for `linspace`.
    steps_offset: added to every index.
    """
    count = n + 1 if drop_last else n
    stride = int(t_start + 1) // count
    return np.array((np.arange(count) * stride)[::-1][:n] + steps_offset, dtype=np.float64)


@register_grid("trailing", index_only=True, own_end=True)
def _trailing(schedule: NoiseSchedule, n: int, t_start: float, t_end: float) -> Array:
    """From t_start down by N/n, rounded: starts at the noisiest index and ends one full stride above clean."""
    # arange may run one element too far by rounding (steps that do not divide N), hence the cut.
    count = t_start + 1.0
    return np.array(np.round(np.arange(count, 0.0, -count / n))[:n] - 1.0)


# Shared by the grids.


def _spaced(first: float, last: float, n: int) -> Array:
    return np.linspace(first, last, n)


def _pinned(times: Array, t_start: float, t_end: float) -> Array:
    """The ends as given, not as a round trip through the grid's axis returns them."""
    pinned = np.array(times)
    pinned[0] = t_start
    if pinned.size > 1:
        pinned[-1] = t_end
    return pinned


def t_of_ratio(schedule: NoiseSchedule, ratio: Array) -> Array:
    """Times with sigma/alpha = ratio; ratio 0 is the clean time."""
    if isinstance(schedule, VE):  # the time is sigma itself
        return ratio
    with np.errstate(divide="ignore"):
        return schedule.t_of_log_snr(np.asarray(-np.log(ratio), dtype=np.float64))


def _ratio_ends(schedule: NoiseSchedule, t_start: float, t_end: float, grid: str) -> tuple[float, float]:
    """sigma/alpha at both ends, which must be finite and not 0."""
    first, last = schedule.log_snr(t_start), schedule.log_snr(t_end)
    if math.isinf(first):
        raise ValueError(
            f"grid {grid!r}: sigma/alpha is infinite at t_start = {t_start:g} of {schedule!r}; "
            "give a smaller t_start, on='time' where the grid takes it, or a grid in time ('uniform')"
        )
    if math.isinf(last):
        raise ValueError(f"grid {grid!r}: sigma is 0 at t_end = {t_end:g} of {schedule!r}; give a larger t_end")
    return math.exp(-first), math.exp(-last)


def _axis_ends(schedule: NoiseSchedule, t_start: float, t_end: float, on: str, grid: str) -> tuple[float, float]:
    if on == "time":
        return t_start, t_end
    if on == "ratio":
        return _ratio_ends(schedule, t_start, t_end, grid)
    raise ValueError(f"grid {grid!r}: on = {on!r} is not accepted; give 'ratio' (sigma/alpha) or 'time'")


def _from_axis(schedule: NoiseSchedule, values: Array, t_start: float, t_end: float, on: str) -> Array:
    return _pinned(values if on == "time" else t_of_ratio(schedule, values), t_start, t_end)


def _span_ends(
    schedule: NoiseSchedule, n: int, t_start: float, t_end: float, span: str | None, steps_offset: int
) -> tuple[float, float]:
    if span is None:
        return t_start, t_end
    entry = lookup_grid(span)
    options: dict[str, Any] = {"steps_offset": steps_offset} if "steps_offset" in entry.options else {}
    if not entry.index_only:
        raise ValueError(f"span = {span!r} is not an index grid; give 'leading', 'trailing' or 'linspace'")
    check_indices(schedule, span, n)
    nodes = entry.nodes(schedule, n, t_start, t_end, **options)
    return float(nodes[0]), float(nodes[-1])
