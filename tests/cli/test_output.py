"""What `pydiff sample --out` leaves: every kind of target, what it says of itself, and how a command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pydiff
from pydiff.cli import sample
from tests.cli.conftest import small_model

KINDS = ["x/", "x.npz", "x.pt", "x.png", "x.bmp"]
BASE = ["--n", 7, "--batch", 2, "--steps", 2, "--solver", "ddpm", "--class", "3,1,4"]  # 4 batches of 2 calls


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def command(weights):
    return ["sample", "--model", weights, *BASE]


def test_every_kind_holds_the_same_samples(run, folder, command):
    for out in KINDS:
        status, printed, _ = run(*command, "--seed", 5, "--out", out)
        assert status == 0 and printed.startswith(f"{out}: 7 samples, ") and "class 3,1,4, seed 5\n" in printed
    arrays, tensors = np.load("x.npz"), torch.load("x.pt", weights_only=True)
    model = pydiff.load_model(command[2])
    labels = torch.tensor([3, 1, 4, 3, 1, 4, 3])
    x = pydiff.sample(
        model,
        (7, 1, 28, 28),
        solver="ddpm",
        steps=2,
        seed=5,
        guidance_scale=2.0,
        cond={"labels": labels},
        uncond={"labels": 10},
    )
    samples = arrays["samples"]
    assert samples.dtype == np.float32 and np.abs(samples - x.numpy()).max() < 1e-4
    assert np.abs(samples).max() > 1  # as the sampler gave them: only pictures are clipped
    assert torch.equal(tensors["samples"], torch.from_numpy(samples))
    for found in (arrays, tensors):
        assert found["seeds"].tolist() == list(range(5, 12)) and found["labels"].tolist() == labels.tolist()
    pixels = ((samples.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)[:, 0]
    assert [p.name for p in sorted(Path("x").iterdir())] == [f"{k:06d}.png" for k in range(7)]
    for k in range(7):
        assert np.array_equal(np.array(Image.open(f"x/{k:06d}.png")), pixels[k])
    for name in ("x.png", "x.bmp"):
        page = np.array(Image.open(name)).reshape(3, 28, 3, 28).swapaxes(1, 2).reshape(9, 28, 28)
        assert np.array_equal(page[:7], pixels) and not page[7:].any()


def test_every_kind_says_how_it_was_made(run, folder, command):
    for out in KINDS:
        run(*command, "--seed", 5, "--out", out, "--option", "variance=large", "--quiet")
    metadata = torch.load("x.pt", weights_only=True)["metadata"]
    assert json.loads(str(np.load("x.npz")["metadata"])) == metadata
    plan = pydiff.make_plan(
        "ddpm", pydiff.VPCosine(), 2, prediction="v_prediction", guidance_scale=2.0, variance="large"
    )
    expected = {
        "seed": 5,
        "n": 7,
        "batch": 2,
        "solver": "ddpm",
        "options": {"variance": "large"},
        "steps": 2,
        "grid": "logsnr",
        "grid_options": {},
        "guidance": 2.0,
        "class": "3,1,4",
        "model": str(command[2]),
        "dtype": "float32",
        "device": "cpu",
        "plan": plan.digest(),
        "pydiff": pydiff.__version__,
        "torch": torch.__version__,
    }
    assert expected.items() <= metadata.items() and set(metadata) - set(expected) == {"weights", "threads"}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    assert Image.open("x.png").text == {**texts, "labels": "[3, 1, 4, 3, 1, 4, 3]"}
    sample_4 = Image.open("x/000004.png").text
    assert sample_4 == {**texts, "seed": "9", "label": "1", "scale": "1"}
    argv = ["--seed", sample_4["seed"], "--class", sample_4["label"], "--solver", "ddpm", "--option", "variance=large"]
    run("sample", "--model", command[2], "--n", 1, "--steps", 2, *argv, "--out", "y.png")
    again, first = (np.array(Image.open(name)).astype(int) for name in ("y.png", "x/000004.png"))
    assert np.abs(again - first).max() <= 1


def test_float64_is_kept(run, folder, command):
    run(*command, "--dtype", "float64", "--out", "x.npz")
    assert np.load("x.npz")["samples"].dtype == np.float64


def test_a_folder_is_filled_batch_by_batch(run, folder, command, watch):
    counts: list[int] = []
    watch.on_call = lambda: counts.append(len(list(folder.glob("x/*"))))
    run(*command, "--out", "x/", "--scale", 3)
    assert counts == [0, 0, 2, 2, 4, 4, 6, 6]
    assert Image.open("x/000006.png").size == (84, 84)


@pytest.mark.parametrize("out", KINDS)
def test_an_interrupted_command_goes_on_and_gives_the_same_bits(run, folder, command, watch, out):
    Path("whole").mkdir()
    Path("parts").mkdir()
    assert run(*command, "--seed", 5, "--out", f"whole/{out}")[0] == 0
    for stop, done in ((5, 4), (1, 4), (3, 6)):  # in batch 2, again in batch 2, in batch 3
        watch.calls, watch.stop = 0, stop
        status, printed, err = run(*command, "--seed", 5, "--out", f"parts/{out}", "--quiet")
        assert status == 130 and printed == "seed 5\n"
        line = f"pydiff: interrupted: {done} of 7 samples are kept; give the same command again to go on (seed 5)\n"
        assert err == line
        assert out == "x/" or not Path(f"parts/{out}").exists()
    watch.calls = 0
    status, printed, _ = run(*command, "--seed", 5, "--out", f"parts/{out}")
    assert status == 0 and watch.calls == 2
    assert "kept         6 samples, which were there already" in printed and "model calls  2 (2 in the plan)" in printed
    assert files(folder / "parts") == files(folder / "whole")


def test_an_interrupt_before_anything_is_done_says_so(run, folder, command, watch):
    watch.stop = 1
    status, _, err = run(*command, "--seed", 5, "--out", "x.npz", "--quiet")
    assert status == 130 and "nothing is kept" in err and list(folder.iterdir()) == []


@pytest.mark.parametrize("out", KINDS)
def test_without_a_seed_that_of_the_partial_result_is_taken(run, folder, command, watch, out):
    watch.stop = 5
    _, printed, _ = run(*command, "--out", out, "--quiet")
    seed = printed.split()[1]
    watch.calls = 0
    assert run(*command, "--out", out, "--quiet") == (0, f"seed {seed}\n", "") and watch.calls == 4
    Path("whole").mkdir()
    run(*command, "--seed", seed, "--out", f"whole/{out}")
    there = {name.removeprefix("whole/"): data for name, data in files(folder).items() if name.startswith("whole/")}
    assert there == {name: data for name, data in files(folder).items() if not name.startswith("whole/")}


OTHER = [
    (["--seed", 6], "seed 5 there, 6 here"),
    (["--n", 8], "n 7 there, 8 here"),
    (["--batch", 3], "batch 2 there, 3 here"),
    (["--steps", 3], "steps 2 there, 3 here"),
    (["--solver", "ddim"], "solver ddpm there, ddim here"),
    (["--option", "variance=large"], 'options {} there, {"variance": "large"} here'),
    (["--grid", "karras"], "grid logsnr there, karras here"),
    (["--grid", "karras", "--grid-option", "rho=5"], 'grid_options {} there, {"rho": 5.0} here'),
    (["--guidance", 3], "guidance 2.0 there, 3.0 here"),
    (["--class", 3], "class 3,1,4 there, 3 here"),
    (["--dtype", "float64"], "dtype float32 there, float64 here"),
    (["--threads", 2], "threads 1 there, 2 here"),
]


@pytest.mark.parametrize("out", ["x/", "x.npz"])
@pytest.mark.parametrize("other, words", OTHER, ids=[words.split()[0] for _, words in OTHER])
def test_a_partial_result_of_another_command_is_not_gone_on_with(run, folder, command, watch, out, other, words):
    watch.stop = 5
    run(*command, "--seed", 5, "--out", out)
    before, watch.calls = files(folder), 0
    status, printed, err = run(*command, "--seed", 5, "--out", out, *other)
    assert status == 2 and printed == "" and err.count("\n") == 1 and watch.calls == 0
    assert words in err and "another name" in err and "--overwrite" in err and "delete" in err
    assert files(folder) == before


def test_the_model_and_the_versions_are_part_of_the_command(run, folder, command, watch, monkeypatch):
    path = small_model(folder / "model.safetensors")
    argv = [*command, "--model", path, "--seed", 5, "--out", "x.png"]
    watch.stop = 5
    run(*argv)
    small_model(path, seed=1)  # of the same name
    assert "weights " in run(*argv)[2]
    small_model(path)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "__version__", "9.9")
        assert f"pydiff {pydiff.__version__} there, 9.9 here" in run(*argv)[2]
    assert run(*argv)[0] == 0


@pytest.mark.parametrize("out", KINDS)
def test_overwrite_starts_anew_after_another_command_and_goes_on_after_this_one(run, folder, command, watch, out):
    watch.stop = 5
    run(*command, "--steps", 3, "--seed", 5, "--out", out)
    watch.calls, watch.stop = 0, 5
    assert run(*command, "--seed", 5, "--out", out, "--overwrite")[0] == 130
    watch.calls = 0
    assert run(*command, "--seed", 5, "--out", out, "--overwrite")[0] == 0 and watch.calls == 4
    Path("whole").mkdir()
    run(*command, "--seed", 5, "--out", f"whole/{out}")
    there = {name.removeprefix("whole/"): data for name, data in files(folder).items() if name.startswith("whole/")}
    assert there == {name: data for name, data in files(folder).items() if not name.startswith("whole/")}


def test_how_a_picture_is_laid_out_may_change_when_it_is_gone_on_with(run, folder, command, watch):
    watch.stop = 5
    run(*command, "--out", "x.png")
    assert run(*command, "--out", "x.png", "--columns", 7, "--scale", 2)[0] == 0
    assert Image.open("x.png").size == (7 * 28 * 2, 28 * 2)


@pytest.mark.parametrize("out", [kind for kind in KINDS if kind != "x/"])
def test_a_finished_file_is_replaced(run, folder, command, watch, out):
    run(*command, "--seed", 5, "--out", out)
    before, watch.calls = Path(out).read_bytes(), 0
    assert run(*command, "--seed", 6, "--out", out)[0] == 0 and watch.calls == 8
    assert Path(out).read_bytes() != before


def test_a_broken_part_is_named(run, folder, command, watch):
    watch.stop = 5
    run(*command, "--seed", 5, "--out", "x.npz")
    part = Path(".x.npz.part/000002.npz")
    part.write_bytes(part.read_bytes()[:700])
    status, _, err = run(*command, "--seed", 5, "--out", "x.npz")
    assert status == 2 and str(part) in err and "cannot be read" in err and err.count("\n") == 1
    part.unlink()
    assert run(*command, "--seed", 5, "--out", "x.npz")[0] == 0


class TestFolder:
    """What a folder holds already."""

    def test_a_finished_one_is_left_as_it_is(self, run, folder, command, watch):
        run(*command, "--out", "x/")
        before, watch.calls = files(folder), 0
        for out in ("x/", "x"):
            status, printed, err = run(*command, "--out", out)
            assert (status, err) == (0, "") and "kept         7 samples" in printed
        status, _, err = run(*command, "--seed", 6, "--out", "x/")
        assert status == 2 and "another command (seed " in err and "delete x" in err
        assert files(folder) == before and watch.calls == 0

    def test_a_batch_that_is_not_there_as_a_whole_is_drawn_again(self, run, folder, command, watch):
        run(*command, "--seed", 5, "--out", "x/")
        before, watch.calls = files(folder), 0
        Path("x/000002.png").unlink()
        Path("x/000006.png").unlink()
        assert run(*command, "--seed", 5, "--out", "x/")[0] == 0
        assert files(folder) == before and watch.calls == 4

    def test_overwrite_replaces_all_samples_of_the_earlier_command(self, run, folder, command):
        run(*command, "--seed", 5, "--out", "x/")
        before = files(folder)
        assert run(*command, "--seed", 5, "--n", 2, "--out", "x/", "--overwrite")[0] == 0
        assert list(files(folder)) == ["x/000000.png", "x/000001.png"]
        run(*command, "--seed", 5, "--out", "x/", "--overwrite")
        assert files(folder) == before
        run(*command, "--out", "x/", "--overwrite")  # a finished one: new samples, of a new seed
        assert files(folder) != before and list(files(folder)) == list(before)

    def test_other_files_are_not_mixed_with_samples(self, run, folder, command, watch):
        Path("x").mkdir()
        Path("x/notes.txt").write_text("mine")
        Path("x/.hidden").write_text("mine")
        status, _, err = run(*command, "--out", "x/")
        assert status == 2 and "notes.txt" in err and "--overwrite" in err and watch.calls == 0
        watch.stop = 5
        assert run(*command, "--out", "x/", "--overwrite")[0] == 130
        watch.calls = 0
        assert run(*command, "--out", "x/", "--overwrite")[0] == 0 and watch.calls == 4
        assert len(files(folder)) == 9 and Path("x/notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_a_picture_of_someone_else_is_not_touched(self, run, folder, command, watch, overwrite):
        run(*command, "--out", "x/")
        Image.new("L", (2, 2)).save("x/000003.png")
        before, watch.calls = files(folder), 0
        status, _, err = run(*command, "--seed", 6, "--out", "x/", *overwrite)
        assert status == 2 and err.count("\n") == 1 and watch.calls == 0
        assert "x/000003.png" in err or not overwrite
        assert files(folder) == before

    def test_a_sample_that_was_renamed_is_noticed(self, run, folder, command):
        run(*command, "--seed", 5, "--out", "x/")
        Path("x/000001.png").rename("x/000000.png")
        status, _, err = run(*command, "--seed", 5, "--out", "x/")
        assert status == 2 and "000000.png" in err and "seed 6 there, 5 here" in err

    def test_a_file_is_no_folder(self, run, folder, command):
        Path("x").write_text("mine")
        status, _, err = run(*command, "--out", "x/")
        assert status == 2 and "--out x/" in err and Path("x").read_text() == "mine"

    def test_the_working_folder_itself(self, run, folder, command):
        assert run(*command, "--out", ".")[0] == 0
        assert len(list(folder.glob("0*.png"))) == 7


def test_names_sort_whatever_the_number(folder):
    from pydiff.cli.output import Folder, Job

    settings: dict[str, Any] = {"pydiff": "test"}
    job = Job(n=2_000_000, batch=1, seed=0, classes=(0,), settings=settings)
    target = Folder("x/", None, 1, False)
    for k in (999_999, 1_999_999):
        target.add(job, range(k, k + 1), np.zeros((1, 1, 2, 2), np.float32))
    assert sorted(p.name for p in Path("x").iterdir()) == ["0999999.png", "1999999.png"]
    assert target.has(job, range(999_999, 1_000_000)) and not target.has(job, range(0, 1))
