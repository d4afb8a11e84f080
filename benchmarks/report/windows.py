"""The report's section on rollout through windows."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import ms, number, origin, table, verdict


def windows_section(file: str, content: dict[str, Any]) -> Iterator[str]:
    """Lines for one file of `benchmarks.suites.windows`."""
    threads = "" if content["device"] == "cuda" else f", {content['threads']} threads"
    yield f"## Rollout through windows: {content['hardware']}{threads}\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    yield (
        "Swin with random weights. The floor is the forward pass. Goals: at most 1.05 x the forward pass, and at most\n"
        "3 MB of maps an image.\n"
    )
    head = (
        "model",
        "forward ms",
        "rollout ms",
        "/ forward",
        "goal",
        "maps, MB an image",
        "goal",
        "peak MB",
        "forward's",
    )
    yield from table(head, [_line(row) for row in content["rows"]])
    yield ""


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    megabytes = row["map_bytes"] / 1e6
    return (
        f"{row['model']}, batch {row['batch']}", ms(row["floor_ms"]), ms(row["median_ms"]),
        f"{row['ratio_to_floor']:.3f}", verdict(row["ratio_to_floor"] <= 1.05), f"{megabytes:.2f}",
        verdict(megabytes <= 3), number(row["rollout_peak_mb"]), number(row["forward_peak_mb"]),
    )  # fmt: skip
