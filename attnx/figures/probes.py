"""Figures of the statistics of heads: against depth, as heat maps, and of several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from attnx.files import replacing
from attnx.jobs.probe_summary import HeadTable

__all__ = ["draw_comparison", "draw_probes"]

TITLES = {
    "distance": "mean attention distance (pixels)",
    "entropy": "entropy of a row (nats)",
    "max": "largest weight of a row",
    "mass": "weight on prefix tokens",
    "importance": "importance: sum of |dA A| of a row",
}
_STYLE: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0}
_WIDTH = 0.36  # half the width of a layer's dots
_COLUMNS = 2  # of panels
CAPTION = (
    "A dot: a head, its mean over the images, sorted. Thin line: 25th to 75th percentile. Line: median of the heads. "
    "Dotted: uniform attention."
)


def draw_probes(table: HeadTable, out: Path) -> dict[Path, str]:
    """Write a figure for each statistic, and heads.png; {path: description} of the written files."""
    written: dict[Path, str] = {}
    for figure, names in {
        "distance": ["distance"],
        "entropy": ["entropy"],
        "sinks": ["mass", "max"],
        "importance": ["importance"],
    }.items():
        names = [name for name in names if name in table.stats]
        if names:
            path = out / f"{figure}.png"
            _against_depth([table], names, path, [table.model])
            written[path] = f"{' and '.join(TITLES[name] for name in names)}: a dot for each head of each layer"
    path = out / "heads.png"
    _heat_maps(table, path)
    written[path] = "heat maps: heads by layers"
    return written


def draw_comparison(tables: Sequence[HeadTable], path: Path) -> None:
    """Write a figure of the statistics that all tables have, a colour for each model."""
    names = [name for name in TITLES if all(name in table.stats for table in tables)]
    called = [table.model for table in tables]
    if len(set(called)) < len(called):
        called = [table.folder for table in tables]
    _against_depth(tables, names, path, called)


def _against_depth(tables: Sequence[HeadTable], names: list[str], path: Path, called: list[str]) -> None:
    """Dots at the means of the heads of each layer, see CAPTION. called: the names of the models."""
    layers = max(len(table.layers) for table in tables)
    with _panels(len(names), 2.6 + 0.25 * layers, 3.4, path) as (figure, axes):
        for panel, name in zip(axes, names, strict=True):
            for number, (table, label) in enumerate(zip(tables, called, strict=True)):
                _dots(panel, table, name, f"C{number}", number - (len(tables) - 1) / 2, len(tables))
                panel.plot([], [], "o-", color=f"C{number}", markersize=3, label=_described(table, label))
            panel.set_xlabel("layer")
            panel.set_ylabel(TITLES[name])
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
            panel.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
        width = int(figure.get_size_inches()[0] * 15)
        figure.supxlabel(fill(CAPTION, width), fontsize=7, x=0.02, ha="left", color="#555555")


def _described(table: HeadTable, name: str) -> str:
    return f"{name}, {table.size[0]} x {table.size[1]} pixels, {table.of_images}"


def _dots(panel: Any, table: HeadTable, name: str, colour: str, place: float, models: int) -> None:
    """Dots, spreads and medians of one model; the line of medians breaks where the number of heads or keys changes."""
    width = _WIDTH / models
    middles: list[tuple[float, float]] = []
    before = None
    columns = zip(*(table.by_layer(name, column) for column in ("mean", "p25", "p75")), strict=True)
    for depth, (about, (means, low, high)) in enumerate(zip(table.layers.values(), columns, strict=True)):
        order, middle = np.argsort(means, kind="stable"), depth + 2 * width * place
        x = middle + np.linspace(-width, width, len(means) + 2)[1:-1]
        panel.vlines(x, low[order], high[order], color=colour, linewidth=0.8, alpha=0.5)
        panel.plot(x, means[order], "o", color=colour, markersize=2.6)
        kind = about["heads"], about["keys"]
        middles += [(np.nan, np.nan)] * (before not in (None, kind)) + [(middle, float(np.median(means)))]
        before = kind
        if name in table.uniform:
            level = table.uniform[name][depth]
            panel.hlines(level, middle - width, middle + width, color=colour, linestyle=":", linewidth=0.9)
    panel.plot(*zip(*middles, strict=True), color=colour, linewidth=0.9, alpha=0.7)


def _heat_maps(table: HeadTable, path: Path) -> None:
    """A heat map for each statistic: heads by layers, from 0 to the largest mean or that of uniform attention."""
    names = [name for name in TITLES if name in table.stats]
    most = max(table.heads)
    with _panels(len(names), 2.2 + 0.2 * len(table.layers), 1.2 + 0.18 * most, path) as (figure, axes):
        for panel, name in zip(axes, names, strict=True):
            cells = np.full((most, len(table.layers)), np.nan)
            for depth, means in enumerate(table.by_layer(name)):
                cells[: len(means), depth] = means
            top = max(float(np.nanmax(cells)), *table.uniform.get(name, [0.0]), 1e-12)
            shown = panel.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=top)
            panel.set_xlabel("layer")
            panel.set_ylabel("head")
            panel.set_title(TITLES[name], loc="left", fontsize=9)
            figure.colorbar(shown, ax=panel)
        figure.suptitle(_described(table, table.model), x=0.02, ha="left", fontsize=9)


@contextmanager
def _panels(count: int, width: float, height: float, path: Path) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels, each of a size in inches; it is written to `path` at the end.

    The settings of matplotlib are its defaults inside the `with`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    parameters: Any = matplotlib.rcParams
    with matplotlib.rc_context(), replacing(path) as unfinished:
        matplotlib.rcdefaults()
        parameters.update(_STYLE)
        figure = Figure(figsize=(columns * width, rows * height + 0.5), facecolor="white", layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in panels[count:]:
            panel.set_axis_off()
        yield figure, panels[:count]
        figure.savefig(unfinished, format="png", dpi=144, metadata={"Software": None})
