"""The report's section on word maps and Grad-CAM."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import ms, number, origin, table, verdict


def words_section(file: str, content: dict[str, Any]) -> Iterator[str]:
    """Lines for one file of `benchmarks.suites.words`: the goals, then every row."""
    threads = "" if content["device"] == "cuda" else f", {content['threads']} threads"
    yield f"## Words to patches: {content['hardware']}{threads}\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    yield (
        f"ALBEF-base with random weights, captions of 9 to 17 tokens, layer {content['layer']}. The floor,\n"
        "`forward`, is the forward pass to the end of that layer. `original_words` and `original_gradcam` are the\n"
        "original code's `save_attention` path and Grad-CAM with the same weights. The error is the difference of\n"
        "attnx from the original, as a share of the largest entry. Peak and needed MB are defined as above.\n"
    )
    groups: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["pixels"], row["batch"]), {})[row["contestant"]] = row
    head = ("", "word maps / floor", "goal", "Grad-CAM, faster by", "goal", "its memory / the original's", "goal")
    yield from table(head, [_held(*group) for group in groups.items()])
    yield ""
    head = ("", "contestant", "ms", "spread", "/ floor", "pairs/s", "peak MB", "needed MB", "error")
    yield from table(head, [_line(*key, row) for key, rows in groups.items() for row in rows.values()], "ll")
    yield ""


def _held(key: tuple[int, int], rows: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    words, cam, original = (rows.get(name) for name in ("word_maps", "gradcam", "original_gradcam"))
    ratio = words["ratio_to_floor"] if words else None
    faster = original["ratio_to_floor"] / cam["ratio_to_floor"] if original and cam else None
    memory = None
    if original and cam:
        field = "needed_mb" if "needed_mb" in cam else "peak_mb"
        memory = cam[field] / original[field]
    return (
        f"{key[0]} px, batch {key[1]}",
        number(ratio), "" if ratio is None else f"≤ 1: {verdict(ratio <= 1)}",
        number(faster, "x"), "" if faster is None else f"≥ 2: {verdict(faster >= 2)}",
        number(memory), "" if memory is None else f"< 0.5: {verdict(memory < 0.5)}",
    )  # fmt: skip


def _line(pixels: int, batch: int, row: dict[str, Any]) -> tuple[str, ...]:
    needed, error = row.get("needed_mb"), row["error"]
    return (
        f"{pixels} px, batch {batch}", row["contestant"], ms(row["median_ms"]),
        f"{100 * row['iqr_ms'] / row['median_ms']:.0f} %", number(row["ratio_to_floor"]), number(row["pairs_per_s"]),
        f"{row['peak_mb']:,.0f}", "" if needed is None else f"{needed:,.0f}", "" if error is None else f"{error:.0e}",
    )  # fmt: skip
