"""The report's section on statistics of heads."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import ms, number, origin, table, verdict


def probes_section(file: str, content: dict[str, Any]) -> Iterator[str]:
    """Lines for one file of `benchmarks.suites.probes`."""
    cuda = content["device"] == "cuda"
    threads = "" if cuda else f", {content['threads']} threads"
    yield f"## Statistics of heads: {content['hardware']}{threads}\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    yield (
        "Entropy, distance, largest weight and mass of every row of every head and layer (`stats`), beside distance\n"
        "and entropy of the weights of all heads, which `output_attentions=True` or hooks keep. The floor is the\n"
        "forward pass. Goals on a CPU: at most 1.10 x its time and 1.02 x its memory. The error is the largest\n"
        "difference from the weights' own statistics, in pixels or nats.\n"
    )
    memory = {row["model"]: row["peak_mb"] for row in content["rows"] if row["contestant"] == "forward"}
    head = ("model", "contestant", "ms", "/ forward", "goal", "peak MB", "/ forward's", "goal", "error")
    models = [row for row in content["rows"] if row["contestant"] != "op"]
    yield from table(head, [_line(row, memory[row["model"]], cuda) for row in models], "ll")
    yield ""
    yield "`attnx.attention_stats` alone, beside SDPA. Goal on a GPU: at most 1.5 x.\n"
    head = ("B x H x N x D", "SDPA ms", "ms", "/ SDPA", "goal")
    yield from table(head, [_op(row) for row in content["rows"] if row["contestant"] == "op"])
    yield ""


def _line(row: dict[str, Any], forward: float, cuda: bool) -> tuple[str, ...]:
    ours, grown, ratio = row["contestant"] == "stats", row["peak_mb"] / forward, row.get("ratio_to_floor")
    return (
        f"{row['model']}, batch {row['batch']}", row["contestant"], "" if ratio is None else ms(row["median_ms"]),
        "" if ratio is None else f"{ratio:.3f}", verdict(ratio <= 1.1) if ours and not cuda and ratio else "",
        number(row["peak_mb"]), f"{grown:.3f}", verdict(grown <= 1.02) if ours and not cuda else "",
        f"{row['error']:.0e}" if "error" in row else "",
    )  # fmt: skip


def _op(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row["ratio_to_floor"]
    return row["model"], ms(row["floor_ms"]), ms(row["median_ms"]), f"{ratio:.3f}", verdict(ratio <= 1.5)
