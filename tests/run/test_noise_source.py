"""Noise that the caller brings: tensors, functions, generators, and how much of it is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pydiff
from pydiff.ops.noise import normal
from pydiff.plans import table
from pydiff.plans.builder import PlanBuilder
from pydiff.run.noise_source import NoiseSource, from_generator, window

SAMPLE = pydiff.get_prediction("sample")


def toy(x, t):
    return 0.5 * x


def sharing_plan(draws):
    """A plan whose stage k adds the draws that `draws[k]` names."""
    b = PlanBuilder(pydiff.EDM(), SAMPLE, np.arange(len(draws), -1, -1.0))
    noise = [b.noise() for _ in range(1 + max((n for stage in draws for n in stage), default=-1))]
    for point, stage in zip(b.points, draws, strict=False):
        b.write(x=b.call(point) + sum((noise[n] for n in stage), 0 * b.x))
    return b.build("sharing")


def index_table(draws):
    rows = np.full((len(draws), table.INDEX_COLUMNS), -1, dtype=np.int32)
    for row, stage in zip(rows, draws, strict=True):
        row[table.DRAW0 : table.DRAW0 + len(stage)] = stage
    return rows


@pytest.mark.parametrize(
    "draws, size",
    [
        ([[0], [1], [2]], 1),
        ([[0, 1], [2, 3]], 2),
        ([[], [0]], 1),
        ([[]], 1),
        ([[0], [1], [0]], 2),
        ([[0], [0], [1], [1]], 1),
        ([[2], [0]], 3),
        ([[0, 3], [1, 4], [2, 5]], 4),
    ],
    ids=str,
)
def test_window(draws, size) -> None:
    assert window(index_table(draws)) == size


DRAWS = st.lists(st.lists(st.integers(0, 6), max_size=2, unique=True).map(sorted), min_size=1, max_size=7)


@given(DRAWS)
@settings(max_examples=60, deadline=None)
def test_a_function_is_the_tensor_of_its_values(draws) -> None:
    plan, x = sharing_plan(draws), torch.ones(2, 3)
    noise = torch.arange(1.0, 1 + 6 * 8).reshape(8, 2, 3)
    asked = []

    def function(k):
        asked.append(k)
        return noise[k]

    source = NoiseSource(plan, function, x)
    assert source.buffer.shape[0] <= max(plan.num_draws, 1)
    expected = pydiff.run_plan(plan, toy, x, noise=noise)
    assert torch.equal(pydiff.run_plan(plan, toy, x, noise=function), expected)
    assert asked == list(range(plan.num_draws))  # in order, each once


def test_a_function_leaves_the_history_where_it_is() -> None:
    """A plan with more slots than draws are kept at once."""
    history = pydiff.make_plan("dpmpp_3m", pydiff.EDM(), times=[80, 40, 20, 10, 5, 2])
    plan = history + pydiff.make_plan("euler_ancestral", pydiff.EDM(), times=[2, 1, 0.5, 0])
    noise, x = torch.randn(plan.num_draws, 2, 3), torch.ones(2, 3)
    assert plan.num_slots == 2 and NoiseSource(plan, noise.__getitem__, x).buffer.shape[0] == 1
    expected = pydiff.run_plan(plan, toy, x, noise=noise)
    assert torch.equal(pydiff.run_plan(plan, toy, x, noise=noise.__getitem__), expected)


@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "euler_maruyama", "ddim"])
def test_every_stochastic_solver_takes_functions_and_tensors(solver) -> None:
    plan, x = (pydiff.make_plan(solver, steps=6, **({"eta": 1.0} if solver == "ddim" else {})), torch.ones(2, 3))
    noise = torch.randn(plan.num_draws, 2, 3)
    assert plan.num_draws >= 5
    result = pydiff.run_plan(plan, toy, x, noise=noise)
    assert torch.equal(result, pydiff.run_plan(plan, toy, x, noise=noise.__getitem__))
    assert torch.equal(result, pydiff.run_plan(plan, toy, x, noise=torch.cat([noise, noise])))
    strided = noise.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(result, pydiff.run_plan(plan, toy, x, noise=strided))
    assert not torch.equal(result, pydiff.run_plan(plan, toy, x, noise=noise.flip(0)))


def test_a_start_with_noise_takes_draw_zero() -> None:
    plan = pydiff.make_plan("heun", pydiff.EDM(), 4, s_churn=3.0, prediction="sample")
    noise = torch.randn(plan.num_draws, 2, 3)
    assert plan.start_noise != 0 and plan.num_draws > 1
    started = pydiff.init(plan, torch.ones(2, 3), noise=noise).x
    torch.testing.assert_close(started, plan.start_scale + plan.start_noise * noise[0])
    by_tensor = pydiff.run_plan(plan, toy, torch.ones(2, 3), noise=noise)
    assert torch.equal(by_tensor, pydiff.run_plan(plan, toy, torch.ones(2, 3), noise=lambda k: noise[k]))
    noise[0] += 1
    assert not torch.equal(by_tensor, pydiff.run_plan(plan, toy, torch.ones(2, 3), noise=noise))


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_start_with_noise_and_one_without_share_a_batch(weight) -> None:
    plan = pydiff.make_plan("heun", pydiff.EDM(), 4, s_churn=3.0, prediction="sample")
    plans = [replace(plan, start_noise=weight), replace(plan, start_noise=0.0)]
    noise = normal(torch.tensor([5, 6]), 0, (3,))
    expected = plan.start_scale + torch.stack([weight * noise[0], torch.zeros(3)])
    torch.testing.assert_close(pydiff.init(plans, torch.ones(2, 3), seed=[5, 6]).x, expected)


def test_a_start_with_noise_takes_draw_zero_of_the_seeds_and_no_stage_takes_it_again() -> None:
    plan, seeds = pydiff.make_plan("heun", pydiff.EDM(), 4, s_churn=3.0, prediction="sample"), torch.tensor([5, 6])
    noise = torch.stack([normal(seeds, k, (3,)) for k in range(plan.num_draws)])
    assert plan.start_noise != 0
    by_seeds = pydiff.run_plan(plan, toy, torch.ones(2, 3), seed=seeds)
    assert torch.equal(by_seeds, pydiff.run_plan(plan, toy, torch.ones(2, 3), noise=noise))


def test_a_function_needs_room_for_one_draw_where_a_stage_adds_one() -> None:
    """Whatever the plan keeps besides: its history is no noise."""
    plan = pydiff.make_plan("dpmpp_2m_sde", steps=6)
    assert plan.num_slots > 0 and plan.num_draws > 1
    assert NoiseSource(plan, torch.ones, torch.ones(2, 3)).buffer.shape == (1, 2, 3)


def test_a_generator_for_the_batch_draws_whole_tensors() -> None:
    plan, x = pydiff.make_plan("ddpm", steps=4), torch.ones(2, 3)
    torch.manual_seed(0)
    noise = torch.stack([torch.randn(2, 3) for _ in range(plan.num_draws)])
    result = pydiff.run_plan(plan, toy, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result, pydiff.run_plan(plan, toy, x, noise=noise))


def test_a_generator_a_row_makes_rows_independent() -> None:
    plan = pydiff.make_plan("ddpm", steps=4)
    rows = [torch.Generator().manual_seed(k) for k in (5, 6)]
    both = pydiff.run_plan(plan, toy, torch.ones(2, 3), generator=rows)
    one = pydiff.run_plan(plan, toy, torch.ones(1, 3), generator=[torch.Generator().manual_seed(6)])
    assert torch.equal(both[1:], one) and not torch.equal(both[:1], one)


def test_a_generator_follows_the_dtype_of_the_run() -> None:
    plan, x = pydiff.make_plan("ddpm", steps=4), torch.ones(2, 3)
    torch.manual_seed(0)
    noise = torch.stack([torch.randn(2, 3, dtype=torch.float64) for _ in range(plan.num_draws)])
    result = pydiff.run_plan(plan, toy, x, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(result, pydiff.run_plan(plan, toy, x, noise=noise, dtype=torch.float64))


def test_generators_follow_the_dtype() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    drawn = from_generator(torch.Generator().manual_seed(1), x)(0)
    assert torch.equal(drawn, torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize(
    ("answer", "told"), [([0.0], "got list"), (torch.zeros(2, 4), r"got \[2, 4\]"), (None, "got NoneType")], ids=str
)
def test_a_function_that_answers_with_something_else_is_told_what(answer, told) -> None:
    plan = pydiff.make_plan("ddpm", pydiff.EDM(), 3, prediction="sample")
    with pytest.raises(ValueError, match=rf"noise\(0\) must return a tensor of shape \[2, 3\], {told}"):
        pydiff.run_plan(plan, toy, torch.zeros(2, 3), noise=lambda k: answer)
