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

# Operations with a Triton kernel.
FAMILIES = ("attention", "geglu", "group_norm", "layer_norm", "residual", "rms_norm", "upsample")
TRITON = {f"ops.{name}" for name in FAMILIES}

# From the ground up: a module imports its own layer and those below it.
LAYERS = [
    {
        "schedule_base",
        "schedule_from_callable",
        "noise_schedule",
        "schedule_from_config",
        "prediction",
        "grid_nodes",
        "time_grid",
        "combination",
        "ops.table",
        "ops",
    },
    {"plan", "plan_text", "plan_builder"},
    {"solvers"},
    {"compiler", "_native", "ops.library", "ops.noise", "ops.stage", "ops.triton_ops", "ops.measured", *TRITON},
    {"noise_source", "conditions", "references"},
    {"state"},
    {"loop", "sampler", "fake_cuda", "graph", "optimize", "models"},
    {"cli", "info", "adapters", "engine", "procedures"},
]
TORCH_FREE = {
    "combination",
    "compiler",
    "plan",
    "plan_text",
    "plan_builder",
    "solvers",
    "noise_schedule",
    "prediction",
    "time_grid",
    "ops.table",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the leading "pydiff."; the package itself is ""."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(tree: ast.AST, *, at_top: bool = False) -> set[str]:
    """Modules that code imports, but for type checkers alone; at_top: while the module is loaded."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            found |= imports(node, at_top=at_top)
    return found


def inside(names: set[str]) -> set[str]:
    """Of imported names, the package's own modules."""
    return {n.removeprefix("pydiff.") for n in names if n.startswith("pydiff.")} & set(modules())


def layer(name: str) -> int | None:
    """Where a module stands: at its own entry, or that of what it is part of (solvers.euler, cli_sample)."""
    entries = {entry: k for k, names in enumerate(LAYERS) for entry in names}
    homes = [e for e in entries if name == e or name.startswith((e + ".", e + "_"))]
    return entries[max(homes, key=len)] if homes else None


def parse(name: str) -> ast.AST:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


MODULES = sorted(n for n in modules() if n and n != "__main__")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name) -> None:
    here = layer(name)
    assert here is not None, f"pydiff.{name} has no layer yet: give it one in {Path(__file__).name}"
    for target in inside(imports(parse(name))):
        assert layer(target) is not None and layer(target) <= here, f"pydiff.{name} imports pydiff.{target} above it"


def test_a_wrong_import_would_be_seen() -> None:
    assert layer("plan") < layer("sampler") and layer("solvers.euler") < layer("ops.stage")
    wrong = ast.parse("def f():\n    from pydiff.ops import stage\n    import pydiff.sampler\n")
    assert inside(imports(wrong)) == {"ops", "ops.stage", "sampler"} and inside(imports(wrong, at_top=True)) == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n in TORCH_FREE or n.split(".")[0] in TORCH_FREE])
def test_what_compiles_plans_names_no_backend(name) -> None:
    names = imports(parse(name))
    assert not {n for n in names if n.split(".")[0] in ("torch", "triton", "jax")}
    assert inside(names) & {m for m in modules() if m.startswith("ops")} <= {"ops", "ops.table"}
    assert "_native" not in inside(names)


def test_loading_makes_no_circle() -> None:
    edges = {name: inside(imports(parse(name), at_top=True)) - {name} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join((*path, name))}"
        if name not in done:
            for target in edges[name]:
                if not name.startswith(target + ".") and not target.startswith(name + "."):  # a package and its modules
                    visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is not importable here")
sys.meta_path.insert(0, Refuse())
import pydiff, pydiff.solvers, pydiff.compiler
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
