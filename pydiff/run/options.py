"""What may be said of a run, written once: the keyword arguments of `init`, `run_plan` and the call of a `Sampler`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from pydiff.plans.plan import Plan
from pydiff.run.noise_source import Noise
from pydiff.run.warning import warn
from pydiff.schedules.suggestion import unknown_argument
from pydiff.solvers.compiler import GuidanceScale

Seed = int | Sequence[int] | torch.Tensor
R = TypeVar("R")


class StageInfo(NamedTuple):
    """What a callback is told after a stage (one model call).

    Example:
        def watch(info):
            print(f"{info.stage + 1} of {info.total}, time {info.time:.3f}, {info.x.std():.2f}")
            return info.stage == 3  # true: stop there

        model = pydiff.load_model("mnist")
        x = pydiff.sample(model, (1, 1, 28, 28), steps=6, seed=0, callback=watch)
    """

    stage: int
    """The stage just done, from 0."""
    total: int
    """Stages of the whole run (in a batch of several plans: of the longest of them)."""
    time: float
    """The time the model was called with (in a batch of several plans: in the longest of them)."""
    x: torch.Tensor
    """[B, *sample], the sample after the stage: a view that the next stage overwrites, clone it to keep it."""
    model_output: torch.Tensor
    """[copies * B, *sample], what the model returned; with guidance its rows are [unconditional; conditional]."""


Callback = Callable[[StageInfo], Any]


@dataclass(eq=False)
class StateOptions:
    """What a state begins with, beside the plan and x."""

    seed: Seed | None = None
    """Of the noise that a stochastic plan adds: an integer s (row k takes s + k) or one for each row; None: random."""
    noise: Noise | None = None
    """The caller's noise in its place: [plan.num_draws, *x.shape], or a function of the draw number that returns a
    tensor like x. For one plan only."""
    dtype: torch.dtype | None = None
    """float32 (the default) or float64, of the sample, the history and the coefficients."""
    model_dtype: torch.dtype | None = None
    """Of the model's input: float32, bfloat16, float16 or float64; `dtype` by default."""
    mask: torch.Tensor | None = None
    """1 where `known` stands and 0 where the sample does, between them a blend; broadcasts to x. With `known` only."""
    known: torch.Tensor | None = None
    """The clean sample that stands where `mask` is 1 (inpainting), noised to the level of x after each stage;
    broadcasts to x. The plan needs ``known=True``."""
    constant: torch.Tensor | None = None
    """The tensor that a plan's operand "constant" stands for; broadcasts to x."""
    extra: torch.Tensor | None = None
    """The tensor that a plan's operand "extra" stands for; broadcasts to x."""

    def operands(self) -> dict[str, torch.Tensor | None]:
        """The caller's tensors that stages may read, by name."""
        return {"mask": self.mask, "known": self.known, "constant": self.constant, "extra": self.extra}


@dataclass(eq=False)
class InitOptions(StateOptions):
    """The keyword arguments of `pydiff.init`."""

    copies: int | None = None
    """How many rows of the model's input each row of the batch has: 2 for classifier-free guidance, when the model runs
    on [unconditional; conditional] rows. By default 2 where a plan is guided, and 1 elsewhere; with 1 the guidance
    scale of a plan has no effect."""


@dataclass(eq=False)
class RunOptions(StateOptions):
    """The keyword arguments of `pydiff.run_plan`."""

    generator: torch.Generator | Sequence[torch.Generator] | None = None
    """torch's own generator, or one for each row, in place of seeds. At most one of seed, noise and generator."""
    cond: Mapping[str, Any] | None = None
    """Keyword arguments of the model; tensors [B, ...], numpy arrays become tensors."""
    uncond: Mapping[str, Any] | None = None
    """The same for the unconditional call, needed where the plan's guidance scale is not 1."""
    callback: Callback | None = None
    """Called with a `StageInfo` after each stage; a true return value ends the run there."""
    callback_stages: int | Collection[int] = 1
    """n to call it after every n-th stage and the last, or the numbers of the stages, from 0."""
    progress: bool = False
    """Show a progress bar."""
    return_trajectory: bool = False
    """Return (x, trajectory), trajectory [stages + 1, B, *sample]."""
    check_finite: bool = True
    """Raise `NonFiniteError` if the model returns NaN or infinity: at once on the CPU, at the end elsewhere, so that
    nothing waits for the device inside the loop."""
    hoist: bool = True
    """Compute before the loop what depends on the times and the condition alone, where `pydiff.optimize` has made that
    possible for the model. The same samples, up to the rounding of matrix products."""


@dataclass(eq=False)
class CallOptions(RunOptions):
    """The keyword arguments of a `Sampler`'s call."""

    x0: torch.Tensor | None = None
    """[B, *sample] or broadcastable: start from this clean sample, noised to the plan's first time (compile with
    t_start=)."""
    guidance_scale: GuidanceScale | None = None
    """In place of the compiled one: a number, one for each model call, or a function of the model's time."""
    plan: Plan | Sequence[Plan] | None = None
    """In place of the compiled one (see `Sampler.make_plan`), or one for each row."""
    device: torch.device | str | None = None
    """Where to sample, for a shape; the model's device by default."""


RENAMED = {"callback_steps": "callback_stages"}
"""Arguments that had another name, which serves for one more release."""


def takes(options: type) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function whose last parameter is `options` the fields of that class as keyword arguments in its place.

    The function made raises TypeError for a keyword that is no such field, with a suggestion.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        own = list(inspect.signature(function).parameters.values())[:-1]
        names = [parameter.name for parameter in own]

        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> R:
            mine = {name: given.pop(name) for name in names if name in given}
            if not given.keys() <= fields.keys():
                for old in given.keys() - fields.keys():
                    given[_renamed(function, old, fields)] = given.pop(old)
            return function(*args, **mine, options=options(**given))

        keywords = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields.values()
        ]
        wrapper.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _renamed(function: Callable[..., Any], name: str, fields: Mapping[str, Any]) -> str:
    """The present name of an argument, with a warning; TypeError for one that there never was."""
    if RENAMED.get(name) not in fields:
        raise TypeError(unknown_argument(function.__qualname__, name, fields))
    warn_renamed(name, RENAMED[name])
    return RENAMED[name]


def warn_renamed(old: str, new: str) -> None:
    """Say that a name has changed."""
    warn(f"{old} is called {new} now; the old name goes with the next release", DeprecationWarning)
