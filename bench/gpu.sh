#!/usr/bin/env bash
# On a machine with a CUDA GPU and no network: is every kernel right, and how fast is it? Under 10 minutes on 16 cores.
#
#     bench/gpu.sh [RESULTS_FOLDER]          (default bench/results)
#
# Needs torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark. Nothing is downloaded: the wheels in $WHEELS (default:
# .wheels in the project) are installed into a temporary folder. They are fetched elsewhere by
#     pip download --no-deps -d .wheels pytest pluggy iniconfig packaging pygments pytest-benchmark py-cpuinfo
# and, for FlashAttention-3 as a rival (26 MB; not measured where it is missing) and a setuptools that knows pyproject.toml,
#     pip download --no-deps -d .wheels fa3-fwd==0.0.3 setuptools
# where fa3-fwd takes --platform manylinux_2_24_x86_64 --only-binary=:all: on another machine than Linux on x86-64.
# The CUDA extension is built here unless it lies in the package already; without nvcc it is left out. compute-sanitizer
# looks over attention where it is installed. The operators do without timm, and so does everything here. PYTHON names
# the interpreter (default: python3).
# Writes gpu_check.txt, gpu_bench.txt, gpu_attention.json, gpu.json and gpu.md. Exits with 1 if a kernel is wrong or a
# benchmark fails.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
results=${1:-bench/results}
mkdir -p "$results"
rm -f "$results"/gpu{_check.txt,_bench.txt,_attention.json,.json,.md}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
failed=0

if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
fi
"$python" -c 'import pytest, pytest_benchmark' || exit 1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA GPU here" >&2; exit 1; }

declare -A started
start() { # NAME SECONDS COMMAND...: in the background, its output kept under its name
    local name=$1 seconds=$2
    shift 2
    OMP_NUM_THREADS=1 timeout "$seconds" "$@" >"$site/$name.txt" 2>&1 &
    started[$name]=$!
}
finish() { # wait for all that was started
    local name status
    for name in "${!started[@]}"; do
        wait "${started[$name]}"
        status=$?
        sed "s/^/$name: /" "$site/$name.txt"
        ((status)) && failed=1 && echo "$name: FAILED, exit status $status"
    done >>"$results/gpu_check.txt"
    started=()
}
has_extension() { # built from the sources that are here: an older one would be checked and timed in their name
    "$python" - <<'PYTHON'
import sys
import setup, torch, bench.measure
from tinydrop_kernels.ops import cuda
if not cuda.available():
    sys.exit(1)
from tinydrop_kernels import _C
sys.exit(_C.SOURCES != setup.sources())
PYTHON
}

# Correctness first, in many processes, since most of the time goes into compiling.
build=""
if ! has_extension 2>/dev/null && { [[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null; }; then
    TINYDROP_CUDA=1 timeout 160 "$python" setup.py -q build_ext --build-temp "$site/build" --build-lib "$site/extension" \
        >"$site/extension.txt" 2>&1 &
    build=$!
fi
for dtype in float32 float16 bfloat16; do
    for check in varlen_attention_triton embed_tokens select_tokens select_from_saliency gather_tokens segment_pool \
        varlen_attention_torch varlen_attention_reference; do
        start $check.$dtype 160 "$python" bench/check_cuda.py --dtype $dtype $check
    done
done
start pack 160 "$python" bench/check_cuda.py --dtype float32 pack # knows integers only
finish
if [[ -n $build ]]; then
    # Only now into the package: a process that imported half of a file would crash.
    if wait "$build"; then
        cp "$site"/extension/tinydrop_kernels/_C*.so tinydrop_kernels/
    else
        failed=1
        { echo "extension: FAILED to build"; cat "$site/extension.txt"; } | tee -a "$results/gpu_check.txt"
    fi
fi

# The extension, and what compute-sanitizer says of short segments; not of PyTorch's own kernels.
sanitize() { # TOOL IMPLEMENTATION OPTIONS...
    local tool=$1 implementation=$2
    shift 2
    start "$tool.$implementation" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$@" \
        --kernel-name kns=varlen_attention --target-processes application-only --launch-timeout 60 --error-exitcode 86 \
        "$(command -v "$python")" bench/check_cuda.py --dtype bfloat16 --longest 198 "varlen_attention_$implementation"
}
implementations=(triton)
if has_extension; then
    implementations+=(cuda)
    for dtype in float16 bfloat16; do
        start varlen_attention_cuda.$dtype 120 "$python" bench/check_cuda.py --dtype $dtype varlen_attention_cuda
    done
fi
if command -v compute-sanitizer >/dev/null; then
    for implementation in "${implementations[@]}"; do
        sanitize memcheck "$implementation" --report-api-errors no # PyTorch's, who asks to see what fails
    done
    [[ ${implementations[*]} == *cuda* ]] && sanitize racecheck cuda
else
    echo "compute-sanitizer: NOT CHECKED, it is not installed" >>"$results/gpu_check.txt"
fi
finish

# Then timing, alone on the machine. Cases that have not begun by the deadline are skipped and count as not measured.
bench() { # JSON DEADLINE PYTEST_ARGUMENTS...: both in seconds of this script
    local json=$1 deadline=$2
    shift 2
    timeout $((deadline + 60 - SECONDS)) "$python" -m pytest -q -rsfE -p no:cacheprovider --benchmark-quiet \
        --benchmark-json "$results/$json" --deadline $((deadline - SECONDS)) "$@" >>"$results/gpu_bench.txt" 2>&1 ||
        failed=1
}
bench gpu_attention.json 400 bench/test_varlen_attention.py
bench gpu.json 490 bench --ignore bench/test_varlen_attention.py

tail -n 15 "$results/gpu_bench.txt"
measured=()
for json in "$results"/gpu_attention.json "$results"/gpu.json; do
    [[ -s $json ]] && measured+=("$json")
done
{
    "$python" bench/table.py "${measured[@]}" || failed=1
    echo
    grep -hE 'right in|WRONG|FAILED|NOT CHECKED|SUMMARY' "$results/gpu_check.txt" | sort | sed 's/^/* /'
    grep -h '^SKIPPED' "$results/gpu_bench.txt" | sed 's/^/* /'
} | tee "$results/gpu.md"
echo "$SECONDS s"
exit $failed
