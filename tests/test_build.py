"""The build: what is compiled and packaged, that it degrades instead of failing, that the CUDA code compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import torch

import pydiff
from pydiff.ops import native

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def python(code: str, **env: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(target: Path, **env: str) -> tuple[list[str], str]:
    """Run setup.py's build of the extension; the modules it left, and what it printed."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", target, "--build-temp", target / "temp"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [path.name for path in target.glob("pydiff/_C*")], done.stdout + done.stderr


def test_torch_is_no_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"requires = \[(.*?)\]", text)
    assert requires and "torch" not in requires.group(1)
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_no_cxx_source_includes_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources and not [path for path in sources if re.search(r"#include .*(torch|ATen|c10)/", path.read_text())]


def test_without_a_compiler_the_build_ends_with_one_line(tmp_path):
    modules, printed = build(tmp_path, CXX="/bin/false", PYDIFF_CUDA="0")
    assert modules == []
    assert len([line for line in printed.splitlines() if line.startswith("pydiff:")]) == 1
    assert "building without compiled code" in printed


def test_without_pybind11_the_build_ends_with_one_line_too(tmp_path):
    missing(tmp_path / "fake", "pybind11")
    modules, printed = build(tmp_path / "out", PYDIFF_CUDA="0", PYTHONPATH=str(tmp_path / "fake"))
    assert modules == []
    assert len([line for line in printed.splitlines() if line.startswith("pydiff:")]) == 1
    assert "building without compiled code" in printed and "No module named 'pybind11'" in printed


def missing(folder: Path, *names: str) -> None:
    """Make a folder that hides these packages if it stands first on the path."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Message, Path]:
    """setup.py's steps that need no compiler, without what they may not need: the metadata, and what is installed."""
    pytest.importorskip("setuptools", minversion="77")
    target = tmp_path_factory.mktemp("packaged")
    missing(target / "fake", "torch", "numpy", "pybind11")
    (target / "info").mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", target / "info"]
    command += ["build_py", "--build-lib", target / "lib"]
    env = {**os.environ, "PYTHONPATH": str(target / "fake")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (target / "info" / "pydiff_sampler.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    return message_from_string(text), target / "lib" / "pydiff"


def test_what_is_packaged(packaged):
    _, lib = packaged
    files = {str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()}
    assert {"py.typed", "models/weights/mnist_unet.safetensors", "kernels/group_norm.py", "cli/main.py"} <= files
    sources = {str(path.relative_to(ROOT / "pydiff")) for path in (ROOT / "pydiff").rglob("*.py")}
    assert {name for name in files if name.endswith(".py") and not name.startswith("kernels/")} == sources


def test_the_metadata_are_complete(packaged):
    metadata, _ = packaged
    assert metadata["Version"] == pydiff.__version__
    assert metadata["Name"] == "pydiff-sampler" and metadata["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/pydiff/pydiff") for url in urls.values())
    oldest = metadata["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in metadata.get_all("Classifier")
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_readme_of_the_package_has_links_that_work_anywhere(packaged):
    metadata, _ = packaged
    assert metadata["Description-Content-Type"] == "text/markdown"
    pattern = r"(!?)\[[^][]*\]\(([^()\s]+)\)"
    here = re.findall(pattern, (ROOT / "README.md").read_text(encoding="utf-8"))
    there = re.findall(pattern, metadata.get_payload())
    assert len(there) == len(here) > 10 and {"!", ""} == {mark for mark, _ in there}
    for (mark, relative), (_, absolute) in zip(here, there):
        page = "https://github.com/pydiff/pydiff/" + ("raw/main/" if mark else "blob/main/")
        assert absolute == relative if ":" in relative else absolute == page + relative


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree, of which nothing was ever installed."""
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "pydiff", tmp_path / "tree" / "pydiff", ignore=ignored)
    shutil.copy(ROOT / "setup.py", tmp_path / "tree")
    return tmp_path / "tree"


def in_the_tree(tree: Path, code: str, path: list[str]) -> subprocess.CompletedProcess[str]:
    """Python there, which finds the packages in `path` but nothing that an editable installation says."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=tree, env=env, capture_output=True, text=True)


def test_a_tree_that_is_not_installed_works_and_says_so(tree):
    code = """
import importlib.util, pydiff, torch
assert importlib.util.find_spec("pydiff.kernels") is None and importlib.util.find_spec("pydiff._C") is None
model = pydiff.optimize(pydiff.load_model("mnist"))
assert pydiff.sample(model, shape=(1, 1, 28, 28), steps=1, seed=0).isfinite().all()
from pydiff.ops import triton_ops
triton_ops.capability = lambda device: (9, 0)
triton_ops.has_triton = lambda: True
print(triton_ops.available("group_norm", torch.device("cuda")))
print(pydiff.__file__)
"""
    done = in_the_tree(tree, code, [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))])
    assert done.returncode == 0, done.stderr
    remedy = f"this is pydiff's source tree: run `pip install -e .` in {tree}"
    assert "pydiff.stage runs in plain PyTorch on cpu, slower than it could: pydiff._C cannot" in done.stderr
    assert done.stderr.count(remedy) == 2  # for the noise and for the stage
    refused, file = done.stdout.splitlines()
    assert "False" in refused and "pydiff.kernels is not installed" in refused and remedy in refused
    assert Path(file).parent == tree / "pydiff"


def test_a_tree_without_what_it_needs_says_how_to_get_it(tree):
    done = in_the_tree(tree, "import pydiff; print(pydiff.__version__); pydiff.sample", [])
    assert done.stdout.strip() == pydiff.__version__
    last = done.stderr.strip().splitlines()[-1]
    assert "No module named" in last and "`pip install -e .`" in last and str(tree) in last


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_failing_nvcc_costs_only_cuda(tmp_path):
    script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    compiler = script(tmp_path / "c++", 'while [ "$1" != -o ]; do shift; done; echo > "$2"')
    modules, printed = build(tmp_path / "out", CUDA_HOME=str(tmp_path / "cuda"), PYDIFF_CUDA="", CXX=str(compiler))
    assert len(modules) == 1
    assert "building without CUDA" in printed and "without compiled code" not in printed


def test_cuda_can_be_demanded(tmp_path):
    script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    env = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "PYDIFF_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    assert subprocess.run(command, capture_output=True, env=env, cwd=ROOT).returncode != 0


def test_the_environment_turns_compiled_code_off():
    code = """
import torch
from pydiff.ops import native
print(*[native.available(op, torch.device("cpu")) for op in ("stage", "noise")], sep="\\n")
"""
    off = python(code, PYDIFF_NATIVE="0").splitlines()
    assert all("False" in line and "PYDIFF_NATIVE=0" in line for line in off)
    if native.module is not None:
        one = python(code, PYDIFF_NATIVE="1", PYDIFF_DISABLE="stage").splitlines()
        assert "False" in one[0] and "True" in one[1]


@pytest.mark.skipif(native.module is None, reason="no compiled code")
def test_the_instruction_set_can_be_chosen_and_is_reported():
    code = "from pydiff.ops import native; print(native.build_info()['isa'])"
    for isa in native.build_info()["isas"]:
        assert python(code, PYDIFF_CPU_ISA=isa) == isa


def test_every_reason_is_a_sentence_for_the_user():
    fast, reason = native.available("stage", torch.device("mps"))
    assert not fast and (("mps" in reason) or native.module is None)


@pytest.mark.skipif(not hasattr(os, "fork") or native.module is None, reason="no fork, or no compiled code")
@pytest.mark.parametrize("openmp", ["openmp", "own"])
def test_a_forked_child_can_use_threads(openmp):
    """The parent's worker threads do not exist in the child; work there must neither wait for them nor change."""
    code = f"""
import os, signal, torch
from pydiff.ops.noise import normal
signal.alarm(60)
torch.set_num_threads(3)
seeds = torch.arange(8)
if {openmp == "openmp"}:
    expected = normal(seeds, 0, (40_000,))
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    torch.set_num_threads(3)
    once, again = normal(seeds, 0, (40_000,)), normal(seeds, 0, (40_000,))
    torch.set_num_threads(1)  # torch's own operations would wait for the parent's threads
    os._exit(0 if torch.equal(once, again) and bool(once.isfinite().all()) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert python(code) == "0"


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]
)
def test_the_cuda_kernels_compile_without_spills(arch, tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", target, "-c", source]
        command += ["-o", tmp_path / "out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(kernels) == (4 if source.stem == "stage" else 1), done.stderr
        assert all(numbers == ("0", "0", "0") for numbers in kernels), done.stderr
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert max(registers) <= 255 and min(registers) <= 85, registers
