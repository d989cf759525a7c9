"""The benchmarks of kernels and of whole models: what they compare is the same, and they write down what they must."""

from __future__ import annotations

import json
import types

import pytest
import torch

from benchmarks import kernels, kernels_rows, unet, unet_models
from benchmarks.harness import NotMeasured, Timing
from benchmarks.limits import Budget, at_most

with torch.device("meta"):  # torch lists its constructors at the first use of a device context: before the tests
    torch.empty(1)  # replace torch.empty


def test_the_shapes_are_those_of_the_models():
    """Calls a model, per family, as counted when the shapes were recorded."""
    counted = {
        name: {f: sum(e["calls"] for e in entries) for f, entries in families.items()}
        for name, families in kernels_rows.shapes().items()
    }
    assert counted["sd15_512_b2"] == {
        "group_norm_silu": 45,
        "group_norm": 16,
        "attention_self": 16,
        "geglu": 16,
        "attention_cross": 16,
        "layer_norm": 48,
        "upsample": 3,
        "residual": 86,
    }
    assert counted["sdxl_1024_b2"] == {
        "group_norm_silu": 35,
        "group_norm": 11,
        "attention_self": 70,
        "geglu": 70,
        "attention_cross": 70,
        "layer_norm": 210,
        "upsample": 2,
        "residual": 238,
    }
    assert counted["vae_decode_1024_b1"] == {
        "group_norm_silu": 29,
        "group_norm": 1,
        "attention_self": 1,
        "upsample": 3,
        "residual": 15,
    }
    assert {row.family for row in kernels_rows.rows(list(counted))} == set(kernels_rows.FAMILIES)


def test_bytes_and_flops_of_a_row_are_the_least_there_can_be():
    rows = {r.family: r for r in reversed(kernels_rows.rows(["sd15_512_b2"]))}  # the first of each family
    x = 2 * 320 * 64 * 64
    assert rows["group_norm_silu"].elements == 2 * x + 2 * 320 and rows["group_norm_silu"].flops == 0
    assert rows["add_layer_norm"].elements == 4 * x + 2 * 320 and rows["residual"].elements == 3 * x + 320
    assert rows["attention_self"].flops == 4 * 2 * 8 * 4096**2 * 40 and rows["attention_self"].elements == 4 * x
    assert rows["linear_geglu"].flops == 2 * 8192 * 320 * 2560 and rows["geglu"].elements == 3 * 8192 * 1280
    assert rows["upsample_conv"].flops == 2 * 2 * 1280**2 * 9 * 16**2
    assert kernels.limit_seconds(rows["geglu"], 1e12, 2) == pytest.approx(6 * 8192 * 1280 / 1e12)
    assert kernels.limit_seconds(rows["attention_self"], 1e15, 2) == rows["attention_self"].flops / kernels.FLOPS


@pytest.mark.parametrize(
    "row",
    kernels_rows.rows(["sd15_512_b2", "vae_decode_1024_b1"], smoke=True),
    ids=lambda row: f"{row.workload}-{row.family}",
)
def test_what_is_compared_computes_the_same(row):
    tensors = row.make(torch.device("cpu"), torch.float32)
    wanted = row.runs["eager"](*tensors)
    for name in ("pydiff", "eager NCHW"):
        if name not in row.runs:
            continue
        run = row.runs[name]
        given = run.prepare(tensors) if isinstance(run, kernels_rows.Prepared) else tensors
        try:
            found = run(*given)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, check_stride=False)
    assert sum(t.numel() for t in (wanted if isinstance(wanted, tuple) else (wanted,))) == row.written


def test_the_kernel_benchmark_runs_and_adds_up(tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    families = "geglu,layer_norm,add_layer_norm"
    result = kernels.main(["--smoke", "--models", "sdxl_1024_b2", "--families", families, "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {r["family"] for r in result["rows"]} == set(families.split(",")) and result["copy_bytes_per_second"] > 0
    for row, total in zip(result["rows"], result["totals"]):
        cold = row["outcomes"]["cold"]
        assert cold["eager"]["median_us"] > 0 and cold["compile"]["status"] == "not measured"
        assert row["family"] == total["family"] and total["cold_us"]["compile"] is None
        assert total["cold_us"]["eager"] == pytest.approx(row["calls"] * cold["eager"]["median_us"])
        assert cold["eager"]["share_of_limit"] == pytest.approx(row["limit_us"] / cold["eager"]["median_us"])
    late = kernels.main(
        ["--smoke", "--models", "sdxl_1024_b2", "--families", "geglu", "--seconds", "0", "--out", str(out)]
    )
    assert late["rows"][0]["outcomes"]["cold"]["pydiff"]["reason"] == "no time was left for it"


def test_a_fallback_is_no_measurement_of_a_kernel():
    from pydiff.ops import triton_ops

    before = triton_ops.refused
    with kernels.no_reference(), pytest.raises(RuntimeError, match="no kernel for it: too wide"):
        triton_ops.refused("op", types.SimpleNamespace(is_cuda=True), "too wide")
    assert triton_ops.refused is before


def test_the_best_rival_is_never_pydiff():
    found = {
        "pydiff": Timing([1.0], 1.0, 1),
        "pydiff kernel": Timing([0.5], 0.5, 1),
        "eager": Timing([3.0], 3.0, 1),
        "cuDNN": Timing([2.0], 2.0, 1),
        "flash": NotMeasured("why"),
    }
    assert kernels.best_other(found)[0] == "cuDNN"
    assert kernels.best_other({"pydiff": found["pydiff"], "flash": found["flash"]}) is None


def test_the_model_benchmark_runs(tmp_path, capsys):
    out = tmp_path / "unet.json"
    result = unet.main(["--smoke", "--row", "bundled_b64", "--out", str(out)])
    [row] = json.loads(out.read_text())["rows"]
    assert row["workload"] == "bundled_b64" and set(row["variants"]) == set(unet.VARIANTS)
    for name in ("eager", "tuned"):
        found = row["variants"][name]
        assert found["call"]["median_us"] > 0 and found["warm_up_s"] > 0 and found["counted"]["total"] > 100
        assert found["difference"] < 1e-4 and found["replay"]["status"] == "not measured"
    assert row["variants"]["compile"]["reason"] == "compiled only on CUDA"
    assert "not measured: compile: compiled only on CUDA" in capsys.readouterr().out
    assert result["environment"]["command"] and result["quick"] is True


def test_models_are_counted_at_full_size_and_what_is_missing_says_so(tmp_path, monkeypatch):
    out = str(tmp_path / "u.json")
    result = unet.main(["--count", "--row", "bundled_b64", "--variants", "eager,compile", "--out", out])
    found = result["rows"][0]["variants"]
    assert found["eager"]["counted"]["total"] == 211 and found["eager"]["reason"] == "only kernels were counted"
    assert found["compile"]["counted"]["status"] == "not measured"

    def absent(smoke):
        raise ModuleNotFoundError("No module named 'diffusers'")

    without = unet_models.WORKLOADS["sd15_512_b2"]._replace(make=absent)
    monkeypatch.setitem(unet_models.WORKLOADS, "sd15_512_b2", without)
    result = unet.main(["--smoke", "--row", "sd15_512_b2", "--variants", "eager", "--out", out])
    assert "No module named 'diffusers'" in result["rows"][0]["variants"]["eager"]["reason"]


@pytest.mark.parametrize("name", unet_models.WORKLOADS)
def test_a_small_model_has_the_same_weights_every_time_and_a_finite_output(name):
    if name != "bundled_b64":
        pytest.importorskip("diffusers")
    workload = unet_models.WORKLOADS[name]
    outputs = []
    for channels_last in (False, True):
        model, inputs = workload.build(torch.device("cpu"), torch.float32, channels_last=channels_last, smoke=True)
        with torch.no_grad():
            outputs.append(unet.first_tensor(model(**inputs)))
    assert outputs[0].isfinite().all() and outputs[0].std() > 0.01
    assert unet.difference(outputs[1], outputs[0]) < 1e-4


def test_published_parameter_counts():
    pytest.importorskip("diffusers")
    for name, parameters in (
        ("sd15_512_b2", 859_520_964),
        ("sdxl_1024_b2", 2_567_463_684),
        ("cifar10_32_b64", 35_746_307),
    ):
        model, _ = unet_models.WORKLOADS[name].build(torch.device("meta"), torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_work_that_outlasts_its_time_is_broken_off():
    assert Budget(None).left == float("inf") and 0 < Budget(5).left <= 5
    with pytest.raises(TimeoutError, match="no time was left"), at_most(Budget(0).left):
        pass
    with pytest.raises(TimeoutError, match="it took longer than"), at_most(0.05):
        while True:
            pass
    with at_most(5):
        pass


@pytest.mark.gpu
def test_the_kernel_and_model_benchmarks_on_a_gpu(tmp_path):
    result = kernels.main(
        [
            "--device",
            "cuda",
            "--smoke",
            "--models",
            "sd15_512_b2",
            "--families",
            "group_norm_silu,attention_self",
            "--out",
            str(tmp_path / "k.json"),
        ]
    )
    for row in result["rows"]:
        assert row["outcomes"]["cold"]["pydiff"].get("median_us", 0) > 0, row["outcomes"]["cold"]["pydiff"]
    result = unet.main(
        [
            "--device",
            "cuda",
            "--smoke",
            "--row",
            "bundled_b64",
            "--variants",
            "eager,pydiff",
            "--out",
            str(tmp_path / "u.json"),
        ]
    )
    for name, found in result["rows"][0]["variants"].items():
        assert found.get("kernels", 0) > 10 and found["replay"].get("median_us", 0) > 0, (name, found)
