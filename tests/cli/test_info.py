"""The report of `python -m pydiff.info` and `pydiff info`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydiff
from pydiff.cli import info, main
from pydiff.ops import native


def test_it_runs_as_a_module_and_as_a_command(capsys):
    command, folder = [sys.executable, "-m", "pydiff.info"], Path(pydiff.__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert main.main(["info"]) == 0
    titles = ["versions", "processor", "compiled code", "CUDA", "operations"]
    for text in (done.stdout, capsys.readouterr().out):
        assert [line for line in text.splitlines() if line and not line.startswith(" ")] == titles


def test_versions_and_devices_are_named():
    text = info.report()
    for version in (pydiff.__version__, torch.__version__, sys.version.split()[0]):
        assert version in text
    assert "cuda:0" in text if torch.cuda.is_available() else "none that torch can use" in text


def test_every_operation_has_a_line_for_each_device():
    assert {"stage", "noise"} <= set(info.predicates())
    assert {"group_norm", "attention", "layer_norm", "linear_geglu"} <= set(info.triton_operations())
    names = [name for name, _ in info.operations()]
    listed = [*info.predicates(), *info.triton_operations()]
    assert names == [f"{op} on {kind}" for op in listed for kind in ("cpu", "cuda")]


def test_the_backend_is_what_the_operation_would_take():
    for name, predicate in info.predicates().items():
        fast, reason = predicate(torch.device("cpu"))
        line = dict(info.operations())[f"{name} on cpu"]
        assert line == ("compiled C++" if fast else f"plain PyTorch: {reason}")
        assert fast or reason


def test_a_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "no compiler was there")
    assert dict(info.compiled_code()) == {"pydiff._C": "none: no compiler was there"}
    assert dict(info.operations())["stage on cpu"] == "plain PyTorch: no compiler was there"


def test_a_triton_operation_says_why_it_is_not_used(monkeypatch):
    from pydiff.ops import triton_ops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_ops, "capability", lambda device: (9, 0))
    assert info._triton_backend("group_norm") == "Triton"
    monkeypatch.setattr(native, "disabled", frozenset({"stage", "group_norm"}))
    assert "PYDIFF_DISABLE" in info._triton_backend("group_norm")
    monkeypatch.setattr(triton_ops, "has_triton", lambda: False)
    assert "triton is not installed" in info._triton_backend("layer_norm")
    monkeypatch.setattr(triton_ops, "capability", lambda device: (7, 5))
    monkeypatch.setattr(triton_ops, "has_triton", lambda: True)
    assert "sm_75 is older" in info._triton_backend("layer_norm")


def test_a_disabled_operation_says_so(monkeypatch):
    monkeypatch.setattr(native, "disabled", frozenset({"noise"}))
    lines = dict(info.operations())
    assert "PYDIFF_DISABLE" in lines["noise on cpu"]
    assert "PYDIFF_DISABLE" not in lines["stage on cpu"]


def test_the_compiled_module_is_described():
    if native.module is None:
        pytest.skip("no compiled module here")
    lines = dict(info.compiled_code())
    assert Path(lines["pydiff._C"]).is_file()
    assert native.build_info()["isa"] in lines["CPU code"] and lines["compiler"] and lines["CUDA code"]


@pytest.mark.gpu
def test_the_gpu_and_its_backend_are_listed():
    lines = dict(info.cuda_devices())
    assert lines["driver"].startswith("supports CUDA") and "sm_" in lines["cuda:0"]
    for name, predicate in info.predicates().items():
        fast, reason = predicate(torch.device("cuda"))
        line = dict(info.operations())[f"{name} on cuda"]
        assert line == ("compiled CUDA" if fast else f"plain PyTorch: {reason}")
