"""Linear combinations of named tensors: what solvers write formulas with."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Combination:
    """A formal sum of operands times float64 weights: ``0.5 * x + 2 * d``.

    Operands are strings ("x", "d", ...) or pairs such as ("h", 3). Only what is affine can be written: combinations
    add, subtract, and multiply or divide by numbers. `terms` maps each operand to its weight.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[object, float]):
        self.terms = {k: float(w) for k, w in terms.items()}

    def __add__(self, other: Combination | int) -> Combination:
        if not isinstance(other, Combination):
            return self if other == 0 else NotImplemented
        total = dict(self.terms)
        for operand, weight in other.terms.items():
            total[operand] = total.get(operand, 0.0) + weight
        return Combination(total)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Combination:
        if isinstance(factor, Combination):
            return NotImplemented
        return Combination({k: w * factor for k, w in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return Combination({k: w / divisor for k, w in self.terms.items()})

    def __neg__(self) -> Combination:
        return self * -1.0

    def __sub__(self, other: Combination) -> Combination:
        return self + -other

    def finite(self) -> bool:
        """Whether every weight is finite."""
        return all(math.isfinite(w) for w in self.terms.values())

    def __repr__(self) -> str:
        return " + ".join(f"{w:.6g} {k}" for k, w in self.terms.items()) or "0"
