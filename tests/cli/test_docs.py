"""What docs/command_line.md says of the command line is complete. (That its snippets run is tests/test_docs.py's.)"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from pydiff.cli import main, output

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


def test_every_command_and_every_kind_of_output_is_there():
    commands = re.findall(r"^\| `pydiff (\w+)", PAGE, re.M)
    assert all(f"`{suffix}`" in PAGE for suffix in output.KINDS)
    helped = main.build_parser().format_help()
    assert sorted(commands) == sorted(re.findall(r"^    (\w+) ", helped, re.M))


def test_every_key_of_the_metadata_is_explained(run, folder, weights):
    for out in ("x/", "x.png"):
        run("sample", "--model", weights, "--n", 1, "--steps", 1, "--out", out)
    section = PAGE.partition("## What a result says of itself")[2].partition("```")[0]
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", section, re.M))))
    assert explained == set(Image.open("x/000000.png").text) | set(Image.open("x.png").text)
