"""Two commits beside each other: what is called faster, slower or the same, and where the base comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import compare

ROOT = Path(__file__).resolve().parents[2]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def judged(base: list[float], head: list[float], *, digests=("a", "a"), chance: float = 0.01) -> dict:
    sides = zip(("base", "head"), (base, head), digests)
    answers = {side: [{"seconds": s, "digest": d} for s in seconds] for side, seconds, d in sides}
    return compare.judge("it", answers, chance)


# ------------------------------------------------------------------------------------ judging


def test_the_interval_leaves_out_what_chance_allows():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 6.0, 8.0, 7.0, 0.0]
    assert compare.interval(values, 2 / 2**10) == (0.0, 9.0)
    assert compare.interval(values, 1.9 / 2**10) is None
    assert compare.interval(values, 2 * (1 + 10) / 2**10) == (1.0, 8.0)
    assert compare.interval(values, 1.0) == (4.0, 5.0)
    assert compare.interval([], 1.0) is None and compare.interval([1.0], 1.0) is None


def test_a_side_is_faster_or_slower_only_where_the_rounds_agree():
    base = [1.0 + 0.1 * k for k in range(8)]  # the machine slows down, for both
    slower = judged(base, [1.02 * t for t in base])
    assert slower["verdict"] == "slower" and slower["ratio"] == pytest.approx(1.02)
    assert judged(base, [0.98 * t for t in base])["verdict"] == "faster"
    mixed = judged(base, [t * (1.02 if k % 2 else 0.98) for k, t in enumerate(base)])
    assert mixed["verdict"] == "within noise" and mixed["interval"] == pytest.approx((0.98, 1.02))
    assert judged(base, base)["verdict"] == "within noise"
    assert judged(base[:7], [2 * t for t in base[:7]])["verdict"] == "too few rounds"  # 2 / 2**7 > 0.01


def test_a_row_says_what_it_found():
    row = judged([1e-6, 3e-6, 2e-6], [2e-6, 6e-6, 4e-6], chance=1.0)
    assert row["times_us"] == {"base": pytest.approx([1, 3, 2]), "head": pytest.approx([2, 6, 4])}
    assert row["median_us"] == {"base": pytest.approx(2), "head": pytest.approx(4)} and row["computed"] == "the same"
    assert judged([1.0], [1.0], digests=("a", "b"))["computed"] == "not the same"
    assert judged([1.0], [1.0], digests=(None, None))["computed"] is None
    assert "| it | 2 | 4 | 2.000 | 2.000 .. 2.000 | slower | the same |" in compare.table([row])


def test_what_one_side_cannot_do_is_not_measured():
    answers = {"base": [{"reason": "AttributeError: no"}], "head": [{"seconds": 1.0, "digest": None}]}
    row = compare.judge("it", answers, 1.0)
    assert row["verdict"] == "not measured" and row["reason"] == "base: AttributeError: no"
    assert "| it | - | - | - | - | not measured | base: AttributeError: no |" in compare.table([row])


def test_compiled_code_is_not_compared_with_plain_pytorch(tmp_path):
    there, absent = ({"compiled": c, "pydiff": str(tmp_path / "pydiff" / "__init__.py")} for c in ({"isa": "x"}, None))
    compare.check_alike({"base": there, "head": there})
    compare.check_alike({"base": absent, "head": absent})
    with pytest.raises(SystemExit, match=f"the base has no compiled module.*build_ext --inplace` in {tmp_path}"):
        compare.check_alike({"base": absent, "head": there})


# ------------------------------------------------------------------------------------ the base


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A project whose first commit builds, and whose second one does not."""
    (tmp_path / "pydiff").mkdir()
    (tmp_path / "pydiff" / "__init__.py").write_text("first")
    (tmp_path / "setup.py").write_text(
        "import os, sys\nopen('built', 'w').write(f\"{sys.argv[1:]} {os.environ['PYDIFF_CUDA']}\")"
    )
    git(tmp_path, "init", "-q")
    for text in ("first", "raise SystemExit('no compiler')"):
        if text != "first":
            (tmp_path / "setup.py").write_text(text)
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-q", "-m", text)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return tmp_path


@needs_git
def test_a_revision_is_checked_out_built_and_removed(repository):
    with compare.checkout("HEAD~1", cuda=False) as tree:
        assert (tree / "pydiff" / "__init__.py").read_text() == "first" and tree != repository
        assert (tree / "built").read_text() == "['-q', 'build_ext', '--inplace'] 0"
        assert not (repository / "built").exists()
    assert not tree.exists() and len(git(repository, "worktree", "list").splitlines()) == 1


@needs_git
def test_a_revision_that_does_not_build_leaves_nothing(repository):
    with pytest.raises(SystemExit, match="(?s)build_ext --inplace failed in .*no compiler"):
        with compare.checkout("HEAD", cuda=False):
            pytest.fail("there is nothing to measure")
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@needs_git
def test_a_base_that_is_nothing_is_refused(repository):
    with pytest.raises(SystemExit, match="--base: 'nothing' is neither a folder with pydiff/ in it nor a revision"):
        with compare.checkout("nothing", cuda=False):
            pytest.fail("there is nothing to measure")


def test_a_folder_is_taken_as_it_is(tmp_path):
    with compare.checkout(str(ROOT), cuda=False) as tree:
        assert tree == ROOT


# ------------------------------------------------------------------------------------ the whole of it

SLOWER = """

_right = make_plan


def make_plan(solver, schedule, steps, **options):
    import time

    time.sleep(0.1 if solver == "unipc" else 0)
    return _right(solver, schedule, steps + (solver == "unipc"), **options)
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A copy of this checkout in which one solver's plans take longer, and are other plans."""
    tree = tmp_path_factory.mktemp("base")
    for name in ("pydiff", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    with (tree / "pydiff" / "solvers" / "compiler.py").open("a") as file:
        file.write(SLOWER)
    return tree


def test_each_side_is_measured_in_its_own_checkout(planted, tmp_path):
    out, only = tmp_path / "compare.json", "make_plan; captured call, tabular; call, 1 step, [1"
    result = compare.main(["--base", str(planted), "--rounds", "1", "--quick", "--only", only, "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    rows = {row["name"]: row for row in result["rows"]}
    names = ["call, 1 step, [1, 4, 8, 8]", "make_plan, dpmpp_2m", "make_plan, unipc", "captured call, tabular"]
    assert list(rows) == names
    assert all(row["median_us"]["base"] > 0 < row["median_us"]["head"] for row in rows.values()), rows
    unipc = rows["make_plan, unipc"]
    assert unipc["ratio"] < 1 and unipc["median_us"]["base"] > 1e5 and unipc["computed"] == "not the same"
    assert [rows[name]["computed"] for name in names if name != "make_plan, unipc"] == ["the same", "the same", None]


def test_a_process_that_ends_or_measures_something_else_is_noticed(planted, tmp_path, monkeypatch):
    device = torch.device("cpu")
    with compare.Worker(planted, device, 0.0) as worker:
        with pytest.raises(SystemExit, match=f"pydiff came from {planted}.*, not from {tmp_path}"):
            worker.tree = tmp_path
            worker.about()
    monkeypatch.setattr(compare, "WORKER", tmp_path / "absent.py")
    with compare.Worker(planted, device, 0.0) as worker, pytest.raises(SystemExit, match="ended with 2"):
        worker.about()


def test_measurements_are_chosen_by_how_they_begin():
    names = ["init, a", "init, b", "step, a"]
    assert compare.chosen(None, names) == names and compare.chosen("step; init, b", names) == ["init, b", "step, a"]
    with pytest.raises(SystemExit, match="--only: nothing is called 'ini, a'; there are init, a; init, b; step, a"):
        compare.chosen("ini, a", names)
