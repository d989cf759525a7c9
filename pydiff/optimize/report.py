"""What `optimize` did to a model, and what it left alone and why."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Entry(NamedTuple):
    """A module of the model, and what `optimize` did to it."""

    name: str
    """The module's name in the model; "" is the model itself."""
    cls: str
    """The name of its class."""
    what: str
    """What was done, or why nothing was."""
    contract: str = ""
    """"exact" (bit for bit) or "close", for what was done."""


class Report(NamedTuple):
    """What `optimize` did to a model. Prints as a table."""

    replaced: tuple[Entry, ...]
    """The modules that have a faster form now."""
    left: tuple[Entry, ...]
    """Those that were known, and are what they were."""
    notes: tuple[str, ...] = ()
    """What about the model as a whole keeps faster forms from running."""

    def __str__(self) -> str:
        lines = []
        for title, entries in (("replaced", self.replaced), ("left as it was", self.left)):
            counts = Counter((e.cls, e.what, e.contract) for e in entries)
            lines.append(f"{title}: {len(entries)} modules")
            for (cls, what, contract), count in counts.most_common():
                lines.append(f"  {count:4d} x {cls}: {what}" + (f" [{contract}]" if contract else ""))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
