#!/usr/bin/env bash
# One visit to a CUDA machine: build, test and measure this working tree there, from nothing and without a network.
#
#   benchmarks/gpu_run.sh OUT                      everything, in some thirteen minutes
#   STAGES="build tests" benchmarks/gpu_run.sh OUT
#   PYTEST="-k agreement" BENCH="--quick" benchmarks/gpu_run.sh OUT
#
# Needs python with torch, triton, pytest and pybind11, a C++ compiler, cmake and ninja; nvcc where CUDA kernels are to be
# built, compute-sanitizer where they are to be watched; pytest-xdist and pytest-timeout where they are there. A stage
# that fails is recorded and the next one runs all the same; a stage that hangs is stopped. Exits 0 when every stage passed.
#
# The last stage, model, times whole transformers; without transformers and adapters it is left out, which is said.
#
# OUT gets machine.json (device, versions, the exit code and seconds of each stage), run.log, tests.log, tests.xml,
# sanitize.log, the folder bench with bench.json, bench.csv, bench.txt and bench.png, and model_step_*.json and .txt.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_run.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

STAGES=${STAGES:-build info tests sanitize bench model}
BUILD_SECONDS=${BUILD_SECONDS:-240} # the CUDA part, for the architecture at hand, and the C++ kernels
INFO_SECONDS=${INFO_SECONDS:-45}
TESTS_SECONDS=${TESTS_SECONDS:-200}
SANITIZE_SECONDS=${SANITIZE_SECONDS:-120}
BENCH_SECONDS=${BENCH_SECONDS:-300}
MODEL_SECONDS=${MODEL_SECONDS:-240} # T5-base, six variants, each in a process of its own
PYTHON=${PYTHON:-python3}
WORKERS=${WORKERS:-$(($(nproc) < 12 ? $(nproc) : 12))}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export REVISION=${REVISION:-$(git rev-parse --short=12 HEAD 2>/dev/null)}

results=() failed=0

# stage NAME LOG COMMAND...: run it and record how it ended
stage() {
    local name=$1 log=$2 start=$SECONDS code=0
    shift 2
    printf '== %s\n' "$name" | tee -a "$log"
    "$@" >>"$log" 2>&1 || code=$?
    ((code == 0)) || failed=1
    results+=("\"$name\": {\"exit_code\": $code, \"seconds\": $((SECONDS - start))}")
    printf '== %s: exit code %d after %d s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$log"
    describe
}

# machine.json, written anew after each stage, so that a visit cut short leaves it too
describe() {
    local stages
    stages=$(IFS=,; printf '{%s}' "${results[*]}")
    timeout 60 "$PYTHON" benchmarks/gpu_machine.py "$stages" >"$out/machine.new" 2>>"$out/run.log" &&
        mv "$out/machine.new" "$out/machine.json"
    rm -f "$out/machine.new"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

gpu_tests() {
    local options=(-m pytest -ra --tb=short --durations=10 -p no:cacheprovider -p no:benchmark) parallel=() first second
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "torch finds no CUDA device: every test would be skipped"
        return 1
    fi
    has pytest_timeout && options+=(--timeout=100 --timeout-method=thread)
    has xdist && parallel=(-n "$WORKERS")
    # shellcheck disable=SC2086  # PYTEST is a list of options
    OMP_NUM_THREADS=2 timeout --kill-after=5 $((TESTS_SECONDS * 3 / 4)) "$PYTHON" "${options[@]}" "${parallel[@]}" \
        --junitxml="$out/tests.xml" --ignore=tests/gpu/test_gpu_large.py tests/gpu ${PYTEST:-}
    first=$?
    # shellcheck disable=SC2086
    timeout --kill-after=5 $((TESTS_SECONDS / 4)) "$PYTHON" "${options[@]}" tests/gpu/test_gpu_large.py ${PYTEST:-}
    second=$?
    ((second == 5 && first == 0)) && second=0 # PYTEST selects none of these
    return $((first != 0 ? first : second))
}

# the CUDA kernels alone, on small shapes: accesses out of bounds, then races in shared memory
sanitize() {
    local tool
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on the path"; return 1; }
    for tool in memcheck racecheck; do
        timeout --kill-after=5 $((SANITIZE_SECONDS / 2)) compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" benchmarks/gpu_sanitize.py || return 1
    done
}

for name in $STAGES; do
    case $name in
        build) # into the working tree, for the GPUs at hand; nothing is installed
            stage build "$out/run.log" timeout --kill-after=5 "$BUILD_SECONDS" \
                "$PYTHON" setup.py build_ext --inplace
            ;;
        info)
            stage info "$out/run.log" timeout --kill-after=5 "$INFO_SECONDS" "$PYTHON" -m compacter_kernels info
            ;;
        tests)
            stage tests "$out/tests.log" gpu_tests
            grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c -200 | head -n 40
            tail -n 3 "$out/tests.log"
            ;;
        sanitize)
            stage sanitize "$out/sanitize.log" sanitize
            tail -n 3 "$out/sanitize.log"
            ;;
        bench)
            # shellcheck disable=SC2086  # BENCH is a list of options
            stage bench "$out/run.log" timeout --kill-after=5 "$BENCH_SECONDS" \
                "$PYTHON" -m compacter_kernels bench --device cuda --limit $((BENCH_SECONDS - 15)) \
                --out "$out/bench" ${BENCH:-}
            test ! -f "$out/bench/bench.txt" || cat "$out/bench/bench.txt"
            ;;
        model)
            if ! has adapters; then
                echo "no stage model: it needs pip install transformers==4.57.6 adapters==1.3.0" | tee -a "$out/run.log"
                continue
            fi
            stage model "$out/run.log" timeout --kill-after=5 "$MODEL_SECONDS" "$PYTHON" benchmarks/model_step.py "$out" \
                --model t5-base --device cuda --dtype bfloat16 --batch 32
            test ! -f "$out/model_step_t5-base.txt" || cat "$out/model_step_t5-base.txt"
            ;;
        *)
            printf 'no stage %s; choose of build, info, tests, sanitize, bench, model\n' "$name" >&2
            exit 2
            ;;
    esac
done
exit $failed
