"""What every kernel takes of a multiprocessor, known without a GPU: each case is compiled ahead of time and inspected.

    python -m pydiff.kernels.resources [--arch 80 90 100] [--kernel group_norm ...] [--out table.json]

Prints, for each case and architecture: registers of a thread, shared memory of a block, stack and local memory (bytes;
both are zero where nothing spills), and the theoretical occupancy. Exits with 1 if a case spills, does not fit or does
not compile. Needs triton and no torch.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydiff.kernels.case import Case

ARCHITECTURES = (80, 90, 100)
WARP = 32
REGISTERS = 65536  # of a multiprocessor
REGISTER_GRANULE = 256  # registers are given to a warp in multiples of this
WARP_GRANULE = 4  # and the register file lies in four parts, with as many warps on each
MAX_THREADS, MAX_BLOCKS, MAX_WARPS = 2048, 32, 64  # resident on a multiprocessor
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of a multiprocessor
SHARED_RESERVED = 1 << 10  # bytes that the system takes for each block
SHARED_GRANULE = 128


@dataclass(frozen=True)
class Resources:
    """A case on an architecture; `occupancy`: resident warps over the most there can be, `error`: why there is none."""

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    error: str = ""

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


def blocks_per_multiprocessor(arch: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks of `warps` warps that fit on a multiprocessor at once, by threads, registers and shared memory."""
    of_a_warp = _round_up(max(registers, 1) * WARP, REGISTER_GRANULE)
    by_registers = REGISTERS // of_a_warp // WARP_GRANULE * WARP_GRANULE // warps
    by_shared = SHARED_BYTES[arch] // (_round_up(shared_bytes, SHARED_GRANULE) + SHARED_RESERVED)
    return min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, by_shared)


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


# ---------------------------------------------------------------------------- compiling


def modules() -> list[str]:
    """The modules of this package that have kernels to compile, by name."""
    here = pkgutil.iter_modules([str(Path(__file__).parent)])
    found = [m.name for m in here if m.name not in ("case", "resources")]
    return [name for name in found if hasattr(_module(name), "compile_cases")]


def _module(name: str) -> Any:
    return importlib.import_module(f"pydiff.kernels.{name}")


def cases(name: str, arch: int) -> list[Case]:
    """What a module compiles for an architecture; most choose the same configurations for all."""
    function = _module(name).compile_cases
    return function((arch // 10, arch % 10)) if inspect.signature(function).parameters else function()


def inspect_case(name: str, case: Case, arch: int, **options: Any) -> Resources:
    """Compile one case; `options` are Triton's, beside the number of warps and stages (``maxnreg=32``)."""
    try:
        compiled = _compile(case, arch, options)
        registers, stack, local = _usage(compiled.asm["cubin"])
    except Exception as error:
        return Resources(name, case.label, arch, case.num_warps, error=_first_line(error))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = blocks_per_multiprocessor(arch, registers, shared, warps)
    return Resources(name, case.label, arch, warps, registers, shared, stack, local, blocks, blocks * warps / MAX_WARPS)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def _compile(case: Case, arch: int, options: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in case.aligned]
    source = ASTSource(case.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    chosen = {"num_warps": case.num_warps, "num_stages": case.num_stages, **options}
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=chosen)


def cuobjdump() -> str:
    """The program that reads the resources of a compiled kernel: triton's own, or one on the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if not found:
        raise FileNotFoundError("cuobjdump is neither in triton's package nor on the PATH (it comes with CUDA)")
    return found


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, stack bytes, local bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([cuobjdump(), "-res-usage", str(file)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if not found:
        raise ValueError(f"cuobjdump printed no resources: {done.stdout[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _compile_kernels() -> None:
    """In a process of its own, before triton is imported there: kernels are compiled, and not interpreted."""
    os.environ.pop("TRITON_INTERPRET", None)


def _inspect_chunk(job: tuple[str, tuple[int, ...], int]) -> list[Resources]:
    name, indices, arch = job
    known = cases(name, arch)
    return [inspect_case(name, known[k], arch) for k in indices]


def inspect_all(
    names: Iterable[str], architectures: Sequence[int], first: int | None = None, processes: int | None = None
) -> list[Resources]:
    """Every case of these modules (or the `first` ones of each) on every architecture, compiled in parallel."""
    jobs = []
    for name in names:
        for arch in architectures:
            count = len(cases(name, arch)[:first])
            jobs += [(name, tuple(range(k, min(k + 4, count))), arch) for k in range(0, count, 4)]
    context = multiprocessing.get_context("spawn")
    workers = processes or os.cpu_count()
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_compile_kernels) as pool:
        return [row for rows in pool.map(_inspect_chunk, jobs) for row in rows]


# ---------------------------------------------------------------------------- the table


def table(rows: Iterable[Resources]) -> str:
    header = ("kernel", "case", "sm", "warps", "registers", "shared", "stack", "local", "blocks/SM", "occupancy")
    cells: list[tuple[str, ...]] = [header]
    for r in rows:
        numbers = (r.registers, r.shared_bytes, r.stack_bytes, r.local_bytes, r.blocks_per_sm)
        shown = (*map(str, numbers), f"{r.occupancy:.0%}") if not r.error else (r.error, "", "", "", "", "")
        cells.append((r.kernel, r.case, str(r.arch), str(r.warps), *shown))
    widths = [max(len(row[k]) for row in cells if len(row[k]) < 80) for k in range(len(header))]
    aligned = (
        "  ".join(c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))) for row in cells
    )
    return "\n".join(line.rstrip() for line in aligned)


def to_json(rows: Sequence[Resources]) -> dict[str, Any]:
    import triton

    return {
        "benchmark": "kernel_resources",
        "triton": triton.__version__,
        "commit": _commit(),
        "rows": [asdict(r) for r in rows],
    }


def _commit() -> str | None:
    """The commit of the kernels, with "+" where files differ from it; None where there is no git."""
    words = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="modules to look at (default: all)")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N cases of each module")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    arguments = parser.parse_args(argv)
    known = modules()
    unknown = [name for name in arguments.kernel or () if name not in known]
    if unknown:
        parser.error(f"--kernel: {unknown[0]!r} is not one of {', '.join(known)}")
    rows = inspect_all(arguments.kernel or known, arguments.arch, arguments.first)
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(to_json(rows), indent=1) + "\n", encoding="utf-8")
    bad = [r for r in rows if r.spills or r.error or not r.blocks_per_sm]
    for r in bad:
        reason = r.error or ("spills" if r.spills else "does not fit a multiprocessor")
        print(f"sm_{r.arch} {r.kernel} {r.case}: {reason}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
