"""Weights on disk, and a training run that is interrupted."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pydiff.models import UNet, load_model, save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"channels": (8, 16, 16), "blocks": (1, 1, 1), "embedding_dim": 16, "head_dim": 8, "groups": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = UNet(**SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "small.safetensors"
    save_model(model, path, {"steps": 3})
    return path


def rewrite(path, tensors, config=True):
    """The file again with other tensors; ``config``: True keeps it, None leaves it out, a string replaces it."""
    text = json.dumps(UNet(**SMALL).config) if config is True else config
    save_file(tensors, path, None if text is None else {"config": text})


def test_round_trip(model, path):
    loaded = load_model(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == torch.float32 and torch.equal(got, value.half().float())
    x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
    expected = model.half().float()(x, t)
    assert torch.equal(loaded(x, t), expected)


def test_dtype_and_string_path(path):
    assert next(load_model(str(path), dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        load_model(path, dtype=torch.int8)


def test_saving_leaves_one_file_and_replaces_it_whole(model, path):
    before = path.read_bytes()
    model.conv_in.weight.data.fill_(1e6)  # not a float16 value
    with pytest.raises(ValueError, match="conv_in.weight"):
        save_model(model, path)
    assert path.read_bytes() == before
    model.conv_in.weight.data.fill_(2.0)
    save_model(model, path)
    assert load_model(path).conv_in.weight.eq(2).all()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["mnst", "MNIST", "minst"])
def test_an_unknown_name_is_answered_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"{name}.*did you mean 'mnist'"):
        load_model(name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_model(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="small.safetensors.*truncated or corrupt.*write it again"):
        load_model(path)


@pytest.mark.parametrize("position, byte", [(0, 0xFF), (7, 0x7F), (8, 0x00), (20, 0xFF)])
def test_a_corrupt_header_is_refused(path, position, byte):
    data = bytearray(path.read_bytes())
    data[position] = byte
    path.write_bytes(data)
    with pytest.raises(ValueError, match="small.safetensors.*truncated or corrupt"):
        load_model(path)


def test_wrong_shapes_and_names_are_listed(path):
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:4].clone()
    tensors["stranger"] = torch.zeros(1)
    del tensors["conv_out.bias"]
    rewrite(path, tensors)
    with pytest.raises(ValueError) as error:
        load_model(path)
    text = str(error.value)
    assert "conv_in.weight has shape (4, 1, 3, 3) instead of (8, 1, 3, 3)" in text
    assert "stranger is not part" in text and "conv_out.bias is missing" in text and str(path) in text


@pytest.mark.parametrize("config", [None, "{", '{"colours": 3}', '{"channels": [8, 12, 16]}', "[1]"])
def test_a_file_without_a_usable_configuration_is_refused(path, config):
    rewrite(path, load_file(path), config)
    with pytest.raises(ValueError, match="small.safetensors.*config"):
        load_model(path)


def test_the_packaged_model_loads_and_is_within_budget():
    net = load_model("mnist")
    assert sum(p.numel() for p in net.parameters()) <= 2_500_000
    weights = Path(importlib.util.find_spec("pydiff.models").origin).parent / "weights" / "mnist_unet.safetensors"
    assert weights.stat().st_size <= 5_000_000
    # It denoises: a vertical stroke, half of it drowned in noise, comes back with far less error than it went in with.
    clean = torch.full((4, 1, 28, 28), -1.0)
    clean[..., 5:23, 12:16] = 1.0
    alpha = sigma = 0.5**0.5  # the cosine schedule at t = 0.49605
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = alpha * clean + sigma * noise
    denoised = alpha * noisy - sigma * net(noisy, torch.tensor(0.49605), torch.full((4,), 1))
    assert (denoised - clean).square().mean() < 0.1 * (noisy / alpha - clean).square().mean()


# The training script is an example, not a module of the package: it is loaded from its file.


@pytest.fixture(scope="module")
def train_mnist():
    spec = importlib.util.spec_from_file_location("train_mnist", ROOT / "examples" / "train_mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_npz(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "tiny.npz"
    images = rng.integers(0, 256, (80, 28, 28), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=rng.integers(0, 10, 80, dtype=np.uint8))
    return path


def arguments(data, out, *more):
    small = ["--channels", "8,8,16", "--embedding-dim", "8", "--attention", "0,0,0", "--batch", "16"]
    fixed = ["--held-out", "16", "--no-bf16", "--device", "cpu", "--steps", "6", "--warmup", "2"]
    return ["--data", str(data), "--out", str(out), *small, *fixed, *more]


def test_a_resumed_run_equals_an_uninterrupted_one(train_mnist, tiny_npz, tmp_path, monkeypatch):
    """Six steps over one and a half epochs, against the same six with the process stopped after the third."""
    whole = train_mnist.main(arguments(tiny_npz, tmp_path / "whole.safetensors"))
    expected = load_file(tmp_path / "whole.safetensors")

    class Stop(Exception):
        pass

    original = train_mnist.Trainer.train_step

    def stop_after_three(self, *batch):
        if self.step == 3:
            raise Stop
        return original(self, *batch)

    out = tmp_path / "resumed.safetensors"
    monkeypatch.setattr(train_mnist.Trainer, "train_step", stop_after_three)
    with pytest.raises(Stop):
        train_mnist.main(arguments(tiny_npz, out, "--checkpoint-minutes", "0"))
    assert not out.exists()
    monkeypatch.setattr(train_mnist.Trainer, "train_step", original)
    assert train_mnist.main(arguments(tiny_npz, out, "--resume")) == whole
    resumed = load_file(out)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    other = tmp_path / "other.safetensors"  # the comparison can fail: another seed gives other weights
    train_mnist.main(arguments(tiny_npz, other, "--seed", "1"))
    assert any(not torch.equal(load_file(other)[name], value) for name, value in expected.items())


def test_training_refuses_what_it_cannot_use(train_mnist, tiny_npz, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        train_mnist.main(arguments(tmp_path / "none.npz", tmp_path / "x.safetensors"))
    np.savez(tmp_path / "odd.npz", train_images=np.zeros((80, 28, 28), np.uint8))
    with pytest.raises(SystemExit, match="train_labels"):
        train_mnist.main(arguments(tmp_path / "odd.npz", tmp_path / "x.safetensors"))
