"""The fenced blocks of README.md and docs/, and what it takes to run them as a reader does: each by itself.

    python tests/snippets.py README.md docs/*.md

A comment before a block, `<!-- needs: NAME ... -->`, says what must be there: `gpu`, or a module that pydiff does not
install. Where it is not, the block is compiled only. `<!-- main-command -->` and `<!-- test-command -->` are left to
`.ci/run`. Needs no pytest, so that it runs where the main command alone has installed something.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^(?:<!-- (?P<comment>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
COMMANDS = ("main-command", "test-command")


@dataclass(frozen=True)
class Snippet:
    """A fenced block: the file and line where it begins, and the names after `needs:`."""

    place: str
    language: str
    code: str
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What runs it, with this very Python."""
        return [sys.executable, "-c", self.code] if self.language == "python" else ["bash", "-euc", self.code]

    def compile(self) -> None:
        """Raise SyntaxError if it could not run anywhere."""
        if self.language == "python":
            compile(self.code, self.place, "exec")
        else:
            done = subprocess.run(["bash", "-n"], input=self.code, capture_output=True, text=True)
            if done.returncode:
                raise SyntaxError(f"{self.place}: {done.stderr}")

    def missing(self) -> list[str]:
        """Of what it needs, what is not here."""
        return [name for name in self.needs if not there(name)]

    def run(self, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run it in `folder`, in a new process, where `python` and `pydiff` are those of this Python."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        env = {**os.environ, "PATH": path, **env}
        return subprocess.run(self.command, cwd=folder, env=env, capture_output=True, text=True)


def there(name: str) -> bool:
    if name != "gpu":
        return importlib.util.find_spec(name) is not None
    import torch

    return torch.cuda.is_available()


def snippets(path: Path) -> list[Snippet]:
    """The python and bash blocks of a Markdown file. A block in any other language is text."""
    text, found = path.read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(text):
        comment, line = block["comment"] or "", text.count("\n", 0, block.start("code"))
        word, _, names = comment.partition(":")
        if block["language"] not in ("python", "bash") or comment in COMMANDS:
            continue
        if word.startswith("needs") and not (word == "needs" and names.split()):
            raise ValueError(f"{path.name}:{line}: write <!-- needs: NAME ... -->, got <!-- {comment} -->")
        needs = tuple(names.split()) if word == "needs" else ()
        found.append(Snippet(f"{path.name}:{line}", block["language"], block["code"], needs))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the snippets of Markdown files in this folder, as it stands.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    failed = 0
    for snippet in [s for file in parser.parse_args().files for s in snippets(file)]:
        snippet.compile()
        if missing := snippet.missing():
            print(f"{snippet.place}: compiled only, it needs {', '.join(missing)}", flush=True)
            continue
        start = time.perf_counter()
        done = snippet.run(Path.cwd())
        failed += done.returncode != 0
        print(
            f"{snippet.place}: {'failed' if done.returncode else 'ran'} in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        if done.returncode:
            print(snippet.code, done.stdout, done.stderr, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
