"""Weights on disk: float16 safetensors files that carry the network's configuration in their metadata."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pydiff.models.unet import UNet

PACKAGED = {"mnist": "mnist_unet.safetensors"}


def load_model(
    name_or_path: str | os.PathLike = "mnist",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> UNet:
    """A trained U-Net, in eval mode and without gradients.

    Args:
        name_or_path: a packaged name (``"mnist"``) or the path of a file that ``pydiff.models.save_model`` wrote.
        device: where the parameters go; the CPU by default.
        dtype: a floating point dtype for the parameters; float32 by default (the file holds float16).

    Returns: model(x, t, labels=None) with x [B, 1, 28, 28], t [B] in [0, 1] and labels int64 [B], 0 to 9, or
        ``model.null_label`` for none; it predicts v on the schedule `VPCosine`, and says so to `Sampler`.

    Raises: ValueError for an unknown name, a dtype that is no floating point dtype, or a file that is truncated,
        corrupt or does not hold this network, naming the file, what is wrong and what to do; FileNotFoundError where
        there is no file at the path.

    Example:
        model = pydiff.load_model("mnist")
        digits = pydiff.sample(model, (2, 1, 28, 28), steps=6, seed=0, cond={"labels": torch.tensor([4, 2])})
    """
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point torch.dtype such as torch.bfloat16; got {dtype!r}")
    path, remedy = _locate(name_or_path)
    config, tensors = _read(path, remedy)
    with torch.device("meta"):  # shapes only: nothing is allocated before the file is known to fit
        model = _build(config, path, remedy)
    _check_tensors(model, tensors, path, remedy)
    model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype).requires_grad_(False).eval()


def save_model(model: UNet, path: str | os.PathLike, metadata: dict[str, object] | None = None) -> None:
    """Write the parameters in float16, with the configuration and ``metadata`` (as strings) in the header.

    The file appears complete or not at all: it is written beside its destination and then renamed.

    Args:
        model: the network.
        path: of the file; folders are made.
        metadata: what else is known of the model.

    Raises: ValueError, and writes nothing, when a value is not finite in float16.
    """
    path = Path(path)
    tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    lost = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if lost:
        raise ValueError(f"model has values that float16 cannot hold, in {', '.join(lost[:3])}: nothing was written")
    header = {key: str(value) for key, value in (metadata or {}).items()}
    header["config"] = json.dumps(model.config)
    write_atomically(path, save(tensors, header))


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a new file in the same folder, then rename it over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private to their owner
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _locate(name_or_path: str | os.PathLike) -> tuple[Path, str]:
    """The file meant, and what to do when something is wrong with it.

    A string with neither a separator nor a suffix is a name; everything else is a path.
    """
    text = os.fspath(name_or_path)
    if text in PACKAGED:
        path = Path(str(resources.files("pydiff.models") / "weights" / PACKAGED[text]))
        if not path.is_file():
            raise FileNotFoundError(f"packaged model {text!r}: no file {path}; reinstall pydiff")
        return path, "reinstall pydiff"
    path = Path(text)
    if path.is_file():
        return path, "write it again with pydiff.models.save_model, or fetch it again"
    if isinstance(name_or_path, str) and not path.suffix and len(path.parts) <= 1:
        names = ", ".join(repr(name) for name in PACKAGED)
        close = difflib.get_close_matches(text.lower(), PACKAGED, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {text!r}: the packaged ones are {names}{hint} (or pass a path to a file)")
    reason = "it is a folder" if path.is_dir() else "there is no such file"
    raise FileNotFoundError(f"cannot load a model from {path}: {reason}; pass the path of a .safetensors file")


def _read(path: Path, remedy: str) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is truncated or corrupt: {error}; {remedy}") from error
    if "config" not in header:
        raise ValueError(f"{path} has no 'config' in its metadata, so its network is unknown; {remedy}")
    try:
        return json.loads(header["config"]), tensors
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the 'config' in its metadata is not JSON: {error}; {remedy}") from error


def _build(config: dict, path: Path, remedy: str) -> UNet:
    try:
        return UNet(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration {config} does not fit this network: {error}; {remedy}") from error


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path, remedy: str) -> None:
    """Raise ValueError unless names and shapes are those of the model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of the network" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            wrong.append(f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not hold this network: {'; '.join(wrong[:3])}{more}; {remedy}")
