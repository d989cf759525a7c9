"""Noise: the published Philox vectors, the same bits everywhere, and the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiff.ops import native, noise

compiled_only = pytest.mark.skipif(not native.available("noise", torch.device("cpu"))[0], reason="no compiled code")
ISAS = native.build_info().get("isas", [])

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def ulps(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """How many float32 values lie between a and b."""

    def ordinal(v: torch.Tensor) -> np.ndarray:
        bits = v.numpy().view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.abs(ordinal(a) - ordinal(b))


@pytest.fixture
def each_isa():
    chosen = native.build_info()["isa"]
    yield native.module.select_isa
    native.module.select_isa(chosen)


@pytest.mark.parametrize("counter, key, result", VECTORS)
def test_published_vectors(counter, key, result):
    tensors = [torch.tensor([w]) for w in words(counter)]
    assert [int(w) for w in noise.philox_reference(tensors, [torch.tensor([w]) for w in words(key)])] == words(result)
    if native.module is not None:
        assert native.module.philox(words(counter), words(key)) == words(result)


@compiled_only
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_words_equal_the_reference(values):
    counter, key = values[:4], values[4:]
    expected = noise.philox_reference([torch.tensor([w]) for w in counter], [torch.tensor([w]) for w in key])
    assert native.module.philox(counter, key) == [int(w) for w in expected]


def native_box_muller(r0: np.ndarray, r1: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = torch.zeros(len(r0)), torch.zeros(len(r0))
    native.module.box_muller(r0.ctypes.data, r1.ctypes.data, cosine.data_ptr(), sine.data_ptr(), len(r0))
    return cosine, sine


@compiled_only
def test_normals_within_four_ulp_of_the_reference_over_sweeps_and_corners():
    edge = np.array([0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    around = (np.arange(1, 8, dtype=np.int64)[:, None] * 2**29 + np.arange(-300, 300)).astype(np.uint32).ravel()
    powers = (2 ** np.arange(32, dtype=np.int64)[:, None] + np.arange(-40, 40)).astype(np.uint32).ravel()
    dense = np.linspace(0, 2**32 - 1, 150_001).astype(np.uint32)
    rng = np.random.default_rng(0)
    corners = np.concatenate((edge, around, powers))
    fixed, varied = np.full_like(dense, 123456789), rng.integers(0, 2**32, dense.size, dtype=np.uint32)
    worst = 0
    for r0, r1 in (
        (np.repeat(edge, len(corners)), np.tile(corners, len(edge))),
        (dense, fixed),
        (fixed, dense),
        (dense, varied),
        (varied, dense),
        (np.tile(corners, 20), varied[: 20 * len(corners)]),
    ):
        r0, r1 = np.ascontiguousarray(r0), np.ascontiguousarray(r1[: len(r0)])
        r0 = np.ascontiguousarray(r0[: len(r1)])
        expected = noise.box_muller_reference(*(torch.from_numpy(r.astype(np.int64)) for r in (r0, r1)))
        for got, want in zip(native_box_muller(r0, r1), expected, strict=True):
            assert torch.isfinite(got).all()
            worst = max(worst, ulps(got, want).max())
    assert worst <= 4


@compiled_only
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (2, 3, 1021), (1, 4096), (0,), (1031, 5)])
def test_every_instruction_set_gives_the_same_bits(shape, each_isa):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    expected = noise.normal_reference(seeds, torch.full_like(seeds, noise.INITIAL_DRAW), shape)
    results = []
    for isa in ISAS:
        each_isa(isa)
        results.append(noise.normal(seeds, noise.INITIAL_DRAW, shape))
    assert all(r.shape == (6, *shape) and torch.equal(r, results[0]) for r in results)
    if results[0].numel():
        assert ulps(results[0], expected).max() <= 4


@compiled_only
def test_the_scalar_code_gives_the_bits_of_the_loops():
    seed, draw, blocks = 0xFEDCBA9876543210, 7, 300
    key = [seed & 0xFFFFFFFF, seed >> 32]
    r = np.array([native.module.philox([k, 0, draw, 0], key) for k in range(blocks)], np.uint32).T.copy()
    pairs = [native_box_muller(r[2 * k], r[2 * k + 1]) for k in (0, 1)]
    four = torch.stack((*pairs[0], *pairs[1]), dim=1).flatten()
    got = noise.normal(torch.tensor([seed - 2**64]), draw, (4 * blocks,))
    assert torch.equal(got[0], four)


@compiled_only
def test_thread_count_and_batch_do_not_matter():
    seeds = torch.arange(-3, 37)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(noise.normal(seeds, 2, (3, 1111)))
    assert all(torch.equal(r, results[0]) for r in results)
    for k in (0, 17, 39):
        assert torch.equal(noise.normal(seeds[k : k + 1], 2, (3, 1111))[0], results[0][k])
    assert torch.equal(noise.normal(seeds.flip(0), 2, (3, 1111)).flip(0), results[0])
    assert torch.equal(noise.normal(seeds[::2], 2, (3, 1111)), results[0][::2])


@compiled_only
def test_moments_and_distribution_over_ten_million_draws():
    stats = pytest.importorskip("scipy.stats")
    z = noise.normal(torch.arange(40), 0, (250_000,)).double().flatten()
    n = z.numel()
    # Standard errors of the sample moments of n normals; 4.5 of them is missed once in 150,000 trials.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 4.5 * (variance / n) ** 0.5
    assert stats.kstest(z.sort().values.numpy(), "norm").pvalue > 1e-3
    assert z.abs().max() > 4.8
    lagged = [(z[:-k] * z[k:]).mean() for k in (1, 2, 3, 4, 250_000)]
    assert max(map(abs, lagged)) < 4.5 * n**-0.5
    # The control: a spread wrong by one part in a thousand is caught.
    assert stats.kstest((z * 1.001).sort().values.numpy(), "norm").pvalue < 1e-3 or abs((1.001 * z).var() - 1) > 1e-3


def test_draws_and_seeds_are_distinct():
    seeds = torch.tensor([0, 1, 2**32, 2**33 + 1])
    draws = [noise.normal(seeds, k, (64,)) for k in (0, 1, 2**31, noise.INITIAL_DRAW)]
    flat = torch.cat(draws)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_float64_holds_the_float32_values():
    seeds = torch.tensor([3, 4])
    wide = noise.normal(seeds, 1, (33,), dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide.float(), noise.normal(seeds, 1, (33,)))
    assert torch.equal(wide, wide.float().double())


def test_the_reference_runs_where_compiled_code_is_turned_off(monkeypatch):
    seeds = torch.tensor([5, 6])
    monkeypatch.setattr(native, "disabled", frozenset({"noise"}))
    monkeypatch.setattr(native, "warned", set())
    with pytest.warns(UserWarning, match="PYDIFF_DISABLE names noise"):
        z = noise.normal(seeds, 9, (2, 5))
    assert torch.equal(z, noise.normal_reference(seeds, torch.tensor([9, 9]), (2, 5)))


@pytest.mark.parametrize(
    "seeds, draw, dtype, message",
    [
        (torch.zeros(2), 0, torch.float32, "seeds must be an int64 tensor"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, torch.float32, "seeds must be an int64 tensor"),
        (torch.zeros(2, dtype=torch.int64), -1, torch.float32, "draw must be in"),
        (torch.zeros(2, dtype=torch.int64), 2**32, torch.float32, "draw must be in"),
        (torch.zeros(2, dtype=torch.int64), 0, torch.float16, "dtype must be"),
    ],
)
def test_bad_input_is_named(seeds, draw, dtype, message):
    with pytest.raises(ValueError, match=message):
        noise.normal(seeds, draw, (2,), dtype=dtype)
