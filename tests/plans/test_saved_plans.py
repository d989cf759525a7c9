"""A plan that was saved is that plan or is refused: no digit of the file can change without being noticed."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydiff
from pydiff.plans.base import PlanError
from pydiff.plans.plan import Plan

PLAN = pydiff.make_plan("dpmpp_2m_sde", pydiff.EDM(), 4, prediction="sample", clip=1.0, guidance_scale=3.0)
SAVED = json.dumps(PLAN.to_dict())
NUMBERS = ("coefficients", "indices", "times", "alpha", "sigma")


def load(text: str, folder) -> Plan:
    path = folder / "plan.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Plan.load(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAVED) - 1), st.sampled_from("0123456789.-e,[]{}\"' xnI\x00é"))
def test_no_changed_character_loads_as_another_plan(tmp_path_factory, at, character) -> None:
    changed = SAVED[:at] + character + SAVED[at + 1 :]
    try:
        plan = load(changed, tmp_path_factory.mktemp("plan"))
    except PlanError:
        return
    assert json.dumps(plan.to_dict()) == SAVED  # another spelling of the same numbers


@pytest.mark.parametrize("name", NUMBERS)
def test_a_changed_number_is_refused(name, tmp_path) -> None:
    data = json.loads(SAVED)
    numbers = np.array(data[name], dtype=object)
    first = next(i for i in np.ndindex(numbers.shape) if isinstance(numbers[i], (int, float)) and numbers[i] > 0)
    numbers[first] = math.nextafter(numbers[first], 0.0) if name != "indices" else 0
    data[name] = numbers.tolist()
    with pytest.raises(PlanError, match="changed after it was saved|writes slots"):
        load(json.dumps(data), tmp_path)


def test_a_changed_description_is_refused(tmp_path) -> None:
    for name, value in (("solver", "ddim"), ("config", {}), ("digest", "0" * 32), ("targets", ["epsilon"] * 4)):
        with pytest.raises(PlanError, match="changed after it was saved"):
            load(json.dumps({**json.loads(SAVED), name: value}), tmp_path)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan, 0.5, 2**31, -(2**40), "inf", None, [1]])
def test_index_fields_hold_integers_or_the_plan_is_refused(wrong, tmp_path) -> None:
    data = json.loads(SAVED)
    data["indices"][1][0] = wrong
    with pytest.raises(PlanError, match="plan.json"):
        load(json.dumps(data), tmp_path)
    with pytest.raises(PlanError):
        Plan.from_dict(data)


def test_a_plan_survives_as_a_dictionary() -> None:
    data = PLAN.to_dict()
    assert Plan.from_dict(copy.deepcopy(data)) == PLAN and data["digest"] == PLAN.digest()
    again = Plan.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data and again.config == PLAN.config
    assert Plan.from_dict(json.loads(json.dumps(data, sort_keys=True))) == PLAN  # as formatters leave it
