"""A trace as a line of text, and as a table for notebooks."""

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from attnx.images.inline import heat_tag
from attnx.trace.records import has_no_map

if TYPE_CHECKING:
    from attnx.trace.trace import Trace

_MOST_KINDS = 4  # of layers in a line


def text_of(trace: "Trace") -> str:
    """The number of layers of each shape, in one line."""
    shapes = ["no map" if has_no_map(trace.kept(name)) else str(list(trace.kept(name).shape)) for name in trace]
    runs = [(shape, len(list(group))) for shape, group in groupby(shapes)]
    parts = [f"{count} layer{'s' * (count > 1)}: {shape}" for shape, count in runs[:_MOST_KINDS]]
    more = ["..."] if len(runs) > _MOST_KINDS else []
    rows = "" if trace.rows is None else f", rows={list(trace.rows)}"
    return f"Trace({', '.join(parts + more) or 'no layers'}, heads={trace.heads!r}{rows})"


def table_of(trace: "Trace") -> str:
    """A row for each layer: name, tokens, shape of the map, and the class token's map of the first image."""
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("layer", "tokens", "map", "class token"))
    lines = []
    for name in trace:
        queries, keys = trace.sides(name)
        tokens = str(keys) if queries == keys else f"{queries} over {keys}"
        record = trace.kept(name)
        shape = "no map" if has_no_map(record) else " x ".join(map(str, record.shape))
        cells = "".join(f"<td style='text-align:left'>{escape(text)}</td>" for text in (name, tokens, shape))
        lines.append(f"<tr>{cells}<td>{_class_token(trace, name)}</td></tr>")
    return f"<table><caption>{escape(text_of(trace))}</caption><tr>{head}</tr>{''.join(lines)}</table>"


def _class_token(trace: "Trace", layer: str) -> str:
    """The class token's map of the first image as an HTML picture; "" if there is none."""
    queries, keys = trace.sides(layer)
    first = trace.rows is None or 0 in trace.rows
    if queries != keys or keys.layout is None or not keys.cls or not first or has_no_map(trace.kept(layer)):
        return ""
    try:
        row = trace.kept(layer).row(0 if trace.rows is None else trace.rows.index(0))[0]
    except RuntimeError:  # before the backward pass of a gradient capture
        return ""
    patches = keys.layout.patches(row if row.dim() == 1 else row.mean(0))
    return heat_tag(patches.flatten(0, -2).float().cpu().numpy()) if patches.dim() > 1 else ""
