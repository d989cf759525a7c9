"""Uses the pydiff that is installed, from a folder in which there is nothing: `.ci/package` runs it.

python use.py cuda|cpu|plain    what compiled code must be there: for both, for the CPU, none
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pydiff
from pydiff.ops import native

expected = sys.argv[1]
home = Path(pydiff.__file__).parent
assert not list(Path.cwd().iterdir()), "something here could stand in for what is installed"
assert importlib.metadata.version("pydiff-sampler") == pydiff.__version__
assert (home / "py.typed").is_file(), "no py.typed: type checkers would not look into it"

compiled = importlib.util.find_spec("pydiff._C") is not None
build = native.build_info()
found = "plain" if not compiled else "cuda" if build["cuda"] else "cpu"
assert found == expected, f"compiled code: {found}, wanted: {expected}; {build}"
if expected == "plain":
    assert "C++ compiler" in build["missing"]

for name in ("attention", "geglu", "group_norm", "layer_norm", "residual", "resources", "rms_norm", "upsample"):
    assert importlib.util.find_spec(f"pydiff.kernels.{name}"), name

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model, report = pydiff.optimize(pydiff.load_model("mnist"), report=True)
    x = pydiff.sample(model, shape=(2, 1, 28, 28), steps=10, seed=0)
slow = [str(w.message) for w in caught if "slower than it could" in str(w.message)]
assert x.shape == (2, 1, 28, 28) and x.isfinite().all() and float(x.max() - x.min()) > 1.5, x
assert report.replaced and bool(slow) == (expected == "plain"), slow

command = Path(sys.executable).with_name("pydiff")
picture = Path("two.png")
subprocess.run([command, "sample", "--n", "2", "--steps", "4", "--quiet", "--out", picture], check=True)
assert picture.read_bytes().startswith(b"\x89PNG")
info = subprocess.run([command, "info"], check=True, capture_output=True, text=True).stdout
assert (f"pydiff {pydiff.__version__} in {home}" in " ".join(info.split())) and "stage on cpu" in info
print(f"pydiff {pydiff.__version__} in {home}: {build}")
