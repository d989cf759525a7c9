"""`pydiff sample`: what it draws, what it prints, and what it says when something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pydiff
from pydiff.cli import main, picture, sample
from pydiff.cli.common import UsageError
from pydiff.models import UNet


def test_sample_writes_the_samples_and_reports(run, folder, weights):
    argv = ["--solver", "dpmpp_2m", "--steps", 3, "--n", 7, "--seed", 5, "--class", "3,1", "--guidance", 1.5]
    status, out, err = run("sample", "--model", weights, *argv, "--out", "x.png")
    assert status == 0 and "3/3" in err
    assert [p.name for p in folder.iterdir()] == ["x.png"]
    page = np.array(Image.open("x.png"))
    assert page.shape == (3 * 28, 3 * 28) and page.dtype == np.uint8
    assert (page[56:, 28:] == 0).all()
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
    cells = page.reshape(3, 28, 3, 28).swapaxes(1, 2).reshape(9, 28, 28)[:7]
    assert np.abs(cells - expected[:, 0]).max() <= 1
    lines = out.splitlines()
    assert lines[0] == "x.png: 7 samples, 3 a row, class 3,1, seed 5"
    assert "dpmpp_2m, 3 steps" in lines[1] and "guidance 1.5" in lines[1]
    assert lines[2].split() == ["model", "calls", "3", "(3", "in", "the", "plan)"]
    assert "samples/s" in lines[3]


def test_batches_do_not_change_the_picture_and_calls_are_counted(run, folder, weights):
    base = ["sample", "--model", weights, "--solver", "heun", "--steps", 2, "--n", 5, "--guidance", 1]
    run(*base, "--seed", 1, "--out", "a.png")
    _, out, _ = run(*base, "--seed", 1, "--out", "b.png", "--batch", 2)
    stages = len(pydiff.make_plan("heun", pydiff.VPCosine(), 2))
    assert f"model calls  {3 * stages} ({stages} in the plan, times 3 batches)" in out
    run(*base, "--seed", 2, "--out", "c.png")
    a, b, c = (np.array(Image.open(f"{name}.png")).astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).max() > 1


def test_without_a_seed_a_new_one_is_taken_and_printed(run, folder, weights):
    base = ["sample", "--model", weights, "--steps", 1, "--n", 1, "--out", "a.png"]
    seeds = {run(*base)[1].splitlines()[0].split("seed ")[1] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize("given", [[], ["--seed", "-3"]])
def test_a_quiet_run_prints_its_seed_alone_and_can_be_repeated(run, folder, weights, given):
    base = ["sample", "--model", weights, "--steps", 1, "--n", 2, "--quiet"]
    status, out, err = run(*base, *given, "--out", "a.npz")
    word, seed = out.split()
    assert (status, err) == (0, "") and out == f"{word} {seed}\n" and word == "seed"
    assert seed == (given[1] if given else str(int(seed)))
    assert run(*base, "--seed", seed, "--out", "b.npz") == (0, out, "")
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


@pytest.mark.parametrize(
    "text, classes, guidance",
    [
        ("all", tuple(range(10)), sample.DEFAULT_GUIDANCE),
        ("3", (3,), sample.DEFAULT_GUIDANCE),
        ("4, 2", (4, 2), sample.DEFAULT_GUIDANCE),
        ("none", (10,), 1.0),
    ],
)
def test_classes(text, classes, guidance):
    args = main.build_parser().parse_args(["sample", "--out", "x.png", "--class", text])
    assert sample.choose_classes(args, UNet) == (classes, guidance)


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
    (["--seed", "1.5"], ["--seed", "'1.5'"]),
    (["--out", "x.xyz"], ["--out x.xyz", "'.xyz'", ".png", ".npz", ".pt", "x.xyz/"]),
    (["--out", ""], ["--out", "''", ".png"]),
    (["--out", "nowhere/x.png"], ["--out nowhere/x.png", "no folder nowhere"]),
    (["--out", "nowhere/x/"], ["--out nowhere/x", "no folder nowhere"]),
    (["--out", "x" * 300 + ".png"], ["cannot write", "another folder or name"]),
    (["--out", "x" * 300 + "/"], ["too long", "another folder or name"]),
    (["--out", "x.npz", "--columns", "2"], ["--columns", "x.npz", "leave it out"]),
    (["--out", "x/", "--columns", "2"], ["--columns", "x/", "leave it out"]),
    (["--out", "x.pt", "--scale", "2"], ["--scale", "x.pt", "leave it out"]),
    (["--scale", "1.5"], ["--scale", "'1.5'", "integer"]),
    (["--model", "minst"], ["--model minst", "did you mean 'mnist'"]),
    (["--model", "none.safetensors"], ["--model none.safetensors", "no such file"]),
    (["--colour"], ["--colour", "--help"]),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(argv)[:30] for argv, _ in BAD])
def test_bad_input_is_answered_on_one_line(run, folder, weights, argv, words):
    status, out, err = run("sample", "--model", weights, "--n", 2, "--out", "x.png", *argv)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("pydiff: error: ")
    assert all(word in err for word in words), err
    assert list(folder.iterdir()) == []


TOO_LARGE = [
    (["--n", 2, "--scale", 400], "--scale 400", "at most 238"),  # 2 x 1 samples of 28 x 28: 238 * 28 * 2 squared
    (["--n", 4, "--columns", 4, "--scale", 600, "--out", "x.jpg"], "--scale 600", "at most 168"),
    (["--n", 700, "--columns", 1, "--out", "x.webp"], "--columns 1", "2 is the nearest"),
    (["--n", 700, "--columns", 700, "--out", "x.webp"], "--columns 700", "585 is the nearest"),
    (["--n", 10**9], "--n 1000000000", "at most 113906"),
    (["--n", 10**9, "--out", "x.webp"], "--n 1000000000", "at most 113906"),
    (["--out", "x/", "--scale", 1000], "--scale 1000", "at most 337"),
]
"""Arguments, what the line says is wrong, and the largest (or nearest) value that works."""


@pytest.mark.parametrize("argv, blamed, remedy", TOO_LARGE, ids=[" ".join(map(str, case[0])) for case in TOO_LARGE])
def test_too_large_a_picture_is_refused_before_a_call(run, folder, weights, watch, argv, blamed, remedy):
    status, out, err = run("sample", "--model", weights, "--out", "x.png", *argv)
    assert status == 2 and out == "" and err.count("\n") == 1 and watch.calls == 0
    assert f"error: {blamed}: a picture of " in err and remedy in err, err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("n", [1, 2, 7, 90, 1000])
def test_the_largest_value_that_is_named_is_the_largest(n, suffix):
    def largest(n: int, scale: int) -> int:
        with pytest.raises(UsageError, match="at most") as said:
            picture.check_page((1, 28, 28), n, None, scale, suffix)
        return int(str(said.value).split("at most ")[1].split()[0])

    scale = largest(n, 5000)
    picture.check_page((1, 28, 28), n, None, scale, suffix)
    assert largest(n, scale + 1) == scale
    most = largest(10**6 + n, 1)
    picture.check_page((1, 28, 28), most, None, 1, suffix)
    assert largest(most + 1, 1) == most


def test_a_truncated_model_is_refused(run, folder, weights):
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    status, _, err = run("sample", "--model", "cut.safetensors", "--out", "x.png")
    assert status == 2 and "cut.safetensors" in err and "truncated" in err and err.count("\n") == 1
    assert not (folder / "x.png").exists()


KINDS = ["x.png", "x.npz", "x.pt", "x/"]


@pytest.mark.parametrize("out", KINDS)
def test_a_model_that_returns_nan_leaves_nothing(run, folder, weights, monkeypatch, out):
    real = pydiff.models.load_model

    def broken(*args):
        net = real(*args)
        net.conv_out.bias.fill_(float("nan"))
        return net

    monkeypatch.setattr(pydiff.models, "load_model", broken)
    status, _, err = run("sample", "--model", weights, "--n", 1, "--out", out, "--quiet")
    assert status == 2 and "NaN" in err and "stage 0" in err and list(folder.iterdir()) == []


@pytest.mark.parametrize("out", KINDS)
def test_a_failed_write_leaves_what_was_there(run, folder, weights, monkeypatch, out):
    if out[-1] != "/":
        Path(out).write_bytes(b"old")
    there = [p.name for p in folder.iterdir()]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, _, err = run("sample", "--model", weights, "--steps", 1, "--n", 1, "--out", out, "--quiet")
    assert status == 2 and "No space left" in err and err.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == there
    assert all(Path(name).read_bytes() == b"old" for name in there)


def test_a_lack_of_memory_names_the_batch(run, folder, weights, watch):
    def exhausted():
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte.\nmore")

    watch.on_call = exhausted
    status, _, err = run("sample", "--model", weights, "--n", 1, "--batch", 3, "--out", "x.npz", "--quiet")
    assert status == 2 and "--batch 3" in err and "not enough memory" in err and "smaller" in err


@pytest.mark.parametrize("suffix", sorted(picture.PICTURES))
def test_samples_lie_in_rows(suffix, folder):
    cells = np.stack([np.full((3, 4, 6), 40 * k, dtype=np.uint8) for k in range(5)])
    with open(f"x{suffix}", "wb") as file:
        picture.write_picture(file, picture.lay_out(cells, 3), 2, suffix, {"seed": 3})
    page = np.array(Image.open(f"x{suffix}").convert("RGB")).astype(int)
    assert page.shape == (16, 36, 3)
    expected = np.array([[0, 40, 80], [120, 160, 0]])
    assert np.abs(page[4::8, 6::12].mean(2) - expected).max() <= 20  # JPEG is not exact


@pytest.mark.parametrize("suffix, side", [(".jpg", 65500), (".webp", 16383), (".gif", 65535)])
def test_the_limits_of_formats_are_their_own(suffix, side, folder):
    picture.check_page((1, 1, 1), side, side, 1, suffix)
    with open("x", "wb") as file:
        picture.write_picture(file, np.zeros((1, 1, side), np.uint8), 1, suffix, {})
    assert Image.open("x").size == (side, 1)
    with pytest.raises(UsageError, match=f"too large for {suffix}"):
        picture.check_page((1, 1, 1), side + 1, side + 1, 1, suffix)


def test_samples_that_are_no_image_need_arrays():
    with pytest.raises(UsageError, match=r"\[2, 8, 8\].*\.npz"):
        picture.check_page((2, 8, 8), 1, None, 1, ".png")
