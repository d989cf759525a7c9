"""The plan: a sampler compiled to a table, one row (a *stage*) for each call of the model.

A plan holds float64 numbers and nothing else: it prints, hashes, compares, saves and concatenates. What a row means is
the contract of the stage operation (`pydiff.ops.stage`); its columns are those of `pydiff.plans.table`.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    """A compiled sampler: a table of one row for each of its S stages (model calls), valid whenever there is one.

    Made by `make_plan`. A plan prints as its table, its length is its number of stages, it equals another one that
    computes the same, saves, and is followed by another as ``first + second`` (see `concatenate`).

    Attributes (`pydiff.plans.base.PlanTable` says them in full):
        solver: name of the solver that it was compiled from.
        coefficients, indices: float64 [S, 48] and int32 [S, 4], what the stage operation reads.
        times: float64 [n + 1], the time grid of n steps; a step takes one stage or more.
        alpha, sigma: float64 [S + 1], signal and noise level of x at each call, and at the end.
        targets: what each stage estimates, "sample" or "epsilon".
        start_scale, start_noise: what becomes of x_T before the first call.
        init_std: standard deviation of x_T, when it is drawn.
        slot_names: what the tensors kept beside x hold.
        config: how it was compiled.

    Raises: `PlanError` for a table that is not well formed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)

    def with_guidance(self, scale: float | np.ndarray) -> Plan:
        """The same plan with another guidance scale (1 is none).

        Args:
            scale: a number, or one for each stage, [S].

        Raises: ValueError for another shape and for what is not finite.
        """
        coefficients = self.coefficients.copy()
        coefficients[:, table.GUIDANCE] = stage_values("guidance_scale", scale, len(self))
        return replace(self, coefficients=coefficients)

    def __add__(self, other: Plan) -> Plan:
        """`concatenate`: run `other` from where this plan ends."""
        return Plan(**joined(self, other))

    def __str__(self) -> str:
        return format_plan(self)

    def __repr__(self) -> str:
        return f"Plan({self.solver!r}, stages={len(self)}, slots={self.num_slots}, draws={self.num_draws})"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON-able dictionary, which `from_dict` turns back into an equal plan."""
        data = _json_able(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "digest": self.digest(),
                **{name: getattr(self, name) for name in (*SCALARS, "targets", "slot_names", "config")},
                **{name: getattr(self, name).tolist() for name in ARRAYS},
            }
        )
        return {**data, "checksum": _checksum(data)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan whose `to_dict` is data.

        Raises: `PlanError` for anything else: another format or version, a missing field, one changed digit.
        """
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
        """Write the plan to a file, as JSON; float64 values survive exactly. It appears whole or not at all.

        Args:
            path: the file, in a folder that exists; an old file is replaced.

        Raises: OSError where the file cannot be written.

        Example:
            plan = pydiff.make_plan("unipc", steps=8)
            plan.save("unipc-8.json")
            assert pydiff.Plan.load("unipc-8.json") == plan
        """
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(self.to_dict(), f)
            os.chmod(temporary, 0o644)  # mkstemp's files are private to their owner
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Args:
            path: the file.

        Raises: OSError where there is none; `PlanError` naming the file if it is not a valid plan.

        Example:
            pydiff.make_plan("ddim", steps=4).save("plan.json")
            plan = pydiff.Plan.load("plan.json")
            assert len(plan) == 4
        """
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


def _json_able(value: Any) -> Any:
    """The value; of what JSON lacks the text, such as "inf", which numpy reads, or the repr of an object."""
    if isinstance(value, dict):
        return {str(name): _json_able(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_able(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int)) else repr(value)


def _checksum(data: dict[str, Any]) -> str:
    """Of all that a saved plan says, its provenance included; `Plan.digest` is of what it computes alone."""
    text = json.dumps(data, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def concatenate(first: Plan, second: Plan) -> Plan:
    """Run `second` from where `first` ends: ``first + second``, one plan whose stages are those of both.

    What `second` does before its first call (adding noise, scaling) is folded into the last stage of `first`. Its draw
    numbers follow those of `first`.

    Args:
        first, second: plans; alpha and sigma at the end of the first are those at the start of the second.

    Raises: `PlanError` if the noise levels do not meet, if one plan serves a mask and the other does not, or if no draw
        is free for the noise that `second` starts with.

    Example:
        first = pydiff.make_plan("heun", pydiff.VPLinear(), steps=3, t_end=0.5)
        second = pydiff.make_plan("dpmpp_2m", pydiff.VPLinear(), steps=5, t_start=0.5)
        assert len(pydiff.concatenate(first, second)) == len(first) + len(second)
    """
    return first + second
