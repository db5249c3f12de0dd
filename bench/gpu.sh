#!/usr/bin/env bash
# On a machine with a CUDA GPU and no network: is every kernel right, and how fast is it? Under 10 minutes on 16 cores.
#
#     bench/gpu.sh [--rehearse] [RESULTS_FOLDER]          (default bench/results)
#
# Needs torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark. Nothing is downloaded: the wheels in $WHEELS (default:
# .wheels in the project) are installed into a temporary folder. They are fetched elsewhere by
#     pip download --no-deps -d .wheels pytest pluggy iniconfig packaging pygments pytest-benchmark py-cpuinfo \
#         pytest-xdist execnet
# and, for FlashAttention-3 as a rival (26 MB; not measured where it is missing), whole models and a setuptools that knows
# pyproject.toml,
#     pip download --no-deps -d .wheels fa3-fwd==0.0.3 einops timm huggingface_hub safetensors pyyaml setuptools
# where fa3-fwd takes --platform manylinux_2_24_x86_64 --only-binary=:all: on another machine than Linux on x86-64.
# The operators do without timm; where timm >= 1.0.31 can be imported, whole models are tested and timed too. The CUDA
# extension is built here unless it lies in the package already; without nvcc it is left out. compute-sanitizer looks over
# attention where it is installed. PYTHON names the interpreter (default: python3).
# What is measured comes in this order, each part up to a deadline of its own: whole models eager, then in graphs
# (bench/end_to_end.py, ViT-L/16 alone), operators, attention, then what is compiled. Batch 1 comes first in each.
# Writes gpu_tests.txt, gpu_bench.txt, gpu_models.json, gpu_models_graphed.json, gpu_models_compiled.json,
# gpu_attention.json, gpu.json, gpu_compiled.json and gpu.md, of which the last is printed in the end. Exits with 1 if a
# kernel is wrong or a benchmark fails. --rehearse takes every step on a machine without a GPU, on a few small cases: its
# figures mean nothing.
set -uo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "bench/gpu.sh: $*" >&2; exit 1; }

rehearsed=0
case ${1:-} in
-h | --help) usage; exit 0 ;;
--rehearse) rehearsed=1; shift ;;
-*) usage >&2; exit 2 ;;
esac
(($# > 1)) && { usage >&2; exit 2; }
results=$(mkdir -p "${1:-$(dirname "$0")/results}" && cd "${1:-$(dirname "$0")/results}" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3} (PYTHON names the interpreter)"
wheels=${WHEELS:-.wheels}

"$python" -c 'import torch' || fail "torch cannot be imported by $python"
if ! ((rehearsed)); then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "no CUDA GPU here"
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
fi
imports() { "$python" -c "import $1" 2>/dev/null; }
imports pytest_benchmark || fail "pytest and pytest-benchmark are needed (--help says how)"

rm -f "$results"/gpu{_tests.txt,_bench.txt,_attention.json,.json,_compiled.json,.md}
rm -f "$results"/gpu_models{,_graphed,_compiled}.json
failed=0

versions() {
    "$python" - <<'PYTHON'
from importlib import metadata

import torch

found = []
for name in ("torch", "triton", "timm", "numpy", "fa3-fwd"):
    try:
        found.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        found.append(f"no {name}")
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(end=f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}; ")
else:
    print(end="a rehearsal without a GPU; ")
print(", ".join(found))
PYTHON
}
versions=$(versions)
echo "$versions" | tee "$results/gpu_tests.txt"

# An older timm lacks what the package asks of it, and a timm without torchvision does not import.
has_timm() {
    "$python" - 2>/dev/null <<'PYTHON'
import sys

import timm

sys.exit(tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31))
PYTHON
}

# The CUDA extension, from the sources that are here: an older one would be tested and timed in their name.
has_extension() {
    "$python" -c 'import sys, setup, torch; from tinydrop_kernels import _C; sys.exit(_C.SOURCES != setup.sources())' \
        2>/dev/null
}
if ! ((rehearsed)) && ! has_extension && { [[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null; }; then
    TINYDROP_CUDA=1 timeout 120 "$python" setup.py -q build_ext --inplace --build-temp "$site/build" \
        >"$site/extension.txt" 2>&1 ||
        { failed=1; echo "extension: FAILED to build" | cat - "$site/extension.txt" | tee -a "$results/gpu_tests.txt"; }
fi
if ! has_extension && compgen -G "tinydrop_kernels/_C*.so" >/dev/null; then
    echo "extension: NOT of these sources, remove $(compgen -G "tinydrop_kernels/_C*.so")" >>"$results/gpu_tests.txt"
    failed=1
fi

# Correctness first, in many processes, since most of the time goes into compiling. A process that hangs is stopped.
declare -A started=()
start() { # NAME SECONDS COMMAND...: in the background, its output kept under its name
    local name=$1 seconds=$2
    shift 2
    OMP_NUM_THREADS=1 timeout "$seconds" "$@" >"$site/$name.txt" 2>&1 &
    started[$name]=$!
}
finish() { # wait for all that was started; of each the exit status and pytest's tally
    local name status tally
    for name in "${!started[@]}"; do
        wait "${started[$name]}"
        status=$?
        sed "s/^/$name: /" "$site/$name.txt"
        tally=$(grep -E '[0-9]+ passed' "$site/$name.txt" | tail -n 1)
        if ((status == 0)) && [[ -n $tally ]]; then
            echo "$name: right, $tally"
        else
            failed=1
            echo "$name: FAILED, exit status $status, ${tally:-nothing passed}"
        fi
    done >>"$results/gpu_tests.txt"
    started=()
}
pytest=("$python" -m pytest -rsfE -p no:cacheprovider -p no:benchmark)
suite() { # NAME PROCESSES FOLDER
    local name=$1 processes=$2 folder=$3 file
    if imports xdist; then # neighbours stay together, so that few kernels are compiled by more than one process
        start "$name" 240 "${pytest[@]}" --numprocesses "$processes" --dist worksteal "$folder"
    else # a process for each file, which the longest one holds up
        for file in $(compgen -G "$folder/test_*.py" || echo "$folder"); do
            start "$name.$(basename "$file" .py)" 240 "${pytest[@]}" "$file"
        done
    fi
}
# Few: compute-sanitizer slows kernels a hundredfold. Without the caching allocator it sees where a tensor ends.
sanitized="ragged_batches and bfloat16 and not reference and not padded"
sanitize() { # TOOL OPTIONS...
    local tool=$1
    shift
    start "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$@" \
        --kernel-name kns=varlen_attention --target-processes application-only --launch-timeout 60 --error-exitcode 86 \
        "${pytest[@]}" tests/ops/test_attention.py -k "$sanitized"
}
cores=$(nproc)
if ((rehearsed)); then
    suite operators 1 tests/ops/test_law.py
else
    suite operators "$cores" tests/ops
fi
if ! has_timm; then
    echo "models: NOT TESTED, there is no timm >= 1.0.31 that can be imported" >>"$results/gpu_tests.txt"
elif ! ((rehearsed)); then
    suite models $(((cores + 3) / 4)) tests/models
fi
if ((rehearsed)); then
    echo "compute-sanitizer: NOT RUN, it needs a GPU" >>"$results/gpu_tests.txt"
elif command -v compute-sanitizer >/dev/null; then
    sanitize memcheck --report-api-errors no # PyTorch's, who asks to see what fails
    has_extension && sanitize racecheck
else
    echo "compute-sanitizer: NOT RUN, it is not installed" >>"$results/gpu_tests.txt"
fi
finish

# Then timing, alone on the machine. Cases that have not begun by the deadline are skipped and count as not measured.
bench() { # JSON DEADLINE PYTEST_ARGUMENTS...: in seconds of this script
    local json=$1 deadline=$2
    shift 2
    timeout $((deadline + 40 - SECONDS)) "$python" -m pytest -rsfE -p no:cacheprovider --benchmark-quiet \
        --benchmark-json "$results/$json" --deadline $((deadline - SECONDS)) "$@" >>"$results/gpu_bench.txt" 2>&1 ||
        { failed=1; echo "$json: FAILED" >>"$results/gpu_bench.txt"; }
}
models() { # JSON DEADLINE ARGUMENTS...
    local json=$1 deadline=$2
    shift 2
    if ! has_timm; then
        echo "$json: NOT MEASURED, there is no timm >= 1.0.31 that can be imported" >>"$results/gpu_tests.txt"
        return
    fi
    timeout $((deadline + 25 - SECONDS)) "$python" bench/end_to_end.py --json "$results/$json" \
        --deadline $((deadline - SECONDS)) "$@" >>"$results/gpu_bench.txt" 2>&1 ||
        { failed=1; echo "$json: FAILED" >>"$results/gpu_bench.txt"; }
}
few=() large=(--models vit_large_patch16_224 --mixes 20 50 --batches 1 256 8 64 --rounds 8)
eager=(dense ours exits tome padded resolution) graphed=(dense-graphed ours-graphed)
if ((rehearsed)); then # all in one process, which a CPU takes long to start
    few=(-k "b1-14x14-keep0.5")
    models gpu_models.json 330 --smoke --mixes 20 --rounds 1 --ways "${eager[@]}" "${graphed[@]}" --profile dense ours
else # each in a process of its own, lest a crash cost what was measured before
    models gpu_models.json 290 "${large[@]}" --ways "${eager[@]}" --profile dense ours
    models gpu_models_graphed.json 330 "${large[@]}" --ways dense ours "${graphed[@]}"
fi
bench gpu.json 410 bench --ignore bench/test_varlen_attention.py --compiled none "${few[@]}"
bench gpu_attention.json 480 bench/test_varlen_attention.py "${few[@]}"
if ((rehearsed)); then # compiling takes a CPU minutes
    few=(-k "b1-14x14-keep0.5 and segment_pool")
else
    models gpu_models_compiled.json 505 "${large[@]}" --ways dense dense-compiled ours ours-compiled
fi
bench gpu_compiled.json 540 bench --ignore bench/test_varlen_attention.py --compiled alone "${few[@]}"

measured=() models=()
for json in "$results"/gpu{_attention,,_compiled}.json; do
    [[ -s $json ]] && measured+=("$json")
done
for json in "$results"/gpu_models{,_graphed,_compiled}.json; do
    [[ -s $json ]] && models+=("$json")
done
{
    echo "$versions"
    echo
    ((${#models[@]})) && { "$python" bench/end_to_end.py --show "${models[@]}" || failed=1; }
    echo
    ((${#measured[@]})) && { "$python" bench/table.py "${measured[@]}" || failed=1; }
    echo
    grep -hE '^[^ ]+: (right|FAILED|ERROR |NOT)|(ERROR|RACECHECK) SUMMARY' \
        "$results/gpu_tests.txt" | sort -u | head -n 60 | sed 's/^/* /'
    grep -hE '^(FAILED|ERROR|SKIPPED) |: FAILED$' "$results/gpu_bench.txt" | sed 's/^/* /'
    echo "* $SECONDS s"
} >"$results/gpu.md"
cat "$results/gpu.md"
exit $failed
