"""The command line: what it prints, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pydiff
from pydiff.cli import common, drawing, main, solvers
from pydiff.cli import plan as plan_command
from pydiff.models import UNet, save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"channels": (8, 16, 16), "blocks": (1, 1, 1), "embedding_dim": 16, "head_dim": 8, "groups": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small untrained network: the command line does not care what the picture shows."""
    torch.manual_seed(0)
    net = UNet(**SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_model(net, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main.main([str(a) for a in argv])
    return status, *capsys.readouterr()


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_torch_is_not_needed_for_what_prints_tables():
    blocked = "import sys; sys.modules['torch'] = None; from pydiff.cli.main import main; "
    commands = [
        ["--version"],
        ["--help"],
        ["solvers"],
        ["grids"],
        ["plan", "unipc", "--steps", "3"],
        ["plan", "dimm"],
        ["sample", "--out", "x.nothing"],
    ]
    done = run_python(f"{blocked} print([main(argv) for argv in {commands}])")
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 2, 2]", done.stderr
    control = run_python(f"{blocked} main(['info'])")  # needs torch, and shows that it was blocked
    assert control.returncode != 0 and "torch" in control.stderr


def test_a_closed_pipe_is_no_error():
    reader = "import sys; sys.stdin.readline()"
    command = f'"{sys.executable}" -m pydiff plan ddim --steps 2000 | "{sys.executable}" -c "{reader}"'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"pydiff {pydiff.__version__}\n", "")
    status, out, _ = run(capsys)
    assert status == 0 and "sample" in out and "solvers" in out
    status, out, _ = run(capsys, "sample", "--help")
    assert status == 0 and "every class" in out and f"default: {common.DEFAULT_GUIDANCE:g}" in out


def test_solvers_lists_the_registry(capsys):
    status, out, err = run(capsys, "solvers")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].strip()}
    for solver in pydiff.list_solvers():
        line = lines[solver.name]
        kind = "stochastic" if solver.stochastic else "deterministic"
        assert solver.paper in line and solver.calls in line and kind in line
        assert line.split()[1] == str(solver.order_of())
        assert all(f"{name}={default}" in out for name, default in solver.options.items())


def test_grids_lists_every_grid(capsys):
    status, out, _ = run(capsys, "grids")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines() if line[0] != " "} == set(pydiff.list_grids())
    assert "rho=7.0" in out and "clean_follows" not in out


@pytest.mark.parametrize("schedule", plan_command.SCHEDULES)
def test_plan_prints_and_saves_the_plan(capsys, folder, schedule):
    argv = ["plan", "dpmpp_2m", "--steps", 5, "--schedule", schedule, "--json", "p.json"]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    prediction = "flow_prediction" if schedule == "flow" else "epsilon"
    plan = pydiff.make_plan("dpmpp_2m", plan_command.make_schedule(schedule), 5, prediction=prediction)
    assert out == f"{plan}\nsaved to p.json\n"
    assert pydiff.Plan.load("p.json") == plan


def test_plan_takes_options_of_the_type_of_their_default(capsys):
    options = ["order=3", "corrector=false", "lower_order_final=true", "variant=bh1"]
    argv = [word for option in options for word in ("--option", option)]
    status, out, _ = run(
        capsys,
        "plan",
        "unipc",
        "--steps",
        6,
        *argv,
        "--grid",
        "karras",
        "--grid-option",
        "rho=5",
        "--prediction",
        "v_prediction",
    )
    plan = pydiff.make_plan(
        "unipc",
        steps=6,
        order=3,
        corrector=False,
        lower_order_final=True,
        variant="bh1",
        grid="karras",
        grid_options={"rho": 5.0},
        prediction="v_prediction",
    )
    assert status == 0 and out == f"{plan}\n"


def test_sample_writes_the_samples_and_reports(capsys, folder, weights):
    argv = ["--solver", "dpmpp_2m", "--steps", 3, "--n", 7, "--seed", 5, "--class", "3,1", "--guidance", 1.5]
    status, out, err = run(capsys, "sample", "--model", weights, *argv, "--out", "x.png")
    assert status == 0 and "3/3" in err
    assert [p.name for p in folder.iterdir()] == ["x.png"]
    picture = np.array(Image.open("x.png"))
    assert picture.shape == (3 * 28, 3 * 28) and picture.dtype == np.uint8
    assert (picture[56:, 28:] == 0).all()
    x = pydiff.sample(
        pydiff.load_model(weights),
        (7, 1, 28, 28),
        steps=3,
        seed=5,
        guidance_scale=1.5,
        cond={"labels": torch.tensor([3, 1, 3, 1, 3, 1, 3])},
        uncond={"labels": 10},
    )
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().numpy()
    cells = picture.reshape(3, 28, 3, 28).swapaxes(1, 2).reshape(9, 28, 28)[:7]
    assert np.abs(cells - expected[:, 0]).max() <= 1
    lines = out.splitlines()
    assert lines[0] == "x.png: 7 samples, 3 a row, class 3,1, seed 5"
    assert "dpmpp_2m, 3 steps" in lines[1] and "guidance 1.5" in lines[1]
    assert lines[2].split() == ["model", "calls", "3", "(3", "in", "the", "plan)"]
    assert "samples/s" in lines[3]


def test_batches_do_not_change_the_picture_and_calls_are_counted(capsys, folder, weights):
    base = ["sample", "--model", weights, "--solver", "heun", "--steps", 2, "--n", 5, "--guidance", 1]
    assert run(capsys, *base, "--seed", 1, "--out", "a.png", "--quiet") == (0, "", "")
    _, out, _ = run(capsys, *base, "--seed", 1, "--out", "b.png", "--batch", 2)
    stages = len(pydiff.make_plan("heun", pydiff.VPCosine(), 2))
    assert f"model calls  {3 * stages} ({stages} in the plan, times 3 batches)" in out
    run(capsys, *base, "--seed", 2, "--out", "c.png")
    a, b, c = (np.array(Image.open(f"{name}.png")).astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).max() > 1


def test_without_a_seed_a_new_one_is_taken_and_printed(capsys, folder, weights):
    base = ["sample", "--model", weights, "--steps", 1, "--n", 1, "--out", "a.png"]
    seeds = {run(capsys, *base)[1].splitlines()[0].split("seed ")[1] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    "text, n, labels, guidance",
    [
        ("all", 12, [*range(10), 0, 1], common.DEFAULT_GUIDANCE),
        ("3", 2, [3, 3], common.DEFAULT_GUIDANCE),
        ("4, 2", 3, [4, 2, 4], common.DEFAULT_GUIDANCE),
        ("none", 2, [10, 10], 1.0),
    ],
)
def test_classes(text, n, labels, guidance):
    args = main.build_parser().parse_args(["sample", "--out", "x.png", "--class", text, "--n", str(n)])
    got, scale = drawing.choose_labels(args, UNet)
    assert got.tolist() == labels and got.dtype == torch.int64 and scale == guidance


@pytest.mark.parametrize("suffix", sorted(common.PICTURES))
def test_encode_lays_samples_out_in_rows(suffix, folder):
    images = torch.stack([torch.full((3, 4, 6), 40 * k, dtype=torch.uint8) for k in range(5)])
    Path(f"x{suffix}").write_bytes(drawing.encode(images, 3, 2, suffix))
    page = np.array(Image.open(f"x{suffix}").convert("RGB")).astype(int)
    assert page.shape == (16, 36, 3)
    expected = np.array([[0, 40, 80], [120, 160, 0]])
    assert np.abs(page[4::8, 6::12].mean(2) - expected).max() <= 20  # JPEG is not exact


BAD = [
    (["--n", "0"], ["--n", "'0'", "at least 1"]),
    (["--n", "-3"], ["--n", "'-3'", "at least 1"]),
    (["--steps", "x"], ["--steps", "'x'", "integer"]),
    (["--guidance", "inf"], ["--guidance", "'inf'", "finite"]),
    (["--guidance", "3", "--class", "none"], ["--guidance 3", "--class none"]),
    (["--solver", "eulr"], ["'eulr'", "did you mean 'euler'"]),
    (["--grid", "karas"], ["'karas'", "did you mean 'karras'"]),
    (["--grid", "trailing"], ["'trailing'", "'uniform'"]),
    (["--option", "solver_typ=heun"], ["--option solver_typ=heun", "did you mean 'solver_type'"]),
    (["--option", "solver_type"], ["--option solver_type", "KEY=VALUE"]),
    (["--option", "solver_type=cubic"], ["'cubic'", "'midpoint'"]),
    (["--solver", "ddim", "--option", "eta=much"], ["eta=much", "a number", "0.0"]),
    (["--solver", "unipc", "--option", "order=2.5"], ["order=2.5", "an integer"]),
    (["--solver", "unipc", "--option", "corrector=maybe"], ["corrector=maybe", "true or false"]),
    (["--grid-option", "rho=5"], ["--grid-option rho=5", "there are none"]),
    (["--class", "10"], ["--class 10", "0 to 9"]),
    (["--class", "three"], ["--class three", "0 to 9"]),
    (["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    (["--device", "toaster"], ["--device toaster", "cuda"]),
    (["--seed", str(2**63 - 1)], ["--seed", "64 bits"]),
    (["--out", "x.xyz"], ["--out x.xyz", "'.xyz'", ".png"]),
    (["--out", "."], ["--out .", ".png"]),
    (["--out", "nowhere/x.png"], ["--out nowhere/x.png", "no folder nowhere"]),
    (["--out", "x" * 300 + ".png"], ["cannot write", "another folder or name"]),
    (["--model", "minst"], ["--model minst", "did you mean 'mnist'"]),
    (["--model", "none.safetensors"], ["--model none.safetensors", "no such file"]),
    (["--colour"], ["--colour", "--help"]),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(argv)[:30] for argv, _ in BAD])
def test_bad_input_is_answered_on_one_line(capsys, folder, weights, argv, words):
    status, out, err = run(capsys, "sample", "--model", weights, "--n", 2, "--out", "x.png", *argv)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("pydiff: error: ")
    assert all(word in err for word in words), err
    assert list(folder.iterdir()) == []


def test_an_unknown_command_is_named(capsys):
    status, _, err = run(capsys, "sampel")
    assert status == 2 and "'sampel'" in err and "sample" in err and err.count("\n") == 1


def test_a_truncated_model_is_refused(capsys, folder, weights):
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    status, _, err = run(capsys, "sample", "--model", "cut.safetensors", "--out", "x.png")
    assert status == 2 and "cut.safetensors" in err and "truncated" in err and err.count("\n") == 1
    assert not (folder / "x.png").exists()


def test_a_model_that_returns_nan_leaves_no_picture(capsys, folder, weights, monkeypatch):
    real = pydiff.models.load_model

    def broken(*args):
        net = real(*args)
        net.conv_out.bias.fill_(float("nan"))
        return net

    monkeypatch.setattr(pydiff.models, "load_model", broken)
    status, _, err = run(capsys, "sample", "--model", weights, "--n", 1, "--out", "x.png", "--quiet")
    assert status == 2 and "NaN" in err and "stage 0" in err and list(folder.iterdir()) == []


def test_a_failed_write_leaves_the_old_picture(capsys, folder, weights, monkeypatch):
    Path("x.png").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    argv = ["sample", "--model", weights, "--steps", 1, "--n", 1, "--out", "x.png", "--quiet"]
    status, _, err = run(capsys, *argv)
    assert status == 2 and "No space left" in err and err.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["x.png"] and Path("x.png").read_bytes() == b"old"


def test_an_interrupt_ends_quietly(capsys, folder, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(solvers, "run", interrupted)
    assert run(capsys, "solvers")[0] == 130
