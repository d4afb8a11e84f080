"""Block sizes tried out: what `attnx.kernels.configs` should say, on the GPU at hand.

    python -m benchmarks.sweep                             times every candidate beside the default
    python -m benchmarks.sweep --compile-only --arch 90    no GPU: registers, spills, shared memory

Every candidate is first compiled by itself, several at a time, and its resources read. One that doesn't compile, spills
more than a few registers, or asks for more shared memory than there is, is recorded and left out. The others must give
what the default gives, then they are timed (`triton.testing.do_bench`, the L2 cache cleared before each call).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnx.kernels import offline
from attnx.kernels.configs import Config, Launch, Target, forward_config, map_config, one_pass_config
from attnx.kernels.forward import forward_launch, one_pass_launch, shared_args, value_args
from attnx.kernels.map import map_launch
from benchmarks.run import ROOT, environment, file_stem, write_atomically

HEADS = 12
SPILLS = 64  # bytes a thread; who spills more is not timed
BATCH = {197: 64, 1370: 4}
BLOCKS = {
    "forward": ((64, 128), (32, 64, 128)),
    "map": ((64, 128), (64, 128, 256)),
    "one_pass": ((16, 32, 64), (256,)),
}
WARPS, STAGES = (4, 8), {"forward": (2, 3), "map": (2, 3), "one_pass": (1, 2)}


class Problem(NamedTuple):
    """What is computed: kernel is "forward", "map" or "one_pass"."""

    kernel: str
    N: int
    D: int

    def __str__(self) -> str:
        return f"{self.kernel} N={self.N} D={self.D}"


PROBLEMS = tuple(
    Problem(kernel, n, d)
    for d in (64, 128)
    for kernel, n in (("one_pass", 197), ("map", 1370), ("forward", 1370), ("map", 197), ("forward", 197))
)


def default(problem: Problem, target: Target) -> Config | None:
    """The configuration that the backend would take; None where it would take the long way."""
    itemsize = torch.bfloat16.itemsize
    if problem.kernel == "one_pass":
        return one_pass_config(problem.D, itemsize, problem.N, target)
    choose = forward_config if problem.kernel == "forward" else map_config
    return choose(problem.D, itemsize, problem.N, target)


def candidates(problem: Problem, target: Target) -> list[Config]:
    """The default first, then every combination."""
    grid = itertools.product(*BLOCKS[problem.kernel], WARPS, STAGES[problem.kernel])
    first = default(problem, target)
    return [*([first] if first else []), *(c for c in (Config(*sizes) for sizes in grid) if c != first)]


def build(problem: Problem, config: Config, target: Target, device: str) -> tuple[Launch, dict[str, Tensor]]:
    """The launch with that configuration, and what it writes: NaN until it runs. On "meta" there are shapes only."""
    batch, n = BATCH[problem.N], problem.N
    if device != "meta":
        torch.manual_seed(0)
    qkv = torch.randn(batch, n, 3, HEADS, problem.D, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    out = torch.full((batch, n, HEADS, problem.D), torch.nan, dtype=q.dtype, device=device).transpose(1, 2)
    lse = torch.full((batch, HEADS, n), torch.nan, device=device)
    amap = torch.full((batch, n, n), torch.nan, device=device)
    shared, values = shared_args(q, k, None, None, problem.D**-0.5, False), value_args(q, v, out)
    rows = triton.cdiv(n, config.block_m) * batch
    if problem.kernel == "forward":
        launch = forward_launch(shared, values, lse, target)
        return launch._replace(config=config, grid=(rows * HEADS,)), {"out": out, "lse": lse}
    if problem.kernel == "one_pass":
        launch = one_pass_launch(shared, values, lse, amap, 0, config)
        return launch._replace(config=config, grid=(rows,)), {"out": out, "lse": lse, "map": amap}
    if device != "meta":
        torch.logsumexp(q.float() @ k.float().transpose(-2, -1) * problem.D**-0.5, -1, out=lse)
    launch = map_launch(shared, lse, amap, 0, target)
    return launch._replace(config=config, grid=(rows * triton.cdiv(n, config.block_n),)), {"map": amap}


def compile_one(problem: Problem, config: Config, target: Target) -> dict[str, Any]:
    """Registers, spilled bytes and shared bytes of a candidate, or under "error" why it does not compile."""
    launch, _ = build(problem, config, target, "meta")
    try:
        found = offline.resources(problem.kernel, launch, target)
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
    pairs = [(problem, config) for problem in problems for config in candidates(problem, target)]
    # N is no constant of a kernel: the same machine code serves every length.
    codes = list(dict.fromkeys((problem.kernel, problem.D, config) for problem, config in pairs))
    longest = {code: max(p.N for p in problems if (p.kernel, p.D) == code[:2]) for code in codes}
    found = _in_processes([(Problem(code[0], longest[code], code[1]), code[2], target) for code in codes], jobs)
    by_code = dict(zip(codes, found, strict=True))
    return [
        {
            **problem._asdict(),
            "config": list(config),
            "default": config == default(problem, target),
            **by_code[problem.kernel, problem.D, config],
        }
        for problem, config in pairs
    ]


def _in_processes(tasks: list[tuple[Problem, Config, Target]], jobs: int) -> list[dict[str, Any]]:
    """`compile_one` of each task. A compiler that crashes takes its process with it: what that broke is tried alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(compile_one, *task) for task in tasks]
    results = []
    for task, future in zip(tasks, futures, strict=True):
        if isinstance(future.exception(), BrokenProcessPool) and len(tasks) > 1:
            results += _in_processes([task], 1)
        elif future.exception() is not None:
            results.append({"error": _first_line(future.exception())})
        else:
            results.append(future.result())
    return results


def time_all(rows: list[dict[str, Any]], target: Target, seconds: float) -> None:
    """Adds ms and ratio to the default (or to the first that runs) to every row that compiled, until time is up."""
    end = time.monotonic() + seconds
    groups = {problem: list(group) for problem, group in itertools.groupby(rows, _problem)}
    first: dict[Problem, tuple[dict[str, Tensor], float]] = {}
    # One candidate of every problem at a time, so that whatever time there is serves all of them.
    for row in (row for turn in itertools.zip_longest(*groups.values()) for row in turn if row is not None):
        problem = _problem(row)
        if time.monotonic() > end:
            row.setdefault("error", "no time left")
        if "error" in row or (row.get("spills", 0) > SPILLS and not row["default"]):
            continue
        try:
            results, ms = _time(problem, Config(*row["config"]), target)
            reference, base = first.setdefault(problem, (results, ms))
            _compare(results, reference)
        except Exception as error:  # what doesn't run is a result, too
            row["error"] = _first_line(error)
            continue
        row["ms"], row["ratio"] = round(ms, 5), round(ms / base, 3)


def _time(problem: Problem, config: Config, target: Target) -> tuple[dict[str, Tensor], float]:
    launch, results = build(problem, config, target, "cuda")
    launch.run()
    torch.cuda.synchronize()
    kept = {name: result.clone() for name, result in results.items()}
    return kept, triton.testing.do_bench(launch.run, warmup=10, rep=50, return_mode="median")


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

    yield f"{'blocks warps stages':>22} {'ms':>9} {'ratio':>6} {'regs':>5} {'spills':>7} {'shared':>7}"
    for problem, group in itertools.groupby(rows, _problem):
        yield f"\n{problem}"
        for row in sorted(group, key=order):
            config = "{}x{} {} {}".format(*row["config"])
            cells = [row.get(name, "") for name in ("ms", "ratio", "registers", "spills", "shared")]
            line = f"{config:>22} {cells[0]:>9} {cells[1]:>6} {cells[2]:>5} {cells[3]:>7} {cells[4]:>7}"
            yield line + "  default" * row["default"] + f"  {row.get('error', '')}"


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(row["kernel"], row["N"], row["D"])


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _gpu() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", 10 * major + minor)


def main(argv: list[str] | None = None) -> int:
    """Prints a table and stores it as JSON. Exits with 1 where a default doesn't compile, or doesn't run."""
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument(
        "--arch", choices=["80", "90", "100"], default="90", help="to compile for; else the GPU at hand"
    )
    parser.add_argument("--kernel", choices=list(BLOCKS), help="only this one")
    parser.add_argument("--head-dim", type=int, choices=[64, 128], help="only this one")
    parser.add_argument("--seconds", type=float, default=120, help="for the timings, after compilation")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    options = parser.parse_args(argv)
    if not options.compile_only and not torch.cuda.is_available():
        parser.error("no CUDA device; --compile-only needs none")
    problems = tuple(p for p in PROBLEMS if options.kernel in (None, p.kernel) and options.head_dim in (None, p.D))
    if options.compile_only:  # the lengths share their machine code
        problems = tuple({(p.kernel, p.D): p for p in reversed(problems)}.values())[::-1]
    target = Target("cuda", int(options.arch)) if options.compile_only else _gpu()
    rows = compile_all(target, problems, options.jobs)
    if not options.compile_only:
        time_all(rows, target, options.seconds)
    store(rows, target, options.out, options.compile_only)
    print("\n".join(table(rows)))
    return 1 if any(row["default"] and "error" in row for row in rows) else 0


def store(rows: list[dict[str, Any]], target: Target, out: Path, compile_only: bool) -> None:
    """Writes sweep-NAME.json, named by the target if nothing ran, else by the GPU, as `benchmarks.run` does."""
    about = environment("cpu" if compile_only else "cuda")
    stem = f"sm_{target.arch}-triton{triton.__version__}" if compile_only else file_stem("cuda")
    result = {**about, "target": f"sm_{target.arch}", "compiled_only": compile_only, "rows": rows}
    write_atomically(out / f"sweep-{stem}.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
