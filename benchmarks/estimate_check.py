"""How far off `benchmarks.estimate` was, wherever a GPU has measured what it predicts.

Of a stored result of `benchmarks.run` the contestants "attnx" and "sdpa" in bfloat16 are taken ("sdpa" is somebody
else's kernel, predicted as our own forward), of one of `benchmarks.sweep` every configuration that was timed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.chips import CHIPS, Chip, named
from benchmarks.estimate import Compiled, Key, Shape, compile_keys, launched, predict, seconds
from benchmarks.problems import HEADS, Candidate, Problem

NOTHING = "no result of a GPU that is known here exists: the estimates are unchecked"


class Case(NamedTuple):
    """Something measured, in seconds: what "attnx" or "sdpa" took on a shape, or a sweep's candidate."""

    what: str
    shape: Shape
    key: tuple[Problem, Candidate] | None
    measured: float


def cases(result: dict[str, Any]) -> list[Case]:
    """What a stored result has measured."""
    found = []
    for row in result.get("rows", []):
        if row.get("ms") is not None and "kernel" in row:
            problem = Problem(row["kernel"], row["N"], row["D"], row.get("B", 0))
            shape = Shape(problem.batch, HEADS, problem.N, problem.D)
            found.append(Case(str(problem), shape, (problem, Candidate(*row["config"])), 1e-3 * row["ms"]))
        elif row.get("contestant") in ("attnx", "sdpa") and row.get("dtype") == "bf16" and row.get("suite") == "op":
            shape = Shape(*map(int, row["shape"].split("x")))
            found.append(Case(row["contestant"], shape, None, 1e-3 * row["median_ms"]))
    return found


def chip_of(result: dict[str, Any]) -> Chip | None:
    """The chip that a stored result was measured on; None for a CPU, and for one that isn't known."""
    name = named(result.get("hardware") or "") if result.get("device") == "cuda" else None
    return CHIPS[name] if name else None


def check_files(paths: Sequence[Path], jobs: int) -> Iterator[str]:
    """Lines: the errors of each file that a GPU has measured, or that there is none."""
    some = False
    for path in paths:
        result = json.loads(path.read_text())
        chip = chip_of(result)
        measured = cases(result) if chip else []
        if chip is None or not measured:
            continue
        some = True
        compiled = compile_keys(_keys(measured, chip), jobs)
        yield f"{path.name}: {result['hardware']}"
        yield from compare(measured, partial(_predict, chip=chip, compiled=compiled))
    if not some:
        yield NOTHING


def compare(measured: Sequence[Case], predicted: Callable[[Case], float]) -> Iterator[str]:
    """A line for every kernel: predicted / measured, its worst factor, and the rank correlation of the two.

    Args:
        predicted: seconds of a case, or ValueError where the model has nothing to say.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    missing = 0
    for case in measured:
        try:
            groups.setdefault(case.what, []).append((predicted(case), case.measured))
        except ValueError:
            missing += 1
    for name, pairs in groups.items():
        factors = [guess / took for guess, took in pairs]
        worst = max(max(f, 1 / f) for f in factors)
        rank = rank_correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else None
        line = f"  {name:24} {len(factors):3} x  predicted / measured: median {median(factors):.2f}"
        line += f", worst factor {worst:.2f}"
        yield line + (f", rank correlation {rank:.2f}" if rank is not None else "")
    if missing:
        yield f"  {missing} measurements have no estimate"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both sort alike, -1 where one is the other turned round; equal values share their rank."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(x) - 1) / 2
    up = sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True))
    scale = (sum((i - middle) ** 2 for i in x) * sum((j - middle) ** 2 for j in y)) ** 0.5
    return up / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def _predict(case: Case, chip: Chip, compiled: Compiled) -> float:
    if case.key is None:
        return seconds(case.what, case.shape, chip, compiled)
    return predict((*case.key, chip.target), chip, compiled)[2]


def _keys(measured: Sequence[Case], chip: Chip) -> Iterator[Key]:
    for case in measured:
        if case.key is None:
            yield from launched(case.what, case.shape, chip.target)
        else:
            yield *case.key, chip.target
