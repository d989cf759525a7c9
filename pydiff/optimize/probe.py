"""Whether a class that is known by its bare name computes what the class of that name is known to compute.

Forks keep the names of classes and change what is in them. So before such a module is fused, a copy of it on the CPU,
with random weights (fresh models are full of zeros, which hide differences), is called both ways and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from pydiff.optimize.swap import Fused, Rule, swap_in

TOLERANCE = 1e-4  # of the largest output; those of rounding were measured below 4e-6
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]
_answers: dict[Hashable, str | None] = {}


def differs(module: nn.Module, mixin: type[Fused], inputs: Inputs,
            variant: Hashable, prepare: Callable[[Any], None] = lambda module: None) -> str | None:
    """Why a module is not what `mixin` takes it for, or None.

    Args:
        inputs: makes small inputs from a generator.
        variant: what distinguishes this instance from others of its class beyond its widths; asked once for each.
        prepare: the rule's, run on the copy.
    """
    if any(b.is_meta for b in module.buffers()):
        return "its buffers are on the meta device: load them first"
    key = (mixin, variant, tuple((name, type(m)) for name, m in module.named_modules()))
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
