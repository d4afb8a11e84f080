"""The report's section on sweeps of block sizes."""

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import configuration, ms, number, table


def sweep_section(sweeps: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines for each sweep: the default of every problem beside the fastest candidate."""
    yield "## Block sizes\n"
    yield (
        "A configuration lists rows x keys of a block, warps and stages. For the one-pass kernel it adds the number\n"
        "of key tiles, their tail, and `lag` if values are weighed one head later. `heads / n`: heads are split over n "
        "programs.\n"
    )
    for file, sweep in sweeps.items():
        groups = itertools.groupby(sweep["rows"], _problem)
        yield f"[`{file}`](results/{file}): {sweep['target']}, commit {str(sweep['commit'])[:12]}.\n"
        if sweep["compiled_only"]:
            yield "Compiled only: bytes spilled per thread, registers, bytes of shared memory.\n"
        head = ("", "default", "spills", "registers", "shared", "ms", "best", "ms", "default / best", "ran")
        yield from table(head, [_line(name, list(rows)) for name, rows in groups], "llrrrrl")
        yield ""


def _problem(row: dict[str, Any]) -> str:
    batch = f"B {row['B']}, " if row.get("B") else ""
    return f"{row['kernel']}, {batch}N {row['N']}, D {row['D']}"


def _line(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    ran = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    default: dict[str, Any] = next((row for row in rows if row["default"]), {})
    compiled = (str(default.get(key, "")) for key in ("spills", "registers", "shared"))
    config, time = (configuration(default["config"]), _time(default)) if default else ("none", "")
    if not ran:
        return name, config, *compiled, time, "", "", "", f"0 of {len(rows)}"
    gain = default["ms"] / ran[0]["ms"] if "ms" in default else None
    best = configuration(ran[0]["config"]), _time(ran[0]), number(gain, "x")
    return name, config, *compiled, time, *best, f"{len(ran)} of {len(rows)}"


def _time(row: dict[str, Any]) -> str:
    return ms(row["ms"]) if "ms" in row else row.get("error", "")
