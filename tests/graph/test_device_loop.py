"""The loop that the GPU drives, without a GPU: when it is refused, what it decides, and the graph it builds.

The graph is built by the real code against a stand-in for the CUDA runtime (fake_cuda_graphs.cpp), which walks it as a
device would.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pydiff.graph.device_loop import DeviceLoop, can_use_device_loop
from pydiff.ops import native

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "while_graph.cu"
FAKE = Path(__file__).parent / "fake_cuda_graphs.cpp"
NVCC = shutil.which("nvcc")
CUDA = torch.device("cuda", 0)
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801  # cudaError_t


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------------------- when it is refused


def test_it_needs_a_cuda_device() -> None:
    possible, reason = can_use_device_loop(torch.device("cpu"))
    assert not possible and "cpu" in reason
    if not torch.cuda.is_available():
        assert can_use_device_loop(CUDA) == (False, "torch finds no CUDA device")


@pytest.mark.parametrize(
    "built, driver, reason",
    [(12030, 13000, "built with CUDA 12.3"), (13000, 12020, "driver supports CUDA 12.2"), (12040, 12040, "")],
)
def test_it_needs_cuda_12_4_twice(monkeypatch, built, driver, reason) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "available", lambda op, device: (True, ""))
    monkeypatch.setattr(native, "module", SimpleNamespace(cuda_versions=lambda: (built, driver)))
    possible, said = can_use_device_loop(CUDA)
    assert possible == (not reason) and reason in said
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)  # as before torch 2.8
    assert not can_use_device_loop(CUDA)[0]


def test_it_can_be_turned_off(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "disabled", frozenset(["device_loop"]))
    assert can_use_device_loop(CUDA) == (False, "PYDIFF_DISABLE names device_loop")


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"cursor": ints(0, 0).long()}, TypeError, "cursor must be torch.int32, got torch.int64"),
        ({"remaining": torch.ones(1)}, TypeError, "remaining must be torch.int32"),
        ({"cursor": ints(0, 0).view(2, 1)}, ValueError, r"cursor must have shape \[rows\], got \[2, 1\]"),
        ({"stop": ints(3)}, ValueError, r"stop must have shape \[2\], got \[1\]"),
        ({"remaining": ints(3, 3)}, ValueError, r"remaining must have shape \[1\]"),
        ({"stop": ints(3, 3).to("meta")}, ValueError, "stop must be on cpu, where cursor is, got meta"),
        ({"stop": ints(3, 3, 3, 3)[::2]}, ValueError, "stop must be contiguous"),
        ({}, native.Unsupported, "cpu"),
    ],
)
def test_bad_arguments(changed, error, message) -> None:
    tensors = {"cursor": ints(0, 0), "stop": ints(3, 3), "remaining": ints(1)} | changed
    with pytest.raises(error, match=message):
        DeviceLoop(None, **tensors)


# ---------------------------------------------------------------------------- what it decides


@pytest.mark.skipif(not hasattr(native.module, "while_decision"), reason="needs compiled code of this version")
@pytest.mark.parametrize("threads", [1, 32, 1024])
@pytest.mark.parametrize(
    "left, remaining",
    [([3, 7, 5], 100), ([3, 7, 5], 4), ([3, 7, 5], 0), ([3], -1), ([0, 0], 5), ([], 5), ([0] * 40 + [2], 5)],
)
def test_stages_run_until_all_rows_end_or_none_may_be_run(threads, left, remaining) -> None:
    cursor, stop = torch.arange(len(left), dtype=torch.int32), torch.arange(len(left), dtype=torch.int32) + ints(*left)
    may_run = ints(remaining)

    def decide(done: int) -> bool:
        addresses = cursor.data_ptr(), stop.data_ptr(), len(left), may_run.data_ptr()
        return native.module.while_decision(*addresses, done, threads)

    stages, go = 0, decide(0)
    while go:
        stages += 1
        cursor += (cursor < stop).int()
        go = decide(1)
    assert stages == max(0, min(remaining, max(left, default=0)))
    assert may_run.item() == remaining - stages


# ---------------------------------------------------------------------------- the graph it builds


def compile_with_fake(source: Path, target: Path) -> Path:
    """The graph's source with the stand-in for the CUDA runtime, as a program."""
    if NVCC is None:
        pytest.skip("no nvcc")
    release = re.search(r"release (\d+)\.", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)
    if release is None or int(release.group(1)) < 13:
        pytest.skip("the stand-in has the signatures of CUDA 13")
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command = [NVCC, "-std=c++17", "-arch=sm_90", "--cudart=none", *folders, source, FAKE, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compile_with_fake(SOURCE, tmp_path_factory.mktemp("loop") / "program")


def run(program: Path, *words: object) -> list[str]:
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def creation_is_clean(program: Path) -> bool:
    """Whether a failure of any call of the creation comes back, and leaves no graph and no error behind."""
    for call in range(100):
        lines = run(program, "fail", call)
        if len(lines) == 3:
            return call > 10  # as many calls as there are went wrong before
        error, live, last_error, held, _ = lines[0].split(maxsplit=4)
        if (int(error), int(live), int(last_error), int(held)) != (OUT_OF_MEMORY, 0, 0, 0):
            return False
    return False


def counts_are_right(program: Path) -> bool:
    first_and_second_launch = {
        (100, 3, 7, 5): ["7 93", "7 93"],
        (4, 3, 7, 5): ["4 0", "4 0"],
        (0, 3): ["0 0", "0 0"],
        (5, 0, 0): ["0 5", "0 5"],
        (5,): ["0 5", "0 5"],
    }
    return all(run(program, "run", *words) == [*lines, "0 1"] for words, lines in first_and_second_launch.items())


def test_a_launch_runs_as_many_stages_as_there_are(program) -> None:
    assert counts_are_right(program)


def test_a_failed_creation_leaves_nothing(program) -> None:
    assert creation_is_clean(program)


@pytest.mark.parametrize(
    "node, name",
    [
        (3, "host function"),
        (6, "wait for an event"),
        (7, "event record"),
        (10, "memory allocation"),
        (11, "memory release"),
        (13, "conditional node"),
        (8, "no kernel"),
    ],
)
def test_a_stage_that_cannot_loop_is_named(program, node, name) -> None:
    error, live, _, _, what = run(program, "node", node)[0].split(maxsplit=4)
    assert (int(error), int(live)) == (NOT_SUPPORTED, 0) and name in what


@pytest.mark.parametrize("node", [0, 1, 2, 5])
def test_kernels_copies_and_fills_can_loop(program, node) -> None:
    assert len(run(program, "node", node)) == 3


@pytest.mark.parametrize(
    "right, wrong, check",
    [
        ("graph, nullptr, loop, 0,", "graph, nullptr, loop, 1,", counts_are_right),
        ("if (error) while_graph_destroy(out);", "", creation_is_clean),
        ("if (error) cudaGetLastError();", "", creation_is_clean),
    ],
)
def test_a_wrong_graph_would_be_seen(tmp_path, right, wrong, check) -> None:
    text = SOURCE.read_text()
    assert right in text
    changed = tmp_path / SOURCE.name
    changed.write_text(text.replace(right, wrong))
    assert not check(compile_with_fake(changed, tmp_path / "program"))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_it_links_with_the_static_runtime_alone(tmp_path) -> None:
    """cudaGraphSetConditional needs neither relocatable device code nor CUDA's device runtime."""
    main = tmp_path / "main.cpp"
    main.write_text("""
        #include "cuda/launch.h"
        int main() {
          pydiff::WhileGraph graph;
          const char* what = "";
          return pydiff::while_graph_create(graph, nullptr, {}, 0, nullptr, what) != 0 && *what ? 0 : 1;
        }""")
    command = [NVCC, "-std=c++17", "-arch=sm_90", "--cudart=static", f"-I{ROOT / 'csrc'}", SOURCE, main]
    done = subprocess.run([*command, "-o", tmp_path / "program"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "program"], timeout=60).returncode == 0
