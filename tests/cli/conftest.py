"""What the tests of the command line share: a small model, an empty folder, and a way to run commands in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pydiff import models
from pydiff.cli import main

SMALL = {"channels": (8, 16, 16), "blocks": (1, 1, 1), "embedding_dim": 16, "head_dim": 8, "groups": 4}
Run = Callable[..., tuple[int, str, str]]


def small_model(path: Path, seed: int = 0) -> Path:
    """A small untrained network: the command line does not care what the picture shows."""
    torch.manual_seed(seed)
    net = models.UNet(**SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    models.save_model(net, path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: its exit status and what it printed on stdout and stderr."""

    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main.main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


class Watch:
    """What the models that a command loads are asked: the number of calls, and one of them where Ctrl-C is pressed."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop: int | None = None
        self.on_call: Callable[[], None] = lambda: None

    def __call__(self, *_: Any) -> None:
        if self.calls == self.stop:
            self.stop = None
            raise KeyboardInterrupt
        self.calls += 1
        self.on_call()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, load = Watch(), models.load_model

    def watched(*args: Any) -> Any:
        model = load(*args)
        model.register_forward_pre_hook(watch)
        return model

    monkeypatch.setattr(models, "load_model", watched)
    return watch
