"""Growth of time and memory with the number of tokens, measured in one process per contestant and size.

    python -m benchmarks.suites.growth          a ViT-Ti/16 from 224 to 1024 pixels, batch 1, on the CPU

`benchmarks.run` stores the same rows under "growth".
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.peers import networks as models
from benchmarks.suites import memory

CONTESTANTS = ("plain", "extractor", "extractor_qk", "hooks")
RUNS = 5


class Point(NamedTuple):
    """tokens, median milliseconds, and peak megabytes (10^6 bytes) above the loaded model."""

    tokens: int
    ms: float
    mb: float


def measure(sizes: Iterable[int] = models.GROWTH, runs: int = RUNS) -> Iterator[dict[str, Any]]:
    """A row for every contestant and size."""
    for size in sizes:
        for contestant in CONTESTANTS:
            print(f"== growth: {contestant} at {size} pixels", flush=True)
            found = memory.in_own_process(contestant, f"vit_tiny_patch16_{size}", 1, "cpu", runs)
            tokens = (size // 16) ** 2 + 1
            yield dict(contestant=contestant, tokens=tokens, ms=1e3 * found["seconds"], peak_mb=found["peak_mb"])


def by_contestant(rows: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """{contestant: points}, ordered by tokens."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        # Memory that the allocator had free does not count, so values below 0.1 MB are noise.
        lines.setdefault(row["contestant"], []).append(Point(row["tokens"], row["ms"], max(0.1, row["peak_mb"])))
    return {name: sorted(points) for name, points in lines.items()}


def power(points: Sequence[tuple[float, float]]) -> float:
    """p of the least-squares fit y = c x^p to the three largest x, where constant costs matter least.

    Raises:
        ValueError: there are fewer than two points, or one is not positive.
    """
    logs = [(math.log(x), math.log(y)) for x, y in sorted(points)[-3:]]
    if len(logs) < 2:
        raise ValueError(f"expected at least two points; got {len(points)}")
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


if __name__ == "__main__":
    for row in measure():
        print(row)
