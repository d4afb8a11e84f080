"""Stored results, read back: runs, sweeps, and what a model of the chips estimates."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

# What a contestant gives beside the output; it must be written, so it belongs to the floor.
GIVES = {
    **dict.fromkeys(("attnx", "attnx_eager", "hf_eager", "timm_eager", "compiled_eager", "flex_map"), "map"),
    **dict.fromkeys(("vecmat", "flex_vecmat", "flag_attention", "attnx_row"), "row"),
}


class Ceilings(NamedTuple):
    """What a GPU can do at most: bf16 matrix products in flop/s, memory in bytes/s, and who says so."""

    flops: float
    bandwidth: float
    source: str


CEILINGS = {
    "NVIDIA H200": Ceilings(790e12, 4.3e12, "measured: a large matrix product, a large copy"),
    "NVIDIA H100": Ceilings(989e12, 3.35e12, "data sheet, SXM, dense"),
    "NVIDIA A100": Ceilings(312e12, 2.04e12, "data sheet, 80 GB SXM, dense"),
}


@dataclass(frozen=True)
class Row:
    """One contestant on one shape; times in milliseconds, memory in 10^6 bytes."""

    suite: str
    shape: str
    dtype: str
    contestant: str
    timing: str
    median_ms: float
    iqr_ms: float
    rounds: int
    floor_ms: float
    ratio_to_floor: float
    peak_mb: float | None
    max_error: float | None
    kernel: str | None = None
    errors: dict[str, float] | None = None
    tokens: int | None = None
    needed_mb: float | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, N, D of an op's row."""
        B, H, N, D = map(int, self.shape.split("x"))
        return B, H, N, D

    @property
    def group(self) -> tuple[str, str]:
        return self.shape, self.dtype

    def least_ms(self, ceilings: Ceilings | None) -> float | None:
        """The floor of an op's row in half precision: q k^T and P v once, or inputs read and results written once."""
        if ceilings is None or self.dtype == "fp32":
            return None
        B, H, N, D = self.sizes
        gives = {"map": 4 * B * N * N, "row": 4 * B * N}.get(GIVES.get(self.contestant, ""), 0)
        return 1e3 * max(4 * B * H * N * N * D / ceilings.flops, (4 * 2 * B * H * N * D + gives) / ceilings.bandwidth)


@dataclass(frozen=True)
class Run:
    """A file of `benchmarks.run`."""

    file: str
    about: dict[str, Any]
    rows: list[Row]

    @property
    def cuda(self) -> bool:
        return self.about["device"] == "cuda"

    @property
    def ceilings(self) -> Ceilings | None:
        names = [name for name in CEILINGS if self.about["hardware"].startswith(name)]
        return CEILINGS[names[0]] if names else None

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str, str], Row]:
        return {(row.suite, *row.group, row.contestant): row for row in self.rows}

    def find(self, row: Row, contestant: str) -> Row | None:
        """Another contestant on the row's shape and dtype."""
        return self._by_key.get((row.suite, *row.group, contestant))

    def faster_than(self, row: Row, contestant: str) -> float | None:
        """How many times the other's time is this row's; both relative to the floor that ran beside them.

        None where one is timed with its launches and the other without.
        """
        other = self.find(row, contestant)
        if other is None or other.timing != row.timing:
            return None
        return other.ratio_to_floor / row.ratio_to_floor

    def groups(self, suite: str) -> dict[tuple[str, str], list[Row]]:
        """The suite's rows by shape and dtype; shapes in order of dtype, model or tokens, and batch."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.suite == suite:
                found.setdefault(row.group, []).append(row)
        if suite != "op":
            return found
        return dict(sorted(found.items(), key=lambda item: (item[0][1], item[1][0].sizes[2], item[1][0].sizes[0])))


@dataclass(frozen=True)
class Stored:
    """runs: those on GPUs first, the newest first; sweeps, estimates, words and jobs: file name -> its content."""

    runs: list[Run]
    sweeps: dict[str, dict[str, Any]]
    estimates: dict[str, dict[str, Any]]
    words: dict[str, dict[str, Any]]
    jobs: dict[str, dict[str, Any]]


def _row(content: dict[str, Any]) -> Row:
    later = ("kernel", "errors", "tokens", "needed_mb")  # older files lack them
    fields: dict[str, Any] = {name: content[name] for name in Row.__dataclass_fields__ if name not in later}
    return Row(**fields, **{name: content.get(name) for name in later})


def load(folder: Path) -> Stored:
    """Every JSON file of the folder but quick runs.

    Raises:
        ValueError: a file is not a result; says which.
    """
    runs, sweeps, estimates, words, jobs = [], {}, {}, {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if path.name.startswith("estimate-"):
                estimates[path.name] = content
            elif content.get("quick") or "-quick" in path.stem:
                continue
            elif path.name.startswith("sweep-"):
                sweeps[path.name] = content
            elif path.name.startswith("words-"):
                words[path.name] = content
            elif path.name.startswith("jobs-"):
                jobs[path.name] = content
            else:
                rows = [_row(row) for row in content["rows"]]
                runs.append(Run(path.name, {key: content[key] for key in content if key != "rows"}, rows))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path.name}: expected a result of benchmarks.run; {type(error).__name__}: {error}"
            ) from error
    runs.sort(key=lambda run: run.about["date"], reverse=True)
    runs.sort(key=lambda run: not run.cuda)
    return Stored(runs, sweeps, estimates, words, jobs)
