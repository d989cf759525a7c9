"""Every kind of module that `optimize` knows, by family."""

from __future__ import annotations

from torch import nn

from pydiff.optimize import bundled, edm, guided_diffusion, vae
from pydiff.optimize.diffusers import attention, blocks, dit, flux, mmdit, transformers, unets
from pydiff.optimize.swap import Rule

FAMILIES = (blocks, attention, unets, transformers, dit, mmdit, flux, vae, bundled, guided_diffusion, edm)


_BY_NAME: dict[str, Rule] = {name: rule for family in FAMILIES for rule in family.RULES for name in rule.names}


def find(module: nn.Module) -> Rule | None:
    """The rule for a module's very class (not its subclasses, which may compute something else)."""
    cls = type(module)
    by_name = _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    return by_name or (None if cls.__module__.startswith("torch.") else _BY_NAME.get(cls.__name__))
