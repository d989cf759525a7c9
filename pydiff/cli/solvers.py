"""`pydiff solvers` and `pydiff grids`: what there is to choose from."""

from __future__ import annotations

import argparse
import inspect
import textwrap

from pydiff.cli.common import grid_defaults
from pydiff.schedules.grid_nodes import list_grids, lookup_grid
from pydiff.solvers import list_solvers


def run(_: argparse.Namespace) -> None:
    header = ("name", "order", "model calls a step", "noise", "paper")
    rows = [header]
    rows += [
        (s.name, str(s.order_of()), s.calls, "stochastic" if s.stochastic else "deterministic", s.paper)
        for s in list_solvers()
    ]
    options = ["", *(", ".join(f"{k}={v}" for k, v in s.options.items()) for s in list_solvers())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header) - 1)]
    for row, extra in zip(rows, options, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        print("  ".join([*cells, row[-1]]))
        if extra:
            print(f"    --option {extra}")
    print(
        "\nOrder and noise are those of the default options; the order counts the first\n"
        "steps, which may be lower. A step is one interval of the time grid."
    )


def run_grids(_: argparse.Namespace) -> None:
    for name in list_grids():
        text = " ".join((inspect.getdoc(lookup_grid(name).nodes) or "").split("\n\n")[0].split())
        if lookup_grid(name).index_only:
            text += " For schedules with discrete times."
        print(textwrap.fill(text, 110, initial_indent=name.ljust(14), subsequent_indent=" " * 14))
        defaults = grid_defaults(name)
        if defaults:
            print(" " * 14 + "--grid-option " + ", ".join(f"{k}={v}" for k, v in defaults.items()))
