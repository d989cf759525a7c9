"""The algebra that solvers write formulas in, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydiff.plans.combination import Combination

NUMBER = st.floats(-1e3, 1e3, allow_nan=False)
VALUES = {"x": 1.7, "d": -0.3, ("h", 0): 2.9}
LEAF = st.builds(lambda k, w: (Combination({k: w}), w * VALUES[k]), st.sampled_from(list(VALUES)), NUMBER)


def evaluate(combination: Combination) -> float:
    return sum(w * VALUES[k] for k, w in combination.terms.items())


def extend(children):
    """Pairs (combination, its value worked out with numbers) under every operation there is."""
    pair = st.tuples(children, children)
    return st.one_of(
        pair.map(lambda p: (p[0][0] + p[1][0], p[0][1] + p[1][1])),
        pair.map(lambda p: (p[0][0] - p[1][0], p[0][1] - p[1][1])),
        st.tuples(children, NUMBER).map(lambda p: (p[1] * p[0][0], p[1] * p[0][1])),
        st.tuples(children, st.floats(0.5, 9)).map(lambda p: (p[0][0] / p[1], p[0][1] / p[1])),
        children.map(lambda c: (-c[0], -c[1])),
    )


@given(st.recursive(LEAF, extend, max_leaves=6))
def test_operations_mean_what_they_say(pair) -> None:
    combination, value = pair
    scale = max(1.0, sum(abs(w) for w in combination.terms.values()))
    assert evaluate(combination) == pytest.approx(value, abs=1e-9 * max(scale, abs(value)))


def test_operands_are_not_changed_by_what_is_made_of_them() -> None:
    x = Combination({"x": 1.0})
    _ = 3 * x + Combination({"d": 2.0}) - x / 2
    assert x.terms == {"x": 1.0}


def test_sum_starts_at_zero() -> None:
    assert sum([Combination({"x": 1.0}), Combination({"x": 2.0})]).terms == {"x": 3.0}


@pytest.mark.parametrize("product", [lambda c: c * c, lambda c: c + 1.0, lambda c: 2.0 / c], ids=["c*c", "c+1", "2/c"])
def test_what_is_not_linear_cannot_be_written(product) -> None:
    with pytest.raises(TypeError):
        product(Combination({"x": 1.0}))


def test_finite_and_repr() -> None:
    assert Combination({"x": 1.0}).finite() and not Combination({"x": 1.0, "d": math.inf}).finite()
    assert repr(Combination({"x": 0.5, "d": 2.0})) == "0.5 x + 2 d" and repr(Combination({})) == "0"
