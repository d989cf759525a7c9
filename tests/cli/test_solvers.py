"""`pydiff solvers` and `pydiff grids`: the lists, and the page of each solver and grid."""

from __future__ import annotations

import re
import shlex

import pytest

import pydiff
from pydiff.cli.common import grid_defaults
from pydiff.cli.solvers import explanation

GRIDS = pydiff.list_grids()
SOLVERS = [entry.name for entry in pydiff.list_solvers()]


def test_solvers_lists_the_registry(run):
    status, out, err = run("solvers")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].strip()}
    for solver in pydiff.list_solvers():
        line = lines[solver.name]
        kind = "stochastic" if solver.stochastic else "deterministic"
        assert solver.paper in line and solver.calls in line and kind in line
        assert line.split()[1] == str(solver.order_of())
        assert all(f"{name}={default}" in out for name, default in solver.options.items())


def test_grids_lists_every_grid(run):
    status, out, _ = run("grids")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines() if line[0] != " "} == set(GRIDS)
    assert "rho=7.0" in out and "clean_follows" not in out


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_explained(run, name):
    status, out, err = run("solvers", name)
    assert (status, err) == (0, "")
    solver = pydiff.get_solver(name)
    flat = " ".join(out.split())
    summary, meanings = explanation(solver.build, solver.options)
    assert summary and flat.startswith(f"{name} {summary}")
    noise = "stochastic" if solver.stochastic else "deterministic"
    for fact, value in (("paper", solver.paper), ("order", solver.order_of()), ("noise", noise)):
        assert re.search(rf"^{fact} +{re.escape(str(value))}(?!\w)", out, re.M), fact
    assert f"model calls a step  {solver.calls}" in out
    for option, default in solver.options.items():
        assert len(meanings[option]) > 5, f"{name}: its docstring does not say what {option} is"
        assert f"--option {option}={default} {meanings[option]}" in flat


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_explained(run, name):
    status, out, err = run("grids", name)
    assert (status, err) == (0, "") and out.startswith(f"{name}\n")
    for option, default in grid_defaults(name).items():
        assert re.search(rf"--grid-option {option}={default}\n {{6}}\S", out), f"{name}: no word about {option}"
    assert ("no options" in out) == (not grid_defaults(name))


def examples(page: str) -> tuple[list[str], str]:
    """The command and the Python code of a page."""
    command, _, python = page.partition("on the command line\n")[2].partition("in Python\n")
    return shlex.split(command)[1:], "\n".join(line.strip() for line in python.splitlines())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_examples_of_a_solver_work(run, folder, weights, name):
    argv, python = examples(run("solvers", name)[1])
    assert argv[:3] == ["sample", "--solver", name]
    status, _, err = run(*argv, "--model", weights, "--n", 1, "--steps", 2, "--quiet")
    assert (status, err) == (0, "") and [p.name for p in folder.iterdir()] == ["digits.png"]
    small = python.replace('load_model("mnist")', f'load_model("{weights}")').replace("(16,", "(1,")
    namespace: dict = {}
    exec(small.replace("steps=20", "steps=2"), namespace)
    assert namespace["x"].shape == (1, 1, 28, 28)


@pytest.mark.parametrize("name", GRIDS)
def test_the_examples_of_a_grid_work(run, name):
    argv, python = examples(run("grids", name)[1])
    status, out, _ = run(*argv)
    namespace: dict = {}
    exec(python, namespace)
    assert status == 0 and out == f"{namespace['plan']}\n"
    assert namespace["plan"].config["grid"] == name


@pytest.mark.parametrize("command, name, hint", [("solvers", "eulr", "'euler'"), ("grids", "karas", "'karras'")])
def test_an_unknown_name_gets_a_suggestion(run, command, name, hint):
    status, out, err = run(command, name)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert repr(name) in err and f"did you mean {hint}" in err


def test_a_docstring_is_read_option_by_option():
    def function(b, first=1, second=2, third=3, fourth=4):
        """A summary
        of two lines. first: the first, in words: more.
        second, third: both,
        on two lines.

        Something else: no option.
        """

    summary, found = explanation(function, ["first", "second", "third", "fourth"])
    assert summary == "A summary of two lines."
    assert found == {"first": "the first, in words: more.", **dict.fromkeys(("second", "third"), "both, on two lines.")}
    assert explanation(function, [])[1] == {}
