"""Block sizes tried out: what `attnx.kernels.configs` should say, on the GPU at hand.

    python -m benchmarks.suites.sweep                             times every candidate beside the default
    python -m benchmarks.suites.sweep --compile-only --arch 90    no GPU: registers, spills, shared memory

Every candidate is first compiled by itself, several at a time, and its resources read. One that doesn't compile, spills
more than a few registers, or asks for more shared memory than there is, is recorded and left out. The others must give
what the default gives, then they are timed (`triton.testing.do_bench`, the L2 cache cleared before each call). Head dim
64 comes first; what there was no time for is recorded as such.
"""

import argparse
import itertools
import json
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
from benchmarks.machine import ROOT, environment, file_stem, part_of, write_atomically
from benchmarks.report.table import configuration
from benchmarks.suites.problems import BATCH, HEADS, KERNELS, PROBLEMS, Candidate, Problem, build, candidates, default

__all__ = ["BATCH", "HEADS", "SPILLS", "Candidate", "Problem", "build", "candidates", "default", "main"]

SPILLS = 64  # bytes a thread; who spills more is not timed
ENOUGH = 60  # seconds: with less, no head dim is begun
NO_TIME = "no time left"


def compile_one(problem: Problem, candidate: Candidate, target: Target) -> dict[str, Any]:
    """Registers, spilled bytes and shared bytes of a candidate, or under "error" why it does not compile."""
    try:
        found = offline.resources(problem.kernel, build(problem, candidate, target, "meta").launch, target)
    except FileNotFoundError:  # it compiles, but there is no tool that reads machine code
        return {}
    except Exception as error:  # the compiler's errors have no common class
        return {"error": _first_line(error)}
    result: dict[str, Any] = {"registers": found.registers, "spills": found.spills, "shared": found.shared}
    if found.shared > offline.SHARED_LIMIT.get(target.arch, 227 << 10):
        result["error"] = f"asks for {found.shared} bytes of shared memory"
    return result


def compile_all(target: Target, problems: tuple[Problem, ...], jobs: int) -> list[dict[str, Any]]:
    """A row for every candidate of every problem, the default first."""
    rows = [row for problem in problems for row in untried(problem, target)]
    # N is no constant of a kernel: the same machine code serves every length.
    codes: dict[tuple[Any, ...], Problem] = {}
    for row in rows:
        codes[_code(row)] = max(_problem(row), codes.get(_code(row), _problem(row)), key=lambda problem: problem.N)
    tasks = [(problem, Candidate(*code[2:]), target) for code, problem in codes.items()]
    found = offline.in_processes(compile_one, tasks, jobs)
    by_code = {
        code: {"error": _first_line(result)} if isinstance(result, BaseException) else result
        for code, result in zip(codes, found, strict=True)
    }
    return [row | by_code[_code(row)] for row in rows]


def time_all(rows: list[dict[str, Any]], target: Target, end: float) -> None:
    """Adds ms and ratio to the default (or to the first that runs) to every row that compiled, until `end` of the
    monotonic clock."""
    groups = {problem: list(group) for problem, group in itertools.groupby(rows, _problem)}
    first: dict[Problem, tuple[dict[str, Tensor], float]] = {}
    # One candidate of every problem at a time, so that whatever time there is serves all of them.
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
        except Exception as error:  # what doesn't run is a result, too
            row["error"] = _first_line(error)
            continue
        row["ms"], row["ratio"] = round(ms, 5), round(ms / base, 3)


def _time(problem: Problem, candidate: Candidate, target: Target) -> tuple[dict[str, Tensor], float]:
    built = build(problem, candidate, target, "cuda")
    built.run()
    torch.cuda.synchronize()
    kept = {name: result.clone() for name, result in built.results.items()}
    return kept, triton.testing.do_bench(built.run, warmup=10, rep=50, return_mode="median")


def _compare(results: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Raises AssertionError unless all is written and near what the reference wrote."""
    for name, result in results.items():
        tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            result, reference[name], rtol=tolerance, atol=tolerance / 10, msg=lambda m, name=name: f"{name}: {m}"
        )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines: every problem's candidates, the fastest (or without times the leanest) first."""

    def order(row: dict[str, Any]) -> tuple[float, ...]:
        return (row.get("ms", 1e9), "error" in row, row.get("spills", 1 << 30), row.get("registers", 1 << 30))

    yield f"{'blocks warps stages ...':>38} {'ms':>9} {'ratio':>6} {'regs':>5} {'spills':>7} {'shared':>7}"
    for problem, group in itertools.groupby(rows, _problem):
        yield f"\n{problem}"
        for row in sorted(group, key=order):
            config = configuration(row["config"])
            cells = [row.get(name, "") for name in ("ms", "ratio", "registers", "spills", "shared")]
            line = f"{config:>38} {cells[0]:>9} {cells[1]:>6} {cells[2]:>5} {cells[3]:>7} {cells[4]:>7}"
            yield line + "  default" * row["default"] + f"  {row.get('error', '')}"


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(*(row[name] for name in Problem._fields))


def _code(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["D"], *row["config"]


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def sweep(problems: tuple[Problem, ...], target: Target, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles and, on a GPU, times one head dim after the other; stored as NAME-part unless all is done."""
    start = time.monotonic()
    whole = file_of(target, options)
    part = part_of(whole)
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
        store(rows, target, part, options)
    if not any(row.get("error") == NO_TIME for row in rows):
        part.replace(whole)
    return rows


def untried(problem: Problem, target: Target) -> Iterator[dict[str, Any]]:
    """A row for every candidate, as yet without results."""
    first = default(problem, target)
    for config in candidates(problem, target):
        yield {**problem._asdict(), "config": list(config), "default": config == first}


def file_of(target: Target, options: argparse.Namespace) -> Path:
    """sweep-NAME.json, named by the target if nothing runs, else by the GPU, as `benchmarks.run` does."""
    stem = f"sm_{target.arch}-triton{triton.__version__}" if options.compile_only else file_stem("cuda")
    return options.out / f"sweep-{stem}{'-quick' if options.quick else ''}.json"


def store(rows: list[dict[str, Any]], target: Target, path: Path, options: argparse.Namespace) -> None:
    """Writes the rows and where they come from."""
    about = environment("cpu" if options.compile_only else "cuda")
    about |= {"target": f"sm_{target.arch}", "compiled_only": options.compile_only, "quick": options.quick}
    result = {**about, "rows": rows}
    write_atomically(path, json.dumps(result, indent=1))


def _gpu() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)


def main(argv: list[str] | None = None) -> int:
    """Prints a table and stores it as JSON. Exits with 1 where a default doesn't compile, or doesn't run."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument(
        "--arch", choices=["80", "90", "100"], default="90", help="to compile for; else the GPU at hand"
    )
    parser.add_argument("--kernel", choices=KERNELS, help="only this one")
    parser.add_argument("--head-dim", type=int, choices=[64, 128], help="only this one")
    parser.add_argument("--limit", type=float, default=300, help="seconds, after which nothing more is timed")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--quick", action="store_true", help="one problem only: does it run?")
    options = parser.parse_args(argv)
    if not options.compile_only and not torch.cuda.is_available():
        parser.error("no CUDA device; --compile-only needs none")
    problems = tuple(p for p in PROBLEMS if options.kernel in (None, p.kernel) and options.head_dim in (None, p.D))
    if options.compile_only:  # the lengths share their machine code
        problems = tuple({(p.kernel, p.N if p.kernel == "one_pass" else 0, p.B, p.D): p for p in problems}.values())
    target = Target("cuda", int(options.arch)) if options.compile_only else _gpu()
    rows = sweep(problems[:1] if options.quick else problems, target, options)
    print("\n".join(table(rows)))
    return 1 if any(row["default"] and row.get("error", NO_TIME) != NO_TIME for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
