#!/usr/bin/env bash
# Builds pydiff on a CUDA machine, runs the GPU tests and every GPU benchmark, and writes JSON: one command, under ten
# minutes, no network. Needs nvcc, and Python 3.10 or later with torch, setuptools, pybind11 and pytest.
#
#   benchmarks/gpu.sh              run all steps
#   benchmarks/gpu.sh build unet=400    run these steps, the second one with a limit of its own
#   benchmarks/gpu.sh --dry-run    list the steps, their time limits and commands
#   OUT=folder                     where results and the log go (default: benchmarks/results/)
#   WHEELS=folder                  wheels of what is missing: diffusers and what it needs, for the rivals' numbers
#   PYTHON=python3                 the interpreter
#   LIMIT=585                      seconds for everything
#   PYDIFF_COMMIT=...              names the commit where there is no git
#
# A step that fails or outlasts its limit does not stop the others; the exit code says whether there was one.
set -uo pipefail

absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=$(absolute "${OUT:-$ROOT/benchmarks/results}")
WHEELS=${WHEELS:+$(absolute "$WHEELS")}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-585}
SITE=${TMPDIR:-/tmp}/pydiff-wheels
cd "$ROOT" || exit 1

# step NAME SECONDS COMMAND. A later benchmark needs one line here; the limits together stay below LIMIT. In a command
# @SECONDS@ stands for the time that a benchmark may take to be done, and to have written its results, within its limit.
names=() limits=() commands=() wanted=() dry=""
step() {
    local name=$1 limit=$2 command=$3 word chosen=""
    for word in "${wanted[@]}"; do
        case $word in
            "$name") chosen=1 ;;
            "$name="*) chosen=1 limit=${word#*=} ;;
        esac
    done
    known+=" $name"
    [ ${#wanted[@]} -eq 0 ] || [ -n "$chosen" ] || return 0
    names+=("$name") limits+=("$limit") commands+=("${command//@SECONDS@/$((limit > 30 ? limit - 20 : 10))}")
}

usage() {
    echo "usage: benchmarks/gpu.sh [--dry-run] [STEP[=SECONDS] ...]; steps:$known" >&2
    exit 2
}

known="" misspelt=""
for word; do
    if [ "$word" = --dry-run ]; then
        dry=1
    elif [[ $word =~ ^[a-z_]+(=[0-9]+)?$ ]]; then
        wanted+=("$word")
    else
        misspelt=1
    fi
done

if [ -n "$WHEELS" ]; then
    install="$PYTHON -m pip install -q --no-index --no-deps --no-compile"
    step wheels 30 "$install --upgrade --target '$SITE' '$WHEELS'/*.whl"
fi
step build 70 "$PYTHON -m pip install -q --no-build-isolation --no-deps --no-index -e . \
|| $PYTHON setup.py -q build_ext --inplace"
step info 15 "$PYTHON -m pydiff.cli.info"
step tests 150 "$PYTHON -m pytest -q -m gpu -p no:cacheprovider"
step loop 90 "$PYTHON -m benchmarks.loop --device cuda --seconds @SECONDS@ --out '$OUT'"
step kernels 55 "$PYTHON -m benchmarks.kernels --device cuda --seconds @SECONDS@ --out '$OUT'"
step unet 70 "$PYTHON -m benchmarks.unet --device cuda --seconds @SECONDS@ --out '$OUT'"
step stage_update 65 "$PYTHON -m benchmarks.stage_update --device cuda --out '$OUT'"
step whole_call 20 "$PYTHON -m benchmarks.whole_call --device cuda --out '$OUT'"
step noise 20 "$PYTHON -m benchmarks.noise --device cuda --out '$OUT'"

for word in "${wanted[@]}"; do
    [[ " $known " == *" ${word%%=*} "* ]] || misspelt=1
done
[ -z "$misspelt" ] || usage
if [ -n "$dry" ]; then
    for k in "${!names[@]}"; do printf '%-14s %4d s  %s\n' "${names[k]}" "${limits[k]}" "${commands[k]}"; done
    exit 0
fi

# Code for this device alone: three architectures would take three times as long to build.
capability='import torch; print("%d%d" % torch.cuda.get_device_capability())'
if ! PYDIFF_CUDA_ARCHS=${PYDIFF_CUDA_ARCHS:-$("$PYTHON" -c "$capability")}; then
    echo "gpu.sh: torch sees no CUDA device here" >&2
    exit 1
fi
export PYDIFF_CUDA_ARCHS
export PYDIFF_CUDA=1  # a build without CUDA is a failure here
export PYTHONPATH="$ROOT${WHEELS:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

mkdir -p "$OUT"
stamp=$(date -u +%Y-%m-%d-%H%M%S)
log=$OUT/gpu-$stamp.log summary="" failed=0
for k in "${!names[@]}"; do
    limit=${limits[k]} left=$((LIMIT - SECONDS)) code=0 began=$SECONDS
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        status="skipped, no time left"
    else
        printf '\n=== %s (at %d s, limit %d s)\n%s\n' "${names[k]}" "$SECONDS" "$limit" "${commands[k]}" | tee -a "$log"
        timeout -k 5 "$limit" bash -c "${commands[k]}" </dev/null 2>&1 | tee -a "$log"
        code=${PIPESTATUS[0]}
        case $code in
            0) status="passed" ;;
            124 | 137) status="timed out" ;;
            *) status="failed" ;;
        esac
    fi
    [ "$status" = "passed" ] || failed=$((failed + 1))
    printf -v line '{"step": "%s", "status": "%s", "exit_code": %d, "seconds": %d}' \
        "${names[k]}" "$status" "$code" $((SECONDS - began))
    summary+="${summary:+,$'\n'}$line"
done

printf '{"benchmark": "gpu", "seconds": %d, "failed": %d, "steps": [\n%s\n]}\n' "$SECONDS" "$failed" "$summary" \
    | tee "$OUT/gpu-$stamp.json"
[ "$failed" -eq 0 ] || { echo "gpu.sh: $failed of ${#names[@]} steps did not pass" >&2; exit 1; }
