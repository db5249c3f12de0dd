#!/usr/bin/env bash
# Tests every kernel on a machine with a CUDA GPU, and then times it. It needs no network and takes under 10 minutes.
#
#     bench/gpu.sh [--rehearse] [RESULTS_FOLDER]          (default bench/results)
#
# The script writes gpu.md and prints it at the end, with the targets last. It also writes results.tar every 15 seconds.
# results.tar has the output of every step, and the figures of every case as soon as the case is measured. A kill
# therefore costs one case. A step is stopped at its deadline. A step with less than 15 seconds left is not run. The
# exit status is 1 if a kernel is wrong, or if a step fails or is stopped. --rehearse runs every step on a few small
# cases on a machine without a GPU. Its figures mean nothing.
#
# It needs torch >= 2.11, triton >= 3.6, pytest, pytest-benchmark and pytest-xdist. Whole models need timm >= 1.0.31.
# The rival FlashAttention-3 needs fa3-fwd. Nothing is downloaded. The wheels in $WHEELS (default: .wheels in the
# project) are installed into a temporary folder, and wheels that do not fit are skipped. Fetch them elsewhere with
#     pip download --no-deps -d .wheels timm==1.0.31
#     pip download --no-deps -d .wheels --only-binary=:all: --platform manylinux_2_24_x86_64 fa3-fwd==0.0.3
# The CUDA extension is built here, which takes time from the tests. To save that time, build it before the run. The
# build needs nvcc and no GPU:
#     TORCH_CUDA_ARCH_LIST=9.0a TINYDROP_CUDA=1 python setup.py build_ext --inplace
# PYTHON names the interpreter (default: python3). PACE scales all deadlines, in percent (default: 100).
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
pace=${PACE:-$((rehearsed ? 1000 : 100))}

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site
found=$temporary/results # the contents of results.tar
mkdir "$site" "$found"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

pack() { # may run twice at once, so each call writes a file of its own
    local packed=$results/.results.$BASHPID.tar
    tar -cf "$packed" -C "$found" . && mv "$packed" "$results/results.tar"
}
note() { echo "$*" | tee -a "$found/steps.txt"; }
ask() { "$python" bench/machine.py >"$found/machine.txt"; }
has() { grep -qx "has $1" "$found/machine.txt"; }
stop() { jobs -p | xargs -r kill 2>/dev/null; }
left() { echo $(($1 * pace / 100 - SECONDS)); } # seconds until a deadline

step() { # NAME DEADLINE COMMAND... writes the output to NAME.txt
    local name=$1 seconds status tally
    seconds=$(left "$2")
    shift 2
    if ((seconds < 1 || 100 * seconds < 15 * pace)); then
        note "$name: NOT RUN, $seconds s are left"
        return
    fi
    # INT, because an interrupted pytest still prints its results. By default, bash's background jobs ignore INT.
    env --default-signal=INT timeout -s INT -k 5 "$seconds" "$@" >"$found/$name.txt" 2>&1 &
    wait $! # in the background, so that a signal to this script also stops the step
    status=$?
    tally=$(grep -E '[0-9]+ (passed|failed|skipped|errors?)\b' "$found/$name.txt" | tail -n 1)
    case $status in
    0) note "$name: done at $SECONDS s${tally:+, $tally}" ;;
    124 | 137) note "$name: STOPPED at $SECONDS s${tally:+, $tally}" ;;
    *) note "$name: FAILED, exit status $status${tally:+, $tally}" ;;
    esac
}
begin() { # starts a step in the background
    (trap stop EXIT && OMP_NUM_THREADS=1 step "$@") &
    begun+=($!)
}
end() { # waits for all steps in the background
    wait "${begun[@]}"
    begun=()
}
pytest=("$python" -m pytest -rsfE -p no:cacheprovider)
suite() { # NAME PROCESSES PYTEST_ARGUMENTS...
    begin "$1" 160 "${pytest[@]}" -p no:benchmark --numprocesses "$2" --dist worksteal "${@:3}"
}
bench() { # NAME DEADLINE PYTEST_ARGUMENTS...; no case begins in the last 10 seconds
    step "$1" "$2" "${pytest[@]}" --lines "$found/figures.jsonl" --deadline $(($(left "$2") - 10)) "${@:3}"
}
models() { # NAME DEADLINE ARGUMENTS...
    if has timm; then
        step "$1" "$2" "$python" bench/end_to_end.py --json "$found/$1.json" --deadline $(($(left "$2") - 10)) "${@:3}"
    else
        note "$1: NOT RUN, there is no timm >= 1.0.31 that can be imported"
    fi
}
sanitize() { # TOOL DEADLINE TESTS OPTIONS...; no caching allocator, because it hides where a tensor ends
    begin "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${@:4}" \
        --kernel-name kns=varlen_attention --target-processes application-only --launch-timeout 60 --error-exitcode 86 \
        "${pytest[@]}" -p no:benchmark tests/ops/test_attention.py -k "$3"
}
tables() {
    tail -n 1 "$found/machine.txt"
    ((rehearsed)) && echo "A rehearsal without a GPU."
    echo
    sed 's/^/* /' "$found/steps.txt"
    grep -hE '^(FAILED|ERROR|SKIPPED) |(ERROR|RACECHECK) SUMMARY' "$found"/*.txt | sort -u | head -n 60 | sed 's/^/* /'
    echo
    compgen -G "$found/models_*.json" >/dev/null && "$python" bench/end_to_end.py --show "$found"/models_*.json
    echo
    "$python" bench/table.py "$found/figures.jsonl"
}

for wheel in "$wheels"/*.whl; do
    [[ -e $wheel ]] || continue
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheel" 2>>"$found/wheels.txt" ||
        note "$(basename "$wheel"): NOT INSTALLED"
done
ask || fail "torch cannot be imported by $python"
has gpu || ((rehearsed)) || fail "no CUDA GPU here"
has pytest_benchmark && has xdist || fail "pytest, pytest-benchmark and pytest-xdist are needed (--help says how)"
tail -n 1 "$found/machine.txt"

rm -f "$results"/{gpu.md,results.tar}
touch "$found"/{steps.txt,figures.jsonl}
(while sleep 15; do pack; done) >/dev/null 2>&1 &
trap 'stop; pack; rm -rf "$temporary" "$results"/.results.*' EXIT

if ! has extension && ! ((rehearsed)) && { [[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null; }; then
    TINYDROP_CUDA=1 step extension 60 "$python" setup.py -q build_ext --inplace --build-temp "$temporary/build"
    ask
fi
if ! has extension && compgen -G "tinydrop_kernels/_C*.so" >/dev/null; then
    note "extension: FAILED, it is not of these sources: remove $(compgen -G "tinydrop_kernels/_C*.so")"
fi

# The arguments of the steps, then those of a rehearsal.
begun=() processes=(12 3) whole=(--models vit_large_patch16_224 --rounds 8)
operators=(tests/ops) wholes=(tests/engine/test_{cuda_graphs,pipeline,kernels_end_to_end}.py)
eager=(--batches 1 8 64 256 --mixes 20 50) graphed=(--batches 1 8 64 --mixes 20 50) compiled=(--batches 256 1 --mixes 20)
compiled_ways=(dense-compiled ours-compiled) few=() attention="" kernel=select_tokens compiled_case="b256-14x14"
if ((rehearsed)); then
    export TRITON_INTERPRET=1
    processes=(0 0) whole=(--smoke --rounds 1)
    operators=(tests/ops/test_packing.py) wholes=(tests/engine/test_pipeline.py -k "same_answers and once")
    eager=(--batches 1 8 --mixes 20) graphed=(--batches 8 --mixes 20) compiled=(--batches 8 --mixes 20)
    compiled_ways=() few=(-k "b1-14x14-keep0.5") attention="b1-50 and " kernel=segment_pool compiled_case="b1-14x14"
fi

# Correctness. Most of this time goes into compiling. Meanwhile, inductor's cache is filled for models_compiled below.
suite operators "${processes[0]}" "${operators[@]}"
if has timm; then
    suite whole_models "${processes[1]}" "${wholes[@]}"
    begin inductor 160 "$python" bench/end_to_end.py --json "$temporary/inductor.json" "${whole[@]}" "${compiled[@]}" \
        --rounds 1 --ways ours "${compiled_ways[@]}"
fi
end
grep -q '^operators: .* passed' "$found/steps.txt" || note "operators: FAILED, nothing passed"

# Speed. Steps now run one at a time. Each has its own process, so that a crash costs one step.
models models_eager 255 "${whole[@]}" "${eager[@]}" --ways dense ours exits tome padded resolution --profile dense ours
models models_graphed 295 "${whole[@]}" "${graphed[@]}" --ways dense ours dense-graphed ours-graphed
bench attention 365 bench/test_varlen_attention.py -k "${attention}not cudnn"
bench operators_timed 430 bench --ignore bench/test_varlen_attention.py --compiled none "${few[@]}"
models models_compiled 505 "${whole[@]}" "${compiled[@]}" --ways dense ours "${compiled_ways[@]}"
bench cudnn 525 bench/test_varlen_attention.py -k "${attention}cudnn" # may crash: short segments need cuDNN 9.24
bench operators_compiled 540 "bench/test_$kernel.py" --compiled alone -k "$compiled_case"

# The sanitizers use the rest of the time. Nothing is timed any more.
if command -v compute-sanitizer >/dev/null; then
    small="ragged_batches and bfloat16" # few cases, because compute-sanitizer slows kernels about 100 times
    sanitize memcheck 565 "$small and not reference and not padded" --report-api-errors no # PyTorch makes some
    # Only for the extension, because racecheck does not understand the barriers of Triton's kernels.
    has extension && sanitize racecheck 565 "$small and [cuda"
    end
else
    note "compute-sanitizer: NOT RUN, it is not installed"
fi

tables >"$found/gpu.md" 2>&1
cp "$found/gpu.md" "$results/gpu.md"
cat "$found/gpu.md"
! grep -qE ': (FAILED|STOPPED)' "$found/steps.txt"
