"""The benchmark of whole calls splits rightly, times nothing that computes something else, and writes it all down."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import whole_call
from benchmarks import whole_call_loops as loops
from benchmarks.harness import NotMeasured, Timing

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")  # diffusers with numpy 2

CPU, TINY = torch.device("cpu"), (1, 4, 8, 8)
ALL = {f"{side} {n}" for side in whole_call.SIDES for n in loops.COUNTS} | set(whole_call.PARTS)


def line(fixed: float, step: float, **bent: float) -> dict[int, Timing]:
    """Times on a line, but for those that are given; the fastest runs are half as long."""
    times = {n: bent.get(f"at{n}", fixed + step * n) for n in loops.COUNTS}
    return {n: Timing([t, t, t], t / 2, 3) for n, t in times.items()}


# ------------------------------------------------------------------------------------ the split


def test_a_line_is_split_into_what_it_was_made_of():
    found = whole_call.split(line(5.0, 2.0))
    assert found.fixed.median == pytest.approx(5.0) and found.step.median == pytest.approx(2.0)
    assert found.fixed.minimum == pytest.approx(2.5) and found.step.minimum == pytest.approx(1.0)
    assert found.residual == pytest.approx(0.0, abs=1e-9) and found.fixed.runs == 12


def test_a_round_that_was_slow_for_all_moves_no_median():
    timings = line(5.0, 2.0)
    for n, timing in timings.items():
        timing.rounds[1] = 100.0 + 7.0 * n
    found = whole_call.split(timings)
    assert found.fixed.median == pytest.approx(5.0) and found.step.median == pytest.approx(2.0)
    assert found.fixed.rounds == pytest.approx([5.0, 100.0, 5.0])


def test_what_is_no_line_has_a_residual():
    found = whole_call.split(line(0.0, 1.0, at10=11.0, at20=19.0, at30=29.0, at40=41.0))
    assert found.residual == pytest.approx(1.0) and found.to_dict()["residual_us"] == pytest.approx(1e6)


def test_parts_are_given_where_the_times_lie_on_a_line():
    straight, bent = line(5.0, 2.0), line(5.0, 2.0, at20=47.0)
    assert whole_call.split(straight).is_line and not whole_call.split(bent).is_line
    assert not whole_call.split(line(-5.0, 2.0)).is_line
    for timings, parts in ((straight, "45000.00 ms (5000.00 ms + 20 x 2000.00 ms)"), (bent, "47000.00 ms")):
        found = {f"{side} {n}": t for side in whole_call.SIDES for n, t in timings.items()}
        split = whole_call.split(timings)
        made = {"solver": "euler", "shape": [1], "outcomes": found, "split": dict.fromkeys(whole_call.SIDES, split)}
        assert whole_call.readme_line(made, "r.json").split(" | ")[1] == parts


def test_without_one_of_the_times_there_is_no_split():
    found = whole_call.split({**line(5.0, 2.0), 30: NotMeasured("why")})
    assert found.fixed == found.step == NotMeasured("why") and found.residual is None


# ------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "whole_call.json"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, sep=" ", **_: printed.append(sep.join(map(str, words))))
        result = whole_call.main(["--quick", "--shapes", "tiny", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    return result, "\n".join(printed)


def test_every_call_is_measured_and_split(quick):
    result, _ = quick
    assert [row["solver"] for row in result["rows"]] == list(whole_call.SOLVERS)
    for row in result["rows"]:
        assert row["shape"] == list(TINY) and row["threads"] == 1
        assert set(row["outcomes"]) == ALL and all(o["median_us"] > 0 for o in row["outcomes"].values()), row
        assert set(row["split"]) == set(whole_call.SIDES)
        for part in row["split"].values():
            assert part["fixed"]["rounds"] == part["step"]["rounds"] == 2 and part["residual_us"] >= 0
    assert result["environment"]["command"] and result["steps"] == 20


def test_the_samples_agreed(quick):
    for row in quick[0]["rows"]:
        assert 0 <= row["difference"] <= 1e-5, row["solver"]


def test_lines_for_the_readme_are_printed(quick):
    result, printed = quick
    lines = [row for row in printed.splitlines() if "a whole call of 20 steps" in row]
    assert len(lines) == len(result["rows"])
    for text, row in zip(lines, result["rows"]):
        what, ours, rival, ratio, command, source = (cell.strip() for cell in text.strip("|").split("|"))
        assert what == f"{whole_call.SOLVERS[row['solver']]}, a whole call of 20 steps, [1, 4, 8, 8]"
        number = r"-?[\d.]+ [um]s"
        parts = rf"{number} \+ 20 x {number}"
        assert re.fullmatch(rf"{number}( \({parts}\))?", ours), ours
        assert re.fullmatch(rf"{number} \(diffusers' whole loop(: {parts})?\)", rival), rival
        medians = [row["outcomes"][f"{side} 20"]["median_us"] for side in ("diffusers", "pydiff")]
        assert float(ratio.removesuffix(" x")) == pytest.approx(medians[0] / medians[1], rel=0.01)
        assert command == f"`{result['environment']['command']}`"
        assert source == "[json](benchmarks/results/whole_call.json)"


def test_times_are_written_as_in_the_readme():
    seconds = (4.2e-6, 161e-6, 1.523e-3, 0.022)
    assert [*map(whole_call.duration, seconds)] == ["4.2 us", "161 us", "1.52 ms", "22.00 ms"]


# ------------------------------------------------------------------------------------ wrong samples


def row(solver: str = "dpmpp_2m") -> dict:
    found = whole_call.run_row(solver, TINY, CPU, 1, 0.0)
    return {name: str(outcome.to_dict().get("reason", "")) for name, outcome in found["outcomes"].items()}


def scaled(function, factor: float):
    return lambda *arguments, **options: factor * function(*arguments, **options)


def check(reasons: dict[str, str], side: str, reason: str) -> None:
    """Only that side has no numbers, for that reason."""
    for name, found in reasons.items():
        mine = name.startswith("diffusers") == (side == "diffusers")
        assert (reason in found) if mine else not found, (name, found)


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_rival_with_another_sample_has_no_numbers(monkeypatch, factor):
    monkeypatch.setattr(loops, "diffusers_loop", scaled(loops.diffusers_loop, factor))
    check(row(), "diffusers", "away from pydiff's")


def test_a_rival_that_forgets_to_scale_the_models_input_has_no_numbers(monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "scale_model_input", lambda self, x, t: x)
    check(row("euler"), "diffusers", "away from pydiff's")


def test_a_call_with_another_sample_has_no_numbers(monkeypatch):
    monkeypatch.setattr(loops, "noise", scaled(loops.noise, 1 + 1e-6))
    check(row(), "pydiff", "the call and run_plan return different samples")


def test_a_model_that_looks_is_told_the_same_times_by_both(monkeypatch):
    """The free model answers whatever it is told; the attentive one is there for what it cannot see."""
    told: list[float] = []
    monkeypatch.setattr(loops, "attentive", lambda x, t: told.append(float(t.reshape(-1)[0])) or torch.tanh(x))
    loops.check_rival("dpmpp_2m", TINY, CPU)
    assert len(told) == 40 and told[:20] == told[20:] and told[0] == 999  # diffusers' and ours


def test_without_diffusers_pydiff_is_measured_alone(monkeypatch, tmp_path, capsys):
    def absent(solver: str) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(loops, "make_scheduler", absent)
    monkeypatch.setattr(whole_call, "SOLVERS", {"dpmpp_2m": "2M"})
    result = whole_call.main(["--quick", "--shapes", "tiny", "--out", str(tmp_path / "r.json")])
    [found] = result["rows"]
    assert found["outcomes"]["pydiff 20"]["median_us"] > 0 and found["difference"] is None
    assert found["split"]["diffusers"]["fixed"]["status"] == "not measured"
    printed = capsys.readouterr().out
    assert "not measured: dpmpp_2m, diffusers: ModuleNotFoundError: No module named 'diffusers'" in printed
    assert re.search(r"us(\)| )\s*\| not measured \| not measured \| `", printed)


@pytest.mark.gpu
def test_the_benchmark_of_whole_calls_on_a_gpu(tmp_path):
    out = str(tmp_path / "r.json")
    result = whole_call.main(["--device", "cuda", "--quick", "--shapes", "tiny", "--out", out])
    for found in result["rows"]:
        assert {name for name, o in found["outcomes"].items() if o.get("host_median_us", 0) > 0} == ALL
