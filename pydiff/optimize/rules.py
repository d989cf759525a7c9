"""Every kind of module that `optimize` knows, by family."""

from __future__ import annotations

from torch import nn

from pydiff.optimize import (
    bundled,
    diffusers_attention,
    diffusers_blocks,
    diffusers_dit,
    diffusers_flux,
    diffusers_mmdit,
    diffusers_transformers,
    diffusers_unets,
    edm,
    guided_diffusion,
    vae,
)
from pydiff.optimize.swap import Rule

FAMILIES = (
    diffusers_blocks,
    diffusers_attention,
    diffusers_unets,
    diffusers_transformers,
    diffusers_dit,
    diffusers_mmdit,
    diffusers_flux,
    vae,
    bundled,
    guided_diffusion,
    edm,
)


_BY_NAME: dict[str, Rule] = {name: rule for family in FAMILIES for rule in family.RULES for name in rule.names}


def find(module: nn.Module) -> Rule | None:
    """The rule for a module's very class (not its subclasses, which may compute something else)."""
    cls = type(module)
    by_name = _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    return by_name or (None if cls.__module__.startswith("torch.") else _BY_NAME.get(cls.__name__))
