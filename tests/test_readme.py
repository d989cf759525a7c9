"""What README.md promises is kept: its commands are those that are tried, its numbers have a source."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pydiff.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_MEASURED = "not measured"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def marked(marker: str) -> str:
    """The fenced block that follows a marker."""
    return blocks(README.partition(f"<!-- {marker} -->\n")[2], "bash")[0]


def words(command: str) -> list[list[str]]:
    return [shlex.split(part) for part in command.strip().split("&&")]


@pytest.mark.parametrize("marker, extra", [("main-command", ""), ("test-command", "test")])
def test_the_command_lines_are_one_line_and_set_themselves_up(marker, extra):
    command = marked(marker)
    assert command.count("\n") == 1
    venv, install, last = words(command)
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[:2] == [".venv/bin/pip", "install"] and "constraints.txt" in install
    assert install[-2:] == ["-e", f".[{extra}]" if extra else "."]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if extra:
        assert re.search(rf"^{extra} = \[", project, re.M)
        assert last[:3] == [".venv/bin/python", "-m", "pytest"]
    else:
        assert 'pydiff = "pydiff.cli.main:main"' in project and last[0] == ".venv/bin/pydiff"


@pytest.mark.parametrize("marker", ["main-command", "test-command"])
def test_the_continuous_check_runs_exactly_these_commands(marker, tmp_path):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{\n.*?^\}\n", script, re.M | re.S)
    assert function is not None
    command = ["bash", "-euo", "pipefail", "-c", f"{function[0]}\nreadme_command {marker}"]
    (tmp_path / "README.md").write_text("no marker\n```bash\nrm\n```\n")  # nothing is taken from elsewhere
    for folder, expected in ((ROOT, marked(marker)), (tmp_path, "")):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.stdout == expected and done.returncode == 0


def test_every_pydiff_command_parses():
    text = "\n".join(blocks(README, "bash"))
    commands = [w for line in text.split("\n") if line for w in words(line) if Path(w[0]).name == "pydiff"]
    assert len(commands) >= 5
    for command in commands:
        assert callable(main.build_parser().parse_args(command[1:]).run)


def test_every_number_in_the_table_has_a_command_and_a_result_file():
    lines = README.partition("<!-- measured -->\n")[2].partition("<!-- /measured -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-2:] == ["command", "result"] and len(rows) > 2
    for row in rows[2:]:
        assert len(row) == len(rows[0]), row
        command = re.fullmatch(r"`([^`]+)`", row[-2])
        assert command, f"no command: {row}"
        if all(NOT_MEASURED in cell for cell in row[1:-2]):
            continue
        source = re.fullmatch(r"\[[^\]]+\]\((benchmarks/results/[^)]+)\)", row[-1])
        assert source and (ROOT / source[1]).is_file(), f"no result file: {row}"
        script = next(word for word in shlex.split(command[1]) if word.startswith("benchmarks"))
        assert (ROOT / script).is_file() or (ROOT / (script.replace(".", "/") + ".py")).is_file(), row


def test_the_licence_and_the_changelog_are_what_they_should_be():
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "keepachangelog.com" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
