"""A sweep of block sizes, to choose the defaults in `attnx.kernels.configs`.

    python -m benchmarks.suites.sweep                   time every candidate on the GPU
    python -m benchmarks.suites.sweep --compile-only    registers, spills and shared memory on sm_90, without a GPU

Candidates are compiled in several processes first. One that doesn't compile, spills more than `SPILLS` bytes, or asks
for too much shared memory is recorded and not timed. The others must agree with the default before they are timed by
`triton.testing.do_bench`, which clears the L2 cache before each call. Head dim 64 comes first; candidates beyond the
time limit are recorded as such.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from attnx.kernels.configs import Target
from attnx.kernels.inspect import offline
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.report.sweeps import sweep_section
from benchmarks.suites.problems import PROBLEMS, Candidate, Problem, build, candidates, default
from benchmarks.timing import first_line

SPILLS = 64  # bytes per thread
ENOUGH = 60  # seconds: with less left, no further head dim is started
NO_TIME = "no time left"


def compile_one(problem: Problem, candidate: Candidate, target: Target) -> dict[str, Any]:
    """Registers, spilled bytes and shared bytes of a candidate, or {"error": message}."""
    try:
        found = offline.resources(problem.kernel, build(problem, candidate, target, "meta").launch, target)
    except FileNotFoundError:  # it compiles, but cuobjdump is missing
        return {}
    except Exception as error:  # the compiler's errors have no common base class
        return {"error": _message(error)}
    result: dict[str, Any] = {"registers": found.registers, "spills": found.spills, "shared": found.shared}
    if found.shared > offline.SHARED_LIMIT.get(target.arch, 227 << 10):
        result["error"] = f"asks for {found.shared} bytes of shared memory"
    return result


def compile_all(target: Target, problems: tuple[Problem, ...], jobs: int) -> list[dict[str, Any]]:
    """A row for every candidate of every problem, the default first."""
    rows = [row for problem in problems for row in untried(problem, target)]
    tasks = [(_problem(row), Candidate(*row["config"]), target) for row in rows]
    found = offline.in_processes(compile_one, tasks, jobs)
    return [
        row | ({"error": _message(result)} if isinstance(result, BaseException) else result)
        for row, result in zip(rows, found, strict=True)
    ]


def time_all(rows: list[dict[str, Any]], target: Target, end: float) -> None:
    """Add ms and the ratio to the default to every row that compiled, until `end` on the monotonic clock."""
    groups = {problem: list(group) for problem, group in itertools.groupby(rows, _problem)}
    first: dict[Problem, tuple[dict[str, Tensor], float]] = {}
    # One candidate of every problem in turn, so that a time limit affects all problems equally.
    for row in (row for turn in itertools.zip_longest(*groups.values()) for row in turn if row is not None):
        problem = _problem(row)
        if time.monotonic() > end:
            row.setdefault("error", NO_TIME)
        if "error" in row or (row.get("spills", 0) > SPILLS and not row["default"]):
            continue
        try:
            results, ms = _time(problem, Candidate(*row["config"]), target)
            reference, base = first.setdefault(problem, (results, ms))
            _compare(results, reference)
        except Exception as error:  # a candidate that fails is recorded
            row["error"] = _message(error)
            continue
        row["ms"], row["ratio"] = round(ms, 5), round(ms / base, 3)


def _time(problem: Problem, candidate: Candidate, target: Target) -> tuple[dict[str, Tensor], float]:
    built = build(problem, candidate, target, "cuda")
    built.launch.run()
    torch.cuda.synchronize()
    kept = {name: result.clone() for name, result in built.results.items()}
    return kept, triton.testing.do_bench(built.launch.run, warmup=10, rep=50, return_mode="median")


def _compare(results: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Raise AssertionError unless all results are close to the reference and have no NaN."""
    for name, result in results.items():
        tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            result, reference[name], rtol=tolerance, atol=tolerance / 10, msg=lambda m, name=name: f"{name}: {m}"
        )


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(*(row[name] for name in Problem._fields))


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def sweep(problems: tuple[Problem, ...], target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """Compile and, on a GPU, time one head dim after the other. The content of the stored file."""
    start = time.monotonic()
    stem = f"sm_{target.arch}-triton{triton.__version__}" if options.compile_only else file_stem("cuda")
    file = ResultFile(options.out, f"sweep-{stem}", options.quick)
    about = environment("cpu" if options.compile_only else "cuda")
    about |= {"target": f"sm_{target.arch}", "compiled_only": options.compile_only, "quick": options.quick}
    rows: list[dict[str, Any]] = []
    dims = list(dict.fromkeys(problem.D for problem in problems))
    for i, head_dim in enumerate(dims):
        left = options.limit - (time.monotonic() - start)
        chosen = tuple(problem for problem in problems if head_dim == problem.D)
        if left < ENOUGH and i > 0:
            rows += [row | {"error": NO_TIME} for problem in chosen for row in untried(problem, target)]
        else:
            found = compile_all(target, chosen, options.jobs)
            if not options.compile_only:
                time_all(found, target, start + options.limit * (i + 2) / (len(dims) + 1))
            rows += found
        file.save({**about, "rows": rows})
    if not any(row.get("error") == NO_TIME for row in rows):
        file.finish()
    return {**about, "rows": rows}


def untried(problem: Problem, target: Target) -> Iterator[dict[str, Any]]:
    """A row without results for every candidate."""
    first = default(problem, target)
    for config in candidates(problem, target):
        yield {**problem._asdict(), "config": list(config), "default": config == first}


def _gpu() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)


def main(argv: list[str] | None = None) -> int:
    """Print a table and store the result. Exit with 1 if a default doesn't compile or run."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90, without a GPU")
    parser.add_argument("--limit", type=float, default=300, help="seconds")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--quick", action="store_true", help="one problem only")
    options = parser.parse_args(argv)
    if not options.compile_only and not torch.cuda.is_available():
        parser.error("no CUDA device; --compile-only needs none")
    target = Target("cuda", 90) if options.compile_only else _gpu()
    found = sweep(PROBLEMS[:1] if options.quick else PROBLEMS, target, options)
    print("\n".join(sweep_section({"sweep": found})))
    return 1 if any(row["default"] and row.get("error", NO_TIME) != NO_TIME for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
