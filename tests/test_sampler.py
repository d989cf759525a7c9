"""The eager loop: starts, seeds, noise, guidance, masks, dtypes, shapes, modes, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pydiff
from pydiff.plans import table
from pydiff.plans.builder import PlanBuilder

SHAPE = (3, 2, 4, 4)
STOCHASTIC = {"solver": "euler_ancestral", "steps": 5}


def per_row(value, x):
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def toy(x, t):
    """Keeps rows apart bit for bit, is not linear in x, knows the time."""
    return 0.5 * x + 0.25 * per_row(t, x) * x.clamp(-1, 1)


def labelled(x, t, y):
    return toy(x, t) + 0.1 * per_row(y, x)


def x_of(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Seeds and noise.


def test_a_seed_counts_up_over_the_rows() -> None:
    one = pydiff.sample(toy, SHAPE, seed=11, **STOCHASTIC)
    assert torch.equal(one, pydiff.sample(toy, SHAPE, seed=[11, 12, 13], **STOCHASTIC))
    assert torch.equal(one, pydiff.sample(toy, SHAPE, seed=torch.tensor([11, 12, 13]), **STOCHASTIC))
    assert not torch.equal(one, pydiff.sample(toy, SHAPE, seed=12, **STOCHASTIC))


def test_a_row_is_the_same_in_any_batch() -> None:
    whole = pydiff.sample(toy, SHAPE, seed=11, **STOCHASTIC)
    assert torch.equal(whole[1:2], pydiff.sample(toy, (1, *SHAPE[1:]), seed=12, **STOCHASTIC))
    assert torch.equal(whole, pydiff.sample(toy, (7, *SHAPE[1:]), seed=11, **STOCHASTIC)[:3])
    order = [13, 11, 12]
    assert torch.equal(whole[[2, 0, 1]], pydiff.sample(toy, SHAPE, seed=order, **STOCHASTIC))


def test_the_initial_noise_is_a_draw_of_its_own() -> None:
    sampler = pydiff.Sampler(toy, **STOCHASTIC)
    z = pydiff.initial_noise(SHAPE, torch.tensor([4, 5, 6]))
    assert torch.equal(sampler(SHAPE, seed=4), sampler(z * sampler.plan.init_std, seed=4))
    assert not torch.equal(sampler(z, seed=4), sampler(z, seed=5))
    edm = pydiff.Sampler(toy, schedule=pydiff.EDM(), **STOCHASTIC)
    assert edm.plan.init_std == 80 and torch.equal(edm(SHAPE, seed=4), edm(80 * z, seed=4))


def test_without_a_seed_runs_differ() -> None:
    sampler = pydiff.Sampler(toy, **STOCHASTIC)
    assert not torch.equal(sampler(SHAPE), sampler(SHAPE))


def test_a_generator_makes_all_noise() -> None:
    sampler = pydiff.Sampler(toy, **STOCHASTIC)
    plan, g = sampler.plan, torch.Generator().manual_seed(3)
    z = torch.randn(SHAPE, generator=g)
    noise = torch.stack([torch.randn(SHAPE, generator=g) for _ in range(plan.num_draws)])
    expected = pydiff.run_plan(plan, toy, z, noise=noise)
    assert torch.equal(sampler(SHAPE, generator=torch.Generator().manual_seed(3)), expected)
    rows = [torch.Generator().manual_seed(k) for k in (3, 4, 5)]
    both = sampler(SHAPE, generator=rows)
    alone = sampler((1, *SHAPE[1:]), generator=[torch.Generator().manual_seed(4)])
    assert torch.equal(both[1:2], alone)


def test_noise_beside_a_seed_leaves_the_start_to_the_seed() -> None:
    sampler = pydiff.Sampler(toy, **STOCHASTIC)
    noise = torch.zeros(sampler.plan.num_draws, *SHAPE)
    z = pydiff.initial_noise(SHAPE, torch.tensor([4, 5, 6]))
    assert torch.equal(sampler(SHAPE, seed=4, noise=noise), sampler(z, noise=noise))


# Starting from a clean sample, stopping early.


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": pydiff.EDM(), "t_start": 5.0},
        {"schedule": pydiff.VPLinear(), "t_start": 0.6},
        {"schedule": pydiff.EDM(), "t_start": 5.0, "solver": "heun", "s_churn": 20.0, "s_noise": 1.003},
    ],
    ids=["EDM", "VP", "churn"],
)
def test_a_clean_sample_is_noised_to_the_first_time(options) -> None:
    sampler = pydiff.Sampler(toy, **{"solver": "ddim", "steps": 4, **options})
    first = []

    def stop(info):
        first.append(info)
        return True

    x0 = torch.full((1, 3, 50, 50), 2.0)
    level = options["t_start"] if "s_churn" not in options else sampler.plan.sigma[0]
    x, path = sampler((4, 3, 50, 50), x0=x0, seed=1, callback=stop, return_trajectory=True)
    start, alpha, sigma = path[0], sampler.schedule.alpha(level), sampler.schedule.sigma(level)
    error = 4 * sigma / start.numel() ** 0.5
    assert abs(start.mean().item() - 2 * alpha) < error
    assert start.std().item() == pytest.approx(sigma, rel=0.02)
    assert len(first) == 1 and torch.equal(x, path[-1]) and not torch.equal(start[0], start[1])


def test_a_callback_sees_every_stage_and_can_stop() -> None:
    seen = []
    plan = pydiff.make_plan("dpmpp_2m", steps=6)
    final, path = pydiff.run_plan(
        plan, toy, x_of(), return_trajectory=True, callback=lambda info: seen.append(info._replace(x=info.x.clone()))
    )
    assert [i.stage for i in seen] == list(range(6)) and {i.total for i in seen} == {6}
    assert [i.time for i in seen] == plan.model_times.tolist()
    assert path.shape == (7, *SHAPE) and torch.equal(path[0], x_of()) and torch.equal(path[-1], final)
    assert torch.equal(torch.stack([i.x for i in seen]), path[1:])
    torch.testing.assert_close(seen[2].model_output, toy(path[2], torch.full((3,), seen[2].time)))
    calls = []
    stopped = pydiff.run_plan(plan, lambda x, t: calls.append(1) or toy(x, t), x_of(), callback=lambda i: i.stage == 2)
    assert torch.equal(stopped, path[3]) and len(calls) == 3


def test_a_callback_for_rows_of_several_plans_is_told_the_times_of_the_longest() -> None:
    seen, plans = [], [pydiff.make_plan("ddim", steps=n) for n in (2, 5, 3)]
    pydiff.run_plan(plans, toy, x_of(), callback=lambda info: seen.append(info.time))
    assert seen == plans[1].model_times.tolist()


@pytest.mark.parametrize("steps, expected", [(1, range(8)), (3, [2, 5, 7]), (9, [7]), ([0, 4, 99], [0, 4]), ((), [])])
def test_a_callback_is_called_at_chosen_stages(steps, expected) -> None:
    seen = []
    pydiff.sample(toy, SHAPE, steps=8, seed=0, callback=lambda info: seen.append(info.stage), callback_stages=steps)
    assert seen == list(expected)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "5", [-1], [1.0]])
def test_stages_that_cannot_be_chosen(wrong) -> None:
    with pytest.raises(ValueError, match="callback_stages must be a number of stages of at least 1, or stage numbers"):
        pydiff.sample(toy, SHAPE, steps=8, callback=print, callback_stages=wrong)


def test_another_plan_for_a_call() -> None:
    sampler = pydiff.Sampler(toy, "dpmpp_2m", 9, schedule=pydiff.VPCosine(), prediction="v_prediction")
    other = pydiff.Sampler(toy, "ddim", 4, schedule=pydiff.VPCosine(), prediction="v_prediction")
    plan = sampler.make_plan("ddim", 4)
    assert plan == other.plan and len(sampler.make_plan("ddim")) == len(pydiff.Sampler(toy, "ddim").plan)
    assert torch.equal(sampler(SHAPE, seed=3, plan=plan), other(SHAPE, seed=3))
    rows = sampler(SHAPE, seed=3, plan=[plan, sampler.plan, plan])
    assert torch.equal(rows[[0, 2]], other(SHAPE, seed=3)[[0, 2]])
    assert torch.equal(rows[1], sampler(SHAPE, seed=3)[1])
    with pytest.raises(TypeError, match="guidance_scale goes with one plan"):
        sampler(SHAPE, plan=[plan] * 3, guidance_scale=2.0)
    with pytest.raises(TypeError, match="x0 goes with one plan"):
        sampler(SHAPE, plan=[plan] * 3, x0=torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="plan must be a Plan .* or one for each of the 3 rows"):
        sampler(SHAPE, plan=[plan])


def test_a_progress_bar_goes_to_stderr(capsys) -> None:
    pydiff.sample(toy, SHAPE, steps=4, seed=0, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "4/4" in err and "call" in err
    pydiff.sample(toy, SHAPE, steps=4, seed=0)
    assert capsys.readouterr() == ("", "")


# Precision.


def test_float64_is_float64_throughout() -> None:
    dtypes = set()

    def model(x, t):
        dtypes.update((x.dtype, t.dtype))
        return toy(x, t)

    exact = pydiff.sample(model, SHAPE, steps=30, seed=1, dtype=torch.float64)
    single = pydiff.sample(toy, SHAPE, steps=30, seed=1)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32 and dtypes == {torch.float64}
    difference = (exact - single).abs().max() / exact.abs().max()
    assert 0 < difference < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_bfloat16_model_runs_on_a_float32_state(guidance) -> None:
    seen = []

    def model(x, t, y=None):
        seen.append((x.dtype, t.dtype))
        return toy(x, t)

    y = {"y": torch.zeros(3)}
    states = []
    result = pydiff.Sampler(model, steps=5, model_dtype=torch.bfloat16, guidance_scale=guidance)(
        SHAPE, seed=1, cond=y, uncond=y, callback=lambda i: states.append(i.x.dtype)
    )
    assert set(seen) == {(torch.bfloat16, torch.float32)} and set(states) == {torch.float32} == {result.dtype}
    reference = pydiff.sample(toy, SHAPE, steps=5, seed=1)
    assert 0 < (result - reference).abs().max() / reference.abs().max() < 0.05


def test_a_module_names_the_dtype_and_the_defaults() -> None:
    class Net(torch.nn.Module):
        schedule_config = pydiff.EDM(sigma_max=20.0).to_dict()
        prediction = "sample"

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, t):
            assert x.dtype == torch.bfloat16
            return x * self.w

    sampler = pydiff.Sampler(Net(), "ddim")
    assert sampler.schedule == pydiff.EDM(sigma_max=20.0) and sampler.model_dtype == torch.bfloat16
    assert len(sampler.plan) == 20 and sampler.plan.config["prediction"] == {"prediction": "sample"}
    result = sampler(SHAPE, seed=0)
    assert result.dtype == torch.float32 and not result.requires_grad


def test_the_first_parameter_may_lie_deep() -> None:
    parts = [torch.nn.ReLU(), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 4, dtype=torch.bfloat16))]
    net = torch.nn.Sequential(*parts, torch.nn.Linear(4, 4, dtype=torch.float64))
    assert pydiff.Sampler(net.eval(), schedule=pydiff.VPLinear()).model_dtype == torch.bfloat16


# Guidance and conditions.


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, [1.0, 0.0, 2.0, 7.5, 1.0]], ids=str)
def test_guidance_is_the_combination_by_hand(scale) -> None:
    cond, uncond = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    scales = iter(np.broadcast_to(scale, 5).tolist())

    def combined(x, t):
        u, c, s = labelled(x, t, uncond), labelled(x, t, cond), next(scales)
        return c if s == 1 else u + s * (c - u)

    options = {"solver": "dpmpp_2m", "steps": 5, "seed": 2, "dtype": torch.float64}
    result = pydiff.sample(labelled, SHAPE, guidance_scale=scale, cond={"y": cond}, uncond={"y": uncond}, **options)
    torch.testing.assert_close(result, pydiff.sample(combined, SHAPE, **options), rtol=1e-12, atol=1e-12)


def test_guidance_doubles_the_batch_only_where_it_is_used() -> None:
    rows = []

    def model(x, t, y):
        rows.append((x.shape[0], t.shape[0], y.tolist()))
        return toy(x, t)

    cond, uncond = {"y": torch.tensor([1, 2, 3])}, {"y": 9}
    sampler = pydiff.Sampler(model, steps=1)
    sampler(SHAPE, seed=0, cond=cond)
    sampler(SHAPE, seed=0, cond=cond, uncond=uncond, guidance_scale=2.0)
    sampler(SHAPE, seed=0, cond=cond, uncond=uncond, guidance_scale=lambda t: 2.0)
    assert rows == [(3, 3, [1, 2, 3]), *[(6, 6, [9, 9, 9, 1, 2, 3])] * 2]
    assert not sampler.plan.guided  # the compiled plan is as it was


def test_structured_conditions_reach_the_model() -> None:
    def model(x, t, context, mode):
        assert mode == "xl" and context["text"].shape == (6, 2) and isinstance(context["ids"], tuple)
        return toy(x, t) + per_row(context["text"].sum(1) + context["ids"][0], x)

    def conditions(value):
        return {"context": {"text": torch.full((1, 2), value), "ids": (torch.full((3,), value),)}, "mode": "xl"}

    one, two = conditions(0.1), conditions(0.2)
    first = pydiff.sample(model, SHAPE, seed=0, steps=3, guidance_scale=2.0, cond=one, uncond=two)
    second = pydiff.sample(model, SHAPE, seed=0, steps=3, guidance_scale=2.0, cond=two, uncond=one)
    assert torch.isfinite(first).all() and not torch.equal(first, second)


# Masks and further operands.


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "euler_ancestral", "unipc", "heun", "dpm_solver_3"])
def test_the_known_region_ends_as_it_is_known(solver) -> None:
    plan = pydiff.make_plan(solver, pydiff.VPLinear(), 6, known=True, final_sigmas_type="zero", grid="uniform")
    known, mask = x_of(seed=7), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    result, path = pydiff.run_plan(plan, toy, x_of(), seed=3, mask=mask, known=known, return_trajectory=True)
    inside = mask.expand(SHAPE)
    assert torch.equal(result[inside], known[inside]) and not torch.equal(result[~inside], known[~inside])
    free = pydiff.run_plan(plan, toy, x_of(), seed=3)
    assert torch.equal(result[~inside], free[~inside])  # this model does not look across
    middle = 2
    residual = (path[middle + 1][inside] - plan.alpha[middle + 1] * known[inside]) / plan.sigma[middle + 1]
    assert 0.7 < residual.std() < 1.3


def test_constant_and_extra_operands() -> None:
    b = PlanBuilder(pydiff.EDM(), pydiff.get_prediction("sample"), np.array([2.0, 1.0, 0.0]))
    for point in b.points[:2]:
        b.write(x=0.5 * b.x + 0.25 * b.call(point))
    plan = b.build("by hand")
    coefficients = plan.coefficients.copy()
    coefficients[0, table.CONSTANT], coefficients[1, table.EXTRA] = 3.0, -2.0
    plan = type(plan)(**{f: getattr(plan, f) for f in plan.__dataclass_fields__} | {"coefficients": coefficients})
    x, constant, extra = x_of().double(), torch.tensor(2.0), x_of((3, 1, 1, 4), seed=2)
    result = pydiff.run_plan(plan, lambda x, t: 2 * x, x, constant=constant, extra=extra, dtype=torch.float64)
    torch.testing.assert_close(result, 1.0 * (1.0 * x + 6.0) - 2.0 * extra)
    other = pydiff.make_plan("ddim", steps=2)
    for plans in (plan, [other, plan, other]):  # one row that needs it is enough
        with pytest.raises(ValueError, match="operand 'extra': give extra="):
            pydiff.run_plan(plans, toy, x, constant=constant)


def test_explicit_times_need_no_steps() -> None:
    times = [1.0, 0.5, 0.1]
    by_times = pydiff.sample(toy, SHAPE, times=times, seed=0)
    sampler = pydiff.Sampler(toy, times=times)
    assert len(sampler.plan) == 2 and torch.equal(by_times, sampler(SHAPE, seed=0))
    assert len(pydiff.Sampler(toy, times=None).plan) == 20


def test_a_tensor_takes_its_noise_from_one_place() -> None:
    """For a shape the seed may decide x_T and the noise the rest; a given x_T leaves nothing for it."""
    sampler = pydiff.Sampler(lambda x, t: 0.5 * x, "ddpm", 3)
    noise = torch.zeros(3, 2, 4)
    assert sampler((2, 4), seed=1, noise=noise).isfinite().all()
    with pytest.raises(TypeError, match="at most one of seed, noise and generator"):
        sampler(torch.ones(2, 4), seed=1, noise=noise)
