"""The command line: `pydiff sample`, `solvers`, `plan`, `grids` and `info`.

What needs torch is imported where it is needed: `pydiff --version`, `solvers`, `grids` and `plan` answer
without loading torch. Whatever the user can get wrong ends in one line on stderr that names the argument, what was
given and what would be accepted, and in exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pydiff import __version__
from pydiff.cli import plan, sample, solvers
from pydiff.cli.common import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` in place of printing and exiting."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
        return 0
    except SystemExit as finished:  # how argparse leaves after --help and --version
        return int(finished.code or 0)
    except UsageError as error:
        print(f"pydiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("pydiff: interrupted" + (f": {stopped}" if str(stopped) else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses holds the function of the chosen one as `run`."""
    parser = Parser(
        prog="pydiff",
        allow_abbrev=False,
        description="Samplers of diffusion models, compiled to tables that one operation runs.",
    )
    parser.add_argument("--version", action="version", version=f"pydiff {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sample.add_arguments(command("sample", sample.run, "draw samples and write them as pictures or arrays"))
    solvers.add_arguments(command("solvers", solvers.run, "list the solvers, or explain one"))
    plan.add_arguments(command("plan", plan.run, "print what a solver compiles to: one line a model call"))
    solvers.add_arguments(command("grids", solvers.run_grids, "list the time grids, or explain one"))
    command("info", info_command, "versions, devices, and which operations run compiled code (or why not)")
    return parser


def info_command(_: argparse.Namespace) -> None:
    """`pydiff info`."""
    from pydiff.cli import info  # loads torch

    print(info.report())
