"""Plans as data: validation, printing, saving, comparing, concatenating."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import pydiff
from pydiff.plans import table
from pydiff.plans.base import PlanError
from pydiff.plans.builder import PlanBuilder
from pydiff.plans.plan import Plan, concatenate

EDM = pydiff.EDM()
FLOW_TIMES = [0.5, 0.25, 0.0]


def toy(x, t):
    """A denoiser that is not linear in x and knows the time."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.5 * x / (1 + t) + 0.1 * x.clamp(-1, 1)


def compiled(solver="dpmpp_2m", **options) -> Plan:
    return pydiff.make_plan(solver, EDM, **{"steps": 6, "prediction": "sample", **options})


def changed(plan: Plan, name: str, at, value) -> Plan:
    """The plan with one number of one of its arrays replaced."""
    array = getattr(plan, name).copy()
    array[at] = value
    return replace(plan, **{name: array})


def test_columns_are_where_the_names_say() -> None:
    columns = ("X", "SLOT", "D", "M", "CONSTANT", "EXTRA", "Z0", "Z1")
    names = ("x", "s0", "d", "m", "constant", "extra", "z0", "z1")
    assert [getattr(table, column) for column in columns] == [table.OPERANDS.index(name) for name in names]
    assert table.NUM_OPERANDS == len(table.OPERANDS) and table.D - table.SLOT == table.NUM_SLOTS
    ends = [table.WEIGHTS + 3 * table.NUM_OPERANDS, table.OUTPUT + 2, table.GUIDANCE + 1, table.CLIP + 2]
    assert ends == [table.OUTPUT, table.GUIDANCE, table.CLIP, table.KNOWN]
    ends = [table.KNOWN + 3, table.INPUT_SCALE + 1, table.TIME + 1]
    assert ends == [table.INPUT_SCALE, table.TIME, table.SECOND_TIME] and table.SECOND_TIME < table.COEFFICIENT_COLUMNS
    assert (table.WRITE_A, table.WRITE_B, table.DRAW0, table.DRAW1, table.INDEX_COLUMNS) == (0, 1, 2, 3, 4)


def test_what_a_plan_by_hand_need_not_say() -> None:
    plan = compiled()
    names = ("solver", "coefficients", "indices", "times", "alpha", "sigma", "targets", "slot_names")
    by_hand = Plan(**{name: getattr(plan, name) for name in names})
    assert (by_hand.start_scale, by_hand.start_noise, by_hand.init_std, by_hand.config) == (1.0, 0.0, 1.0, {})


WEIGHT_OF_H0 = (0, table.SLOT)  # stage 0 reads slot 0
INVALID = {
    "not finite": (lambda p: changed(p, "coefficients", (2, table.X), math.nan), "stage 2 .* not finite"),
    "infinite weight": (lambda p: changed(p, "coefficients", (1, table.M), math.inf), "stage 1 .* not finite"),
    "nan bound": (lambda p: changed(p, "coefficients", (1, table.CLIP), math.nan), "not finite"),
    "slot too early": (lambda p: changed(p, "coefficients", WEIGHT_OF_H0, 1.0), "stage 0 reads slot 0"),
    "slot of nobody": (lambda p: changed(p, "coefficients", (3, table.SLOT + 1), 1.0), "stage 3 reads slot 1"),
    "slot out of range": (lambda p: changed(p, "indices", (3, table.WRITE_A), 7), r"stage 3 writes slots \[7, 0\]"),
    "slot just out of range": (
        lambda p: changed(p, "indices", (3, table.WRITE_A), 1),
        r"stage 3 writes slots \[1, 0\]",
    ),
    "half a slot": (lambda p: replace(p, indices=p.indices + 0.5), "indices must hold 32-bit integers"),
    "slot below none": (lambda p: changed(p, "indices", (3, table.WRITE_A), -2), r"stage 3 writes slots \[-2, 0\]"),
    "same slot twice": (lambda p: changed(p, "indices", (3, table.WRITE_A), 0), "must differ"),
    "unnamed draw": (lambda p: changed(p, "coefficients", (4, table.Z1), 0.5), "stage 4 uses draw z1"),
    "unnamed known draw": (lambda p: changed(p, "coefficients", (4, table.KNOWN + 1), 0.5), "stage 4 uses draw z0"),
    "columns": (lambda p: replace(p, coefficients=p.coefficients[:, :-1]), r"coefficients has shape \(6, 47\)"),
    "index columns": (lambda p: replace(p, indices=p.indices[:, : table.DRAW0]), "indices has shape"),
    "alpha": (lambda p: replace(p, alpha=p.alpha[:-1]), r"alpha has shape \(6,\), expected \(7,\)"),
    "nan sigma": (lambda p: changed(p, "sigma", 2, math.nan), "sigma holds"),
    "nan time": (lambda p: changed(p, "times", 2, math.nan), "times holds"),
    "no times": (lambda p: replace(p, times=np.zeros(1)), "times has shape"),
    "targets": (lambda p: replace(p, targets=("noise",) * 6), "targets"),
    "too few targets": (lambda p: replace(p, targets=("sample",)), "targets"),
    "slots": (lambda p: replace(p, slot_names=("h",) * 6), "at most 5"),
    "start": (lambda p: replace(p, start_scale=math.inf), "start_scale"),
    "empty": (
        lambda p: replace(
            p, coefficients=p.coefficients[:0], indices=p.indices[:0], targets=(), alpha=p.alpha[:1], sigma=p.sigma[:1]
        ),
        "at least one stage",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_table_is_refused(case) -> None:
    break_it, message = INVALID[case]
    with pytest.raises(PlanError, match=message):
        break_it(compiled())


def test_an_unchanged_table_is_accepted() -> None:
    plan = compiled()
    assert replace(plan) == plan and changed(plan, "coefficients", (0, table.CLIP), -math.inf) == plan


@pytest.mark.parametrize("name, column", [("constant", table.CONSTANT), ("extra", table.EXTRA), ("known", table.KNOWN)])
def test_an_operand_of_one_stage_is_one_of_the_plan(name, column) -> None:
    assert not compiled().operands and changed(compiled(), "coefficients", (2, column), 0.5).operands == {name}


def test_arrays_cannot_be_written_to() -> None:
    plan, mine = compiled(), np.array(FLOW_TIMES)
    for name in ("coefficients", "indices", "times", "alpha", "sigma", "weights"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[0] = 0
    plan = pydiff.make_plan("ddim", pydiff.RectifiedFlow(), times=mine)
    mine[0] = 0.9
    assert plan.times[0] == 0.5


def test_it_prints_its_formulas() -> None:
    plan = pydiff.make_plan("ddim", pydiff.RectifiedFlow(), times=FLOW_TIMES, prediction="sample", eta=1.0)
    assert str(plan).splitlines() == [
        "ddim: 2 model calls, 2 steps, keeps 0 tensors beside x, 1 noise draws; d is the estimated sample",
        "stage  model time  alpha  sigma  d  writes",
        "0      0.5         0.5    0.5    m  x <- 0.166667 x + 0.666667 d + 0.235702 z0",
        "1      0.25        0.75   0.25   m  x <- d",
        "end: alpha 1, sigma 0 at time 0",
    ]
    assert repr(plan) == "Plan('ddim', stages=2, slots=0, draws=1)"


def test_it_prints_slots_clips_scales_and_starts() -> None:
    text = str(pydiff.make_plan("heun", EDM, 3, prediction=pydiff.EDMPrecond(), s_churn=9, clip=1))
    for part in ("start: x <- 1 x + ", "clip(", ", -1, 1)", "base <- ", " x  "):
        assert part in text
    text = str(pydiff.make_plan("unipc", EDM, 4, prediction="v_prediction"))
    assert "h0 <- d" in text and "h1 <- d" in text and "base" in text and "keeps 3 tensors" in text
    for clip, printed in (((0, math.inf), "clip(m, 0, inf)"), ((-math.inf, 2), "clip(m, -inf, 2)")):
        assert printed in str(compiled(clip=clip))


@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_a_file_holds_every_bit(solver, tmp_path) -> None:
    plan = pydiff.make_plan(solver, steps=5, guidance_scale=1.1)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and hash(loaded) == hash(plan) and str(loaded) == str(plan)
    for name in ("coefficients", "indices", "times", "alpha", "sigma"):
        assert getattr(loaded, name).tobytes() == getattr(plan, name).tobytes()
    assert np.isneginf(loaded.coefficients[:, table.CLIP]).all()  # infinities are the hard part of JSON
    assert loaded.config == plan.config and os.listdir(tmp_path) == ["plan.json"]
    assert (loaded.targets, loaded.slot_names) == (plan.targets, plan.slot_names)
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o644  # other users may read it


def test_a_file_has_the_text_of_what_json_lacks(tmp_path) -> None:
    options = {"s_churn": 3, "s_tmin": 0.1, "s_tmax": np.float64(math.inf)}
    plan = pydiff.make_plan("heun", pydiff.EDM(), 4, **options)
    plan = replace(plan, config={**plan.config, "note": (math.nan, None, True, {1: [-math.inf, {2}]})})
    plan.save(tmp_path / "plan.json")
    content = (tmp_path / "plan.json").read_text()
    assert "Infinity" not in content and "NaN" not in content  # which other readers of JSON refuse
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan == pydiff.make_plan("heun", pydiff.EDM(), 4, s_churn=3, s_tmin=0.1)
    assert loaded.config["options"] == {"s_churn": 3, "s_tmin": 0.1, "s_tmax": "inf"}
    assert loaded.config["note"] == ["nan", None, True, {"1": ["-inf", "{2}"]}]
    assert loaded.to_dict() == plan.to_dict()


def test_what_changes_the_result_changes_the_digest() -> None:
    plan = compiled("euler_ancestral")
    others = [
        changed(plan, "coefficients", (1, table.X), np.nextafter(plan.coefficients[1, table.X], 2)),
        changed(plan, "indices", (1, table.DRAW0), 0),
        plan.with_guidance(2.0),
        plan.with_guidance([1, 1, 2, 1, 1, 1]),
        replace(plan, start_scale=0.5),
        replace(plan, start_noise=0.5),
        replace(plan, init_std=2.0),
    ]
    assert len({plan.digest(), *(p.digest() for p in others)}) == len(others) + 1
    assert all(p != plan for p in others)


def test_what_does_not_change_the_result_does_not_change_the_digest() -> None:
    plan = compiled()
    same = replace(plan, solver="another name", config={"note": 1}, slot_names=("base",))
    assert same == plan and len({same, plan}) == 1 and plan != "plan"


def damage(content: str, **changes) -> str:
    data = json.loads(content)
    for key, value in changes.items():
        data.pop(key) if value is None else data.update({key: value})
    return json.dumps(data)


DAMAGED = {
    "truncated": (lambda s: s[: len(s) // 2], "truncated"),
    "empty": (lambda s: "", "truncated"),
    "not JSON": (lambda s: "\x80\x02weights", "not a plan file"),
    "a list": (lambda s: "[1, 2]", "'format' is None"),
    "format": (lambda s: damage(s, format="other"), "'format' is 'other'"),
    "version": (lambda s: damage(s, version=99), "version 99 .* expected 2; compile the plan again"),
    "missing": (lambda s: damage(s, times=None, alpha=None), "missing times, alpha"),
    "ragged": (lambda s: damage(s, coefficients=[[1.0], [1.0, 2.0]]), "not a valid plan"),
    "wrong type": (lambda s: damage(s, start_scale="much"), "not a valid plan"),
    "invalid": (lambda s: damage(s, sigma=[1.0]), "sigma has shape"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(case, tmp_path) -> None:
    path = tmp_path / "plan.json"
    compiled().save(path)
    break_it, message = DAMAGED[case]
    path.write_bytes(break_it(path.read_text()).encode("latin-1"))
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_the_usual_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize("failing", ["json.dump", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch) -> None:
    path, plan = tmp_path / "plan.json", compiled()
    plan.save(path)

    def fail(*args, **kwargs):
        if failing == "json.dump":
            args[1].write("{half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="disk full"):
            compiled("ddim").save(path)
    assert os.listdir(tmp_path) == ["plan.json"] and Plan.load(path) == plan
    compiled("ddim").save(path)
    assert Plan.load(path) != plan


def noise_like(x, draws):
    return torch.randn(draws, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draws))


def run_both(first, second):
    """x after the concatenated plan, and after one plan and then the other with the same noise."""
    x = 80 * torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both, draws = first + second, first.num_draws
    noise = noise_like(x, both.num_draws)
    assert len(both) == len(first) + len(second) and both.num_draws == draws + second.num_draws
    joined = pydiff.run_plan(both, toy, x, noise=noise, dtype=torch.float64)
    middle = pydiff.run_plan(first, toy, x, noise=noise[:draws], dtype=torch.float64)
    return joined, pydiff.run_plan(second, toy, middle, noise=noise[draws:], dtype=torch.float64)


@pytest.mark.parametrize("first", ["ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "dpm_solver_3", "heun"])
@pytest.mark.parametrize("second", ["ddim", "unipc", "euler_ancestral", "dpmpp_2s"])
def test_a_sum_runs_one_plan_and_then_the_other(first, second) -> None:
    a = pydiff.make_plan(first, EDM, times=[80, 30, 9, 4, 2], prediction="sample")
    b = pydiff.make_plan(second, EDM, times=[2, 1, 0.3, 0], prediction="sample")
    joined, apart = run_both(a, b)
    assert torch.equal(joined, apart)


def test_a_start_that_adds_noise_is_folded_into_the_stage_before() -> None:
    a = pydiff.make_plan("euler_ancestral", EDM, times=[80, 9, 2], prediction="sample")
    churning = pydiff.make_plan("heun", EDM, times=[2, 1, 0.3, 0], prediction="sample", s_churn=1)
    assert churning.start_noise != 0
    restart = PlanBuilder(EDM, pydiff.get_prediction("sample"), np.array([9.0, 1.0, 0.0]))
    restart.renoise(1.0, math.sqrt(81.0 - 4.0))  # back up from 2 to 9
    for s, t in zip(restart.points, restart.points[1:], strict=False):
        d = restart.call(s)
        restart.write(x=(t.sigma / s.sigma) * restart.x + (1 - t.sigma / s.sigma) * d)
    for second in (churning, restart.build("restart")):
        joined, apart = run_both(a, second)
        torch.testing.assert_close(joined, apart, rtol=1e-13, atol=1e-13)
    assert (a + churning).solver == "euler_ancestral+heun"
    assert (a + restart.build("restart")).times.tolist() == [80, 9, 2, 9, 1, 0]


def test_a_start_that_scales_is_folded_too() -> None:
    """Where alpha falls as noise is added, x shrinks."""
    schedule = pydiff.VPLinear()
    a = pydiff.make_plan("ddim", schedule, times=[0.9, 0.7, 0.5], prediction="sample")
    churning = pydiff.make_plan("heun", schedule, times=[0.5, 0.2, 0.05], prediction="sample", s_churn=1)
    assert churning.start_scale < 1
    assert "known" not in (a + churning).operands
    joined, apart = run_both(a, churning)
    torch.testing.assert_close(joined, apart, rtol=1e-13, atol=1e-13)


def test_plans_that_do_not_meet_are_refused() -> None:
    a = pydiff.make_plan("ddim", EDM, times=[80, 9, 2])
    b = pydiff.make_plan("ddim", EDM, times=[3, 1, 0])
    with pytest.raises(PlanError, match=r"ends at .*2\.0.* begins at .*3\.0.*; compile the second with t_start"):
        concatenate(a, b)


def test_a_renoising_start_needs_a_free_draw() -> None:
    a = pydiff.make_plan("euler_ancestral", EDM, times=[80, 9, 2], known=True)
    b = pydiff.make_plan("heun", EDM, times=[2, 1, 0], s_churn=1, known=True)
    with pytest.raises(PlanError, match="two draws"):
        concatenate(a, b)


def test_both_plans_or_none_must_serve_a_mask() -> None:
    a = pydiff.make_plan("ddim", EDM, times=[80, 9, 2], known=True)
    with pytest.raises(PlanError, match="known=True"):
        concatenate(a, pydiff.make_plan("ddim", EDM, times=[2, 1, 0]))


def test_the_known_region_meets_the_level_after_a_renoising_start() -> None:
    b = pydiff.make_plan("heun", EDM, times=[2, 1, 0], s_churn=1, known=True)
    a = pydiff.make_plan("ddim", EDM, times=[80, 9, 2], known=True)
    known = concatenate(a, b).coefficients[len(a) - 1, table.KNOWN : table.KNOWN + 3]
    assert known[0] == b.alpha[0] and math.hypot(*known[1:]) == b.sigma[0] > 2


def test_the_known_region_follows_a_start_from_the_clean_end() -> None:
    """There it has no noise yet and takes the draw that x gets."""
    a = pydiff.make_plan("ddim", EDM, times=[80, 9, 0], known=True)
    restart = PlanBuilder(EDM, pydiff.get_prediction("epsilon"), np.array([4.0, 0.0]))
    restart.renoise(1.0, 4.0)
    restart.write(x=restart.call(restart.points[0]))
    last = (a + restart.build("restart", known=True)).coefficients[len(a) - 1]
    assert last[table.Z0] == 4 and last[table.KNOWN : table.KNOWN + 3].tolist() == [1, 4, 0]


@pytest.mark.parametrize("schedules", [(EDM, pydiff.VPLinear()), (pydiff.RectifiedFlow(), EDM)], ids=str)
def test_the_known_region_follows_a_start_that_scales(schedules) -> None:
    """On another schedule at the same noise ratio; the region keeps its own draw, the second here."""
    first, second = ([float(s.t_of_log_snr(k)) for k in (-2, -1, 0, 1)] for s in schedules)
    a = pydiff.make_plan("euler_ancestral", schedules[0], times=first[:3], known=True)
    b = pydiff.make_plan("ddim", schedules[1], times=second[2:], known=True)
    last = (a + replace(b, start_scale=b.alpha[0] / a.alpha[-1])).coefficients[len(a) - 1]
    assert last[table.KNOWN : table.KNOWN + 3].tolist() == [b.alpha[0], 0, b.sigma[0]]


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp_2s", "dpm_solver_2", "ddpm", "euler_ancestral"])
def test_pieces_of_a_one_step_solver_make_the_whole(solver) -> None:
    times = [80.0, 30.0, 9.0, 4.0, 1.0, 0.0]
    for cut in (1, 3):
        pieces = [pydiff.make_plan(solver, EDM, times=t) for t in (times[: cut + 1], times[cut:])]
        assert pieces[0] + pieces[1] == pydiff.make_plan(solver, EDM, times=times)


@pytest.mark.parametrize("schedule", [pydiff.VPLinear(), pydiff.RectifiedFlow()], ids=repr)
def test_pieces_meet_in_alpha_too(schedule) -> None:
    times = [0.9, 0.6, 0.4, 0.1]
    pieces = [pydiff.make_plan("dpmpp_2s", schedule, times=t) for t in (times[:3], times[2:])]
    whole = pydiff.make_plan("dpmpp_2s", schedule, times=times)
    assert pieces[0] + pieces[1] == whole
    for name in ("times", "alpha", "sigma"):
        np.testing.assert_array_equal(getattr(pieces[0] + pieces[1], name), getattr(whole, name))
    assert (pieces[0] + pieces[1]).solver == "dpmpp_2s"
    other = replace(pieces[1], alpha=0.9 * pieces[1].alpha)
    with pytest.raises(PlanError, match="begins at"):
        pieces[0] + other


def test_the_first_draw_of_all_is_taken_too() -> None:
    """A plan whose only stage uses draw 0: the noise that the next one starts with goes beside it."""
    first = pydiff.make_plan("euler_ancestral", EDM, times=[80, 2], prediction="sample")
    churning = pydiff.make_plan("heun", EDM, times=[2, 1, 0.3, 0], prediction="sample", s_churn=1)
    assert first.indices[-1, table.DRAW0 :].tolist() == [0, -1] and churning.start_noise != 0
    joined, apart = run_both(first, churning)
    torch.testing.assert_close(joined, apart, rtol=1e-13, atol=1e-13)


def test_pieces_of_a_multistep_solver_do_not() -> None:
    times = [80.0, 30.0, 9.0, 4.0, 1.0, 0.0]
    pieces = [pydiff.make_plan("dpmpp_2m", EDM, times=t) for t in (times[:4], times[3:])]
    assert pieces[0] + pieces[1] != pydiff.make_plan("dpmpp_2m", EDM, times=times)
