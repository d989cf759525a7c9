"""What people try first: numpy's numbers and arrays, names from other libraries, diffusers' objects as they are."""

from __future__ import annotations

import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import pydiff
from pydiff.cli import main
from pydiff.run.options import InitOptions, RunOptions

SHAPE = (2, 3, 4, 4)
PLAN = pydiff.make_plan("ddim", steps=3)


def model(x, t, labels=None):
    shift = 0.0 if labels is None else labels.to(x.dtype).reshape(-1, 1, 1, 1)
    return 0.5 * x + 0.1 * shift


def sampler(**options) -> pydiff.Sampler:
    return pydiff.Sampler(model, "dpmpp_2m", 4, **options)


# numpy


def test_numpy_integers_serve_as_integers(tmp_path) -> None:
    expected = sampler()(SHAPE, seed=3)
    shape = np.array(SHAPE)
    for given in (tuple(shape), list(shape), shape):
        assert torch.equal(sampler()(given, seed=np.int64(3)), expected)
    assert torch.equal(sampler()(SHAPE, seed=np.array([3, 4])), expected)
    plan = pydiff.make_plan("unipc", steps=np.int32(4), order=np.int64(2), clip=np.float32(1.0))
    assert plan == pydiff.make_plan("unipc", steps=4, order=2, clip=1.0)
    plan.save(tmp_path / "plan.json")  # JSON knows no numpy
    assert pydiff.Plan.load(tmp_path / "plan.json").config["options"] == {"order": 2}
    seen: list[int] = []
    for stages in (np.int64(2), np.array([1, 3]), [np.int64(1), 3]):
        sampler()(SHAPE, seed=0, callback=lambda info: seen.append(info.stage), callback_stages=stages)
    assert seen == [1, 3] * 3
    assert torch.equal(sampler()(SHAPE, seed=3, guidance_scale=np.float32(1.0)), expected)


@pytest.mark.parametrize("shape", [(2.0, 3), (True, 3), "12", (), np.array([1.5, 2.0]), 4, (-1, 3)])
def test_what_is_no_shape_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"shape must be \[batch, \*sample\], integers"):
        sampler()(shape)


@pytest.mark.parametrize("guided", [False, True])
def test_numpy_arrays_in_conditions_are_tensors(guided) -> None:
    labels = np.array([1, 5])
    options = {"guidance_scale": 2.0} if guided else {}
    uncond = {"labels": np.array([0, 0])} if guided else None
    got = sampler(**options)(SHAPE, seed=0, cond={"labels": labels}, uncond=uncond)
    tensors = {"uncond": {"labels": torch.zeros(2, dtype=torch.int64)}} if guided else {}
    expected = sampler(**options)(SHAPE, seed=0, cond={"labels": torch.as_tensor(labels)}, **tensors)
    assert torch.equal(got, expected)
    assert not torch.equal(got, sampler(**options)(SHAPE, seed=0, cond={"labels": torch.tensor([1, 4])}, **tensors))


def test_numpy_arrays_get_the_dtype_of_the_models_input() -> None:
    seen = {}

    def watching(x, t, **cond):
        seen.update(cond)
        return x

    cond = {"text": [np.ones((2, 3))], "ids": {"k": np.array([1, 2], np.int32)}, "mask": np.array([True, False])}
    pydiff.run_plan(PLAN, watching, torch.ones(SHAPE), cond=cond, model_dtype=torch.bfloat16)
    assert (seen["text"][0].dtype, seen["ids"]["k"].dtype, seen["mask"].dtype) == (
        torch.bfloat16,
        torch.int32,
        torch.bool,
    )
    with pytest.raises(TypeError, match="cond holds a numpy array of <U1"):
        pydiff.run_plan(PLAN, watching, torch.ones(SHAPE), cond={"text": np.array(["a", "b"])})


# names


WRONG = {
    "sample": (lambda **o: pydiff.sample(model, SHAPE, **o), {"guidance": 2.0}, "guidance_scale"),
    "Sampler": (lambda **o: pydiff.Sampler(model, **o), {"guidance": 2.0}, "guidance_scale"),
    "make_plan": (lambda **o: pydiff.make_plan("ddim", **o), {"num_inference_steps": 5, "steps": 5}, "steps"),
    "call": (lambda **o: sampler()(SHAPE, **o), {"cfg": 2.0}, "guidance_scale"),
    "run_plan": (lambda **o: pydiff.run_plan(PLAN, model, torch.ones(SHAPE), **o), {"seeds": [1, 2]}, "seed"),
    "init": (lambda **o: pydiff.init(PLAN, torch.ones(SHAPE), **o), {"masks": 1}, "mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_is_not_ours_gets_a_suggestion(name) -> None:
    call, options, meant = WRONG[name]
    with pytest.raises(TypeError, match=f"no (argument|option) '{next(iter(options))}'; did you mean '{meant}'"):
        call(**options)


def test_signatures_name_every_argument() -> None:
    for function, options in ((pydiff.run_plan, RunOptions), (pydiff.init, InitOptions)):
        parameters = inspect.signature(function).parameters
        assert set(options.__dataclass_fields__) < set(parameters) and "options" not in parameters
        assert parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY
        for word in options.__dataclass_fields__:
            assert re.search(rf"\b{word}\b", function.__doc__), word  # which help() shows
    x = torch.ones(SHAPE)
    assert torch.equal(pydiff.run_plan(PLAN, model, x), pydiff.run_plan(x=x, model=model, plan=PLAN))


def test_old_names_serve_for_one_more_release() -> None:
    seen: list[int] = []
    with pytest.warns(DeprecationWarning, match="callback_steps is called callback_stages now") as caught:
        sampler()(SHAPE, seed=0, callback=lambda info: seen.append(info.stage), callback_steps=2)
    assert seen == [1, 3] and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="callback_steps"):
        pydiff.sample(model, SHAPE, steps=4, callback=lambda info: seen.append(info.stage), callback_steps=4)
    assert seen == [1, 3, 3]
    state = pydiff.init(PLAN, torch.ones(SHAPE))
    with pytest.warns(DeprecationWarning, match="stages_done"):
        assert state.steps_done == state.stages_done == 0


# models


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(self.scale * x)


def test_a_module_in_training_mode_is_told_once() -> None:
    net = Dropping()
    made = pydiff.Sampler(net, "ddim", 2)
    with pytest.warns(UserWarning, match="Dropping is in training mode.*model.eval()") as caught:
        made(SHAPE, seed=0)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(SHAPE, seed=0)
        pydiff.run_plan(PLAN, net, torch.ones(SHAPE))
        pydiff.sample(Dropping().eval(), SHAPE, steps=2)
    with pytest.warns(UserWarning, match="training mode"):
        pydiff.run_plan(PLAN, Dropping(), torch.ones(SHAPE))


def lines_of(message: str) -> str:
    """The lines of code in a message, which say what would have been right."""
    return "\n".join(line.strip() for line in message.splitlines() if line.startswith("    "))


@pytest.fixture(scope="module")
def pipe():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


def test_a_diffusers_model_needs_its_schedule_and_the_message_says_how(pipe) -> None:
    with pytest.raises(TypeError, match="diffusers' UNet2DModel.*scheduler's config") as error:
        pydiff.sample(pipe.unet, (2, 3, 8, 8))
    there = {"pipe": pipe, "model": pipe.unet, "pydiff": pydiff}
    exec(lines_of(str(error.value)), there)
    assert there["sampler"].schedule == pydiff.DiscreteBetas.named("squaredcos_cap_v2")
    assert len(there["sampler"].plan) == 20 and there["sampler"]((2, 3, 8, 8), seed=0).isfinite().all()
    pydiff.Sampler(pipe.unet, schedule=pydiff.VPLinear())  # said outright
    assert pydiff.check_capturable(pipe.unet, (1, 3, 8, 8))  # for which it does not matter


def test_a_pipeline_is_no_model(pipe) -> None:
    for call in (lambda: pydiff.sample(pipe, (2, 3, 8, 8)), lambda: pydiff.run_plan(PLAN, pipe, torch.ones(SHAPE))):
        with pytest.raises(TypeError, match=r"model is a pipeline \(DDPMPipeline\)") as error:
            call()
    there = {"pipe": pipe, "pydiff": pydiff}
    exec(lines_of(str(error.value)), there)
    assert there["sampler"].model is pipe.unet


def test_a_model_may_have_the_parts_of_a_pipeline() -> None:
    """What is called is a model: a wrapper around a network in `unet`, and a module that keeps its scheduler too."""

    class Wrapper:
        unet = staticmethod(model)

        def __call__(self, x, t):
            return self.unet(x, t)

    class Module(nn.Module):
        unet, scheduler = Wrapper(), object()

        def forward(self, x, t):
            return model(x, t)

    expected = pydiff.run_plan(PLAN, model, torch.ones(SHAPE))
    for one in (Wrapper(), Module().eval()):
        assert torch.equal(pydiff.run_plan(PLAN, one, torch.ones(SHAPE)), expected)


def test_a_scheduler_is_no_schedule(pipe) -> None:
    with pytest.raises(TypeError, match=r"DDPMScheduler.*pydiff.from_diffusers_config\(scheduler\)"):
        pydiff.Sampler(model, schedule=pipe.scheduler)
    with pytest.raises(TypeError, match="give a scheduler or its config, got str"):
        pydiff.from_diffusers_config("DDPMScheduler")
    config = {**pipe.scheduler.config, "_class_name": "DDPMScheduler"}
    assert pydiff.from_diffusers_config(pipe.scheduler) == pydiff.from_diffusers_config(config)


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="t_end is given twice"):
        pydiff.make_plan("ddim", steps=4, t_end=0.1, grid_options={"t_end": 0.2})


def test_an_error_in_a_solver_keeps_its_traceback(monkeypatch) -> None:
    from pydiff.solvers import registry

    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))

    @registry.solver("broken", order=1, calls="1", paper="none")
    def broken(b):
        """Fails."""
        return None + 1

    with pytest.raises(TypeError, match="NoneType") as error:
        pydiff.make_plan("broken", steps=3)
    assert error.traceback[-1].name == "broken"
    with pytest.raises(TypeError, match="NoneType"):  # no line about an argument: it is the solver that is wrong
        main.main(["plan", "broken"])
