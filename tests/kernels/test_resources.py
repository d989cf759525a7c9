"""No kernel spills, and what says so would notice one that did. Nothing here needs a GPU.

Kernels are compiled in processes of their own: in this one Triton interprets them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydiff.kernels import resources
from pydiff.kernels.resources import Resources, blocks_per_multiprocessor

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def compiled(tmp_path: Path, *words: str) -> list[dict]:
    done = run("-m", "pydiff.kernels.resources", "--out", str(tmp_path / "table.json"), *words)
    assert done.returncode in (0, 1), done.stderr
    return json.loads((tmp_path / "table.json").read_text())["rows"]


def check(rows: list[dict]) -> None:
    bad = [
        (r["arch"], r["kernel"], r["case"], r)
        for r in rows
        if r["error"] or r["stack_bytes"] or r["local_bytes"] or not r["blocks_per_sm"]
    ]
    assert rows and not bad, bad


@needs_triton
def test_the_first_cases_of_every_kernel_compile_for_hopper_without_spilling(tmp_path):
    rows = compiled(tmp_path, "--arch", "90", "--first", "2")
    check(rows)
    assert {r["kernel"] for r in rows} == set(known_modules())
    assert all(0 < r["registers"] <= 255 and 0 < r["occupancy"] <= 1 for r in rows)


@needs_triton
@pytest.mark.slow
def test_every_case_compiles_for_every_architecture_without_spilling(tmp_path):
    rows = compiled(tmp_path)
    check(rows)
    assert {r["arch"] for r in rows} == set(resources.ARCHITECTURES)


def known_modules() -> list[str]:
    files = [p for p in (ROOT / "kernels").glob("*.py") if "def compile_cases(" in p.read_text(encoding="utf-8")]
    return [p.stem for p in files]


SPILL = """
from pydiff.kernels.resources import inspect_case
from tests.kernels.wide import case
for options in ({}, {"maxnreg": 32}):
    found = inspect_case("wide", case(), 90, **options)
    print(found.spills, found.registers, found.stack_bytes + found.local_bytes, found.error)
print(inspect_case("wide", case()._replace(signature={"x": "*fp32", "y": "i1"}), 90).error)
"""


@needs_triton
def test_a_kernel_that_spills_or_does_not_compile_is_reported():
    done = run("-c", SPILL)
    roomy, tight, broken = done.stdout.splitlines()
    assert roomy.split()[0] == "False" and int(roomy.split()[1]) > 100, done.stderr
    assert tight.split()[0] == "True" and int(tight.split()[2]) > 0, done.stderr
    assert broken, done.stderr


def test_the_exit_code_tells_of_spills_and_errors(monkeypatch, capsys):
    good = Resources("k", "fits", 90, 4, 32, 0, 0, 0, 16, 1.0)
    monkeypatch.setattr(resources, "modules", lambda: ["k"])
    for rows, code, said in (
        ([good], 0, ""),
        ([good, Resources("k", "wide", 90, 4, 255, 0, 8, 0, 2, 0.1)], 1, "sm_90 k wide: spills"),
        ([good, Resources("k", "big", 90, 4, 32, 300_000)], 1, "sm_90 k big: does not fit"),
        ([good, Resources("k", "odd", 80, 4, error="ValueError: no")], 1, "sm_80 k odd: ValueError: no"),
    ):
        monkeypatch.setattr(resources, "inspect_all", lambda *a, rows=rows: rows)
        assert resources.main(["--arch", "90"]) == code
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resources.main(["--kernel", "nothing"])
    assert "'nothing' is not one of k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks",
    [
        (90, 32, 0, 4, 16),  # threads: 2048 / 128
        (90, 16, 0, 1, 32),  # the most blocks there can be
        (90, 64, 0, 8, 4),  # registers: 65536 / (64 * 256)
        (90, 65, 0, 8, 3),  # 65 are taken as 72
        (90, 255, 0, 4, 2),  # 256 a thread: 8 warps
        (90, 40, 0, 2, 24),  # 51 warps would fit, 48 of them evenly over the four parts
        (90, 32, 100 << 10, 4, 2),  # shared memory: 228 KB less 1 KB a block
        (80, 32, 100 << 10, 4, 1),  # 164 KB
        (80, 32, 54 << 10, 4, 2),  # 3 * 54 KB would fit, 3 * 55 KB do not
        (100, 32, 227 << 10, 4, 1),
        (90, 255, 0, 16, 0),  # more registers than there are
    ],
)
def test_occupancy_is_what_the_scarcest_resource_leaves(arch, registers, shared, warps, blocks):
    assert blocks_per_multiprocessor(arch, registers, shared, warps) == blocks


def test_the_table_has_a_line_for_every_case():
    rows = [Resources("group_norm", "small", 90, 4, 40, 1024, 0, 0, 12, 0.75), Resources("k", "odd", 80, 4, error="no")]
    lines = resources.table(rows).splitlines()
    assert len(lines) == 3 and "75%" in lines[1] and lines[2].endswith("no")
