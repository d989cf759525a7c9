"""What `pydiff sample` writes: a folder of PNGs, arrays, tensors, or one picture.

Every kind takes one finished batch at a time and puts it on disk at once: a folder as files of its own, the others into
a hidden folder beside the target, of which the file is made in the end. What is kept there says itself how it was made:
so an interrupted command goes on where it stopped when it is given again, and never with what another command has left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pydiff.cli.common import UsageError, as_texts, check_output, write_whole
from pydiff.cli.picture import (
    PICTURES,
    check_format,
    check_page,
    columns_of,
    lay_out,
    read_text,
    to_uint8,
    write_picture,
)

SHOWN = 3  # of the differences between two commands, on one line
SAMPLE = re.compile(r"\d{6,}\.png")  # the name of a sample in a folder
Texts = dict[str, str]


@dataclass(frozen=True)
class Job:
    """What a command draws.

    Attributes:
        n, batch: how many samples, and how many at a time.
        seed: sample k has the seed `seed` + k.
        classes: the labels of the samples, used in turn.
        settings: all else that decides the samples; JSON-able.
    """

    n: int
    batch: int
    seed: int
    classes: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """What two commands must agree in to give the same bits."""
        return {"seed": self.seed, "n": self.n, "batch": self.batch, **self.settings}

    def batches(self) -> Iterator[range]:
        """The numbers of the samples that are drawn together."""
        return (range(start, min(start + self.batch, self.n)) for start in range(0, self.n, self.batch))

    def seeds(self, numbers: range) -> list[int]:
        """The seeds of some samples."""
        return [self.seed + k for k in numbers]

    def labels(self, numbers: range) -> list[int]:
        """The classes of some samples."""
        return [self.classes[k % len(self.classes)] for k in numbers]


class Target(ABC):
    """Where samples go. Finished batches are kept in the folder `kept`; `finish` makes the target of them."""

    uses: tuple[str, ...] = ()  # which of --columns and --scale mean something here

    def __init__(self, out: str, columns: int | None, scale: int, overwrite: bool):
        self.out, self.path, self.columns, self.scale, self.overwrite = out, Path(out), columns, scale, overwrite
        self.kept = self.path
        for option, given in {"--columns": columns is not None, "--scale": scale != 1}.items():
            if given and option not in self.uses:
                raise UsageError(f"{option}: it has no meaning for --out {out}; leave it out")

    @abstractmethod
    def check(self, shape: tuple[int, ...], n: int) -> None:
        """Raise unless n samples of that shape can be written."""

    def content(self, n: int) -> str:
        """What the target holds, in words."""
        return f"{n} samples"

    @abstractmethod
    def parts(self) -> Iterator[tuple[Path, Texts | None]]:
        """The files that are kept, each with the metadata of its command; None where it has none."""

    @abstractmethod
    def has(self, job: Job, batch: range) -> bool:
        """Whether a batch is kept, all of it."""

    @abstractmethod
    def add(self, job: Job, batch: range, samples: np.ndarray) -> None:
        """Keep a batch, float [B, *sample]."""

    @abstractmethod
    def discard(self) -> None:
        """Delete what is kept."""

    @abstractmethod
    def finish(self, job: Job) -> None:
        """Make the target, once all batches are kept."""

    def finished(self, job: Job) -> bool:
        """Whether the target is there, and making it would do it over."""
        return False

    def metadata(self, job: Job) -> dict[str, Any]:
        """What a file that is kept must agree in to be of this job."""
        return job.metadata

    def begin(self, job: Job, any_seed: bool) -> Job:
        """The job, once what is kept is known to be a part of it, or is deleted because the user says so.

        any_seed: the user gave no seed, and goes on with that of a part that agrees in all else.
        """
        try:
            first = next(self.parts(), (None, None))[1]
            own = replace(job, seed=int(first["seed"])) if any_seed and first and "seed" in first else job
            wrong = next(filter(None, (self._wrong(path, found, own) for path, found in self.parts())), None)
            if wrong and not self.overwrite:
                raise UsageError(f"--out {self.out}: {wrong}; give another name, --overwrite, or delete {self.kept}")
            if not wrong and not (self.overwrite and self.finished(own)):
                return own
            self.discard()
            return job
        except OSError as error:
            raise UsageError(f"--out {self.out}: {error}; give another name") from None

    def _wrong(self, path: Path, found: Texts | None, job: Job) -> str | None:
        """Why a file that is kept is not of this job."""
        if found is None:
            return f"{path} cannot be read or is no file of this command"
        wanted = as_texts(self.metadata(job))
        odd = [
            f"{key} {found.get(key, 'missing')} there, {wanted.get(key, 'missing')} here"
            for key in {**wanted, **found}
            if found.get(key) != wanted.get(key)
        ]
        more = [f"{len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
        return f"{path} is of another command ({'; '.join(odd[:SHOWN] + more)})" if odd else None

    def _keep(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """A file in `kept`, which is made with its first file, and goes with it if that cannot be written."""
        made = not self.kept.exists()
        try:
            self.kept.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {self.out}: cannot make the folder {self.kept} ({error.strerror})") from None
        try:
            write_whole(path, write, "--out")
        except BaseException:
            if made:
                with suppress(OSError):  # another run may have begun to write here
                    self.kept.rmdir()
            raise


class Folder(Target):
    """One PNG a sample, with its metadata as text: 000000.png and so on."""

    uses = ("--scale",)

    def __init__(self, out: str, columns: int | None, scale: int, overwrite: bool):
        super().__init__(out, columns, scale, overwrite)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {out}: there is a file of that name; give the name of a folder")
        check_output(self.path / "000000.png" if self.path.is_dir() else self.path, "--out")
        others = [name for name in self._names() if not SAMPLE.fullmatch(name)]
        if others and not overwrite:
            raise UsageError(
                f"--out {out}: other files are in it, such as {min(others)}; give a new or an empty folder, "
                "or --overwrite to write beside them"
            )

    def _names(self) -> Iterator[str]:
        """What is in the folder, apart from hidden files."""
        if self.path.is_dir():
            with os.scandir(self.path) as entries:
                yield from (entry.name for entry in entries if entry.name[0] != ".")

    def check(self, shape: tuple[int, ...], n: int) -> None:
        check_page(shape, 1, None, self.scale, ".png")

    def parts(self) -> Iterator[tuple[Path, Texts | None]]:
        for name in self._names():
            if SAMPLE.fullmatch(name):
                yield self.path / name, self._read(self.path / name)

    @staticmethod
    def _read(path: Path) -> Texts | None:
        """What a sample says of its command, whose seed is that of sample 0."""
        try:
            text = read_text(path)
            del text["label"]
            return {**text, "seed": str(int(text["seed"]) - int(path.stem))}
        except (OSError, ValueError, KeyError):
            return None

    def _path(self, job: Job, number: int) -> Path:
        return self.path / f"{number:0{max(6, len(str(job.n - 1)))}}.png"

    def metadata(self, job: Job) -> dict[str, Any]:
        return {**job.metadata, "scale": self.scale}

    def has(self, job: Job, batch: range) -> bool:
        return all(self._path(job, number).exists() for number in batch)

    def add(self, job: Job, batch: range, samples: np.ndarray) -> None:
        for number, seed, label, cell in zip(batch, job.seeds(batch), job.labels(batch), to_uint8(samples)):
            text = {**self.metadata(job), "seed": seed, "label": label}
            write = partial(write_picture, pixels=cell, scale=self.scale, suffix=".png", metadata=text)
            self._keep(self._path(job, number), write)

    def discard(self) -> None:
        for path, found in self.parts():
            if found is None:
                raise UsageError(f"--out {self.out}: {path} is no file of this command; move it away")
        for path in [path for path, _ in self.parts()]:
            path.unlink()

    def finish(self, job: Job) -> None:
        """Nothing is left to do: the samples are the target."""

    def finished(self, job: Job) -> bool:
        return all(self.has(job, batch) for batch in job.batches())


class OneFile(Target):
    """A file that is made of batches kept beside it, in a hidden folder, as one archive of arrays each."""

    def __init__(self, out: str, columns: int | None, scale: int, overwrite: bool):
        super().__init__(out, columns, scale, overwrite)
        self.kept = self.path.with_name(f".{self.path.name}.part")
        check_output(self.path, "--out")

    @abstractmethod
    def write(self, file: BinaryIO, job: Job) -> None:
        """The target, of `self.samples(job)`."""

    def check(self, shape: tuple[int, ...], n: int) -> None:
        """Arrays have any shape."""

    def parts(self) -> Iterator[tuple[Path, Texts | None]]:
        for path in sorted(self.kept.glob("*.npz")):
            try:
                yield path, as_texts(json.loads(str(_read_array(path, "metadata"))))
            except ValueError:
                yield path, None

    def _path(self, batch: range) -> Path:
        return self.kept / f"{batch.start:06d}.npz"

    def has(self, job: Job, batch: range) -> bool:
        return self._path(batch).exists()

    def add(self, job: Job, batch: range, samples: np.ndarray) -> None:
        self._keep(self._path(batch), lambda file: _write_arrays(file, job, batch, samples))

    def discard(self) -> None:
        shutil.rmtree(self.kept)

    def finish(self, job: Job) -> None:
        write_whole(self.path, lambda file: self.write(file, job), "--out")
        shutil.rmtree(self.kept, ignore_errors=True)

    def samples(self, job: Job) -> Iterator[np.ndarray]:
        """The batches, in order."""
        for path in map(self._path, job.batches()):
            try:
                yield _read_array(path, "samples")
            except ValueError as error:
                raise UsageError(f"--out {self.out}: {error}; delete it and give the command again") from None


def _read_array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path) as data:
            return data[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def _write_arrays(file: BinaryIO, job: Job, numbers: range, samples: np.ndarray) -> None:
    """An archive of samples [N, *sample], their seeds and labels, int64 [N], and the metadata as JSON text."""
    seeds, labels = np.array(job.seeds(numbers), np.int64), np.array(job.labels(numbers), np.int64)
    np.savez(file, samples=samples, seeds=seeds, labels=labels, metadata=np.array(json.dumps(job.metadata)))


class Arrays(OneFile):
    """An archive of arrays, as `numpy.load` reads it."""

    def write(self, file: BinaryIO, job: Job) -> None:
        _write_arrays(file, job, range(job.n), np.concatenate(list(self.samples(job))))


class Tensors(OneFile):
    """The same as a dictionary of tensors, as `torch.load` reads it."""

    def write(self, file: BinaryIO, job: Job) -> None:
        import torch

        everything = {
            "samples": torch.from_numpy(np.concatenate(list(self.samples(job)))),
            "seeds": torch.tensor(job.seeds(range(job.n))),
            "labels": torch.tensor(job.labels(range(job.n))),
            "metadata": job.metadata,
        }
        torch.save(everything, file)


class Picture(OneFile):
    """A grid of samples; a PNG with the metadata as text."""

    uses = ("--columns", "--scale")

    def __init__(self, out: str, columns: int | None, scale: int, overwrite: bool):
        super().__init__(out, columns, scale, overwrite)
        self.suffix = self.path.suffix.lower()
        check_format(out, self.suffix)

    def check(self, shape: tuple[int, ...], n: int) -> None:
        check_page(shape, n, self.columns, self.scale, self.suffix)

    def content(self, n: int) -> str:
        return f"{n} samples, {columns_of(n, self.columns)} a row"

    def write(self, file: BinaryIO, job: Job) -> None:
        cells = np.concatenate([to_uint8(samples) for samples in self.samples(job)])
        text = {**job.metadata, "labels": job.labels(range(job.n))}
        page = lay_out(cells, columns_of(job.n, self.columns))
        write_picture(file, page, self.scale, self.suffix, text)


KINDS: dict[str, type[Target]] = {".npz": Arrays, ".pt": Tensors, **dict.fromkeys(PICTURES, Picture)}


def make_target(out: str, columns: int | None, scale: int, overwrite: bool) -> Target:
    """The target that a path names: a folder where it is one or ends like one, else what the suffix says."""
    suffix = Path(out).suffix.lower()
    is_folder = out.endswith(("/", os.sep)) or os.path.isdir(out)
    if not is_folder and suffix not in KINDS:
        raise UsageError(f"--out {out}: unknown suffix {suffix!r}; use a folder ({out or 'x'}/), {', '.join(KINDS)}")
    kind = Folder if is_folder else KINDS[suffix]
    try:
        return kind(out, columns, scale, overwrite)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; choose another folder or name") from None
