"""The benchmarks run, judge rightly, and write down what they must. Their numbers are not looked at here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import pydiff
from benchmarks import graph_timing, harness, noise, stage_update
from benchmarks.harness import Entry, NotMeasured, Target, Timing

pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")  # diffusers with numpy 2

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu.sh"


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def entry(self, name: str, seconds: list[float], **options) -> Entry:
        """An entry whose runs take these times, the last one for ever."""
        left = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Entry(name, run, **options)


# ------------------------------------------------------------------------------------ the harness


def test_a_timing_is_the_median_of_its_rounds():
    timing = Timing([4.0, 1.0, 2.0, 3.0, 100.0], 0.5, 5)
    assert timing.median == 3.0 and timing.quartiles == (2.0, 4.0) and timing.spread == pytest.approx(2 / 3)
    assert timing.to_dict() == {"median_us": 3e6, "min_us": 5e5, "quartiles_us": [2e6, 4e6], "rounds": 5, "runs": 5}
    assert Timing([2.0], 2.0, 1).quartiles == (2.0, 2.0)


def test_entries_take_turns_and_the_order_moves_on():
    clock = Clock()
    entries = {name: clock.entry(name, [1.0]) for name in "abc"}
    found = harness.measure(entries, 3, turn=0.0, clock=clock)
    assert "".join(clock.order) == "abc" + "abc" + "bca" + "cab"  # warm-up, then the rounds
    assert list(found) == ["a", "b", "c"] and all(f.rounds == [1.0] * 3 for f in found.values())


def test_a_turn_is_filled_and_one_slow_run_in_it_does_not_count():
    clock = Clock()
    entries = {"a": clock.entry("a", [9.0, 0.5, 7.0, 0.5, 0.25, 0.5], per=2)}
    found = harness.measure(entries, 2, turn=27.0, clock=clock)
    assert found["a"].runs == 6 and found["a"].rounds == [0.25, 0.25] and found["a"].minimum == 0.125
    clock = Clock()
    found = harness.measure({"a": clock.entry("a", [0.09, 0.01])}, 2, turn=0.05, clock=clock)
    assert found["a"].runs == 10  # the first run, which loads and allocates, does not decide how many fill a turn


def test_what_puts_an_entry_back_is_not_timed():
    clock = Clock()

    def before() -> None:
        clock.now += 50.0

    found = harness.measure({"a": clock.entry("a", [1.0], before=before)}, 2, turn=0.0, clock=clock)
    assert found["a"].median == 1.0


def test_waiting_for_a_device_counts_and_the_host_is_told_apart():
    clock = Clock()
    pending = [0.0]

    def run() -> None:
        clock.now += 1.0
        pending[0] = 4.0

    def synchronize() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    found = harness.measure({"a": Entry("a", run)}, 2, turn=0.0, synchronize=synchronize, clock=clock)
    assert found["a"].median == 5.0 and found["a"].to_dict()["host_median_us"] == 1e6


@pytest.mark.parametrize("good_runs", [0, 2])
def test_an_entry_that_raises_says_why_and_the_others_are_timed(good_runs):
    clock, left = Clock(), [None] * good_runs

    def run() -> None:
        clock.now += 1.0
        if not left:
            raise RuntimeError("out of luck\nand more")
        left.pop()

    entries = {"bad": Entry("bad", run), "absent": NotMeasured("not installed"), "good": clock.entry("good", [2.0])}
    found = harness.measure(entries, 3, turn=0.0, clock=clock)
    assert found["bad"] == NotMeasured("RuntimeError: out of luck") and found["absent"].reason == "not installed"
    assert found["good"].rounds == [2.0] * 3
    assert found["bad"].to_dict() == {"status": "not measured", "reason": "RuntimeError: out of luck"}


def test_a_ratio_needs_both_sides():
    a, b = Timing([6.0], 6.0, 1), Timing([2.0], 1.0, 1)
    assert harness.ratio(a, b) == 3.0
    assert harness.ratio(a, NotMeasured("")) is None and harness.ratio(None, b) is None


def test_a_target_holds_for_medians_and_minima_or_not_at_all():
    slow, fast = Timing([60.0], 30.0, 1), Timing([2.0], 2.0, 1)  # 30 by medians, 15 by minima
    assert Target("", slow, fast, 15).verdict == "pass" and Target("", slow, fast, 16).verdict == "miss"
    assert Target("", slow, fast, 30, at_least=False).verdict == "pass"
    assert Target("", slow, fast, 29, at_least=False).verdict == "miss"
    missing = Target("claim", slow, NotMeasured("why"), 1)
    assert missing.verdict == "not measured" and missing.to_dict()["ratio_of_medians"] is None
    assert "not measured" in harness.target_table([missing])


def test_numbers_are_short_and_missing_ones_are_named():
    assert [harness.number(v) for v in (0.01234, 1.5, 12.345, 1234.5, None)] == [
        "0.0123",
        "1.5",
        "12.3",
        "1234",
        "not measured",
    ]


def test_a_result_is_written_whole_and_named_by_its_date(tmp_path, monkeypatch):
    result = {"benchmark": "b", "environment": {"device_kind": "cpu"}}
    path = harness.save(result, tmp_path / "new")
    assert re.fullmatch(r"b-cpu-\d{4}-\d\d-\d\d-\d{6}\.json", path.name) and json.loads(path.read_text()) == result
    named = tmp_path / "named.json"
    assert harness.save(result, named) == named and json.loads(named.read_text()) == result
    with pytest.raises(TypeError):
        harness.save({**result, "bad": object()}, named)
    assert json.loads(named.read_text()) == result and [p.name for p in tmp_path.glob("*.json")] == ["named.json"]


def test_the_environment_says_what_is_needed_to_take_the_numbers_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "noise.py"), "--out", "/some/folder", "--quick"])
    found = harness.environment(torch.device("cpu"))
    assert found["command"] == "python benchmarks/noise.py --quick"  # where the result went is nobody's business
    assert found["torch"] == torch.__version__ and found["pydiff"] == pydiff.__version__
    for name in ("date", "device", "cores", "load_average", "python", "numpy", "compiled_code"):
        assert found[name], name
    assert {"diffusers", "k-diffusion", "commit", "dirty", "driver"} <= set(found)
    json.dumps(found)


def test_the_commit_that_the_environment_names_is_ours_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PYDIFF_COMMIT", "ours")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "absent"))
    assert harness.source()["commit"] == "ours" and harness.source(tmp_path)["commit"] is None


def test_threads_are_given_back():
    torch.set_num_threads(2)
    with contextlib.suppress(RuntimeError), harness.threads(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------------------------ the scripts


def test_a_step_moves_as_many_tensors_as_its_plan_says():
    moved = {name: stage_update.tensors_moved(stage_update.make_plan(s)) for name, s in stage_update.SAMPLERS.items()}
    assert moved["ddim"] == moved["euler"] == moved["euler_ancestral"] == 3  # x and m in, x out
    assert 4 < moved["dpmpp_2m"] <= 5 and 5 < moved["dpmpp_3m"] <= 6  # one and two outputs kept, one written
    assert moved["dpmpp_2m"] < moved["unipc"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "stage_update.json"
    result = stage_update.main(["--quick", "--shapes", "tiny", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    return result


def test_the_stage_benchmark_has_every_row_and_every_column(quick):
    assert [row["sampler"] for row in quick["rows"]] == list(stage_update.SAMPLERS)
    for row in quick["rows"]:
        assert row["shape"] == [1, 4, 8, 8] and row["threads"] == 1
        assert list(row["outcomes"]) == list(stage_update.COLUMNS)
        for name, outcome in row["outcomes"].items():
            measured = {"median_us", "min_us", "quartiles_us", "rounds", "ratio_to_copy", "ratio_to_pydiff"}
            assert measured <= set(outcome) or outcome["reason"], (row["sampler"], name)
        ours = [row["outcomes"][name] for name in ("copy_", "pydiff", "pydiff alone", "pydiff all")]
        assert all(o["median_us"] >= o["min_us"] > 0 for o in ours)
    assert quick["environment"]["command"] and quick["quick"] is True


def test_diffusers_is_measured_where_it_is_installed(quick):
    pytest.importorskip("diffusers")
    for row in quick["rows"]:
        assert row["outcomes"]["diffusers"].get("median_us", 0) > 0, row["outcomes"]["diffusers"]


def test_targets_that_were_not_measured_do_not_pass(quick):
    verdicts = {t["claim"]: t["verdict"] for t in quick["targets"]}
    assert len(verdicts) == 5
    assert all(v == "not measured" for claim, v in verdicts.items() if "[1,4,8,8]" not in claim)


def test_a_rival_that_cannot_run_is_named_with_its_reason(monkeypatch, tmp_path, capsys):
    def absent(*arguments):
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(stage_update, "diffusers_entry", absent)
    monkeypatch.setattr(stage_update, "SAMPLERS", {"dpmpp_2m": stage_update.SAMPLERS["dpmpp_2m"]})
    result = stage_update.main(["--quick", "--shapes", "tiny", "--out", str(tmp_path / "r.json")])
    assert result["rows"][0]["outcomes"]["diffusers"]["status"] == "not measured"
    assert result["targets"][0]["verdict"] == "not measured"
    assert "not measured: diffusers: ModuleNotFoundError: No module named 'diffusers'" in capsys.readouterr().out


def test_every_loop_that_is_timed_makes_all_its_steps():
    x = torch.ones(stage_update.SHAPES["tiny"])
    for sampler in stage_update.SAMPLERS.values():
        ours = stage_update.our_entries(sampler, x, x)
        for entry in ours.values():
            for _ in range(2):  # the second time from the start again
                if entry.before:
                    entry.before()
                state = entry.run()
                assert state.stages_done == entry.per and torch.equal(state.tensors.cursor, state.tensors.stop)


def test_an_unknown_shape_and_a_missing_device_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="--shapes: 'huge' is not one of tiny, mid, big"):
        stage_update.main(["--shapes", "huge"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        noise.main(["--device", "cuda"])


def test_the_noise_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(noise, "SHAPES", ((1, 4, 8, 8),))
    result = noise.main(["--quick", "--out", str(tmp_path / "noise.json")])
    assert [list(row["outcomes"]) for row in result["rows"]] == [list(noise.COLUMNS)] * len(result["rows"])
    assert result["rows"][0]["outcomes"]["normal_"]["median_us"] > 0 and len(result["targets"]) == 1
    fast, _ = noise.can_use_native(torch.device("cpu"))
    assert not fast or result["rows"][0]["outcomes"]["pydiff fill"]["median_us"] > 0


@pytest.mark.gpu
def test_the_stage_benchmark_on_a_gpu(tmp_path):
    result = stage_update.main(["--device", "cuda", "--quick", "--shapes", "tiny", "--out", str(tmp_path / "r.json")])
    for row in result["rows"]:
        for name in ("copy_", "pydiff alone"):
            assert row["device"][name].get("median_us", 0) > 0, (row["sampler"], row["device"][name])
        assert row["outcomes"]["pydiff"]["host_median_us"] > 0


class FakeCuda(types.SimpleNamespace):
    """Stands for torch.cuda: a graph runs its entry again, and an event notes the time."""

    def __init__(self, clock: Clock):
        captured: list[Entry] = []
        super().__init__(captured=captured, synchronize=lambda: None, Stream=object, modes=[])
        self.stream = lambda s: contextlib.nullcontext()
        self.graph = lambda g: contextlib.nullcontext()
        self.set_sync_debug_mode = self.modes.append
        self.CUDAGraph = lambda: types.SimpleNamespace(
            replay=lambda: clock.__setattr__("now", clock.now + 0.5), register_generator_state=captured.append
        )

        class Event:
            def __init__(self, enable_timing: bool):
                self.at = 0.0

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        self.Event = Event


def test_replays_are_timed_and_what_waits_for_the_device_is_not_captured(monkeypatch):
    clock = Clock()
    cuda, empty, generator = FakeCuda(clock), torch.empty, torch.Generator()
    monkeypatch.setattr(graph_timing.torch, "cuda", cuda)
    monkeypatch.setattr(graph_timing, "FILLER_BYTES", 4)
    monkeypatch.setattr(graph_timing.torch, "empty", lambda *shape, device, **kw: empty(*shape, **kw))

    def waits() -> None:
        if cuda.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    entries = {
        "good": clock.entry("good", [9.0], per=2, generators=[generator]),
        "waits": Entry("waits", waits),
        "absent": NotMeasured("not installed"),
    }
    found = graph_timing.measure_device(entries, 3)
    assert found["good"].rounds == [0.25] * 3 and cuda.captured == [generator]
    assert found["waits"].reason.endswith("cannot be captured in a CUDA graph: called a synchronizing CUDA operation")
    assert found["absent"].reason == "not installed" and list(found) == list(entries)
    assert cuda.modes == ["error", "default"] * 2


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks/noise.py"],
        ["-m", "benchmarks.stage_update"],
        ["benchmarks/kernels.py"],
        ["benchmarks/unet.py"],
        ["benchmarks/whole_call.py"],
        ["-m", "benchmarks.compare"],
    ],
)
def test_scripts_start_as_a_file_and_as_a_module(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout, done.stderr


def test_the_plain_test_run_leaves_the_microbenchmarks_alone():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^testpaths = \["tests"\]$', project, re.M)


def test_the_microbenchmarks_run_when_they_are_asked_for():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_the_page_names_every_script_and_nothing_that_is_not_there():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert {*re.findall(r"python benchmarks/(\w+\.py)", page)} == scripts - {"compare_worker.py"}
    for name in re.findall(r"`((?:pydiff|benchmarks|tests)/[\w/.]*)`", page):
        assert (ROOT / name).exists(), name


# ------------------------------------------------------------------------------------ gpu.sh

needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="a shell script")


def run_gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "WHEELS", "PYTHON", "LIMIT")}
    return subprocess.run(["bash", str(GPU), *arguments], env={**kept, **environment}, capture_output=True, text=True)


def listed(done: subprocess.CompletedProcess) -> dict[str, tuple[int, str]]:
    lines = (re.fullmatch(r"(\S+) +(\d+) s  (.+)", line) for line in done.stdout.splitlines())
    return {m[1]: (int(m[2]), m[3]) for m in lines if m}


@needs_bash
def test_the_gpu_script_lists_its_steps(tmp_path):
    done = run_gpu("--dry-run", OUT=str(tmp_path / "absent"))
    steps = listed(done)
    assert done.returncode == 0
    assert list(steps) == ["build", "info", "tests", "loop", "kernels", "unet", "stage_update", "whole_call", "noise"]
    assert "-m gpu" in steps["tests"][1] and "build_ext --inplace" in steps["build"][1]
    for name in ("loop", "kernels", "unet", "stage_update", "whole_call", "noise"):
        command = steps[name][1]
        assert f"benchmarks.{name} --device cuda" in command and f"--out '{tmp_path}/absent'" in command
    for name in ("loop", "kernels", "unet"):  # done, and written down, before the limit
        limit, command = steps[name]
        assert 10 <= limit - int(re.search(r"--seconds (\d+) ", command)[1]) <= 30
    assert not (tmp_path / "absent").exists()
    wheels = listed(run_gpu("--dry-run", WHEELS=str(tmp_path)))
    assert list(wheels)[0] == "wheels" and "--no-index --no-deps" in wheels["wheels"][1]
    assert sum(limit for limit, _ in wheels.values()) <= 585  # under ten minutes, with what it takes to stop a step


@needs_bash
def test_steps_of_the_gpu_script_can_be_chosen_and_given_time():
    steps = listed(run_gpu("--dry-run", "build", "unet=400"))
    assert list(steps) == ["build", "unet"] and steps["unet"][0] == 400 and "--seconds 380" in steps["unet"][1]
    for words in (["--quick"], ["nothing"], ["unet=x"], ["unet="], ["build", "kernels=-1"]):
        done = run_gpu("--dry-run", *words)
        assert done.returncode == 2 and "steps: build info tests loop kernels unet" in done.stderr and not done.stdout


STUB = """#!/usr/bin/env bash
# Stands for a Python on a machine with a GPU: the build passes, tests fail, one benchmark hangs.
case "$*" in
    -c*) echo 90 ;;
    "-m pytest"*) exit 1 ;;
    "-m benchmarks.unet"*) sleep 60 ;;
    *) echo "$PYDIFF_CUDA $PYDIFF_CUDA_ARCHS" ;;
esac
"""


@needs_bash
def test_the_gpu_script_goes_on_after_a_failure_and_stops_what_hangs(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = run_gpu(PYTHON=str(stub), OUT=str(tmp_path / "out"), LIMIT="2")
    assert done.returncode == 1 and "5 of 9 steps did not pass" in done.stderr, done.stderr
    [summary] = (tmp_path / "out").glob("gpu-*.json")
    steps = {step["step"]: step["status"] for step in json.loads(summary.read_text())["steps"]}
    skipped = "skipped, no time left"
    assert steps == {
        "build": "passed",
        "info": "passed",
        "tests": "failed",
        "loop": "passed",
        "kernels": "passed",
        "unet": "timed out",
        "stage_update": skipped,
        "whole_call": skipped,
        "noise": skipped,
    }
    [log] = (tmp_path / "out").glob("gpu-*.log")
    assert "1 90" in log.read_text()  # a build without CUDA is a failure there, and one architecture will do


@needs_bash
def test_the_gpu_script_refuses_a_machine_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = run_gpu(PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 1 and "no CUDA device" in done.stderr and not (tmp_path / "out").exists()
