"""Builds `pydiff._C`: C++ with the compiler that Python names, CUDA with nvcc where there is one. Never needs torch.

A part that cannot be built is left out with one line of explanation, and pydiff runs without it. Environment:
PYDIFF_CUDA=0 leaves CUDA out, PYDIFF_CUDA=1 insists on it; PYDIFF_CUDA_ARCHS="80;90;100"; CUDA_HOME; CXX.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd")), "-mprefer-vector-width=512"]


def run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = next((Path(home, "bin", "nvcc") for home in homes if home and Path(home, "bin", "nvcc").exists()), None)
    return nvcc or shutil.which("nvcc")


def cuda_archs(nvcc):
    known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"])))
    wanted = os.environ.get("PYDIFF_CUDA_ARCHS", "80;90;100").split(";")
    return [arch for arch in wanted if arch in known] or sorted(known, key=int)[-1:]


class Build(build_ext):
    def build_extension(self, ext):
        target, cuda = Path(self.get_ext_fullpath(ext.name)), os.environ.get("PYDIFF_CUDA", "")
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = None if cuda == "0" else find_nvcc()
        if nvcc is None and cuda == "1":
            raise RuntimeError("PYDIFF_CUDA=1, but nvcc is neither in CUDA_HOME nor on the PATH")
        for compiler in dict.fromkeys((nvcc, None)):
            try:
                return self.compile(target, compiler)
            except (ImportError, OSError, RuntimeError) as error:
                if compiler and cuda == "1":
                    raise
                missing = "CUDA" if compiler else "compiled code"
                print(f"pydiff: building without {missing}: {str(error)[-2000:]!r}", file=sys.stderr)

    def compile(self, target, nvcc):
        import pybind11

        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0])
        include = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
        archs = cuda_archs(nvcc) if nvcc else []
        defines = [f"-DPYDIFF_WITH_CUDA={int(bool(nvcc))}", f'-DPYDIFF_CUDA_ARCHS="{";".join(archs)}"']
        isas = {"baseline": []}
        if platform.machine() in ("x86_64", "AMD64"):
            isas |= {"avx2": AVX2, "avx512": AVX512}
        jobs = {"bindings": [*cxx, *FLAGS, *include, *defines, "-c", CSRC / "bindings.cpp"]}
        for name in ("stage_cpu", "parallel"):
            jobs[name] = [*cxx, *FLAGS, "-c", CSRC / "cpu" / f"{name}.cpp"]
        for isa, flags in isas.items():
            names = [f"-DPYDIFF_KERNELS=k{isa.capitalize()}Kernels", f'-DPYDIFF_ISA="{isa}"']
            jobs[f"kernels_{isa}"] = [*cxx, *FLAGS, *KERNEL_FLAGS, *flags, *names, "-c", CSRC / "cpu" / "kernels.cpp"]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"] if archs else []
        host = ["-std=c++17", "-O3", "--fmad=false", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for source in sorted(CSRC.glob("cuda/*.cu")) if nvcc else ():
            jobs[f"cuda_{source.stem}"] = [nvcc, *host, *codes, "-c", source]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, ([*command, "-o", objects / f"{name}.o"] for name, command in jobs.items())))
        link = [nvcc, "-shared", "--cudart=static"] if nvcc else [*cxx, "-shared", "-pthread"]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        run([*link, *(objects / f"{name}.o" for name in jobs), "-o", target])


def absolute_links(markdown, where="https://github.com/pydiff/pydiff"):
    """The links of a README to files of this repository, as they work on a page elsewhere; pictures as pictures."""
    link = r"(!?)\[([^][]*)\]\((?![a-z]+:|#)([^()\s]+)\)"
    kind = {"": "blob", "!": "raw"}
    return re.sub(link, lambda m: f"{m[1]}[{m[2]}]({where}/{kind[m[1]]}/main/{m[3]})", markdown)


setup(
    long_description=absolute_links(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["pydiff", "pydiff.*"]), "pydiff.kernels"],
    ext_modules=[Extension("pydiff._C", sources=[], optional=True)],
    cmdclass={"build_ext": Build},
)
