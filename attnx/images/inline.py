"""Small pictures inside HTML, for notebooks."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image


def heat_tag(values: np.ndarray, title: str = "", side: int = 64) -> str:
    """An HTML <img> of a map [h, w]: its smallest value is dark, its largest bright. NaN and inf are dark.

    Args:
        values: [h, w] real.
        title: text of the picture for screen readers and tooltips.
        side: pixels of its longer side.
    """
    finite = np.isfinite(values)
    if not values.size or not finite.any():
        return f"<i>{escape(title)}: no finite values</i>"
    low, high = float(values[finite].min()), float(values[finite].max())
    shares = (np.where(finite, values, low) - low) / (high - low) if high > low else np.zeros(values.shape)
    buffer = io.BytesIO()
    Image.fromarray((255 * shares).round().astype(np.uint8)).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = side / max(values.shape)
    height, width = (max(1, round(n * scale)) for n in values.shape)
    size, style = f'width="{width}" height="{height}"', 'style="image-rendering:pixelated;display:inline-block"'
    return f'<img src="data:image/png;base64,{data}" alt="{escape(title)}" title="{escape(title)}" {size} {style}>'


def titled_heat(title: str, values: np.ndarray, side: int = 96) -> str:
    """An inline block of HTML with a map [h, w] and its title below it."""
    block = "display:inline-block;margin:4px;text-align:center"
    return f'<div style="{block}">{heat_tag(values, title, side)}<br>{escape(title)}</div>'
