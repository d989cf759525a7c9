"""What a solver writes its formulas on: symbolic tensors in, a `Plan` out.

A solver is a function of a `PlanBuilder`. It walks over `points`, opens a stage for each model call with `call`, and
closes it with `write`, naming by formula what x, the step's base and the history become. The builder turns names into
slots (the history is a ring, so nothing is ever moved), numbers the draws, and fills the rest of the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import PlanError
from pydiff.plans.combination import Combination
from pydiff.plans.plan import Plan
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.prediction import Prediction


class Point(NamedTuple):
    """A time with its noise levels: x = alpha * x0 + sigma * epsilon."""

    t: float
    """The schedule's time."""
    alpha: float
    """Signal level."""
    sigma: float
    """Noise level."""
    log_snr: float
    """log(alpha / sigma), half of the papers' log-SNR: +inf where the sample is clean, -inf where it is pure noise."""

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise ratio: the noise level of x / alpha, which k-diffusion and EDM call sigma."""
        return self.sigma / self.alpha if self.alpha else math.inf


@dataclass
class _Stage:
    point: Point
    target: str
    x: Combination | None = None
    base: Combination | None = None
    push: Combination | None = None
    serial: int = -1  # which push this is, counted from 0


_COLUMNS: dict[object, int] = {
    "x": table.X,
    "d": table.D,
    "m": table.M,
    "constant": table.CONSTANT,
    "extra": table.EXTRA,
}


class PlanBuilder:
    """Collects the stages of one plan.

    Args:
        schedule, prediction: of the model that the plan is for.
        times: float64 [n + 1], the time grid.

    Attributes:
        points: the n + 1 points of the time grid.
        x: the current sample. base: what `write` was given as base last. m: the model's output, with guidance applied.
    """

    x = Combination({"x": 1.0})
    base = Combination({"base": 1.0})
    m = Combination({"m": 1.0})

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction, times: np.ndarray):
        self.schedule, self.prediction = schedule, prediction
        self.times = np.asarray(times, dtype=np.float64)
        columns = (self.times, schedule.alpha(self.times), schedule.sigma(self.times), schedule.log_snr(self.times))
        self.points = [Point(*map(float, row)) for row in zip(*columns)]
        self._stages: list[_Stage] = []
        self._pushed = 0
        self._draws = 0
        self._start_scale, self._start_noise = 1.0, 0.0

    @property
    def steps(self) -> int:
        """Intervals of the time grid."""
        return len(self.points) - 1

    def point(self, t: float) -> Point:
        """A point off the grid, by its time."""
        s = self.schedule
        return Point(float(t), float(s.alpha(t)), float(s.sigma(t)), float(s.log_snr(t)))

    def point_at(self, log_snr: float) -> Point:
        """A point off the grid, by its log(alpha / sigma), half of the papers' log-SNR."""
        return self.point(float(self.schedule.t_of_log_snr(log_snr)))

    def history(self, back: int) -> Combination:
        """What was pushed `back` pushes ago, counted before this stage's own push; 1 is the latest.

        Raises: `PlanError` where so much has not been pushed yet.
        """
        if not 1 <= back <= self._pushed:
            raise PlanError(f"history({back}) asked for with {self._pushed} entries pushed")
        return Combination({("h", self._pushed - back): 1.0})

    def noise(self) -> Combination:
        """A fresh standard Gaussian tensor. Keep the value and use it again to share the draw between stages."""
        self._draws += 1
        return Combination({("z", self._draws - 1): 1.0})

    def call(self, point: Point, target: str = "sample") -> Combination:
        """Open a stage: the model is called on x at `point`.

        Args:
            point: the levels of x.
            target: what the output is converted to, "sample" (the estimated x0) or "epsilon".

        Returns: d, the converted output.

        Raises: `PlanError` where the stage before was not closed.
        """
        if self._stages and self._stages[-1].x is None:
            raise PlanError("call() before the previous stage was closed by write()")
        self._stages.append(_Stage(point, target))
        return Combination({"d": 1.0})

    def write(self, x: Combination, base: Combination | None = None, push: Combination | None = None) -> None:
        """Close the stage. All that is written reads the old values.

        Args:
            x: what the sample becomes.
            base: what the base becomes; None keeps it as it is.
            push: the newest history entry, if any.

        Raises: `PlanError` where no stage is open.
        """
        if not self._stages or self._stages[-1].x is not None:
            raise PlanError("write() without call() before it")
        stage = self._stages[-1]
        stage.x, stage.base, stage.push = x, base, push
        if push is not None:
            stage.serial = self._pushed
            self._pushed += 1

    def renoise(self, scale: float, weight: float) -> None:
        """x <- scale * x + weight * z between two calls: folded into the stage before, or into the plan's start.

        Raises: `PlanError` before the first call, where noise was drawn already.
        """
        if not self._stages and self._draws:
            raise PlanError("renoise() before the first call must come first: its noise is draw 0")
        z = self.noise()
        if self._stages:
            last = self._stages[-1]
            assert last.x is not None
            last.x = scale * last.x + weight * z
        else:
            self._start_scale, self._start_noise = scale, weight

    def build(
        self,
        solver: str,
        *,
        clip: tuple[float, float] | None = None,
        known: bool = False,
        end: Point | None = None,
        config: dict[str, Any] | None = None,
    ) -> Plan:
        """The finished plan.

        Args:
            solver: its name.
            clip: bounds (low, high) of d.
            known: also compile what stands in a masked region after each stage: the caller's clean image, at the noise
                level that x is at then, with noise of its own.
            end: where the last stage leaves x; the last point of the grid by default.
            config: how it was compiled, kept with the plan.

        Raises: `PlanError` for a plan without stages, more tensors than there are slots, or more than two draws in one
            stage (with `known`, its own included).
        """
        if not self._stages or self._stages[-1].x is None:
            raise PlanError("a plan needs at least one stage, each closed by write()")
        end = end or self.points[-1]
        rows = [stage.point for stage in self._stages] + [end]
        ring, names = self._slots()
        coefficients = np.zeros((len(self._stages), table.COEFFICIENT_COLUMNS))
        indices = np.full((len(self._stages), table.INDEX_COLUMNS), -1, dtype=np.int32)
        self._fill_models(coefficients, clip)
        for i, stage in enumerate(self._stages):
            draws = self._fill_writes(stage, ring, "base" in names, coefficients[i], indices[i])
            if known:
                self._fill_known(rows[i + 1], coefficients[i], indices[i], draws)
        return Plan(
            solver=solver,
            coefficients=coefficients,
            indices=indices,
            times=self.times,
            alpha=np.array([p.alpha for p in rows]),
            sigma=np.array([p.sigma for p in rows]),
            targets=tuple(stage.target for stage in self._stages),
            start_scale=self._start_scale,
            start_noise=self._start_noise,
            init_std=float(self.schedule.init_std(self.points[0].t)),
            slot_names=names,
            config=config or {},
        )

    def _slots(self) -> tuple[int, tuple[str, ...]]:
        """Length of the history ring (the farthest look back) and the names of all slots: ring first, then the base."""
        ring, pushed, has_base = 0, 0, False
        for stage in self._stages:
            operands = self._operands(stage)
            for operand in operands:
                if isinstance(operand, tuple) and operand[0] == "h":
                    ring = max(ring, pushed - operand[1])
            pushed += stage.push is not None
            has_base = has_base or "base" in operands
        names = ("h",) * ring + ("base",) * has_base
        if len(names) > table.NUM_SLOTS:
            raise PlanError(f"the solver keeps {len(names)} tensors beside x; a stage has {table.NUM_SLOTS} slots")
        return ring, names

    @staticmethod
    def _operands(stage: _Stage) -> set[object]:
        combinations = [c for c in (stage.x, stage.base, stage.push) if c is not None]
        return {k for c in combinations for k, w in c.terms.items() if w != 0}

    def _fill_writes(self, stage: _Stage, ring: int, has_base: bool, row: np.ndarray, index: np.ndarray) -> list[int]:
        draws = sorted({k[1] for k in self._operands(stage) if isinstance(k, tuple) and k[0] == "z"})
        if len(draws) > 2:
            raise PlanError(f"a stage can use two draws of noise, this one uses {len(draws)}")
        index[table.DRAW0 : table.DRAW0 + len(draws)] = draws

        def column(operand: object) -> int:
            if operand == "base":
                return table.SLOT + ring
            if isinstance(operand, tuple):
                kind, number = operand
                return table.SLOT + number % ring if kind == "h" else table.Z0 + draws.index(number)
            return _COLUMNS[operand]

        base = stage.base if has_base else None
        push = stage.push if ring else None
        for k, combination in enumerate((stage.x, base, push)):
            for operand, weight in (combination.terms if combination else {}).items():
                if weight != 0:
                    row[k * table.NUM_OPERANDS + column(operand)] += weight
        if base is not None:
            index[table.WRITE_A] = ring
        if push is not None:
            index[table.WRITE_B] = stage.serial % ring
        return draws

    def _fill_models(self, coefficients: np.ndarray, clip: tuple[float, float] | None) -> None:
        """How the model is called and what becomes of its output, for all stages at once."""
        t, alpha, sigma, _ = (np.array(column) for column in zip(*(stage.point for stage in self._stages)))
        targets = np.array([stage.target for stage in self._stages])
        for target in ("sample", "epsilon"):
            where = targets == target
            if where.any():
                pair = self.prediction.weights(target, alpha[where], sigma[where])
                coefficients[where, table.OUTPUT : table.OUTPUT + 2] = np.stack(pair, axis=1)
        coefficients[:, table.GUIDANCE] = 1.0
        coefficients[:, table.CLIP : table.CLIP + 2] = (-math.inf, math.inf) if clip is None else clip
        coefficients[:, table.INPUT_SCALE] = self.prediction.input_scale(alpha, sigma)
        coefficients[:, table.TIME] = self.prediction.model_time(t, alpha, sigma)

    def _fill_known(self, after: Point, row: np.ndarray, index: np.ndarray, draws: list[int]) -> None:
        row[table.KNOWN] = after.alpha
        if after.sigma == 0:
            return
        if len(draws) == 2:
            raise PlanError("a solver that uses two draws in a stage leaves none for the known region of a mask")
        index[table.DRAW0 + len(draws)] = self._draws
        row[table.KNOWN + 1 + len(draws)] = after.sigma
        self._draws += 1
