"""The tokens on one side of a map, and layers described by them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from attnx.trace.layout import TokenLayout

_WORDS = {
    "image": ("image token", "image tokens"),
    "text": ("text token", "text tokens"),
    "channels": ("channel", "channels"),
    "queries": ("query", "queries"),
}


@dataclass(frozen=True)
class Tokens:
    """The tokens on one side of a map.

    Attributes:
        kind: "image", "text", "windows" (the tokens of one window of an image: an item of the batch has several maps),
            "channels" (features instead of tokens), "queries" (learned, or from another layer), or "tokens" if their
            kind is unknown.
        prefix, grid, suffix: as in `TokenLayout`, for an image; grid is None if the tokens do not fill a grid of
            patches. For windows it is the grid of the whole image, and None if that is unknown.
        count: number of tokens.
        cls: True if token 0 is a class token.
        part: name of the part of the model that the tokens belong to, such as "vision_model"; "" if there is one part.
        frames: as in `TokenLayout`, for a video.
    """

    kind: str
    prefix: int = 0
    grid: tuple[int, int] | None = None
    count: int = 0
    cls: bool = False
    part: str = ""
    frames: int = 1
    suffix: int = 0

    @property
    def layout(self) -> TokenLayout | None:
        """Prefix and grid as a `TokenLayout`; None if there is no grid."""
        if self.grid is None or self.kind == "windows":
            return None
        return TokenLayout(self.prefix, self.grid, self.cls, self.frames, self.suffix)

    def __str__(self) -> str:
        if self.kind == "windows":
            grid = f" of {self.grid[0]} x {self.grid[1]}" if self.grid else ""
            return f"windows of {self.count}{grid} tokens" + (f" of {self.part}" if self.part else "")
        one, many = _WORDS.get(self.kind, ("token", "tokens"))
        return f"{self.count} {one if self.count == 1 else many}" + (f" of {self.part}" if self.part else "")


def of_layout(layout: TokenLayout, part: str) -> Tokens:
    """The tokens of an image with the given layout."""
    cls = layout.cls is True
    return Tokens("image", layout.prefix, layout.grid, layout.tokens, cls, part, layout.frames, layout.suffix)


@lru_cache(4096)
def stack_of(layer: str) -> str:
    """Name of the stack of blocks around a layer: "encoder.layer" for "encoder.layer.3.attention"."""
    stem = re.match(r"(.*?)\d+(?=[.#]|$)", layer)
    return "" if stem is None else stem[1].rstrip(".")


def describe(sides_of: Mapping[str, tuple[Tokens, Tokens]], by_stack: bool = False) -> str:
    """Layers in words, grouped by the tokens of their maps: "12 text tokens of text_model: text_model.layers.0".

    Args:
        sides_of: {layer: (queries, keys)}.
        by_stack: group by the stack of blocks, too.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for layer, (queries, keys) in sides_of.items():
        tokens = f"{queries} over {keys}" if queries != keys else f"{keys}"
        groups.setdefault((tokens, stack_of(layer) if by_stack else ""), []).append(layer)
    return "; ".join(
        f"{tokens}: {names[0]}" + (f" ... {names[-1]} ({len(names)} layers)" if len(names) > 1 else "")
        for (tokens, _), names in groups.items()
    )
