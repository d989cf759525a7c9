"""What comes before a capture: everything lazy is made, and what would break the capture is found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pydiff.check.problems import place_of_error
from pydiff.graph.backend import Backend
from pydiff.graph.guards import Guard
from pydiff.graph.program import Program
from pydiff.graph.request import Request

WARM_UP_STAGES = 2
"""Stages run first: Triton compiles, cuDNN and cuBLAS make their plans, modules are loaded, the model fills caches."""
WATCHED_STAGES = 3


class Uncapturable(RuntimeError):
    """A loop that cannot be captured, and what in the model's code prevents it."""

    @classmethod
    def from_error(cls, error: BaseException) -> Uncapturable:
        """Of an error raised while capturing, with the line of the model that raised it."""
        place = place_of_error(error)
        return cls(f"{type(error).__name__}: {str(error):.300} (raised at {place.file}:{place.line}: `{place.code}`)")


def warm_up(program: Program, request: Request, backend: Backend) -> bool:
    """Run some stages eagerly, watched in the end. Returns whether the model draws random numbers.

    Raises `Uncapturable` where something was seen that a capture does not survive or would freeze.
    """
    device = request.layout.device
    model: Any = request.model if isinstance(request.model, nn.Module) else nn.Module()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers() if not buffer.is_inference()}
    drew, versions = False, dict[str, int]()

    def stages() -> None:
        nonlocal drew
        program.play(True, WARM_UP_STAGES)
        try:
            program.guard = Guard(request.model, program.buffers.arguments)
        except Exception as error:
            raise Uncapturable(f"the model cannot be guarded against changes: {error!r:.300}") from error
        versions.update({name: buffer._version for name, (buffer, _) in buffers.items()})
        offset = backend.random_offset(device)
        program.play(False, 1)
        drew = backend.random_offset(device) != offset

    def watched() -> None:
        program.load(request)
        try:
            with backend.watch() as watch, program.calling(watch.model):
                program.play(True, WATCHED_STAGES)
        except Exception as error:  # stages that nobody watched have just passed
            raise Uncapturable.from_error(error) from error
        if watch.problems:
            raise Uncapturable("; ".join(map(str, watch.problems)))

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        backend.warm_up(stages, device)
        if not is_compiled(request.model):  # a compiled model is no longer the code that was compiled
            backend.warm_up(watched, device)
    assert program.guard is not None
    written = [name for name, (buffer, _) in buffers.items() if buffer._version != versions[name]]
    if written:
        for buffer, before in buffers.values():
            buffer.copy_(before)
        raise Uncapturable(f"every call writes into the buffer {written[0]}: warming up would change the samples")
    if not program.guard.holds():
        raise Uncapturable(f"every call changes the model, and a graph would not: {program.guard.difference()}")
    return drew


def is_compiled(model: Any) -> bool:
    """Whether torch.compile has part in a model."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules)
    return compiled or hasattr(model, "_torchdynamo_orig_callable")


def check_device(model: Any, device: torch.device) -> None:
    """Raise if the model's weights lie elsewhere than the samples, and no hook of theirs moves them."""
    if not isinstance(model, nn.Module):
        return
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if not devices or devices == {device}:
        return
    elsewhere = ", ".join(sorted(str(d) for d in devices - {device}))
    moves = any(hasattr(module, "_hf_hook") for module in model.modules())
    if device not in devices and not moves:
        raise ValueError(
            f"the model is on {elsewhere}, but the samples are on {device}: move the model with .to(...), "
            "or give device="
        )
