"""Random cases for the stage operation, and an oracle that runs them in float64 with a derived error bound.

The oracle goes row by row and knows nothing of the reference. Beside every number it carries a bound of what working in
the registers' precision may add (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1): a sum of K
products, in any order, fused or not, is off by at most gamma_K sum |w| |v|, plus what the operands were off by.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from pydiff.ops.noise import normal, normal_reference
from pydiff.ops.stage import FIELDS, StageTensors
from pydiff.plans import table

ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 0.0, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "rows_inside", "offset")
OPTIONAL = ("mask", "known", "constant", "extra", "noise")


@dataclass
class Options:
    sample: tuple[int, ...] = (3, 5, 7)
    rows: int = 4
    slots: int = 2
    copies: int = 1
    dtype: torch.dtype = torch.float32
    model_dtype: torch.dtype = torch.float32
    input_dtype: torch.dtype | None = torch.float32
    layout: str = "contiguous"
    present: tuple[str, ...] = ()
    expanded: bool = False
    device: str = "cpu"


def lay_out(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers in another layout of memory."""
    if kind == "channels_last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "transposed" and x.ndim > 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "rows_inside":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "sliced" and x.ndim > 1:
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 3))
        wide[..., 1 : 2 * x.shape[-1] + 1 : 2] = x
        return wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
    if kind == "offset":
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x.contiguous()


def random_tables(rng: random.Random, stages: int, options: Options, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    def weight() -> float:
        return rng.choice((0.0, 0.0, 0.0, 1.0, rng.uniform(-2, 2), rng.uniform(-2, 2)))

    c = torch.zeros(stages, table.COEFFICIENT_COLUMNS, dtype=torch.float64)
    index = torch.full((stages, table.INDEX_COLUMNS), -1, dtype=torch.int32)
    for i in range(stages):
        for k in range(3 * table.NUM_OPERANDS):
            operand = k % table.NUM_OPERANDS
            exists = not table.SLOT + options.slots <= operand < table.D
            c[i, k] = weight() if exists else 0.0
        c[i, table.OUTPUT], c[i, table.OUTPUT + 1] = weight(), weight()
        c[i, table.GUIDANCE] = rng.choice((0.0, 1.0, 1.0, rng.uniform(-1, 8)))
        clips = rng.random() < 0.4
        c[i, table.CLIP], c[i, table.CLIP + 1] = (-0.7, 1.1) if clips else (-torch.inf, torch.inf)
        for k in range(3):
            c[i, table.KNOWN + k] = weight()
        c[i, table.INPUT_SCALE], c[i, table.TIME] = rng.uniform(0.1, 1.5), rng.uniform(0, 1000)
        for k in (table.WRITE_A, table.WRITE_B):
            index[i, k] = rng.randrange(-1, options.slots)
        for k in (table.DRAW0, table.DRAW1):
            index[i, k] = rng.randrange(draws)
    return c, index


def make_case(seed: int, options: Options, poison: bool = True) -> tuple[StageTensors, torch.Tensor]:
    """A stage operation at random stages of random plans, some rows finished; what a row must not read is NaN."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, dtype, stages, draws = options.rows, options.dtype, 7, 3
    sample = options.sample

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    c, index = random_tables(rng, stages, options, draws if "noise" in options.present else 2**31 - 1)
    cursor = torch.tensor([rng.randrange(stages) for _ in range(b)], dtype=torch.int32)
    stop = torch.tensor([rng.choice((k, min(k + 1, stages), stages)) for k in cursor.tolist()], dtype=torch.int32)
    t = StageTensors(
        registers=randn(1 + options.slots, b, *sample).to(dtype),
        cursor=cursor,
        stop=stop,
        seeds=torch.tensor([rng.getrandbits(64) - 2**63 for _ in range(b)], dtype=torch.int64),
        coefficients=c.to(dtype),
        indices=index,
        copies=options.copies,
    )
    for name in options.present:
        value = randn(*((draws,) if name == "noise" else ()), b, *sample).to(dtype)
        if name == "mask":
            value = value.sigmoid().mul(3).sub(1).clamp(0, 1)  # zeros, ones, and in between
        if options.expanded and len(sample) > 1 and name != "noise":
            value = value[:, :1].expand_as(value)
        else:
            value = lay_out(value, options.layout)
        setattr(t, name, value)
    m = lay_out(randn(options.copies * b, *sample).to(options.model_dtype), options.layout)
    if options.input_dtype is not None:
        old_input = torch.full((options.copies * b, *sample), 7.0, dtype=options.input_dtype)
        t.model_input = lay_out(old_input, options.layout)
        t.model_time = torch.full((options.copies * b,), -5.0, dtype=dtype)
    t.nonfinite = torch.full((b,), -1, dtype=torch.int32)
    if poison:
        poison_absent(t, m)
    return move(t, options.device), m.to(options.device)


def move(t: StageTensors, device: str | torch.device) -> StageTensors:
    """A copy of `t` on another device, strides kept."""
    fields = {n: getattr(t, n) for n in FIELDS}
    return StageTensors(**{n: keep_strides(v, device) if isinstance(v, torch.Tensor) else v for n, v in fields.items()})


def keep_strides(x: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    if x.numel() == 0:
        return x.to(device)
    storage = x.new_empty(0).set_(x.untyped_storage()).clone().to(device)  # all of it, whatever the view
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def row_program(t: StageTensors, b: int) -> tuple[list[float], list[int], list[dict[int, float]]]:
    """Coefficients, indices, and for each output that has a target its operands with their weights."""
    c, index = t.coefficients[int(t.cursor[b])].tolist(), t.indices[int(t.cursor[b])].tolist()
    absent = {table.CONSTANT: t.constant is None, table.EXTRA: t.extra is None}
    absent |= {table.SLOT + k: True for k in range(t.registers.shape[0] - 1, table.NUM_SLOTS)}
    outputs: list[dict[int, float]] = []
    for k in range(3):
        weights = c[k * table.NUM_OPERANDS : (k + 1) * table.NUM_OPERANDS]
        if k and (not 0 <= index[k - 1] < t.registers.shape[0] - 1 or (k == 1 and index[0] == index[1])):
            weights = [0.0] * table.NUM_OPERANDS
        outputs.append({j: w for j, w in enumerate(weights) if w != 0 and not absent.get(j, False)})
    return c, index, outputs


def poison_absent(t: StageTensors, m: torch.Tensor) -> None:
    """Fill with NaN what the rows' programs give no weight."""
    nan = float("nan")
    for b in range(t.rows):
        if t.cursor[b] >= t.stop[b]:
            m[b :: t.rows] = nan
            continue
        c, _, outputs = row_program(t, b)
        reads = set().union(*outputs)
        if table.D in reads:
            reads |= {k for k, column in ((table.X, 0), (table.M, 1)) if c[table.OUTPUT + column] != 0}
        for slot in range(t.registers.shape[0]):
            if table.X + slot not in reads:
                t.registers[slot, b] = nan
        for name, operand in (("constant", table.CONSTANT), ("extra", table.EXTRA)):
            value = getattr(t, name)
            if value is not None and operand not in reads and 0 not in value.stride():
                value[b] = nan
        if t.known is not None and c[table.KNOWN] == 0 and 0 not in t.known.stride():
            t.known[b] = nan
        if table.M not in reads:
            m[b :: t.rows] = nan
        elif t.copies == 2 and c[table.GUIDANCE] == 1:
            m[b] = nan
        elif t.copies == 2 and c[table.GUIDANCE] == 0:
            m[b + t.rows] = nan


Bounded = tuple[torch.Tensor, torch.Tensor]  # a number in float64, and how far from it a backend may be


def weighted_sum(terms: list[tuple[float | torch.Tensor, Bounded]], like: torch.Tensor, u: float) -> Bounded:
    value, carried, magnitude = (torch.zeros_like(like) for _ in range(3))
    for weight, (v, error) in terms:
        size = abs(weight)
        value, carried = value + weight * v, carried + size * error
        magnitude = magnitude + size * (v.abs() + error)
    k = 2 * len(terms) + 1  # a product and a sum each, the weight itself rounded once at most
    return value, carried + k * u / (1 - k * u) * magnitude


def expected_row(
    t: StageTensors, m: torch.Tensor, b: int, reference_noise: bool
) -> tuple[dict[int, Bounded], Bounded | None, bool]:
    """Of one unfinished row: the registers written, the next model input, and whether the model output was finite."""
    u = ROUNDOFF[t.registers.dtype] * (1 if t.registers.dtype == torch.float32 else 2)  # float64 rounds here as well
    c, index, outputs = row_program(t, b)
    registers = t.registers[:, b].double()
    zero = torch.zeros_like(registers[0])

    def exact(v: torch.Tensor) -> Bounded:
        return v.double(), (u * v.double().abs() if v.dtype == torch.float64 and t.registers.dtype != v.dtype else zero)

    def draw(k: int) -> Bounded:
        number, seed = index[table.DRAW0 + k], t.seeds[b : b + 1]
        if t.noise is not None:
            return exact(t.noise[number, b])
        if reference_noise:
            return exact(normal_reference(seed, torch.full_like(seed, number), zero.shape)[0])
        return exact(normal(seed, number, zero.shape)[0])

    cond = exact(m[b + (t.copies - 1) * t.rows])
    guided = cond
    if t.copies == 2 and c[table.GUIDANCE] != 1:
        uncond, scale = exact(m[b]), c[table.GUIDANCE]
        difference = weighted_sum([(1.0, cond), (-1.0, uncond)], zero, u)
        guided = uncond if scale == 0 else weighted_sum([(1.0, uncond), (scale, difference)], zero, u)
    x = exact(t.registers[0, b])
    pairs = [(c[table.OUTPUT], x), (c[table.OUTPUT + 1], guided)]
    d, d_error = weighted_sum([(w, v) for w, v in pairs if w != 0], zero, u)
    d = d.clamp(c[table.CLIP], c[table.CLIP + 1])

    def operand(k: int) -> Bounded:
        if k < table.D:
            return exact(t.registers[k, b])
        if k == table.CONSTANT or k == table.EXTRA:
            return exact((t.constant if k == table.CONSTANT else t.extra)[b])
        return (d, d_error) if k == table.D else guided if k == table.M else draw(k - table.Z0)

    new = [weighted_sum([(w, operand(k)) for k, w in output.items()], zero, u) for output in outputs]
    if t.mask is not None:
        known, *draws = c[table.KNOWN : table.KNOWN + 3]
        parts = [(w, draw(k)) for k, w in enumerate(draws) if w != 0]
        if known != 0 and t.known is not None:
            parts.append((known, exact(t.known[b])))
        kept = weighted_sum(parts, zero, u)
        mask = t.mask[b].double()
        new[0] = weighted_sum([(mask, kept), (1 - mask, new[0])], zero, u)
    written = {0: new[0]}
    for k in (1, 2):
        if 0 <= index[k - 1] < t.registers.shape[0] - 1:
            written[1 + index[k - 1]] = new[k]
    scaled = None
    if t.model_input is not None and t.cursor[b] + 1 < t.stop[b]:
        scale = float(t.coefficients[int(t.cursor[b]) + 1, table.INPUT_SCALE])
        value, error = weighted_sum([(scale, new[0])], zero, u)
        kind = t.model_input.dtype
        # Twice: a float64 register becomes a half by way of float32.
        scaled = value, error + 2 * ROUNDOFF[kind] * (value.abs() + error) + SMALLEST[kind]
    used = set().union(*outputs)
    reads_m = table.M in used or (table.D in used and c[table.OUTPUT + 1] != 0)
    return written, scaled, bool(not reads_m or guided[0].isfinite().all())


def check(before: StageTensors, m: torch.Tensor, after: StageTensors, reference_noise: bool = False) -> None:
    """Assert that `after` is `before` run for one stage on `m`."""
    n = before.rows
    for b in range(n):
        if before.cursor[b] >= before.stop[b]:
            same = [(before.registers[:, b], after.registers[:, b])]
            for name in ("model_input", "model_time") if before.model_input is not None else ():
                same.append((getattr(before, name)[b::n], getattr(after, name)[b::n]))
            untouched = all(torch.equal(p.nan_to_num(1e9), q.nan_to_num(1e9)) for p, q in same)
            assert untouched, f"finished row {b} was touched"
            assert after.cursor[b] == before.cursor[b] and after.nonfinite[b] == before.nonfinite[b]
            continue
        written, scaled, finite = expected_row(before, m, b, reference_noise)
        for k in range(before.registers.shape[0]):
            if k in written:
                close(after.registers[k, b], written[k], f"register {k} of row {b}")
            else:
                assert torch.equal(after.registers[k, b].nan_to_num(1e9), before.registers[k, b].nan_to_num(1e9))
        assert after.cursor[b] == before.cursor[b] + 1
        assert after.nonfinite[b] == (-1 if finite else before.cursor[b])
        if before.model_input is None:
            continue
        for copy in range(before.copies):
            where = b + copy * n
            if scaled is None:
                assert torch.equal(after.model_input[where], before.model_input[where])
                assert after.model_time[where] == before.model_time[where]
            else:
                close(after.model_input[where], scaled, f"model input of row {where}")
                assert after.model_time[where] == before.coefficients[int(before.cursor[b]) + 1, table.TIME]


def close(got: torch.Tensor, expected: Bounded, what: str) -> None:
    value, bound = expected
    error = (got.double() - value).abs()
    assert torch.equal(got.isfinite(), value.isfinite()), f"{what}: NaN where there should be none, or none"
    within = bool((error <= bound)[value.isfinite()].all())
    assert within, f"{what}: off by {(error - bound).max():.3g} more than allowed"
