"""Copies of functions with what they refer to, and of what holds functions.

For `copy.deepcopy` a function is a constant, whatever it refers to:

    net = nn.Linear(4, 4)
    model = lambda x, t: net(x)
    copy.deepcopy(model) is model               # and calls the net itself, not a copy of it

Here it is made anew: with the same code, but copies of what it has from elsewhere. That is in its cells (the variables
from around it, such as `net` inside of a function), among the globals of its file (`net` outside) and in the defaults
of its arguments.
"""

from __future__ import annotations

import copy
import functools
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from pydiff.check.references import as_written, closure_values, global_objects, has_attributes, tensors

T = TypeVar("T")


class Copies:
    """Copies that belong together: what the originals share, they share.

    So the functions of a file have one copy of its globals, and see what one of them writes there. Originals stay as
    they are, and must be kept until all copies are made.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # by the id of the original, as `copy.deepcopy` has it

    def of(self, value: T) -> T:
        """A copy of a tensor, of anything that holds some, or of lists, tuples and dicts of them.

        What was compiled is copied as it was before. Raises `TypeError` for an object that cannot be copied.
        """
        return pytree.tree_map(self._leaf, value)

    def _leaf(self, leaf: Any) -> Any:
        leaf = as_written(leaf)
        if id(leaf) in self._made:
            return self._made[id(leaf)]
        if isinstance(leaf, FunctionType):
            return self._function(leaf)
        if isinstance(leaf, functools.partial):
            return functools.partial(self.of(leaf.func), *self.of(leaf.args), **self.of(leaf.keywords))
        if isinstance(leaf, MethodType):
            return MethodType(leaf.__func__, self.of(leaf.__self__))
        return self._object(leaf) if isinstance(leaf, Tensor) or has_attributes(leaf) else leaf

    def _object(self, original: Any) -> Any:
        try:
            made = copy.deepcopy(original, self._made)
        except Exception as error:
            raise TypeError(f"{type(original).__name__} cannot be copied: {error}") from error
        self._exchange_functions(made, set())
        return made

    def _exchange_functions(self, holder: Any, seen: set[int]) -> None:
        """Put copies in the place of the functions in a copied object, which are still the original ones."""
        if id(holder) in seen or isinstance(holder, Tensor) or not has_attributes(holder):
            return
        seen.add(id(holder))
        for name, value in list(vars(holder).items()):
            leaves = pytree.tree_leaves(value)
            if any(isinstance(leaf, FunctionType) for leaf in leaves):
                vars(holder)[name] = pytree.tree_map_only(FunctionType, self._function, value)
            for leaf in leaves:
                self._exchange_functions(leaf, seen)

    def _function(self, original: FunctionType) -> FunctionType:
        if id(original) in self._made:
            return self._made[id(original)]
        names = self._made.setdefault(id(original.__globals__), dict(original.__globals__))
        cells = tuple(CellType() for _ in original.__closure__ or ())
        made = rebuilt(original, names, cells)
        self._made[id(original)] = self._made[id(made)] = made  # before what it refers to, which may be itself
        contents = closure_values(original)
        for name, cell in zip(original.__code__.co_freevars, cells):
            if name in contents:
                cell.cell_contents = self._reference(contents[name])
        made.__defaults__ = self._reference(original.__defaults__)
        made.__kwdefaults__ = self._reference(original.__kwdefaults__)
        names.update({name: self._reference(value) for name, value in global_objects(original).items()})
        return made

    def _reference(self, value: T) -> T:
        """A copy of what a function refers to; what holds no tensor (a logger, a scheduler) need not allow it."""
        if any(True for _ in tensors(value)):
            return self.of(value)
        return pytree.tree_map(lambda leaf: leaf, value)  # containers of its own


def rebuilt(function: FunctionType, names: dict[str, Any], cells: tuple[CellType, ...] | None) -> FunctionType:
    """The function with `names` for its globals and these cells, otherwise as it is."""
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
