"""Counter-based Gaussian noise: a pure function of (seed, draw number, element index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the 64-bit seed of a
row, then Box-Muller in float32. Element ``e`` of a row (its index in row-major order) comes from the counter

    (low 32 bits of e // 4, high 32 bits of e // 4, draw number, 0)

and is normal number ``e % 4`` of that block: words (r0, r1) give numbers 0 and 1, words (r2, r3) numbers 2 and 3:

    u      = float32(r0) * 2**-32 + 2**-33            in (0, 1], rounded to float32
    angle  = 2 pi r1 / 2**32, reduced exactly on the integer to a quadrant and a rest in [-pi/4, pi/4]
    normal = sqrt(-2 ln u) * (cos(angle), sin(angle))

The integers are the same on every backend. The reference below evaluates the two formulas in float64 and rounds once;
a backend that works in float32 must stay within 4 units in the last place of it. There is no generator state, so a
row's noise depends on neither the batch, nor the device, nor the order of calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pydiff.ops import library, native

INITIAL_DRAW = 0xFFFFFFFF
"""Draw number of the noise that sampling starts from; a plan's own draws count from 0."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply_high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 32x32-bit product, by 16-bit halves: int64 has no room for the unsigned product."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_reference(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10: four counter words and two key words (int64 tensors holding uint32) to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def box_muller_reference(r0: torch.Tensor, r1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two normals (cosine, sine), float32, from two random words (int64 tensors holding uint32)."""
    u = r0.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * u.double().log()).sqrt()
    quadrant = ((r1 + 2**29) >> 30) & 3
    rest = r1 - (((r1 + 2**29) >> 30) << 30)
    angle = rest.double() * (2.0 * math.pi / 2**32)
    sin, cos = angle.sin(), angle.cos()
    odd, flip_cos, flip_sin = quadrant % 2 == 1, (quadrant == 1) | (quadrant == 2), quadrant >= 2
    cosine = torch.where(flip_cos, -1.0, 1.0) * torch.where(odd, sin, cos)
    sine = torch.where(flip_sin, -1.0, 1.0) * torch.where(odd, cos, sin)
    return (radius * cosine).float(), (radius * sine).float()


def words_reference(seeds: torch.Tensor, draws: torch.Tensor, elements: int) -> list[torch.Tensor]:
    """The four random words of every block: seeds int64 [B], draws int64 [B] -> four int64 [B, ceil(elements / 4)]."""
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seeds.device).expand(seeds.shape[0], -1)
    counter = (block & _MASK, block >> 32, (draws & _MASK).unsqueeze(1).expand_as(block), torch.zeros_like(block))
    return philox_reference(counter, ((seeds & _MASK).unsqueeze(1), ((seeds >> 32) & _MASK).unsqueeze(1)))


def normal_reference(seeds: torch.Tensor, draws: torch.Tensor, sample_shape: Sequence[int]) -> torch.Tensor:
    """The specification of the noise: seeds and draws int64 [B] -> float32 [B, *sample_shape]."""
    elements = math.prod(sample_shape)
    r0, r1, r2, r3 = words_reference(seeds, draws, elements)
    four = torch.stack((*box_muller_reference(r0, r1), *box_muller_reference(r2, r3)), dim=-1)
    return four.flatten(1)[:, :elements].contiguous().reshape(seeds.shape[0], *sample_shape)


def can_use_native(device: torch.device) -> tuple[bool, str]:
    """Whether compiled code draws the noise on `device`, and if not, why."""
    return native.available("noise", device)


def normal(
    seeds: torch.Tensor, draw: int, sample_shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Standard normal noise, one seed a row.

    Args:
        seeds: int64 [B], on the device where the noise is wanted.
        draw: number of the draw, 0 to 2**32 - 1.
        sample_shape: shape of one sample.
        dtype: float32, or float64 holding the same float32 values.

    Returns: [B, *sample_shape], contiguous. Contract: the integers behind it are exact on every backend, the normals
    within 4 units in the last place of `normal_reference`, to which it falls back.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds must be an int64 tensor [batch], got {seeds.dtype} {list(seeds.shape)}")
    if not 0 <= draw <= _MASK:
        raise ValueError(f"draw must be in 0 .. 2**32 - 1, got {draw}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if torch.compiler.is_compiling() or not native.is_plain(seeds):
        return _normal_op(seeds, draw, sample_shape).to(dtype)
    z = _normal(seeds, draw, sample_shape)
    return z if dtype == torch.float32 else z.to(dtype)


def _normal(seeds: torch.Tensor, draw: int, sample_shape: Sequence[int]) -> torch.Tensor:
    fast, reason = can_use_native(seeds.device)
    if not fast:
        native.warn_once("noise", seeds.device, reason)
        return normal_reference(seeds, torch.full_like(seeds, draw), sample_shape)
    out = torch.empty((len(seeds), *sample_shape), dtype=torch.float32, device=seeds.device)
    fill_native(out, seeds, draw)
    return out


def fill_native(out: torch.Tensor, seeds: torch.Tensor, draw: int) -> None:
    """Fill `out` [B, *sample], float32 and contiguous, with a draw of each row's seed, int64 [B] on the same device.

    For tensors that compiled code serves (`can_use_native`, `native.is_plain`); nothing is checked.
    """
    device, rows = out.device, len(out)
    seeds = seeds.contiguous()  # kept here: its address is what the compiled code gets
    elements = out.numel() // rows if rows else 0
    index, stream = -1, 0
    if device.type == "cuda":
        index, stream = device.index, max(native.current_stream(device.index), 0)
    threads = torch.get_num_threads()
    native.module.normal(out.data_ptr(), seeds.data_ptr(), draw, rows, elements, threads, index, stream)


def _normal_fake(seeds: torch.Tensor, draw: int, sample_shape: Sequence[int]) -> torch.Tensor:
    return seeds.new_empty((seeds.shape[0], *sample_shape), dtype=torch.float32)


_normal_op = library.define("normal(Tensor seeds, int draw, SymInt[] sample_shape) -> Tensor", _normal, _normal_fake)
