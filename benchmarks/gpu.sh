#!/usr/bin/env bash
# Run the op's tests, the benchmarks, the batch job and the sweep on a CUDA machine, in less than ten minutes.
# If ALBEF names a checkout of the original code, the word maps are compared with it. attnx need not be installed.
# A step that fails or exceeds its limit does not stop the next. The exit code is that of the last step that failed.
# STEPS="tests:130 words:85" runs only these steps, each with its limit in seconds.
# QUICK=1 checks this script without a GPU: tiny shapes on the CPU, few tests, no meaningful timings.
set -u
cd "$(dirname "$0")/.."
QUICK=${QUICK:-}
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
status=0

step() { # name, seconds, command...
    local name=$1 seconds=$2 code
    shift 2
    # SIGINT comes first, so that results so far are stored.
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "== $name: exit $code after ${SECONDS} s"
    tail -n "${LINES_SHOWN:-60}" "$OUT/$name.log"
    ((code == 0)) || status=$code
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader ||
        echo "nvidia-smi failed"
    "$PYTHON" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" 2>/dev/null || echo "no CUDA device"
} 2>&1 | tee "$OUT/gpu.txt"
if [[ -z $QUICK ]] && grep -q "no CUDA device" "$OUT/gpu.txt"; then
    exit 2
fi

if [[ -n $QUICK ]]; then
    step tests 140 "$PYTHON" -m pytest tests/test_ops.py -k eager -x -p no:cacheprovider
    step benchmarks 300 "$PYTHON" -m benchmarks.run --quick --device cpu --out "$OUT"
    step words 100 "$PYTHON" -m benchmarks.suites.words --quick --out "$OUT"
    step windows 100 "$PYTHON" -m benchmarks.suites.windows --quick --out "$OUT"
    step probes 100 "$PYTHON" -m benchmarks.suites.probes --quick --out "$OUT"
    step jobs 100 "$PYTHON" -m benchmarks.suites.jobs --quick --out "$OUT"
    step sweep 130 "$PYTHON" -m benchmarks.suites.sweep --compile-only --quick --out "$OUT"
    exit "$status"
fi
# Most of the tests' time is compilation, so they run in parallel if pytest-xdist is installed.
parallel=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 12")
tests=(tests/test_{ops,ops_contract,vecmat,keep,gradient,gradient_map,gradient_kernel,bias_period,capture,widths,worker,maps,stats,probes}.py)
for timed in ${STEPS:-tests:130 benchmarks:230 words:75 windows:75 probes:90 jobs:75 sweep:75}; do
    name=${timed%:*} seconds=${timed#*:}
    case $name in
        # shellcheck disable=SC2086
        tests) step tests "$seconds" "$PYTHON" -m pytest "${tests[@]}" -m "gpu or not gpu" -p no:cacheprovider $parallel ;;
        benchmarks) step benchmarks "$seconds" "$PYTHON" -m benchmarks.run --device cuda --limit $((seconds - 25)) --out "$OUT" ;;
        # shellcheck disable=SC2086
        words) step words "$seconds" "$PYTHON" -m benchmarks.suites.words --device cuda --only "384 px b16" ${ALBEF:+--original "$ALBEF"} --out "$OUT" ;;
        windows) step windows "$seconds" "$PYTHON" -m benchmarks.suites.windows --device cuda --seconds 8 --out "$OUT" ;;
        probes) step probes "$seconds" "$PYTHON" -m benchmarks.suites.probes --device cuda --seconds 5 --out "$OUT" ;;
        jobs) step jobs "$seconds" "$PYTHON" -m benchmarks.suites.jobs --device cuda --dtype bfloat16 --batch 64 --out "$OUT" ;;
        sweep) step sweep "$seconds" "$PYTHON" -m benchmarks.suites.sweep --limit $((seconds - 10)) --out "$OUT" ;;
        *) echo "STEPS: expected tests, benchmarks, words, windows, probes, jobs or sweep, each with :SECONDS; got $timed" >&2; exit 2 ;;
    esac
done
exit "$status"
