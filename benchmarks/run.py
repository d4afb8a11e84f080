"""Runs every benchmark on this machine and stores the result: one JSON file named by hardware and versions.

    python -m benchmarks.run                      into benchmarks/results, minutes
    python -m benchmarks.run --quick --out DIR    tiny shapes: does it run?
    python -m benchmarks.run --mkl-as-on-intel    on other makers' CPUs, with the faster of torch's own products

A row is one contestant on one shape: milliseconds (of the op: one call; of models: one batch), the ratio of its median
to that of the floor (`sdpa`, `plain`) that ran between its rounds, peak megabytes (10^6 bytes) above inputs or loaded
model (of models on a CPU also those that are needed, see `memory`), and its largest error: of the op the difference
from float64, of models the difference from the rollout of float64 weights as a share of its largest entry. What fails
its check is not timed; it is named under "failed". What can't be measured here is named under "not_run" with its
reason, and what the time was too short for under "cut".

Only a whole run is stored under its final name: while it lasts, and if it was cut or something failed, it is NAME-part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

import torch

from benchmarks import mkl, record
from benchmarks.machine import ROOT, environment, file_stem, part_of, write_atomically
from benchmarks.report import targets
from benchmarks.suites import growth, memory

SUITES = {"op": 0.6, "models": 1.0}  # and the share of the time that is left which each may take
GRACE = 15  # seconds from an interrupt to a kill


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGINT, during a suite; `found`: what the suite had found by then."""

    def __init__(self, found: record.Found) -> None:
        super().__init__()
        self.found = found


def run(out: Path, device: str, quick: bool = False, limit: float | None = None, keyword: str | None = None) -> bool:
    """Runs the suites and stores their results in a file in `out`; whether everything was measured or can't be here.

    Args:
        out: a folder; made if it isn't there.
        device: "cpu" or "cuda".
        quick: tiny shapes and models.
        limit: seconds for both suites; what they have measured by then is kept.
        keyword: pytest's -k.

    Raises:
        KeyboardInterrupt: once what there is so far is stored.
    """
    start = time.monotonic()
    result: dict[str, Any] = {**environment(device), "quick": quick}
    all_found = record.Found([], {}, {}, [])
    whole = out / f"{file_stem(device)}{'-quick' if quick else ''}.json"
    part = part_of(whole)
    for suite, share in SUITES.items():
        left = None if limit is None else share * (limit - (time.monotonic() - start))
        try:
            found = run_suite(suite, device, quick, left, keyword)
        except Interrupted as interrupt:
            _merge(all_found, interrupt.found, suite)
            _store(part, result, all_found, done=False)
            raise
        _merge(all_found, found, suite)
        _store(part, result, all_found, done=False)
        if device == "cpu" and suite == "models":
            _merge(all_found, record.Found([], {}, add_memory(found.rows, quick), []), suite)
            _store(part, result, all_found, done=False)
            if keyword is None and not quick:
                result["growth"] = list(growth.measure())
    _store(part, result, all_found, done=True)
    passed = not all_found.failed and not all_found.cut
    path = part.replace(whole) if passed and keyword is None else part
    print("\n".join(table(all_found.rows)))
    print("\n".join(f"not run: {name}: {reason}" for name, reason in all_found.not_run.items()))
    for what in ("failed", "cut"):
        if names := list(getattr(all_found, what)):
            print(f"{what.upper()}: {'; '.join(names)}")
    print(f"\n{path.name}: {len(all_found.rows)} rows")
    return passed


def run_suite(suite: str, device: str, quick: bool, limit: float | None, keyword: str | None) -> record.Found:
    """What one pytest-benchmark suite found; if it didn't come to its end, why, among what failed.

    Raises:
        Interrupted: by Ctrl-C, with what was found.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "found.jsonl"
        command = [sys.executable, "-m", "pytest", f"benchmarks/test_{suite}.py", "--device", device]
        command += ["-p", "no:cacheprovider", "-o", "timeout=0", "-rfE", "--tb=short", f"--record={lines}"]
        command += ["--benchmark-columns=median,iqr,rounds", "--benchmark-warmup=off", *(["--quick"] if quick else [])]
        command += ["-k", keyword] if keyword else []
        print(f"== {suite}", flush=True)
        try:
            code, in_time = _run_until(command, limit)
        except KeyboardInterrupt:
            raise Interrupted(record.read(lines)) from None
        found = record.read(lines)
    if not in_time and not any(found):
        found.cut.append(f"all tests: stopped after {limit:.0f} s")
    # 1: tests failed, and are named; 5: the keyword chose nothing here.
    if in_time and (code not in (0, 1, 5) or (code == 1 and not found.failed)):
        found.failed[f"{suite} suite"] = f"pytest exited with {code}"
    return found


def add_memory(rows: list[dict[str, Any]], quick: bool) -> dict[str, str]:
    """Sets peak_mb and needed_mb of model rows (if quick, of one); what failed, and why.

    The one is the median of three processes or, where there is a target, of seven; the other is the same in all.
    """
    failed = {}
    for row in rows:
        (model, batch), contestant = row["shape"].split(" b"), row["contestant"]
        if quick and (model != "tiny" or contestant != "attnx"):
            continue
        print(f"== memory: {contestant} on {model}", flush=True)
        try:
            times = 7 if row["shape"] in targets.CPU_MODELS and contestant in ("plain", "extractor") else 3
            runs = [memory.in_own_process(contestant, model, int(batch), "cpu")["peak_mb"] for _ in range(times)]
            row["peak_mb"] = median(runs)
            if memory.GIVES_BACK:
                row["needed_mb"] = memory.in_own_process(contestant, model, int(batch), "cpu", needed=True)["peak_mb"]
        except subprocess.CalledProcessError as error:
            failed[f"memory of {contestant} on {model}"] = f"exited with {error.returncode}"
    return failed


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines: a row each, blank ones between shapes."""
    yield f"{'contestant':18} {'median ms':>10} {'iqr':>8} {'/ floor':>8} {'peak MB':>9} {'error':>8}"
    shape = ""
    for row in rows:
        if (here := f"{row['suite']} {row['shape']} {row['dtype']}") != shape:
            shape = here
            yield f"\n{shape}"
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}"
        error = "" if row["max_error"] is None else f"{row['max_error']:.0e}"
        mark = "" if row["timing"] != "stream" else "  with launches"
        times = f"{row['median_ms']:10.3f} {row['iqr_ms']:8.3f} {row['ratio_to_floor']:8.2f}"
        yield f"{row['contestant']:18} {times} {peak:>9} {error:>8}{mark}"


def _merge(into: record.Found, found: record.Found, suite: str) -> None:
    into.rows.extend(found.rows)
    into.not_run.update(found.not_run)
    into.failed.update({f"{suite}: {name}": reason for name, reason in found.failed.items()})
    into.cut.extend(f"{suite}: {name}" for name in found.cut)


def _store(path: Path, result: dict[str, Any], found: record.Found, done: bool) -> None:
    write_atomically(path, json.dumps({**result, "done": done, **found._asdict()}, indent=1))


def _run_until(command: list[str], limit: float | None) -> tuple[int, bool]:
    """A command's exit code, and whether it ended by itself; interrupted at the limit as by Ctrl-C, later killed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    with process, _interrupted_after(process, limit) as interrupted:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
    return code, not interrupted


def _end(process: subprocess.Popen) -> None:
    """Waits until it has ended. Ctrl-C reaches it, too; a signal to this process alone doesn't, and is passed on."""
    # `timeout` sends its signal to a command and then to its group: the second must not end the wait.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for seconds, then in ((1, lambda: process.send_signal(signal.SIGINT)), (GRACE, process.kill)):
            try:
                process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                then()
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupted_after(process: subprocess.Popen, limit: float | None) -> Iterator[list[bool]]:
    """Interrupts the process after `limit` seconds, and kills it if it is still there some seconds later."""
    interrupted: list[bool] = []

    def interrupt() -> None:
        interrupted.append(True)
        process.send_signal(signal.SIGINT)

    timers = []
    if limit is not None:
        timers = [Timer(max(0.0, limit), interrupt), Timer(max(0.0, limit) + GRACE, process.kill)]
    for timer in timers:
        timer.start()
    try:
        yield interrupted
    finally:
        for timer in timers:
            timer.cancel()


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 if anything failed or was cut, with 130 if interrupted; what passed is stored all the same."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, help="seconds for both suites; what is measured by then is kept")
    parser.add_argument("--mkl-as-on-intel", action="store_true", help="see benchmarks/mkl.py")
    parser.add_argument("-k", dest="keyword", help="only what pytest's -k chooses")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    try:
        with mkl.as_on_intel() if options.mkl_as_on_intel else nullcontext():
            return 0 if run(options.out, options.device, options.quick, options.limit, options.keyword) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
