"""A page in one HTML file: markup, styles, scripts, pictures and maps, and a policy that allows no connection."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL.Image import Image, Resampling

from attnx.files import replacing

LEVELS = 131
"""The steps are at most 1/129 of a maximum: with five digits, a value is off by less than 1/255 of it."""

CMAPS = ("turbo", "viridis", "magma", "inferno", "cividis", "gray", "jet")
_PHOTO_SIDE = 1024
_SCRIPTS = {
    "explore": ("shared.js", "maps.js", "explore.js", "buttons.js", "controls.js"),
    "browse": ("shared.js", "browse.js"),
}
_STYLES = {"explore": ("explore.css",), "browse": ("explore.css", "browse.css")}
# No character needs to be escaped, neither in HTML nor in a string of JSON or JavaScript.
_DIGITS = np.frombuffer(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_{|", np.uint8
)


@dataclass(frozen=True, repr=False)
class Page:
    """A page in one HTML file, which needs no server and no connection. Notebooks show it.

    Attributes:
        title: of the page.
        html: the whole file.
        notes: what the page leaves out or changes, and why; the page says it, too.

    Example:
        >>> from PIL import Image
        >>> page = attnx.explore("demo", Image.new("RGB", (96, 96)))
        >>> page.save("page.html")
        >>> page
        <Page 'demo', 0.1 MB>
    """

    title: str
    html: str
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write the file atomically; an existing file is replaced.

        Raises:
            ValueError: the name does not end in .html.
            OSError: the file can't be written; the error has the path.
        """
        path = Path(path)
        check_name(path)
        try:
            with replacing(path, sync=False) as temporary:
                temporary.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error

    def __repr__(self) -> str:
        return f"<Page {self.title!r}, {len(self.html) / 1e6:.1f} MB>"

    def _repr_html_(self) -> str:
        """The page in a frame that can't reach the notebook around it."""
        attributes = 'sandbox="allow-scripts" width="100%" height="760" style="border:0"'
        return f'<iframe title="{escape(self.title)}" {attributes} srcdoc="{escape(self.html)}"></iframe>'


def check_name(path: Path, name: str = "path") -> None:
    """Raise ValueError, about the argument `name`, unless the path ends in .html."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{name}: expected a name that ends in .html; got {str(path)!r}")


def assemble(kind: str, title: str, data: dict[str, Any], content: bytes = b"", loads_scripts: bool = False) -> Page:
    """The page of a kind with its data.

    Args:
        kind: "explore" or "browse": the name of its markup.
        title: of the page.
        data: values for its script, as JSON. They are text for the script, never markup.
        content: binary data for its script.
        loads_scripts: allow the script to load others, from the folder of the page.
    """
    script = "\n".join(map(_text, _SCRIPTS[kind]))
    style = "\n".join(map(_text, _STYLES[kind]))
    policy = {
        "default-src": "'none'",
        "script-src": f"'{_digest(script)}'" + " 'strict-dynamic'" * loads_scripts,
        "style-src": f"'{_digest(style)}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        # Text never becomes markup; the only addresses of scripts are those of chunks.
        "require-trusted-types-for": "'script'",
        "trusted-types": "attnx" if loads_scripts else "'none'",
    }
    values = json.dumps({**data, "bytes": len(content)}).replace("<", "\\u003c")
    html = Template(_text("template.html")).substitute(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        title=escape(title),
        style=style,
        body=_text(f"{kind}.html"),
        data=values,
        content=base85(content),
        script=script,
    )
    return Page(title, html, tuple(data.get("notes", ())))


def pack(maps: Iterable[np.ndarray]) -> bytes:
    """Maps [M, N], compressed: the scale of each row and of each column as bfloat16, then the codes as uint8.

    ``P_ij ~ u_ij / 131 * min(r_i, c_j)``. The scales r and c are the largest values of the rows and of the columns,
    rounded up by less than 1/128 of them, so the error of a value is at most 1/259 of the maximum of its row, and of
    that of its column. The colours of `CMAPS` are stored before the codes, 256 x 3 bytes for each.

    Raises:
        ValueError: a map has negative, infinite or NaN values.
    """
    scales, codes = [], [colours()]
    for amap in maps:
        if not np.isfinite(amap).all() or (amap.size and amap.min() < 0):
            raise ValueError("maps: expected finite values that are not negative")
        rows, columns = (_rounded_up(amap.max(axis, initial=0)) for axis in (1, 0))
        scale = np.minimum(*(bits.astype("<u4") << 16 for bits in (rows[:, None], columns))).view("<f4")
        shares = np.divide(amap, scale, out=np.zeros_like(scale), where=scale > 0)
        scales += [rows, columns]
        codes.append(np.rint(shares * LEVELS).astype(np.uint8).reshape(-1))
    return deflated([b"".join(part.tobytes() for part in scales), *(part.tobytes() for part in codes)])


def deflated(parts: Iterable[bytes]) -> bytes:
    """The parts in one zlib stream. Each has its own statistics."""
    compressor = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    packed = [compressor.compress(part) + compressor.flush(zlib.Z_FULL_FLUSH) for part in parts]
    return b"".join([*packed, compressor.flush()])


def base85(content: bytes) -> str:
    """The content as text, five characters for four bytes. Zeros are appended up to a multiple of four bytes."""
    words = np.frombuffer(content + bytes(-len(content) % 4), ">u4").astype(np.uint32)
    digits = words[:, None] // 85 ** np.arange(4, -1, -1, dtype=np.uint32) % 85
    return str(_DIGITS[digits].tobytes(), "ascii")


def jpeg(picture: Image, side: int = _PHOTO_SIDE, quality: int = 85) -> str:
    """A picture as base64 text of a JPEG, at most `side` pixels at its longer side."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _rounded_up(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values, not negative, as bfloat16."""
    return ((values.astype("<f4").view("<u4") + 0xFFFF) >> 16).astype("<u2")


def colours() -> np.ndarray:
    """The colours of `CMAPS`, uint8 [maps, 256, 3]."""
    from matplotlib import colormaps

    return np.stack([colormaps[name](np.arange(256), bytes=True)[:, :3] for name in CMAPS])


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def photo_of(picture: Image | None) -> dict[str, Any]:
    """The values of a picture for a script: its JPEG, and its width and height in pixels."""
    if picture is None:
        return {"photo": None, "size": None}
    return {"photo": jpeg(picture), "size": picture.size}
