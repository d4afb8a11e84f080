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

    def __init__(self, path: Path | None, test: str | None = None) -> None:
        self.path, self.test = path, test

    def add(self, **line: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def measured(self, name: str, found: dict[str, Any] | str, **about: Any) -> None:
        """Add a row, or under `name` the reason why there is none."""
        if isinstance(found, str):
            self.add(not_run=name, reason=found, test=self.test)
        else:
            self.add(row=_short({**about, **found}), test=self.test)


class Found(NamedTuple):
    """rows; not_run {name: reason}; failed {test: reason}; cut: planned tests that did not finish."""

    rows: list[dict[str, Any]]
    not_run: dict[str, str]
    failed: dict[str, str]
    cut: list[str]

    def add(self, other: "Found", suite: str) -> None:
        """Add the findings of a suite."""
        self.rows.extend(other.rows)
        self.not_run.update(other.not_run)
        self.failed.update({f"{suite}: {test}": reason for test, reason in other.failed.items()})
        self.cut.extend(f"{suite}: {test}" for test in other.cut)


def read(path: Path) -> Found:
    """The findings in a record. An incomplete last line is ignored."""
    found = Found([], {}, {}, [])
    planned: list[str] = []
    ended: set[str] = set()
    text = path.read_text() if path.is_file() else ""
    for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
        planned += line.get("planned", [])
        ended |= {line[key] for key in ("test", "failed") if key in line}
        if "row" in line:
            found.rows.append(line["row"])
        for kind in ("not_run", "failed"):
            if kind in line:
                getattr(found, kind)[line[kind]] = line["reason"]
    found.cut.extend(test for test in planned if test not in ended)
    return found


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
