"""The builder against an interpreter that keeps the whole history in a list."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pydiff
from pydiff.ops.noise import normal
from pydiff.plans import table
from pydiff.plans.base import PlanError
from pydiff.plans.builder import PlanBuilder

SAMPLE = pydiff.get_prediction("sample")  # d is the model's output as it is


def builder(stages: int) -> PlanBuilder:
    return PlanBuilder(pydiff.EDM(), SAMPLE, np.arange(stages, -1, -1.0))


@st.composite
def programs(draw):
    """A list of stages: what each reads in its x, base and push writes, as weights of symbolic operands."""
    stages, pushed, based, draws = [], 0, False, 0
    for _ in range(draw(st.integers(1, 8))):
        readable = ["x", "d", *(("h", back) for back in range(1, min(pushed, 4) + 1)), *(["base"] if based else [])]
        fresh = [("z", draws + k) for k in range(draw(st.integers(0, 2)))]
        reused = [("z", draw(st.integers(0, draws - 1)))] if draws and len(fresh) < 2 and draw(st.booleans()) else []
        draws += len(fresh)
        formula = st.dictionaries(st.sampled_from([*readable, *fresh, *reused]), st.floats(-1, 1), max_size=5)
        stage = {"x": draw(formula), "base": None, "push": None, "fresh": len(fresh)}
        if draw(st.booleans()):
            stage["base"], based = draw(formula), True
        if draw(st.booleans()):
            stage["push"], pushed = draw(formula), pushed + 1
        stages.append(stage)
    return stages


def interpret(program, x, outputs, noise):
    """What the program means, with a history that only grows."""
    history, base = [], None
    for stage, d in zip(program, outputs, strict=True):
        values = {"x": x, "d": d, "base": base, **{("z", k): z for k, z in enumerate(noise)}}
        values |= {("h", back): history[-back] for back in range(1, len(history) + 1)}
        x = combine(stage["x"], values)
        base = base if stage["base"] is None else combine(stage["base"], values)
        if stage["push"] is not None:
            history.append(combine(stage["push"], values))
    return x


def combine(formula, values):
    return sum(weight * values[operand] for operand, weight in formula.items())


def compile_program(program):
    b = builder(len(program))
    values = {"x": b.x, "base": b.base}
    draws, pushed = 0, 0
    for stage, point in zip(program, b.points, strict=False):
        values["d"] = b.call(point)
        values |= {("z", draws + k): b.noise() for k in range(stage["fresh"])}
        values |= {("h", back): b.history(back) for back in range(1, pushed + 1)}
        formulas = {k: stage[k] for k in ("x", "base", "push") if stage[k] is not None}
        b.write(**{k: 0 * b.x + combine(formula, values) for k, formula in formulas.items()})
        draws, pushed = draws + stage["fresh"], pushed + (stage["push"] is not None)
    return b.build("program")


def slots_needed(program) -> int:
    """The farthest look back, and one for a base that is read."""
    used = {k for s in program for f in (s["x"], s["base"], s["push"]) for k, w in (f or {}).items() if w}
    return max((k[1] for k in used if k[0] == "h"), default=0) + ("base" in used)


def run(plan, x, outputs, noise):
    """x after the plan, for a model that answers with the given numbers, and the time of each call."""
    times = []

    def model(x, t):
        times.append(float(t[0]))
        return torch.full_like(x, outputs[len(times) - 1])

    noise = torch.tensor(noise, dtype=torch.float64).reshape(-1, 1, 1)
    result = pydiff.run_plan(plan, model, torch.full((1, 1), x, dtype=torch.float64), noise=noise, dtype=torch.float64)
    return float(result), times


@given(programs(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_ring_of_slots_is_a_growing_list(program, random) -> None:
    plan = compile_program(program)
    assert plan.num_slots == slots_needed(program)
    numbers = [random.uniform(-1, 1) for _ in range(40)]
    outputs, noise = numbers[: len(program)], numbers[-16:]
    x, times = run(plan, numbers[20], outputs, noise)
    assert x == pytest.approx(interpret(program, numbers[20], outputs, noise), rel=1e-12, abs=1e-12)
    assert times == list(range(len(program), 0, -1))


@given(programs(), st.integers(0, 7))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_interpreter_notices_a_wrong_coefficient(program, stage) -> None:
    plan = compile_program(program)
    coefficients = plan.coefficients.copy()
    coefficients[-1, table.D] += 0.25
    wrong = type(plan)(**{f: getattr(plan, f) for f in plan.__dataclass_fields__} | {"coefficients": coefficients})
    outputs, noise = [0.5] * len(program), [0.5] * 16
    assert abs(run(wrong, 0.5, outputs, noise)[0] - interpret(program, 0.5, outputs, noise)) > 0.12


def test_more_slots_than_the_machine_has() -> None:
    for back, base in ((5, False), (4, True), (6, False), (5, True)):
        b = builder(9)
        for _ in range(6):
            b.write(x=b.call(b.points[0]), push=b.x, base=b.x)
        b.write(x=b.call(b.points[0]) + b.history(back) + (b.base if base else 0))
        if back + base <= table.NUM_SLOTS:
            assert b.build("wide").num_slots == back + base
        else:
            with pytest.raises(PlanError, match=f"keeps {back + base} tensors beside x; a stage has 5"):
                b.build("too wide")


def test_what_nobody_reads_is_not_kept() -> None:
    b = builder(2)
    for point in b.points[:2]:
        b.write(x=b.call(point), push=b.x, base=b.x)
    plan = b.build("forgetful")
    assert plan.num_slots == 0 and (plan.indices[:, table.WRITE_A : table.WRITE_B + 1] == -1).all()


def test_a_draw_is_no_history() -> None:
    """The first draw comes after two pushes that nobody reads: no slot is kept for it."""
    b = builder(3)
    for point in b.points[:2]:
        b.write(x=b.call(point), push=b.x)
    b.write(x=b.call(b.points[2]) + b.noise())
    assert b.build("noisy").num_slots == 0


def test_stages_share_a_draw() -> None:
    b = builder(3)
    shared = b.noise()
    for k, point in enumerate(b.points[:3]):
        b.write(x=b.call(point) + (shared if k != 1 else b.noise()))
    plan = b.build("shared")
    assert plan.indices[:, table.DRAW0].tolist() == [0, 1, 0] and plan.num_draws == 2
    assert run(plan, 0.0, [1, 2, 3], [10, 20])[0] == 13


def test_three_draws_in_a_stage_are_too_many() -> None:
    b = builder(1)
    b.write(x=b.call(b.points[0]) + b.noise() + b.noise() + b.noise())
    with pytest.raises(PlanError, match="two draws of noise, this one uses 3"):
        b.build("noisy")


def test_renoise_at_the_start_and_in_the_middle() -> None:
    b = builder(2)
    b.renoise(0.5, 3.0)
    b.write(x=b.x + b.call(b.points[0]))
    b.renoise(2.0, 5.0)
    b.write(x=b.x + b.call(b.points[1]))
    plan = b.build("renoising")
    assert (plan.start_scale, plan.start_noise, plan.num_draws) == (0.5, 3.0, 2)
    # ((0.5 * 8 + 3 * 10) + 1) * 2 + 5 * 100 + 7
    assert run(plan, 8.0, [1, 7], [10, 100])[0] == 577
    state = pydiff.init(plan, torch.zeros(2, 3), seed=4)
    assert torch.equal(state.x, 3 * normal(torch.tensor([4, 5]), 0, (3,)))


def test_a_start_has_one_draw_and_it_is_the_first() -> None:
    b = builder(1)
    b.noise()
    with pytest.raises(PlanError, match="draw 0"):
        b.renoise(1.0, 1.0)


@pytest.mark.parametrize("solver, own_draws", [("ddim", 0), ("euler_ancestral", 1)])
def test_the_known_region_stands_at_the_level_after_each_stage(solver, own_draws) -> None:
    schedule = pydiff.RectifiedFlow()
    plan = pydiff.make_plan(solver, schedule, times=[0.9, 0.6, 0.2, 0.0], known=True)
    bare = pydiff.make_plan(solver, schedule, times=[0.9, 0.6, 0.2, 0.0])
    known = plan.coefficients[:, table.KNOWN : table.KNOWN + 3]
    np.testing.assert_array_equal(known[:, 0], schedule.alpha(plan.times[1:]))
    np.testing.assert_array_equal(known[:, 1 + own_draws], schedule.sigma(plan.times[1:]))
    np.testing.assert_array_equal(plan.weights, bare.weights)
    own = plan.indices[:-1, table.DRAW0 + own_draws]
    assert not set(own) & set(bare.indices[:, table.DRAW0 :].flat) and len(set(own)) == 2
    assert plan.num_draws == bare.num_draws + 2  # no number is left out: a caller may have to give every draw
    assert plan != bare and (bare.coefficients[:, table.KNOWN : table.KNOWN + 3] == 0).all()


def test_a_stage_with_two_draws_has_none_for_a_known_region() -> None:
    b = builder(2)
    b.write(x=b.call(b.points[0]) + b.noise() + b.noise())
    b.write(x=b.call(b.points[1]))
    with pytest.raises(PlanError, match="known region"):
        b.build("noisy", known=True)


def pushed(b: PlanBuilder) -> None:
    b.write(x=b.x, push=b.call(b.points[0]))


MISUSE = {
    "call twice": (lambda b: (b.call(b.points[0]), b.call(b.points[1])), "before the previous stage was closed"),
    "write first": (lambda b: b.write(x=b.x), r"write\(\) without call"),
    "write twice": (lambda b: (b.write(x=b.call(b.points[0])), b.write(x=b.x)), r"write\(\) without call"),
    "nothing pushed": (lambda b: b.history(1), r"history\(1\) asked for with 0 entries"),
    "too far back": (lambda b: (pushed(b), b.history(2)), r"history\(2\) asked for with 1 entries"),
    "own push": (lambda b: (pushed(b), b.history(0)), r"history\(0\) asked for with 1 entries"),
    "to come": (lambda b: (pushed(b), b.history(-1)), r"history\(-1\) asked for with 1 entries"),
    "no stages": (lambda b: b.build("none"), "at least one stage"),
    "not closed": (lambda b: (b.call(b.points[0]), b.build("open")), r"closed by write\(\)"),
    "base unset": (
        lambda b: (b.write(x=b.call(b.points[0]) + b.base), b.build("based")),
        "no earlier stage has written",
    ),
    "not finite": (lambda b: (b.write(x=math.inf * b.call(b.points[0])), b.build("singular")), "not finite"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(case) -> None:
    misuse, message = MISUSE[case]
    with pytest.raises(PlanError, match=message):
        misuse(builder(2))


def test_stages_may_ask_for_different_targets() -> None:
    b = PlanBuilder(pydiff.VPLinear(), pydiff.get_prediction("v_prediction"), np.array([0.9, 0.5, 0.1]))
    points, targets = b.points[:2], ("sample", "epsilon")
    for point, target in zip(points, targets, strict=True):
        b.write(x=b.call(point, target))
    plan = b.build("mixed")
    assert plan.targets == targets
    for row, point, target in zip(plan.coefficients, points, targets, strict=True):
        expected = pydiff.get_prediction("v_prediction").weights(target, point.alpha, point.sigma)
        np.testing.assert_array_equal(row[table.OUTPUT : table.OUTPUT + 2], expected)


def test_points_off_the_grid() -> None:
    b = PlanBuilder(pydiff.VPLinear(), SAMPLE, np.array([1.0, 0.5]))
    inner = b.point_at(0.25)
    assert inner == pytest.approx(b.point(inner.t)) and inner.log_snr == pytest.approx(0.25)
    assert inner.ratio == pytest.approx(math.exp(-0.25))
    assert PlanBuilder(pydiff.RectifiedFlow(), SAMPLE, np.array([1.0, 0.0])).points[0].ratio == math.inf
