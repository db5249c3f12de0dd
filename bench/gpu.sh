#!/usr/bin/env bash
# On a machine with a CUDA GPU and no network: is every kernel right, and how fast is it? Under 8 minutes.
#
#     bench/gpu.sh [RESULTS_FOLDER]          (default bench/results)
#
# Needs torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark. Nothing is downloaded: what is missing is installed
# into a temporary folder from the wheels in $WHEELS (default: .wheels in the project), fetched elsewhere by
#     pip download --no-deps -d .wheels pytest pluggy iniconfig packaging pygments pytest-benchmark py-cpuinfo
# The operators do without timm, and so does everything here. PYTHON names the interpreter (default: python3).
# Writes gpu_check.txt, gpu_bench.txt, gpu.json and gpu.md. Exits with 1 if a kernel is wrong or a benchmark fails.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
results=${1:-bench/results}
mkdir -p "$results"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import pytest, pytest_benchmark' 2>/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA GPU here" >&2; exit 1; }

# Correctness first, in many processes, since most of the time goes into compiling.
failed=0
declare -A checks
for operator in select_tokens select_from_saliency embed_tokens gather_tokens segment_pool pack; do
    for dtype in float32 float16 bfloat16; do
        timeout 150 "$python" bench/check_cuda.py --dtype $dtype $operator >"$site/$operator.$dtype.txt" 2>&1 &
        checks[$operator.$dtype]=$!
        [[ $operator == pack ]] && break # knows integers only
    done
done
: >"$results/gpu_check.txt"
for check in "${!checks[@]}"; do
    wait "${checks[$check]}" || { failed=1; echo "$check: FAILED" >>"$results/gpu_check.txt"; }
    cat "$site/$check.txt" >>"$results/gpu_check.txt"
done

# Then timing, alone on the machine. Cases that have not begun by the deadline are skipped and count as not measured.
timeout $((460 - SECONDS)) "$python" -m pytest bench -q -p no:cacheprovider --benchmark-quiet \
    --benchmark-json "$results/gpu.json" --deadline $((400 - SECONDS)) >"$results/gpu_bench.txt" 2>&1 || failed=1

tail -n 25 "$results/gpu_bench.txt"
{
    "$python" bench/table.py "$results/gpu.json" || failed=1
    echo
    grep -E 'right in|WRONG|FAILED|NOT CHECKED' "$results/gpu_check.txt" | sort | sed 's/^/* /'
} | tee "$results/gpu.md"
echo "$SECONDS s"
exit $failed
