"""The contract every noise schedule keeps: checked times, numpy arrays or floats, comparison, saving.

The schedules themselves, and the definitions of lambda, f and g^2, are in `closed_form.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Value = TypeVar("Value", float, Array)


def number_argument(owner: str, name: str, value: float, low: float = 0.0, inclusive: bool = False) -> float:
    """The argument as a finite float above `low`, or a ValueError that names it."""
    number = float(value)
    if not math.isfinite(number) or number < low or (number == low and not inclusive):
        bound = ">=" if inclusive else ">"
        raise ValueError(f"{owner}: {name} = {value!r} is not accepted; give a finite number {bound} {low:g}")
    return number


class NoiseSchedule(ABC):
    """How much signal and how much noise a sample holds at time t: x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I).

    The time is the schedule's own and is what the model is told; it grows with the noise. Methods take a float and
    return one, or take a float64 array and return one of its shape; they raise ValueError for a time outside
    [clean_time, t_max]. Schedules compare, hash, and save as `to_dict`.

    A schedule of your own is a `FromLogSNR`, or a subclass that writes the underscored methods, on checked arrays.
    """

    t_start: float
    """The noisiest time of a default grid, where sampling starts."""
    t_end: float
    """The last noisy time of a default grid."""
    clean_time: float = 0.0
    """Where sigma is 0, exactly."""
    t_max: float = 1.0
    """The largest valid time."""
    final_sigmas_type: str = "zero"
    """Whether a default grid goes on to `clean_time` ("zero") or ends at `t_end` and leaves its noise ("sigma_min")."""
    default_grid: str = "logsnr"
    """The name in `list_grids` of the grid that `make_times` takes by default."""
    variance_preserving: bool = False
    """Whether alpha^2 + sigma^2 = 1."""
    parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor's arguments, each kept as an attribute of that name."""
    _registry: ClassVar[dict[str, type[NoiseSchedule]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NoiseSchedule._registry[cls.__name__] = cls

    @abstractmethod
    def _log_alpha(self, t: Array) -> Array: ...

    @abstractmethod
    def _sigma(self, t: Array) -> Array: ...

    @abstractmethod
    def _t_of_log_snr(self, log_snr: Array) -> Array: ...

    @abstractmethod
    def _drift(self, t: Array) -> Array: ...

    @abstractmethod
    def _diffusion_squared(self, t: Array) -> Array: ...

    def _alpha(self, t: Array) -> Array:
        return np.exp(self._log_alpha(t))

    def _log_snr(self, t: Array) -> Array:
        return self._log_alpha(t) - np.log(self._sigma(t))

    def alpha(self, t: Value) -> Value:
        """The coefficient of x0 at time t, in [0, 1]. Raises ValueError for a t out of range."""
        return self._apply(self._alpha, t)

    def sigma(self, t: Value) -> Value:
        """The coefficient of the noise at time t: standard deviation, >= 0. Raises ValueError for a t out of range."""
        return self._apply(self._sigma, t)

    def log_alpha(self, t: Value) -> Value:
        """log alpha(t); -inf where alpha = 0. Raises ValueError for a t out of range."""
        return self._apply(self._log_alpha, t)

    def log_snr(self, t: Value) -> Value:
        """lambda(t) = log(alpha / sigma), decreasing in t; +inf where sigma = 0, -inf where alpha = 0.

        This is the half-log-SNR of DPM-Solver (2206.00927): half of log(alpha^2 / sigma^2), which VDM (2107.00630) and
        others call the log-SNR. Raises ValueError for a t out of range.
        """
        return self._apply(self._log_snr, t)

    def drift(self, t: Value) -> Value:
        """f(t) = d log alpha / dt of the SDE dx = f x dt + g dw (2011.13456, eq. 5).

        Raises: ValueError where alpha(t) = 0 makes it infinite.
        """
        return self._finite("drift", self._drift, t)

    def diffusion_squared(self, t: Value) -> Value:
        """g(t)^2 = d sigma^2 / dt - 2 f sigma^2 of the SDE dx = f x dt + g dw (2011.13456, eq. 5).

        Raises: ValueError where alpha(t) = 0 makes it infinite.
        """
        return self._finite("diffusion_squared", self._diffusion_squared, t)

    def init_std(self, t: Value) -> Value:
        """Standard deviation of the prior that sampling starts with at time t: 1 for VP, else sigma(t).

        Raises: ValueError for a t out of range.
        """
        return self._apply(np.ones_like if self.variance_preserving else self._sigma, t)

    def t_of_log_snr(self, log_snr: Value) -> Value:
        """The inverse of `log_snr`: the time with log(alpha / sigma) = log_snr, half of the papers' log-SNR.

        +inf gives `clean_time`, -inf the time with alpha = 0.

        Raises: ValueError for nan and for values that no time in [clean_time, t_max] reaches.
        """
        target = np.asarray(log_snr, dtype=np.float64)
        lowest = float(self.log_snr(self.t_max)) if math.isfinite(self.t_max) else -math.inf
        slack = 1e-12 * max(1.0, abs(lowest))  # rounding of a round trip that starts at t_max
        bad = ~(target >= lowest - slack)
        with np.errstate(all="ignore"):
            times = np.clip(self._t_of_log_snr(target), self.clean_time, self.t_max)
        times = np.where(np.isposinf(target), self.clean_time, times)
        bad |= ~np.isfinite(times)
        if bad.any():
            raise ValueError(
                f"{self!r}: log_snr = {target[bad].flat[0]:g} is not reached in times {self.clean_time:g} to "
                f"{self.t_max:g}; give a value in [{lowest:g}, inf]"
            )
        return cast(Value, float(times) if times.ndim == 0 else times)

    def check_time(self, t: float | Array) -> Array:
        """The times t as a float64 array.

        Raises: ValueError naming the first one that is not finite or lies outside [clean_time, t_max].
        """
        times = np.asarray(t, dtype=np.float64)
        bad = ~(np.isfinite(times) & (times >= self.clean_time) & (times <= self.t_max))
        if bad.any():
            raise ValueError(
                f"{self!r}: time t = {times[bad].flat[0]!r} is not accepted; "
                f"give finite times in [{self.clean_time:g}, {self.t_max:g}]"
            )
        return times

    def _apply(self, function: Callable[[Array], Array], t: Value) -> Value:
        with np.errstate(divide="ignore"):  # log(0) = -inf is the documented answer at both ends
            result = np.asarray(function(self.check_time(t)), dtype=np.float64)
        return cast(Value, float(result) if result.ndim == 0 else result)

    def _finite(self, name: str, function: Callable[[Array], Array], t: Value) -> Value:
        result = self._apply(function, t)
        bad = ~np.isfinite(result)
        if np.any(bad):
            first = np.asarray(t, dtype=np.float64)[bad].flat[0]
            raise ValueError(f"{self!r}: {name} is infinite at t = {first:g} (alpha = 0); start below t = {first:g}")
        return result

    def _key(self) -> Hashable:
        return tuple(getattr(self, name) for name in self.parameters)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.parameters)
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._key()))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description that `NoiseSchedule.from_dict` turns back into an equal schedule."""
        return {"schedule": type(self).__name__, **{name: getattr(self, name) for name in self.parameters}}

    @staticmethod
    def from_dict(description: dict[str, Any]) -> NoiseSchedule:
        """The schedule that `to_dict` described; description: {"schedule": class name, **constructor arguments}.

        Raises: ValueError for an unknown class name, and what the constructor raises.
        """
        arguments = dict(description)
        name = arguments.pop("schedule", None)
        known = {key: cls for key, cls in NoiseSchedule._registry.items() if cls.parameters}
        if name not in known:
            raise ValueError(f"from_dict: schedule = {name!r} is unknown; known are {', '.join(sorted(known))}")
        return known[name](**arguments)
