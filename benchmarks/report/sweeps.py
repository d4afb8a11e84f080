"""The report's last sections: sweeps of block sizes, and what a model of the chips estimates."""

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import configuration, details, ms, number, table


def sweep_section(sweeps: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Each sweep: the default of every problem beside the best that was found."""
    yield "## Block sizes\n"
    yield (
        "A configuration: blocks, warps, stages; of the one-pass kernel its tiles of keys and their tail, the columns\n"
        "of values at a time, and whether they lag a head behind; over how many programs the heads are split.\n"
    )
    for file, sweep in sweeps.items():
        groups = itertools.groupby(sweep["rows"], _problem)
        yield f"[`{file}`](results/{file}): {sweep['target']}, commit {str(sweep['commit'])[:12]}.\n"
        if sweep["compiled_only"]:
            yield "Compiled, not run: bytes that a thread spills, registers, bytes of shared memory.\n"
            columns = ("", "default", "spills", "registers", "shared", "candidates")
            yield from table(columns, [_compiled(name, list(rows)) for name, rows in groups], "ll")
        else:
            timed = ("", "default", "ms", "best", "ms", "default / best", "ran")
            yield from table(timed, [_timed(name, list(rows)) for name, rows in groups], "llrl")
        yield ""


def estimate_section(estimates: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What `benchmarks.estimate` computed: every table says that it is no measurement."""
    yield "## Estimates: a model, not a measurement\n"
    yield (
        "No chip ran for these numbers: a model of the chips reads the compiled machine code, as\n"
        "[`NOTES.md`](NOTES.md) says. They rank configurations.\n"
        "They are no speeds, and no target is held against them.\n"
    )
    for file, content in estimates.items():
        yield f"### Model of {content['chip']}\n"
        yield f"[`{file}`](results/{file}), commit {str(content['commit'])[:12]}.\n"
        head = ("model: B, H, N, D", "launches", "output and map, us", "output alone, us", "ratio", "least us")
        yield from table(head, [_whole(row) for row in content["whole"]], "ll")
        yield ""
        ranked = ("model: kernel, shape", "default", "us", "limit", "spills", "best by the model", "us", "limit")
        lines = [_ranked(rows) for rows in content["ranking"] if rows]
        yield from details(
            f"configurations, by the model of {content['chip']}", ["", *table(ranked, lines, "llrlrlrl")]
        )


def _problem(row: dict[str, Any]) -> str:
    batch = f"B {row['B']}, " if row.get("B") else ""
    return f"{row['kernel']}, {batch}N {row['N']}, D {row['D']}"


def _timed(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    ran = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    default = next((row for row in rows if row["default"]), {})
    best = ran[0] if ran else {}
    gain = default["ms"] / best["ms"] if "ms" in default and best else None
    times = (ms(row["ms"]) if "ms" in row else row.get("error", "") for row in (default, best))
    return (
        name,
        _config(default),
        next(times),
        _config(best),
        next(times),
        number(gain, "x"),
        f"{len(ran)} of {len(rows)}",
    )


def _compiled(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    default: dict[str, Any] = next((row for row in rows if row["default"]), {})
    cells = [str(default.get(key, "")) for key in ("spills", "registers", "shared")]
    return name, _config(default), *cells, str(len(rows))


def _whole(row: dict[str, Any]) -> tuple[str, ...]:
    shape = ", ".join(map(str, row["shape"]))
    if "error" in row:
        return shape, row["error"], "", "", "", ""
    times = (f"{row[key]:.1f}" for key in ("us", "forward_us"))
    return shape, " + ".join(row["launches"]), *times, number(row["ratio"], "x"), f"{row['floor_us']:.1f}"


def _ranked(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    default: dict[str, Any] = next((row for row in rows if row["default"]), {})
    best = rows[0] if "us" in rows[0] else {}
    first, second = ((_config(row), str(row.get("us", "")), row.get("limit", "")) for row in (default, best))
    return _problem(rows[0]), *first, str(default.get("spills", "")), *second


def _config(row: dict[str, Any]) -> str:
    return configuration(row["config"]) if row else "none"
