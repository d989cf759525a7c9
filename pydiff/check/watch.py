"""Watching what code does to a CUDA device, for what a CUDA graph would not survive or would freeze.

Every operator that reaches the dispatcher is judged, and the functions that wait for the device. Code runs on real
CUDA tensors, where everything is carried out as always, or on fake ones (`pydiff.check.fake_cuda`), where no GPU is
needed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydiff.check.fake_cuda import ReentrantMode
from pydiff.check.fake_cuda_functions import shape_depends_on_values
from pydiff.check.problems import Kind, Place, Problem, place_of_caller, place_of_error
from pydiff.ops import measured

aten = torch.ops.aten
Operation = tuple[str, tuple[str, ...]]

# The host waits for the value. The last is what torch.linalg looks at for a singular matrix.
_WAITING = {
    aten._local_scalar_dense: "Tensor.item() or what calls it (bool, int, float, tolist, if)",
    aten.item: "Tensor.item()",
    aten.equal: "torch.equal",
    aten.allclose: "torch.allclose",
    aten.is_nonzero: "torch.is_nonzero",
    aten._linalg_check_errors: "a check of torch.linalg (use the form that ends in _ex)",
}
_DYNAMIC = {
    aten.nonzero: "Tensor.nonzero() or torch.where(condition)",
    aten.index: "a mask as an index",
    aten.index_put: "assignment through a mask",
    aten.index_put_: "assignment through a mask",
    aten._index_put_impl_: "assignment through a mask",
    aten.masked_select: "Tensor.masked_select()",
    aten.repeat_interleave: "repeat_interleave without output_size",
    aten.bincount: "torch.bincount",
}
_TO_DEVICE = "a copy from the host (Tensor.to, torch.tensor(..., device=...))"
_TO_HOST = "a copy to the host (Tensor.cpu(), Tensor.to)"
# What waits for the device, or frees its memory, without an operator.
_FUNCTIONS = (
    (torch.cuda, "synchronize", "torch.cuda.synchronize()"),
    (torch.accelerator, "synchronize", "torch.accelerator.synchronize()"),
    (torch.cuda.Event, "synchronize", "torch.cuda.Event.synchronize()"),
    (torch.cuda.Stream, "synchronize", "torch.cuda.Stream.synchronize()"),
    (torch.cuda, "empty_cache", "torch.cuda.empty_cache()"),
)
_WITHOUT_CUDA = ("not linked with support for cuda", "not compiled with CUDA", "built with CUDA")
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_one_at_a_time = threading.RLock()  # the functions above are exchanged for the whole process


class Watch:
    """Records, while it is entered, what keeps the code inside from being captured. Enter it once, in one thread.

        with Watch() as watch:
            loop(watch.model(model))
        print(watch.problems)

    Args:
        allocations: record also every operator outside the model that returns new CUDA memory.

    Attributes:
        calls: how many times the model was called.
        operators: how many operators were seen.
    """

    def __init__(self, *, allocations: bool = False):
        self.allocations = allocations
        self.calls = self.operators = 0
        self._found: dict[tuple[Kind, str, int], Problem] = {}
        self._sequence = _Sequence()
        self._in_model = False
        self._stack = contextlib.ExitStack()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What was found, in the order of its first appearance; one for each kind and line."""
        return tuple(self._found.values())

    def __enter__(self) -> Watch:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_at_a_time)
            for owner, name, what in _FUNCTIONS:
                stack.enter_context(self._recorded(owner, name, what))
            stack.enter_context(_WatchedOperators(self))
            stack.enter_context(_WatchedFunctions(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def model(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The model, known as such: it may allocate, and every call has to do what the second one did."""

        @functools.wraps(function, updated=())
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self._in_model = True
            self._sequence.begin(self.calls)
            try:
                result = function(*args, **kwargs)
            finally:
                self._in_model = False
            missing = self._sequence.end()
            if missing is not None:
                self.record("changes from call to call", f"{missing[0]} is left out in call {self.calls}", missing[1])
            return result

        return watched

    def record(self, kind: Kind, what: str, place: Place | None = None) -> None:
        """Note a problem at the line that runs now, or at `place`."""
        place = place or place_of_caller()
        # Measuring which kernel is fastest has to wait, and is never done where it must not.
        if place.file != measured.__file__:
            self._found.setdefault((kind, place.file, place.line), Problem.at(place, kind, what))

    def failed(self, error: Exception) -> None:
        """Note the error that ended the code, unless something found before explains it."""
        if not self._found:
            text = str(error).strip().partition("\n")[0]
            if any(words in text for words in _WITHOUT_CUDA):
                text += " (this torch has no CUDA, and what follows cannot be seen without a GPU)"
            self.record("error", f"{type(error).__name__}: {text}", place_of_error(error))

    @contextlib.contextmanager
    def _recorded(self, owner: Any, name: str, what: str) -> Iterator[None]:
        original, thread = getattr(owner, name), threading.get_ident()

        @functools.wraps(original)
        def recording(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                self.record("host synchronisation", what)
            return original(*args, **kwargs) if torch.cuda.is_available() else None

        setattr(owner, name, recording)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def before(self, operation: Any, args: Any, kwargs: Any) -> None:
        """Judge an operator by its arguments."""
        if operation.namespace == "profiler":  # marks for a profiler, which no graph records
            return
        self.operators += 1
        packet = operation.overloadpacket
        if self._in_model:
            changed = self._sequence.add(operation, args, kwargs)
            if changed is not None:
                self.record("changes from call to call", f"{changed} in call {self.calls}")
        if not _on_cuda((args, kwargs)):
            return
        if packet in _WAITING or torch.Tag.data_dependent_output in operation.tags:
            if _on_cuda(args[:1]):
                self.record("host synchronisation", _WAITING.get(packet, _name(operation)))
        elif shape_depends_on_values(operation, args, kwargs):
            self.record("data-dependent shape", _DYNAMIC.get(packet, _name(operation)))

    def after(self, operation: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Judge an operator by what it returned."""
        packet = operation.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            source, target = args[packet is aten.copy_].device.type, result.device.type
            if (source, target) == ("cpu", "cuda"):
                self._copied_to_device()
            elif (source, target) == ("cuda", "cpu"):
                self.record("host synchronisation", _TO_HOST)
        made = _made(args, kwargs, result)
        if self.allocations and not self._in_model and _on_cuda(made):
            self.record("allocation", f"{_name(operation)} returns new memory")
        from_nothing = packet is aten.lift_fresh or not _has_tensors((args, kwargs))
        if from_nothing and any(t.device.type == "cpu" and t.dim() for t in pytree.tree_leaves(result) if _is(t)):
            self.record("CPU tensor", f"{_name(operation)} makes one".replace("lift_fresh", "torch.tensor"))

    def _copied_to_device(self) -> None:
        """The copy says it all: drop that its source was made in the same line."""
        place = place_of_caller()
        self._found.pop(("CPU tensor", place.file, place.line), None)
        self.record("host-to-device copy", _TO_DEVICE, place)


class _WatchedOperators(TorchDispatchMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.watch.before(operation, args, kwargs)
        result = operation(*args, **kwargs)
        self.watch.after(operation, args, kwargs, result)
        return result


class _WatchedFunctions(ReentrantMode):
    """Sees printing, which torch hides from the dispatcher's modes."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__repr__ and _on_cuda(args):
            self.watch.record("host synchronisation", "print(tensor), str(tensor) or repr(tensor)")
        return super().__torch_function__(function, types, args, kwargs)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


class _Sequence:
    """The operators of the model's second call, with which those of every later call are compared.

    The first call may fill caches. Operators are equal that have the same name, shapes, dtypes and numbers.
    """

    def __init__(self) -> None:
        self._second: list[tuple[Operation, Place]] = []
        self._call = self._position = 0
        self._differs = False

    def begin(self, call: int) -> None:
        self._call, self._position = call, 0

    def add(self, operation: Any, args: Any, kwargs: Any) -> str | None:
        """The difference, in words, at the first operator that does not stand in the second call at this place."""
        if self._call < 2 or self._differs:
            return None
        here = (_name(operation), tuple(map(_described, pytree.tree_leaves((args, kwargs)))))
        if self._call == 2:
            self._second.append((here, place_of_caller()))
            return None
        before = self._second[self._position][0] if self._position < len(self._second) else None
        self._position += 1
        if here == before:
            return None
        self._differs = True
        if before is None or here[0] != before[0]:
            return f"{here[0]} stands where {before[0] if before else 'nothing'} stood in call 2"
        return f"{here[0]} has other shapes or numbers than in call 2"

    def end(self) -> tuple[str, Place] | None:
        """The first operator of the second call, and its line, that this call did not reach."""
        if self._call < 3 or self._differs or self._position == len(self._second):
            return None
        self._differs = True
        (name, _), place = self._second[self._position]
        return name, place


def _described(leaf: Any) -> str:
    """An argument without what the device holds; a number in a CPU tensor is one like any other."""
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__name__  # repr may hold an address
    value = getattr(leaf, "constant", leaf) if leaf.device.type == "cpu" and leaf.dim() == 0 else None
    number = "" if value is None else repr(value.item())
    return f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device.type} {number}"


def _name(operation: Any) -> str:
    return operation._schema.name.removeprefix("aten::")


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _has_tensors(value: Any) -> bool:
    return any(map(_is, pytree.tree_leaves(value)))


def _on_cuda(value: Any) -> bool:
    return any(_is(leaf) and leaf.device.type == "cuda" for leaf in pytree.tree_leaves(value))


def _made(args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    """The tensors returned that are neither arguments nor views of one."""
    given = {_storage(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if _is(leaf)}
    return [leaf for leaf in pytree.tree_leaves(result) if _is(leaf) and _storage(leaf) not in given]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
