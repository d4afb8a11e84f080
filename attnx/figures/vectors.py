"""Sheets of pictures as PDF or SVG, for papers: titles and colour bars are vectors, pictures keep their pixels."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

from attnx.messages import printable

if TYPE_CHECKING:
    from attnx.figures.sheets import Sheet

_WIDTH = 6.75  # inches: the text width of a two-column paper
_BAR = 0.16  # width of a colour bar, as a share of its picture


def save_vectors(sheet: Sheet, kind: str, file: IO[bytes]) -> None:
    """Write a sheet; `kind`: "pdf" or "svg". The same sheet gives the same bytes."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(sheet.columns, len(sheet.tiles))
    rows = -(-len(sheet.tiles) // columns)
    each, shared = sheet.limits, sheet.shared
    ratio = max(tile.height / tile.width for tile in sheet.tiles)
    wide = _WIDTH / columns
    picture = wide / (1 + _BAR + 0.3) if each else wide
    # Type 42 fonts can be edited, and journals ask for them. The salt makes names in SVG the same every time.
    style: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "attnx", "font.size": 7}
    with matplotlib.rc_context(style):
        size = _WIDTH + (0.6 if shared else 0), rows * (picture * ratio * 0.95 + 0.25)
        figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
        axes = figure.subplots(rows, columns, squeeze=False)
        for place, axis in enumerate(axes.flat):
            axis.set_axis_off()
            if place >= len(sheet.tiles):
                continue
            axis.imshow(sheet.tiles[place], interpolation="none")
            axis.set_title(printable(sheet.titles[place], 28, middle=True), fontsize=7, pad=2, parse_math=False)
            limits = each[place] if each else None
            if limits is not None:
                colours = ScalarMappable(Normalize(*limits), sheet.cmap)
                figure.colorbar(colours, ax=axis, fraction=0.05, pad=0.02)
        if shared is not None:
            colours = ScalarMappable(Normalize(*shared), sheet.cmap)
            figure.colorbar(colours, ax=axes, fraction=0.03, pad=0.01)
        dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
        figure.savefig(file, format=kind, metadata=dates[kind], dpi=300)
