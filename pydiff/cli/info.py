"""What runs on this machine: versions, processor, compiled code, devices, and the backend of every operation.

    python -m pydiff.info

An operation with compiled code is a module of `pydiff.ops` with a predicate `can_use_native(device) -> (bool, reason)`;
one with a Triton kernel is a function `<operation>_kernel` there. So what is added is listed here.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import pkgutil
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch

import pydiff
from pydiff import ops
from pydiff.ops import native

Line = tuple[str, str]


def report() -> str:
    """The whole report, as text of several lines."""
    sections = {
        "versions": versions(),
        "processor": processor(),
        "compiled code": compiled_code(),
        "CUDA": cuda_devices(),
        "operations": operations(),
    }
    text = []
    for title, section in sections.items():
        lines = list(section)
        width = max((len(name) for name, _ in lines), default=0)
        text += ["", title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)]
    return "\n".join(text[1:])


def versions() -> Iterator[Line]:
    """The versions of pydiff and of what it runs on."""
    yield "pydiff", f"{pydiff.__version__} in {Path(pydiff.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", torch.__version__
    yield "numpy", numpy.__version__
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"


def processor() -> Iterator[Line]:
    """The processor, and what torch makes of it."""
    yield "name", _processor_name()
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cores", f"{_usable_cores()} of {os.cpu_count()} usable, {torch.get_num_threads()} threads in torch"
    yield "torch's code", torch.backends.cpu.get_cpu_capability()


def _processor_name() -> str:
    """Linux tells it in a file; elsewhere `platform` may or may not know."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def compiled_code() -> Iterator[Line]:
    """The compiled module: where it is, and what it was built for; or why there is none."""
    build = native.build_info()
    if "missing" in build:
        yield "pydiff._C", f"none: {build['missing']}"
        return
    yield "pydiff._C", str(getattr(native.module, "__file__", "?"))
    yield "compiler", str(build["compiler"])
    yield "CPU code", f"{build['isa']} (this machine can run {_listing(build['isas'])})"
    yield "threads", str(build["threads"])
    archs = _listing(f"sm_{arch}" for arch in str(build["cuda_archs"]).split(";"))
    yield "CUDA code", archs if build["cuda"] else "none: nvcc was missing or failed when pydiff was built"


def _listing(names: object) -> str:
    return names if isinstance(names, str) else ", ".join(map(str, names))  # type: ignore[call-overload]


def cuda_devices() -> Iterator[Line]:
    """What torch, the driver and each CUDA device say."""
    yield "torch's CUDA", torch.version.cuda or "none: this build of torch is for the CPU"
    yield "driver", _driver()
    if not torch.cuda.is_available():
        yield "devices", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.1f} GiB"
        yield f"cuda:{index}", f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory}"
        yield f"loop on cuda:{index}", _graphs(torch.device("cuda", index))


def _driver() -> str:
    """The newest CUDA that the driver supports, asked of the driver itself: no device has to be set up."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        return f"none ({error})"
    if failed:
        return f"installed, but it answers with error {failed}"
    return f"supports CUDA {version.value // 1000}.{version.value % 1000 // 10}"


Predicate = Callable[[torch.device], tuple[bool, str]]


def predicates() -> dict[str, Predicate]:
    """The predicate of every operation, by the operation's name."""
    found: dict[str, Predicate] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        predicate = getattr(importlib.import_module(f"pydiff.ops.{module.name}"), "can_use_native", None)
        if predicate is not None:
            found[module.name] = predicate
    return found


def triton_operations() -> list[str]:
    """Names of the operations that have a Triton kernel."""
    found = []
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"pydiff.ops.{info.name}")
        own = [n for n, f in vars(module).items() if str(getattr(f, "__module__", "")).startswith(module.__name__)]
        found += [name.removesuffix("_kernel") for name in own if name.endswith("_kernel") and name[0] != "_"]
    return found


def operations() -> Iterator[Line]:
    """For every operation and kind of device, what runs it."""
    for name, predicate in predicates().items():
        for kind in ("cpu", "cuda"):
            yield f"{name} on {kind}", _backend(predicate, kind)
    for name in triton_operations():
        yield f"{name} on cpu", "plain PyTorch: its kernel is for CUDA devices"
        yield f"{name} on cuda", _triton_backend(name)


def _graphs(device: torch.device) -> str:
    from pydiff.graph.backend import CudaGraphs
    from pydiff.graph.device_loop import can_use_device_loop

    captured, reason = CudaGraphs().available(device)
    if not captured:
        return f"eager: {reason}"
    looped, reason = can_use_device_loop(device)
    return "CUDA graphs, also driven by the device" if looped else f"CUDA graphs, driven by the host: {reason}"


def _triton_backend(name: str) -> str:
    from pydiff.ops.triton_ops import available

    if not torch.cuda.is_available():
        return "no device"
    fast, reason = available(name, torch.device("cuda"))
    return "Triton" if fast else f"plain PyTorch: {reason}"


def _backend(predicate: Predicate, kind: str) -> str:
    if kind == "cuda" and not torch.cuda.is_available():
        return "no device"
    fast, reason = predicate(torch.device(kind))
    compiled = "compiled C++" if kind == "cpu" else "compiled CUDA"
    return compiled if fast else f"plain PyTorch: {reason}"


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
