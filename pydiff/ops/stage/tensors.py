"""The tensors a stage operation works on, and whether they fit one another."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from pydiff.plans import table

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(eq=False)
class StageTensors:
    """The tensors a stage operation works on, all on one device. B rows, S stages of all plans together.

    registers     [R, B, *sample] float32 or float64, contiguous: x, then R - 1 slots. Updated in place.
    cursor        [B] int32: the next row of the tables of each batch row. Updated in place.
    stop          [B] int32: where the row's plan ends (one past its last stage).
    seeds         [B] int64: key of the row's noise.
    coefficients  [S, 48] in the registers' dtype, contiguous: see `table`.
    indices       [S, 4] int32, contiguous.
    copies        1, or 2 when the model runs on [uncond; cond] rows.
    model_input   [copies * B, *sample], any strides, float32, bf16, fp16 or float64: written. None: not wanted.
    model_time    [copies * B] in the registers' dtype: written. None: not wanted.
    mask, known, constant, extra   [B, *sample] in the registers' dtype, any strides (expanded is fine), or None.
    noise         [draws, B, *sample] in the registers' dtype, any strides: used in place of the Philox noise.
    nonfinite     [B] int32: cursor of the first stage whose used model output was not finite; -1 before.
    """

    registers: torch.Tensor
    cursor: torch.Tensor
    stop: torch.Tensor
    seeds: torch.Tensor
    coefficients: torch.Tensor
    indices: torch.Tensor
    copies: int = 1
    model_input: torch.Tensor | None = None
    model_time: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    known: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    nonfinite: torch.Tensor | None = None
    bound: Any = field(default=None, init=False, repr=False)
    """The compiled operation, for as long as it fits."""
    checked: bool = field(default=False, init=False, repr=False)
    """That the tensors fit one another."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in ("bound", "checked"):
            object.__setattr__(self, "bound", None)  # it holds the address of what was replaced
            object.__setattr__(self, "checked", False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None}

    @property
    def rows(self) -> int:
        """B, the rows of the batch."""
        return self.registers.shape[1]

    @property
    def sample_shape(self) -> torch.Size:
        """The shape of one sample."""
        return self.registers.shape[2:]


FIELDS = tuple(f.name for f in fields(StageTensors) if f.init)
"""What `StageTensors` is made of, in the order in which the operator takes it too."""


def check_model_output(t: StageTensors, m: torch.Tensor) -> None:
    """Raise unless `m` is a model output that fits `t`. Cheap enough for every stage."""
    expected = (t.copies * t.rows, *t.sample_shape)
    if not isinstance(m, torch.Tensor):
        raise TypeError(
            f"the model returned {type(m).__name__}, expected a tensor of shape {list(expected)}; "
            "wrap it so that it returns the tensor alone, e.g. lambda x, t: net(x, t).sample"
        )
    if m.shape != expected:
        raise ValueError(f"the model returned shape {list(m.shape)}, expected {list(expected)} like its input")
    if m.dtype not in MODEL_DTYPES:
        raise TypeError(f"the model returned {m.dtype}, expected one of {', '.join(map(str, MODEL_DTYPES))}")
    if m.device != t.registers.device:
        raise ValueError(f"the model returned a tensor on {m.device}, but the sample is on {t.registers.device}")


def check_tensors(t: StageTensors) -> None:
    """Raise unless the tensors of `t` fit one another as `StageTensors` says."""
    registers, rows, sample = t.registers, t.rows, tuple(t.sample_shape)
    if registers.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"registers must be float32 or float64, got {registers.dtype}")
    if not 1 <= registers.shape[0] <= 1 + table.NUM_SLOTS:
        raise ValueError(f"registers must hold x and up to {table.NUM_SLOTS} slots, got {registers.shape[0]} tensors")
    if t.copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {t.copies}")
    stages, scalar, draws = t.coefficients.shape[0], registers.dtype, 0 if t.noise is None else t.noise.shape[0]
    expected = {
        "registers": (tuple(registers.shape), scalar),
        "cursor": ((rows,), torch.int32),
        "stop": ((rows,), torch.int32),
        "seeds": ((rows,), torch.int64),
        "nonfinite": ((rows,), torch.int32),
        "coefficients": ((stages, table.COEFFICIENT_COLUMNS), scalar),
        "indices": ((stages, table.INDEX_COLUMNS), torch.int32),
        "model_time": ((t.copies * rows,), scalar),
    }
    for name, (shape, dtype) in expected.items():
        _check_tensor(t, name, shape, (dtype,))
        if getattr(t, name) is not None and not getattr(t, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {getattr(t, name).stride()}; use .contiguous()")
    for name in ("mask", "known", "constant", "extra"):
        _check_tensor(t, name, (rows, *sample), (scalar,))
    _check_tensor(t, "noise", (draws, rows, *sample), (scalar,))
    _check_tensor(t, "model_input", (t.copies * rows, *sample), MODEL_DTYPES)


def _check_tensor(t: StageTensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    tensor = getattr(t, name)
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != t.registers.device:
        raise ValueError(f"{name} is on {tensor.device}, but registers are on {t.registers.device}")
