"""Samples as pixels: how many fit into a picture, where they lie in it, and the file it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pydiff.cli.common import UsageError, as_texts

PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}  # JPEG has 16 bits, of which libjpeg takes this many
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # from here on Pillow warns of a picture when it opens it


def check_format(out: str, suffix: str) -> None:
    """Raise unless this Pillow can write the format."""
    Image.init()
    if PICTURES[suffix] not in Image.SAVE:
        raise UsageError(f"--out {out}: this Pillow cannot write {PICTURES[suffix]}; use .png")


def columns_of(n: int, columns: int | None) -> int:
    """How many samples lie in a row: as many as asked for, or as make a square."""
    return min(columns or math.isqrt(n - 1) + 1, n)


def check_page(shape: tuple[int, ...], n: int, columns: int | None, scale: int, suffix: str) -> None:
    """Raise unless n samples of that shape make a picture, and one that the format and its readers can take."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"--out: samples of shape {list(shape)} make no picture, which needs [1 or 3, height, width]; "
            "use .npz or .pt"
        )

    def size(n: int, columns: int | None, scale: int) -> tuple[int, int]:
        row = columns_of(n, columns)
        return row * shape[2] * scale, -(-n // row) * shape[1] * scale

    def fits(n: int, columns: int | None, scale: int) -> bool:
        width, height = size(n, columns, scale)
        return width * height <= MOST_PIXELS and max(width, height) <= LONGEST_SIDE.get(PICTURES[suffix], MOST_PIXELS)

    if fits(n, columns, scale):
        return
    width, height = size(n, columns, scale)
    why = f"a picture of {width} x {height} pixels is too large for {suffix}"
    if fits(n, columns, 1):
        raise UsageError(f"--scale {scale}: {why}; give at most {_largest(lambda k: fits(n, columns, k), scale)}")
    if columns and fits(n, None, 1):
        nearest = min((k for k in range(1, n + 1) if fits(n, k, 1)), key=lambda k: abs(k - columns))
        raise UsageError(f"--columns {columns}: {why}; at --scale 1, {nearest} is the nearest that works")
    most = _largest(lambda k: fits(k, None, 1), n)
    raise UsageError(f"--n {n}: {why}; give at most {most} (--scale 1, a square), or write a folder, .npz or .pt")


def _largest(works: Callable[[int], bool], bad: int) -> int:
    """The largest number below `bad` that works, where all numbers below one that works do too; 0 if none does."""
    good = 0
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def to_uint8(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as uint8."""
    return ((samples.astype(np.float32).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def lay_out(cells: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, C, H, W] as one picture [C, rows * H, columns * W], black where the last row ends."""
    count, channels, height, width = cells.shape
    rows = -(-count // columns)
    page = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
    page[:count] = cells
    page = page.reshape(rows, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    return page.reshape(channels, rows * height, columns * width)


def write_picture(file: BinaryIO, pixels: np.ndarray, scale: int, suffix: str, metadata: dict[str, Any]) -> None:
    """Write uint8 [1 or 3, H, W]. A PNG carries the metadata as text chunks, other formats none."""
    page = pixels.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
    options, buffer = {}, BytesIO()
    if suffix == ".png":
        options["pnginfo"] = PngInfo()
        for key, text in as_texts(metadata).items():
            options["pnginfo"].add_text(key, text)
    Image.fromarray(page[:, :, 0] if len(pixels) == 1 else page).save(buffer, PICTURES[suffix], **options)
    file.write(buffer.getvalue())  # some formats seek while they are written


def read_text(path: Path) -> dict[str, str]:
    """The text that a PNG carries. Raises ValueError or OSError where that is no picture."""
    try:
        with Image.open(path) as picture:
            return {key: str(value) for key, value in picture.info.items() if isinstance(value, str)}
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
