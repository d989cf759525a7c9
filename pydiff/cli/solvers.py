"""`pydiff solvers` and `pydiff grids`: what there is to choose from, and what one of them is and takes."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from pydiff.cli.common import UsageError, grid_defaults
from pydiff.schedules.grid_nodes import list_grids, lookup_grid
from pydiff.solvers import get_solver, list_solvers

WIDTH = 110
Pairs = list[tuple[str, str]]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The argument of both commands."""
    p.add_argument("name", nargs="?", metavar="NAME", help="explain this one: what it is, takes, and how it is used")


def run(args: argparse.Namespace) -> None:
    """`pydiff solvers`."""
    if args.name is not None:
        print(describe_solver(args.name))
        return
    header = ("name", "order", "model calls a step", "noise", "paper")
    rows = [header, *((s.name, str(s.order_of()), s.calls, _noise(s), s.paper) for s in list_solvers())]
    options = ["", *(", ".join(f"{k}={v}" for k, v in s.options.items()) for s in list_solvers())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header) - 1)]
    for row, extra in zip(rows, options, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        print("  ".join([*cells, row[-1]]))
        if extra:
            print(f"    --option {extra}")
    print(
        "\nOrder and noise are those of the default options; the order counts the first\n"
        "steps, which may be lower. A step is one interval of the time grid.\n"
        "`pydiff solvers NAME` explains one and its options."
    )


def run_grids(args: argparse.Namespace) -> None:
    """`pydiff grids`."""
    if args.name is not None:
        print(describe_grid(args.name))
        return
    for name in list_grids():
        defaults = grid_defaults(name)
        text, _ = explanation(lookup_grid(name).nodes, defaults)
        if lookup_grid(name).index_only:
            text += " For schedules with discrete times."
        print(textwrap.fill(text, WIDTH, initial_indent=name.ljust(14), subsequent_indent=" " * 14))
        if defaults:
            print(" " * 14 + "--grid-option " + ", ".join(f"{k}={v}" for k, v in defaults.items()))


def describe_solver(name: str) -> str:
    """All that is known of a solver, and how it is used."""
    try:
        entry = get_solver(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    facts = [
        ("paper", entry.paper),
        ("order", f"{entry.order_of()}, with the default options and the first steps counted"),
        ("model calls a step", entry.calls),
        ("noise", _noise(entry)),
    ]
    shown = _one_option(entry.options)
    python = [
        'model = pydiff.load_model("mnist")  # or any callable model(x, t, **cond)',
        f'x = pydiff.sample(model, (16, 1, 28, 28), solver="{name}", steps=20{_keywords(shown)})',
    ]
    command = f"pydiff sample --solver {name} --steps 20{_flags(shown, '--option')} --out digits.png"
    return _page(name, entry.build, facts, entry.options, "--option", command, python)


def describe_grid(name: str) -> str:
    """What a time grid is, its options, and how it is used."""
    try:
        grid = lookup_grid(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    defaults = grid_defaults(name)
    shown = _one_option(defaults)
    schedule, flag = ('DiscreteBetas.named("linear")', "linear") if grid.index_only else ("VPLinear()", "vp_linear")
    options = f", grid_options=dict({_keywords(shown)[2:]})" if shown else ""
    python = [
        f'plan = pydiff.make_plan("dpmpp_2m", pydiff.{schedule}, steps=20, grid="{name}"{options})',
        "print(plan)",
    ]
    command = f"pydiff plan dpmpp_2m --steps 20 --schedule {flag} --grid {name}{_flags(shown, '--grid-option')}"
    facts = [("schedules", "those with discrete times" if grid.index_only else "all")]
    return _page(name, grid.nodes, facts, defaults, "--grid-option", command, python)


def explanation(function: Callable[..., Any], options: Iterable[str]) -> tuple[str, dict[str, str]]:
    """What a docstring says: in its first paragraph, and of each option after `option:` or `option, option:`."""
    text = inspect.getdoc(function) or ""
    names = "|".join(map(re.escape, options)) or r"(?!)"
    heads = list(re.finditer(rf"(?<!\S)((?:{names})(?:, (?:{names}))*):\s", text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    found = {}
    for head, end in zip(heads, ends, strict=False):
        meaning = " ".join(text[head.end() : end].split("\n\n")[0].split())
        found.update(dict.fromkeys(head[1].split(", "), meaning))
    first = text[: heads[0].start()] if heads else text
    return " ".join(first.split("\n\n")[0].split()), found


def _page(
    name: str,
    function: Callable[..., Any],
    facts: Pairs,
    options: dict[str, Any],
    flag: str,
    command: str,
    python: list[str],
) -> str:
    summary, meanings = explanation(function, options)
    width = max(len(fact) for fact, _ in facts)
    lines = [name, textwrap.fill(summary, WIDTH), "", *(f"{fact.ljust(width)}  {value}" for fact, value in facts)]
    lines += ["", "options and their defaults" if options else "no options"]
    for option, default in options.items():
        lines.append(f"  {flag} {option}={default}")
        if meanings.get(option):
            indent = " " * 6
            lines.append(textwrap.fill(meanings[option], WIDTH, initial_indent=indent, subsequent_indent=indent))
    lines += ["", "on the command line", f"  {command}", "", "in Python", "  import pydiff", ""]
    return "\n".join([*lines, *(f"  {line}" for line in python)])


def _noise(entry: Any) -> str:
    return "stochastic" if entry.stochastic else "deterministic"


def _one_option(options: dict[str, Any]) -> dict[str, Any]:
    """The first option whose default can be written down, to show how one is given."""
    plain = {k: v for k, v in options.items() if isinstance(v, (str, int, float)) and not _infinite(v)}
    return dict(list(plain.items())[:1])


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _flags(options: dict[str, Any], flag: str) -> str:
    return "".join(f" {flag} {name}={value}" for name, value in options.items())


def _keywords(options: dict[str, Any]) -> str:
    return "".join(f", {k}={json.dumps(v) if isinstance(v, str) else v}" for k, v in options.items())
