"""Run all benchmarks on this machine and store the result in a JSON file named by hardware and versions.

    python -m benchmarks.run                      into benchmarks/results, some minutes
    python -m benchmarks.run --quick --out DIR    tiny shapes, to check that everything runs
    python -m benchmarks.run --mkl-as-on-intel    on other makers' CPUs, with MKL's faster code path

A row is one contestant on one shape: milliseconds (of the op per call, of models per batch), the ratio to the median of
the floor (`sdpa`, `plain`) that ran between its rounds, peak megabytes (10^6 bytes) above the inputs or the loaded
model, and the largest error. The error of the op is the difference from float64; that of models is the difference from
the rollout of float64 weights, as a share of its largest entry. A contestant that fails its check is not timed and is
listed under "failed". What can't be measured is listed under "not_run" with a reason, tests without time under "cut".

A result is stored as NAME-part until the run is complete. It keeps that name if something failed or was cut.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import mkl, record
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.report import page, stored
from benchmarks.suites import growth, memory

SUITES = {"op": 0.6, "models": 1.0}  # {suite: share of the remaining time}


def run(out: Path, device: str, quick: bool = False, limit: float | None = None) -> bool:
    """Run the suites and store their results in `out`. True unless a test failed or was cut.

    Args:
        out: a folder; it is created if necessary.
        device: "cpu" or "cuda".
        quick: use tiny shapes and models.
        limit: seconds for both suites; results up to then are kept.

    Raises:
        KeyboardInterrupt: after the results so far are stored.
    """
    start = time.monotonic()
    about: dict[str, Any] = {**environment(device), "quick": quick}
    found = record.Found([], {}, {}, [])
    file = ResultFile(out, file_stem(device), quick)
    done = False
    try:
        for suite, share in SUITES.items():
            left = None if limit is None else share * (limit - (time.monotonic() - start))
            run_suite(suite, device, quick, left, found)
            file.save({**about, "done": False, **found._asdict()})
        if device == "cpu":
            add_memory(found, quick)
            if not quick and memory.MEASURABLE:
                about["growth"] = list(growth.measure())
        done = True
    finally:
        file.save({**about, "done": done, **found._asdict()})
    passed = not found.failed and not found.cut
    path = file.finish() if passed else file.part
    rows = stored.Run(path.name, about, [stored.read_row(row) for row in found.rows])
    for suite in SUITES:
        print("\n".join(page.all_rows(rows.groups(suite))), end="\n\n")
    print("\n".join(page.left_out(found._asdict())))
    print(f"\n{path.name}: {len(found.rows)} rows")
    return passed


def run_suite(suite: str, device: str, quick: bool, limit: float | None, into: record.Found) -> None:
    """Run one pytest-benchmark suite and add its findings to `into`, even if it is interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "found.jsonl"
        command = [sys.executable, "-m", "pytest", f"benchmarks/suites/test_{suite}.py", "--device", device]
        command += ["-p", "no:cacheprovider", "-o", "timeout=0", "-rfE", "--tb=short", f"--record={lines}"]
        command += ["--benchmark-columns=median,iqr,rounds", "--benchmark-warmup=off", *(["--quick"] if quick else [])]
        print(f"== {suite}", flush=True)
        try:
            code = _run_until(command, limit)
        finally:
            found = record.read(lines)
            into.add(found, suite)
    if code is None and not any(found):
        into.cut.append(f"{suite}: all tests: stopped after {limit:.0f} s")
    # Exit code 1 means failed tests, which are in the record. If none are, pytest itself failed.
    if code not in (None, 0, 1) or (code == 1 and not found.failed):
        into.failed[f"{suite}: {suite} suite"] = f"pytest exited with {code}"


def add_memory(found: record.Found, quick: bool) -> None:
    """Set peak_mb and needed_mb of the model rows (if quick, of one), and record failures.

    peak_mb is the median of three processes. needed_mb does not vary.
    """
    if not memory.MEASURABLE:
        return
    for row in found.rows:
        if row["suite"] != "models":
            continue
        (model, batch), contestant = row["shape"].split(" b"), row["contestant"]
        if quick and (model != "tiny" or contestant != "attnx"):
            continue
        print(f"== memory: {contestant} on {model}", flush=True)
        try:
            runs = [memory.in_own_process(contestant, model, int(batch), "cpu")["peak_mb"] for _ in range(3)]
            row["peak_mb"] = median(runs)
            if memory.GIVES_BACK:
                row["needed_mb"] = memory.in_own_process(contestant, model, int(batch), "cpu", needed=True)["peak_mb"]
        except subprocess.CalledProcessError as error:
            found.failed[f"models: memory of {contestant} on {model}"] = f"exited with {error.returncode}"


def _run_until(command: list[str], limit: float | None) -> int | None:
    """The exit code of a command; None if it was killed at the limit (in seconds)."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=ROOT, env=env, timeout=limit and max(0.0, limit)).returncode
    return None


def _interrupt_once(*_: Any) -> None:
    """A handler of SIGINT: only the first interrupts, because `timeout` sends two and the result must be stored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Exit with 1 if a test failed or was cut, with 130 if interrupted; the results so far are stored."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, help="seconds for both suites; results up to then are kept")
    parser.add_argument("--mkl-as-on-intel", action="store_true", help="see benchmarks/mkl.py")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    before = signal.signal(signal.SIGINT, _interrupt_once)
    try:
        with mkl.as_on_intel() if options.mkl_as_on_intel else nullcontext():
            return 0 if run(options.out, options.device, options.quick, options.limit) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
