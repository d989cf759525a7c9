"""Work that does not depend on x leaves the loop.

The times of a plan are known before it starts, and the condition does not change while it runs. So every block's
projection of the time embedding is computed for all stages at once, into a table [stages, width] whose columns belong
to the blocks, and every cross-attention's keys and values once, into [batch, tokens, width]. The loop passes one row of
the table, and the one wide context, where the model passes its embedding and its text anyway; a block that is handed
something of that width takes its own columns instead of projecting.

Contract: exact in float32 up to the rounding of matrix products of another shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pydiff.optimize.parts import unhooked
from pydiff.optimize.swap import Fused, is_fused, not_ready


class Slot(NamedTuple):
    """Where a block's columns lie in something hoisted.

    Attributes:
        start, stop: its first column, and one past its last.
        total: how wide the whole is.
    """

    start: int
    stop: int
    total: int


def assign(name: str, blocks: Sequence[nn.Module], widths: Sequence[int], taken: Collection[int]) -> int:
    """Give each block a slot, kept as its attribute `name`. `taken`: widths that mean something else to the blocks."""
    total = sum(widths)
    while total in taken:
        total += 16
    start = 0
    for block, width in zip(blocks, widths):
        object.__setattr__(block, name, Slot(start, start + width, total))
        start += width
    return total


def own_columns(slot: Slot | None, wide: Tensor | None) -> Tensor | None:
    """A block's columns of something hoisted, as a view; None if `wide` is what the block gets when nothing is."""
    if slot is None or not isinstance(wide, Tensor) or wide.shape[-1] != slot.total:
        return None
    return wide[..., slot.start : slot.stop]


def gathered(parts: Sequence[Tensor], total: int) -> Tensor:
    """The parts side by side in the last dimension, zeros up to `total`."""
    wide = torch.cat(list(parts), dim=-1)
    return wide if wide.shape[-1] == total else torch.nn.functional.pad(wide, (0, total - wide.shape[-1]))


class CannotHoist(ValueError):
    """A call that hoisting does not serve, and why. The model itself serves it."""


class Hoistable(Fused):
    """Base of the mixins of whole models whose embeddings can be computed before the loop."""

    hoisted_arguments: tuple[str, ...]
    """The keyword arguments that hoisting understands; with others the model is called as it is."""

    def hoist_times(self, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Times [N], and the condition with N rows where it enters the embedding: every block's projection, [N, width].

        Where the condition holds nothing that enters the embedding, N has nothing to do with the batch.
        """
        raise NotImplementedError

    def hoist_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The condition as `hoisted_forward` wants it: keys and values in place of the text, for example."""
        return {}

    def embedding_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the condition (tensors [batch, ...]) that enters the time embedding: all of it by default."""
        return {name: cond[name] for name in self.hoisted_arguments if cond.get(name) is not None}

    def hoisted_forward(self, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """The model on x [batch, ...], given a row of the table for each row of x, and the hoisted condition."""
        raise NotImplementedError


class HoistedModel:
    """A model bound to the times of a run and to one condition.

    Args:
        model: a `Hoistable`.
        times: [S] the times the model is called with, in the order of the rows that `__call__` is given.
        cond: the model's keyword arguments, for the whole batch of `batch` rows.

    Raises `CannotHoist` if the model or the condition is none that hoisting serves.
    """

    @torch.no_grad()
    def __init__(self, model: Any, times: Tensor, cond: Mapping[str, Any] | None = None, batch: int = 1):
        self._given = dict(cond or {})
        _check(model, times, self._given)
        self.cond = model.hoist_condition(self._given)
        entering = model.embedding_condition(self._given)
        if not all(isinstance(v, Tensor) for v in entering.values()):
            raise CannotHoist(f"not all of {', '.join(entering)} are tensors")
        self.model, self._times, self._batch = model, times, batch
        self.rows = batch if entering else 1
        _check_size(model, (times.shape[0] + 1) * self.rows)
        self.table = self._computed_table()
        self._row = torch.arange(self.rows, dtype=torch.int32, device=times.device)

    def _computed_table(self) -> Tensor:
        times, stages = self._times, self._times.shape[0]
        # One more row than stages: rows of the batch that have finished stand there, and no index needs a clamp.
        padded = torch.cat([times, times.narrow(0, stages - 1, 1)])
        entering = self.model.embedding_condition(self._given)
        repeated = {
            k: v.expand(self._batch, *v.shape[1:]).repeat(stages + 1, *([1] * (v.ndim - 1)))
            for k, v in entering.items()
        }
        return self.model.hoist_times(padded.repeat_interleave(self.rows), repeated)

    @torch.no_grad()
    def update(self) -> None:
        """Compute again, from what the given times and condition now hold, into the same memory."""
        fresh = (self._computed_table(), self.model.hoist_condition(self._given))
        for target, value in zip(pytree.tree_leaves((self.table, self.cond)), pytree.tree_leaves(fresh)):
            if isinstance(target, Tensor) and target is not value:
                target.copy_(value, non_blocking=True)

    def __call__(self, x: Tensor, stage: Tensor) -> Tensor:
        """The model's output for x [batch, ...] at stage indices [R] int32, batch being a multiple of R."""
        return self.model.hoisted_forward(x, self.embedding(stage, x.shape[0]), self.cond)

    def embedding(self, stage: Tensor, batch: int) -> Tensor:
        """The rows of the table for a batch, [batch, width]: one gather on the device."""
        if self.rows > 1:
            stage = stage.repeat(batch // stage.shape[0]) if stage.shape[0] != batch else stage
            return self.table.index_select(0, torch.add(self._row, stage, alpha=self.rows))
        rows = self.table.index_select(0, stage)
        if rows.shape[0] == 1:
            return rows.expand(batch, -1)
        return rows if rows.shape[0] == batch else rows.repeat(batch // rows.shape[0], 1)


# What a model knows of its hoisted blocks, and where each of these keeps its slot.
_TABLES = {
    "_pydiff_time_blocks": "_pydiff_time",
    "_pydiff_context_blocks": "_pydiff_context",
    "_pydiff_modulations": "_pydiff_modulation",
}
_LARGEST_TABLE = 2**31  # bytes


def _check(model: Any, times: Tensor, cond: Mapping[str, Any]) -> None:
    if not isinstance(model, Hoistable):
        raise CannotHoist(f"{type(model).__name__} is none of the models that pydiff.optimize can hoist")
    reason = not_ready(model, times)
    if reason:
        raise CannotHoist(reason)
    if not unhooked(model):
        raise CannotHoist("it has hooks, a forward of its own or is compiled, which hoisting would pass by")
    if any(module.training for module in model.modules() if is_fused(module)):
        raise CannotHoist("a part of it is in training mode (call model.eval())")
    if not _has_its_blocks(model):
        raise CannotHoist("a block of it was exchanged since it was optimised: restore and optimize it again")
    others = sorted(k for k, v in cond.items() if given(v) and k not in (*model.hoisted_arguments, "return_dict"))
    if others:
        known = ", ".join(model.hoisted_arguments) or "nothing"
        raise CannotHoist(f"a hoisted {type(model).__name__} takes {known}, and not {', '.join(others)}")


def _has_its_blocks(model: nn.Module) -> bool:
    """Whether the blocks that take columns are those whose projections the columns hold."""
    for table, slot in _TABLES.items():
        if table in vars(model):
            here = {id(module) for module in model.modules() if slot in vars(module) and module is not model}
            if here != set(map(id, vars(model)[table][0])):
                return False
    return True


def _check_size(model: Any, rows: int) -> None:
    """Refuse a table that would not be worth its memory: of many rows, each with a condition and times of its own."""
    parameter = next(model.parameters(), None)
    width = max((kept[1] for name, kept in vars(model).items() if name in _TABLES), default=0)
    size = rows * width * (4 if parameter is None else parameter.element_size())
    if size > _LARGEST_TABLE:
        raise CannotHoist(f"its table would take {size / 2**30:.1f} GiB, one row for each row of the batch and stage")


def given(argument: Any) -> bool:
    """Whether an optional argument says something."""
    return argument is not None and argument is not False and not (isinstance(argument, dict) and not argument)
