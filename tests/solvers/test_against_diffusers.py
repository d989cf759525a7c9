"""Number by number against diffusers: same model, same levels, same noise, for every scheduler that both have.

Every configuration runs at several step counts, with a perfect model or with one that follows from nothing
(`peers.unruly`) and so does not pull errors back to the data. Of each run is asserted:

- *formulas*: with float64 on both sides (diffusers' own source, see `peers.float64_arithmetic`) the samples agree to
  `FORMULAS`, far below what a wrong coefficient could hide behind;
- *float32*: as users run it, on the levels that diffusers tabulated, the samples agree to `FLOAT32`, unless the run is
  *hard* (see `hard`): it starts at alpha < 1e-3 (squaredcos_cap_v2, zero terminal SNR), or takes fewer than 8 steps, or
  integrates epsilon from alpha < 1e-2. There float32 carries an error of rounding / alpha, whoever computes; pydiff
  must then be no farther than a few times diffusers from float64 on the same levels.

Worst relative differences measured in float32; own error: from float64 on the same levels. In float64 the formulas
agree to 1e-14 (DDPM: 2e-10, because diffusers adds noise of deviation 1e-10 where there is none; hard runs: 1e-9).

    scheduler                  as run   hard runs: own error of diffusers / of pydiff
    DDPM                       1.7e-6   1.1e-6 / 7.3e-7
    DDIM                       6.2e-7   3.7e-7 / 4.2e-7
    EulerDiscrete              6.0e-7   2.9e-3 / 6.1e-5
    EulerAncestralDiscrete     3.5e-7   1.0e-3 / 1.2e-4
    HeunDiscrete               7.2e-7   1.4e-2 / 7.6e-3
    DPMSolverMultistep         1.6e-6   2.9e-3 / 5.9e-4
    DPMSolverSinglestep        2.9e-6   3.4e-1 / 2.5e-2
    UniPCMultistep             2.4e-6   9.6e-2 / 1.1e-2
    EDMEuler                   4.4e-7   9.6e-6 / 8.0e-8
    EDMDPMSolverMultistep      6.6e-7   1.6e-7 / 1.2e-7
    FlowMatchEulerDiscrete     1.9e-7   1.3e-7 / 8.9e-8

`LARGER_ERROR`: what pydiff solves in float32 to 1e-5 and diffusers, subtracting multiples of x / alpha, does not.

Not compared, because the two do not mean the same: churn in EulerDiscrete and EDMEuler (diffusers adds the noise after
the model call that should see it; `test_against_k_diffusion` compares churn with EDM's formulas); DDIM with linspace,
and trailing where n does not divide 1000 (diffusers steps to t - 1000 // n, off its own grid); DDPM fixed_large with
trailing (adds the noise of the last step to the finished sample); FlowMatchHeun (trapezoid in t; ours is in
sigma / alpha); singlestep order 3 with solver_type heun; sde-dpmsolver (the SDE for epsilon).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import pydiff
from tests.oracles import peers

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FORMULAS = 1e-9
HARD_FORMULAS = 1e-7  # the same amplification, of float64's rounding
FLOAT32 = 1e-5
STEPS = (1, 2, 3, 8, 13, 14, 15, 16, 25)


@dataclass(frozen=True)
class Case:
    """A scheduler's configuration and the plan that should equal it."""

    peer: str
    config: dict[str, Any]
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)  # arguments of the scheduler's step
    steps: tuple[int, ...] = STEPS  # of which each case takes every third, so that all occur for each scheduler

    @property
    def id(self) -> str:
        words = [f"{k}={v}" for k, v in {**self.config, **self.step}.items()]
        return "-".join([self.peer.removesuffix("Scheduler"), *words])


BETAS: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)
LINEAR, SCALED, COSINE = BETAS
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def _pairs(shift: int) -> list[tuple[dict[str, Any], str]]:
    """Each schedule with one prediction type; three shifts make all nine pairs."""
    return [(betas, PREDICTIONS[(j + shift) % 3]) for j, betas in enumerate(BETAS)]


def _ddpm() -> Iterator[Case]:
    for betas, kind in itertools.product(BETAS, PREDICTIONS):
        config = {**betas, "prediction_type": kind, "clip_sample": False}
        yield Case("DDPMScheduler", config, "ddpm")
    for spacing, variance in itertools.product(("leading", "linspace", "trailing"), ("small", "large")):
        if (spacing, variance) != ("trailing", "large"):
            yield Case(
                "DDPMScheduler",
                {"timestep_spacing": spacing, "variance_type": f"fixed_{variance}"},
                "ddpm",
                {"variance": variance, "clip": 1.0},
            )


def _ddim() -> Iterator[Case]:
    for shift, eta in enumerate((0.0, 0.5, 1.0)):
        for betas, kind in _pairs(shift):
            config = {**betas, "prediction_type": kind, "clip_sample": False}
            yield Case("DDIMScheduler", config, "ddim", {"eta": eta}, {"eta": eta})
    for eta, derived in itertools.product((0.0, 0.5), (True, False)):
        options = {"eta": eta, "use_clipped_model_output": derived}
        yield Case("DDIMScheduler", {"clip_sample": True}, "ddim", {**options, "clip": 1.0}, options)
    sd = {**SCALED, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}  # Stable Diffusion's
    yield Case("DDIMScheduler", sd, "ddim")
    yield Case(
        "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim", steps=(1, 2, 5, 8, 10, 20, 25)
    )


def _euler_family() -> Iterator[Case]:
    solvers = {
        "EulerDiscreteScheduler": "euler",
        "HeunDiscreteScheduler": "heun",
        "EulerAncestralDiscreteScheduler": "euler_ancestral",
    }
    for (peer, solver), betas, kind in itertools.product(solvers.items(), BETAS, PREDICTIONS):
        if peer.startswith("EulerA") and kind == "sample":
            continue  # not implemented there
        yield Case(peer, {**betas, "prediction_type": kind}, solver)
    for (peer, solver), spacing in itertools.product(solvers.items(), ("leading", "linspace", "trailing")):
        yield Case(peer, {**SCALED, "timestep_spacing": spacing}, solver)
    for peer, grid in itertools.product(("EulerDiscreteScheduler", "HeunDiscreteScheduler"), ("karras", "exponential")):
        yield Case(peer, {**SCALED, f"use_{grid}_sigmas": True}, solvers[peer])
    yield Case(
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
        "euler",
    )
    for peer in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        yield Case(
            peer,
            {
                **SCALED,
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
            solvers[peer],
        )


def _multistep_solver(algorithm: str, order: int, kind: str) -> tuple[str, dict[str, Any]]:
    """Which of our solvers a multistep class is. diffusers' third order has half the second derivative."""
    if order == 1:
        return {"dpmsolver": "dpm_solver_1", "dpmsolver++": "ddim", "sde-dpmsolver++": "ddpm"}[algorithm], {}
    if algorithm == "dpmsolver":
        compat = {"compat": True} if order == 3 else {}
        return f"dpm_solver_{order}", {"method": "multistep", "solver_type": kind, **compat}
    if algorithm == "sde-dpmsolver++":
        return "dpmpp_2m_sde", {"solver_type": kind}
    return f"dpmpp_{order}m", {"solver_type": kind, **({"compat": True} if order == 3 else {})}


MULTISTEP = [
    (a, order, kind)
    for a in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")
    for order in (1, 2, 3)
    for kind in ("midpoint", "heun")
    if order == 2 or kind == "midpoint" and not (a[0] == "s" and order == 3)
]


def _multistep() -> Iterator[Case]:
    peer = "DPMSolverMultistepScheduler"
    for shift, (algorithm, order, kind) in enumerate(MULTISTEP):
        solver, options = _multistep_solver(algorithm, order, kind)
        ending = "sigma_min" if algorithm == "dpmsolver" else "zero"  # diffusers refuses zero there
        base = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "final_sigmas_type": ending}
        for betas, prediction in _pairs(shift):
            yield Case(peer, {**base, **betas, "prediction_type": prediction}, solver, options)
        for spacing in ("leading", "trailing"):
            yield Case(peer, {**base, "timestep_spacing": spacing}, solver, options)
        if ending == "zero":
            for grid in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
                yield Case(peer, {**base, **SCALED, grid: True}, solver, options)
            yield Case(peer, {**base, **SCALED, "final_sigmas_type": "sigma_min"}, solver, options)
            yield Case(
                peer,
                {
                    **base,
                    **SCALED,
                    "prediction_type": "v_prediction",
                    "timestep_spacing": "trailing",
                    "rescale_betas_zero_snr": True,
                },
                solver,
                options,
            )
        if order > 1:
            yield Case(
                peer,
                {**base, "final_sigmas_type": "sigma_min", "lower_order_final": False},
                solver,
                {**options, "lower_order_final": False},
            )
        if algorithm == "dpmsolver++":
            for shift in (1.0, 3.0):
                yield Case(
                    peer,
                    {**base, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift},
                    solver,
                    options,
                )


SINGLESTEP = (
    ("dpmsolver++", 2, "midpoint"),
    ("dpmsolver++", 2, "heun"),
    ("dpmsolver", 2, "midpoint"),
    ("dpmsolver", 2, "heun"),
    ("dpmsolver", 3, "midpoint"),
)


def _singlestep() -> Iterator[Case]:
    peer = "DPMSolverSinglestepScheduler"
    whole = {2: (2, 4, 8, 14, 16), 3: (3, 6, 15, 24)}  # with a noisy end diffusers' remainders need lower_order_final
    for shift, (algorithm, order, kind) in enumerate(SINGLESTEP):
        solver = "dpmpp_2s" if algorithm == "dpmsolver++" else f"dpm_solver_{order}"
        options = {"nodes": "grid", "solver_type": kind}
        base = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
        if algorithm == "dpmsolver++":
            for betas, prediction in _pairs(shift):
                yield Case(peer, {**base, **betas, "prediction_type": prediction}, solver, options)
            yield Case(peer, {**base, **SCALED, "use_karras_sigmas": True}, solver, options)
        noisy = {**base, "final_sigmas_type": "sigma_min"}
        rest = tuple(n for n in STEPS if n % order)
        for betas, prediction in _pairs(shift + 1):
            yield Case(
                peer,
                {**noisy, **betas, "prediction_type": prediction, "lower_order_final": False},
                solver,
                options,
                steps=whole[order],
            )
            yield Case(peer, {**noisy, **betas, "prediction_type": prediction}, solver, options, steps=rest)


def _unipc() -> Iterator[Case]:
    peer = "UniPCMultistepScheduler"
    for order, variant, predict_x0 in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False)):
        base = {"solver_order": order, "solver_type": variant, "predict_x0": predict_x0}
        options = {"order": order, "variant": variant, "predict_x0": predict_x0, "lower_order_final": True}
        endings = ("zero", "sigma_min") if variant == "bh2" and predict_x0 else ("sigma_min",)  # others: NaN there
        for ending, prediction in itertools.product(endings, PREDICTIONS):
            config = {**base, **SCALED, "prediction_type": prediction, "final_sigmas_type": ending}
            yield Case(peer, config, "unipc", options)
        for betas in (LINEAR, COSINE):
            yield Case(peer, {**base, **betas, "final_sigmas_type": "sigma_min"}, "unipc", options)
        yield Case(
            peer,
            {**base, "final_sigmas_type": "sigma_min", "disable_corrector": list(range(25))},
            "unipc",
            {**options, "corrector": False},
        )
        yield Case(
            peer,
            {**base, "final_sigmas_type": "sigma_min", "lower_order_final": False},
            "unipc",
            {**options, "lower_order_final": False},
        )
    for order in (1, 2, 3):
        base = {"solver_order": order}
        options = {"order": order, "lower_order_final": True}
        for grid in ("karras", "exponential", "beta"):
            yield Case(peer, {**base, **SCALED, f"use_{grid}_sigmas": True}, "unipc", options)
        for spacing in ("leading", "trailing"):
            yield Case(peer, {**base, "timestep_spacing": spacing}, "unipc", options)
        yield Case(
            peer,
            {
                **base,
                **SCALED,
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
            "unipc",
            options,
        )
        for shift in (1.0, 3.0):
            yield Case(
                peer,
                {**base, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift},
                "unipc",
                options,
            )


def _edm_and_flow() -> Iterator[Case]:
    for grid, prediction in itertools.product(("karras", "exponential"), ("epsilon", "v_prediction")):
        config = {"sigma_schedule": grid, "prediction_type": prediction}
        yield Case("EDMEulerScheduler", config, "euler")
        for algorithm, order, kind in MULTISTEP:
            if algorithm != "dpmsolver":
                solver, options = _multistep_solver(algorithm, order, kind)
                yield Case(
                    "EDMDPMSolverMultistepScheduler",
                    {**config, "algorithm_type": algorithm, "solver_order": order, "solver_type": kind},
                    solver,
                    options,
                )
    for shift in (1.0, 3.0):
        yield Case("FlowMatchEulerDiscreteScheduler", {"shift": shift}, "euler")
    for grid in ("karras", "exponential", "beta"):
        yield Case("FlowMatchEulerDiscreteScheduler", {f"use_{grid}_sigmas": True, "shift": 3.0}, "euler")


CASES = [*_ddpm(), *_ddim(), *_euler_family(), *_multistep(), *_singlestep(), *_unipc(), *_edm_and_flow()]
MODELS = (peers.predict, peers.unruly)


def runs(case: Case) -> list[tuple[int, peers.Model]]:
    """The step counts and models that a case is run with."""
    k = CASES.index(case)
    return [(steps, MODELS[(k // 3 + j) % 2]) for j, steps in enumerate(case.steps[k % 3 :: 3])]


@dataclass
class Errors:
    """Relative differences: of the formulas, as run, and of each side from float64 on the same levels."""

    formulas: float
    float32: float
    theirs: float
    ours: float


def compare(case: Case, steps: int, model: peers.Model, **changed: Any) -> tuple[Errors, pydiff.Plan]:
    """Run both sides. `changed`: options of our solver to change, for negative controls."""
    shared: dict[str, Any] = {"draws": steps, "seed": steps, "model": model}
    options = {**case.options, **changed}
    single = peers.run_diffusers(case.peer, case.config, steps, **shared, **case.step)
    double = peers.run_diffusers(case.peer, case.config, steps, double=True, **shared, **case.step)
    plan = peers.make_peer_plan(case.solver, single, **options)
    ours = peers.run_pydiff(plan, single, **shared)
    exact = peers.run_pydiff(plan, single, double=True, **shared)
    formulas = peers.run_pydiff(peers.make_peer_plan(case.solver, double, **options), double, double=True, **shared)
    pairs = ((formulas, double.x), (ours, single.x), (single.x, exact), (ours, exact))
    return Errors(*(peers.relative(a, b) for a, b in pairs)), plan


def hard(plan: pydiff.Plan, steps: int) -> bool:
    """Whether float32 rounding is amplified beyond 1e-5 (see above); plans in EDM's scaling have alpha = 1."""
    smallest = plan.alpha[0] / plan.sigma[0]
    return bool(steps < 8 or 0 < smallest < 1e-3 or (smallest < 1e-2 and "epsilon" in plan.targets))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scheduler(case: Case) -> None:
    for steps, model in runs(case):
        errors, plan = compare(case, steps, model)
        where = f"{steps} steps, {model.__name__}: {errors}"
        assert errors.formulas <= (HARD_FORMULAS if hard(plan, steps) else FORMULAS), where
        if not errors.float32 <= FLOAT32:
            assert hard(plan, steps), where
            assert errors.ours <= max(6.0 * errors.theirs, 3e-5), where


LARGER_ERROR = (
    Case("EulerDiscreteScheduler", {**COSINE, "prediction_type": "v_prediction"}, "euler"),
    Case("EulerAncestralDiscreteScheduler", {**COSINE, "prediction_type": "v_prediction"}, "euler_ancestral"),
    Case("HeunDiscreteScheduler", {**COSINE, "prediction_type": "v_prediction"}, "heun"),
)


@pytest.mark.parametrize("case", LARGER_ERROR, ids=lambda case: case.id)
def test_larger_error_is_theirs(case: Case) -> None:
    errors, _ = compare(case, 16, peers.unruly)
    assert errors.formulas <= FORMULAS
    assert errors.theirs > 2 * FLOAT32 and errors.ours <= FLOAT32, errors


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    "peer, solver, options, step",
    [
        ("DDIMScheduler", "ddim", {}, {}),
        ("DDIMScheduler", "ddim", {"eta": 0.5}, {"eta": 0.5}),
        ("DDPMScheduler", "ddpm", {}, {}),
    ],
)
def test_zero_terminal_snr(peer: str, solver: str, options: dict, step: dict, prediction: str) -> None:
    """From alpha = 0 exactly, through our own schedule at diffusers' integer times."""
    config = {
        **SCALED,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
    }
    schedule = pydiff.DiscreteBetas.named("scaled_linear", 1000, 0.00085, 0.012, rescale_betas_zero_snr=True)
    for steps in (1, 2, 5, 20):
        times = np.append(1000 - 1000 // steps * np.arange(steps) - 1.0, -1.0)
        plan = pydiff.make_plan(solver, schedule, times=times, prediction=prediction, **options)
        shared: dict[str, Any] = {"draws": steps, "model": peers.unruly}
        single = peers.run_diffusers(peer, config, steps, **shared, **step)
        double = peers.run_diffusers(peer, config, steps, double=True, **shared, **step)
        assert np.isinf(double.levels[0]) and plan.alpha[0] == 0
        assert peers.relative(peers.run_pydiff(plan, double, double=True, **shared), double.x) <= FORMULAS
        assert peers.relative(peers.run_pydiff(plan, single, **shared), single.x) <= FLOAT32


@pytest.mark.parametrize(
    "name, solver, options",
    [
        ("DDIMScheduler", "ddim", {}),
        ("EulerDiscreteScheduler", "euler", {}),
        ("HeunDiscreteScheduler", "heun", {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", {}),
        ("UniPCMultistepScheduler", "unipc", {"lower_order_final": True}),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m", {}),
    ],
)
def test_from_a_config(name: str, solver: str, options: dict) -> None:
    """The whole way: a saved scheduler config becomes schedule, prediction and times, and then the same sample."""
    extra = {} if name.startswith("EDM") else {**SCALED, "steps_offset": 1, "timestep_spacing": "leading"}
    if name.startswith("DDIM"):
        extra.update(clip_sample=False, set_alpha_to_one=False)
    config = {**dict(peers.scheduler_class(name)(**extra).config), "_class_name": name}
    schedule, prediction, grid = pydiff.from_diffusers_config(config)
    times = pydiff.make_times(schedule, 20, **grid)
    plan = pydiff.make_plan(solver, schedule, times=times, prediction=prediction, **options)
    for double, bound in ((True, FORMULAS), (False, FLOAT32)):
        run = peers.run_diffusers(name, extra, 20, double=double)
        assert peers.relative(peers.run_pydiff(plan, run, double=double), run.x) <= bound


@pytest.mark.parametrize(
    "case",
    [
        Case("DDPMScheduler", {"clip_sample": False}, "ddpm"),
        Case("DDIMScheduler", {"clip_sample": False}, "ddim", {"eta": 1.0}, {"eta": 1.0}),
        Case("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
        Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    ],
    ids=lambda case: case.id,
)
def test_generator_draws_the_same_noise(case: Case) -> None:
    """diffusers draws from a torch.Generator by itself; so does pydiff, in the same order."""
    run = peers.run_diffusers(case.peer, case.config, 12, generator=torch.Generator().manual_seed(7), **case.step)
    plan = peers.make_peer_plan(case.solver, run, **case.options)
    for seed, same in ((7, True), (8, False)):
        model = peers.stage_model(plan, run.kind)
        x = pydiff.run_plan(plan, model, run.start, generator=torch.Generator().manual_seed(seed))
        assert (peers.relative(x, run.x) <= FLOAT32) is same


def _first(peer: str, **config: Any) -> Case:
    return next(c for c in CASES if c.peer == peer and config.items() <= c.config.items())


@pytest.mark.parametrize(
    "case, changed",
    [
        (_first("DDIMScheduler", prediction_type="epsilon"), {"eta": 0.01}),
        (_first("DDPMScheduler", prediction_type="epsilon"), {"variance": "large"}),
        (_first("EulerAncestralDiscreteScheduler"), {"eta": 0.99}),
        (_first("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=3), {"compat": False}),
        (_first("DPMSolverMultistepScheduler", algorithm_type="dpmsolver", solver_order=3), {"compat": False}),
        (_first("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=2), {"solver_type": "heun"}),
        (
            _first("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=2),
            {"lower_order_final": False},
        ),
        (_first("DPMSolverSinglestepScheduler", solver_type="midpoint"), {"solver_type": "heun"}),
        (_first("UniPCMultistepScheduler", solver_order=3, solver_type="bh2"), {"order": 2}),
        (_first("UniPCMultistepScheduler", solver_order=2, solver_type="bh2"), {"variant": "bh1"}),
        (_first("UniPCMultistepScheduler", solver_order=2, solver_type="bh2"), {"corrector": False}),
        (_first("EDMDPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=2), {"eta": 0.99}),
    ],
    ids=lambda value: value.id[:60] if isinstance(value, Case) else str(value),
)
def test_a_wrong_option_is_seen(case: Case, changed: dict[str, Any]) -> None:
    """Negative controls: what differs from diffusers by one option misses both bounds by far."""
    config = {**case.config, **({"final_sigmas_type": "sigma_min"} if "lower_order_final" in changed else {})}
    case = Case(case.peer, config, case.solver, case.options, case.step)
    assert compare(case, 13, peers.unruly)[0].formulas <= FORMULAS
    errors, _ = compare(case, 13, peers.unruly, **changed)
    assert errors.formulas > 1e5 * FORMULAS and errors.float32 > 10 * FLOAT32, errors


def test_float64_arithmetic_is_float64() -> None:
    """The oracle of the formulas: tables and sample in double precision, different from the float32 ones."""
    double = peers.run_diffusers("DPMSolverMultistepScheduler", {}, 8, double=True)
    single = peers.run_diffusers("DPMSolverMultistepScheduler", {}, 8)
    assert double.x.dtype == torch.float64 and single.x.dtype == torch.float32
    assert not np.array_equal(double.levels.astype(np.float32), double.levels)
    assert torch.get_default_dtype() == torch.float32
