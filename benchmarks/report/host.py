"""The report's section on what Python takes."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import ms, origin, table, verdict

GOALS = {"capture + rollout": 1.25, "Extractor": 1.05}


def host_section(file: str, content: dict[str, Any]) -> Iterator[str]:
    """Lines for one file of `benchmarks.suites.host`."""
    yield f"## Python's share: {content['hardware']}, {content['threads']} threads\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    yield (
        "Launches of Triton kernels with a driver that does nothing, in microseconds: with a plan, and prepared anew.\n"
        "Goal: at most 8.\n"
    )
    yield from table(("call", "launches", "planned", "not planned", "goal"), [_launch(r) for r in content["launches"]])
    yield f"\n{content['model']}, one image; the floor is the forward pass in the same run.\n"
    yield from table(("", "ms", "/ forward", "goal", ""), [_model(row) for row in content["models"]])
    yield ""


def _launch(row: dict[str, Any]) -> tuple[str, ...]:
    name = f"{row['call']}, batch {row['batch']}, {row['tokens']} tokens"
    times = f"{row['planned_us']:.1f}", f"{row['not_planned_us']:.1f}"
    return name, str(row["launches"]), *times, verdict(row["planned_us"] <= 8)


def _model(row: dict[str, Any]) -> tuple[str, ...]:
    goal = GOALS.get(row["contestant"])
    met = verdict(row["ratio_to_floor"] <= goal) if goal else ""
    return row["contestant"], ms(row["median_ms"]), f"{row['ratio_to_floor']:.3f}", str(goal or ""), met
