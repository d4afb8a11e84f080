"""Which configuration should be fastest, and what limits it: from the machine code, where there is no GPU.

    python -m benchmarks.estimate --chip h200 --kernel map --head-dim 64 --shape 4,12,1370,64
    python -m benchmarks.estimate --check benchmarks/results/NAME.json       how far off it was, measured on a GPU

It ranks configurations, and is never quoted as a speed: `benchmarks.pipes` says what it leaves out, `benchmarks.chips`
where its numbers come from. The candidates are those of `benchmarks.sweep`, which times them on a GPU. The floor beside
them is what nothing can be faster than: 4 B H N^2 D flop at the chip's realistic rate, or every tensor moved once.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from attnx.kernels.configs import Config, Launch, Target
from attnx.kernels.forward import forward_kernel
from attnx.kernels.machine_code import Code
from attnx.kernels.map import fuse_kernel, map_kernel
from attnx.kernels.offline import SHARED_LIMIT, Resources, in_processes, inspect
from attnx.kernels.one_pass import one_pass_kernel
from attnx.kernels.vecmat import vecmat_kernel
from benchmarks.chips import CHIPS, Chip
from benchmarks.pipes import Estimate, Use, estimate
from benchmarks.problems import HEADS, KERNELS, Candidate, Problem, build, candidates, default
from benchmarks.sweep import SPILLS

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"one_pass": ((64, 197),), "forward": ((4, 1370),), "map": ((4, 1370),), "vecmat": ((1, 4097),)}  # B, N


class Shape(NamedTuple):
    B: int
    H: int
    N: int
    D: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Work(NamedTuple):
    """What a launch does. trips: rounds of each of its loops, in the order of its code, and outside: as many rounds of
    its only loop stand written out beside it; moved: bytes of memory, every tensor once; fmas: multiply-adds that are
    asked for."""

    programs: int
    trips: tuple[float, ...]
    moved: int
    fmas: int
    outside: int = 0


def work(launch: Launch) -> Work:
    """The loops of every kernel, and its bytes, without a bias and without rows that were chosen.

    forward: over whole tiles of keys, then the edge. one_pass: over heads, and with LAG once more. map: over heads.
    vecmat: over tiles of queries. fuse: over the partial maps, which the compiler unrolls; memory is what it waits for.
    """
    args, config, programs = launch.args, launch.config, math.prod(launch.grid)
    if launch.kernel is fuse_kernel:
        return Work(programs, (), 4 * args["map_ptr"].numel() * (args["splits"] + 1), 0)
    B, H, M, D = args["q_ptr"].shape
    N, heads = args["N"], min(H, args.get("heads_each", H))
    lse, maps, tensor = 4 * B * H * M, 4 * B * M * N * args.get("splits", 1), args["q_ptr"].element_size() * B * H * D
    product, qk, all_four = B * H * M * N * D, tensor * (M + N), tensor * 2 * (M + N)
    if launch.kernel is forward_kernel:
        whole, edge = divmod(N, config.block_n)
        return Work(programs, (whole, int(edge > 0)), all_four + lse, 2 * product)
    if launch.kernel is one_pass_kernel:
        return Work(programs, (heads + args["LAG"],), all_four + lse + maps, 2 * product)
    if launch.kernel is map_kernel:
        return Work(programs, (heads,), qk + lse + maps, product)
    assert launch.kernel is vecmat_kernel, launch.kernel
    return Work(programs, (math.ceil(M / config.block_m),), qk + lse, product)


def floor(shape: Shape, chip: Chip) -> float:
    """Seconds that output and map take at least."""
    B, H, N, D = shape
    moved = 8 * B * H * N * D + 4 * B * N * N
    return max(4 * B * H * N * N * D / chip.flops(), moved / (1e12 * chip.memory))


Key = tuple[Problem, Candidate, Target]
Part = tuple[Resources, Code, Config, Work]
Compiled = dict[Key, list[Part] | BaseException]


def compile_key(problem: Problem, candidate: Candidate, target: Target) -> list[Part]:
    """What the model needs to know of each launch: one, or two where heads are split."""
    built = build(problem, candidate, target, "meta")
    launches = [built.launch, *([built.fuse] if built.fuse else [])]
    return [(*inspect(problem.kernel, launch, target), launch.config, work(launch)) for launch in launches]


def compile_keys(keys: Iterable[Key], jobs: int) -> Compiled:
    """All of them; where one doesn't compile, why."""
    tasks = list(dict.fromkeys(keys))
    return dict(zip(tasks, in_processes(compile_key, tasks, jobs), strict=True))


def predict(key: Key, chip: Chip, compiled: Compiled) -> tuple[Resources, Estimate, float]:
    """What the first launch takes, its estimate, and the seconds of all.

    Raises:
        ValueError: it doesn't compile, doesn't fit, or has loops that `work` doesn't know.
    """
    parts = compiled[key]
    if isinstance(parts, BaseException):
        raise ValueError((str(parts).strip().splitlines() or [type(parts).__name__])[0][:100])
    found = []
    for used, code, config, launch in parts:
        if used.shared > SHARED_LIMIT[chip.target.arch]:
            raise ValueError(f"asks for {used.shared} bytes of shared memory")
        found.append(estimate(code, Use(used.registers, used.shared), config, chip, *launch))
    return parts[0][0], found[0], sum(part.seconds for part in found)


def tried(problem: Problem, target: Target) -> list[Candidate]:
    """What a sweep would time, the default first; the default alone of lengths that no sweep has."""
    try:
        return candidates(problem, target)
    except KeyError:
        return [c for c in [default(problem, target)] if c is not None]


def ranking(problem: Problem, chip_name: str, compiled: Compiled) -> list[dict[str, Any]]:
    """A row for every candidate: the fastest first, then those that spill, then those that can't run ("error": why)."""
    chip = CHIPS[chip_name]
    first = default(problem, chip.target)
    rows = []
    for candidate in tried(problem, chip.target):
        row: dict[str, Any] = {"chip": chip_name, **problem._asdict(), "B": problem.batch, "config": list(candidate)}
        row["default"] = candidate == first
        try:
            rows.append(row | _described(*predict((problem, candidate, chip.target), chip, compiled)))
        except ValueError as error:
            rows.append(row | {"error": str(error)})
    return sorted(rows, key=lambda row: (row.get("spills", 0) > SPILLS, row.get("us", math.inf)))


def _described(used: Resources, found: Estimate, seconds: float) -> dict[str, Any]:
    return {
        "us": round(1e6 * seconds, 2),
        "limit": found.limit,
        "resident": found.resident,
        "waste": round(found.waste, 2),
        "busy": {pipe: round(share, 2) for pipe, share in sorted(found.busy.items(), key=lambda p: -p[1])},
        "registers": used.registers,
        "spills": used.spills,
        "shared": used.shared,
    }


def launched(contestant: str, shape: Shape, target: Target) -> list[Key]:
    """What "attnx" launches for output and map, and "sdpa" for the output alone, by our own forward kernel."""
    kernels = ["forward"] if contestant == "sdpa" else ["forward", "map"]
    short = default(_problem("one_pass", shape), target)
    if contestant == "attnx" and short is not None:
        kernels = ["one_pass"]
    chosen = [(problem, default(problem, target)) for problem in (_problem(kernel, shape) for kernel in kernels)]
    return [(problem, candidate, target) for problem, candidate in chosen if candidate is not None]


def _problem(kernel: str, shape: Shape) -> Problem:
    if shape.H != HEADS:
        raise ValueError(f"H: expected {HEADS}, as every problem of a sweep has; got {shape.H}")
    return Problem(kernel, shape.N, shape.D, shape.B)


def seconds(contestant: str, shape: Shape, chip: Chip, compiled: Compiled) -> float:
    """Of all its launches."""
    return sum(predict(key, chip, compiled)[2] for key in launched(contestant, shape, chip.target))


def whole(shape: Shape, chip_name: str, compiled: Compiled) -> dict[str, Any]:
    """The default configurations: output and map, the output alone, their ratio, and the floor, in microseconds."""
    chip = CHIPS[chip_name]
    both, alone = (1e6 * seconds(name, shape, chip, compiled) for name in ("attnx", "sdpa"))
    return {
        "chip": chip_name,
        "shape": list(shape),
        "launches": [problem.kernel for problem, *_ in launched("attnx", shape, chip.target)],
        "us": round(both, 2),
        "forward_us": round(alone, 2),
        "ratio": round(both / alone, 2),
        "floor_us": round(1e6 * floor(shape, chip), 2),
    }


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A ranking as a table."""
    head = f"{'est. us':>9} {'waste':>5} {'fit':>3} {'regs':>4} {'spills':>6}"
    yield f"{'blocks warps stages':>32} {head} {'limit':24} busy"
    for row in rows:
        config = _spelled(Candidate(*row["config"])) + "*" * row["default"]
        if "error" in row:
            yield f"{config:>32} {row['error']}"
            continue
        busy = ", ".join(f"{pipe} {share:.0%}" for pipe, share in list(row["busy"].items())[:4])
        cells = f"{row['us']:9.1f} {row['waste']:5.2f} {row['resident']:3} {row['registers']:4} {row['spills']:6}"
        yield f"{config:>32} {cells} {row['limit']:24} {busy}"


def _spelled(candidate: Candidate) -> str:
    """Such as "64x128 8 2 2 parts tail 16 v32 lag" or "128x128 8 3 / 6"."""
    block_m, block_n, warps, stages, parts, tail, lag, splits = candidate
    text = f"{block_m}x{block_n} {warps} {stages}"
    text += (f" {parts} parts" if parts > 1 else "") + (f" tail {tail}" if tail else "")
    text += " lag" if lag else ""
    return text + (f" / {splits}" if splits > 1 else "")


def main(argv: list[str] | None = None) -> int:
    """Prints rankings and the whole operator, or the check of stored results. Exits with 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks.estimate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="repeatable; h200 unless given")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; all unless given")
    parser.add_argument("--head-dim", action="append", type=int, help="repeatable; 64 unless given")
    parser.add_argument("--shape", action="append", type=_shape, help="B,H,N,D; repeatable; instead of --head-dim")
    parser.add_argument("--check", nargs="*", type=Path, help="stored results; all there are unless some are named")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder: stores estimate-CHIP-tritonVERSION.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1: the interpreter compiles nothing; unset it")
    if options.check is not None:
        from benchmarks.estimate_check import check_files

        print("\n".join(check_files(options.check or sorted(RESULTS.glob("*.json")), options.jobs)))
        return 0
    for shape in options.shape or ():
        if shape.H != HEADS:
            parser.error(f"--shape: expected {HEADS} heads, as every problem of a sweep has; got {shape.H}")
    for name in options.chip or ["h200"]:
        result = _of_chip(name, options.kernel or KERNELS, options.shape, options.head_dim or [64], options.jobs)
        print(json.dumps(result) if options.json else "\n".join(_report(result)))
        if options.out:
            _store(result, options.out)
    return 0


def _of_chip(
    name: str, kernels: Iterable[str], shapes: list[Shape] | None, head_dims: list[int], jobs: int
) -> dict[str, Any]:
    target = CHIPS[name].target
    asked = [
        _problem(kernel, shape)
        for kernel in kernels
        for shape in shapes or [Shape(B, HEADS, N, D) for D in head_dims for B, N in SHAPES[kernel]]
    ]
    asked = [problem for problem in asked if tried(problem, target)]
    used = list(dict.fromkeys(Shape(p.batch, HEADS, p.N, p.D) for p in asked if p.kernel != "vecmat"))
    keys = [(problem, candidate, target) for problem in asked for candidate in tried(problem, target)]
    whole_keys = [key for shape in used for who in ("attnx", "sdpa") for key in launched(who, shape, target)]
    compiled = compile_keys([*keys, *whole_keys], jobs)
    return {
        "estimated": True,
        "chip": name,
        "ranking": [ranking(problem, name, compiled) for problem in asked],
        "whole": [_or_error(partial(whole, shape, name, compiled), shape) for shape in used],
    }


def _or_error(find: Callable[[], dict[str, Any]], shape: Shape) -> dict[str, Any]:
    try:
        return find()
    except ValueError as error:
        return {"shape": list(shape), "error": str(error)}


def _report(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['chip']}: estimates that rank, not speeds; *: the default; fit: programs of a processor at a time"
    for rows in result["ranking"]:
        yield "\n{kernel} B={B} N={N} D={D}".format(**rows[0])
        yield from lines(rows)
    yield "\noutput and map by default, beside our forward alone, and the floor"
    for row in result["whole"]:
        shape = "x".join(map(str, row["shape"]))
        if "error" in row:
            yield f"{shape:>16}  {row['error']}"
            continue
        cells = f"{row['us']:9.1f} us / {row['forward_us']:.1f} = {row['ratio']:.2f}; floor {row['floor_us']:.1f}"
        yield f"{shape:>16} {cells}  ({' + '.join(row['launches'])})"


def _store(result: dict[str, Any], out: Path) -> None:
    import triton

    from benchmarks.machine import commit

    out.mkdir(parents=True, exist_ok=True)
    about = {"commit": commit(), "versions": {"triton": triton.__version__}}
    path = out / f"estimate-{result['chip']}-triton{triton.__version__}.json"
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected B,H,N,D such as 4,12,1370,64; got {text!r}")
    return Shape(*map(int, sizes))


if __name__ == "__main__":
    sys.exit(main())
