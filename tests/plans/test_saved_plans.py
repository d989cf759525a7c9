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


RECORDED = {
    "format": "pydiff-plan",
    "version": 2,
    "digest": "63a5bb7196abb86d52a3b3a02a629f52",
    "solver": "by hand",
    "start_scale": 1.0,
    "start_noise": 0.0,
    "init_std": 2.0,
    "coefficients": [[0.25, *[0.0] * 5, 0.75, *[0.0] * 30, 1.0, 1.0, "-inf", "inf", *[0.0] * 3, 1.0, 2.0, *[0.0] * 2]],
    "indices": [[-1, -1, -1, -1]],
    "times": [2.0, 0.5],
    "alpha": [1.0, 1.0],
    "sigma": [2.0, 0.5],
    "targets": ["sample"],
    "slot_names": [],
    "config": {"grid": "times"},
    "checksum": "ffbc8d103ed9870535f3e20cfd0eaccc",
}


def test_the_format_is_the_recorded_one(tmp_path) -> None:
    """Saved files are read by later releases: whoever changes the format, or what is hashed, changes its version."""
    plan = load(json.dumps(RECORDED), tmp_path)
    assert "x <- 0.25 x + 0.75 d" in str(plan)
    assert plan.digest() == RECORDED["digest"] and plan.to_dict() == RECORDED


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
