"""The findings of a suite as lines of JSON. Each is written at once, so a killed suite loses one test at most.

{"planned": [test, ...]}           all tests, after collection
{"row": {...}, "test": test}       a measurement
{"not_run": name, "reason": ...}   a contestant, or a contestant on a shape, that can't be measured
{"failed": test, "reason": ...}    a failed check or an error
"""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Record:
    """Appends lines to a file, or writes nothing if `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Found(NamedTuple):
    """rows; not_run {name: reason}; failed {test: reason}; cut: planned tests that did not finish."""

    rows: list[dict[str, Any]]
    not_run: dict[str, str]
    failed: dict[str, str]
    cut: list[str]


def read(path: Path) -> Found:
    """The findings in a record. An incomplete last line is ignored."""
    found = Found([], {}, {}, [])
    planned: list[str] = []
    ended: set[str] = set()
    for line in _lines(path):
        planned += line.get("planned", [])
        ended |= {line[key] for key in ("test", "failed") if key in line}
        if "row" in line:
            found.rows.append(line["row"])
        elif "not_run" in line:
            found.not_run[line["not_run"]] = line["reason"]
        elif "failed" in line:
            found.failed[line["failed"]] = line["reason"]
    found.cut.extend(test for test in planned if test not in ended)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = []
    for i, line in enumerate(lines):
        try:
            whole.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise
    return whole
