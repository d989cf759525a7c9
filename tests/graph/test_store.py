"""Which graphs a sampler holds: the bounded store, the choice of a mode, and what happens where there is no graph."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import pydiff
from pydiff.graph.captured import CapturedLoop
from tests.graph.models import Net
from tests.graph.recorded import RecordedGraphs, Recording
from tests.graph.test_captured import SEEDS, SHAPE, check, eager, sampler


def shape(k: int) -> tuple[int, ...]:
    return (2, k + 1)


# ---------------------------------------------------------------------------- the store


def test_the_least_recently_used_loop_is_released() -> None:
    backend = RecordedGraphs()
    s = sampler("stage", "ddim", 3, backend=backend, max_graphs=2)
    for k in (0, 1, 0, 2):
        check(s, shape(k), seed=[1, 2])
    assert s.stats().evictions == 1 and backend.alive == 2 * 2
    captures = s.stats().captures
    check(s, shape(0), seed=[1, 2])
    assert s.stats().captures == captures
    check(s, shape(1), seed=[1, 2])
    assert s.stats().captures == captures + 1 and len(s.stats().held) == 2
    assert s.stats().graphs == 4 and s.stats().bytes > 0
    assert "4 graphs in 2 loops" in str(s.stats()) and "[2, 2] float32, stage" in str(s.stats())


def test_shapes_dtypes_and_structures_have_their_own() -> None:
    s = sampler("stage", "ddim", 3, max_graphs=8, guidance_scale=2.0)
    labels = torch.tensor([1, 2, 3])
    for _ in range(2):
        check(s, seed=SEEDS, uncond={})
        check(s, seed=SEEDS, cond={"labels": labels}, uncond={"labels": 0})
        check(s, seed=SEEDS, cond={"labels": labels.float()}, uncond={"labels": 0})
        check(s, seed=SEEDS, guidance_scale=1.0)
        check(s, torch.randn(SHAPE), uncond={})
    assert s.stats().captures == 5


def test_ten_thousand_calls_of_changing_shapes_hold_no_more() -> None:
    backend = RecordedGraphs()
    s = sampler("stage", "ddim", 1, backend=backend, max_graphs=3)
    for k in range(10_000):
        s(shape(k % 3 if k % 500 else 3 + k % 7), seed=[1, 2], check_finite=False)
    assert backend.alive <= 2 * 3 and len(s.stats().held) == 3
    assert s.stats().replays == 10_000 and s.stats().evictions == s.stats().captures - 3


def test_calls_that_take_turns_with_too_many_shapes_are_told() -> None:
    s = sampler("stage", "ddim", 2, max_graphs=1)
    check(s, shape(0), seed=[1, 2])
    with pytest.warns(UserWarning, match="raise max_graphs"):
        for k in (1, 0, 1):
            check(s, shape(k), seed=[1, 2])


def test_release_gives_all_back_and_the_sampler_goes_on() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 5, backend=backend)
    first = check(s, seed=SEEDS)
    s.release()
    assert backend.alive == 0 and s.stats().held == [] and s.stats().bytes == 0
    assert torch.equal(check(s, seed=SEEDS), first)
    # torch refuses a pool whose last graph is gone.
    assert len(backend.pools) == 2 and backend.used_pools[-1] is backend.pools[1]


def test_graphs_of_a_sampler_share_a_pool() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 5, backend=backend)
    for k in range(3):
        check(s, shape(k), seed=[1, 2])
    assert len(set(map(id, backend.used_pools))) == 1 and len(backend.used_pools) == 9


# ---------------------------------------------------------------------------- the choice of a mode


@pytest.mark.parametrize(
    "times, mode",
    [
        ({"eager": 100, "stage": 50, "device": 40, "loop": 30}, "loop"),
        ({"eager": 100, "stage": 50, "device": 30, "loop": 29.9}, "device"),
        ({"eager": 100, "stage": 50, "device": 49.5, "loop": 49.5}, "stage"),
        ({"eager": 100, "stage": 98.4, "device": 98.4, "loop": 98.4}, None),
    ],
)
def test_auto_takes_what_is_faster_by_two_per_cent(times, mode, monkeypatch) -> None:
    backend = RecordedGraphs(times=times)
    s = sampler("auto", "ddim", 5, backend=backend)
    if mode is None:
        with pytest.warns(UserWarning, match="gains less than 2 % .*eager 100 us, stage 98 us"):
            check(s, seed=SEEDS)
        assert backend.alive == 0 and s.stats().eager == 1
    else:
        check(s, seed=SEEDS)
        assert f", {mode}, " in s.stats().held[0]
        assert backend.alive == (3 if mode == "loop" else 2)
    measured = backend.measurements
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(s, seed=SEEDS, plan=s.make_plan("unipc", 4))
    assert backend.measurements == measured


def test_auto_says_what_prevented_every_graph() -> None:
    backend = RecordedGraphs(times={"eager": 100})
    backend.fail = RuntimeError("operation not permitted")
    s = sampler("auto", "ddim", 5, backend=backend)
    with pytest.warns(UserWarning, match="runs without a graph: RuntimeError: operation not permitted"):
        check(s, seed=SEEDS)


def test_without_while_nodes_stages_are_replayed() -> None:
    s = sampler("device", "ddim", 5, backend=RecordedGraphs(device_loop=False))
    with pytest.warns(UserWarning, match="no loop on the device.*CUDA 12.2"):
        check(s, seed=SEEDS)
    assert ", stage, " in s.stats().held[0]
    auto = sampler("auto", "ddim", 5, backend=RecordedGraphs(False, {"eager": 9, "stage": 5, "loop": 4}))
    check(auto, seed=SEEDS)
    assert ", loop, " in auto.stats().held[0]


class Noisy(Net):
    def forward(self, x, t):
        return super().forward(x, t) + 0 * torch.rand(())


def test_a_model_that_draws_random_numbers_is_not_looped_on_the_device() -> None:
    s = pydiff.Sampler(Noisy(), "ddim", 5)
    s.graphs = CapturedLoop("device", 4, RecordedGraphs())
    with pytest.warns(UserWarning, match="draws random numbers"):
        check(s, seed=SEEDS)
    assert ", stage, " in s.stats().held[0]


# ---------------------------------------------------------------------------- where there is no graph


def test_a_model_that_cannot_be_captured_runs_eagerly_with_one_warning() -> None:
    backend = RecordedGraphs()
    backend.problems = ["host synchronisation at model.py:3"]
    s = sampler("loop", "ddim", 5, backend=backend)
    with pytest.warns(UserWarning, match="runs without a graph: host synchronisation at model.py:3"):
        check(s, seed=SEEDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(s, seed=SEEDS)
    assert s.stats().eager == 2 and backend.alive == 0 and "model.py:3" in s.stats().refused[0]
    backend.problems = []
    s.model.scale = 0.5  # it was mended
    check(s, seed=SEEDS)
    assert s.stats().captures == 1 and not s.stats().refused


class Refusing(Net):
    """Does what is forbidden while it is captured, and only then seen."""

    def forward(self, x, t):
        if isinstance(_get_current_dispatch_mode(), Recording):
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().forward(x, t)


def test_an_error_of_the_capture_names_the_models_line() -> None:
    s = pydiff.Sampler(Refusing(), "ddim", 5)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    with pytest.warns(UserWarning, match=r"not permitted when stream is capturing .*test_store.py:\d+: `raise Runtime"):
        check(s, seed=SEEDS)


def test_out_of_memory_while_capturing_leaves_a_sampler_that_works() -> None:
    backend = RecordedGraphs()
    backend.fail = torch.OutOfMemoryError("CUDA out of memory")
    s = sampler("stage", "ddim", 5, backend=backend)
    with pytest.warns(UserWarning, match="runs without a graph: CUDA out of memory"):
        check(s, seed=SEEDS)
    backend.fail = None
    check(s, seed=SEEDS)
    assert s.stats().captures == 1 and backend.used_pools[0] is backend.pools[-1]


def test_out_of_memory_for_the_whole_loop_leaves_its_stage() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 5, backend=backend)
    capture = backend.capture

    def two(*arguments):
        if len(backend.graphs) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(*arguments)

    backend.capture = two
    with pytest.warns(UserWarning, match="5 stages cannot be captured in one graph"):
        check(s, seed=SEEDS)
    check(s, seed=[1, 2, 3])
    assert s.stats().graphs == 2


def test_a_capture_inside_another_is_refused() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 5, backend=backend)
    backend.busy = True
    with pytest.raises(RuntimeError, match="another capture is under way"):
        s(SHAPE, seed=SEEDS)
    backend.busy = False
    check(s, seed=SEEDS)


def test_a_model_on_another_device() -> None:
    s = sampler("loop", "ddim", 5)
    s.model.to("meta")
    with pytest.raises(ValueError, match="the model is on meta, but the samples are on cpu"):
        s(SHAPE, seed=SEEDS, device="cpu")
    s.model = Net()
    check(s, seed=SEEDS)


@pytest.mark.parametrize("wrong", ["Loop", 3, None, "eager"])
def test_modes_that_there_are_not(wrong) -> None:
    with pytest.raises(ValueError, match="graph must be True, False or one of 'auto', 'loop', 'stage', 'device'"):
        pydiff.Sampler(Net(), graph=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_max_graphs_that_there_are_not(wrong) -> None:
    with pytest.raises(ValueError, match="max_graphs must be an integer of at least 1"):
        pydiff.Sampler(Net(), graph=True, max_graphs=wrong)


@pytest.mark.parametrize("graph", [True, "loop", "stage", "device", "auto", False])
def test_without_a_cuda_device_samples_are_the_same(graph, recwarn) -> None:
    s = pydiff.Sampler(Net(), "ddim", 5, graph=graph)
    expected = pydiff.Sampler(Net(), "ddim", 5)(SHAPE, seed=SEEDS)
    for _ in range(2):
        assert torch.equal(s(SHAPE, seed=SEEDS), expected)
    said = [w for w in recwarn if "CUDA graphs need a CUDA device" in str(w.message)]
    assert len(said) == (graph not in ("auto", False))  # nobody asked for a graph there


def test_errors_of_the_call_come_before_any_work() -> None:
    backend = RecordedGraphs()
    s = sampler("loop", "ddim", 5, backend=backend, guidance_scale=2.0)
    for options, message in [
        ({}, "give uncond="),
        ({"uncond": 3}, "uncond must be a mapping"),
        ({"uncond": {}, "seed": [1]}, "seed must be one integer or one for each"),
        ({"uncond": {}, "callback": 3}, "callback must be callable"),
        ({"uncond": {}, "callback": print, "callback_stages": 0}, "callback_stages must be"),
        ({"uncond": {}, "plan": "ddim"}, "plan must be a Plan"),
        ({"uncond": {}, "masks": torch.ones(1)}, "no argument 'masks'; did you mean 'mask'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            s(SHAPE, **options)
    with pytest.raises(ValueError, match="mask must be a tensor that broadcasts"):
        s(
            SHAPE,
            uncond={},
            plan=s.make_plan("ddim", 4, guidance_scale=2.0, known=True),
            mask=torch.ones(7),
            known=torch.zeros(SHAPE),
        )
    assert not backend.graphs
    check(s, seed=SEEDS, uncond={})


def test_an_error_of_the_model_is_raised_and_the_sampler_goes_on() -> None:
    s = sampler("loop", "ddim", 5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        s(SHAPE, seed=SEEDS, cond={"nothing": 1})
    check(s, seed=SEEDS)
    assert s.stats().captures == 1 and not s.stats().refused


# ---------------------------------------------------------------------------- threads


def test_threads_share_a_sampler() -> None:
    s = sampler("loop", "dpmpp_2m_sde", 6, max_graphs=2)
    expected = {(k, seed): eager(s, shape(k), seed=[seed, seed + 1]) for k in range(3) for seed in range(4)}
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        for _ in range(5):
            for k in range(3):
                if not torch.equal(s(shape(k), seed=[seed, seed + 1]), expected[k, seed]):
                    wrong.append((k, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and s.stats().replays == 60
