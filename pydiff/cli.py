"""The command line: `pydiff sample`, `solvers`, `plan`, `grids` and `info`.

Imports stand where they are needed: `pydiff --version`, `solvers`, `grids` and `plan` answer without loading
torch. Whatever the user can get wrong ends in one line on stderr that names the argument, what was given and
what would be accepted, and in exit status 2.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydiff import __version__

if TYPE_CHECKING:
    from pydiff.noise_schedule import NoiseSchedule

DTYPES = ("float32", "bfloat16", "float16", "float64")
PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
SCHEDULES = ("vp_linear", "vp_cosine", "edm", "ve", "flow", "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
DEFAULT_GUIDANCE = 2.0


class UsageError(Exception):
    """What the user is told, on one line."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
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
    except KeyboardInterrupt:
        print("pydiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# The arguments.


def build_parser() -> argparse.ArgumentParser:
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

    _sample_arguments(command("sample", sample_command, "draw samples and write them as one picture"))
    command("solvers", solvers_command, "list the solvers")
    _plan_arguments(command("plan", plan_command, "print what a solver compiles to: one line a model call"))
    command("grids", grids_command, "list the time grids")
    command("info", info_command, "versions, devices, and which operations run compiled code (or why not)")
    return parser


def _sample_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help=f"picture: {', '.join(PICTURES)}")
    add("--n", type=positive_integer, default=64, metavar="N", help="number of samples (default: 64)")
    add("--seed", type=int, metavar="S", help="sample k uses seed S + k (default: a random one, printed)")
    add("--solver", default="dpmpp_2m", metavar="NAME", help="see `pydiff solvers` (default: dpmpp_2m)")
    add("--steps", type=positive_integer, default=20, metavar="N", help="steps (default: 20)")
    _plan_options(p)
    add("--model", default="mnist", metavar="NAME", help="`mnist` (the default), or a .safetensors file")
    add(
        "--class",
        dest="classes",
        default="all",
        metavar="K",
        help="a class, or several such as 3,1,4 used in turn; `all` (the default) goes through every class, "
        "`none` samples without one",
    )
    add(
        "--guidance",
        type=finite_number,
        metavar="W",
        help=f"scale of classifier-free guidance (default: {DEFAULT_GUIDANCE:g}; 1: none, half the cost)",
    )
    add("--batch", type=positive_integer, default=64, metavar="N", help="samples at a time (default: 64)")
    add("--device", default="cpu", metavar="NAME", help="cpu (the default), cuda, cuda:1, ...")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the model (default: float32); what the solver works in is float32, or float64 if this is",
    )
    add("--threads", type=positive_integer, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--columns", type=positive_integer, metavar="N", help="samples in a row (default: a square)")
    add("--scale", type=positive_integer, default=1, metavar="N", help="draw pixels as N x N (default: 1)")
    add("--quiet", action="store_true", help="no progress bar and no report")


def _plan_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("solver", metavar="NAME", help="see `pydiff solvers`")
    add("--steps", type=positive_integer, default=10, metavar="N", help="steps (default: 10)")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="vp_linear",
        help="noise schedule (default: vp_linear); the last four have 1000 discrete times, scaled_linear "
        "with the betas of Stable Diffusion",
    )
    add(
        "--prediction",
        choices=PREDICTIONS,
        help="what the model returns (default: epsilon, and flow_prediction where the schedule is flow)",
    )
    _plan_options(p)
    add("--json", type=Path, metavar="PATH", help="save the plan, for `pydiff.Plan.load`")


def _plan_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--grid", metavar="NAME", help="see `pydiff grids` (default: the schedule's)")
    p.add_argument("--grid-option", action="append", default=[], metavar="K=V", help="an option of the grid")
    p.add_argument("--option", action="append", default=[], metavar="K=V", help="an option of the solver")


def positive_integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, give an integer of at least 1")
    return value


def finite_number(text: str) -> float:
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
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            accepted = f"the options are {', '.join(defaults)}" if defaults else "there are none"
            raise UsageError(f"{flag} {pair}: {owner} has no option {name!r}; {hint}{accepted}")
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
    from pydiff.solvers import get_solver

    try:
        accepted = get_solver(args.solver).options
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse_options(args.option, "--option", args.solver, accepted)


def grid_options(args: argparse.Namespace, schedule: NoiseSchedule) -> dict[str, Any]:
    name = args.grid or schedule.default_grid
    try:
        accepted = grid_defaults(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse_options(args.grid_option, "--grid-option", f"grid {name}", accepted)


def grid_defaults(name: str) -> dict[str, Any]:
    """Names and defaults of a grid's options."""
    from pydiff.grid_nodes import lookup_grid

    parameters = inspect.signature(lookup_grid(name).nodes).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def make_schedule(name: str) -> NoiseSchedule:
    """The noise schedule that `--schedule` names."""
    from pydiff.noise_schedule import EDM, VE, DiscreteBetas, RectifiedFlow, VPCosine, VPLinear

    continuous = {"vp_linear": VPLinear, "vp_cosine": VPCosine, "edm": EDM, "ve": VE, "flow": RectifiedFlow}
    if name in continuous:
        return continuous[name]()
    if name == "scaled_linear":
        return DiscreteBetas.named(name, beta_start=0.00085, beta_end=0.012)
    return DiscreteBetas.named(name)


# Files.


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


def write_whole(path: Path, data: bytes, flag: str) -> None:
    """The file appears complete or not at all."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{flag} {path}: writing failed ({error.strerror}), nothing is left") from None
    finally:
        temporary.unlink(missing_ok=True)


# The commands.


def sample_command(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() not in PICTURES:
        raise UsageError(f"--out {args.out}: unknown suffix {args.out.suffix!r}; use {', '.join(PICTURES)}")
    check_output(args.out, "--out")
    options = solver_options(args)
    from pydiff.cli_sample import run  # takes seconds, for torch

    run(args, options)


def solvers_command(_: argparse.Namespace) -> None:
    from pydiff.solvers import list_solvers

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


def grids_command(_: argparse.Namespace) -> None:
    from pydiff.grid_nodes import list_grids, lookup_grid

    for name in list_grids():
        text = " ".join((inspect.getdoc(lookup_grid(name).nodes) or "").split("\n\n")[0].split())
        if lookup_grid(name).index_only:
            text += " For schedules with discrete times."
        print(textwrap.fill(text, 110, initial_indent=name.ljust(14), subsequent_indent=" " * 14))
        defaults = grid_defaults(name)
        if defaults:
            print(" " * 14 + "--grid-option " + ", ".join(f"{k}={v}" for k, v in defaults.items()))


def plan_command(args: argparse.Namespace) -> None:
    from pydiff.compiler import make_plan

    if args.json:
        check_output(args.json, "--json")
    options, schedule = solver_options(args), make_schedule(args.schedule)
    prediction = args.prediction or ("flow_prediction" if args.schedule == "flow" else "epsilon")
    try:
        plan = make_plan(
            args.solver,
            schedule,
            args.steps,
            grid=args.grid,
            prediction=prediction,
            grid_options=grid_options(args, schedule),
            **options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from None
    print(plan)
    if args.json:
        plan.save(args.json)
        print(f"saved to {args.json}")


def info_command(_: argparse.Namespace) -> None:
    from pydiff import info

    print(info.report())
