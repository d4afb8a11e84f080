"""What a suite has found so far, a line of JSON each, on disk at once: a suite that is killed loses one test.

{"planned": [test, ...]}           when all tests are known
{"row": {...}, "test": test}       measured
{"not_run": name, "reason": ...}   why a contestant, or a contestant on a shape, can't be measured
{"failed": test, "reason": ...}    a check that failed, or an error
"""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Record:
    """Appends lines to a file; None writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Found(NamedTuple):
    """rows; not_run {name: reason}; failed {test: reason}; cut: tests that were planned and came to no end."""

    rows: list[dict[str, Any]]
    not_run: dict[str, str]
    failed: dict[str, str]
    cut: list[str]


def read(path: Path) -> Found:
    """What the lines of a record say. A last line that was only half written is left out."""
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
