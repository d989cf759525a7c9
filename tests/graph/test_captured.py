"""The captured loop against the eager one, on a backend that records operators on the CPU (see `recorded.py`)."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

import pydiff
from pydiff.graph.captured import CapturedLoop
from tests.graph.models import ConvNet, Net
from tests.graph.recorded import RecordedGraphs

MODES = ("stage", "loop", "device")
SHAPE, SEEDS = (3, 2, 4, 5), [7, 8, 9]


def sampler(mode: str, *arguments, backend=None, max_graphs: int = 4, **options) -> pydiff.Sampler:
    made = pydiff.Sampler(Net(), *arguments, **options)
    made.graphs = CapturedLoop(mode, max_graphs, backend or RecordedGraphs())
    return made


def eager(other: pydiff.Sampler, *arguments, **options):
    graphs, other.graphs = other.graphs, None
    try:
        return other(*arguments, **options)
    finally:
        other.graphs = graphs


def check(s: pydiff.Sampler, shape=SHAPE, **options) -> torch.Tensor:
    """The sampler's result, which is that of the eager loop bit for bit."""
    result = s(shape, **options)
    assert torch.equal(result, eager(s, shape, **options))
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_replay_equals_the_eager_loop_bit_for_bit(solver, mode) -> None:
    s = sampler(mode, solver, 6)
    for seed in (SEEDS, [1, 2, 3]):
        check(s, seed=seed)
    assert s.stats().captures == 1 and s.stats().replays == 2 and s.stats().eager == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_many_kernels(mode) -> None:
    s = pydiff.Sampler(ConvNet().eval(), "dpmpp_2m", 5, guidance_scale=2.0)
    s.graphs = CapturedLoop(mode, 4, RecordedGraphs())
    for labels in ([1, 2], [3, 0]):
        check(s, (2, 4, 8, 8), seed=[1, 2], cond={"labels": torch.tensor(labels)}, uncond={"labels": 0})
    assert s.stats().captures == 1


@pytest.mark.parametrize("mode", MODES)
def test_another_solver_steps_guidance_seed_or_condition_replays_the_same_graphs(mode) -> None:
    backend = RecordedGraphs()
    s = sampler(mode, "dpmpp_2m", 12, backend=backend, guidance_scale=3.0)
    given = {"cond": {"labels": torch.tensor([1, 2, 3])}, "uncond": {"labels": -1}}
    first = check(s, seed=SEEDS, **given)
    made = len(backend.graphs)
    for solver in ("ddim", "unipc", "heun", "dpmpp_2m_sde", "euler_ancestral", "dpmpp_3m"):
        for steps in (1, 3, 5):
            check(s, seed=[4, 5, 6], plan=s.make_plan(solver, steps, guidance_scale=2.0), **given)
    check(s, seed=SEEDS, guidance_scale=7.5, **given)
    check(s, seed=SEEDS, guidance_scale=lambda t: 2 + t, **given)
    check(s, seed=SEEDS, cond={"labels": torch.tensor([5, 6, 7])}, uncond={"labels": -1})
    plans = [
        s.make_plan(name, steps, guidance_scale=g)
        for name, steps, g in (("ddim", 2, 1.0), ("unipc", 5, 4.0), ("dpmpp_2m", 4, 0.0))
    ]
    check(s, seed=SEEDS, plan=plans, **given)
    assert torch.equal(s(SHAPE, seed=SEEDS, **given), first)
    assert len(backend.graphs) == made and s.stats().captures == 1


def test_one_launch_from_noise_to_sample() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "dpmpp_2m", 20, backend=backend)
    check(s, seed=SEEDS)
    before = sum(g.replays for g in backend.graphs)
    s(SHAPE, seed=SEEDS)
    assert sum(g.replays for g in backend.graphs) == before + 1
    once = sampler("loop", "ddim", 1, backend=RecordedGraphs())
    check(once, seed=SEEDS)
    assert sum(g.replays for g in once.graphs._backend.graphs) == 1


def test_one_launch_of_the_loop_on_the_device() -> None:
    backend = RecordedGraphs()
    s = sampler("device", "dpmpp_2m", 20, backend=backend)
    check(s, seed=SEEDS)
    check(s, seed=SEEDS, plan=s.make_plan("ddim", 9))
    loop = backend.graphs[-1]
    assert loop.replays == 2


def test_a_longer_plan_than_there_is_room_for_is_captured_anew() -> None:
    s = sampler("stage", "ddim", 4)
    check(s, seed=SEEDS)
    check(s, seed=SEEDS, plan=s.make_plan("ddim", 64))
    assert s.stats().captures == 1
    check(s, seed=SEEDS, plan=s.make_plan("ddim", 65))
    assert s.stats().captures == 2 and len(s.stats().held) == 1
    check(s, seed=SEEDS)
    assert s.stats().captures == 2


def test_numbers_of_steps_that_were_used_in_rising_order_have_one_launch_each() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 10, backend=backend)
    plans = [s.make_plan("ddim", steps) for steps in (10, 20, 10, 20, 50, 10)]
    for plan in plans[:5]:
        check(s, seed=SEEDS, plan=plan)
    for plan in plans:
        before = sum(g.replays for g in backend.graphs)
        s(SHAPE, seed=SEEDS, plan=plan)
        assert sum(g.replays for g in backend.graphs) == before + 1
    assert s.stats().captures == 1


@pytest.mark.parametrize("mode", MODES)
def test_what_else_a_run_may_be_given(mode) -> None:
    s = sampler(mode, "dpmpp_2m_sde", 5)
    x = torch.randn(SHAPE)
    check(s, x, seed=SEEDS)
    noise = torch.randn(8, *SHAPE)
    check(s, x, noise=noise)
    check(s, x, noise=lambda k: noise[k])
    check(s, SHAPE, noise=lambda k: noise[k], seed=SEEDS)
    drawn = [f(s, SHAPE, generator=torch.Generator().manual_seed(3)) for f in (pydiff.Sampler.__call__, eager)]
    assert torch.equal(*drawn)
    half = s.make_plan("dpmpp_2m_sde", 5, t_start=0.5)
    check(s, SHAPE, x0=torch.randn(SHAPE), plan=half, seed=SEEDS)
    churning = s.make_plan("heun", 5, s_churn=2.0) if "s_churn" in pydiff.get_solver("heun").options else None
    if churning is not None:
        check(s, seed=SEEDS, plan=churning)
    known = s.make_plan("ddim", 4, known=True)
    mask = torch.zeros(SHAPE)
    mask[..., :2] = 1
    check(s, seed=SEEDS, plan=known, mask=mask, known=torch.randn(SHAPE))
    check(s, seed=SEEDS, plan=known, mask=1 - mask, known=torch.randn(1, *SHAPE[1:]))


def test_plans_that_scale_and_renoise_before_the_first_call() -> None:
    s = sampler("loop", "euler", 5, schedule=pydiff.EDM())
    noise = torch.randn(4, *SHAPE)
    for changed in ({"start_scale": 0.5}, {"start_noise": 0.25}):
        plan = replace(s.plan, **changed)
        check(s, seed=SEEDS, plan=plan)
        check(s, torch.randn(SHAPE), plan=plan, noise=noise)
        check(s, torch.randn(SHAPE), plan=plan, noise=lambda k: noise[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype, model_dtype) -> None:
    s = sampler("loop", "unipc", 5, dtype=dtype, model_dtype=model_dtype, schedule=pydiff.EDM())
    assert check(s, seed=SEEDS).dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_callbacks_previews_and_progress(mode, capsys) -> None:
    seen: list[tuple] = []

    def note(info) -> None:
        seen.append((info.stage, info.total, info.time, info.x.clone(), info.model_output.clone()))

    s = sampler(mode, "dpmpp_2m", 9)
    for steps in (1, 4, [0, 5, 9], 100, []):  # 9 is past the last
        check(s, seed=SEEDS, callback=note, callback_stages=steps, progress=True)
        ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert a[:3] == b[:3] and torch.equal(a[3], b[3]) and torch.equal(a[4], b[4])
        seen.clear()
    assert "9/9" in capsys.readouterr().err
    x, trajectory = s(SHAPE, seed=SEEDS, return_trajectory=True)
    expected, whole = eager(s, SHAPE, seed=SEEDS, return_trajectory=True)
    assert torch.equal(x, expected) and torch.equal(trajectory, whole)


def test_a_loop_is_cut_at_the_chosen_stages() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "dpmpp_2m", 12, backend=backend)
    stages: list[int] = []
    for _ in range(2):
        stages.clear()
        before = sum(g.replays for g in backend.graphs)
        s(SHAPE, seed=SEEDS, callback=lambda info: stages.append(info.stage), callback_stages=4)
        assert stages == [3, 7, 11]
    assert sum(g.replays for g in backend.graphs) == before + 3  # one launch a stretch
    made = len(backend.graphs)
    for k in range(2, 12):  # stretches of many lengths are not all captured
        s(SHAPE, seed=SEEDS, callback=lambda info: None, callback_stages=[k])
    assert s.stats().graphs <= 2 + 8
    made = len(backend.graphs)
    for k in range(2, 12):
        check(s, seed=SEEDS, callback=lambda info: None, callback_stages=[k])
    assert len(backend.graphs) == made


def test_a_callback_ends_the_run_and_may_call_the_sampler() -> None:
    s = sampler("loop", "ddim", 8)
    inner: list[torch.Tensor] = []

    def stop(info) -> bool:
        inner.append(s(SHAPE, seed=SEEDS))
        return info.stage == 3

    check(s, seed=SEEDS, callback=stop)
    assert len(inner) == 8 and all(torch.equal(x, inner[0]) for x in inner)
    with pytest.raises(RuntimeError, match=r"release\(\) was called from a callback"):
        s(SHAPE, seed=SEEDS, callback=lambda info: s.release())
    check(s, seed=SEEDS)


def test_callbacks_and_noise_functions_run_without_gradients_as_in_the_eager_loop() -> None:
    s = sampler("stage", "dpmpp_2m_sde", 4)
    weight = torch.ones(SHAPE, requires_grad=True)
    seen: list[bool] = []
    check(
        s,
        torch.randn(SHAPE),
        noise=lambda k: weight * (k + 1),
        callback=lambda info: seen.append((weight * info.x).requires_grad),
    )
    assert seen == [False] * 8


def test_the_model_output_of_a_callback_may_be_kept() -> None:
    s = sampler("loop", "dpmpp_2m", 4)
    kept: list[torch.Tensor] = []
    check(s, seed=SEEDS, callback=lambda info: kept.append(info.model_output))
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], kept[4:])) and not torch.equal(kept[0], kept[1])


def test_torchs_seed_gives_the_same_samples_with_and_without_a_graph() -> None:
    s = pydiff.Sampler(Net(), "dpmpp_2m_sde", 4, graph="auto")
    for x in (SHAPE, torch.randn(SHAPE)):
        torch.manual_seed(3)
        first = s(x)
        torch.manual_seed(3)
        assert torch.equal(first, eager(s, x))


class Noisy(Net):
    def forward(self, x, t):
        return super().forward(x, t) + 0.1 * torch.rand(())


def test_warming_up_leaves_torchs_generator_where_it_was() -> None:
    s = pydiff.Sampler(Noisy(), "ddim", 4)
    s.graphs = CapturedLoop("stage", 4, RecordedGraphs())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    s.graphs._backend.problems = ["refused"]
    with pytest.warns(UserWarning, match="refused"):
        first = s(SHAPE, seed=SEEDS)
    torch.set_rng_state(before)
    assert torch.equal(first, eager(s, SHAPE, seed=SEEDS))


def test_rows_that_are_not_finite_are_named() -> None:
    s = sampler("loop", "ddim", 8)
    x = torch.randn(SHAPE)
    check(s, x)
    x[1, 0, 0, 0] = float("inf")
    with pytest.raises(pydiff.NonFiniteError) as caught:
        s(x)
    assert caught.value.rows == {1: 0}
    assert s(x, check_finite=False).shape == SHAPE
    check(s, seed=SEEDS)


def test_nothing_to_do_runs_eagerly() -> None:
    s = sampler("loop", "ddim", 3)
    assert s((0, 2, 4)).shape == (0, 2, 4)
    assert s.stats().captures == 0 and s.stats().eager == 1


def test_torch_modes_around_the_call_leave_no_trace() -> None:
    s = sampler("loop", "dpmpp_2m", 5)
    with torch.inference_mode():
        first = s(SHAPE, seed=SEEDS)
    check(s, seed=SEEDS)
    assert torch.equal(s(SHAPE, seed=SEEDS), first) and s.stats().captures == 1
    with torch.enable_grad():
        x = torch.randn(SHAPE, requires_grad=True)
        assert not s(x).requires_grad


def test_autocast_is_part_of_the_key() -> None:
    s = sampler("loop", "dpmpp_2m", 5)
    check(s, seed=SEEDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(s, seed=SEEDS)
    check(s, seed=SEEDS)
    assert s.stats().captures == 2


def test_a_model_optimised_and_hoisted() -> None:
    model = pydiff.optimize(pydiff.load_model("mnist"))
    s = pydiff.Sampler(model, "dpmpp_2m", 4, guidance_scale=2.0)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    for labels in ([1, 2], [3, 4]):
        given = {"cond": {"labels": torch.tensor(labels)}, "uncond": {"labels": torch.full((2,), 10)}}
        for plan in (s.plan, s.make_plan("unipc", 3, guidance_scale=4.0)):
            got, expected = (f((2, 1, 28, 28), plan=plan, seed=[1, 2], **given) for f in (s, partial(eager, s)))
            # Tables of other heights go through matrix products of other shapes.
            assert torch.allclose(got, expected, atol=2e-5)
    assert s.stats().captures == 1


def test_a_state_and_a_sampler_can_be_copied() -> None:
    s = sampler("loop", "ddim", 4)
    first = check(s, seed=SEEDS)
    other = copy.deepcopy(s)
    assert other.stats().captures == 0
    assert torch.equal(check(other, seed=SEEDS), first)
    loaded = pickle.loads(pickle.dumps(pydiff.Sampler(Net(), "ddim", 4, graph="loop")))
    with pytest.warns(UserWarning, match="CUDA graphs need a CUDA device"):
        assert torch.equal(loaded(SHAPE, seed=SEEDS), first)


def test_a_compiled_model() -> None:
    s = pydiff.Sampler(torch.compile(ConvNet().eval(), backend="eager"), "dpmpp_2m", 4)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    for seed in ([1, 2], [3, 4]):
        check(s, (2, 4, 8, 8), seed=seed)
    with torch.no_grad():
        s.model.first.weight.mul_(0.5)
    check(s, (2, 4, 8, 8), seed=[1, 2])
    assert s.stats().captures == 1 and s.stats().eager == 0
