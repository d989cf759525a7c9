"""The benchmark of whole loops: it compares the same work, refuses what is wrong, and says what it did not measure."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import pydiff
from benchmarks import captured_call, loop, loop_gaps, loop_models, loop_rivals, loop_ways
from benchmarks.harness import NotMeasured, Timing
from benchmarks.loop_gaps import Event

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
ON_CPU = ("diffusers", "pydiff")


@pytest.fixture
def quick(tmp_path):
    """main(), on small models, and the row of the first of them."""

    def run(*arguments: str) -> dict:
        out = tmp_path / "loop.json"
        result = loop.main(["--quick", "--rounds", "1", "--out", str(out), *arguments])
        assert json.loads(out.read_text()) == json.loads(json.dumps(result))
        return result

    return run


# ------------------------------------------------------------------------------------ a whole run


def test_every_model_and_every_way_is_measured_or_says_why_not(quick, capsys):
    result = quick("--models", "policy,tabular,waveform")
    assert result["environment"]["command"] and result["quick"] is True
    assert [row["workload"] for row in result["rows"]] == ["policy", "tabular", "waveform"]
    for row in result["rows"]:
        assert list(row["ways"]) == list(loop.WAYS)
        assert row["gate"]["calls"] == row["steps"] == 20 and row["gate"]["difference"] <= row["gate"]["bound"]
        assert row["dtype"] == "float32" and row["parameters"] > 0 and row["shape"][0] <= 2
        for name, found in row["ways"].items():
            if name not in ON_CPU:
                assert found["status"] == "not measured" and "CUDA" in found["reason"], name
                continue
            assert found["sample"]["median_us"] >= found["sample"]["min_us"] > 0
            assert {"quartiles_us", "rounds", "runs"} <= set(found["sample"])
            assert found["warm_up_s"] > 0 and found["difference"] < 1e-5 and found["times_as_fast_as_diffusers"] > 0
            assert found["device"]["status"] == "not measured" and found["peak_bytes"] is None
    assert len(result["targets"]) == 8 and {t["verdict"] for t in result["targets"]} == {"not measured"}
    printed = capsys.readouterr().out
    assert "| ms a sample (times as fast as diffusers) | diffusers | pydiff |" in printed
    assert "not measured: diffusers compiled: compiled on CUDA, or with --compile" in printed


def test_a_large_model_is_run_on_a_cpu_only_when_asked_for():
    arguments = loop.parse([])
    row = loop.open_row("sd15", CPU, arguments, float("inf"))
    assert row.case is None and "--models sd15" in row.refused.reason


def test_guidance_and_low_precision(quick):
    [row] = quick("--models", "sd15", "--dtype", "bfloat16")["rows"]
    assert row["guidance_scale"] == 7.5 and row["dtype"] == "bfloat16"
    for name in ON_CPU:
        assert row["ways"][name]["difference"] <= loop.BOUNDS[torch.bfloat16]


def test_what_is_not_there_is_refused_with_its_name(quick):
    for words, message in (
        (["--models", "huge"], "--models: 'huge' is not one of policy"),
        (["--ways", "magic"], "--ways: 'magic' is not one of diffusers"),
        (["--batch", "0"], "--batch: at least 1, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            quick(*words)


def test_it_starts_as_a_file():
    script = Path(loop.__file__)
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--ways" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------ right before fast


def wrong_rivals() -> dict[str, object]:
    def stale_time(case):
        denoise = loop_rivals.denoiser(case, case.model)
        return loop_rivals.scheduler_loop(case, lambda x, t: denoise(x, torch.tensor(999)))

    def one_order_less(case):
        import diffusers

        scheduler, first = diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(diffusers, loop_rivals.SCHEDULER, lambda **config: scheduler(**config, **first))
            return loop_rivals.eager(case)

    def not_a_number(case):
        return lambda: loop_rivals.eager(case)() * float("nan")

    return {"stale time": stale_time, "one order less": one_order_less, "not a number": not_a_number}


@pytest.mark.parametrize("wrong", wrong_rivals())
def test_a_model_on_which_the_loops_differ_has_no_numbers(quick, monkeypatch, wrong):
    monkeypatch.setitem(loop.WAYS, "diffusers", loop_ways.Way(wrong_rivals()[wrong], cuda=False))
    [row] = quick("--models", "tabular")["rows"]
    assert "WrongResult" in row["gate"]["reason"]
    for found in row["ways"].values():
        assert found["status"] == "not measured" and "WrongResult" in found["reason"] and "sample" not in found


def test_another_number_of_model_calls_is_not_the_same_work(monkeypatch):
    def twice(case):
        run = loop_rivals.eager(case)
        return lambda: (run(), run())[1]

    monkeypatch.setitem(loop.WAYS, "diffusers", loop_ways.Way(twice, cuda=False))
    with pytest.raises(loop_ways.WrongResult, match="diffusers calls the model 40 times, pydiff 20 times"):
        loop_ways.check_samples(loop_models.MODELS["tabular"], CPU, None, True)


def test_a_way_with_another_sample_and_one_that_fails_leave_the_others_alone(quick, monkeypatch, capsys):
    def fails(case):
        raise MemoryError("no room for it")

    wrong = loop_ways.Way(wrong_rivals()["stale time"], cuda=False)
    monkeypatch.setitem(loop.WAYS, "diffusers graph", wrong)
    monkeypatch.setitem(loop.WAYS, "pydiff stage", loop_ways.Way(fails, cuda=False))
    [row] = quick("--models", "policy")["rows"]
    assert "its sample is not that of diffusers" in row["ways"]["diffusers graph"]["reason"]
    assert row["ways"]["pydiff stage"]["reason"] == "MemoryError: no room for it"
    assert all("sample" in row["ways"][name] for name in ON_CPU)
    assert "not measured: pydiff stage: MemoryError: no room for it" in capsys.readouterr().out


@pytest.mark.parametrize("way, measured", [("stage", False), (False, True)])
def test_a_loop_that_fell_back_is_no_measurement_of_a_graph(quick, monkeypatch, way, measured):
    """Without CUDA a sampler that was asked for graphs warns and runs eagerly."""
    asked = loop_ways.Way(partial(loop_ways.ours, way), cuda=False, graph=True)
    monkeypatch.setitem(loop.WAYS, "pydiff stage", asked)
    [row] = quick("--models", "tabular", "--ways", "diffusers,pydiff stage")["rows"]
    found = row["ways"]["pydiff stage"]
    assert ("sample" in found) is measured
    assert measured or "without a graph" in found["reason"]


def test_without_diffusers_pydiff_is_measured_alone(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ModuleNotFoundError
    [row] = quick("--models", "tabular")["rows"]
    assert "diffusers" in row["gate"]["reason"] and "diffusers" in row["ways"]["diffusers"]["reason"]
    assert row["ways"]["pydiff"]["sample"]["median_us"] > 0
    assert row["ways"]["pydiff"]["times_as_fast_as_diffusers"] is None


def test_what_there_is_no_time_for_says_so(quick):
    [row] = quick("--models", "tabular", "--seconds", "0")["rows"]
    assert {found["reason"] for found in row["ways"].values()} == {"TimeoutError: no time was left for it"}


def test_optimizing_what_pydiff_does_not_know_is_no_entry():
    case = loop_models.MODELS["tabular"].build(CPU, torch.float32, smoke=True)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="nothing in TableMLP is known"):
        loop_ways.ours_optimized(case)


# ------------------------------------------------------------------------------------ what is judged


def test_targets_are_judged_by_times_host_times_and_gaps():
    fast = Timing([1e-3], 1e-3, 1, host=[40e-6])
    way = loop.Prepared(lambda: torch.zeros(1), {"device": {"span_us": 1000.0, "stage_gaps_us": 9.0}})
    row = loop.Row(
        "policy",
        None,
        {},
        ways={"pydiff loop": way},
        outcomes={
            "diffusers": Timing([6e-3], 6e-3, 1),
            "pydiff loop": fast,
            "diffusers compiled": Timing([1.2e-3], 1.2e-3, 1),
        },
    )
    assert [t.verdict for t in loop.targets([row])] == ["pass", "miss", "pass", "pass"] + ["not measured"] * 4
    row.outcomes["pydiff loop"] = Timing([1e-3], 1e-3, 1, host=[60e-6])
    way.found["device"]["stage_gaps_us"] = 11.0
    assert [t.verdict for t in loop.targets([row])][2:4] == ["miss", "miss"]
    row.outcomes["pydiff loop"] = NotMeasured("why")
    row.ways["pydiff loop"] = NotMeasured("why")
    assert {t.verdict for t in loop.targets([row])} == {"not measured"}


def test_gaps_are_the_times_when_nothing_runs():
    assert loop_gaps.gaps([]) == loop_gaps.gaps([(0, 5)]) == []
    assert loop_gaps.gaps([(0, 2), (3, 4), (4, 6), (9, 10)]) == [1, 0, 3]
    assert loop_gaps.gaps([(9, 10), (0, 2), (3, 4)]) == [1, 5]  # in any order
    assert loop_gaps.gaps([(0, 10), (1, 2), (3, 4), (12, 13)]) == [0, 0, 2]  # two streams: one works on


def test_idle_time_and_what_of_it_follows_a_stage():
    stage = "void pydiff::stage_kernel<float>()"
    events = [Event("conv", 0, 40), Event(stage, 42, 50), Event("conv", 55, 90), Event(stage, 90, 100)]
    found = loop_gaps.idle_time(events[::-1])
    assert found == {
        "events": 4,
        "span_us": 100,
        "gaps_us": 7,
        "gap_share": 0.07,
        "stage_gaps_us": 5,
        "stage_gap_share": 0.05,
    }
    found = loop_gaps.idle_time([e for e in events if e.name == "conv"])
    assert found["gap_share"] == pytest.approx(15 / 90) and found["stage_gap_share"] is None


def test_the_name_of_the_stage_kernel_is_that_of_the_source():
    source = Path(loop.__file__).resolve().parents[1] / "csrc" / "cuda" / "stage.cu"
    assert f" {loop_gaps.STAGE_KERNEL}(" in source.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    "key, parameters",
    [
        ("policy", 65_783_298),
        ("waveform", 2_308_737),
        ("tabular", 893_578),
        ("cifar10", 35_746_307),
        ("sd15", 859_520_964),
    ],
)
def test_models_at_their_real_size(key, parameters):
    """CIFAR-10's and SD1.5's counts are the published ones; the policy's is the published 65 M."""
    model = loop_models.MODELS[key]
    case = model.build(torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in case.model.parameters()) == parameters
    rows = case.x if case.uncond is None else torch.cat([case.x, case.x])
    output = loop_rivals.denoiser(case, case.model)(rows.to(case.dtype), torch.empty((), device="meta"))
    assert output.shape == rows.shape and output.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["policy", "waveform", "tabular"])
def test_our_own_models_take_a_time_for_all_or_one_for_each_row(key):
    case, again = (loop_models.MODELS[key].build(CPU, torch.float32, batch=2, smoke=True) for _ in range(2))
    assert torch.equal(case.x, again.x)

    def call(model, times, rows=slice(None)):
        return model(case.x[rows], torch.tensor(times), **{k: v[rows] for k, v in case.cond.items()})

    with torch.no_grad():
        one, mixed = call(case.model, 500), call(case.model, [500.0, 400.0])
        torch.testing.assert_close(call(again.model, [500.0, 500.0]), one)  # from the same weights every time
        torch.testing.assert_close(mixed[:1], one[:1])
        torch.testing.assert_close(mixed[1:], call(case.model, 400, slice(1, 2)))
    assert not torch.allclose(mixed[1], one[1], rtol=0.01)


def test_the_hand_made_graph_runs_on_what_it_is_given(monkeypatch):
    """A stand-in for torch.cuda: its graph calls the denoiser again, on the very tensors of the capture."""
    case = loop_models.MODELS["sd15"].build(CPU, torch.float32, smoke=True)
    captured, denoiser = [], loop_rivals.denoiser

    def noted(*arguments):
        call = denoiser(*arguments)

        def denoise(x, t):
            captured[:] = call, x, t, call(x, t)
            return captured[-1]

        return denoise

    class Graph:
        def replay(self):
            call, x, t, output = captured
            output.copy_(call(x, t))

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    cuda = types.SimpleNamespace(
        CUDAGraph=Graph,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=contextlib.nullcontext,
        graph=contextlib.nullcontext,
    )
    monkeypatch.setattr(loop_rivals.torch, "cuda", cuda)
    monkeypatch.setattr(loop_rivals, "denoiser", noted)
    sample = loop_rivals.graphed(case)()
    monkeypatch.undo()
    assert torch.equal(sample, loop_rivals.eager(case)())


def test_both_loops_start_at_the_same_times():
    case = loop_models.MODELS["tabular"].build(CPU, torch.float32, smoke=True)
    told: list[float] = []
    loop_rivals.scheduler_loop(case, lambda x, t: told.append(float(t)) or x)()
    plan = pydiff.Sampler(case.model, **loop_rivals.plan_arguments(case)).plan
    assert told == [float(t) for t in plan.model_times] and len(told) == loop_rivals.STEPS


@pytest.mark.gpu
def test_the_loop_benchmark_on_a_gpu(tmp_path):
    result = loop.main(["--device", "cuda", "--quick", "--models", "policy", "--out", str(tmp_path / "loop.json")])
    ways = result["rows"][0]["ways"]
    for name in ("diffusers graph", "pydiff", "pydiff stage", "pydiff loop", "pydiff auto"):
        assert ways[name]["sample"]["host_median_us"] > 0, (name, ways[name])
        assert ways[name]["device"]["events"] > 20 * 10, (name, ways[name]["device"])


def test_the_host_part_of_a_captured_call_is_measured_without_a_gpu(tmp_path):
    result = captured_call.main(["--quick", "--out", str(tmp_path / "call.json")])
    assert json.loads((tmp_path / "call.json").read_text()) == json.loads(json.dumps(result))
    models = captured_call.CALLED
    names = {f"call, {key}" for key in models} | {f"guard, {key}" for key in (*models, "sd15")}
    assert set(result["rows"]) == names and all(row["median_us"] > 0 for row in result["rows"].values())
