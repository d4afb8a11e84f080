#!/usr/bin/env bash
# Everything a CUDA machine can say, in less than ten minutes and six files: the op's tests, the benchmarks, the sweep.
# Nothing needs installing. A step that fails does not stop the next; the exit code is that of the last one that did.
set -u
cd "$(dirname "$0")/.."
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
    timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "== $name: exit $code after ${SECONDS} s"
    tail -n "${LINES_SHOWN:-40}" "$OUT/$name.log"
    ((code == 0)) || status=$code
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee "$OUT/gpu.txt"
((PIPESTATUS[0] == 0)) || status=1

# Most of the tests' time is compilation: where pytest-xdist is there, in parallel.
parallel=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
step tests 140 "$PYTHON" -m pytest tests/test_ops.py tests/test_ops_contract.py tests/test_gradient.py tests/test_capture.py -m "gpu or not gpu" \
    -p no:cacheprovider $parallel
step benchmarks 280 "$PYTHON" -m benchmarks.run --device cuda --limit 120 --out "$OUT"
step sweep 150 "$PYTHON" -m benchmarks.sweep --seconds 60 --out "$OUT"
exit "$status"
