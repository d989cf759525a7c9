"""What a plan holds: the fields of its table, what follows from them, and the hash of what it computes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pydiff.plans import table

ARRAYS = {
    "coefficients": np.float64,
    "indices": np.int32,
    "times": np.float64,
    "alpha": np.float64,
    "sigma": np.float64,
}


class PlanError(ValueError):
    """A table that is not a valid plan."""


@dataclass(frozen=True, eq=False)
class PlanTable:
    """A compiled sampler of S stages (model calls): its fields, and what follows from them."""

    solver: str
    """Name of the solver that it was compiled from."""
    coefficients: np.ndarray
    """float64 [S, 48], columns as in `pydiff.plans.table`."""
    indices: np.ndarray
    """int32 [S, 4]: the two write slots and the two draw numbers of each stage, -1 for none."""
    times: np.ndarray
    """float64 [n + 1], the time grid, from the noisiest time to where sampling ends."""
    alpha: np.ndarray
    """float64 [S + 1], signal level of x at each model call, and at the end."""
    sigma: np.ndarray
    """float64 [S + 1], noise level of x there: x = alpha * x0 + sigma * epsilon."""
    targets: tuple[str, ...]
    """For each stage what d is: "sample" (the data estimate) or "epsilon" (the noise estimate)."""
    start_scale: float = 1.0
    """x becomes start_scale * x_T + start_noise * z before the first call; z is draw 0."""
    start_noise: float = 0.0
    """See `start_scale`."""
    init_std: float = 1.0
    """Standard deviation of x_T, when it is drawn."""
    slot_names: tuple[str, ...] = ()
    """What each slot holds, for printing: "h" for history, "base" for the start of a step of several calls."""
    config: dict[str, Any] = field(default_factory=dict)
    """How it was compiled: schedule, prediction, grid and options; saving keeps the text of what JSON lacks. It decides
    nothing."""

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            array = _array(name, getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "slot_names", tuple(self.slot_names))

    def __len__(self) -> int:
        """The number of model calls."""
        return len(self.coefficients)

    @property
    def weights(self) -> np.ndarray:
        """float64 [S, 3, 12]: the combinations written to x and to the two slots, of `pydiff.plans.table.OPERANDS`."""
        return self.coefficients[:, : 3 * table.NUM_OPERANDS].reshape(-1, 3, table.NUM_OPERANDS)

    @property
    def model_times(self) -> np.ndarray:
        """float64 [S]: the time that the model is told at each call."""
        return self.coefficients[:, table.TIME]

    @property
    def num_slots(self) -> int:
        """How many tensors of the size of x a run keeps beside x."""
        return len(self.slot_names)

    @cached_property
    def num_draws(self) -> int:
        """How many Gaussian tensors a run consumes, apart from the x_T it starts from."""
        highest = int(self.indices[:, table.DRAW0 :].max(initial=-1))
        return max(highest + 1, int(self.start_noise != 0))

    @property
    def stochastic(self) -> bool:
        """Whether a run adds noise, beside the x_T it starts from."""
        return self.num_draws > 0

    @cached_property
    def guided(self) -> bool:
        """Whether any stage has a guidance scale other than 1."""
        return bool((self.coefficients[:, table.GUIDANCE] != 1).any())

    @cached_property
    def operands(self) -> frozenset[str]:
        """Which of the caller's tensors a stage has weights for.

        "known": the clean image that stands where a mask is 1; a plan compiled with ``known=True`` says how much of it,
        and of fresh noise, stands there after each stage. "constant" and "extra": tensors that enter combinations, as
        they are.
        """
        columns = {
            "constant": self.weights[:, :, table.CONSTANT],
            "extra": self.weights[:, :, table.EXTRA],
            "known": self.coefficients[:, table.KNOWN],
        }
        return frozenset(name for name, column in columns.items() if (column != 0).any())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTable) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)

    def digest(self) -> str:
        """Hexadecimal hash of everything that decides what the plan computes, and nothing else."""
        h = hashlib.blake2b(digest_size=16)
        for name in ("coefficients", "indices"):
            h.update(getattr(self, name).tobytes())
        h.update(repr((self.start_scale, self.start_noise, self.init_std, self.num_slots)).encode())
        return h.hexdigest()


def _array(name: str, value: Any, dtype: type) -> np.ndarray:
    """A copy of its own. Raises `PlanError` where 32-bit integers are wanted and something else is given."""
    array: np.ndarray = np.array(value, dtype=np.float64 if dtype is np.int32 else dtype)
    if dtype is np.int32:
        with np.errstate(invalid="ignore"):
            integers = array.astype(np.int32)
        if not np.array_equal(integers, array):
            raise PlanError(f"{name} must hold 32-bit integers, got {value!r:.80}")
        return integers
    return array
