"""What README.md and docs/ show runs as shown, and what they name is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pydiff
from pydiff.plans import table
from tests.snippets import Snippet, snippets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"))]
PLANS = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like this one from inside, and keeps what a snippet writes."""
    for path in ROOT.iterdir():
        if path.name[0] != ".":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.place)
def test_every_snippet_stands_alone(snippet: Snippet, clone: Path) -> None:
    snippet.compile()
    if missing := snippet.missing():
        pytest.skip(f"compiled only: it needs {', '.join(missing)}")
    done = snippet.run(clone, OMP_NUM_THREADS="1")  # as all tests: a second thread costs more than it brings
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_snippet_that_does_not_stand_alone_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n```python\nprint(x)\n```\n```bash\npydiff nothing\necho reached\n```\n"
        "<!-- needs: no_such_module -->\n```python\nimport no_such_module\n```\n"
        "<!-- main-command -->\n```bash\nfalse\n```\n```text\nno code\n```\n```python\nif\n```\n"
    )
    first, second, third, fourth, fifth = snippets(page)
    assert first.run(tmp_path).returncode == 0 and first.place == "page.md:1"
    assert "NameError" in second.run(tmp_path).stderr
    stopped = third.run(tmp_path)
    assert stopped.returncode and "nothing" in stopped.stderr and not stopped.stdout
    assert fourth.missing() == ["no_such_module"] and not first.missing()
    with pytest.raises(SyntaxError):
        fifth.compile()
    page.write_text("<!-- needs gpu -->\n```python\n```\n")
    with pytest.raises(ValueError, match="page.md:2.*needs: NAME"):
        snippets(page)


def test_there_are_snippets_of_both_kinds() -> None:
    count = {kind: sum(snippet.language == kind for snippet in SNIPPETS) for kind in ("python", "bash")}
    assert count["python"] >= 8 and count["bash"] >= 2


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def tracked() -> set[str] | None:
    """Every file and folder that git knows, or None where this is no checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [Path(line) for line in listed.stdout.splitlines()]
    return {str(path) for file in files for path in (file, *file.parents)} if listed.returncode == 0 else None


def broken_links(page: Path) -> list[str]:
    """The relative links and pictures of a page that lead nowhere, or to what is not in the repository."""
    known, broken = tracked(), []
    for target in re.findall(r"\]\(([^()\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        inside = file.exists() and (
            known is None or not file.is_relative_to(ROOT) or str(file.relative_to(ROOT)) in known
        )
        if not inside or (anchor and anchor not in headings(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words, `three`\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md#two-words-three) [b](#top) [c](https://x.y/z) ![d](lost.png) [e](#no-heading)\n"
    )
    assert broken_links(page) == ["lost.png", "#no-heading"]
    ignored = ROOT / "pydiff" / "__pycache__"
    if tracked() is not None and ignored.exists():
        page.write_text(f"[f]({ignored}) [g]({ROOT / 'pydiff'}) [h]({ROOT / 'README.md'}#use)\n")
        assert broken_links(page) == [str(ignored)]


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    if importlib.util.find_spec(name):
        return True
    parent, _, last = name.rpartition(".")
    return hasattr(importlib.import_module(parent), last)


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("NAME", "residual").replace("FAMILY", "vae")
    if page.name == "CHANGELOG.md":  # of what has moved, where it is now
        text = "\n".join(re.findall(r"^  \| .* \| (.*) \|$", text, re.M))
        assert text.count("pydiff.") > 10
    folders = "benchmarks|csrc|docs|examples|kernels|pydiff|tests"
    for name in re.findall(rf"(?<![\w/])((?:{folders})/[\w/.<>-]*[\w/])", text):
        stands_for_many = "<" in name  # kernels/<op>.py
        assert stands_for_many or (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    for name in re.findall(r"\b(pydiff\.\w+(?:\.\w+)*)", text):
        assert name == "pydiff._C" or is_there(name), name


def test_the_columns_of_a_plan_are_where_the_page_says() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PLANS, re.M)
    assert len(rows) == 8
    assert all(getattr(table, name) == int(column) for column, name in rows)
    assert f"[stages, {table.COEFFICIENT_COLUMNS}]" in PLANS and f"[stages, {table.INDEX_COLUMNS}]" in PLANS


def test_the_printed_plan_is_what_prints() -> None:
    plan = pydiff.make_plan("dpmpp_2m", pydiff.VPLinear(), steps=4, prediction="epsilon")
    assert "".join(f"    {line}\n" for line in str(plan).splitlines()) in PLANS


def test_the_test_of_the_solver_on_the_page_can_fail(tmp_path: Path) -> None:
    """In a process of its own: the registry of this one stays as it is."""
    (snippet,) = [s for s in snippets(ROOT / "docs" / "plans.md") if "damping: float = 0.0" in s.code]
    wrong = snippet.code.replace("damping: float = 0.0", "damping: float = 0.1")
    assert "AssertionError" in Snippet(snippet.place, "python", wrong).run(tmp_path).stderr
