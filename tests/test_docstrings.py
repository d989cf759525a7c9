"""What is public says what it is: docstrings are there, name every argument and error, and their examples run.

In every module: classes, functions, methods and fields. Of the public face besides: arguments, errors, examples.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import pydiff
from pydiff.check.problems import Problem
from pydiff.graph.captured import GraphStats
from pydiff.optimize.report import Entry, Report
from pydiff.solvers.registry import Solver

PACKAGE = Path(pydiff.__file__).parent
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def entries(doc: str | None) -> set[str]:
    """The names that a docstring explains: those of `name: ...`, `one, other: ...`, or a table with two spaces."""
    lists = re.findall(r"(?<![\w`.*])(\w+(?:, \w+)*)(?::(?=\s)|[ ]{2,}(?=\S))", doc or "")
    return {name for names in lists for name in names.split(", ")}


# Every module.


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """The public classes and functions of a module or class, overloads aside."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            if not any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node


def fields(node: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """The public fields of a dataclass or NamedTuple, and whether a string follows or the class explains them."""
    made_of_fields = [*map(ast.unparse, node.bases), *map(ast.unparse, node.decorator_list)]
    if not any("NamedTuple" in name or "dataclass" in name for name in made_of_fields):
        return
    explained = entries(ast.get_docstring(node))
    for statement, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if not name.startswith("_") and "ClassVar" not in ast.unparse(statement.annotation):
                value = after.value if isinstance(after, ast.Expr) else None
                followed = isinstance(value, ast.Constant) and isinstance(value.value, str)
                yield name, followed or name in explained


def inventory(sources: Mapping[str, str]) -> dict[str, bool]:
    """Everything public in some files, and whether it is documented. A method may be so in a base class of theirs."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    classes = {n.name: n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found: dict[str, bool] = {}

    def inherited(cls: ast.ClassDef, method: str) -> bool:
        bases = [classes[name] for base in cls.bases if (name := ast.unparse(base).split(".")[-1]) in classes]
        own = [n for base in bases for n in definitions(base.body) if n.name == method]
        return any(ast.get_docstring(n) for n in own) or any(inherited(b, method) for b in bases if b is not cls)

    def visit(owner: ast.ClassDef | None, body: list[ast.stmt], prefix: str) -> None:
        for node in definitions(body):
            name = f"{prefix}{node.name}"
            documented = bool(ast.get_docstring(node))
            found[name] = documented or (owner is not None and inherited(owner, node.name))
            if isinstance(node, ast.ClassDef):
                visit(node, node.body, f"{name}.")
                found.update({f"{name}.{field} (field)": known for field, known in fields(node)})

    for file, tree in trees.items():
        found[file] = bool(ast.get_docstring(tree))
        visit(None, tree.body, f"{file}: ")
    return found


def test_everything_public_is_documented() -> None:
    found = inventory(SOURCES)
    missing = [name for name, documented in found.items() if not documented]
    assert missing == []
    assert len(found) > 800 and sum("(field)" in name for name in found) > 100


PLANTED = '''
"""A module."""
from typing import NamedTuple


class Told(NamedTuple):
    """A record.

    Attributes:
        first, second: two.
    """

    first: int
    second: int
    third: int
    """Another."""
    hidden: int

    def method(self): ...
    def _private(self): ...


class Heir(Told):
    """Its heir."""

    def method(self): ...
    def told(self):
        """This."""


class Last(Heir):
    """The last."""

    def told(self): ...


class Bare: ...
def bare(): ...
'''


def test_what_is_not_documented_would_be_seen() -> None:
    found = inventory({"planted.py": PLANTED, "bare.py": "x = 1\n"})
    missing = {name.removeprefix("planted.py: ") for name, documented in found.items() if not documented}
    assert missing == {"Told.hidden (field)", "Told.method", "Heir.method", "Bare", "bare", "bare.py"}
    assert "Last.told" not in missing and len(found) == 15


# The public face: what `pydiff` holds, and what its functions return.

FACE: dict[str, Any] = {name: getattr(pydiff, name) for name in pydiff.__all__ if name != "__version__"}
FACE["optimize"] = pydiff.optimize.optimize
FACE |= {cls.__name__: cls for cls in (Entry, GraphStats, Problem, Report, Solver)}


def is_own(thing: Any, within: str) -> bool:
    """Whether something is a function written in the package, not one that dataclasses made."""
    own = isinstance(thing, FunctionType) and thing.__module__.split(".")[0] == within
    return own and not inspect.unwrap(thing).__code__.co_filename.startswith("<")


def function_of(member: Any) -> Any:
    """The function in a method, property or decorated function; anything else as it is."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, functools.cached_property):
        return member.func
    return member.__func__ if isinstance(member, (classmethod, staticmethod)) else member


def methods(cls: type, within: str = "pydiff") -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, those of its bases in the package included; and `__call__`."""
    for name in dir(cls):
        member = function_of(inspect.getattr_static(cls, name))
        if is_own(member, within) and (not name.startswith("_") or name == "__call__"):
            yield name, member


def callables(
    face: Mapping[str, Any], within: str = "pydiff"
) -> dict[str, tuple[Callable[..., Any], str, type | None]]:
    """Every function, constructor and method, with the docstring that has to explain it and its class."""
    found: dict[str, tuple[Callable[..., Any], str, type | None]] = {}
    for name, thing in face.items():
        doc = inspect.getdoc(thing) or ""
        if not isinstance(thing, type):
            found[name] = (thing, doc, None)
            continue
        if is_own(thing.__init__, within):
            found[name] = (thing.__init__, doc, thing)
        for method, function in methods(thing, within):
            found[f"{name}.{method}"] = (function, inspect.getdoc(getattr(thing, method)) or "", thing)
    return found


CALLABLES = callables(FACE)


def unexplained(function: Callable[..., Any], doc: str) -> list[str]:
    """The parameters that a docstring leaves out. Under `Args` each has its entry; a text without names them."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    told = entries(doc) if re.search(r"^Args\b", doc, re.M) else set(re.findall(r"\w+", doc))
    return [name for name in names if name not in told]


@pytest.mark.parametrize("name", CALLABLES)
def test_every_parameter_is_explained(name) -> None:
    function, doc, _ = CALLABLES[name]
    assert unexplained(function, doc) == []


def has_raise(function: Callable[..., Any]) -> bool:
    """Whether a function's own text raises an error of its choice (and not one that passes through)."""
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(parsed(function)))


@functools.cache
def parsed(function: Callable[..., Any]) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def called(function: Callable[..., Any], cls: type | None, within: str) -> Iterator[tuple[Any, type | None]]:
    """The package's functions and constructors that a function calls by name, and its class's methods on self."""
    scope = inspect.unwrap(function).__globals__  # type: ignore[attr-defined]
    for call in (node.func for node in ast.walk(parsed(function)) if isinstance(node, ast.Call)):
        target, owner = None, None
        if isinstance(call, ast.Name):
            target = scope.get(call.id)
            if isinstance(target, type):
                target, owner = vars(target).get("__init__"), target
        elif isinstance(call, ast.Attribute) and cls is not None and ast.unparse(call.value) in ("self", "cls"):
            target, owner = function_of(inspect.getattr_static(cls, call.attr, None)), cls
        if is_own(target, within):
            yield target, owner


def raises(
    function: Callable[..., Any], cls: type | None = None, within: str = "pydiff", seen: frozenset[Any] = frozenset()
) -> bool:
    """Whether an error of the package's own can arise in a function: a `raise` in it, or in what it calls by name."""
    if function in seen:
        return False
    deeper = called(function, cls, within)
    return has_raise(function) or any(raises(*target, within, seen | {function}) for target in deeper)


@pytest.mark.parametrize("name", [name for name, (function, _, cls) in CALLABLES.items() if raises(function, cls)])
def test_every_error_is_told(name) -> None:
    assert re.search(r"\bRaises\b", CALLABLES[name][1])


def unexplained_attributes(cls: type, within: str = "pydiff") -> list[str]:
    """The public attributes that a class's own constructor makes, and neither its text nor a base explains."""
    made = vars(cls).get("__init__")
    if not is_own(made, within):
        return []
    nodes = [node for node in ast.walk(parsed(made)) if isinstance(node, ast.Attribute)]
    assigned = {n.attr for n in nodes if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"}
    known = entries(inspect.getdoc(cls)).union(*(getattr(base, "__annotations__", ()) for base in cls.__mro__[1:]))
    return sorted(name for name in assigned - known if not name.startswith("_"))


@pytest.mark.parametrize("name", [name for name, thing in FACE.items() if isinstance(thing, type)])
def test_every_attribute_is_explained(name) -> None:
    assert unexplained_attributes(FACE[name]) == []


@pytest.mark.parametrize("name", [name for name, (_, doc, _) in CALLABLES.items() if re.search("log.snr", doc, re.I)])
def test_a_log_snr_is_said_to_be_half_of_the_papers(name) -> None:
    assert re.search(r"log\(alpha / sigma\)|\bhalf\b", CALLABLES[name][1])


def test_the_face_is_not_empty() -> None:
    told = {name for name, (function, _, cls) in CALLABLES.items() if raises(function, cls)}
    assert len(FACE) > 35 and len(CALLABLES) > 150 and len(told) > 100
    assert {"init", "run_plan", "Sampler", "sample", "restore", "get_prediction", "State.clone"} <= told


def plant(value: int, other: int = 0) -> int:
    """Half of value."""
    return _checked(value) // 2


def told(value: int, other: int = 0) -> int:
    """Half of value.

    Args:
        other: what is taken off.
    """
    return value // 2 - other


def _checked(value: int) -> int:
    return _strictly(value) if value else value


def _strictly(value: int) -> int:
    if value < 0:
        raise ValueError("value must be at least 0")
    return value


class Planted:
    """A class."""

    def __init__(self, size: int):
        self.size = size

    def half(self) -> int:
        """Half of it."""
        return self._checked() // 2

    def _checked(self) -> int:
        if self.size % 2:
            raise ValueError("size must be even")
        return self.size

    @property
    def twice(self) -> int:
        """Two of it."""
        return 2 * self.size


def test_what_is_not_told_would_be_seen() -> None:
    here = __name__.split(".")[0]
    found = callables({"plant": plant, "told": told, "Planted": Planted}, here)
    assert {*found} == {"plant", "told", "Planted", "Planted.half", "Planted.twice"}
    missing = {name: unexplained(function, doc) for name, (function, doc, _) in found.items()}
    assert missing == {
        "plant": ["other"],
        "told": ["value"],
        "Planted": ["size"],
        "Planted.half": [],
        "Planted.twice": [],
    }
    assert {n for n, (function, _, cls) in found.items() if raises(function, cls, here)} == {"plant", "Planted.half"}
    assert unexplained_attributes(Planted, here) == ["size"]


# Examples.

WITH_AN_EXAMPLE = """
    Sampler sample make_plan run_plan init step StageInfo initial_noise Plan.save Plan.load concatenate check_capturable
    VPLinear VPCosine DiscreteBetas VE EDM RectifiedFlow FromLogSNR EDMPrecond from_diffusers_config make_times
    optimize restore decode load_model list_solvers get_solver
""".split()


def example(doc: str) -> str:
    """The code under `Example:` at the end of a docstring; empty where there is none."""
    return textwrap.dedent(doc.partition("\nExample:\n")[2])


EXAMPLES = {name: example(inspect.getdoc(thing) or "") for name, thing in FACE.items()}
EXAMPLES |= {name: example(doc) for name, (_, doc, _) in CALLABLES.items()}
EXAMPLES = {name: code for name, code in EXAMPLES.items() if code}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where those that write files leave them
    exec(EXAMPLES[name], {"torch": torch, "pydiff": pydiff})


def test_what_a_newcomer_calls_first_has_an_example() -> None:
    assert [name for name in WITH_AN_EXAMPLE if name not in EXAMPLES] == []
    assert example("One.\n\nExample:\n    x = 1\n\n    y = x\n") == "x = 1\n\ny = x\n" and example("Example: x") == ""
