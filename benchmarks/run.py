"""Runs every benchmark on this machine and stores the result: one JSON file named by hardware and versions.

    python -m benchmarks.run                      into benchmarks/results, minutes
    python -m benchmarks.run --quick --out DIR    tiny shapes: does it run?

A row is one contestant on one shape: milliseconds (of the op: one call; of models: one batch), the ratio of its median
to that of the floor (`sdpa`, `plain`) that ran between its rounds, peak megabytes (10^6 bytes) above inputs or loaded
model, and its largest error: of the op the difference from float64, of models the difference from the rollout of whole
fp32 matrices as a share of its largest entry. What fails its check is not timed; it is named under "failed".
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks import memory, models

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("op", "models")
PACKAGES = ("torch", "triton", "timm", "transformers", "pytest-benchmark", "numpy")


def run(out: Path, device: str, quick: bool = False, limit: float | None = None, keyword: str | None = None) -> bool:
    """Runs the suites and stores their results in a file in `out`; whether everything passed.

    The file is named by hardware and versions, with -quick or -part at the end where it is not the whole.

    Args:
        out: a folder; made if it isn't there.
        device: "cpu" or "cuda".
        quick: tiny shapes and models.
        limit: seconds for each of the two suites; what it has measured by then is kept.
        keyword: pytest's -k.
    """
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for suite in SUITES:
        found, missing = run_suite(suite, device, quick, limit, keyword)
        rows += found
        failed += missing
    if device == "cpu":
        failed += add_memory([row for row in rows if row["suite"] == "models"], quick)
    result = {**environment(device), "quick": quick, "failed": failed, "rows": rows}
    part = "-quick" if quick else "-part" if keyword else ""
    path = out / f"{file_stem(device)}{part}.json"
    write_atomically(path, json.dumps(result, indent=1))
    print("\n".join(table(rows)))
    print(f"\n{path.name}: {len(rows)} rows" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return not failed


def run_suite(
    suite: str, device: str, quick: bool, limit: float | None, keyword: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one pytest-benchmark suite, and what failed in it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", f"benchmarks/test_{suite}.py", "--device", device]
        command += ["-p", "no:cacheprovider", "-o", "timeout=0", "-rfE", "--tb=short", f"--benchmark-json={report}"]
        command += ["--benchmark-columns=median,iqr,rounds", "--benchmark-warmup=off", *(["--quick"] if quick else [])]
        command += ["-k", keyword] if keyword else []
        print(f"== {suite}", flush=True)
        code, output = _run_until(command, limit)
        # 5: the keyword chose nothing here.
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if code not in (0, 5) and not failed:
            failed = [f"{suite}: pytest exited with {code}"]
        benchmarks = json.loads(report.read_text())["benchmarks"] if report.is_file() and report.stat().st_size else []
    # A test that was interrupted has no ratio yet.
    return [_row(suite, b) for b in benchmarks if "ratio_to_floor" in b["extra_info"]], failed


def add_memory(rows: list[dict[str, Any]], quick: bool) -> list[str]:
    """Sets peak_mb of model rows (if quick, of one), each measured by a process of its own; what failed."""
    failed = []
    for row in rows:
        model, contestant = row["shape"].split()[0], row["contestant"]
        if quick and (model != models.QUICK[0] or contestant != "attnx"):
            continue
        print(f"== memory: {contestant} on {model}", flush=True)
        try:
            row["peak_mb"] = memory.in_own_process(contestant, model, "cpu")["peak_mb"]
        except subprocess.CalledProcessError as error:
            failed.append(f"memory: {contestant} on {model} exited with {error.returncode}")
    return failed


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on: hardware, versions, commit, date. No path and no host name."""
    return {
        "hardware": hardware(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def file_stem(device: str) -> str:
    """Such as "nvidia-h200-torch2.11.0-triton3.6.0" or "amd-epyc-7543-8-threads-torch2.11.0-triton3.6.0"."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-")
    threads = f"-{torch.get_num_threads()}-threads" if device == "cpu" else ""
    have = {package: (found or "none").partition("+")[0] for package, found in _versions().items()}
    return f"{name}{threads}-torch{have['torch']}-triton{have['triton']}"


def hardware(device: str) -> str:
    """The name of the GPU, or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit, "-dirty" added where tracked files differ; ATTNX_COMMIT where there is no git; else None."""
    if "ATTNX_COMMIT" in os.environ:
        return os.environ["ATTNX_COMMIT"]
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "-dirty" * bool(changes)


def write_atomically(path: Path, text: str) -> None:
    """The whole text under the name, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(text + "\n")
    os.replace(part, path)


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


def _row(suite: str, benchmark: dict[str, Any]) -> dict[str, Any]:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    times = {f"{name}_ms": 1e3 * stats[name] for name in ("median", "min", "max", "iqr")}
    row = {
        "suite": suite,
        **{key: info[key] for key in ("shape", "dtype", "contestant", "timing")},
        **times,
        "rounds": stats["rounds"],
        **{key: info[key] for key in ("floor_ms", "ratio_to_floor", "peak_mb", "max_error")},
    }
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def _run_until(command: list[str], limit: float | None) -> tuple[int, str]:
    """Exit code and output of a command, shown as it comes; interrupted at the limit as by Ctrl-C, so that it saves."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    with process, _interrupted_after(process, limit):
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(lines)


@contextmanager
def _interrupted_after(process: subprocess.Popen, limit: float | None) -> Iterator[None]:
    """Interrupts the process after `limit` seconds, and kills it if it is still there 30 seconds later."""
    timers = []
    if limit is not None:
        timers = [Timer(limit, process.send_signal, [signal.SIGINT]), Timer(limit + 30, process.kill)]
    for timer in timers:
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 if anything failed; what passed is stored all the same."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, help="seconds for each suite; what is measured by then is kept")
    parser.add_argument("-k", dest="keyword", help="only what pytest's -k chooses")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    return 0 if run(options.out, options.device, options.quick, options.limit, options.keyword) else 1


if __name__ == "__main__":
    sys.exit(main())
