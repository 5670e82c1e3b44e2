#!/usr/bin/env bash
# One visit to a CUDA machine: build, check and measure this working tree there, from nothing and without a network.
#
#   benchmarks/gpu_run.sh OUT                                    everything, in DEADLINE seconds
#   DRY=1 benchmarks/gpu_run.sh OUT                              without a GPU: reads every command line, collects the tests
#   STAGES="build first ab" VARIANTS="a/_C.so b/_C.so" benchmarks/gpu_run.sh OUT
#   PYTEST="-k agreement" BENCH="--quick" AB="--tokens 16384" benchmarks/gpu_run.sh OUT
#
# Needs python with torch, triton, pytest and pybind11, a C++ compiler, cmake and ninja; nvcc where CUDA kernels are to be
# built, ncu and compute-sanitizer where they are to be watched; pytest-xdist and pytest-timeout where they are there; the
# stage model needs transformers and adapters, and is left out without them.
#
# A stage gets at most its seconds, and no more than are left; one that fails, hangs or finds no time is recorded, and the
# next one runs all the same. A kernel that fails its first look is not measured. Exits 0 when every stage passed.
#
# OUT/visit.tar.gz is written anew after each stage: stages.json (the exit code and seconds of each), machine.json, the
# output of each stage in NAME.log, ab.json and ab.txt, family_*.json, tests.xml, the folder bench, and model_step_*.json and .txt.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_run.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec </dev/null

STAGES=${STAGES:-build machine first ab family ncu memcheck racecheck tests large bench model}
DEADLINE=${DEADLINE:-570} # seconds of the whole visit
IMPLS=${IMPLS:-cuda triton}
VARIANTS=${VARIANTS:-} # other builds of the native part
DRY=${DRY:-0}
PYTHON=${PYTHON:-python3}
WORKERS=${WORKERS:-$(($(nproc) < 12 ? $(nproc) : 12))}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export REVISION=${REVISION:-$(git rev-parse --short=12 HEAD 2>/dev/null)}

python=("$PYTHON")
((DRY)) && python+=(benchmarks/gpu_dry.py)
results=$(mktemp -d) ended=() failed=0
trap 'rm -rf "$results"' EXIT

# stage NAME SECONDS COMMAND...: run it for at most so long, keep its output, and record how it ended. It is stopped with
# $signal: at INT, pytest reports what it has seen.
stage() {
    local name=$1 limit=$2 log=$results/$1.log start=$SECONDS code=124
    shift 2
    ((limit < DEADLINE - start)) || limit=$((DEADLINE - start))
    if ((limit > 5)); then
        timeout --signal="${signal:-TERM}" --kill-after=15 "$limit" env --default-signal=INT "$@" >"$log" 2>&1
        code=$?
    else
        echo "no time was left" >"$log"
    fi
    ((code == 0)) || failed=1
    ended+=("\"$name\": {\"exit_code\": $code, \"seconds\": $((SECONDS - start))}")
    tail -n 3 "$log" | cut -c -200
    printf '== %s: exit code %d after %d s, %d s are left\n' "$name" "$code" $((SECONDS - start)) $((DEADLINE - SECONDS))
    save
    return "$code"
}

# the archive, as a whole or not at all, so that a visit cut short leaves the one before
save() {
    (IFS=, && printf '{%s}\n' "${ended[*]}") >"$results/stages.json"
    tar -C "$results" -czf "$out/visit.new" . && mv "$out/visit.new" "$out/visit.tar.gz"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# watched NAME SECONDS TOOL... -- COMMAND...: a stage under a tool, which a dry run does without
watched() {
    local name=$1 limit=$2 tool=()
    shift 2
    while [[ $1 != -- ]]; do
        tool+=("$1")
        shift
    done
    ((DRY)) && tool=()
    stage "$name" "$limit" "${tool[@]}" "${@:2}"
}

if ! ((DRY)) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch finds no CUDA device; DRY=1 runs without one" >&2
    exit 1
fi

read -ra kernels <<<"$IMPLS $VARIANTS" # those that have not failed
read -ra pytest <<<"-m pytest -ra --tb=short --durations=10 -p no:cacheprovider -p no:benchmark"
has pytest_timeout && pytest+=(--timeout=100 --timeout-method=thread)
read -ra sections <<<"SpeedOfLight SchedulerStats WarpStateStats InstructionStats MemoryWorkloadAnalysis Occupancy LaunchStats"
metrics=dram__bytes_read.sum,dram__bytes_write.sum,smsp__inst_executed.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum

for name in $STAGES; do
    case $name in
        build) # into the working tree, for the GPUs at hand; nothing is installed
            stage build 200 "${python[@]}" setup.py build_ext --inplace
            ;;
        machine)
            stage machine 45 "$PYTHON" benchmarks/gpu_machine.py "$results/machine.json"
            ;;
        first) # each kernel in a process of its own, which a fault ends
            sound=()
            for index in "${!kernels[@]}"; do
                stage "first_$index" 90 "${python[@]}" benchmarks/gpu_first.py "${kernels[index]}" &&
                    sound+=("${kernels[index]}")
            done
            kernels=("${sound[@]}")
            ;;
        ab)
            # shellcheck disable=SC2086  # AB is a list of options
            stage ab 150 "${python[@]}" benchmarks/gpu_ab.py "$results/ab.json" "${kernels[@]}" --limit 90 ${AB:-}
            test ! -f "$results/ab.txt" || cat "$results/ab.txt"
            ;;
        family) # each impl in a process of its own, as in `first`
            for kernel in "${kernels[@]}"; do
                [[ " $IMPLS " == *" $kernel "* ]] || continue
                # shellcheck disable=SC2086  # FAMILY is a list of options
                stage "family_$kernel" 75 "${python[@]}" benchmarks/gpu_family.py "$results/family_$kernel.json" "$kernel" \
                    --limit 45 ${FAMILY:-}
            done
            ;;
        ncu)
            watched ncu 120 ncu --clock-control none --profile-from-start off --page raw --print-units base \
                "${sections[@]/#/--section=}" --metrics "$metrics" \
                -- "${python[@]}" benchmarks/gpu_profile.py "${kernels[@]}"
            ;;
        memcheck | racecheck) # each tensor in an allocation of its own, so that memcheck sees the end of each
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 watched "$name" 60 compute-sanitizer --tool "$name" --error-exitcode 1 \
                -- "${python[@]}" benchmarks/gpu_sanitize.py
            ;;
        tests)
            parallel=()
            has xdist && parallel=(-n "$WORKERS")
            # shellcheck disable=SC2086  # PYTEST is a list of options
            signal=INT stage tests 160 env OMP_NUM_THREADS=2 "${python[@]}" "${pytest[@]}" "${parallel[@]}" \
                --junitxml="$results/tests.xml" --ignore=tests/gpu/test_gpu_large.py tests/gpu ${PYTEST:-}
            grep -E '^(FAILED|ERROR)' "$results/tests.log" | cut -c -200 | head -n 40
            ;;
        large) # the tests that fill the device's memory, alone on it
            # shellcheck disable=SC2086
            signal=INT stage large 60 "${python[@]}" "${pytest[@]}" tests/gpu/test_gpu_large.py ${PYTEST:-}
            ;;
        bench) # without what torch.compile makes, which takes minutes
            providers=(dense dense-cached factored dense-lowp dense-cached-lowp factored-lowp)
            for kernel in "${kernels[@]}"; do [[ " $IMPLS " == *" $kernel "* ]] && providers+=("$kernel"); done
            left=$((DEADLINE - SECONDS - 15))
            # shellcheck disable=SC2086  # BENCH is a list of options
            stage bench 300 "${python[@]}" -m compacter_kernels bench --device cuda --no-plot --out "$results/bench" \
                --limit $((left < 285 ? left : 285)) --impl "$(IFS=, && echo "${providers[*]}")" ${BENCH:-}
            test ! -f "$results/bench/bench.txt" || cat "$results/bench/bench.txt"
            ;;
        model)
            has adapters || { echo "no stage model: it needs transformers==4.57.6 and adapters==1.3.0" && continue; }
            stage model 240 "${python[@]}" benchmarks/model_step.py "$results" \
                --model t5-base --device cuda --dtype bfloat16 --batch 32
            ;;
        *)
            printf 'no stage %s; choose of build machine first ab family ncu memcheck racecheck tests large bench model\n' "$name" >&2
            exit 2
            ;;
    esac
done
exit $failed
