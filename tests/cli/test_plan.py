"""`pydiff plan`: the plan it prints and saves."""

from __future__ import annotations

import os

import pytest

import pydiff
from pydiff.cli import plan as command


@pytest.mark.parametrize("schedule", command.SCHEDULES)
def test_plan_prints_and_saves_the_plan(run, folder, schedule):
    status, out, err = run("plan", "dpmpp_2m", "--steps", 5, "--schedule", schedule, "--json", "p.json")
    assert (status, err) == (0, "")
    prediction = "flow_prediction" if schedule == "flow" else "epsilon"
    plan = pydiff.make_plan("dpmpp_2m", command.make_schedule(schedule), 5, prediction=prediction)
    assert out == f"{plan}\nsaved to p.json\n"
    assert pydiff.Plan.load("p.json") == plan


def test_a_failed_save_is_said_on_one_line(run, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, _, err = run("plan", "ddim", "--json", "p.json")
    assert status == 2 and "--json p.json" in err and "No space left" in err and err.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_plan_takes_options_of_the_type_of_their_default(run):
    options = ["order=3", "corrector=false", "lower_order_final=true", "variant=bh1"]
    argv = [word for option in options for word in ("--option", option)]
    grid = ["--grid", "karras", "--grid-option", "rho=5"]
    status, out, _ = run("plan", "unipc", "--steps", 6, *argv, *grid, "--prediction", "v_prediction")
    plan = pydiff.make_plan(
        "unipc",
        steps=6,
        order=3,
        corrector=False,
        lower_order_final=True,
        variant="bh1",
        grid="karras",
        grid_options={"rho": 5.0},
        prediction="v_prediction",
    )
    assert status == 0 and out == f"{plan}\n"
