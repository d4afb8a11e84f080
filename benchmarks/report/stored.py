"""Stored results, read from JSON: runs, sweeps, word maps and batch jobs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One contestant on one shape. Times are in milliseconds, memory in 10^6 bytes."""

    suite: str
    shape: str
    dtype: str
    contestant: str
    median_ms: float
    iqr_ms: float
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
        """B, H, N, D of a row of the op."""
        B, H, N, D = map(int, self.shape.split("x"))
        return B, H, N, D


@dataclass(frozen=True)
class Run:
    """A result file of `benchmarks.run`."""

    file: str
    about: dict[str, Any]
    rows: list[Row]

    @property
    def cuda(self) -> bool:
        """True if the run was on a GPU."""
        return self.about["device"] == "cuda"

    @property
    def name(self) -> str:
        """Hardware, with the number of threads on a CPU."""
        return self.about["hardware"] + ("" if self.cuda else f", {self.about['threads']} threads")

    def find(self, suite: str, shape: str, contestant: str, dtype: str | None = None) -> Row | None:
        """The row of a contestant on a shape, else None."""
        for row in self.rows:
            if (row.suite, row.shape, row.contestant) == (suite, shape, contestant) and dtype in (None, row.dtype):
                return row
        return None

    def faster_than(self, row: Row, contestant: str) -> float | None:
        """Time of `contestant` over the row's, each relative to its own floor; None if it has no row of that shape."""
        other = self.find(row.suite, row.shape, contestant, row.dtype)
        return None if other is None else other.ratio_to_floor / row.ratio_to_floor

    def groups(self, suite: str) -> dict[tuple[str, str], list[Row]]:
        """{(shape, dtype): rows} of a suite; those of the op are ordered by dtype, tokens and batch."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.suite == suite:
                found.setdefault((row.shape, row.dtype), []).append(row)
        if suite != "op":
            return found
        return dict(sorted(found.items(), key=lambda item: (item[0][1], item[1][0].sizes[2], item[1][0].sizes[0])))


@dataclass(frozen=True)
class Stored:
    """All results. runs: those on GPUs first, then newest first. The others: {file name: content}."""

    runs: list[Run]
    sweeps: dict[str, dict[str, Any]]
    words: dict[str, dict[str, Any]]
    windows: dict[str, dict[str, Any]]
    probes: dict[str, dict[str, Any]]
    jobs: dict[str, dict[str, Any]]
    host: dict[str, dict[str, Any]]


def load(folder: Path) -> Stored:
    """The results in every JSON file of the folder, except quick runs.

    Raises:
        ValueError: a file is not a result; the message names it.
    """
    runs: list[Run] = []
    others: dict[str, dict[str, dict[str, Any]]] = {
        "sweep": {}, "words": {}, "windows": {}, "probes": {}, "jobs": {}, "host": {},
    }  # fmt: skip
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            kind = path.name.partition("-")[0]
            if content.get("quick") or "-quick" in path.stem:
                continue
            if kind in others:
                others[kind][path.name] = content
            else:
                about = {key: content[key] for key in content if key != "rows"}
                runs.append(Run(path.name, about, [read_row(row) for row in content["rows"]]))
        except (KeyError, TypeError, ValueError) as error:
            message = f"{path.name}: expected a result of benchmarks.run; {type(error).__name__}: {error}"
            raise ValueError(message) from error
    runs.sort(key=lambda run: run.about["date"], reverse=True)
    runs.sort(key=lambda run: not run.cuda)
    kinds = ("sweep", "words", "windows", "probes", "jobs", "host")
    return Stored(runs, *(others[kind] for kind in kinds))


def read_row(content: dict[str, Any]) -> Row:
    """The Row of a stored row. Fields that older files lack are None."""
    return Row(**{name: content[name] for name in Row.__dataclass_fields__ if name in content})
