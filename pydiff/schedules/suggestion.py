"""What to suggest for a name that is not known: a near one, or what other libraries call it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_steps": "steps",
    "num_inference_steps": "steps",
    "sampler": "solver",
    "scheduler": "schedule",
    "noise_schedule": "schedule",
    "prediction_type": "prediction",
    "negative_cond": "uncond",
    "condition": "cond",
}
"""Names that users of other samplers type, with the one that is meant here."""


def suggestion(name: object, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing where no known name is near."""
    names = {other.lower(): other for other in known}
    meant = SYNONYMS.get(str(name), "")
    close = [meant] if meant in names else difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def unknown_argument(owner: str, name: str, accepted: Iterable[str]) -> str:
    """The message for a keyword argument that a function does not have."""
    names = list(accepted)
    return f"{owner} has no argument {name!r}{suggestion(name, names)} (its arguments: {', '.join(names)})"
