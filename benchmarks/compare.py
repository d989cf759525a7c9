"""Two commits beside each other: the same short measurements of both, by turns.

    python benchmarks/compare.py --base REVISION_OR_FOLDER [--rounds 15] [--only NAMES] [--device cuda] [--out FILE]

The base is a folder with another checkout, its extension built, or a git revision, which is checked out into a
temporary worktree and built there. The head is the checkout that this file is in, as it is now.

A round starts one process for each side, so that what differs from process to process differs from round to round. In
it every measurement is taken of one side and at once of the other, and who is first changes from one to the next:
what slows the machine for a while slows both. What stands in the table:

base, head  microseconds an operation, the medians of the rounds.
ratio       head / base in each round: the median, and the interval that holds the true median unless chance is unkind.
            For all rows of the table together that happens in one table of twenty at most.
verdict     "within noise" where the interval holds 1, otherwise "faster" or "slower". Fewer rounds than the interval
            needs (10, for all rows) are too few for a verdict.
computed    whether both sides have computed the same, bit for bit, in every round.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness

ROOT = harness.ROOT
WORKER = Path(__file__).with_name("compare_worker.py")
SIDES = ("base", "head")
ROUNDS, SECONDS = 15, 0.05
CHANCE = 0.05
"""That a row of the table is called faster or slower where nothing has changed."""
Answer = dict[str, Any]  # a line of a worker
Played = tuple[dict[str, Answer], dict[str, dict[str, list[Answer]]]]
Row = dict[str, Any]  # of the table


# ------------------------------------------------------------------------------------ the two sides


@contextlib.contextmanager
def checkout(base: str, cuda: bool) -> Iterator[Path]:
    """The folder of the base: as it is given, or a worktree of a revision for as long as it is needed."""
    if (Path(base) / "pydiff" / "__init__.py").is_file():
        yield Path(base).resolve()
        return
    found = run(["git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"], ROOT)
    if found.returncode:
        raise SystemExit(f"--base: {base!r} is neither a folder with pydiff/ in it nor a revision of {ROOT}")
    with tempfile.TemporaryDirectory(prefix="pydiff-base-") as folder:
        tree = Path(folder) / "checkout"
        must(["git", "worktree", "add", "--quiet", "--detach", str(tree), found.stdout.strip()], ROOT)
        try:
            print(f"building {base} ...", flush=True)
            must([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, PYDIFF_CUDA=str(int(cuda)))
            yield tree
        finally:
            must(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def must(command: list[str], folder: Path, **environment: str) -> None:
    done = run(command, folder, **environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {folder}:\n{(done.stderr or done.stdout)[-2000:]}")


class Worker:
    """A process that measures the pydiff of one checkout; it starts at once and answers when it is asked."""

    def __init__(self, tree: Path, device: torch.device, seconds: float):
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        self.tree = tree
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(device), str(seconds)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def about(self) -> Answer:
        """What it says first: which pydiff it is, its compiled module, the names of the measurements."""
        said = self._read()
        if not Path(said["pydiff"]).is_relative_to(self.tree):
            raise SystemExit(f"pydiff came from {said['pydiff']}, not from {self.tree}")
        return said

    def ask(self, name: str) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures {self.tree} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()


def check_alike(about: dict[str, Answer]) -> None:
    """Raise unless both sides have compiled code, or none of them has: nothing else would be compared."""
    missing = [side for side in SIDES if about[side]["compiled"] is None]
    if len(missing) == 1:
        tree = Path(about[missing[0]]["pydiff"]).parents[1]
        raise SystemExit(
            f"the {missing[0]} has no compiled module, and the other side has one: "
            f"run `python setup.py build_ext --inplace` in {tree}"
        )


def play(trees: dict[str, Path], only: str | None, device: torch.device, rounds: int, seconds: float) -> Played:
    """What the sides say of themselves, and for each measurement and side its answers, one a round."""
    answers: dict[str, dict[str, list[Answer]]] = {}
    about: dict[str, Answer] = {}
    for k in range(rounds):
        with contextlib.ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(tree, device, seconds)) for side, tree in trees.items()}
            about = {side: worker.about() for side, worker in workers.items()}
            check_alike(about)
            for j, name in enumerate(chosen(only, about["head"]["names"])):
                for side in SIDES if (j + k) % 2 else SIDES[::-1]:
                    kept = answers.setdefault(name, {side: [] for side in SIDES})
                    kept[side].append(workers[side].ask(name))
        print(f"round {k + 1} of {rounds}", flush=True)
    return about, answers


def chosen(only: str | None, names: list[str]) -> list[str]:
    """The measurements whose names begin with one of the words given."""
    words = [""] if only is None else [word.strip() for word in only.split(";")]
    for word in words:
        if not any(name.startswith(word) for name in names):
            raise SystemExit(f"--only: nothing is called {word!r}; there are {'; '.join(names)}")
    return [name for name in names if name.startswith(tuple(words))]


# ------------------------------------------------------------------------------------ judging


def interval(values: Sequence[float], chance: float) -> tuple[float, float] | None:
    """Two of the values between which the median of what they were drawn from is, but for this chance."""
    n, ordered, found, outside = len(values), sorted(values), None, 0.0
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n  # the chance that at most k of them are on one side of it
        if outside <= chance:
            found = ordered[k], ordered[n - 1 - k]
    return found


def judge(name: str, answers: dict[str, list[Answer]], chance: float) -> Row:
    failed = [(side, answer["reason"]) for side in SIDES for answer in answers[side] if "reason" in answer]
    if failed:
        return {"name": name, "verdict": harness.NOT_MEASURED, "reason": f"{failed[0][0]}: {failed[0][1]}"}
    times = {side: [answer["seconds"] for answer in answers[side]] for side in SIDES}
    ratios = [head / base for base, head in zip(times["base"], times["head"], strict=True)]
    between = interval(ratios, chance)
    if between is None:
        verdict = "too few rounds"
    else:
        verdict = "faster" if between[1] < 1 else "slower" if between[0] > 1 else "within noise"
    digests = {answer["digest"] for side in SIDES for answer in answers[side]}
    return {
        "name": name,
        "times_us": {side: [1e6 * t for t in times[side]] for side in SIDES},
        "median_us": {side: 1e6 * statistics.median(times[side]) for side in SIDES},
        "ratio": statistics.median(ratios),
        "interval": between,
        "verdict": verdict,
        "computed": None if digests == {None} else "the same" if len(digests) == 1 else "not the same",
    }


def table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        if "reason" in row:
            return [row["name"], *["-"] * 4, row["verdict"], row["reason"]]
        medians = (harness.number(row["median_us"][side]) for side in SIDES)
        between = "-" if row["interval"] is None else " .. ".join(f"{r:.3f}" for r in row["interval"])
        return [row["name"], *medians, f"{row['ratio']:.3f}", between, row["verdict"], row["computed"] or "-"]

    return harness.markdown(["us", *SIDES, "head / base", "interval", "verdict", "computed"], map(cells, rows))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="a folder with another checkout, or a git revision")
    parser.add_argument("--only", help="beginnings of the names of measurements, with semicolons between")
    arguments = parser.parse_args(argv)
    device = harness.device_of(arguments)
    environment = harness.environment(device)
    harness.warn_if_busy(environment)
    rounds, seconds = arguments.rounds or (2 if arguments.quick else ROUNDS), 0.0 if arguments.quick else SECONDS
    with checkout(arguments.base, cuda=device.type == "cuda") as tree:
        base = harness.source(tree)
        about, answers = play({"base": tree, "head": ROOT}, arguments.only, device, rounds, seconds)
    rows = [judge(name, found, CHANCE / len(answers)) for name, found in answers.items()]
    verdicts = Counter(row["verdict"] for row in rows)
    print(f"\nbase {base['commit']}, head {environment['commit']}, {rounds} rounds\n\n{table(rows)}\n")
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    result = {
        "benchmark": "compare",
        "environment": environment,
        "quick": arguments.quick,
        "rounds": rounds,
        "base": {**base, "compiled_code": about["base"]["compiled"]},
        "rows": rows,
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
