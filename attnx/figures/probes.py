"""Figures of the statistics of heads: against depth, as heat maps, and of several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
    "importance": "mean |dA A| of a row",
}
_STYLE: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0}
_WIDTH = 0.36  # half the width of a layer's dots


def draw_probes(table: HeadTable, out: Path) -> dict[Path, str]:
    """Write a figure for each statistic, and heads.png; {path: description} of the written files."""
    written: dict[Path, str] = {}
    images = "1 image" if table.images == 1 else f"{table.images:,} images"
    for figure, names in {
        "distance": ["distance"],
        "entropy": ["entropy"],
        "sinks": ["mass", "max"],
        "importance": ["importance"],
    }.items():
        names = [name for name in names if name in table.stats]
        if names:
            path = out / f"{figure}.png"
            _against_depth([table], names, path, f"{table.model}, {images}")
            written[path] = f"{' and '.join(TITLES[name] for name in names)}: a dot for each head of each layer"
    path = out / "heads.png"
    _heat_maps(table, path)
    written[path] = "heat maps: heads by layers"
    return written


def draw_comparison(tables: Sequence[HeadTable], path: Path) -> None:
    """Write a figure of the statistics that all tables have, a colour for each model."""
    names = [name for name in TITLES if all(name in table.stats for table in tables)]
    _against_depth(tables, names, path, "")


def _against_depth(tables: Sequence[HeadTable], names: list[str], path: Path, title: str) -> None:
    """Dots at the means of the heads of each layer, sorted, with a line from the 25th to the 75th percentile."""
    layers = max(len(table.layers) for table in tables)
    with _panels(len(names), 2.4 + 0.25 * layers, 3.4, path) as (_, axes):
        for panel, name in zip(axes, names, strict=True):
            for number, table in enumerate(tables):
                _dots(panel, table, name, f"C{number}", number - (len(tables) - 1) / 2, len(tables))
            panel.set_xlabel("layer")
            panel.set_ylabel(TITLES[name])
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
            panel.xaxis.get_major_locator().set_params(integer=True)
        if title:
            axes[0].set_title(title, loc="left")
        else:
            axes[0].legend(loc="best", frameon=False)


def _dots(panel: Any, table: HeadTable, name: str, colour: str, place: float, models: int) -> None:
    """Dots and spreads of one model; the line connects the medians of the layers' heads."""
    width = _WIDTH / models
    middles = []
    for depth, (means, low, high) in enumerate(
        zip(*(table.by_layer(name, column) for column in ("mean", "p25", "p75")), strict=True)
    ):
        order = np.argsort(means, kind="stable")
        x = depth + 2 * width * place + np.linspace(-width, width, len(means) + 2)[1:-1]
        panel.vlines(x, low[order], high[order], color=colour, linewidth=0.8, alpha=0.5)
        panel.plot(x, means[order], "o", color=colour, markersize=2.6)
        middles.append((depth + 2 * width * place, float(np.median(means))))
    panel.plot(*zip(*middles, strict=True), color=colour, linewidth=0.9, alpha=0.7, label=table.model)


def _heat_maps(table: HeadTable, path: Path) -> None:
    """A heat map for each statistic: heads by layers. The heads of a layer are in their own order."""
    names = [name for name in TITLES if name in table.stats]
    most = max(table.layers.values())
    with _panels(len(names), 1.8 + 0.2 * len(table.layers), 1.2 + 0.18 * most, path) as (figure, axes):
        for panel, name in zip(axes, names, strict=True):
            cells = np.full((most, len(table.layers)), np.nan)
            for depth, means in enumerate(table.by_layer(name)):
                cells[: len(means), depth] = means
            shown = panel.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
            panel.set_xlabel("layer")
            panel.set_ylabel("head")
            panel.set_title(TITLES[name], loc="left", fontsize=8)
            figure.colorbar(shown, ax=panel)


@contextmanager
def _panels(count: int, width: float, height: float, path: Path) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels side by side, each of a size in inches; it is written to `path` at the end.

    The settings of matplotlib are its defaults inside the `with`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    parameters: Any = matplotlib.rcParams
    with matplotlib.rc_context(), replacing(path) as unfinished:
        matplotlib.rcdefaults()
        parameters.update(_STYLE)
        figure = Figure(figsize=(count * width, height), facecolor="white", layout="constrained")
        yield figure, list(figure.subplots(1, count, squeeze=False)[0])
        figure.savefig(unfinished, format="png", dpi=144, metadata={"Software": None})
