"""A sweep of block sizes, to choose the defaults in `attnx.kernels.configs`.

    python -m benchmarks.suites.sweep                   time every candidate on the GPU
    python -m benchmarks.suites.sweep --head-dim 128    with head dim 128 instead of 64
    python -m benchmarks.suites.sweep --compile-only    registers, spills and shared memory on sm_90, without a GPU

Candidates are compiled in several processes first. One that doesn't compile, spills more than `SPILLS` bytes, or needs
too much shared memory is recorded and not timed. The others must agree with the default before they are timed by
`triton.testing.do_bench`, which clears the L2 cache before each call. Candidates beyond the time limit are recorded as
such.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnx.kernels import configs
from attnx.kernels.arguments import shared_args, value_args
from attnx.kernels.configs import Config, Launch, ShortRows, Target
from attnx.kernels.forward import forward_launch
from attnx.kernels.inspect import offline
from attnx.kernels.map import map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.vecmat import vecmat_launch
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.report.sweeps import sweep_section
from benchmarks.timing import first_line

SPILLS = 64  # bytes per thread
NO_TIME = "no time left"
HEADS = 12
BATCH = {197: 64, 257: 64, 1370: 4, 4097: 1}  # {N: batch size}, large enough that the heads are not split
# (keys in a tile, tiles, tail) of the one-pass kernel.
LAYOUTS = {
    197: ((256, 1, 0), (128, 2, 0), (64, 3, 16), (64, 4, 0)),
    257: ((128, 2, 16), (64, 4, 16), (256, 1, 16)),
}


class Problem(NamedTuple):
    """A kernel ("one_pass", "forward", "map" or "vecmat") on N tokens with head dim D."""

    kernel: str
    N: int
    D: int


# (kernel, N), the most important first.
PROBLEMS = (("one_pass", 197), ("map", 1370), ("forward", 1370), ("one_pass", 257), ("vecmat", 4097))


class Candidate(NamedTuple):
    """A configuration of any kernel. tail and lag apply to the one-pass kernel only."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    tail: int = 0
    lag: int = 0


def default(problem: Problem, target: Target) -> Candidate | None:
    """The backend's configuration; None if it does not use this kernel."""
    kernel, n, d = problem
    itemsize = torch.bfloat16.itemsize
    if kernel == "one_pass":
        short = configs.one_pass_config(d, itemsize, n, target)
        return short and Candidate(*short.config[:4], short.parts, short.tail, int(short.delay_pv))
    if kernel == "forward":
        return Candidate(*configs.forward_config(d, itemsize, n, BATCH[n] * HEADS, target))
    config = configs.map_config if kernel == "map" else configs.vecmat_config
    return Candidate(*config(d, itemsize, n, target))


def candidates(problem: Problem, target: Target) -> list[Candidate]:
    """The default, if there is one, then all other candidates."""
    first = default(problem, target)
    return list(dict.fromkeys([*([first] if first else []), *_others(problem)]))


def _others(problem: Problem) -> Iterator[Candidate]:
    if problem.kernel == "one_pass":
        rows = (32, 64) if problem.D == 64 else (16, 32)
        for block_m, layout, warps, stages in itertools.product(rows, LAYOUTS[problem.N], (4, 8), (1, 2)):
            block_n, parts, tail = layout
            yield Candidate(block_m, block_n, warps, stages, parts, tail, 1)
        return
    for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield Candidate(*sizes)
    if problem.kernel == "map":
        yield from (Candidate(rows, 64, 4, stages, 2) for rows in (64, 128) for stages in (2, 3))


def build(problem: Problem, candidate: Candidate, target: Target, device: str) -> tuple[Launch, dict[str, Tensor]]:
    """The launch of a candidate and the tensors that it writes. On the "meta" device tensors have shapes only."""
    kernel, n, d = problem
    B, config = BATCH[n], Config(*candidate[:5])
    torch.manual_seed(0)
    qkv = torch.randn(B, n, 3, HEADS, d, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    # Results are NaN before the launch.
    out = torch.full((B, n, HEADS, d), torch.nan, dtype=q.dtype, device=device).transpose(1, 2)
    lse = torch.full((B, HEADS, n), torch.nan, device=device)
    maps = torch.full((B, n, n), torch.nan, device=device)
    shared, values = shared_args(q, k, None, None, d**-0.5, False), value_args(q, v, out)
    if kernel == "one_pass":
        short = ShortRows(config._replace(parts=1), d, candidate.parts, candidate.tail, bool(candidate.lag))
        return one_pass_launch(shared, values, maps, 0, 1, short), {"out": out, "map": maps}
    if kernel == "forward":
        grid = triton.cdiv(n, config.block_m) * B * HEADS
        launch = forward_launch(shared, values, lse, target)._replace(config=config, grid=(grid,))
        return launch, {"out": out, "lse": lse}
    if device != "meta":
        torch.logsumexp(q.float() @ k.float().transpose(-2, -1) * d**-0.5, -1, out=lse)
    if kernel == "map":
        return map_launch(shared, lse, maps, 0, 1, config), {"map": maps}
    r, result = torch.rand(B, n, device=device), torch.full((B, HEADS, n), torch.nan, device=device)
    grid = triton.cdiv(n, config.block_n) * B * HEADS
    launch = vecmat_launch(shared, r, lse, result, target)._replace(config=config, grid=(grid,))
    return launch, {"vector": result}


def compile_one(problem: Problem, candidate: Candidate, target: Target) -> dict[str, Any]:
    """Registers, spilled bytes and shared bytes of a candidate, and an error if they exceed the limit."""
    try:
        found = offline.resources(problem.kernel, build(problem, candidate, target, "meta")[0], target)
    except FileNotFoundError:  # it compiles, but cuobjdump is missing
        return {}
    result: dict[str, Any] = {"registers": found.registers, "spills": found.spills, "shared": found.shared}
    if found.shared > offline.SHARED_LIMIT.get(target.arch, 227 << 10):
        result["error"] = f"needs {found.shared} bytes of shared memory"
    return result


def compile_all(problems: list[Problem], target: Target, jobs: int) -> list[dict[str, Any]]:
    """A row for every candidate of every problem, the default first."""
    tasks = [(problem, candidate, target) for problem in problems for candidate in candidates(problem, target)]
    rows = []
    for (problem, candidate, _), found in zip(tasks, offline.in_processes(compile_one, tasks, jobs), strict=True):
        about = {"config": list(candidate), "default": candidate == default(problem, target)}
        result = {"error": _message(found)} if isinstance(found, BaseException) else found
        rows.append({**problem._asdict(), **about, **result})
    return rows


def time_all(rows: list[dict[str, Any]], target: Target, end: float) -> None:
    """Add ms to every row that compiled, until `end` on the monotonic clock."""
    groups = [list(group) for _, group in itertools.groupby(rows, _problem)]
    references: dict[Problem, dict[str, Tensor]] = {}  # results of the default, or if there is none of the first
    # One candidate of every problem in turn, so that a time limit affects all problems equally.
    for row in (row for turn in itertools.zip_longest(*groups) for row in turn if row is not None):
        problem = _problem(row)
        if time.monotonic() > end:
            row.setdefault("error", NO_TIME)
        if "error" in row or (row.get("spills", 0) > SPILLS and not row["default"]):
            continue
        try:
            launch, results = build(problem, Candidate(*row["config"]), target, "cuda")
            launch.run()
            torch.cuda.synchronize()
            _compare(results, references.setdefault(problem, results))
            row["ms"] = round(triton.testing.do_bench(launch.run, warmup=10, rep=50, return_mode="median"), 5)
        except Exception as error:  # a candidate that fails is recorded
            row["error"] = _message(error)


def _compare(results: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Raise AssertionError unless all results are close to the reference and have no NaN."""
    for name, result in results.items():
        tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result, reference[name], rtol=tolerance, atol=tolerance / 10)


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(*(row[name] for name in Problem._fields))


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def sweep(options: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Compile and, on a GPU, time every candidate. The content of the stored file."""
    end = time.monotonic() + options.limit
    problems = [Problem(*kernel, options.head_dim) for kernel in PROBLEMS[: 1 if options.quick else None]]
    stem = f"sm_{target.arch}-triton{triton.__version__}" if options.compile_only else file_stem("cuda")
    file = ResultFile(options.out, f"sweep-d{options.head_dim}-{stem}", options.quick)
    about = environment("cpu" if options.compile_only else "cuda")
    about |= {"target": f"sm_{target.arch}", "compiled_only": options.compile_only, "quick": options.quick}
    rows = compile_all(problems, target, options.jobs)
    try:
        if not options.compile_only:
            time_all(rows, target, end)
    finally:
        file.save({**about, "rows": rows})
    if not any(row.get("error") == NO_TIME for row in rows):
        file.finish()
    return {**about, "rows": rows}


def _gpu() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)


def main(argv: list[str] | None = None) -> int:
    """Print a table and store the result. Exit with 1 if a default doesn't compile or run."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90, without a GPU")
    parser.add_argument("--head-dim", type=int, choices=[64, 128], default=64)
    parser.add_argument("--limit", type=float, default=300, help="seconds")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--quick", action="store_true", help="one problem only")
    options = parser.parse_args(argv)
    if not options.compile_only and not torch.cuda.is_available():
        parser.error("no CUDA device; --compile-only needs none")
    found = sweep(options, Target("cuda", 90) if options.compile_only else _gpu())
    print("\n".join(sweep_section({"sweep": found})))
    return 1 if any(row["default"] and row.get("error", NO_TIME) != NO_TIME for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
