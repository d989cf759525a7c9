"""What keeps code from being captured in a CUDA graph: the kinds of problems, and where in the code one stands."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Literal, NamedTuple

import torch

Kind = Literal[
    "host synchronisation",
    "data-dependent shape",
    "host-to-device copy",
    "CPU tensor",
    "allocation",
    "changes from call to call",
    "error",
]

REMEDIES: dict[Kind, str] = {
    "host synchronisation": "keep values on the device (torch.where in place of if), or compute them before sampling",
    "data-dependent shape": "keep the shape: torch.where(mask, a, b), Tensor.masked_fill or multiplying by the mask",
    "host-to-device copy": "make it on the device (torch.arange(..., device=x.device), torch.full), or keep it as a "
    "buffer of the module",
    "CPU tensor": "make it on the device with device=x.device, or before sampling: a graph would repeat its first "
    "content",
    "allocation": "write into memory that is there before the loop (out=, copy_, add_)",
    "changes from call to call": "a graph repeats what it has captured: let tensors on the device (the time, say) "
    "decide, and not attributes or counters in Python",
    "error": "call the model itself to see whether it is wrong; where it works, there is no fake kernel for what it "
    "does, and only a GPU can tell",
}


class Place(NamedTuple):
    """A line of code.

    Attributes:
        file, line, function: where it stands; lines count from 1.
    """

    file: str
    line: int
    function: str

    @property
    def code(self) -> str:
        """Its text, stripped; empty where the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True)
class Problem:
    """Something that a CUDA graph does not survive or would freeze, and the line that does it.

    Attributes:
        kind: see `Kind`. what: the operation, in words of its users.
        file, line, function, code: the innermost line that is not torch's own, stripped of its indentation.
        remedy: what to do instead.
    """

    kind: Kind
    what: str
    file: str
    line: int
    function: str
    code: str
    remedy: str

    @classmethod
    def at(cls, place: Place, kind: Kind, what: str) -> Problem:
        """The problem of a kind that what is done at a place makes, with the remedy for its kind."""
        return cls(kind, what, place.file, place.line, place.function, place.code, REMEDIES[kind])

    def __str__(self) -> str:
        return f"{self.kind}, {self.what}, at {self.file}:{self.line} in {self.function}: `{self.code}` ({self.remedy})"


def place_of_caller() -> Place:
    """The line that runs now, outside of torch and of the checker."""
    return _innermost(_outwards(sys._getframe(1)))


def place_of_error(error: BaseException) -> Place:
    """The line that raised."""
    return _innermost(reversed(list(_inwards(error.__traceback__))))


def _innermost(places: Iterator[Place]) -> Place:
    place = Place("?", 0, "?")
    for place in places:
        if not _is_passed_over(place.file):
            break
    return place


def _outwards(frame: FrameType | None) -> Iterator[Place]:
    while frame is not None:
        yield _place(frame.f_code, frame.f_lineno)
        frame = frame.f_back


def _inwards(trace: TracebackType | None) -> Iterator[Place]:
    while trace is not None:
        yield _place(trace.tb_frame.f_code, trace.tb_lineno)
        trace = trace.tb_next


def _place(code: CodeType, line: int) -> Place:
    return Place(code.co_filename, line, getattr(code, "co_qualname", code.co_name))


_FOLDERS = (*(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__)), "<frozen ")
_FILES = {contextlib.__file__, functools.__file__}


@functools.cache
def _is_passed_over(file: str) -> bool:
    """Whether a file is torch's, the checker's, or between the two."""
    return file.startswith(_FOLDERS) or file in _FILES
