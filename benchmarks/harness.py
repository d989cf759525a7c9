"""How the numbers are taken: several entries timed in turn, with what is needed to take them again.

Entries are measured round by round: in each round every entry has one turn, and the order moves on by one each
round, so that a slow moment of the machine falls on all of them. A turn is as many runs as fill `turn` seconds;
its median is one number, and the median of those over the rounds is the result. The minimum is the fastest run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"
WARM_AFTER = 0.1  # seconds of running after which a second warm-up run brings nothing


@dataclass
class Entry:
    """Something to time: `run` does `per` operations; `before` puts it back to the start and is not timed.

    `generators` are the CUDA generators that `run` draws from, which a graph has to know.
    """

    name: str
    run: Callable[[], Any]
    per: int = 1
    before: Callable[[], Any] | None = None
    generators: Sequence[torch.Generator] = ()


@dataclass
class Timing:
    """Seconds an operation: one number a round, and the fastest run of all.

    host: until the call returned, where a device may work on after that.
    """

    rounds: list[float]
    minimum: float
    runs: int
    host: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def to_dict(self) -> dict[str, Any]:
        us = [1e6 * q for q in self.quartiles]
        found = {
            "median_us": 1e6 * self.median,
            "min_us": 1e6 * self.minimum,
            "quartiles_us": us,
            "rounds": len(self.rounds),
            "runs": self.runs,
        }
        return found | ({"host_median_us": 1e6 * statistics.median(self.host)} if self.host else {})


@dataclass
class NotMeasured:
    """A number that could not be taken, and why."""

    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"status": NOT_MEASURED, "reason": self.reason}


Outcome = Timing | NotMeasured


def to_json(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    return {name: outcome.to_dict() for name, outcome in outcomes.items()}


Clock = Callable[[], float]
Wait = Callable[[], Any] | None  # waits for the device; None where there is only the host
Entries = dict[str, Entry | NotMeasured]


def failure(error: BaseException) -> NotMeasured:
    text = str(error).strip().splitlines()
    return NotMeasured(f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__)


def attempt(make: Callable[..., Entry | NotMeasured], *arguments: Any) -> Entry | NotMeasured:
    """An entry, or the reason why it cannot be made: a rival that is not installed, no memory for it."""
    try:
        return make(*arguments)
    except Exception as error:
        return failure(error)


# ------------------------------------------------------------------------------------ timing


def measure(
    entries: Entries, rounds: int, *, turn: float = 0.01, synchronize: Wait = None, clock: Clock = time.perf_counter
) -> dict[str, Outcome]:
    """Time the entries in turn.

    An entry that raises is left out from then on, and says why. Its rivals are timed all the same.
    """
    outcomes: dict[str, Outcome] = {name: e for name, e in entries.items() if isinstance(e, NotMeasured)}
    alive = {name: e for name, e in entries.items() if isinstance(e, Entry)}
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in alive}
    repeats: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        try:
            runs = [_time_once(alive[name], synchronize, clock) for _ in range(count)]
            if name not in repeats and runs[0][0] < WARM_AFTER:
                runs = [_time_once(alive[name], synchronize, clock)]  # the first one only warmed up
        except Exception as error:
            outcomes[name] = failure(error)
            del alive[name]
            return
        if name in repeats:
            found[name].append(runs)
        else:
            repeats[name] = max(1, min(100, int(turn / max(runs[0][0], 1e-9))))

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: a collection in the middle of a turn belongs to nobody
    try:
        for name in list(alive):
            visit(name, 1)  # warm-up, and how long a run takes
        for k in range(rounds):
            names = list(alive)
            first = k % len(names) if names else 0
            for name in names[first:] + names[:first]:
                visit(name, repeats[name])
    finally:
        if collecting:
            gc.enable()
    for name, entry in alive.items():
        outcomes[name] = _timing(found[name], entry.per, host=synchronize is not None)
    return {name: outcomes[name] for name in entries}


def _time_once(entry: Entry, synchronize: Wait, clock: Clock) -> tuple[float, float]:
    """Seconds until the work was done, and until the host was free again."""
    if entry.before:
        entry.before()
    if synchronize is None:
        start = clock()
        entry.run()
        end = clock()
        return end - start, end - start
    synchronize()
    start = clock()
    entry.run()
    returned = clock()
    synchronize()
    return clock() - start, returned - start


def _timing(turns: list[list[tuple[float, float]]], per: int, host: bool) -> Timing:
    done = [statistics.median(run[0] for run in turn) / per for turn in turns]
    returned = [statistics.median(run[1] for run in turn) / per for turn in turns]
    fastest = min(run[0] for turn in turns for run in turn) / per
    return Timing(done, fastest, sum(map(len, turns)), returned if host else [])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and pydiff with it, uses this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------ judging


def ratio(rival: Outcome | None, ours: Outcome | None) -> float | None:
    """How many times as long the rival's median is as ours; None where one of them was not measured."""
    if not isinstance(rival, Timing) or not isinstance(ours, Timing):
        return None
    return rival.median / ours.median


@dataclass
class Target:
    """A claim about how many times as long `above` takes as `below`, and whether it holds in this run.

    It has to hold for the medians and for the minima: a busy machine spoils the two in different ways.
    """

    claim: str
    above: Outcome | None
    below: Outcome | None
    limit: float
    at_least: bool = True

    @property
    def values(self) -> tuple[float, float] | None:
        """The ratio of the medians and that of the minima."""
        medians = ratio(self.above, self.below)
        if medians is None or not isinstance(self.above, Timing) or not isinstance(self.below, Timing):
            return None
        return medians, self.above.minimum / self.below.minimum

    @property
    def verdict(self) -> str:
        if self.values is None:
            return NOT_MEASURED
        holds = min(self.values) >= self.limit if self.at_least else max(self.values) <= self.limit
        return "pass" if holds else "miss"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"

    def to_dict(self) -> dict[str, Any]:
        medians, minima = self.values or (None, None)
        return {
            "claim": self.claim,
            "ratio_of_medians": medians,
            "ratio_of_minima": minima,
            "wanted": self.wanted,
            "verdict": self.verdict,
        }


def target_table(targets: Iterable[Target]) -> str:
    rows = [[t.claim, *map(number, t.values or (None, None)), t.wanted, t.verdict] for t in targets]
    return markdown(["target", "medians", "minima", "wanted", "verdict"], rows)


# ------------------------------------------------------------------------------------ writing down


def number(value: float | None) -> str:
    """Three significant digits; "not measured" for None."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def microseconds(outcome: Outcome | None) -> str:
    """Median and minimum."""
    if not isinstance(outcome, Timing):
        return NOT_MEASURED
    return f"{number(1e6 * outcome.median)} ({number(1e6 * outcome.minimum)})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know of the machine, the software and the source."""
    import pydiff
    from pydiff.cli import info
    from pydiff.ops import native

    processor = dict(info.processor())
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "device_kind": device.type,
        "device": torch.cuda.get_device_name(device) if on_cuda else processor["name"],
        "cpu": processor["name"],
        "cores": processor["cores"],
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": dict(info.cuda_devices())["driver"] if on_cuda else None,
        "pydiff": pydiff.__version__,
        "compiled_code": native.build_info(),
        **{name: _version(name) for name in ("numpy", "diffusers", "k-diffusion")},
        **source(),
    }


def command() -> str:
    """The command line that takes these numbers again, without --out, which names one machine's folders."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    given, kept = iter(sys.argv[1:]), []
    for word in given:
        if word == "--out":
            next(given, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["python", name, *kept])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source(root: Path = ROOT) -> dict[str, Any]:
    """The commit of a checkout, and whether files differ from it. PYDIFF_COMMIT says ours where git does not know."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("PYDIFF_COMMIT") if root == ROOT else None, "dirty": None}


def save(result: dict[str, Any], out: str | Path | None) -> Path:
    """Write a result as JSON, whole or not at all, to a .json file or into a folder (benchmarks/results/)."""
    path = Path(out) if out else RESULTS
    if path.is_dir() or path.suffix != ".json":
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
        path = path / f"{result['benchmark']}-{result['environment']['device_kind']}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def warn_if_busy(environment: dict[str, Any]) -> None:
    load = environment["load_average"][0]
    if load > 0.5:
        print(f"load average {load:.1f} at the start: other programs were running, the numbers are rough")


def chosen(text: str | None, known: Sequence[str], option: str) -> list[str]:
    """The names that an option lists with commas between; all of them where it is not given."""
    wanted = list(known) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}")
    return wanted


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--quick", action="store_true", help="two rounds: shows that it runs, measures nothing")
    p.add_argument("--rounds", type=int, help="rounds for every entry")
    p.add_argument("--out", help="JSON file or folder to write to (default: benchmarks/results/)")
    return p


def device_of(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    return torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
