"""Whether a class that is known by its bare name computes what the class of that name is known to compute.

Forks keep the names of classes and change what is in them. So before such a module is fused, a copy of it on the CPU,
with random weights (fresh models are full of zeros, which hide differences), is called both ways and compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pydiff.optimize.swap import Fused, Rule, swap_in

# Of the largest output. One block's float32 rounding (6e-8 a term) stays far below; another formula does not.
TOLERANCE = 1e-4
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]
_answers: dict[Hashable, str | None] = {}


def differs(
    module: nn.Module,
    mixin: type[Fused],
    inputs: Inputs,
    variant: Hashable,
    prepare: Callable[[Any], None] = lambda module: None,
) -> str | None:
    """Why a module is not what `mixin` takes it for, or None.

    Args:
        inputs: makes small inputs from a generator.
        variant: what distinguishes this instance from others of its class beyond its widths and the bools, floats and
            strings among its attributes; asked once for each.
        prepare: the rule's, run on the copy.
    """
    if any(b.is_meta for b in module.buffers()):
        return "its buffers are on the meta device: load them first"
    own = tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, float, str)))
    key = (mixin, variant, own, tuple((name, type(m)) for name, m in module.named_modules()))
    if key not in _answers:
        try:
            _answers[key] = _compare(module, mixin, inputs, prepare)
        except Exception as error:  # anything may be wrong with a class that only shares the name
            return f"its fused form could not be tried ({type(error).__name__}: {error})"
    return _answers[key]


@torch.no_grad()
def _compare(module: nn.Module, mixin: type[Fused], inputs: Inputs, prepare: Callable[[Any], None]) -> str | None:
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        twin = random_twin(module, generator)
        arguments = tuple(a.float() for a in inputs(generator))
        expected = twin(*arguments)
        swap_in(twin, Rule((), mixin, ""))
        prepare(twin)
        got = twin(*arguments)
    if not isinstance(expected, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return "its output is not of the known kind"
    if not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
        return "it computes something else than the class known by its name"
    return None


# The same of a whole model, in whatever precision it has: bfloat16 rounds by 0.004, and errors add up over its layers.
ROOT_TOLERANCE = 0.03
SIZES = (8, 16, 32, 64)


@torch.no_grad()
def root_differs(model: Any, inputs: Callable[[int], tuple[Any, ...]]) -> str | None:
    """Why a whole model, its blocks fused already, is not what its fused class takes it for, or None.

    It is called both ways as it is, with its own weights, on the smallest image that it takes: a twin of a large model
    would take too long. Nothing is called where the weights are on the meta device.

    Args:
        inputs: the positional arguments for images of a size, made on the model's device.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    with _quiet(model), torch.random.fork_rng():
        for size in SIZES:
            arguments = inputs(size)
            try:
                expected = model._original.forward(model, *arguments)
            except Exception:  # too small, for one thing
                continue
            got = type(model).forward(model, *arguments)
            if got.shape == expected.shape and got.dtype == expected.dtype:
                if (got - expected).abs().max() <= ROOT_TOLERANCE * expected.abs().max():
                    return None
            return "its forward computes something else than that of the class known by its name"
    return f"it could not be tried on images of {SIZES[0]} to {SIZES[-1]} pixels"


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Out of training mode and without hooks, for a while."""
    before = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    try:
        for module, *_ in before:
            module.training = False
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, training, hooks, pre_hooks in before:
            module.training, module._forward_hooks, module._forward_pre_hooks = training, hooks, pre_hooks


def random_twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU in float32, with random weights and none of the hooks."""
    twin = copy.deepcopy(module).float().eval()
    twin = twin.to_empty(device="cpu") if any(p.is_meta for p in twin.parameters()) else twin.cpu()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    for p in twin.parameters():
        if p.is_floating_point():
            fan_in = max(p[0].numel(), 1) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, device="cpu") * fan_in**-0.5)
    return twin
