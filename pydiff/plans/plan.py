"""The plan: a sampler compiled to a table, one row (a *stage*) for each call of the model.

A plan holds float64 numbers and nothing else: it prints, hashes, compares, saves and concatenates. What a row means is
the contract of the stage operation (`pydiff.ops.stage`); its columns are those of `pydiff.plans.table`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import ARRAYS, PlanError, PlanTable
from pydiff.plans.joining import joined
from pydiff.plans.text import format_plan
from pydiff.plans.validation import stage_values, validate

FORMAT = "pydiff-plan"
FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False)
class Plan(PlanTable):
    """A compiled sampler of S stages, valid whenever there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)

    def with_guidance(self, scale: float | np.ndarray) -> Plan:
        """The same plan with another guidance scale: a number, or one for each stage."""
        coefficients = self.coefficients.copy()
        coefficients[:, table.GUIDANCE] = stage_values("guidance_scale", scale, len(self))
        return replace(self, coefficients=coefficients)

    def __add__(self, other: Plan) -> Plan:
        return Plan(**joined(self, other))

    def __str__(self) -> str:
        return format_plan(self)

    def __repr__(self) -> str:
        return f"Plan({self.solver!r}, stages={len(self)}, slots={self.num_slots}, draws={self.num_draws})"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON-able dictionary, which `from_dict` turns back into an equal plan."""
        data = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "digest": self.digest(),
            **{name: getattr(self, name) for name in SCALARS},
            **{name: _json_numbers(getattr(self, name)) for name in ARRAYS},
            "targets": list(self.targets),
            "slot_names": list(self.slot_names),
            "config": self.config,
        }
        return {**data, "checksum": _checksum(data)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` described. Raises `PlanError` for anything else, one changed digit included."""
        if data.get("format") != FORMAT:
            raise PlanError(f"not a plan: field 'format' is {data.get('format')!r}, expected {FORMAT!r}")
        if data.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"plan format version {data.get('version')!r} is not supported, expected {FORMAT_VERSION}; "
                "compile the plan again with this version of pydiff"
            )
        names = [*SCALARS, *ARRAYS, "targets", "slot_names", "config"]
        missing = [name for name in (*names, "digest", "checksum") if name not in data]
        if missing:
            raise PlanError(f"not a complete plan: missing {', '.join(missing)}")
        try:
            plan = cls(**{name: data[name] for name in names})
        except (TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"not a valid plan: {error}") from error
        if data["checksum"] != _checksum({name: value for name, value in data.items() if name != "checksum"}):
            raise PlanError("the plan was changed after it was saved (its checksum is another); save it again")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; float64 values survive exactly. The file appears whole or not at all."""
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(self.to_dict(), f, allow_nan=False)
            os.chmod(temporary, 0o644)  # mkstemp's files are private to their owner
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises `PlanError` naming the file if it is not a valid plan."""
        content = Path(path).read_bytes()
        try:
            data = json.loads(content)
        except ValueError as error:  # no JSON, or no text at all
            raise PlanError(f"{path} is not a plan file (truncated?): {error}; save the plan again") from error
        try:
            return cls.from_dict(data if isinstance(data, dict) else {})
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


SCALARS = ("solver", "start_scale", "start_noise", "init_std")


def _json_numbers(array: np.ndarray) -> list[Any]:
    """The array as nested lists; infinities, which JSON lacks, as the strings that numpy reads them from."""
    if array.dtype == np.float64 and np.isinf(array).any():
        return np.where(np.isinf(array), array.astype(str).astype(object), array.astype(object)).tolist()
    return array.tolist()


def _checksum(data: dict[str, Any]) -> str:
    """Of all that a saved plan says, its provenance included; `Plan.digest` is of what it computes alone."""
    text = json.dumps(data, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def concatenate(first: Plan, second: Plan) -> Plan:
    """Run `second` from where `first` ends: ``first + second``, one plan whose stages are those of both.

    What `second` does before its first call (adding noise, scaling) is folded into the last stage of `first`. Its draw
    numbers follow those of `first`. Raises `PlanError` if the noise levels do not meet, if one plan serves a mask and
    the other does not, or if no draw is free for the noise that `second` starts with.
    """
    return first + second
