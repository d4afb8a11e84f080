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
            columns = ("", "default", "spills", "registers", "shared", "candidates")
            yield from table(columns, [_compiled(name, list(rows)) for name, rows in groups], "ll")
        else:
            timed = ("", "default", "ms", "best", "ms", "default / best", "ran")
            yield from table(timed, [_timed(name, list(rows)) for name, rows in groups], "llrl")
        yield ""


def _problem(row: dict[str, Any]) -> str:
    batch = f"B {row['B']}, " if row.get("B") else ""
    return f"{row['kernel']}, {batch}N {row['N']}, D {row['D']}"


def _timed(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    ran = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    default, best = _default(rows), ran[0] if ran else {}
    gain = default["ms"] / best["ms"] if "ms" in default and best else None
    cells = [cell for row in (default, best) for cell in (_config(row), _time(row))]
    return name, *cells, number(gain, "x"), f"{len(ran)} of {len(rows)}"


def _compiled(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    default = _default(rows)
    cells = [str(default.get(key, "")) for key in ("spills", "registers", "shared")]
    return name, _config(default), *cells, str(len(rows))


def _default(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next((row for row in rows if row["default"]), {})


def _config(row: dict[str, Any]) -> str:
    return configuration(row["config"]) if row else "none"


def _time(row: dict[str, Any]) -> str:
    return ms(row["ms"]) if "ms" in row else row.get("error", "")
