"""Markdown of the report: tables, folded sections and numbers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def table(head: Sequence[str], lines: Iterable[Sequence[str]], align: str = "l") -> Iterator[str]:
    """Lines of a Markdown table. Empty columns are left out.

    Args:
        head: the title of each column.
        lines: the cells of each line.
        align: "l" or "r" for each column; further columns are aligned to the right.
    """
    cells = [list(line) for line in lines]
    used = [i for i in range(len(head)) if any(line[i] for line in cells)]
    marks = {"l": "---", "r": "---:"}
    sides = align.ljust(len(head), "r")
    yield "| " + " | ".join(head[i] for i in used) + " |"
    yield "|" + "|".join(marks[sides[i]] for i in used) + "|"
    for line in cells:
        yield "| " + " | ".join(line[i] for i in used) + " |"


def origin(about: dict[str, Any]) -> Iterator[str]:
    """Versions, commit and date of a result."""
    yield ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    yield f"commit {str(about['commit'])[:12]}, {about['date'][:10]}"


def configuration(sizes: Sequence[int]) -> str:
    """A configuration as text: "64x128 8 2, 2 tiles + 16, lag".

    Args:
        sizes: rows, keys, warps, stages; optionally the one-pass kernel's tiles, tail and lag, and the number of
            programs over which the heads are split.
    """
    block_m, block_n, warps, stages, *more = sizes
    text = f"{block_m}x{block_n} {warps} {stages}"
    if more:
        parts, tail, lag, splits, *_ = *more, 1  # results of the sweep do not split the heads
        text += f", {parts} tiles{f' + {tail}' if tail else ''}" if parts > 1 or tail else ""
        text += ", lag" if lag else ""
        text += f", heads / {splits}" if splits > 1 else ""
    return text


def ms(value: float) -> str:
    """Milliseconds with three significant digits and no exponent."""
    for limit, digits in ((0.01, 5), (0.1, 4), (1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def verdict(held: bool) -> str:
    """Markdown that marks a goal as met or missed."""
    return "**met**" if held else "**missed**"


def number(value: float | None, unit: str = "") -> str:
    """The value with about three digits, or "" for None."""
    return "" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
