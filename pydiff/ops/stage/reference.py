"""The specification of the stage operation, in plain torch; the contract is `pydiff.ops.stage`'s."""

from __future__ import annotations

import torch

from pydiff.ops.noise import normal_reference
from pydiff.ops.stage.tensors import StageTensors
from pydiff.plans import table


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, ..., 1] so that it broadcasts over a batch of samples."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def _term(weight: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, 0.0, weight * operand)


def _combine(weights: torch.Tensor, operands: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """The sum of the operands that are there, weighted by each row of `weights` [B, operands]."""
    total = torch.zeros_like(like)
    for k, operand in enumerate(operands):
        if operand is not None:
            total = total + _term(_per_row(weights[:, k], like), operand)
    return total


def _guided(t: StageTensors, c: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The model output of each row, in the registers' dtype."""
    m = m.to(t.registers.dtype)
    if t.copies == 1:
        return m
    scale, (uncond, cond) = _per_row(c[:, table.GUIDANCE], t.registers[0]), m.chunk(2)
    return torch.where(scale == 1, cond, torch.where(scale == 0, uncond, uncond + scale * (cond - uncond)))


def _draws(t: StageTensors, c: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor | None]:
    """z0 and z1."""
    weights, known = _weights(c), c[:, table.KNOWN : table.KNOWN + 3]
    draws: list[torch.Tensor | None] = []
    for k in range(2):
        used = (weights[:, :, table.Z0 + k] != 0).any(1)
        if t.mask is not None:
            used = used | (known[:, 1 + k] != 0)
        draws.append(_draw(t, index[:, table.DRAW0 + k], used))
    return draws


def _draw(t: StageTensors, number: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Standard normals [B, *sample] of each row's own draw number (anything where the row does not use it)."""
    if number.device.type == "cpu" and not used.any():  # on a GPU asking would wait for it
        return torch.zeros((), dtype=t.registers.dtype).expand(t.registers.shape[1:])
    number = torch.where(used, number, 0).long()
    if t.noise is not None and len(t.noise):
        return t.noise[number, torch.arange(t.rows, device=number.device)]
    return normal_reference(t.seeds, number, t.sample_shape).to(t.registers.dtype)


def _weights(c: torch.Tensor) -> torch.Tensor:
    """Weights [B, 3, operands] of the three combinations."""
    return c[:, : 3 * table.NUM_OPERANDS].reshape(-1, 3, table.NUM_OPERANDS)


def _uses_model_output(c: torch.Tensor, index: torch.Tensor, slots: int) -> torch.Tensor:
    """Rows where m has a weight in an output that goes somewhere, or in a d that has one. [B] bool."""
    weights = _weights(c)
    slot = index[:, table.WRITE_A : table.WRITE_B + 1]
    written = torch.cat((torch.ones_like(slot[:, :1], dtype=torch.bool), (slot >= 0) & (slot < slots)), dim=1)
    written[:, 1] &= slot[:, 0] != slot[:, 1]
    direct = (written & (weights[:, :, table.M] != 0)).any(1)
    through_d = (written & (weights[:, :, table.D] != 0)).any(1) & (c[:, table.OUTPUT + 1] != 0)
    return direct | through_d


@torch.no_grad()
def stage_reference(t: StageTensors, m: torch.Tensor) -> None:
    """The specification of the stage operation, in plain torch: no host synchronisation, any device.

    Args:
        t: the tensors, see `StageTensors`; updated in place.
        m: model output [copies * B, *sample], any strides, in one of `MODEL_DTYPES`.
    """
    if t.rows == 0:
        return
    slots = t.registers.shape[0] - 1
    active = t.cursor < t.stop
    row = torch.where(active, t.cursor, 0).long()
    c, index = t.coefficients[row], t.indices[row]
    x = t.registers[0]

    def column(k: int) -> torch.Tensor:
        return _per_row(c[:, k], x)

    m = _guided(t, c, m)
    d = _term(column(table.OUTPUT), x) + _term(column(table.OUTPUT + 1), m)
    d = torch.minimum(torch.maximum(d, column(table.CLIP)), column(table.CLIP + 1))
    draws = _draws(t, c, index)
    empty = [None] * (table.NUM_SLOTS - slots)
    operands = [x, *t.registers[1:], *empty, d, m, t.constant, t.extra, *draws]
    new = [_combine(weights, operands, x) for weights in _weights(c).unbind(1)]
    if t.mask is not None:
        kept = _combine(c[:, table.KNOWN : table.KNOWN + 3], [t.known, *draws], x)
        new[0] = t.mask * kept + (1 - t.mask) * new[0]

    if t.nonfinite is not None:
        finite = torch.isfinite(m).reshape(t.rows, *t.sample_shape, 1).flatten(1).all(1)
        bad = active & _uses_model_output(c, index, slots) & (t.nonfinite < 0) & ~finite
        t.nonfinite.copy_(torch.where(bad, t.cursor, t.nonfinite))
    alive = _per_row(active, x)
    t.registers[0] = torch.where(alive, new[0], x)
    for slot in range(slots):
        for k in (1, 2):
            here = alive & _per_row(index[:, table.WRITE_A + k - 1] == slot, x)
            t.registers[1 + slot] = torch.where(here, new[k], t.registers[1 + slot])
    t.cursor.add_(active.to(t.cursor.dtype))
    write_model_input_reference(t)


def write_first_model_input(t: StageTensors) -> None:
    """`write_model_input_reference` where no row has finished yet, without its questions."""
    c, x = t.coefficients.index_select(0, t.cursor), t.registers[0]
    if t.model_input is not None:
        scaled = _per_row(c[:, table.INPUT_SCALE], x) * x
        for target in t.model_input.chunk(t.copies):
            target.copy_(scaled)
    if t.model_time is not None:
        t.model_time.view(t.copies, -1).copy_(c[:, table.TIME])


def write_model_input_reference(t: StageTensors) -> None:
    """Write what the model is called with next, for the rows that are not finished."""
    active = t.cursor < t.stop
    c = t.coefficients[torch.where(active, t.cursor, 0).long()]
    x = t.registers[0]
    if t.model_input is not None:
        scaled = (_per_row(c[:, table.INPUT_SCALE], x) * x).to(t.model_input.dtype)
        for target in t.model_input.chunk(t.copies):
            target.copy_(torch.where(_per_row(active, x), scaled, target))
    if t.model_time is not None:
        for target in t.model_time.chunk(t.copies):
            target.copy_(torch.where(active, c[:, table.TIME], target))
