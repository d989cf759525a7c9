"""The shape of the house: what may import what, what stays free of torch, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pydiff"
LONGEST_FILE = 500

# From the top down: a module imports its own folder and those below it, and never upward.
FOLDERS = [
    {"cli", "info", "__main__"},
    {"serve"},
    {"adapters"},
    {"training", "tune", "evaluate"},
    {"engine"},
    {"procedures"},
    {"sampler"},
    {"graph"},
    {"check"},
    {"run"},
    {"optimize"},
    {"guidance"},
    {"discrete"},
    {"ops"},
    {"solvers"},
    {"plans"},
    {"schedules"},
    {"models"},
]
TORCH_FREE = {"solvers", "plans", "schedules"}
FACE = "<pydiff>"  # the package itself


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the leading "pydiff."."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".") or FACE] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> set[str]:
    """All that code imports, wherever: inside functions and for type checkers too. `from a import b` is a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(names: set[str]) -> set[str]:
    """Of imported names, the package's own modules that hold them."""
    found = set()
    for name in names:
        top, *parts = name.split(".")
        if top == "pydiff" and parts[:1] not in (["kernels"], ["_C"]):  # which are no part of these folders
            homes = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
            found.add(next((home for home in homes if home in MODULES), FACE))
    return found


def parse(name: str) -> ast.AST:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


EDGES = {name: inside(imports(parse(name))) for name in MODULES}


def floor(name: str) -> int:
    """Where a module stands, counted from the top."""
    folder = name.split(".")[0]
    found = [k for k, folders in enumerate(FOLDERS) if folder in folders]
    assert found, f"pydiff.{name} has no place yet: give its folder one in {Path(__file__).name}"
    return found[0]


def circle(edges: dict[str, set[str]]) -> tuple[str, ...]:
    """A way along the edges that comes back to where it began, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        found: tuple[str, ...] = ()
        if name not in done:
            found = next(filter(None, (visit(target, (*path, name)) for target in sorted(edges[name]))), ())
            done.add(name)
        return found

    return next(filter(None, (visit(name, ()) for name in edges)), ())


@pytest.mark.parametrize("name", sorted(set(MODULES) - {FACE}))
def test_imports_run_downward(name) -> None:
    for target in EDGES[name]:
        if target == FACE:
            assert floor(name) < floor("sampler"), f"pydiff.{name} imports the package's face"
        else:
            assert floor(name) <= floor(target), f"pydiff.{name} imports pydiff.{target}, which is above it"


def test_no_files_import_each_other() -> None:
    assert circle(EDGES) == ()


def test_wrong_imports_would_be_seen() -> None:
    assert floor("sampler") < floor("graph") < floor("run.state") < floor("ops.stage") < floor("plans.plan")
    lazy = "def f():\n    from pydiff.ops import stage\n    import pydiff.sampler\n"
    typed = "if TYPE_CHECKING:\n    from pydiff.plans import Plan\n    from pydiff import sample\n"
    assert inside(imports(ast.parse(lazy))) == {"ops.stage", "sampler"}
    assert inside(imports(ast.parse(typed))) == {"plans", FACE}
    assert circle({**EDGES, "plans.base": {*EDGES["plans.base"], "plans.plan"}}) != ()
    assert len(EDGES) > 100 and sum(map(len, EDGES.values())) > 300


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in TORCH_FREE])
def test_what_compiles_plans_names_no_backend(name) -> None:
    assert not {n for n in imports(parse(name)) if n.split(".")[0] in ("torch", "triton", "jax")}


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is not importable here")
sys.meta_path.insert(0, Refuse())
import pydiff, pydiff.solvers, pydiff.solvers.compiler
for entry in pydiff.list_solvers():
    for schedule in (pydiff.VPLinear(), pydiff.EDM(), pydiff.DiscreteBetas([0.1] * 20)):
        plan = pydiff.make_plan(entry.name, schedule, 4, known=True, guidance_scale=2.0)
        assert str(plan) and plan == pydiff.Plan.from_dict(plan.to_dict())
print(len(pydiff.list_solvers()), "torch" in sys.modules)
try:
    pydiff.sample
except ImportError as error:
    print(error)
"""


def test_plans_compile_where_torch_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, torch_there = done.stdout.splitlines()[0].split()
    assert int(count) >= 14 and torch_there == "False"
    assert "torch is not importable here" in done.stdout  # the block works: what needs torch does fail


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pydiff; dir(pydiff); pydiff.make_plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_every_public_name_is_there() -> None:
    import pydiff

    for name in pydiff.__all__:
        assert getattr(pydiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pydiff.nothing


def test_kernels_and_csrc_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        names = imports(ast.parse(path.read_text(encoding="utf-8")))
        assert not {n for n in names if n.split(".")[0] == "pydiff" and not n.startswith("pydiff.kernels")}, path
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [
                line for line in lines if line.startswith("#include") and ("torch/" in line or "ATen" in line)
            ], path


def test_no_file_is_too_long() -> None:
    folders = [
        p
        for p in ROOT.iterdir()
        if p.is_dir() and p.name not in ("build", "dist") and p.name[0] != "." and not (p / "pyvenv.cfg").exists()
    ]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert len(files) > 30
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert not {name: n for name, n in lengths.items() if n > LONGEST_FILE}
