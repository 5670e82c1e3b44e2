#!/usr/bin/env bash
# One visit to a CUDA machine: build, test and measure this working tree there, from nothing and without a network.
#
#   benchmarks/gpu_run.sh OUT                      everything, in some nine minutes
#   STAGES="build tests" benchmarks/gpu_run.sh OUT
#   PYTEST="-k agreement" BENCH="--quick" benchmarks/gpu_run.sh OUT
#
# Needs python with torch, triton, pytest and pybind11, a C++ compiler, cmake and ninja; nvcc where CUDA kernels are to be
# built; pytest-xdist and pytest-timeout where they are there. A stage that fails is recorded and the next one runs all
# the same; a stage that hangs is stopped. Exits 0 when every stage passed.
#
# OUT gets machine.json (device, versions, the exit code and seconds of each stage), run.log, tests.log, tests.xml and
# the folder bench with bench.json, bench.csv, bench.txt and bench.png.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_run.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

STAGES=${STAGES:-build info tests bench}
BUILD_SECONDS=${BUILD_SECONDS:-60}
INFO_SECONDS=${INFO_SECONDS:-45}
TESTS_SECONDS=${TESTS_SECONDS:-200}
BENCH_SECONDS=${BENCH_SECONDS:-300}
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

for name in $STAGES; do
    case $name in
        build) # into the working tree; nothing is installed
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
        bench)
            # shellcheck disable=SC2086  # BENCH is a list of options
            stage bench "$out/run.log" timeout --kill-after=5 "$BENCH_SECONDS" \
                "$PYTHON" -m compacter_kernels bench --device cuda --limit $((BENCH_SECONDS - 15)) \
                --out "$out/bench" ${BENCH:-}
            test ! -f "$out/bench/bench.txt" || cat "$out/bench/bench.txt"
            ;;
        *)
            printf 'no stage %s; choose of build, info, tests, bench\n' "$name" >&2
            exit 2
            ;;
    esac
done
exit $failed
