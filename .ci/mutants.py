"""Mutation testing: plants faults one at a time, and lists those that no test notices.

    .ci/mutants --sample 20 --seed 0 --jobs 2 --out mutants.jsonl      # every Python file, and the two headers
    .ci/mutants --only pydiff/plans --out mutants.jsonl                # what is in the file already is not run again,
                                                                       # unless the source has changed since
    .ci/mutants --again --out mutants.jsonl                            # but for those that survived
    .ci/mutants --table --out mutants.jsonl                            # the results for people

Into the line of one that survived we write "now", the test that has noticed it since, or "why" none does.

Every mutant is applied in a scratch copy of the tree, and runs the tests that can see it, the fastest first, up to the
first failure; one that runs past the time limit is noticed too. A process that has imported torch forks for each, so
that a mutant costs its tests and no start.

Why no library: mutmut 3 leaves out every decorated function, which here is every solver and every grid, changes the
texts of errors, and takes no samples; cosmic-ray starts Python and torch anew for every mutant, and takes none either.
Neither knows of C++.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from planting import Mutant, header_mutants, python_mutants  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "__pycache__", "build", ".venv", ".hypothesis", "*.egg-info", "benchmarks", "examples", ".*_cache")
HEADERS = ("csrc/stage.h", "csrc/philox.h")
FOLDERS = ("pydiff/schedules", "pydiff/plans", "pydiff/solvers", "pydiff/run")
SOLVERS = "tests/solvers/test_"
# The tests of the longest prefix of a file's path, those that take least and see most first.
TESTS = {
    "pydiff/schedules": ["tests/schedules", "tests/plans", f"{SOLVERS}compiler.py", "tests/test_bad_input.py"],
    "pydiff/schedules/suggestion.py": ["tests/test_first_hour.py", "tests/test_bad_input.py"],
    "pydiff/schedules/from_config.py": [
        *("tests/schedules/test_time_grid.py", "tests/test_first_hour.py", f"{SOLVERS}against_diffusers.py")
    ],
    "pydiff/plans": ["tests/plans", f"{SOLVERS}compiler.py", f"{SOLVERS}identities.py", "tests/test_bad_input.py"],
    "pydiff/solvers": [
        *(f"{SOLVERS}{name}.py" for name in ("option_ranges", "compiler", "identities", "pure_noise")),
        *("tests/test_bad_input.py", "tests/test_first_hour.py", "tests/cli/test_solvers.py", "tests/cli/test_plan.py"),
        "tests/plans/test_plan.py",
        *(f"{SOLVERS}{name}.py" for name in ("orders", "stochastic", "against_diffusers", "against_k_diffusion")),
    ],
    "pydiff/run": [
        *("tests/run", "tests/test_sampler.py", "tests/test_bad_input.py", "tests/test_first_hour.py"),
        *("tests/test_sampler_model.py", "tests/optimize/test_bundled.py", "tests/graph/test_captured.py"),
    ],
    "pydiff/graph/guards.py": [f"tests/graph/test_{name}.py" for name in ("guard_reach", "guards")],
    "csrc/philox.h": ["tests/ops/test_noise.py", "tests/ops/test_stage.py"],
    "csrc/stage.h": ["tests/ops/test_stage.py", "tests/ops/test_noise.py"],
}


def tests_of(file: str) -> list[str]:
    return TESTS[max((prefix for prefix in TESTS if file.startswith(prefix)), key=len)]


def digest(file: str) -> str:
    """Of a file's text: what was found out about another text says nothing."""
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


def files(only: str) -> list[str]:
    found = [str(p.relative_to(ROOT)) for folder in FOLDERS for p in sorted(ROOT.glob(f"{folder}/*.py"))]
    found += ["pydiff/graph/guards.py", *HEADERS]
    return [f for f in found if f.startswith(only) and not f.endswith("__init__.py")]


def sample(file: str, count: int, seed: int) -> list[Mutant]:
    text = (ROOT / file).read_text()
    found = header_mutants(text) if file in HEADERS else python_mutants(text)
    return sorted(random.Random(f"{seed}:{file}").sample(found, min(count, len(found))))


class Scratch:
    """A copy of the tree in which mutants are tried."""

    def __init__(self, where: Path, limit: float) -> None:
        self.root, self.limit = where, limit
        shutil.copytree(ROOT, where, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if not (where / "pydiff/kernels").exists():
            (where / "pydiff/kernels").symlink_to("../kernels")
        self.objects: dict[str, list[str]] = {}
        self.sound = b""  # the library without a fault

    def try_one(self, file: str, mutant: Mutant | None, tests: list[str]) -> tuple[str, str]:
        """How a file with that fault fares: "killed", "timeout", "survived" or "broken", and the test that failed."""
        path, held = self.root / file, (self.root / file).read_text()
        try:
            if mutant is not None:
                path.write_text(mutant.applied(held))
            if file in HEADERS and not self.build(file, mutant):
                return "broken", ""
            return self.run(tests)
        finally:
            path.write_text(held)

    def run(self, tests: list[str]) -> tuple[str, str]:
        output = self.root / "output.txt"
        child = os.fork()
        if child == 0:
            os.setsid()
            run_tests(self.root, tests, output)
        deadline = time.monotonic() + self.limit
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout", ""
            time.sleep(0.02)
        failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", output.read_text(errors="replace"), re.MULTILINE)
        return "survived" if status == 0 else "killed", failed.group(1) if failed else ""

    def build(self, file: str = "", mutant: Mutant | None = None) -> bool:
        """Compile what a header is part of: the loops for the baseline and for AVX2, and Python's door to them."""
        if not self.objects:
            self.objects = self.commands()
        library = self.root / self.objects["link"][-1]
        if self.sound and mutant is None:
            library.write_bytes(self.sound)
            return True
        code = self.root / HEADERS[0]
        functions = code.read_text().index("// Offset of element")  # the door uses what stands before them
        outside = file == HEADERS[1] or (mutant is not None and mutant.start > functions)
        wanted = [run for name, run in self.objects.items() if not (outside and name in ("bindings", "cpu/parallel"))]
        built = all(subprocess.call(run, cwd=self.root, stderr=subprocess.DEVNULL) == 0 for run in wanted)
        if mutant is None:
            self.sound = library.read_bytes()
        return built

    def commands(self) -> dict[str, list[str]]:
        """The commands of setup.py, optimised less, without CUDA and AVX-512."""
        import pybind11
        import setuptools

        source = self.root / "csrc/cpu/stage_cpu.cpp"
        source.write_text(source.read_text().replace("{&kAvx512Kernels, ", "{"))
        with mock.patch.object(setuptools, "setup"):
            flags = runpy.run_path(str(self.root / "setup.py"))
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        base = [*compiler, *flags["FLAGS"], "-O1", "-w", "-DPYDIFF_WITH_CUDA=0", '-DPYDIFF_CUDA_ARCHS=""']
        base += [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
        jobs = {name: [*base, "-c", f"csrc/{name}.cpp"] for name in ("bindings", "cpu/stage_cpu", "cpu/parallel")}
        for isa, extra in (("baseline", []), ("avx2", flags["AVX2"])):
            defines = [f"-DPYDIFF_KERNELS=k{isa.capitalize()}Kernels", f'-DPYDIFF_ISA="{isa}"']
            jobs[isa] = [*base, *flags["KERNEL_FLAGS"], *extra, *defines, "-c", "csrc/cpu/kernels.cpp"]
        jobs = {name: [*run, "-o", f"{Path(name).name}.o"] for name, run in jobs.items()}
        target = next((self.root / "pydiff").glob("_C.*"))
        link = [*compiler, "-shared", "-pthread", *(run[-1] for run in jobs.values()), "-o", f"pydiff/{target.name}"]
        return {**jobs, "link": link}


def run_tests(root: Path, tests: list[str], output: Path) -> None:
    """In a child process, which it ends: pytest on the scratch copy."""
    code = 3
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.chdir(root)
        sys.path[:] = [str(root), *(p for p in sys.path if p not in ("", str(ROOT)))]
        sys.dont_write_bytecode = True
        import hypothesis
        import pytest

        hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
        hypothesis.settings.load_profile("mutants")
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=no", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def warm_up() -> None:
    """Import what every child needs, and nothing of the package itself."""
    os.environ["TRITON_INTERPRET"] = "1"
    import diffusers
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import scipy.integrate  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            with contextlib.suppress(Exception):
                getattr(diffusers, name)


def work(job: int, todo: list[tuple[str, Mutant]], out: Path, limit: float) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        scratch = Scratch(Path(folder) / "tree", limit)
        sound = {""}
        if any(file in HEADERS for file, _ in todo):
            scratch.build()
        for file, mutant in todo:
            start = time.monotonic()
            result, by = scratch.try_one(file, mutant, tests_of(file))
            if by not in sound and scratch.try_one(file, None, [by])[0] != "survived":
                sys.exit(f"{by} fails without a fault:\n{(scratch.root / 'output.txt').read_text()[-3000:]}")
            sound.add(by)
            old = (ROOT / file).read_text()[mutant.start : mutant.end]
            line = {"file": file, **mutant._asdict(), "old": old, "result": result, "by": by}
            line |= {"seconds": round(time.monotonic() - start, 1), "source": digest(file)}
            with out.open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(f"[{job}] {file}:{mutant.line} {old[:50]!r} -> {mutant.new[:50]!r}: {result} {by}", flush=True)


def table(results: list[dict]) -> str:
    """What the run did not notice, and what of that nothing notices now: for the rest a line has the test, as "now"."""
    lines = ["| file | faults | not noticed in the run | not noticed now |", "|---|---|---|---|"]
    tried = [r for r in results if r["result"] != "broken"]
    survived = [r for r in tried if r["result"] == "survived"]
    left = [r for r in survived if "now" not in r]
    for file in [*dict.fromkeys(r["file"] for r in tried), "all"]:
        counts = (sum(file in (r["file"], "all") for r in some) for some in (tried, survived, left))
        lines.append(f"| {file} | {' | '.join(map(str, counts))} |")
    lines.append("")
    for r in left:
        old, new, why = (" ".join(r.get(k, "").split()) for k in ("old", "new", "why"))
        lines.append(f"- `{r['file']}:{r['line']}` `{old}` -> `{new}`: {why or 'no reason given'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=20, help="mutants of each file, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--limit", type=float, default=1200, help="seconds a mutant may take")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mutants.jsonl"),
        help="a line of JSON for each mutant; 'now' and 'why' are ours",
    )
    parser.add_argument("--again", action="store_true", help="try those that survived once more, and nothing else")
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    given = parser.parse_args()
    out = given.out.resolve()
    lines = out.read_text().splitlines() if out.exists() else []
    now = {file: digest(file) for file in files("")}
    found = [r for r in map(json.loads, lines) if r["source"] == now.get(r["file"])]
    results = {(r["file"], r["start"], r["end"], r["new"]): r for r in found}  # the last one counts
    if len(found) < len(lines):
        print(f"left out: {len(lines) - len(found)} results of what files held before", file=sys.stderr)
    if given.table:
        return print(table(sorted(results.values(), key=lambda r: (r["file"], r["start"]))))
    todo = [(f, m) for f in files(given.only) for m in sample(f, given.sample, given.seed)]
    if given.again:
        survived = [r for r in results.values() if r["result"] == "survived" and r["file"].startswith(given.only)]
        todo = [(r["file"], Mutant(r["line"], r["start"], r["end"], r["new"])) for r in survived]
    else:
        todo = [(f, m) for f, m in todo if (f, m.start, m.end, m.new) not in results]
    random.Random(given.seed).shuffle(todo)  # so that a run cut short is a smaller sample
    print(f"{len(todo)} mutants to try, {len(results)} done")
    warm_up()
    workers = []
    for job in range(given.jobs):
        child = os.fork()
        if child == 0:
            work(job, todo[job :: given.jobs], out, given.limit)
            sys.exit(0)
        workers.append(child)
    if any([os.waitpid(child, 0)[1] for child in workers]):  # a list, so that every one is waited for
        sys.exit(1)


if __name__ == "__main__":
    main()
