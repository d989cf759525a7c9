"""Bad input: each error names the argument, what was given and what to do, and nothing is half done."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import pydiff
from pydiff.schedules.closed_form import named_betas

DISCRETE = pydiff.DiscreteBetas(named_betas("linear", 50))
PLAN = pydiff.make_plan("dpmpp_2m", steps=3)
RANDOM = pydiff.make_plan("euler_ancestral", steps=3)
GUIDED = pydiff.make_plan("ddim", steps=3, guidance_scale=2.0)
KNOWN = pydiff.make_plan("ddim", steps=3, known=True)
X = torch.ones(2, 3)
CALLS: Counter[str] = Counter()


def toy(x, t, **cond):
    CALLS["model"] += 1
    return 0.5 * x


def make(solver="ddim", schedule=None, steps=None, **options):
    return lambda: pydiff.make_plan(solver, schedule, steps, **options)


def run(plan=PLAN, model=toy, x=X, **options):
    return lambda: pydiff.run_plan(plan, model, x, **options)


def draw(shape=(2, 3), model=toy, **options):
    return lambda: pydiff.sample(model, shape, **{"steps": 3, **options})


def returning(value):
    def model(x, t):
        CALLS["model"] += 1
        return value(x) if callable(value) else value

    return run(model=model)


class Subclass(torch.Tensor):
    pass


COMPILING = {
    "unknown solver": (
        make("dpmp_2m", steps=5),
        ValueError,
        ("solver", "'dpmp_2m'", "did you mean 'dpmpp_2m'", "known: "),
    ),
    "nothing like a solver": (make("zzz", steps=5), ValueError, ("solver", "'zzz'", "known:")),
    "solver no name": (make(3, steps=5), ValueError, ("solver", "3", "known:")),
    "unknown grid": (make(steps=5, grid="karas"), ValueError, ("grid", "'karas'", "did you mean 'karras'")),
    "unknown prediction": (make(steps=5, prediction="eps"), ValueError, ("prediction", "'eps'", "epsilon")),
    "schedule": (make(schedule="linear", steps=5), TypeError, ("schedule", "'linear'", "pydiff.VPLinear()")),
    "no steps": (make(), TypeError, ("steps is missing", "steps=20")),
    "zero steps": (make(steps=0), ValueError, ("steps", "0", ">= 1")),
    "negative steps": (make(steps=-3), ValueError, ("steps", "-3", ">= 1")),
    "fractional steps": (make(steps=2.5), ValueError, ("steps", "2.5", "integer")),
    "more than trained": (
        make(schedule=DISCRETE, steps=51),
        ValueError,
        ("steps = 51", "50 training timesteps", "fewer"),
    ),
    "index grid": (make(steps=5, grid="trailing"), ValueError, ("'trailing'", "DiscreteBetas", "use 'uniform'")),
    "unknown option": (make(steps=5, etaa=1.0), TypeError, ("ddim", "'etaa'", "did you mean 'eta'")),
    "options in a mapping": (make(steps=5, options={}), TypeError, ("'options'", "did you mean 'grid_options'")),
    "no options": (make("dpm_solver_1", steps=5, order=2), TypeError, ("dpm_solver_1", "'order'", "its options: none")),
    "option out of range": (make(steps=5, eta=2.0), ValueError, ("eta", "2.0", "[0, 1]")),
    "option unknown value": (make("unipc", steps=5, variant="bh3"), ValueError, ("variant", "'bh3'", "'bh1' or 'bh2'")),
    "order": (make("unipc", steps=5, order=4), ValueError, ("order", "4", "1, 2 or 3")),
    "increasing times": (make(times=[0.1, 0.5, 1.0]), ValueError, ("times[0]", "times[1]", "strictly decreasing")),
    "equal times": (make(times=[1.0, 0.5, 0.5]), ValueError, ("times[1] = ", "times[2] = ", "do not decrease")),
    "nan time": (make(times=[1.0, math.nan, 0.1]), ValueError, ("times[1] = nan", "finite")),
    "time out of range": (make(times=[1.5, 0.5]), ValueError, ("times[0] = 1.5", "[0, 1]")),
    "one time": (make(times=[1.0]), ValueError, ("times", "(1,)", "steps + 1")),
    "times of rank 2": (make(times=np.ones((2, 2))), ValueError, ("times", "(2, 2)", "vector")),
    "infinite sigma": (make(schedule=pydiff.EDM(), sigmas=[math.inf, 1.0]), ValueError, ("sigmas[0] = inf", "finite")),
    "negative sigma": (make(schedule=pydiff.EDM(), sigmas=[1.0, -1.0]), ValueError, ("sigmas[1] = -1", "[0, inf]")),
    "times and sigmas": (make(times=[1.0, 0.5], sigmas=[1.0, 0.5]), ValueError, ("exactly one of times and sigmas",)),
    "times and steps": (make(steps=7, times=[1.0, 0.5]), TypeError, ("steps", "explicit times")),
    "times and grid": (make(grid="karras", times=[1.0, 0.5]), TypeError, ("grid", "explicit times")),
    "sigmas and start": (make(t_start=0.9, sigmas=[1.0, 0.5]), TypeError, ("t_start", "explicit times or sigmas")),
    "start below end": (make(steps=3, t_start=0.1, t_end=0.5), ValueError, ("t_start = 0.1", "t_end = 0.5")),
    "start outside": (make(steps=3, t_start=2.0), ValueError, ("t_start = 2.0", "[0, 1]")),
    "ending": (make(steps=3, final_sigmas_type="none"), ValueError, ("final_sigmas_type", "'none'", "'zero'")),
    "guidance length": (make(steps=3, guidance_scale=[1, 2]), ValueError, ("guidance_scale", "3 model calls", "(2,)")),
    "guidance shape": (
        make(steps=3, guidance_scale=[[1, 2, 3]]),
        ValueError,
        ("guidance_scale", "3 model calls", "(1, 3)"),
    ),
    "one guidance nan": (make(steps=2, guidance_scale=[1, math.nan]), ValueError, ("guidance_scale", "finite", "nan")),
    "guidance nan": (make(steps=3, guidance_scale=math.nan), ValueError, ("guidance_scale", "finite", "nan")),
    "clip order": (make(steps=3, clip=(1, -1)), ValueError, ("clip", "(1, -1)", "low < high")),
    "clip zero": (make(steps=3, clip=0.0), ValueError, ("clip", "0.0", "positive")),
    "clip epsilon": (make("dpm_solver_2", steps=3, clip=1.0), ValueError, ("clip", "dpm_solver_2", "'ddim'")),
    "pure noise": (
        make(schedule=pydiff.RectifiedFlow(), steps=3),
        ValueError,
        ("epsilon", "alpha = 0", "v_prediction"),
    ),
}

RUNNING = {
    "x no tensor": (run(x=[1.0]), TypeError, ("x must be", "floating-point tensor", "[1.0]")),
    "x integers": (run(x=torch.ones(2, 3, dtype=torch.int64)), TypeError, ("x must be", "floating-point")),
    "x without rows": (run(x=torch.tensor(1.0)), TypeError, ("x must be", "[batch, *sample]")),
    "init x no tensor": (lambda: pydiff.init(PLAN, [1.0]), TypeError, ("x must be", "floating-point tensor", "[1.0]")),
    "plan name": (run(plan="ddim"), ValueError, ("plan", "pydiff.make_plan", "ddim")),
    "plan number": (run(plan=5), ValueError, ("plan", "pydiff.make_plan", "5")),
    "plans": (run(plan=[PLAN]), ValueError, ("plan", "one for each of the 2 rows")),
    "a plan and a name": (run(plan=[PLAN, "ddim"]), ValueError, ("plan", "one for each of the 2 rows", "'ddim'")),
    "dtype": (run(dtype=torch.float16), ValueError, ("dtype", "torch.float32 or torch.float64", "torch.float16")),
    "model dtype": (run(model_dtype=torch.int32), ValueError, ("model_dtype", "torch.bfloat16", "torch.int32")),
    "copies": (lambda: pydiff.init(PLAN, X, copies=3), ValueError, ("copies", "1 or 2", "3")),
    "too few seeds": (run(seed=[1]), ValueError, ("seed", "each of the 2 rows", "got 1")),
    "too many seeds": (draw(seed=[1, 2, 3]), ValueError, ("seed", "each of the 2 rows", "got 3")),
    "fractional seed": (run(seed=1.5), TypeError, ("seed", "integer", "1.5")),
    "x, with a generator": (
        run(RANDOM, x=[[1.0]], generator=torch.Generator()),
        TypeError,
        ("x must be", "tensor", "[[1.0]]"),
    ),
    "a truth for a seed": (run(seed=True), TypeError, ("seed", "integer", "True")),
    "fractional seeds": (run(seed=[1.5, 2]), TypeError, ("seed", "integer", "[1.5, 2]")),
    "seed as text": (draw(seed="12"), TypeError, ("seed", "integer", "'12'")),
    "seed too large": (run(seed=2**64), ValueError, ("seed", "64 bits", str(2**64))),
    "seed and noise": (
        run(RANDOM, seed=1, noise=torch.ones(2, 2, 3)),
        TypeError,
        ("at most one of seed, noise and generator",),
    ),
    "noise and generator": (
        run(RANDOM, noise=torch.ones(2, 2, 3), generator=torch.Generator()),
        TypeError,
        ("at most one of seed, noise and generator",),
    ),
    "seed and generator to run": (
        run(RANDOM, seed=1, generator=torch.Generator()),
        TypeError,
        ("at most one of seed, noise and generator",),
    ),
    "seed and generator": (draw(seed=1, generator=torch.Generator()), TypeError, ("seed or generator",)),
    "generators": (run(RANDOM, generator=[torch.Generator()]), ValueError, ("generator", "each of the 2 rows")),
    "a generator and a number": (
        run(RANDOM, generator=[torch.Generator(), 7]),
        ValueError,
        ("generator", "each of the 2 rows", ", 7]"),
    ),
    "no generator": (run(RANDOM, generator=7), ValueError, ("generator", "torch.Generator", "7")),
    "noise shape": (run(RANDOM, noise=torch.ones(3, 2, 4)), ValueError, ("noise", "[3, 2, 3]", "[3, 2, 4]")),
    "too little noise": (run(RANDOM, noise=torch.ones(1, 2, 3)), ValueError, ("noise", "[3, 2, 3]", "[1, 2, 3]")),
    "noise type": (run(RANDOM, noise=3), TypeError, ("noise", "tensor or a function", "int")),
    "noise for two plans": (run([PLAN, RANDOM], noise=torch.ones(2, 2, 3)), ValueError, ("noise=", "use seeds")),
    "callback": (run(callback=3), TypeError, ("callback", "callable with a StageInfo", "int")),
    "no uncond": (run(GUIDED, cond={"y": X}), TypeError, ("guidance_scale", "give uncond=")),
    "cond type": (run(cond=X), TypeError, ("cond", "mapping", "Tensor")),
    "cond names": (run(GUIDED, cond={"y": X}, uncond={"z": X}), ValueError, ("cond and uncond", "same names", "y, z")),
    "cond rows": (
        run(GUIDED, cond={"y": X}, uncond={"y": torch.ones(5)}),
        ValueError,
        ("uncond['y']", "1 or 2 rows", "[5]"),
    ),
    "mask alone": (run(KNOWN, mask=X), ValueError, ("mask and known", "together")),
    "mask uncompiled": (run(mask=X, known=X), ValueError, ("mask", "known=True")),
    "mask uncompiled for a row": (run([KNOWN, PLAN], mask=X, known=X), ValueError, ("mask", "known=True")),
    "mask shape": (run(KNOWN, mask=torch.ones(4), known=X), ValueError, ("mask", "broadcasts to", "[2, 3]", "[4]")),
    "known type": (run(KNOWN, mask=X, known=1.0), ValueError, ("known", "tensor", "float")),
    "model": (draw(model="unet"), TypeError, ("model", "callable", "str")),
    "shape of text": (draw(("2", 3)), ValueError, ("shape", "('2', 3)")),
    "shape a number": (draw(16), ValueError, ("shape", "[batch, *sample]", "16")),
    "negative shape": (draw((2, -3)), ValueError, ("shape", "(2, -3)", "at least 0")),
    "empty shape": (draw(()), ValueError, ("shape", "()")),
    "x0 shape": (draw(x0=torch.ones(2, 4)), ValueError, ("x0", "[2, 3]", "[2, 4]")),
    "x0 type": (draw(x0=[1.0]), ValueError, ("x0", "tensor", "list")),
    "x0 and x": (draw(X, x0=X), TypeError, ("x0", "x_T")),
    "misspelt option": (draw(calback=print), TypeError, ("'calback'",)),
    "steps and times": (draw(steps=3, times=[1.0, 0.5]), TypeError, ("steps", "explicit times")),
}

RETURNING = {
    "other shape": (returning(lambda x: x[:, :2]), ValueError, ("model returned shape [2, 2]", "expected [2, 3]")),
    "no batch": (returning(lambda x: x[0]), ValueError, ("model returned shape [3]", "expected [2, 3]")),
    "a tuple": (returning(lambda x: (x,)), TypeError, ("model returned tuple", "wrap it", ".sample")),
    "none": (returning(None), TypeError, ("model returned NoneType", "expected a tensor")),
    "integers": (returning(lambda x: x.long()), TypeError, ("model returned torch.int64", "torch.float32")),
    "another device": (returning(lambda x: x.to("meta")), ValueError, ("meta", "cpu")),
    "nan": (
        returning(lambda x: x * math.nan),
        pydiff.NonFiniteError,
        ("NaN", "stage 0", "row 0 and 1 more", "try bf16"),
    ),
}


def check(case) -> None:
    call, kind, words = case
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("name", COMPILING)
def test_compiling(name) -> None:
    check(COMPILING[name])


@pytest.mark.parametrize("name", RUNNING)
def test_running(name) -> None:
    CALLS.clear()
    check(RUNNING[name])
    assert not CALLS and torch.equal(X, torch.ones(2, 3))  # refused before any work, and the input is as it was


@pytest.mark.parametrize("name", RETURNING)
def test_what_the_model_returns(name) -> None:
    CALLS.clear()
    check(RETURNING[name])
    assert CALLS == {"model": 1} and torch.equal(X, torch.ones(2, 3))


@pytest.mark.parametrize("name", [n for n in RETURNING if n != "nan"])
@pytest.mark.parametrize("plan", [PLAN, RANDOM, GUIDED], ids=repr)
def test_a_refused_output_leaves_the_state_as_it_was(name, plan) -> None:
    outputs = {
        "other shape": lambda x: x[:, :2],
        "no batch": lambda x: x[0],
        "a tuple": lambda x: (x,),
        "none": lambda x: None,
        "integers": lambda x: x.long(),
        "another device": lambda x: x.to("meta"),
    }
    state = pydiff.init(plan, X, seed=1, copies=2)
    pydiff.step(state, 0.5 * state.model_input)
    before = state.state_dict()
    with pytest.raises((TypeError, ValueError)):
        pydiff.step(state, outputs[name](state.model_input))
    after = state.state_dict()
    assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])
    assert (before["stages_done"], before["total"]) == (after["stages_done"], after["total"]) == (1, 3)
    pydiff.step(state, 0.5 * state.model_input)
    assert not torch.equal(state.state_dict()["tensors"]["registers"], before["tensors"]["registers"])


def test_good_input_is_accepted() -> None:
    """The same calls without their mistake, so that an error above is due to the mistake."""
    for call in (
        make(steps=5),
        make(times=[1.0, 0.5, 0.1]),
        make(schedule=DISCRETE, steps=50),
        make(steps=3, clip=1.0),
        run(),
        run(RANDOM, seed=[1, 2]),
        run(RANDOM, noise=torch.ones(3, 2, 3)),
        run([PLAN, RANDOM], seed=1),
        run(GUIDED, cond={"y": X}, uncond={"y": X}),
        run(KNOWN, mask=X, known=X),
        draw(x0=X),
        draw(X),
        draw(generator=torch.Generator()),
        returning(lambda x: x[:, :3]),
    ):
        call()


def test_a_tensor_subclass_is_a_tensor() -> None:
    subclassed = returning(lambda x: (0.5 * x).as_subclass(Subclass))()
    assert torch.equal(subclassed, run()()) and type(subclassed) is torch.Tensor


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_weights_file(size, tmp_path) -> None:
    from pydiff.models.loader import save_model
    from pydiff.models.unet import UNet

    path = tmp_path / "weights.safetensors"
    save_model(UNet(channels=(32,), blocks=(1,), attention=(False,), embedding_dim=32), path)
    pydiff.load_model(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or corrupt") as error:
        pydiff.load_model(path)
    assert str(path) in str(error.value) and "write it again" in str(error.value)


def test_a_model_without_a_name(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'mnits'.*did you mean 'mnist'"):
        pydiff.load_model("mnits")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        pydiff.load_model(tmp_path / "none.safetensors")
