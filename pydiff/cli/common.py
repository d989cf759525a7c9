"""What the commands share: errors of one line, options of solvers and grids, files that appear whole or not at all."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.grid_nodes import lookup_grid
from pydiff.schedules.suggestion import suggestion
from pydiff.solvers import get_solver


class UsageError(Exception):
    """What the user is told, on one line."""


def add_plan_options(p: argparse.ArgumentParser) -> None:
    """The arguments of grids and solvers that `sample` and `plan` share."""
    p.add_argument("--grid", metavar="NAME", help="see `pydiff grids` (default: the schedule's)")
    p.add_argument("--grid-option", action="append", default=[], metavar="K=V", help="an option of the grid")
    p.add_argument("--option", action="append", default=[], metavar="K=V", help="an option of the solver")


def positive_integer(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, give an integer of at least 1")
    return value


def finite_number(text: str) -> float:
    """An argument that is a number, and neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, give a finite number such as 2 or 1.5")
    return value


# Options of solvers and grids.


def parse_options(pairs: Sequence[str], flag: str, owner: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """KEY=VALUE texts as keyword arguments, each of the type that its default has."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {pair}: give it as KEY=VALUE")
        if name not in defaults:
            accepted = f"the options are {', '.join(defaults)}" if defaults else "there are none"
            raise UsageError(f"{flag} {pair}: {owner} has no option {name!r}{suggestion(name, defaults)}; {accepted}")
        options[name] = _option_value(text, defaults[name], f"{flag} {pair}")
    return options


def _option_value(text: str, default: Any, where: str) -> Any:
    truth = {"true": True, "false": False}.get(text.lower())
    kind = type(default)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise UsageError(f"{where}: give {wanted}; the default is {default}") from None
    if kind is bool and truth is None:
        raise UsageError(f"{where}: give true or false; the default is {str(default).lower()}")
    return text if truth is None else truth  # some options take a word or a truth value


def solver_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--option` gives, checked against the solver that is asked for."""
    try:
        accepted = get_solver(args.solver).options
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse_options(args.option, "--option", args.solver, accepted)


def grid_options(args: argparse.Namespace, schedule: NoiseSchedule) -> dict[str, Any]:
    """What `--grid-option` gives, checked against the grid that `--grid` names or the schedule's own."""
    name = args.grid or schedule.default_grid
    try:
        accepted = grid_defaults(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse_options(args.grid_option, "--grid-option", f"grid {name}", accepted)


def grid_defaults(name: str) -> dict[str, Any]:
    """Names and defaults of a grid's options."""
    parameters = inspect.signature(lookup_grid(name).nodes).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


# Files.


def as_texts(metadata: dict[str, Any]) -> dict[str, str]:
    """Each value as text: a string as it is, all else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def check_output(path: Path, flag: str) -> None:
    """Raise unless a file can appear at `path`; what stands there is not touched."""
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path}: it is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: there is no folder {path.parent}; make it first")
        with open(_temporary(path), "xb"):
            pass
        os.unlink(_temporary(path))
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot write in {path.parent} ({error.strerror}); choose another folder or name"
        ) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, write: Callable[[BinaryIO], Any], flag: str) -> None:
    """The file that `write` fills appears complete or not at all."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{flag} {path}: writing failed ({error.strerror or error}), nothing of it is left") from None
    finally:
        temporary.unlink(missing_ok=True)
