"""The command line as a whole: what needs no torch, how it ends, and what it says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pydiff
from pydiff.cli import sample, solvers

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_torch_is_not_needed_for_what_prints_tables():
    blocked = "import sys; sys.modules['torch'] = None; from pydiff.cli.main import main; "
    commands = [
        ["--version"],
        ["--help"],
        ["solvers"],
        ["solvers", "unipc"],
        ["grids"],
        ["grids", "karras"],
        ["plan", "unipc", "--steps", "3"],
        ["plan", "dimm"],
        ["solvers", "dimm"],
        ["sample", "--help"],
        ["sample", "--out", "x.nothing"],
        ["sample", "--out", "x.npz", "--columns", "3"],
        ["sample", "--out", "x.npz", "--solver", "dimm"],
        ["sample", "--out", "x.npz", "--seed", str(2**63)],
    ]
    done = run_python(f"{blocked} print([main(argv) for argv in {commands}])")
    assert done.stdout.splitlines()[-1] == str([0] * 7 + [2, 2, 0] + [2] * 4), done.stderr
    control = run_python(f"{blocked} main(['info'])")  # needs torch, and shows that it was blocked
    assert control.returncode != 0 and "torch" in control.stderr


def test_a_closed_pipe_is_no_error():
    reader = "import sys; sys.stdin.readline()"
    command = f'"{sys.executable}" -m pydiff plan ddim --steps 2000 | "{sys.executable}" -c "{reader}"'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_version_and_help(run):
    assert run("--version") == (0, f"pydiff {pydiff.__version__}\n", "")
    status, out, _ = run()
    assert status == 0 and "sample" in out and "solvers" in out
    status, out, _ = run("sample", "--help")
    assert status == 0 and "every class" in out and f"default: {sample.DEFAULT_GUIDANCE:g}" in out


def test_an_unknown_command_is_named(run):
    status, _, err = run("sampel")
    assert status == 2 and "'sampel'" in err and "sample" in err and err.count("\n") == 1


def test_an_interrupt_ends_quietly(run, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(solvers, "run", interrupted)
    assert run("solvers") == (130, "", "pydiff: interrupted\n")
